# SPDX-License-Identifier: Apache-2.0
"""The evidence that travels with a packet: a dossier of gates, and approvals by role.

Both are in-toto statements whose subjects are the payload parts, signed by the donor's site. A
dossier says under which mode and policy the gates ran and what they found; an approval says that
one role agreed to exactly this dossier. Roles are named, people never. See protos/spec/privacy.md.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from allograft.crypto import canonical, dsse
from allograft.crypto.keys import VerifyKey
from allograft.errors import RejectedError
from allograft.limits import LIMITS
from allograft.privacy.claim import PrivacyClaim
from allograft.privacy.modes import AdmittedMode, Declaration, Mode, admit_mode, declare

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
DOSSIER_TYPE = "urn:allograft:dossier:v1"
APPROVAL_TYPE = "urn:allograft:approval:v1"

_HEX32 = re.compile(r"[0-9a-f]{32}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}")
_FIGURES = 64
_WARNINGS = {
    "warn.slope": "canaries repeated a few times are remembered",
    "warn.tpr": "more people than usual are recognised at the false-positive rate of the audit",
    "warn.auc": "members score visibly higher than other people",
}


class GateVerdict(StrEnum):
    """Outcome of a gate; only PASS lets a packet go on."""

    PASS = "PASS"  # noqa: S105  (a verdict, not a password)
    FAIL = "FAIL"
    INVALID = "INVALID"


@dataclass(frozen=True, slots=True)
class GateResult:
    """What one gate found.

    Attributes:
        name: The gate, such as `G2`.
        version: Version of its rules.
        verdict: PASS, FAIL, or INVALID when it could not be judged.
        figures: Measured numbers by name; they are signed and travel.
        cost_ms: How long it took.
        reason: One line for FAIL and INVALID, empty for PASS.
    """

    name: str
    version: str
    verdict: GateVerdict
    figures: tuple[tuple[str, float], ...] = ()
    cost_ms: int = 0
    reason: str = ""


def warnings_of(result: GateResult) -> tuple[str, ...]:
    """What a person must consider before approving, in words; empty for nothing.

    Warnings travel as figures whose names begin with `warn.`, so a dossier shows them without a
    field of its own and approvals cover them.
    """
    return tuple(
        _WARNINGS.get(name, f"unknown warning {name}")
        for name, _ in result.figures
        if name.startswith("warn.")
    )


def warnings_in(gates: Iterable[GateResult]) -> tuple[str, ...]:
    """The warnings of several gates, each after the gate's name, as `G5: …`."""
    return tuple(f"{gate.name}: {words}" for gate in gates for words in warnings_of(gate))


@dataclass(frozen=True, slots=True)
class PayloadPart:
    """A file of the payload as approved."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Software:
    """A program that took part, with its version and optionally a SHA-256 of its files."""

    name: str
    version: str
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Dossier:
    """The privacy evidence of one packet.

    Attributes:
        packet_id: The packet (32 hex).
        kind: Its kind.
        mode: The admitted mode with its declaration.
        parts: The payload files, in the order of their names.
        gates: The results of all gates that ran.
        policy_digest: SHA-256 of the policy file at that time.
        conditions_digest: SHA-256 of the policy's conditions for donations.
        approvals_required: Roles that must approve before release.
        software: Programs that built and judged the packet.
        created: When (UTC, whole seconds).
        privacy: What was planned and spent; None in mode `open`.
        report_digest: SHA-256 (hex) of the full report, which stays at the site; empty in `open`.
    """

    packet_id: str
    kind: str
    mode: AdmittedMode
    parts: tuple[PayloadPart, ...]
    gates: tuple[GateResult, ...]
    policy_digest: str
    conditions_digest: str
    approvals_required: tuple[str, ...]
    software: tuple[Software, ...]
    created: str
    privacy: PrivacyClaim | None = None
    report_digest: str = ""

    def to_statement(self) -> bytes:
        """The canonical in-toto statement, ready to be signed."""
        return canonical.dumps(
            {
                "_type": STATEMENT_TYPE,
                "subject": _subjects(self.parts),
                "predicateType": DOSSIER_TYPE,
                "predicate": {
                    "packet_id": self.packet_id,
                    "kind": self.kind,
                    "mode": str(self.mode.mode),
                    "declaration": _write_declaration(self.mode.declaration),
                    "parts": [{"name": p.name, "bytes": p.size_bytes} for p in self.parts],
                    "gates": [write_gate(gate) for gate in self.gates],
                    "policy_digest": self.policy_digest,
                    "conditions_digest": self.conditions_digest,
                    "approvals_required": list(self.approvals_required),
                    "software": [
                        {"name": s.name, "version": s.version, "digest": s.digest}
                        for s in self.software
                    ],
                    "created": self.created,
                    "privacy": None if self.privacy is None else self.privacy.to_json(),
                    "report_digest": self.report_digest,
                },
            }
        )

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the statement; approvals name it."""
        return hashlib.sha256(self.to_statement()).hexdigest()


