# SPDX-License-Identifier: Apache-2.0
"""Laws of the bootstrap, the gate, the text scan and stochastic rounding."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from allograft.evaluate.bootstrap import Interval, Losses, Resampling, paired_gain
from allograft.evaluate.gate import Evidence, GateRules, Outcome, decide
from allograft.privacy import scan
from allograft.privacy.egress import round_to_bf16

QUICK = Resampling(resamples=200)


def losses(nats: np.ndarray, tokens: np.ndarray | None = None) -> Losses:
    tokens = np.full(len(nats), 50, dtype=np.int64) if tokens is None else tokens
    return Losses(np.asarray(nats, dtype=np.float64), tokens, 4 * tokens)


def evidence(seed: int, gain: float, worse: float, null: float) -> Evidence:
    """Documents whose losses differ by known amounts per token, plus noise."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(20, 200, 40)
    before = generator.normal(4.0, 0.5, 40) * tokens
    noise = generator.normal(0, 0.05, (4, 40)) * tokens
    return Evidence(
        dose=0.5,
        test_before=losses(before, tokens),
        test_after=losses(before - gain * tokens + noise[0], tokens),
        test_nulls=tuple(losses(before - null * tokens + n, tokens) for n in noise[2:]),
        retention_before=losses(before, tokens),
        retention_after=losses(before + worse * tokens + noise[1], tokens),
    )


SMALL = st.floats(-0.3, 0.3)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), SMALL, SMALL, SMALL, st.floats(0, 0.2), st.floats(0, 0.2))
def test_what_is_kept_stays_kept_when_everything_gets_better(
    seed: int, gain: float, worse: float, null: float, more: float, slack: float
) -> None:
    rules = GateRules(min_gain=0.01, max_retention_loss=0.05, resampling=QUICK)
    looser = GateRules(min_gain=0.0, max_retention_loss=0.05 + slack, resampling=QUICK)
    if decide(evidence(seed, gain, worse, null), rules).outcome is Outcome.KEEP:
        better = evidence(seed, gain + more, worse - slack, null - more)
        assert decide(better, rules).outcome is Outcome.KEEP
        assert decide(evidence(seed, gain, worse, null), looser).outcome is Outcome.KEEP


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), SMALL, SMALL, SMALL)
def test_nothing_is_kept_against_its_own_numbers(
    seed: int, gain: float, worse: float, null: float
) -> None:
    rules = GateRules(min_gain=0.02, max_retention_loss=0.05, resampling=QUICK)
    decision = decide(evidence(seed, gain, worse, null), rules)
    if decision.outcome is Outcome.KEEP:
        assert decision.gain.low > 0.02
        assert decision.retention_change.high <= 0.05
        assert decision.excess.low > 0.02
    else:
        assert (
            decision.gain.low <= 0.02
            or decision.retention_change.high > 0.05
            or decision.excess.low <= 0.02
        )


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 60))
def test_swapping_before_and_after_mirrors_the_interval(seed: int, count: int) -> None:
    generator = np.random.default_rng(seed)
    one, other = (losses(generator.normal(100, 10, count)) for _ in range(2))
    there, back = paired_gain(one, other, QUICK), paired_gain(other, one, QUICK)
    assert there.value == pytest.approx(-back.value)
    assert there.low == pytest.approx(-back.high)
    assert there.high == pytest.approx(-back.low)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """400 experiments of 60 documents with a known gain; 95 % intervals.

    The percentile bootstrap is a little narrow at this size. The bounds are 91 % and 98.5 %: at a
    true coverage of 94 % either is four standard errors away, and the seed is fixed.
    """
    generator = np.random.default_rng(2)
    covered = 0
    for trial in range(400):
        tokens = generator.integers(20, 200, 60)
        before = generator.normal(4.0, 0.5, 60) * tokens
        after = before - generator.normal(0.1, 0.3, 60) * tokens
        plan = Resampling(resamples=400, seed=trial)
        interval = paired_gain(losses(before, tokens), losses(after, tokens), plan)
        covered += interval.low <= 0.1 <= interval.high
    assert 0.91 * 400 <= covered <= 0.985 * 400


def test_an_interval_shrinks_with_the_square_root_of_the_documents() -> None:
    generator = np.random.default_rng(3)

    def width(count: int) -> float:
        saved = generator.normal(0, 1, count)
        found: Interval = paired_gain(losses(np.zeros(count)), losses(-saved), Resampling())
        return found.high - found.low

    assert width(100) / width(1600) == pytest.approx(4, rel=0.35)


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=200))
def test_the_scan_never_raises_and_never_quotes(text: str) -> None:
    counts = scan.scan_text(text, dates=True)
    known = {rule.name for rule in (*scan.RULES, scan.DATES)}
    assert counts.keys() <= known
    assert all(count > 0 for count in counts.values())


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["jane.doe@clinic.example", "078-05-1120", "MRN 0043219", "Mrs Example"]),
    st.text(alphabet="abcdefg ,;\n", max_size=30),
    st.text(alphabet="abcdefg ,;\n", max_size=30),
)
def test_an_identifier_is_found_wherever_it_stands(found: str, before: str, after: str) -> None:
    assert scan.scan_text(f"{before} {found} {after}")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=50))
def test_rounding_moves_a_value_to_one_of_its_two_neighbours(values: list) -> None:
    array = np.array(values, dtype=np.float32)
    rounded = round_to_bf16(array)
    down = (array.view(np.uint32) >> 16).astype(np.uint16)
    assert ((rounded == down) | (rounded == down + 1)).all()
    exact = (array.view(np.uint32) & 0xFFFF) == 0
    assert (rounded[exact] == down[exact]).all()
