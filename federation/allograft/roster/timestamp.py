# SPDX-License-Identifier: Apache-2.0
"""The coordinator's one right over the roster: to say, daily, that it is still the newest.

The timestamp key stays online. Whoever has it, the coordinator too, can hold sites at the newest
roster they have until its snapshot expires (`keeper.TARGETS_LIFETIME`), and can enrol or change
nothing.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, MetaFile, Root, Timestamp

from allograft.crypto.notekey import NoteKey
from allograft.errors import RejectedError
from allograft.roster import bundle
from allograft.roster.signer import RosterSigner

LIFETIME = timedelta(hours=24)


def renew_timestamp(
    files: bundle.Files,
    key: NoteKey,
    now: datetime,
    above: int = 0,
    lifetime: timedelta = LIFETIME,
) -> dict[str, bytes]:
    """The same roster with a fresh timestamp.

    Args:
        files: A verified bundle.
        key: The timestamp key.
        now: The current time (UTC), in whole seconds.
        above: The highest timestamp version that any site may have seen from us.
        lifetime: How long sites may go without the next one.

    Raises:
        RejectedError: AG-ROS-015 if the root does not give the key this role, AG-ROS-008 if the
            bundle is incomplete.
    """
    signer = RosterSigner(key)
    try:
        root = Metadata[Root].from_bytes(bundle.newest(files, "root")[1]).signed
        previous = Metadata[Timestamp].from_bytes(bundle.timestamp(files)).signed
    except RepositoryError as error:
        raise RejectedError("AG-ROS-008", "a roster bundle is malformed") from error
    if signer.public_key.keyid not in root.roles[Timestamp.type].keyids:
        raise RejectedError("AG-ROS-015", "this timestamp key is not in the root")
    snapshot_version, _ = bundle.newest(files, "snapshot")
    renewed = make_timestamp(
        max(previous.version, above) + 1, snapshot_version, now + lifetime, signer
    )
    return {**files, "timestamp.json": renewed}


def is_due(files: bundle.Files, now: datetime, lifetime: timedelta = LIFETIME) -> bool:
    """Whether less than half of a timestamp's life is left.

    Raises:
        RejectedError: AG-ROS-008 if the bundle is incomplete.
    """
    try:
        expires = Metadata[Timestamp].from_bytes(bundle.timestamp(files)).signed.expires
    except RepositoryError as error:
        raise RejectedError("AG-ROS-008", "a timestamp is malformed") from error
    return now + lifetime / 2 >= expires


def make_timestamp(
    version: int, snapshot_version: int, expires: datetime, signer: RosterSigner
) -> bytes:
    """A signed timestamp."""
    stamp = Timestamp(version=version, expires=expires, snapshot_meta=MetaFile(snapshot_version))
    metadata = Metadata(stamp)
    metadata.sign(signer)
    return metadata.to_bytes()
