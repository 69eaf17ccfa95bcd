# SPDX-License-Identifier: Apache-2.0
"""A party's request to be enrolled, with proof that it holds the keys it names.

The signing key signs the whole request; the witness and node keys (for a coordinator: the log and
timestamp keys) sign the same bytes under their own labels, so nobody enrols another's key. The
sealing key cannot sign. Bound by the signing key, a false one harms only the party that named it:
what is sealed for the party is then lost to it. See protos/spec/roster.md, "Requests".
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from typing import TypeVar

from allograft.crypto import canonical, dsse, vkey
from allograft.crypto.keys import NodeKey, SigningKey, VerifyKey, verify_node_signature
from allograft.crypto.notekey import NoteKey, NotePublicKey
from allograft.errors import RejectedError
from allograft.limits import LIMITS
from allograft.roster.records import CoordinatorRecord, SiteRecord

SITE_REQUEST = "application/vnd.allograft.site-request.v1+json"
COORDINATOR_REQUEST = "application/vnd.allograft.coordinator-request.v1+json"

_GROUPS = 10  # 160 bits: out of reach for a second preimage, short enough to read aloud

T = TypeVar("T", SiteRecord, CoordinatorRecord)


@dataclass(frozen=True, slots=True)
class SiteKeys:
    """The private keys by which a site proves its request."""

    signing: SigningKey
    witness: NoteKey
    node: NodeKey


@dataclass(frozen=True, slots=True)
class CoordinatorKeys:
    """The private keys by which a coordinator proves its request."""

    signing: SigningKey
    log: NoteKey
    timestamp: NoteKey


def request_site(record: SiteRecord, keys: SiteKeys) -> bytes:
    """The enrolment request of a site, to be sent to the roster's keeper.

    Raises:
        RejectedError: AG-ROS-* or AG-KEY-* if the record would not be accepted.
    """
    payload = record.to_bytes()
    proofs = {
        "witness": keys.witness.sign(_challenge("witness", payload)),
        "node": keys.node.sign(_challenge("node", payload)),
    }
    request = _write(payload, SITE_REQUEST, keys.signing, proofs)
    verify_site_request(request)
    return request


def verify_site_request(request: bytes) -> SiteRecord:
    """The record that a site asks for, after all proofs were checked.

    Raises:
        RejectedError: AG-ROS-005 malformed or unproven, AG-ROS-001 or AG-KEY-* a bad record.
    """
    envelope, proofs = _read(request, {"witness", "node"})
    record = _verify(envelope, SITE_REQUEST, SiteRecord)
    payload = envelope.payload
    witness = vkey.read_vkey(record.witness_vkey, vkey.WITNESS).key
    _check_note_key(witness, "witness", proofs, payload)
    try:
        verify_node_signature(record.node_key, proofs["node"], _challenge("node", payload))
    except RejectedError as error:
        raise RejectedError("AG-ROS-005", "no proof that the node key is held") from error
    return record


def request_coordinator(record: CoordinatorRecord, keys: CoordinatorKeys) -> bytes:
    """The request of a coordinator, to be given to `allograft roster init`.

    Raises:
        RejectedError: AG-ROS-* or AG-KEY-* if the record would not be accepted.
    """
    payload = record.to_bytes()
    proofs = {
        "log": keys.log.sign(_challenge("log", payload)),
        "timestamp": keys.timestamp.sign(_challenge("timestamp", payload)),
    }
    request = _write(payload, COORDINATOR_REQUEST, keys.signing, proofs)
    verify_coordinator_request(request)
    return request


def verify_coordinator_request(request: bytes) -> CoordinatorRecord:
    """The record that a coordinator asks for, after all proofs were checked.

    Raises:
        RejectedError: AG-ROS-005 malformed or unproven, AG-ROS-001 or AG-KEY-* a bad record.
    """
    envelope, proofs = _read(request, {"log", "timestamp"})
    record = _verify(envelope, COORDINATOR_REQUEST, CoordinatorRecord)
    log = vkey.read_vkey(record.log_vkey, vkey.LOG).key
    _check_note_key(log, "log", proofs, envelope.payload)
    timestamp = NotePublicKey(record.timestamp_key)
    if timestamp.raw == log.raw:
        raise RejectedError("AG-ROS-005", "one key for log and timestamp")
    _check_note_key(timestamp, "timestamp", proofs, envelope.payload)
    return record


def fingerprint(request: bytes) -> str:
    """What people compare by telephone: 160 bits of the request's digest, in groups of four.

    It covers the signed record, so it names every key at once.

    Raises:
        RejectedError: AG-ROS-005 if the request is malformed.
    """
    fields = _read_fields(request)
    envelope = dsse.Envelope.from_json(fields["envelope"])
    digest = hashlib.sha256(envelope.payload).hexdigest()
    return "-".join(digest[4 * group : 4 * group + 4] for group in range(_GROUPS))


def check_fingerprint(request: bytes, spoken: str) -> None:
    """Compare a request with the fingerprint that its author told, with or without separators.

    Raises:
        RejectedError: AG-ROS-011 if they differ, AG-ROS-005 if the request is malformed.
    """
    told = "".join(character for character in spoken.lower() if character not in "-: ")
    if told != fingerprint(request).replace("-", ""):
        raise RejectedError("AG-ROS-011", "the request has another fingerprint")


def _challenge(purpose: str, payload: bytes) -> bytes:
    # Never the start of a note, a cosignature or a DSSE encoding, so no proof counts elsewhere.
    return b"allograft/enrolment/v1/" + purpose.encode("ascii") + b"\n" + payload


def _write(payload: bytes, kind: str, key: SigningKey, proofs: dict[str, bytes]) -> bytes:
    return canonical.dumps(
        {
            "v": 1,
            "envelope": dsse.sign(payload, kind, [key]).to_json(),
            "proofs": {
                name: base64.b64encode(proof).decode("ascii") for name, proof in proofs.items()
            },
        }
    )


def _read(request: bytes, purposes: set[str]) -> tuple[dsse.Envelope, dict[str, bytes]]:
    fields = _read_fields(request)
    try:
        proofs = canonical.as_object(fields["proofs"], purposes)
        decoded = {name: canonical.as_base64(proof) for name, proof in proofs.items()}
        return dsse.Envelope.from_json(fields["envelope"]), decoded
    except RejectedError as error:
        raise RejectedError("AG-ROS-005", f"request: {error.cause}") from error


def _read_fields(request: bytes) -> dict[str, canonical.Json]:
    try:
        fields = canonical.as_object(
            canonical.loads(request, LIMITS.roster_file_bytes), {"v", "envelope", "proofs"}
        )
        if fields["v"] != 1:
            raise RejectedError("AG-ROS-005", "a request of an unknown version")
        dsse.Envelope.from_json(fields["envelope"])
    except RejectedError as error:
        raise RejectedError("AG-ROS-005", f"request: {error.cause}") from error
    return fields


def _verify(envelope: dsse.Envelope, kind: str, record_type: type[T]) -> T:
    """The record, if each of the signing keys that it names signed it."""
    record = record_type.from_bytes(envelope.payload)
    keys: tuple[VerifyKey, ...] = record.signing_keys
    try:
        dsse.verify(envelope, kind, keys, threshold=len(keys))
    except RejectedError as error:
        raise RejectedError("AG-ROS-005", f"request: {error.cause}") from error
    return record


def _check_note_key(
    key: NotePublicKey, purpose: str, proofs: dict[str, bytes], payload: bytes
) -> None:
    try:
        key.verify(proofs[purpose], _challenge(purpose, payload))
    except RejectedError as error:
        raise RejectedError("AG-ROS-005", f"no proof that the {purpose} key is held") from error