@dataclass(frozen=True, slots=True)
class Approval:
    """One role's agreement to one dossier.

    Attributes:
        packet_id: The packet.
        role: Who agrees.
        dossier_digest: SHA-256 of the dossier statement that was agreed to.
        parts: The payload files, as in the dossier.
        time: When (UTC, whole seconds).
    """

    packet_id: str
    role: str
    dossier_digest: str
    parts: tuple[PayloadPart, ...]
    time: str

    def to_statement(self) -> bytes:
        """The canonical in-toto statement, ready to be signed."""
        return canonical.dumps(
            {
                "_type": STATEMENT_TYPE,
                "subject": _subjects(self.parts),
                "predicateType": APPROVAL_TYPE,
                "predicate": {
                    "packet_id": self.packet_id,
                    "role": self.role,
                    "dossier_digest": self.dossier_digest,
                    "parts": [{"name": p.name, "bytes": p.size_bytes} for p in self.parts],
                    "time": self.time,
                },
            }
        )


def approve(dossier: Dossier, role: str, time: str) -> Approval:
    """State one role's agreement to a dossier; the caller signs it.

    Raises:
        RejectedError: AG-PRV-033 if the dossier does not ask for this role.
    """
    if role not in dossier.approvals_required:
        asked = ", ".join(dossier.approvals_required) or "no role"
        raise RejectedError(
            "AG-PRV-033", f"{role[:64]!r} is not asked to approve; the dossier asks for {asked}"
        )
    return Approval(dossier.packet_id, role, dossier.digest, dossier.parts, time)


def verify_dossier(envelope: bytes | dsse.Envelope, keys: Sequence[VerifyKey]) -> Dossier:
    """Verify a signed dossier and return it.

    Raises:
        RejectedError: AG-SIG-* if the signature does not hold, AG-PRV-030 if malformed.
    """
    return read_dossier(dsse.verify(envelope, dsse.IN_TOTO, keys).payload)


def verify_approval(envelope: bytes | dsse.Envelope, keys: Sequence[VerifyKey]) -> Approval:
    """Verify a signed approval and return it.

    Raises:
        RejectedError: AG-SIG-* if the signature does not hold, AG-PRV-030 if malformed.
    """
    return read_approval(dsse.verify(envelope, dsse.IN_TOTO, keys).payload)


def read_dossier(statement: bytes) -> Dossier:
    """Read a dossier statement whose signature was verified or that this site made itself.

    Raises:
        RejectedError: AG-PRV-030 if malformed; AG-PRV-010 to -012 if its mode is not admissible or
            lacks its evidence.
    """
    try:
        subjects, fields = _read_statement(
            statement,
            DOSSIER_TYPE,
            {
                "packet_id", "kind", "mode", "declaration", "parts", "gates", "policy_digest",
                "conditions_digest", "approvals_required", "software", "created", "privacy",
                "report_digest",
            },
        )  # fmt: skip
        declared = _read_declaration(fields["declaration"])
        mode = admit_mode(canonical.as_text(fields["mode"]), declared)
        given, report = fields["privacy"], fields["report_digest"]
        dossier = Dossier(
            packet_id=_text(fields["packet_id"], _HEX32),
            kind=_text(fields["kind"], _NAME),
            mode=mode,
            parts=_read_parts(subjects, fields["parts"]),
            gates=tuple(read_gate(entry) for entry in _bounded(fields["gates"])),
            policy_digest=_text(fields["policy_digest"], _SHA256),
            conditions_digest=_text(fields["conditions_digest"], _SHA256),
            approvals_required=tuple(
                _text(role, _NAME) for role in _bounded(fields["approvals_required"])
            ),
            software=tuple(_read_software(entry) for entry in _bounded(fields["software"])),
            created=canonical.format_time(
                canonical.parse_time(canonical.as_text(fields["created"]))
            ),
            privacy=None if given is None else PrivacyClaim.from_json(given),
            report_digest="" if report == "" else _text(report, _SHA256),
        )
    except RejectedError as error:
        raise _as_dossier_error(error) from error
    check_evidence(dossier)
    return dossier


def check_evidence(dossier: Dossier) -> None:
    """Refuse a dossier without what its mode rests on.

    Raises:
        RejectedError: AG-PRV-011.
    """
    mode, claim = dossier.mode.mode, dossier.privacy
    if (claim is None) != (mode is Mode.OPEN) or bool(dossier.report_digest) == (claim is None):
        raise RejectedError("AG-PRV-011", f"the dossier has not the evidence of mode {mode}")
    if claim is not None and (claim.constants is None) == (mode is Mode.STRICT):
        raise RejectedError("AG-PRV-011", f"the plan is not one of mode {mode}")


def read_approval(statement: bytes) -> Approval:
    """Read an approval statement whose signature was verified or that this site made itself.

    Raises:
        RejectedError: AG-PRV-030 if malformed.
    """
    try:
        subjects, fields = _read_statement(
            statement, APPROVAL_TYPE, {"packet_id", "role", "dossier_digest", "parts", "time"}
        )
        return Approval(
            packet_id=_text(fields["packet_id"], _HEX32),
            role=_text(fields["role"], _NAME),
            dossier_digest=_text(fields["dossier_digest"], _SHA256),
            parts=_read_parts(subjects, fields["parts"]),
            time=canonical.format_time(canonical.parse_time(canonical.as_text(fields["time"]))),
        )
    except RejectedError as error:
        raise _as_dossier_error(error) from error


