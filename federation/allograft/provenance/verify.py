# SPDX-License-Identifier: Apache-2.0
"""The recipient's order of checks, without any IO: bytes in, verified values out, or a refusal.

1. `verify_dispatch`: signature by a donor in the roster, one header, I am in its audience, in
   time, never seen before; then `check_logged` binds the entry whose log proof was verified.
2. `verify_manifest`: every attestation is signed by that donor, is about exactly these parts, and
   agrees with the dispatch. Only now may a recipe judge the statement, and only after that is the
   payload opened (`packet.container.open_payload`).

The caller makes sure that its roster is fresh and that the proof carries enough witnesses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from allograft.crypto import canonical, dsse
from allograft.crypto.keys import VerifyKey
from allograft.errors import RejectedError
from allograft.log.event import Event, Signers
from allograft.packet import container, oms
from allograft.packet.header import Header
from allograft.provenance.dispatch import DISPATCH_TYPE, Dispatch, read_dispatch
from allograft.provenance.intoto import Statement, verify_statement
from allograft.provenance.statement import PACKET_TYPE, PacketStatement, read_packet_statement
from allograft.provenance.training import (
    PROVENANCE_TYPE,
    TEST_RESULT_TYPE,
    Evaluation,
    TrainingRun,
    read_evaluation,
    read_training,
)

DOSSIER_TYPE = "urn:allograft:dossier:v1"
APPROVAL_TYPE = "urn:allograft:approval:v1"
PLAN_TYPE = "urn:allograft:privacy-plan:v1"

#: Every packet has each of these attestations once.
REQUIRED_TYPES = frozenset(
    {oms.PREDICATE_TYPE, PACKET_TYPE, PROVENANCE_TYPE, TEST_RESULT_TYPE, DOSSIER_TYPE}
)

# Clocks of two organisations differ; nothing is dated further ahead than this.
_CLOCK_SKEW = timedelta(minutes=10)


@dataclass(frozen=True, slots=True)
class VerifiedDispatch:
    """A dispatch that is meant for us, with the header it signs.

    Attributes:
        envelope_sha256: SHA-256 (hex) of the envelope as received; log and receipt name it.
    """

    dispatch: Dispatch
    header: Header
    envelope_sha256: str


@dataclass(frozen=True, slots=True)
class VerifiedManifest:
    """The attestations of a packet, all by its donor and all about the same parts.

    Attributes:
        statement_envelope_sha256: What seals, wraps and offer are bound to.
        dossier: The dossier's statement bytes, for the privacy policy to read.
        approvals: The statement bytes of each approval.
        plan: The privacy plan's statement bytes, for the privacy policy to read; empty if the
            packet has none.
    """

    statement: PacketStatement
    statement_envelope_sha256: str
    training: TrainingRun
    evaluation: Evaluation
    dossier: bytes
    approvals: tuple[bytes, ...] = ()
    plan: bytes = b""


@dataclass(slots=True)
class _Sorted:
    """Attestations by type while they are read."""

    statements: dict[str, Statement] = field(default_factory=dict)
    payloads: dict[str, bytes] = field(default_factory=dict)
    resources: tuple[oms.Resource, ...] = ()
    statement_envelope_sha256: str = ""
    approvals: list[tuple[Statement, bytes]] = field(default_factory=list)
    plan: bytes = b""


def peek_donor(dispatch_envelope: bytes) -> str:
    """The donor that a dispatch claims, to choose the keys to verify it with. Not yet trusted.

    Raises:
        RejectedError: AG-SIG-001 or AG-PRO-001 if malformed.
    """
    payload = dsse.Envelope.from_bytes(dispatch_envelope).payload
    return _claimed_donor(Statement.from_bytes(payload).predicate)


def verify_dispatch(
    dispatch_envelope: bytes,
    header_bytes: bytes,
    roster: Signers,
    me: str,
    now: datetime,
    is_seen: Callable[[str], bool] = lambda dispatch_id: False,
) -> VerifiedDispatch:
    """Verify that a donor decided to send exactly this to us, now, for the first time.

    Args:
        dispatch_envelope: The content of `dispatch.json`.
        header_bytes: The content of `header.json`.
        roster: A fresh roster.
        me: Our own site id; empty for auditors, who check without being addressed.
        now: The current time (UTC).
        is_seen: Tells whether a dispatch id was used before.

    Raises:
        RejectedError: The roster's refusal, AG-SIG-* for the signature, AG-PKT-003 for the header,
            AG-PRO-003 to -006 and -009 as their titles say.
    """
    keys = roster.signing_keys(peek_donor(dispatch_envelope), "site", now)
    statement = verify_statement(dispatch_envelope, keys, DISPATCH_TYPE)
    header = Header.from_bytes(header_bytes)
    dispatch = read_dispatch(statement, header, header_bytes)
    if me and me not in dispatch.audience:
        raise RejectedError("AG-PRO-003", f"{me} is not in the audience of the dispatch")
    _check_times(dispatch.created, dispatch.not_after, now)
    if is_seen(dispatch.dispatch_id):
        raise RejectedError("AG-PRO-005", "a dispatch with this id was received before")
    digest = hashlib.sha256(dispatch_envelope).hexdigest()
    return VerifiedDispatch(dispatch, header, digest)


def check_logged(verified: VerifiedDispatch, event: Event) -> None:
    """Compare a dispatch with the log event whose signature and proof were verified.

    Raises:
        RejectedError: AG-PRO-007 if the event is about something else.
    """
    dispatch = verified.dispatch
    expected = (
        "dispatch", dispatch.donor, dispatch.packet_id, dispatch.dispatch_id,
        verified.envelope_sha256,
    )  # fmt: skip
    found = (event.event, event.actor, event.packet_id, event.dispatch_id, event.document_sha256)
    if expected != found:
        raise RejectedError("AG-PRO-007", "the log entry is not the one of this dispatch")


def verify_manifest(
    attestations: bytes, verified: VerifiedDispatch, roster: Signers, now: datetime
) -> VerifiedManifest:
    """Verify the opened attestations of a packet against its dispatch.

    Args:
        attestations: The content of `attestations.jsonl`.
        verified: The dispatch they came with.
        roster: A fresh roster.
        now: The current time (UTC).

    Raises:
        RejectedError: AG-PKT-006 missing or doubled, AG-PKT-007 the model signature, AG-SIG-* a
            signature, AG-PRO-001 or -002 a malformed or misplaced statement, AG-PRO-004, -009 or
            -010 times, AG-PRO-008 contradictions.
    """
    donor = verified.dispatch.donor
    manifest = check_attestations(attestations, roster.signing_keys(donor, "site", now))
    packet = manifest.statement
    if manifest.statement_envelope_sha256 != verified.dispatch.statement_digest:
        raise RejectedError("AG-PRO-008", "the statement is not the one that was dispatched")
    stated = (packet.packet_id, packet.donor, packet.kind)
    if stated != (verified.dispatch.packet_id, donor, verified.dispatch.kind):
        raise RejectedError("AG-PRO-008", "statement and dispatch name different packets")
    sizes = [part.size_bytes for part in packet.parts]
    if sizes != [part.plain_bytes for part in verified.header.parts]:
        raise RejectedError("AG-PRO-008", "statement and header disagree about the parts")
    if verified.dispatch.not_after > packet.not_after:
        raise RejectedError("AG-PRO-008", "the dispatch outlives the packet")
    _check_times(packet.created, packet.not_after, now)
    if packet.retention_until <= now:
        raise RejectedError("AG-PRO-010", "the retention of the packet has ended")
    return manifest


def check_attestations(attestations: bytes, keys: tuple[VerifyKey, ...]) -> VerifiedManifest:
    """Verify that attestations are complete, by one donor, and about one payload.

    Donors run this on what they built before they offer it; recipients through `verify_manifest`.

    Args:
        attestations: The content of `attestations.jsonl`.
        keys: The donor's signing keys.

    Raises:
        RejectedError: As `verify_manifest`, without times and dispatch.
    """
    found = _sort(container.split_attestations(attestations), keys)
    missing = REQUIRED_TYPES - {oms.PREDICATE_TYPE} - found.statements.keys()
    if missing or not found.resources:
        absent = min(missing) if missing else oms.PREDICATE_TYPE
        raise RejectedError("AG-PKT-006", f"a packet without attestation {absent}")
    packet = read_packet_statement(found.statements[PACKET_TYPE])
    for statement in (*found.statements.values(), *(s for s, _ in found.approvals)):
        if statement.subjects != packet.subjects:
            raise RejectedError("AG-PRO-002", "an attestation is about another payload")
        _check_packet_id(statement.predicate, packet)
    if found.resources != tuple(oms.Resource(p.name, p.sha256) for p in packet.parts):
        raise RejectedError("AG-PKT-007", "the model signature covers another payload")
    training = read_training(found.statements[PROVENANCE_TYPE])
    made = (training.packet_id, training.donor, training.base_digest, training.parents)
    if made != (packet.packet_id, packet.donor, packet.base.weights_digest, packet.parents):
        raise RejectedError("AG-PRO-008", "provenance and statement contradict each other")
    return VerifiedManifest(
        statement=packet,
        statement_envelope_sha256=found.statement_envelope_sha256,
        training=training,
        evaluation=read_evaluation(found.statements[TEST_RESULT_TYPE]),
        dossier=found.payloads[DOSSIER_TYPE],
        approvals=tuple(payload for _, payload in found.approvals),
        plan=found.plan,
    )


def _sort(lines: tuple[bytes, ...], keys: tuple[VerifyKey, ...]) -> _Sorted:
    """Verify every attestation and sort them by type; each type once, approvals any number."""
    found = _Sorted()
    for line in lines:
        if b'"mediaType"' in line:
            if found.resources:
                raise RejectedError("AG-PKT-006", "two model signatures")
            found.resources = oms.verify_bundle(line, keys)
            continue
        payload = dsse.verify(line, dsse.IN_TOTO, keys).payload
        statement = Statement.from_bytes(payload)
        kind = statement.predicate_type
        if kind == APPROVAL_TYPE:
            found.approvals.append((statement, payload))
            continue
        if kind == PLAN_TYPE and not found.plan:
            # Made before there was a payload: its subject is the base, and the dossier names it.
            found.plan = payload
            continue
        if kind not in REQUIRED_TYPES or kind in found.statements:
            raise RejectedError("AG-PKT-006", "an attestation is of an unknown type or doubled")
        found.statements[kind] = statement
        found.payloads[kind] = payload
        if kind == PACKET_TYPE:
            found.statement_envelope_sha256 = hashlib.sha256(line).hexdigest()
    return found


def _check_packet_id(predicate: Mapping[str, canonical.Json], packet: PacketStatement) -> None:
    # Two packets may have equal payloads; evidence for one is no evidence for the other.
    if predicate.get("packet_id", packet.packet_id) != packet.packet_id:
        raise RejectedError("AG-PRO-008", "an attestation names another packet")


def _claimed_donor(predicate: Mapping[str, canonical.Json]) -> str:
    try:
        return canonical.as_site(predicate.get("donor"))
    except RejectedError as error:
        raise RejectedError("AG-PRO-001", f"dispatch: donor: {error.cause}") from error


def _check_times(created: datetime, not_after: datetime, now: datetime) -> None:
    if created > now + _CLOCK_SKEW or not_after <= created:
        raise RejectedError("AG-PRO-009", f"dated {canonical.format_time(created)}")
    if not_after <= now:
        raise RejectedError("AG-PRO-004", f"ended at {canonical.format_time(not_after)}")
