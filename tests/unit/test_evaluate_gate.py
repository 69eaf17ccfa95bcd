# SPDX-License-Identifier: Apache-2.0
"""The paired bootstrap, the dose choice, the gate and the report."""

from dataclasses import replace

import numpy as np
import pytest

from allograft.crypto import canonical
from allograft.errors import RejectedError
from allograft.evaluate.bootstrap import Losses, Resampling, paired_gain
from allograft.evaluate.gate import (
    Decision,
    DosePoint,
    DoseTrial,
    Evidence,
    GateRules,
    Outcome,
    Reason,
    choose_dose,
    decide,
    dose_curve,
)
from allograft.evaluate.report import DocumentCounts, TrialReport

RULES = GateRules(min_gain=0.0, max_retention_loss=0.05)


def per_token(mean: float, seed: int, count: int = 40) -> Losses:
    """Documents of 100 tokens with a mean loss per token and a little noise."""
    noise = np.random.default_rng(seed).normal(0, 0.02, count)
    tokens = np.full(count, 100, dtype=np.int64)
    return Losses((mean + noise) * 100, tokens, 4 * tokens)


def evidence(gain: float = 0.3, worse: float = 0.01, null: float = 0.0) -> Evidence:
    return Evidence(
        dose=0.5,
        test_before=per_token(4.0, 1),
        test_after=per_token(4.0 - gain, 2),
        test_nulls=tuple(per_token(4.0 - null, seed) for seed in (3, 6, 7)),
        retention_before=per_token(3.0, 4),
        retention_after=per_token(3.0 + worse, 5),
    )


def test_gain_is_nats_saved_per_token_weighted_by_tokens() -> None:
    tokens = np.array([10, 1000])
    before = Losses(np.array([100.0, 1000.0]), tokens, tokens)
    after = Losses(np.array([0.0, 1000.0]), tokens, tokens)
    assert paired_gain(before, after).value == pytest.approx(100 / 1010)
    assert before.nats_per_token == pytest.approx(1100 / 1010)
    assert before.bits_per_byte == pytest.approx(1100 / 1010 / np.log(2))


def test_the_same_plan_gives_the_same_interval() -> None:
    one, other = per_token(4.0, 1), per_token(3.9, 2)
    assert paired_gain(one, other) == paired_gain(one, other)
    assert paired_gain(one, other, Resampling(seed=1)) != paired_gain(one, other)


def test_a_common_shift_between_documents_cancels() -> None:
    """Documents differ widely; the change is the same for all: the interval is tight."""
    tokens = np.full(40, 100, dtype=np.int64)
    wide = np.random.default_rng(0).normal(400, 200, 40)
    interval = paired_gain(Losses(wide, tokens, tokens), Losses(wide - 10, tokens, tokens))
    assert interval.low == pytest.approx(0.1)
    assert interval.high == pytest.approx(0.1)


def test_refuses_losses_that_are_not_finite_or_absent() -> None:
    good = per_token(4.0, 1)
    bad = replace(good, nats=np.where(np.arange(40) == 3, np.nan, good.nats))
    with pytest.raises(RejectedError) as error:
        paired_gain(good, bad)
    assert error.value.code == "AG-EVA-002"
    none = Losses(np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.int64))
    with pytest.raises(RejectedError) as error:
        paired_gain(none, none)
    assert error.value.code == "AG-EVA-001"
    with pytest.raises(ValueError, match="same documents"):
        paired_gain(good, per_token(4.0, 1, count=39))


def test_keeps_a_certain_gain() -> None:
    decision = decide(evidence(), RULES)
    assert (decision.outcome, decision.reason) == (Outcome.KEEP, Reason.GAIN_CONFIRMED)
    assert decision.dose == 0.5
    assert decision.gain.low < 0.3 < decision.gain.high + 0.01
    assert abs(decision.null_gain.value) < 0.02
    assert decision.retention_change.low < 0.01 + 0.02


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"gain": 0.0}, Reason.NO_GAIN),
        ({"gain": -0.5}, Reason.NO_GAIN),
        ({"worse": 0.2}, Reason.RETENTION_LOSS),
        ({"null": 0.3}, Reason.NULL_EXPLAINS),
        ({"gain": 0.3, "null": 0.295}, Reason.NULL_EXPLAINS),
    ],
)
def test_reverts_with_a_reason(changed: dict, reason: Reason) -> None:
    decision = decide(evidence(**changed), RULES)
    assert (decision.outcome, decision.reason) == (Outcome.REVERT, reason)


