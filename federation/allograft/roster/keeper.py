# SPDX-License-Identifier: Apache-2.0
"""The offline administrator of a roster: init, enrol, revoke, publish, renew the root.

The directory holds the records as plain files, every version of the signed metadata, and `keys/`,
whose files can be moved to other media and are asked for by name when they are needed. Invariant:
nothing counts before `publish` signed it, and a published version is never written again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from tuf.api.metadata import (
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from allograft.crypto import keystore
from allograft.crypto.notekey import NoteKey
from allograft.durable import durable_write, sync_directory
from allograft.errors import RejectedError, UnavailableError
from allograft.limits import LIMITS
from allograft.plainfile import read_plain
from allograft.roster import bundle
from allograft.roster.client import RosterClient, read_root, root_fingerprint, target_name
from allograft.roster.invitation import Invitation
from allograft.roster.records import (
    CoordinatorRecord,
    Revocation,
    Roster,
    SiteRecord,
    read_policy,
    write_policy,
)
from allograft.roster.signer import RosterSigner, tuf_key
from allograft.roster.timestamp import make_timestamp

ROOT_LIFETIME = timedelta(days=365)
TARGETS_LIFETIME = timedelta(days=90)
# A new site verifies its invitation before the coordinator can bring it a daily timestamp, so the
# keeper signs one that lives for as long as an invitation may lie in someone's mailbox.
INVITATION_LIFETIME = timedelta(days=7)

_ROOT_KEYS = 9

T = TypeVar("T", Root, Snapshot, Targets)


@dataclass(frozen=True, slots=True)
class Published:
    """What `publish` made."""

    version: int
    digest: str
    root_fingerprint: str
    files: Mapping[str, bytes]
    invitation: Invitation


class Keeper:
    """One roster under administration.

    Args:
        directory: An initialised directory.

    Raises:
        RejectedError: AG-ROS-016 if it is not one, or if its first root is damaged.
    """

    def __init__(self, directory: Path) -> None:
        if not (directory / "metadata" / "1.root.json").exists():
            raise RejectedError("AG-ROS-016", f"{directory.name} holds no roster")
        self._directory = directory
        try:
            read_root(self._read("metadata", "1.root.json"))
        except RejectedError as error:
            raise RejectedError("AG-ROS-016", f"metadata/1.root.json: {error.cause}") from error

    @classmethod
    def create(
        cls,
        directory: Path,
        coordinator: CoordinatorRecord,
        now: datetime,
        root_keys: int = 3,
        threshold: int = 2,
    ) -> Keeper:
        """Begin a roster: make the keys, sign the first root.

        Args:
            directory: An empty or absent directory.
            coordinator: From its verified request.
            now: The current time (UTC), in whole seconds.
            root_keys: How many root keys to make.
            threshold: How many of them a new root needs.

        Raises:
            RejectedError: AG-ROS-016 if the directory is in use or the numbers make no sense.
            UnavailableError: AG-STO-001; nothing is left behind then.
        """
        if not 1 <= threshold <= root_keys <= _ROOT_KEYS:
            raise RejectedError("AG-ROS-016", f"a threshold of {threshold} of {root_keys} keys")
        if directory.exists() and any(directory.iterdir()):
            raise RejectedError("AG-ROS-016", f"{directory.name} is not empty")
        existed = directory.exists()
        try:
            cls._begin(directory, coordinator, now, root_keys, threshold)
        except BaseException:
            # Half a roster would only be in the way of the next attempt.
            shutil.rmtree(directory, ignore_errors=True)
            if existed:
                # It is still there if it is a mount point.
                directory.mkdir(mode=0o700, exist_ok=True)
            raise
        return cls(directory)

    @staticmethod
    def _begin(
        directory: Path,
        coordinator: CoordinatorRecord,
        now: datetime,
        root_keys: int,
        threshold: int,
    ) -> None:
        for name in ("keys", "metadata", "sites", "revoked"):
            (directory / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        signers = [_make_key(directory, f"root-{n}") for n in range(1, root_keys + 1)]
        targets = _make_key(directory, "targets")
        root = Root(version=1, expires=now + ROOT_LIFETIME, consistent_snapshot=True)
        for signer in signers:
            root.add_key(signer.public_key, Root.type)
        root.roles[Root.type].threshold = threshold
        for role in (Targets.type, Snapshot.type, Timestamp.type):
            root.add_key(targets.public_key, role)
        root.add_key(tuf_key(coordinator.timestamp_key), Timestamp.type)
        durable_write(directory / "coordinator.json", coordinator.to_bytes(), mode=0o644)
        content = _sign(root, signers[:threshold])
        durable_write(directory / "metadata" / "1.root.json", content, mode=0o644)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the first root; the keeper tells it to those who join."""
        return root_fingerprint(self._read("metadata", "1.root.json"))

    @property
    def sites(self) -> dict[str, SiteRecord]:
        """Enrolled sites, published or not."""
        records = (SiteRecord.from_bytes(c) for c in self._records("sites"))
        return {record.site_id: record for record in records}

    @property
    def revoked(self) -> dict[str, Revocation]:
        """Revoked sites, published or not."""
        records = (Revocation.from_bytes(c) for c in self._records("revoked"))
        return {record.site_id: record for record in records}

    @property
    def coordinator(self) -> CoordinatorRecord:
        """The coordinator.

        Raises:
            RejectedError: AG-ROS-016 if its record is missing, AG-ROS-001 if it is malformed.
        """
        return CoordinatorRecord.from_bytes(self._read("coordinator.json"))

    @property
    def quorum(self) -> int:
        """The witness quorum: what was fixed, else a majority of the witnesses, at least one.

        Two majorities share a witness, so a log cannot show two of them different histories
        without one witness seeing both.
        """
        if self._path("policy.json").exists():
            return read_policy(self._read("policy.json"))
        return sum("witness" in site.roles for site in self.sites.values()) // 2 + 1

    def fix_quorum(self, quorum: int) -> None:
        """Fix the witness quorum instead of following the number of witnesses.

        Raises:
            RejectedError: AG-ROS-001 if it is below one.
        """
        content = write_policy(quorum)
        read_policy(content)
        durable_write(self._path("policy.json"), content, mode=0o644)

    def enrol(self, record: SiteRecord, *, replace: bool = False) -> None:
        """Add a site whose request was verified and whose fingerprint was compared.

        Args:
            record: From `enrolment.verify_site_request`.
            replace: Give an enrolled site new keys.

        Raises:
            RejectedError: AG-ROS-012 if the name is taken or was revoked.
        """
        if record.site_id in self.revoked:
            raise RejectedError("AG-ROS-012", f"the name {record.site_id} was revoked")
        path = self._path("sites", f"{record.site_id}.json")
        if path.exists() and not replace:
            raise RejectedError("AG-ROS-012", f"{record.site_id} is enrolled already")
        self._check_unshared(record)
        durable_write(path, record.to_bytes(), mode=0o644)

    def revoke(self, site_id: str, reason: str, now: datetime) -> None:
        """Take a site out for good.

        Raises:
            RejectedError: AG-ROS-002 if it is not enrolled, AG-ROS-001 if the reason is no line.
        """
        path = self._path("sites", f"{site_id}.json")
        if site_id not in self.sites:
            raise RejectedError("AG-ROS-002", f"{site_id} is not in the roster")
        content = Revocation(site_id, reason, now).to_bytes()
        Revocation.from_bytes(content)
        durable_write(self._path("revoked", f"{site_id}.json"), content, mode=0o644)
        path.unlink()

    def publish(self, now: datetime, out: Path | None = None) -> Published:
        """Sign the records as a new version and verify the result as a site would.

        Args:
            now: The current time (UTC), in whole seconds.
            out: Where `write_published` would write it. If that fails, there is no new version.

        Raises:
            UnavailableError: AG-STO-001; the version is free for the next attempt then.
            RejectedError: AG-ROS-013 if the targets key is not there, AG-ROS-007 if the root has
                expired (renew it).
        """
        signer = self._signer("targets")
        version = self._next_version("targets")
        targets = Targets(version=version, expires=now + TARGETS_LIFETIME)
        records: dict[str, bytes] = {}
        for path, content in self._contents().items():
            target = TargetFile.from_data(path, content, ["sha256"])
            targets.targets[path] = target
            records[target_name(target)] = content
        snapshot = Snapshot(version=version, expires=now + TARGETS_LIFETIME)
        snapshot.meta["targets.json"] = MetaFile(version)
        stamp = make_timestamp(version, version, now + INVITATION_LIFETIME, signer)
        files = {
            **self._roots(),
            f"{version}.targets.json": _sign(targets, [signer]),
            f"{version}.snapshot.json": _sign(snapshot, [signer]),
            "timestamp.json": stamp,
            **records,
        }
        invitation = Invitation(files["1.root.json"], files)
        with contextlib.ExitStack() as stack:
            if out is not None:
                stack.enter_context(_staged(files, invitation, out))
            roster = self._record(files, now)
        return Published(version, roster.digest, self.fingerprint, files, invitation)

    def _record(self, files: bundle.Files, now: datetime) -> Roster:
        """Verify a new version and make it the newest, or leave no trace of it."""
        names = [n for n in files if not n.startswith("targets/") and not n.endswith(".root.json")]
        before = {n: p.read_bytes() for n in names if (p := self._path("metadata", n)).exists()}
        try:
            for name in names:
                durable_write(self._path("metadata", name), files[name], mode=0o644)
            # Last, because the keeper's own client never goes back to an older version.
            return self._verify(files, now)
        except BaseException:
            for name in names:
                with contextlib.suppress(OSError, UnavailableError):
                    if name in before:
                        durable_write(self._path("metadata", name), before[name], mode=0o644)
                    else:
                        self._path("metadata", name).unlink(missing_ok=True)
            raise

    def renew_root(
        self, now: datetime, coordinator: CoordinatorRecord | None = None
    ) -> tuple[int, datetime]:
        """Sign the next root: a new expiry, and on request another coordinator.

        Returns:
            The root's version and expiry.

        Raises:
            RejectedError: AG-ROS-013 if fewer root keys are there than the threshold.
        """
        version, content = bundle.newest(self._roots(), "root")
        root = read_root(content)
        signers = self._root_signers(root)
        root.version = version + 1
        root.expires = now + ROOT_LIFETIME
        if coordinator is not None:
            old = tuf_key(self.coordinator.timestamp_key).keyid
            root.revoke_key(old, Timestamp.type)
            root.add_key(tuf_key(coordinator.timestamp_key), Timestamp.type)
        signed = _sign(root, signers)
        durable_write(self._path("metadata", f"{root.version}.root.json"), signed, mode=0o644)
        if coordinator is not None:
            durable_write(self._path("coordinator.json"), coordinator.to_bytes(), mode=0o644)
        return root.version, root.expires

    def _root_signers(self, root: Root) -> list[RosterSigner]:
        role = root.roles[Root.type]
        found = []
        for path in sorted(self._path("keys").glob("root-*.key")):
            signer = RosterSigner(keystore.read_note_key(path))
            if signer.public_key.keyid in role.keyids:
                found.append(signer)
        if len(found) < role.threshold:
            raise RejectedError(
                "AG-ROS-013", f"{len(found)} of {role.threshold} root keys are in keys/"
            )
        return found

    def _check_unshared(self, record: SiteRecord) -> None:
        """Refuse keys that another site already has: signatures must tell sites apart."""
        for other in self.sites.values():
            if other.site_id == record.site_id:
                continue
            taken = {key.key_id for key in other.signing_keys} | {other.sealing_key.key_id}
            own = {key.key_id for key in record.signing_keys} | {record.sealing_key.key_id}
            shares_node = other.node_key.split()[:2] == record.node_key.split()[:2]
            # The last field of a verifier key holds the raw key; names differ anyway.
            shares_witness = other.witness_vkey[-43:] == record.witness_vkey[-43:]
            if taken & own or shares_node or shares_witness:
                raise RejectedError("AG-ROS-012", f"a key of {other.site_id} is used again")

    def _contents(self) -> dict[str, bytes]:
        """The records that the next version signs, by target path."""
        contents = {
            "coordinator.json": self.coordinator.to_bytes(),
            "policy.json": write_policy(self.quorum),
        }
        contents |= {f"sites/{name}.json": site.to_bytes() for name, site in self.sites.items()}
        contents |= {f"revoked/{name}.json": r.to_bytes() for name, r in self.revoked.items()}
        return contents

    def _verify(self, files: bundle.Files, now: datetime) -> Roster:
        """Verify what is about to be published, in the keeper's own client directory."""
        client = RosterClient(self._path("client"))
        client.trust(self._read("metadata", "1.root.json"))
        return client.refresh(files, now)

    def _roots(self) -> dict[str, bytes]:
        paths = self._path("metadata").glob("*.root.json")
        return {path.name: path.read_bytes() for path in paths}

    def _next_version(self, kind: str) -> int:
        paths = list(self._path("metadata").glob(f"*.{kind}.json"))
        return max((int(path.name.partition(".")[0]) for path in paths), default=0) + 1

    def _signer(self, name: str) -> RosterSigner:
        try:
            return RosterSigner(keystore.read_note_key(self._path("keys", f"{name}.key")))
        except UnavailableError as error:
            raise RejectedError("AG-ROS-013", f"there is no keys/{name}.key") from error

    def _records(self, kind: str) -> list[bytes]:
        return [path.read_bytes() for path in sorted(self._path(kind).glob("*.json"))]

    def _read(self, *names: str) -> bytes:
        try:
            return read_plain(self._path(*names), LIMITS.roster_file_bytes)
        except FileNotFoundError as error:
            raise RejectedError("AG-ROS-016", f"{'/'.join(names)} is missing") from error

    def _path(self, *names: str) -> Path:
        return self._directory.joinpath(*names)