def _as_dossier_error(error: RejectedError) -> RejectedError:
    if error.code.startswith("AG-PRV"):
        return error
    return RejectedError("AG-PRV-030", error.cause)


def _subjects(parts: Sequence[PayloadPart]) -> list[canonical.Json]:
    return [{"name": part.name, "digest": {"sha256": part.sha256}} for part in parts]


def _write_declaration(declaration: Declaration | None) -> canonical.Json:
    if declaration is None:
        return None
    return {"nature": str(declaration.nature), "declared_by": declaration.declared_by}


def _read_declaration(value: canonical.Json) -> Declaration | None:
    if value is None:
        return None
    fields = canonical.as_object(value, {"nature", "declared_by"})
    return declare(canonical.as_text(fields["nature"]), canonical.as_text(fields["declared_by"]))


def write_gate(gate: GateResult) -> dict[str, canonical.Json]:
    """A result as a JSON object."""
    return {
        "name": gate.name,
        "version": gate.version,
        "verdict": str(gate.verdict),
        "figures": {name: value for name, value in gate.figures},
        "cost_ms": gate.cost_ms,
        "reason": gate.reason,
    }


def _read_statement(
    statement: bytes, predicate_type: str, names: set[str]
) -> tuple[list[canonical.Json], Mapping[str, canonical.Json]]:
    document = canonical.as_object(
        canonical.loads(statement), {"_type", "subject", "predicateType", "predicate"}
    )
    if document["_type"] != STATEMENT_TYPE or document["predicateType"] != predicate_type:
        raise RejectedError("AG-PRV-030", f"not a statement of type {predicate_type}")
    return _bounded(document["subject"]), canonical.as_object(document["predicate"], names)


def _read_parts(
    subjects: Sequence[canonical.Json], sizes: canonical.Json
) -> tuple[PayloadPart, ...]:
    entries = _bounded(sizes)
    if len(entries) != len(subjects) or not entries:
        raise RejectedError("AG-PRV-030", "subjects and parts of a statement differ")
    parts = []
    for subject, entry in zip(subjects, entries, strict=True):
        named = canonical.as_object(subject, {"name", "digest"})
        sized = canonical.as_object(entry, {"name", "bytes"})
        if named["name"] != sized["name"]:
            raise RejectedError("AG-PRV-030", "subjects and parts of a statement differ")
        digest = canonical.as_object(named["digest"], {"sha256"})["sha256"]
        parts.append(
            PayloadPart(
                _text(named["name"], _NAME),
                canonical.as_int(sized["bytes"]),
                _text(digest, _SHA256),
            )
        )
    if [p.name for p in parts] != sorted({p.name for p in parts}):
        raise RejectedError("AG-PRV-030", "payload parts are not in order or repeat a name")
    return tuple(parts)


def read_gate(value: canonical.Json) -> GateResult:
    """Read a result.

    Raises:
        RejectedError: AG-PRV-030 or AG-IN-003 if malformed.
    """
    fields = canonical.as_object(
        value, {"name", "version", "verdict", "figures", "cost_ms", "reason"}
    )
    figures = canonical.as_mapping(fields["figures"])
    reason = canonical.as_text(fields["reason"])
    verdict = canonical.as_text(fields["verdict"])
    if len(figures) > _FIGURES or len(reason) > LIMITS.text_field_chars:
        raise RejectedError("AG-PRV-030", "a gate result is over its limits")
    if verdict not in tuple(GateVerdict):
        raise RejectedError("AG-PRV-030", "a gate has an unknown verdict")
    return GateResult(
        name=_text(fields["name"], _NAME),
        version=_text(fields["version"], _NAME),
        verdict=GateVerdict(verdict),
        figures=tuple(
            (_text(name, _NAME), canonical.as_number(number))
            for name, number in sorted(figures.items())
        ),
        cost_ms=canonical.as_int(fields["cost_ms"]),
        reason=reason,
    )


def _read_software(value: canonical.Json) -> Software:
    fields = canonical.as_object(value, {"name", "version", "digest"})
    digest = canonical.as_text(fields["digest"])
    if digest and not _SHA256.fullmatch(digest):
        raise RejectedError("AG-PRV-030", "a software digest is not SHA-256 in hex")
    return Software(_text(fields["name"], _NAME), _text(fields["version"], _NAME), digest)


def _bounded(value: canonical.Json) -> list[canonical.Json]:
    entries = canonical.as_list(value)
    if len(entries) > LIMITS.packet_parts:
        raise RejectedError("AG-PRV-030", f"a list of a statement has {len(entries)} entries")
    return entries


def _text(value: canonical.Json, pattern: re.Pattern[str]) -> str:
    text = canonical.as_text(value)
    if not pattern.fullmatch(text):
        raise RejectedError("AG-PRV-030", "a name or digest of a statement has the wrong form")
    return text
