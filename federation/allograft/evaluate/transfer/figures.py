# SPDX-License-Identifier: Apache-2.0
"""From cells to figures: gain, recovery, retention, harm, and the sanity rule. No tensors.

Gains are bits per byte on test documents; positive is better. Losses are averaged over seeds
document by document, and intervals are of the paired bootstrap over documents; the spread over
seeds is told beside them. Doses, weights and positions are chosen on validation documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from allograft.evaluate.bootstrap import (
    Interval,
    Losses,
    Resampling,
    mean_interval,
    paired_bits,
    paired_recovery,
)
from allograft.evaluate.gate import DoseTrial, GateRules, choose_dose, dose_curve
from allograft.evaluate.transfer.cell import HELD_OUT, Cell, Measured, Point, Role


@dataclass(frozen=True, slots=True)
class Row:
    """One arm on one recipient at one strength.

    Attributes:
        arm: Name in tables.
        role: What it is there for.
        recipient: Name of the model.
        strength: Dose, weight or position.
        chosen_by: `full`, `gate` or both for a recipe, `validation` among several strengths of
            anything else, empty where there is one.
        dose: As a number.
        gain: Bits per byte saved on the domain's test documents.
        recovery: Share of the oracle's gain; None without an oracle that gains.
        general: Bits per byte that general text got worse; negative is better.
        accuracy: Share of questions answered rightly; None without a label task.
        seeds: How many.
        seed_gains: Gain of each seed.
        harmed: Seeds whose gain is negative with certainty.
        verdict: The recipe's own, with its code where it refused.
        forced: Measured although refused.
        rate: Peak learning rate that was chosen.
        payload_bytes: What crosses the border.
        seconds: Mean training time.
        peak_bytes: Most memory that a training took above the loaded model.
    """

    arm: str
    role: Role
    recipient: str
    strength: str
    chosen_by: str
    dose: float
    gain: Interval
    recovery: Interval | None
    general: Interval
    accuracy: Interval | None
    seeds: int
    seed_gains: tuple[float, ...]
    harmed: int
    verdict: str
    forced: bool
    rate: float
    payload_bytes: int
    seconds: float
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """A dose of an arm on a recipient: what it gains and what general text loses."""

    dose: float
    gain: float
    general: float


@dataclass(frozen=True, slots=True)
class Curve:
    """The path of an arm on a recipient as its dose grows."""

    arm: str
    recipient: str
    points: tuple[CurvePoint, ...]


@dataclass(frozen=True, slots=True)
class Refusal:
    """An arm that could not even be forced on a recipient."""

    arm: str
    recipient: str
    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class Sanity:
    """Whether baselines are in the order that any honest setting has.

    Attributes:
        holds: Full fine-tuning <= LoRA < zero-shot, in bits per byte on the target.
        full: Bits per byte after full fine-tuning.
        lora: After the reference LoRA at full dose.
        zero_shot: Of the untouched model.
        reason: In a sentence.
    """

    holds: bool
    full: float
    lora: float
    zero_shot: float
    reason: str


@dataclass(frozen=True, slots=True)
class Harm:
    """How often an arm harmed whom it reached; refused recipients count apart, when forced."""

    arm: str
    harmed: int
    of: int
    forced_harmed: int
    forced: int


@dataclass(frozen=True, slots=True)
class Untouched:
    """A recipient as it is: bits per byte, and accuracy where there is a label task."""

    recipient: str
    domain: float
    general: float
    accuracy: Interval | None


@dataclass(frozen=True, slots=True)
class Figures:
    """All that a table or a plot needs."""

    sanity: Sanity
    rows: tuple[Row, ...]
    curves: tuple[Curve, ...]
    refusals: tuple[Refusal, ...]
    harms: tuple[Harm, ...]
    zero_shot: tuple[Untouched, ...]


def make_figures(cells: Sequence[Cell], reference: str, rules: GateRules | None = None) -> Figures:
    """All figures of a run.

    Args:
        cells: As measured.
        reference: Name of the LoRA arm of the sanity rule.
        rules: The gate's, by which a recipe's dose is chosen.
    """
    return _Maker(cells, reference, rules or GateRules()).make()


def check_sanity(zero_shot: Losses, lora: Losses, full: Losses) -> Sanity:
    """Judge the order of the baselines.

    Published comparisons in which LoRA or full fine-tuning end far above the untouched model
    compare with something broken; they say nothing about what is compared.
    """
    tuned, low_rank, before = (each.bits_per_byte for each in (full, lora, zero_shot))
    # Written so that NaN fails.
    holds = tuned <= low_rank < before
    order = (
        f"full fine-tuning {tuned:.3f}, LoRA {low_rank:.3f}, zero-shot {before:.3f} bits per byte"
    )
    need = "full fine-tuning <= LoRA < zero-shot"
    reason = f"{order}: {need}" if holds else f"{order}, but it must be {need}"
    return Sanity(holds, tuned, low_rank, before, reason)


class _Maker:
    def __init__(self, cells: Sequence[Cell], reference: str, rules: GateRules) -> None:
        self._rules = rules
        self._reference = reference
        self._groups: dict[tuple[str, str], list[Cell]] = {}
        for cell in cells:
            self._groups.setdefault((cell.arm, cell.recipient), []).append(cell)
        self._before = {
            recipient: _mean_points(group)[0].measured
            for (_, recipient), group in self._groups.items()
            if group[0].role is Role.ZERO_SHOT
        }
        self._oracles = {
            recipient: _mean_points(group)[0].measured
            for (_, recipient), group in self._groups.items()
            if group[0].role is Role.ORACLE
        }
        self._base = next(iter(self._before))

    def make(self) -> Figures:
        rows: list[Row] = []
        curves, refusals = [], []
        for (arm, recipient), group in self._groups.items():
            first = group[0]
            if first.role is Role.ZERO_SHOT:
                continue
            tried = [cell for cell in group if cell.points]
            if not tried:
                refusals.append(Refusal(arm, recipient, first.code, first.reason))
                continue
            points = _mean_points(tried)
            for point, how in self._choose(first, recipient, points):
                rows.append(self._row(tried, point, how))
            if first.role is Role.RECIPE:
                curves.append(self._curve(first, points))
        rows.sort(key=lambda row: (list(Role).index(row.role), row.arm))
        zero = tuple(
            Untouched(
                name,
                each.test.bits_per_byte,
                each.general_test.bits_per_byte,
                _accuracy(each, self._rules.resampling),
            )
            for name, each in self._before.items()
        )
        found = tuple(rows)
        return Figures(
            self._sanity(), found, tuple(curves), tuple(refusals), tuple(_harms(found)), zero
        )

    def _sanity(self) -> Sanity:
        lora = _mean_points(self._groups[self._reference, self._base])
        return check_sanity(
            self._before[self._base].test,
            max(lora, key=lambda point: point.dose).measured.test,
            self._oracles[self._base].test,
        )

    def _choose(
        self, cell: Cell, recipient: str, points: Sequence[Point]
    ) -> list[tuple[Point, str]]:
        """The strengths that are shown: for a recipe the gate's and the full dose."""
        if cell.role is not Role.RECIPE:
            best = min(points, key=lambda point: point.measured.validation.bits_per_byte)
            return [(best, "validation" if len(points) > 1 else "")]
        full = max(points, key=lambda point: point.dose)
        dose = self._gate_dose(recipient, points)
        gated = next(point for point in points if point.dose == dose)
        if gated is full:
            return [(full, "full, gate")]
        return [(full, "full"), (gated, "gate")]

    def _gate_dose(self, recipient: str, points: Sequence[Point]) -> float:
        before = self._before[recipient]
        trials = [
            DoseTrial(p.dose, p.measured.validation, p.measured.general_validation) for p in points
        ]
        curve = dose_curve(
            before.validation, before.general_validation, trials, self._rules.resampling
        )
        return choose_dose(curve, self._rules)

    def _row(self, group: Sequence[Cell], point: Point, how: str) -> Row:
        first, plan = group[0], self._rules.resampling
        before = self._before[first.recipient]
        oracle = self._oracles.get(first.recipient)
        each = [
            paired_bits(before.test, p.measured.test, plan)
            for cell in group
            for p in cell.points
            if p.label == point.label
        ]
        recovery = None
        if oracle is not None and first.role is not Role.ORACLE:
            possible = paired_bits(before.test, oracle.test, plan)
            if possible.low > 0:
                recovery = paired_recovery(before.test, point.measured.test, oracle.test, plan)
        kept = paired_bits(before.general_test, point.measured.general_test, plan)
        return Row(
            arm=first.arm,
            role=first.role,
            recipient=first.recipient,
            strength=point.label,
            chosen_by=how,
            dose=point.dose,
            gain=paired_bits(before.test, point.measured.test, plan),
            recovery=recovery,
            general=Interval(-kept.value, -kept.high, -kept.low),
            accuracy=_accuracy(point.measured, plan),
            seeds=len(group),
            seed_gains=tuple(gain.value for gain in each),
            harmed=sum(gain.high < 0 for gain in each),
            verdict=f"{first.verdict} {first.code}".strip(),
            forced=first.forced,
            rate=first.rate,
            payload_bytes=first.payload_bytes,
            seconds=sum(cell.seconds for cell in group) / len(group),
            peak_bytes=max(cell.peak_bytes for cell in group),
        )

    def _curve(self, cell: Cell, points: Sequence[Point]) -> Curve:
        before = self._before[cell.recipient]
        path = [
            CurvePoint(
                p.dose,
                before.test.bits_per_byte - p.measured.test.bits_per_byte,
                p.measured.general_test.bits_per_byte - before.general_test.bits_per_byte,
            )
            for p in sorted(points, key=lambda p: p.dose)
        ]
        return Curve(cell.arm, cell.recipient, (CurvePoint(0.0, 0.0, 0.0), *path))


