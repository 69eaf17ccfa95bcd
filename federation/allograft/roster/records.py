# SPDX-License-Identifier: Apache-2.0
"""What the roster says about sites, coordinator and witnesses: values, and their JSON.

Invariant: a record that was read has usable keys: every PEM is P-256, every Ed25519 point is
checked, every name fits its key. Only `roster.client` makes a `Roster` from what it verified. See
protos/spec/roster.md, "Records".
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from allograft.crypto import canonical, vkey
from allograft.crypto.keys import SealingPublicKey, VerifyKey, node_key_pem
from allograft.crypto.notekey import check_point
from allograft.errors import RejectedError
from allograft.limits import LIMITS

Role = Literal["donor", "recipient", "witness", "auditor"]

ROLES: tuple[Role, ...] = ("auditor", "donor", "recipient", "witness")
DEFAULT_ROLES: tuple[Role, ...] = ("donor", "recipient", "witness")

_SIGNING_KEYS = 4  # the current one, the next one, and room for a hardware token


@dataclass(frozen=True, slots=True)
class SiteRecord:
    """One site.

    Attributes:
        site_id: Its name, for good: a revoked name never returns with other keys unnoticed.
        signing_keys: ECDSA P-256; any one of them signs for the site.
        sealing_key: What packets for the site are sealed to.
        witness_vkey: C2SP verifier key (type 4) of its cosignatures, named after the site.
        node_key: OpenSSH line by which Flower tells the node; it protects no content.
        roles: What it may do.
        not_before: First moment of its validity.
        not_after: End of its validity.
    """

    site_id: str
    signing_keys: tuple[VerifyKey, ...]
    sealing_key: SealingPublicKey
    witness_vkey: str
    node_key: str
    roles: tuple[Role, ...]
    not_before: datetime
    not_after: datetime

    def to_json(self) -> dict[str, canonical.Json]:
        """The record as a JSON object."""
        return {
            "v": 1,
            "site": self.site_id,
            "signing_keys": [key.pem for key in self.signing_keys],
            "sealing_key": base64.b64encode(self.sealing_key.raw).decode("ascii"),
            "witness_vkey": self.witness_vkey,
            "node_key": self.node_key,
            "roles": list(self.roles),
            "not_before": canonical.format_time(self.not_before),
            "not_after": canonical.format_time(self.not_after),
        }

    def to_bytes(self) -> bytes:
        """The record as canonical JSON, the content of `sites/<id>.json`."""
        return canonical.dumps(self.to_json())

    @classmethod
    def from_bytes(cls, content: bytes) -> SiteRecord:
        """Read a record and check its keys.

        Raises:
            RejectedError: AG-ROS-001 malformed, AG-KEY-* an unusable key.
        """
        fields = _read(
            content,
            {
                "v", "site", "signing_keys", "sealing_key", "witness_vkey", "node_key", "roles",
                "not_before", "not_after",
            },
        )  # fmt: skip
        with _malformed("site record"):
            site_id = canonical.as_site(fields["site"])
            record = cls(
                site_id=site_id,
                signing_keys=_read_signing_keys(fields["signing_keys"]),
                sealing_key=SealingPublicKey(canonical.as_base64(fields["sealing_key"])),
                witness_vkey=_read_vkey(fields["witness_vkey"], site_id, vkey.WITNESS),
                node_key=canonical.as_line(fields["node_key"]),
                roles=_read_roles(fields["roles"]),
                not_before=_read_time(fields["not_before"]),
                not_after=_read_time(fields["not_after"]),
            )
        if record.not_after <= record.not_before:
            raise RejectedError("AG-ROS-001", "a site record ends before it begins")
        _ = record.sealing_key.hpke
        node_key_pem(record.node_key)
        return record


@dataclass(frozen=True, slots=True)
class CoordinatorRecord:
    """The coordinator.

    Attributes:
        coordinator_id: Its name; the log's origin is `allograft/<name>`.
        signing_keys: ECDSA P-256, for relay frames, routes and its log events.
        log_vkey: C2SP verifier key (type 1) of the log, named after its origin.
        timestamp_key: Raw Ed25519 key that may sign the TUF timestamp, and nothing else.
        address: HOST:PORT that sites dial.
        tls_ca_pem: The private CA that sites pin.
    """

    coordinator_id: str
    signing_keys: tuple[VerifyKey, ...]
    log_vkey: str
    timestamp_key: bytes
    address: str
    tls_ca_pem: str

    @property
    def origin(self) -> str:
        """The origin line of the log's checkpoints."""
        return log_origin(self.coordinator_id)

    def to_json(self) -> dict[str, canonical.Json]:
        """The record as a JSON object."""
        return {
            "v": 1,
            "coordinator": self.coordinator_id,
            "signing_keys": [key.pem for key in self.signing_keys],
            "log_vkey": self.log_vkey,
            "timestamp_key": self.timestamp_key.hex(),
            "address": self.address,
            "tls_ca_pem": self.tls_ca_pem,
        }

    def to_bytes(self) -> bytes:
        """The record as canonical JSON, the content of `coordinator.json`."""
        return canonical.dumps(self.to_json())

    @classmethod
    def from_bytes(cls, content: bytes) -> CoordinatorRecord:
        """Read a record and check its keys.

        Raises:
            RejectedError: AG-ROS-001 malformed, AG-KEY-* an unusable key.
        """
        fields = _read(
            content,
            {
                "v", "coordinator", "signing_keys", "log_vkey", "timestamp_key", "address",
                "tls_ca_pem",
            },
        )  # fmt: skip
        with _malformed("coordinator record"):
            coordinator_id = canonical.as_site(fields["coordinator"])
            record = cls(
                coordinator_id=coordinator_id,
                signing_keys=_read_signing_keys(fields["signing_keys"]),
                log_vkey=_read_vkey(fields["log_vkey"], log_origin(coordinator_id), vkey.LOG),
                timestamp_key=bytes.fromhex(canonical.as_sha256(fields["timestamp_key"])),
                address=canonical.as_line(fields["address"]),
                tls_ca_pem=canonical.as_text(fields["tls_ca_pem"]),
            )
        check_point(record.timestamp_key)
        return record


