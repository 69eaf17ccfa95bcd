# SPDX-License-Identifier: Apache-2.0
"""The only way to a trusted `Roster`: python-tuf's client workflow over a bundle of files.

Invariant: a `Roster` leaves here only after root chain, timestamp, snapshot, targets and every
record were verified, at a given time, against what this directory trusted before; so an older or
expired roster is refused. No network: bundles come with the relay or by hand.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

from tuf.api.exceptions import (
    BadVersionNumberError,
    DownloadError,
    DownloadHTTPError,
    ExpiredMetadataError,
    LengthOrHashMismatchError,
    RepositoryError,
)
from tuf.api.metadata import Metadata, Root, Signed, Snapshot, TargetFile, Targets, Timestamp
from tuf.ngclient import Updater
from tuf.ngclient.fetcher import FetcherInterface

from allograft.crypto import canonical
from allograft.durable import durable_write, storage_errors
from allograft.errors import RejectedError
from allograft.limits import LIMITS
from allograft.plainfile import read_plain
from allograft.roster import bundle
from allograft.roster.records import (
    CoordinatorRecord,
    Revocation,
    Roster,
    SiteRecord,
    read_policy,
)
from allograft.roster.signer import check_tuf_key

_BASE = "bundle:/"


class _BundleFetcher(FetcherInterface):
    """Serves the files of a bundle under the names that the updater asks for."""

    def __init__(self, files: bundle.Files) -> None:
        self._files = files

    def _fetch(self, url: str) -> Iterator[bytes]:
        name = url.removeprefix(_BASE)
        if name not in self._files:
            raise DownloadHTTPError("not in the bundle", 404)
        yield self._files[name]


class RosterClient:
    """What one machine trusts about the roster, in a directory of its own.

    Args:
        directory: Holds `root.json` (the anchor) and `roster.json` (the newest verified bundle),
            each replaced whole: a bundle that fails half-way leaves no trace.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._current: Roster | None = None

    def trust(self, root_json: bytes) -> str:
        """Trust a root for the first time; returns its fingerprint for people to compare.

        Raises:
            RejectedError: AG-ROS-010 if another root is trusted already, AG-ROS-008 if it is
                malformed, AG-KEY-003 if a key of it is unusable.
        """
        read_root(root_json)
        anchor = self._directory / "root.json"
        if anchor.exists() and anchor.read_bytes() != root_json:
            raise RejectedError("AG-ROS-010", "another root is trusted here already")
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        durable_write(anchor, root_json, mode=0o644)
        return root_fingerprint(root_json)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the root that everything is anchored in.

        Raises:
            RejectedError: AG-ROS-009 if no root is trusted yet.
        """
        return root_fingerprint(self._anchor())

    def refresh(self, files: bundle.Files, now: datetime) -> Roster:
        """Verify a bundle and trust it from now on.

        Args:
            files: TUF file names and contents, as `bundle.unpack` returns them.
            now: The current time (UTC).

        Raises:
            RejectedError: AG-ROS-006 older than what was trusted, -007 expired, -008 not signed or
                incomplete, -001 a malformed record, -009 no root, AG-KEY-* an unusable key.
            UnavailableError: AG-STO-001.
        """
        previous = self.files() if self._path.exists() else {}
        # Roots that were trusted once stay: a bundle that leaves out the newest one would
        # otherwise bring back keys that it revoked.
        roots = {name: c for name, c in previous.items() if name.endswith(".root.json")}
        merged = {**files, **roots}
        roster = verify_bundle(self._anchor(), merged, now, previous)
        durable_write(self._path, bundle.pack(merged), mode=0o644)
        self._current = roster
        return roster

    def current(self, now: datetime) -> Roster:
        """The newest verified roster, if it is still fresh.

        Raises:
            RejectedError: AG-ROS-009 if there is none, AG-ROS-007 if it expired.
        """
        roster = self.latest()
        roster.check_fresh(now)
        return roster

    def latest(self) -> Roster:
        """The newest verified roster, even if it expired.

        For the relay's frames alone: the coordinator must be able to bring a fresh roster to a
        site whose own one expired while either was away.

        Raises:
            RejectedError: AG-ROS-009 if there is none.
        """
        if self._current is None:
            files = self.files()
            self._current = verify_bundle(self._anchor(), files, last_moment(files))
        return self._current

    def files(self) -> dict[str, bytes]:
        """The bundle behind `latest`.

        Raises:
            RejectedError: AG-ROS-009 if there is none.
        """
        if not self._path.exists():
            raise RejectedError("AG-ROS-009", "no roster was verified here yet")
        return bundle.unpack(read_plain(self._path, LIMITS.roster_bundle_bytes))

    @property
    def _path(self) -> Path:
        return self._directory / "roster.json"

    def _anchor(self) -> bytes:
        anchor = self._directory / "root.json"
        if not anchor.exists():
            raise RejectedError("AG-ROS-009", "no root is trusted here yet")
        return read_plain(anchor, LIMITS.roster_file_bytes)


def verify_bundle(
    anchor: bytes, files: bundle.Files, now: datetime, previous: bundle.Files | None = None
) -> Roster:
    """Verify a bundle without remembering it; auditors verify rosters of the past with this.

    Args:
        anchor: The root that everything must lead back to.
        files: The bundle.
        now: The time at which it must be valid.
        previous: The bundle that was trusted before; an older one is then refused.

    Raises:
        RejectedError: As `RosterClient.refresh`.
    """
    for name, content in files.items():
        if name.endswith(".root.json"):
            read_root(content)
    with storage_errors("a scratch copy of the roster"), TemporaryDirectory() as scratch:
        trusted = Path(scratch)
        if previous:
            # What TUF compares versions with.
            (trusted / "timestamp.json").write_bytes(bundle.timestamp(previous))
            for kind in ("snapshot", "targets"):
                (trusted / f"{kind}.json").write_bytes(bundle.newest(previous, kind)[1])
        _run_updater(trusted, anchor, files, now)
        return _read_verified(trusted, files)


def _run_updater(trusted: Path, anchor: bytes, files: bundle.Files, now: datetime) -> None:
    try:
        updater = Updater(str(trusted), _BASE, fetcher=_BundleFetcher(files), bootstrap=anchor)
        # python-tuf reads the clock itself and takes no time. Auditors verify rosters of the past,
        # so its one reference time is set; tests hold the private name to its meaning.
        updater._trusted_set.reference_time = now
        updater.refresh()
    except BadVersionNumberError as error:
        raise RejectedError("AG-ROS-006", "the roster is older than the trusted one") from error
    except ExpiredMetadataError as error:
        raise RejectedError("AG-ROS-007", "a signature of the roster has expired") from error
    except (RepositoryError, DownloadError) as error:
        kind = type(error).__name__
        raise RejectedError("AG-ROS-008", f"the roster does not verify: {kind}") from error


def _read_verified(trusted: Path, files: bundle.Files) -> Roster:
    """Put the roster together from the metadata that the updater just verified and kept."""
    names = ("root", "timestamp", "snapshot", "targets")
    contents = [(trusted / f"{name}.json").read_bytes() for name in names]
    targets = Metadata[Targets].from_bytes(contents[3]).signed
    everything: tuple[Signed, ...] = (
        Metadata[Root].from_bytes(contents[0]).signed,
        Metadata[Timestamp].from_bytes(contents[1]).signed,
        Metadata[Snapshot].from_bytes(contents[2]).signed,
        targets,
    )
    records = _read_targets(targets, files)
    _check_closed(files, everything[2].version, targets)
    return Roster(
        version=everything[1].version,
        sites=records.sites,
        revoked=records.revoked,
        coordinator=records.coordinator(),
        witness_quorum=records.quorum(),
        expires=min(signed.expires for signed in everything),
        digest=bundle.digest_of(*contents),
    )


class _Records:
    """Records by kind while targets are read."""

    def __init__(self) -> None:
        self.sites: dict[str, SiteRecord] = {}
        self.revoked: dict[str, Revocation] = {}
        self._coordinator: CoordinatorRecord | None = None
        self._quorum = 0

    def add(self, path: str, content: bytes) -> None:
        folder, _, name = path.rpartition("/")
        party = name.removesuffix(".json")
        if path == "coordinator.json":
            self._coordinator = CoordinatorRecord.from_bytes(content)
        elif path == "policy.json":
            self._quorum = read_policy(content)
        elif folder == "sites":
            record = SiteRecord.from_bytes(content)
            _check_name(party, record.site_id)
            self.sites[party] = record
        elif folder == "revoked":
            revocation = Revocation.from_bytes(content)
            _check_name(party, revocation.site_id)
            self.revoked[party] = revocation
        else:
            raise RejectedError("AG-ROS-008", "the roster lists a file of an unknown kind")

    def coordinator(self) -> CoordinatorRecord:
        if self._coordinator is None:
            raise RejectedError("AG-ROS-008", "the roster names no coordinator")
        return self._coordinator

    def quorum(self) -> int:
        if not self._quorum:
            raise RejectedError("AG-ROS-008", "the roster has no policy")
        return self._quorum


def _read_targets(targets: Targets, files: bundle.Files) -> _Records:
    if targets.delegations is not None:
        # Delegated roles could enrol sites beside the keeper; this format has none.
        raise RejectedError("AG-ROS-008", "the roster delegates")
    if len(targets.targets) > LIMITS.roster_sites + 2:
        raise RejectedError("AG-ROS-008", f"the roster lists {len(targets.targets)} files")
    records = _Records()
    for path, target in targets.targets.items():
        records.add(path, _target_content(target, files))
    both = records.sites.keys() & records.revoked.keys()
    if both:
        raise RejectedError("AG-ROS-008", f"{min(both)} is enrolled and revoked at once")
    return records


def _check_closed(files: bundle.Files, snapshot_version: int, targets: Targets) -> None:
    """Refuse files that nothing lists: bundles go to every site and are kept by auditors."""
    listed = {target_name(target) for target in targets.targets.values()}
    listed |= {"timestamp.json", f"{snapshot_version}.snapshot.json"}
    listed |= {f"{targets.version}.targets.json"}
    extra = [name for name in files.keys() - listed if not name.endswith(".root.json")]
    if extra:
        raise RejectedError("AG-ROS-008", f"a roster bundle holds {len(extra)} files too many")


def _target_content(target: TargetFile, files: bundle.Files) -> bytes:
    content = files.get(target_name(target))
    if content is None:
        raise RejectedError("AG-ROS-008", "a record that the roster lists is missing")
    try:
        target.verify_length_and_hashes(content)
    except LengthOrHashMismatchError as error:
        raise RejectedError("AG-ROS-008", "a record is not the one that was signed") from error
    return content


def target_name(target: TargetFile) -> str:
    """The name of a record in a bundle.

    Raises:
        RejectedError: AG-ROS-008 if it is not named by SHA-256.
    """
    folder, slash, name = target.path.rpartition("/")
    if set(target.hashes) != {"sha256"}:
        raise RejectedError("AG-ROS-008", "a record is not listed by SHA-256")
    return f"targets/{folder}{slash}{target.hashes['sha256']}.{name}"


def root_fingerprint(root_json: bytes) -> str:
    """SHA-256 (hex) of the first root, which people compare before they trust it."""
    return hashlib.sha256(root_json).hexdigest()


def read_root(content: bytes) -> Root:
    """Read a root; its keys are of the kind that we use, its signatures are yet to be verified.

    Raises:
        RejectedError: AG-ROS-008 if it is malformed, AG-KEY-003 if a key of it is unusable.
    """
    if len(content) > LIMITS.roster_file_bytes:
        raise RejectedError("AG-ROS-008", f"a root of {len(content)} bytes")
    try:
        metadata = Metadata[Root].from_bytes(content)
    except RepositoryError as error:
        raise RejectedError("AG-ROS-008", "a root of the roster is malformed") from error
    root = metadata.signed
    if not isinstance(root, Root) or not root.consistent_snapshot:
        raise RejectedError("AG-ROS-008", "a root of the roster is not a root")
    for key in root.keys.values():
        check_tuf_key(key)
    return root


def _check_name(expected: str, found: str) -> None:
    if expected != found:
        raise RejectedError("AG-ROS-008", "a record is filed under another name")


def last_moment(files: bundle.Files) -> datetime:
    """The last second at which a bundle is valid, if it ever was.

    Raises:
        RejectedError: AG-ROS-008 if it is incomplete, AG-IN-* if malformed.
    """
    contents = (
        bundle.newest(files, "root")[1],
        bundle.timestamp(files),
        bundle.newest(files, "snapshot")[1],
        bundle.newest(files, "targets")[1],
    )
    expiries = [canonical.parse_time(_expiry(content)) for content in contents]
    return min(expiries) - timedelta(seconds=1)


def _expiry(content: bytes) -> str:
    fields = canonical.as_mapping(canonical.loads(content, LIMITS.roster_file_bytes))
    return canonical.as_text(canonical.as_mapping(fields.get("signed")).get("expires"))