def _mean_points(group: Sequence[Cell]) -> list[Point]:
    """Points averaged over seeds, document by document."""
    found = []
    for number, point in enumerate(group[0].points):
        same = [cell.points[number].measured for cell in group]
        losses = {name: _mean_losses([getattr(each, name) for each in same]) for name in HELD_OUT}
        correct = np.mean([each.correct for each in same], axis=0)
        mean = Measured(**losses, correct=tuple(correct.tolist()))
        found.append(replace(point, measured=mean))
    return found


def _mean_losses(losses: Sequence[Losses]) -> Losses:
    return replace(losses[0], nats=np.mean([each.nats for each in losses], axis=0))


def _accuracy(measured: Measured, plan: Resampling) -> Interval | None:
    return mean_interval(np.array(measured.correct), plan) if measured.correct else None


def _harms(rows: Sequence[Row]) -> Iterable[Harm]:
    """Per recipe, at full dose: what a recipient without a gate would have met."""
    full = [row for row in rows if row.role is Role.RECIPE and "full" in row.chosen_by]
    for arm in dict.fromkeys(row.arm for row in full):
        own = [row for row in full if row.arm == arm]
        taken, forced = ([r for r in own if r.forced is flag] for flag in (False, True))
        yield Harm(
            arm,
            sum(row.harmed for row in taken),
            sum(row.seeds for row in taken),
            sum(row.harmed for row in forced),
            sum(row.seeds for row in forced),
        )