@dataclass(frozen=True, slots=True)
class Revocation:
    """A site that was taken out, and why in a few words."""

    site_id: str
    reason: str
    time: datetime

    def to_bytes(self) -> bytes:
        """Canonical JSON, the content of `revoked/<id>.json`."""
        return canonical.dumps(
            {
                "v": 1,
                "site": self.site_id,
                "reason": self.reason,
                "time": canonical.format_time(self.time),
            }
        )

    @classmethod
    def from_bytes(cls, content: bytes) -> Revocation:
        """Read a revocation.

        Raises:
            RejectedError: AG-ROS-001.
        """
        fields = _read(content, {"v", "site", "reason", "time"})
        with _malformed("revocation"):
            return cls(
                site_id=canonical.as_site(fields["site"]),
                reason=canonical.as_line(fields["reason"]),
                time=_read_time(fields["time"]),
            )


@dataclass(frozen=True, slots=True)
class WitnessPolicy:
    """Which log counts, and how many of which witnesses must have cosigned its checkpoint."""

    log_vkey: str
    witness_vkeys: tuple[str, ...]
    quorum: int


@dataclass(frozen=True, slots=True)
class Roster:
    """A roster that was verified up to the consortium's root.

    Attributes:
        version: Version of its timestamp; grows with every change and every renewal.
        sites: Enrolled sites by name.
        revoked: Sites that were taken out, by name.
        coordinator: The one coordinator.
        witness_quorum: How many witnesses a checkpoint needs.
        expires: When the first of its signatures expires; afterwards nothing here is trusted.
        digest: SHA-256 (hex) that sites compare and the log records; see `bundle.digest`.
    """

    version: int
    sites: Mapping[str, SiteRecord]
    revoked: Mapping[str, Revocation]
    coordinator: CoordinatorRecord
    witness_quorum: int
    expires: datetime
    digest: str

    def check_fresh(self, now: datetime) -> None:
        """Refuse a roster that has expired.

        Raises:
            RejectedError: AG-ROS-007.
        """
        if now >= self.expires:
            raise RejectedError(
                "AG-ROS-007", f"the roster expired at {canonical.format_time(self.expires)}"
            )

    def site(self, site_id: str, now: datetime) -> SiteRecord:
        """The record of a site that is enrolled and valid now.

        Raises:
            RejectedError: AG-ROS-002 unknown, AG-ROS-003 revoked, AG-ROS-004 outside its validity.
        """
        if site_id in self.revoked:
            raise RejectedError("AG-ROS-003", f"{site_id} was revoked")
        record = self.sites.get(site_id)
        if record is None:
            raise RejectedError("AG-ROS-002", f"{site_id} is not in the roster")
        if not record.not_before <= now < record.not_after:
            raise RejectedError("AG-ROS-004", f"the enrolment of {site_id} is not valid now")
        return record

    def signing_keys(
        self, name: str, role: Literal["site", "coordinator"], now: datetime
    ) -> tuple[VerifyKey, ...]:
        """The signing keys of a party that is enrolled in this role now.

        Raises:
            RejectedError: As `site`, or AG-ROS-002 for a coordinator of another name.
        """
        if role == "site":
            return self.site(name, now).signing_keys
        if name != self.coordinator.coordinator_id:
            raise RejectedError("AG-ROS-002", f"{name} is not the coordinator of this roster")
        return self.coordinator.signing_keys

    def witness_policy(self) -> WitnessPolicy:
        """Whose cosignatures count, by this roster.

        Witnesses count until they are taken out, even past their validity: a site that forgot to
        renew is no reason to accept fewer eyes.
        """
        witnesses = [site for site in self.sites.values() if "witness" in site.roles]
        return WitnessPolicy(
            log_vkey=self.coordinator.log_vkey,
            witness_vkeys=tuple(site.witness_vkey for site in witnesses),
            quorum=self.witness_quorum,
        )