def test_noise_that_differs_between_draws_raises_the_bar() -> None:
    """A packet that is one more draw of noise may beat the others by as much as they differ."""
    draws = tuple(per_token(4.0 - gain, seed) for seed, gain in ((3, 0.1), (6, -0.1), (7, 0.0)))
    lucky = replace(evidence(gain=0.2), test_nulls=draws)
    assert decide(lucky, RULES).reason is Reason.NULL_EXPLAINS
    assert decide(replace(evidence(gain=0.5), test_nulls=draws), RULES).outcome is Outcome.KEEP
    with pytest.raises(ValueError, match="noise"):
        decide(replace(evidence(), test_nulls=()), RULES)


def test_a_null_that_does_harm_does_not_lower_the_bar() -> None:
    decision = decide(evidence(gain=0.0, null=-2.0), RULES)
    assert decision.reason is Reason.NO_GAIN


def test_the_gain_must_exceed_the_site_minimum_with_certainty() -> None:
    assert decide(evidence(gain=0.3), replace(RULES, min_gain=0.2)).outcome is Outcome.KEEP
    assert decide(evidence(gain=0.3), replace(RULES, min_gain=0.3)).reason is Reason.NO_GAIN


def test_too_few_documents_are_no_basis() -> None:
    one = per_token(4.0, 1, count=29)
    few = Evidence(0.5, one, one, (one,), one, one)
    with pytest.raises(RejectedError) as error:
        decide(few, RULES)
    assert error.value.code == "AG-EVA-001"


def points(*rows: tuple[float, float, float]) -> list[DosePoint]:
    return [DosePoint(dose, gain, high - 0.01, high) for dose, gain, high in rows]


@pytest.mark.parametrize(
    ("rows", "dose"),
    [
        ([(0.25, 0.1, 0.0), (0.5, 0.2, 0.02), (1.0, 0.4, 0.04)], 1.0),
        ([(0.25, 0.1, 0.0), (0.5, 0.2, 0.02), (1.0, 0.4, 0.06)], 0.5),
        ([(0.25, 0.1, 0.2), (0.5, 0.2, 0.3), (1.0, 0.4, 0.4)], 0.25),
        ([(0.25, 0.2, 0.0), (0.5, 0.2, 0.0), (1.0, 0.1, 0.0)], 0.25),
        ([(0.25, -0.1, 0.0), (0.5, -0.2, 0.0)], 0.25),
    ],
)
def test_chooses_the_best_dose_that_keeps_retention(rows: list, dose: float) -> None:
    assert choose_dose(points(*rows), RULES) == dose


def test_a_dose_that_breaks_the_model_is_refused() -> None:
    with pytest.raises(RejectedError) as error:
        choose_dose(points((0.5, float("nan"), 0.0)), RULES)
    assert error.value.code == "AG-EVA-002"


def test_a_curve_holds_the_upper_bound_of_the_worsening() -> None:
    trials = [DoseTrial(0.5, per_token(3.5, 2), per_token(3.1, 5))]
    (point,) = dose_curve(per_token(4.0, 1), per_token(3.0, 4), trials)
    assert point.gain == pytest.approx(0.5, abs=0.02)
    assert point.retention_change == pytest.approx(0.1, abs=0.02)
    assert point.retention_change < point.retention_high < point.retention_change + 0.02


@pytest.fixture
def report() -> TrialReport:
    decision: Decision = decide(evidence(), RULES)
    return TrialReport(
        attachment_id="5" * 32,
        kind="organ",
        decision=decision,
        curve=tuple(points((0.25, 0.1, 0.0), (0.5, 0.3, 0.02))),
        documents=DocumentCounts(40, 40, 40, 40),
        bits_per_byte_before=2.0,
        bits_per_byte_after=1.5,
        state_digest="a" * 64,
        removals=4,
        seed=3,
        device="cpu",
        seconds=1.5,
    )


def test_a_report_survives_json(report: TrialReport) -> None:
    assert TrialReport.from_bytes(report.to_bytes()) == report


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("v",), 2),
        (("decision", "outcome"), "perhaps"),
        (("decision", "outcome"), "revert"),
        (("decision", "reason"), "because"),
        (("decision", "gain", "low"), "0.1"),
        (("curve",), [{}]),
        (("curve",), [{"dose": 1}] * 65),
        (("documents", "test"), -1),
        (("removals",), True),
        (("device",), "x" * 600),
    ],
)
def test_refuses_a_malformed_report(report: TrialReport, path: tuple, value: object) -> None:
    document = canonical.loads(report.to_bytes())
    target = document
    for step in path[:-1]:
        target = target[step]
    target[path[-1]] = value
    with pytest.raises(RejectedError) as error:
        TrialReport.from_bytes(canonical.dumps(document))
    assert error.value.code == "AG-EVA-004"
    with pytest.raises(RejectedError) as error:
        TrialReport.from_bytes(b"{")
    assert error.value.code == "AG-EVA-004"
