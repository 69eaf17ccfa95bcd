# SPDX-License-Identifier: Apache-2.0
"""A published roster as named files, as one JSON document, and its digest.

Names are TUF's own: `N.root.json` for every root so far, `timestamp.json`, `N.snapshot.json`,
`N.targets.json`, and `targets/<path>` with the hash prefix of consistent snapshots. Nothing in a
bundle is trusted before `client` has verified it. See protos/spec/roster.md, "Bundle".
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping

from allograft.crypto import canonical
from allograft.errors import RejectedError
from allograft.limits import LIMITS

_NAME = re.compile(
    r"timestamp\.json"
    r"|[1-9][0-9]{0,8}\.(root|snapshot|targets)\.json"
    r"|targets/((sites|revoked)/)?[0-9a-f]{64}\.[a-z0-9][a-z0-9-]{0,62}\.json"
)
_VERSIONED = re.compile(r"([1-9][0-9]{0,8})\.(root|snapshot|targets)\.json")

Files = Mapping[str, bytes]


def pack(files: Files) -> bytes:
    """The files as one canonical JSON document, `roster.json`."""
    encoded = {name: base64.b64encode(content).decode() for name, content in files.items()}
    return canonical.dumps({"files": encoded})


def unpack(content: bytes) -> dict[str, bytes]:
    """Read the files of a `roster.json`.

    Raises:
        RejectedError: AG-ROS-008 if malformed or over a limit.
    """
    try:
        document = canonical.loads(content, LIMITS.roster_bundle_bytes)
        encoded = canonical.as_mapping(canonical.as_object(document, {"files"})["files"])
        files = {name: canonical.as_base64(value) for name, value in encoded.items()}
    except RejectedError as error:
        raise RejectedError("AG-ROS-008", f"roster bundle: {error.cause}") from error
    if not all(_NAME.fullmatch(name) for name in files):
        raise RejectedError("AG-ROS-008", "a roster bundle holds a file of an unknown name")
    # python-tuf parses some of them before it verifies a signature, and counts nothing.
    if any(len(content) > LIMITS.roster_file_bytes for content in files.values()):
        raise RejectedError("AG-ROS-008", "a roster bundle holds a file over its limit")
    return files


def newest(files: Files, kind: str) -> tuple[int, bytes]:
    """Highest version of a kind of metadata (`root`, `snapshot`, `targets`), and its content.

    Raises:
        RejectedError: AG-ROS-008 if there is none.
    """
    matches = (_VERSIONED.fullmatch(name) for name in files)
    versions = [int(match[1]) for match in matches if match is not None and match[2] == kind]
    if not versions:
        raise RejectedError("AG-ROS-008", f"a roster bundle without {kind}")
    return max(versions), files[f"{max(versions)}.{kind}.json"]


def timestamp(files: Files) -> bytes:
    """The timestamp of a bundle.

    Raises:
        RejectedError: AG-ROS-008 if there is none.
    """
    if "timestamp.json" not in files:
        raise RejectedError("AG-ROS-008", "a roster bundle without timestamp")
    return files["timestamp.json"]


def digest(files: Files) -> str:
    """The digest (hex) that the log records for a bundle and that sites compare.

    It covers the newest root, snapshot and targets and the timestamp. Records of sites are covered
    through the targets, so a digest can be recomputed without them.
    """
    return digest_of(
        newest(files, "root")[1],
        timestamp(files),
        newest(files, "snapshot")[1],
        newest(files, "targets")[1],
    )


def digest_of(root: bytes, timestamp: bytes, snapshot: bytes, targets: bytes) -> str:
    """The digest over four metadata files."""
    named = {"root": root, "timestamp": timestamp, "snapshot": snapshot, "targets": targets}
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in named.items()}
    return hashlib.sha256(canonical.dumps(hashes)).hexdigest()
