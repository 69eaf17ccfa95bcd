# SPDX-License-Identifier: Apache-2.0
"""Keep or revert: a pure function of measurements, without a model in sight.

The dose is chosen on one half of the documents and judged on the other, which the choice never
saw. A packet is kept only if all three hold: its gain is certain beyond the site's minimum, what
it costs on retention text is certainly within the site's limit, and noise of the same norm does
not explain the gain. "Take nothing" is a normal outcome, not an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from allograft.errors import RejectedError
from allograft.evaluate.bootstrap import Interval, Losses, Resampling, paired_gain


class Outcome(StrEnum):
    """What becomes of the packet."""

    KEEP = "keep"
    REVERT = "revert"


class Reason(StrEnum):
    """Why; stable words for receipts, tables and scripts."""

    GAIN_CONFIRMED = "gain-confirmed"
    NO_GAIN = "no-gain"
    RETENTION_LOSS = "retention-loss"
    NULL_EXPLAINS = "null-explains-gain"


@dataclass(frozen=True, slots=True)
class GateRules:
    """The site's thresholds, from the `[receive]` section of its policy.

    Attributes:
        min_gain: Nats per token that the lower bound of the gain must exceed.
        max_retention_loss: Nats per token that the upper bound of the worsening may reach.
        min_documents: Fewest documents for each of the three measurements. A percentile
            bootstrap over fewer is too narrow to be trusted.
        resampling: How intervals are computed.
    """

    min_gain: float = 0.0
    max_retention_loss: float = 0.02
    min_documents: int = 30
    resampling: Resampling = field(default_factory=Resampling)


@dataclass(frozen=True, slots=True)
class DoseTrial:
    """One dose as measured on the selection documents."""

    dose: float
    selection: Losses
    retention: Losses


@dataclass(frozen=True, slots=True)
class DosePoint:
    """One dose in figures: gain on the selection documents, worsening on retention text.

    `retention_high` is the upper bound of the worsening, by which a dose is chosen.
    """

    dose: float
    gain: float
    retention_change: float
    retention_high: float


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the judgement rests on.

    Attributes:
        dose: The dose under judgement.
        test_before: Test documents without the packet.
        test_after: The same with the packet.
        test_nulls: The same with noise of the packet's norm, one measurement per draw.
        retention_before: Retention documents without the packet.
        retention_after: The same with the packet.
    """

    dose: float
    test_before: Losses
    test_after: Losses
    test_nulls: tuple[Losses, ...]
    retention_before: Losses
    retention_after: Losses


@dataclass(frozen=True, slots=True)
class Decision:
    """The gate's verdict with the numbers behind it (nats per token).

    Attributes:
        outcome: Keep or revert.
        reason: Why.
        dose: The dose that was judged, and that is kept if the outcome is keep.
        gain: What the packet saves on the test documents; positive is better.
        retention_change: How much worse retention text gets; negative is better.
        null_gain: What the best draw of noise of the same norm saves on the test documents.
        null_spread: Best minus worst draw of noise.
        excess: The gain over the best draw of noise.
    """

    outcome: Outcome
    reason: Reason
    dose: float
    gain: Interval
    retention_change: Interval
    null_gain: Interval
    null_spread: float
    excess: Interval


def dose_curve(
    selection_before: Losses,
    retention_before: Losses,
    trials: Sequence[DoseTrial],
    plan: Resampling | None = None,
) -> tuple[DosePoint, ...]:
    """Gain and worsening of each dose, in the order given."""
    points = []
    for trial in trials:
        kept = paired_gain(retention_before, trial.retention, plan)
        gain = selection_before.nats_per_token - trial.selection.nats_per_token
        points.append(DosePoint(trial.dose, gain, -kept.value, -kept.low))
    return tuple(points)


def choose_dose(curve: Sequence[DosePoint], rules: GateRules) -> float:
    """The dose to judge: the best gain among those that keep retention within the limit.

    Retention counts by its upper bound, as in the judgement: a dose chosen at the very edge would
    fail there by chance. If no dose is within the limit, the one that worsens retention least is
    taken, so that the report still shows how close it came.

    Raises:
        RejectedError: AG-EVA-002 if a loss was not finite.
    """
    if not curve:
        raise ValueError("no dose was tried")
    if not all(np.isfinite([p.gain, p.retention_high]).all() for p in curve):
        raise RejectedError("AG-EVA-002", "a loss of a tried dose is not a finite number")
    harmless = [p for p in curve if p.retention_high <= rules.max_retention_loss]
    if harmless:
        # On a tie the smaller dose: less change for the same gain.
        return max(harmless, key=lambda p: (p.gain, -p.dose)).dose
    return min(curve, key=lambda p: (p.retention_high, p.dose)).dose


def check_documents(counts: Sequence[tuple[str, int]], rules: GateRules) -> None:
    """Refuse to judge on too little data.

    Args:
        counts: What the documents are for, and how many there are.
        rules: The site's thresholds.

    Raises:
        RejectedError: AG-EVA-001.
    """
    for what, count in counts:
        if count < rules.min_documents:
            raise RejectedError(
                "AG-EVA-001", f"{count} {what} documents, at least {rules.min_documents} needed"
            )


def decide(evidence: Evidence, rules: GateRules) -> Decision:
    """Judge a packet at one dose.

    Raises:
        RejectedError: AG-EVA-001 too few documents, AG-EVA-002 a loss is not finite.
    """
    check_documents(
        (
            ("test", evidence.test_before.documents),
            ("retention", evidence.retention_before.documents),
        ),
        rules,
    )
    if not evidence.test_nulls:
        raise ValueError("the gate needs at least one draw of noise")
    plan = rules.resampling
    gain = paired_gain(evidence.test_before, evidence.test_after, plan)
    nulls = [paired_gain(evidence.test_before, null, plan) for null in evidence.test_nulls]
    best = max(range(len(nulls)), key=lambda number: nulls[number].value)
    spread = nulls[best].value - min(null.value for null in nulls)
    excess = paired_gain(evidence.test_nulls[best], evidence.test_after, plan)
    kept = paired_gain(evidence.retention_before, evidence.retention_after, plan)
    worsening = Interval(-kept.value, -kept.high, -kept.low)
    reason = _reason(gain, worsening, (excess, spread), rules)
    return Decision(
        outcome=Outcome.KEEP if reason is Reason.GAIN_CONFIRMED else Outcome.REVERT,
        reason=reason,
        dose=evidence.dose,
        gain=gain,
        retention_change=worsening,
        null_gain=nulls[best],
        null_spread=spread,
        excess=excess,
    )


def _reason(
    gain: Interval, worsening: Interval, over_noise: tuple[Interval, float], rules: GateRules
) -> Reason:
    # Each test is written so that a NaN reverts.
    least = max(rules.min_gain, 0.0)
    if not gain.low > least:
        return Reason.NO_GAIN
    if not worsening.high <= rules.max_retention_loss:
        return Reason.RETENTION_LOSS
    # Documents alone do not say how much draws of noise differ: on a badly calibrated model one
    # draw of noise can beat another with certainty. Hence the spread is part of the bar. A null
    # that does harm does not lower it, because the gain itself was tested first.
    excess, spread = over_noise
    if not excess.low > max(least, spread):
        return Reason.NULL_EXPLAINS
    return Reason.GAIN_CONFIRMED