def log_origin(coordinator_id: str) -> str:
    """The origin of a coordinator's log, which is also the name of the log's key."""
    return f"allograft/{coordinator_id}"


def write_policy(witness_quorum: int) -> bytes:
    """The content of `policy.json`."""
    return canonical.dumps({"v": 1, "witness_quorum": witness_quorum})


def read_policy(content: bytes) -> int:
    """The witness quorum of a `policy.json`; at least one.

    Raises:
        RejectedError: AG-ROS-001.
    """
    fields = _read(content, {"v", "witness_quorum"})
    with _malformed("policy"):
        quorum = canonical.as_int(fields["witness_quorum"])
    if quorum < 1:
        # Without witnesses the log's operator can show every site another log.
        raise RejectedError("AG-ROS-001", "a policy without witnesses")
    return quorum


@contextlib.contextmanager
def _malformed(what: str) -> Iterator[None]:
    """Turn refusals of single fields into AG-ROS-001; refusals of keys keep their own code."""
    try:
        yield
    except RejectedError as error:
        if not error.code.startswith("AG-IN-"):
            raise
        raise RejectedError("AG-ROS-001", f"{what}: {error.cause}") from error


def _read(content: bytes, names: set[str]) -> dict[str, canonical.Json]:
    try:
        fields = canonical.as_object(canonical.loads(content, LIMITS.roster_file_bytes), names)
    except RejectedError as error:
        raise RejectedError("AG-ROS-001", f"roster file: {error.cause}") from error
    if fields["v"] != 1 or isinstance(fields["v"], bool):
        raise RejectedError("AG-ROS-001", "a roster file of an unknown version")
    return fields


def _read_signing_keys(value: canonical.Json) -> tuple[VerifyKey, ...]:
    keys = tuple(VerifyKey(canonical.as_text(entry)).check() for entry in canonical.as_list(value))
    if not 1 <= len(keys) <= _SIGNING_KEYS or len({key.key_id for key in keys}) != len(keys):
        raise RejectedError("AG-ROS-001", f"a record with {len(keys)} signing keys, or one twice")
    return keys


def _read_vkey(value: canonical.Json, name: str, kind: vkey.Kind) -> str:
    text = canonical.as_text(value)
    if vkey.read_vkey(text, kind).name != name:
        raise RejectedError("AG-ROS-001", "a verifier key is not named after its owner")
    return text


def _read_roles(value: canonical.Json) -> tuple[Role, ...]:
    names = {canonical.as_text(entry) for entry in canonical.as_list(value)}
    if not names or not names <= set(ROLES) or len(names) != len(canonical.as_list(value)):
        raise RejectedError("AG-ROS-001", "a record with unknown, doubled or no roles")
    return tuple(role for role in ROLES if role in names)


def _read_time(value: canonical.Json) -> datetime:
    return canonical.parse_time(canonical.as_text(value))
