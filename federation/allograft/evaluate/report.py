# SPDX-License-Identifier: Apache-2.0
"""What a trial found, as a value and as JSON.

The report stays at the recipient. What of it a receipt may tell the donor is the policy's choice
(`receipt.share_figures`), because the figures were measured on the recipient's own data.
"""

from __future__ import annotations

from dataclasses import dataclass

from allograft.crypto import canonical
from allograft.errors import RejectedError
from allograft.evaluate.bootstrap import Interval
from allograft.evaluate.gate import Decision, DosePoint, Outcome, Reason
from allograft.limits import LIMITS

_DOSES = 64


@dataclass(frozen=True, slots=True)
class DocumentCounts:
    """How many documents each measurement used; no text was used twice."""

    selection: int
    test: int
    retention_selection: int
    retention_test: int


@dataclass(frozen=True, slots=True)
class TrialReport:
    """Outcome of one trial of one packet on one model.

    Attributes:
        attachment_id: The attachment, which is the packet id where there is one.
        kind: Its kind.
        decision: Verdict, reason, dose and intervals, in nats per token.
        curve: Every dose that was tried, on the selection documents.
        documents: How much data it rests on.
        bits_per_byte_before: Loss on the test documents without the packet.
        bits_per_byte_after: The same with the packet at the judged dose.
        state_digest: SHA-256 of the model's weights, equal before and after every attachment.
        removals: How often an attachment was removed and found bit-exact.
        seed: Seed of the split, the null and the bootstrap.
        device: Where the model ran, such as `cpu` or `cuda`.
        seconds: Wall time.
    """

    attachment_id: str
    kind: str
    decision: Decision
    curve: tuple[DosePoint, ...]
    documents: DocumentCounts
    bits_per_byte_before: float
    bits_per_byte_after: float
    state_digest: str
    removals: int
    seed: int
    device: str
    seconds: float

    def to_json(self) -> dict[str, canonical.Json]:
        """The report as a JSON object."""
        decision = self.decision
        return {
            "v": 1,
            "attachment_id": self.attachment_id,
            "kind": self.kind,
            "decision": {
                "outcome": str(decision.outcome),
                "reason": str(decision.reason),
                "dose": decision.dose,
                "gain": _write_interval(decision.gain),
                "retention_change": _write_interval(decision.retention_change),
                "null_gain": _write_interval(decision.null_gain),
                "null_spread": decision.null_spread,
                "excess": _write_interval(decision.excess),
            },
            "curve": [
                {
                    "dose": p.dose,
                    "gain": p.gain,
                    "retention_change": p.retention_change,
                    "retention_high": p.retention_high,
                }
                for p in self.curve
            ],
            "documents": {
                "selection": self.documents.selection,
                "test": self.documents.test,
                "retention_selection": self.documents.retention_selection,
                "retention_test": self.documents.retention_test,
            },
            "bits_per_byte_before": self.bits_per_byte_before,
            "bits_per_byte_after": self.bits_per_byte_after,
            "state_digest": self.state_digest,
            "removals": self.removals,
            "seed": self.seed,
            "device": self.device,
            "seconds": self.seconds,
        }

    def to_bytes(self) -> bytes:
        """The report as canonical JSON."""
        return canonical.dumps(self.to_json())

    @classmethod
    def from_json(cls, value: canonical.Json) -> TrialReport:
        """Read a report.

        Raises:
            RejectedError: AG-EVA-004 if malformed.
        """
        try:
            return _read_report(value)
        except RejectedError as error:
            raise RejectedError("AG-EVA-004", f"trial report: {error.cause}") from error

    @classmethod
    def from_bytes(cls, content: bytes) -> TrialReport:
        """Read a report from JSON.

        Raises:
            RejectedError: AG-EVA-004 if malformed.
        """
        try:
            value = canonical.loads(content)
        except RejectedError as error:
            raise RejectedError("AG-EVA-004", f"trial report: {error.cause}") from error
        return cls.from_json(value)


def _write_interval(interval: Interval) -> dict[str, canonical.Json]:
    return {"value": interval.value, "low": interval.low, "high": interval.high}


def _read_report(value: canonical.Json) -> TrialReport:
    names = set(TrialReport.__dataclass_fields__)
    fields = canonical.as_object(value, names | {"v"})
    if fields["v"] != 1:
        raise RejectedError("AG-EVA-004", "unknown version")
    points = canonical.as_list(fields["curve"])
    if len(points) > _DOSES:
        raise RejectedError("AG-EVA-004", "too many doses")
    return TrialReport(
        attachment_id=_short(fields["attachment_id"]),
        kind=_short(fields["kind"]),
        decision=_read_decision(fields["decision"]),
        curve=tuple(_read_point(point) for point in points),
        documents=_read_counts(fields["documents"]),
        bits_per_byte_before=canonical.as_number(fields["bits_per_byte_before"]),
        bits_per_byte_after=canonical.as_number(fields["bits_per_byte_after"]),
        state_digest=_short(fields["state_digest"]),
        removals=canonical.as_int(fields["removals"]),
        seed=canonical.as_int(fields["seed"]),
        device=_short(fields["device"]),
        seconds=canonical.as_number(fields["seconds"]),
    )


def _read_decision(value: canonical.Json) -> Decision:
    fields = canonical.as_object(value, set(Decision.__dataclass_fields__))
    outcome = canonical.as_text(fields["outcome"])
    reason = canonical.as_text(fields["reason"])
    if outcome not in tuple(Outcome) or reason not in tuple(Reason):
        raise RejectedError("AG-EVA-004", "unknown outcome or reason")
    if (outcome == Outcome.KEEP) != (reason == Reason.GAIN_CONFIRMED):
        raise RejectedError("AG-EVA-004", "outcome and reason contradict each other")
    return Decision(
        outcome=Outcome(outcome),
        reason=Reason(reason),
        dose=canonical.as_number(fields["dose"]),
        gain=_read_interval(fields["gain"]),
        retention_change=_read_interval(fields["retention_change"]),
        null_gain=_read_interval(fields["null_gain"]),
        null_spread=canonical.as_number(fields["null_spread"]),
        excess=_read_interval(fields["excess"]),
    )


def _read_interval(value: canonical.Json) -> Interval:
    fields = canonical.as_object(value, {"value", "low", "high"})
    return Interval(
        canonical.as_number(fields["value"]),
        canonical.as_number(fields["low"]),
        canonical.as_number(fields["high"]),
    )


def _read_point(value: canonical.Json) -> DosePoint:
    names = ("dose", "gain", "retention_change", "retention_high")
    fields = canonical.as_object(value, names)
    return DosePoint(*(canonical.as_number(fields[name]) for name in names))


def _read_counts(value: canonical.Json) -> DocumentCounts:
    names = ("selection", "test", "retention_selection", "retention_test")
    fields = canonical.as_object(value, names)
    return DocumentCounts(*(canonical.as_int(fields[name]) for name in names))


def _short(value: canonical.Json) -> str:
    text = canonical.as_text(value)
    if len(text) > LIMITS.text_field_chars:
        raise RejectedError("AG-EVA-004", "a field is too long")
    return text