def write_published(published: Published, out: Path) -> None:
    """Write `roster.json` for the coordinator and `invitation.json` for new sites.

    With `root.json` beside them the directory is also one that `RosterClient` reads.

    Raises:
        UnavailableError: AG-STO-001.
    """
    with _staged(published.files, published.invitation, out):
        pass


@contextlib.contextmanager
def _staged(files: bundle.Files, invitation: Invitation, out: Path) -> Iterator[None]:
    """Write what is published beside its places; it takes them when the block ends well."""
    contents = {
        "invitation.json": invitation.to_bytes(),
        "root.json": invitation.root_json,
        "roster.json": bundle.pack(files),
    }
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".publish-", dir=out) as name:
        staging = Path(name)
        for entry, content in contents.items():
            durable_write(staging / entry, content, mode=0o644)
        yield
        for entry in contents:
            os.replace(staging / entry, out / entry)
        sync_directory(out)


def _make_key(directory: Path, name: str) -> RosterSigner:
    key = NoteKey.generate()
    keystore.write_note_key(directory / "keys" / f"{name}.key", key)
    return RosterSigner(key)


def _sign(signed: T, signers: Sequence[RosterSigner]) -> bytes:
    metadata = Metadata(signed)
    for signer in signers:
        metadata.sign(signer, append=True)
    return metadata.to_bytes()
