# SPDX-License-Identifier: Apache-2.0
"""Bounds and intervals of leak audits, against other implementations and simulated mechanisms."""

import math
from statistics import NormalDist

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from allograft.privacy.accountant import true_positive_bound
from allograft.privacy.audit import (
    MAX_EXPOSURE,
    Scores,
    auc,
    audit_one_run,
    clopper_pearson,
    combined_p_value,
    exposure,
    exposure_slope,
    gaussian_epsilon,
    gdp_epsilon,
    log_queries,
    one_run_epsilon,
    one_run_p_value,
    rank_p_value,
    recognise,
    recognition_epsilon,
)

DELTA = 1e-5
NORMAL = NormalDist()


def steinke_p_value(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """Theorem 5.2 of arXiv 2305.08846 by exact sums in fifty digits."""
    with mpmath.workdps(50):
        right = mpmath.exp(epsilon) / (1 + mpmath.exp(epsilon))
        mass = [mpmath.binomial(r, k) * right**k * (1 - right) ** (r - k) for k in range(r + 1)]
        steepest = max((mpmath.fsum(mass[v - i : v]) / i for i in range(1, v + 1)), default=0)
        return float(mpmath.fsum(mass[v:]) + 2 * m * delta * steepest)


def mahloujifar_fits(m: int, c: int, v: int, mu: float, p: float) -> bool:
    """The recursion of arXiv 2410.22235 with abstention, in arrays as the paper has it."""
    tau = p * c / m
    r, h = [0.0] * (v + 1), [0.0] * (v + 1)
    r[v], h[v] = tau * v / c, tau * (c - v) / c
    for i in reversed(range(v)):
        blown = NORMAL.cdf(NORMAL.inv_cdf(r[i + 1]) - mu) if r[i + 1] < 1 else 1.0
        h[i] = max(h[i + 1], blown)
        r[i] = r[i + 1] + i / (c - i) * (h[i] - h[i + 1])
    return r[0] + h[0] <= c / m


def mahloujifar_epsilon(m: int, c: int, v: int, p: float = 0.05) -> float:
    mu = next(k / 1000 for k in range(1, 20000) if mahloujifar_fits(m, c, v, k / 1000, p))
    grid = (k / 500 for k in range(50000))
    return next(
        e
        for e in grid
        if NORMAL.cdf(-e / mu + mu / 2) - math.exp(e) * NORMAL.cdf(-e / mu - mu / 2) <= DELTA
    )


class TestOneRun:
    @pytest.mark.parametrize(
        ("m", "r", "v"),
        [(50, 50, 40), (100, 100, 100), (200, 60, 55), (200, 200, 120), (80, 10, 0)],
    )
    @pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0, 5.0])
    def test_p_values_are_those_of_exact_sums(self, m: int, r: int, v: int, epsilon: float) -> None:
        ours = one_run_p_value(m, r, v, epsilon, DELTA)
        assert ours == pytest.approx(min(steinke_p_value(m, r, v, epsilon, DELTA), 1.0), rel=1e-8)

    @pytest.mark.parametrize(("m", "bound"), [(100, 3.5), (200, 4.2), (1000, 5.8), (5000, 7.3)])
    def test_perfect_guesses_prove_what_the_notes_say(self, m: int, bound: float) -> None:
        assert one_run_epsilon(m, m, m, DELTA, 0.05) == pytest.approx(bound, abs=0.05)

    @pytest.mark.parametrize(
        ("correct", "bound", "gaussian"),
        [
            (550, 0.09, 0.19),
            (600, 0.30, 0.58),
            (700, 0.73, 1.4),
            (800, 1.25, 2.3),
            (900, 2.0, 3.8),
            (990, 4.1, 7.8),
        ],
    )
    def test_accuracies_prove_what_the_notes_say(
        self, correct: int, bound: float, gaussian: float
    ) -> None:
        assert one_run_epsilon(1000, 1000, correct, DELTA, 0.05) == pytest.approx(bound, abs=0.05)
        ours = gaussian_epsilon(1000, 1000, correct, DELTA, 0.05)
        assert ours == pytest.approx(gaussian, abs=0.06)

    def test_delta_lowers_the_bound(self) -> None:
        loose = [one_run_epsilon(1000, 1000, 900, delta, 0.05) for delta in (0.0, 1e-5, 1e-3, 0.1)]
        assert loose == sorted(loose, reverse=True)
        assert loose[0] > loose[2] > loose[3] == 0.0

    @given(
        m=st.integers(2, 300), shares=st.tuples(st.floats(0.1, 1), st.floats(0, 1)), data=st.data()
    )
    @settings(max_examples=40, deadline=None)
    def test_one_more_right_guess_never_lowers_a_bound(
        self, m: int, shares: tuple[float, float], data: st.DataObject
    ) -> None:
        r = max(1, int(m * shares[0]))
        v = int((r - 1) * shares[1])
        for bound in (one_run_epsilon, gaussian_epsilon):
            fewer, more = bound(m, r, v, DELTA, 0.05), bound(m, r, v + 1, DELTA, 0.05)
            assert more >= fewer - 1e-6

    @given(
        m=st.integers(20, 2000),
        epsilon=st.floats(0.1, 6),
        abstain=st.floats(0, 0.9),
        seed=st.integers(0, 2**32),
    )
    @settings(max_examples=60, deadline=None)
    def test_randomised_response_is_never_said_to_leak_more_than_it_does(
        self, m: int, epsilon: float, abstain: float, seed: int
    ) -> None:
        r = max(1, int(m * (1 - abstain)))
        v = int(np.random.default_rng(seed).binomial(r, 1 / (1 + math.exp(-epsilon))))
        assert one_run_epsilon(m, r, v, 0.0, 1e-9) <= epsilon

    @given(sigma=st.floats(0.3, 5), seed=st.integers(0, 2**32))
    @settings(max_examples=15, deadline=None)
    def test_gaussian_noise_is_never_said_to_leak_more_than_it_does(
        self, sigma: float, seed: int
    ) -> None:
        generator = np.random.default_rng(seed)
        coins = generator.random(400) < 0.5
        scores = coins + generator.normal(0, sigma, 400)
        bound = audit_one_run([(scores, coins)], (0.1, 0.5, 1.0), DELTA, 1e-9)
        truth = gdp_epsilon(1 / sigma, DELTA)
        assert bound.epsilon <= truth
        assert bound.gaussian <= truth

    def test_counts_that_cannot_be_are_refused(self) -> None:
        for m, r, v in ((10, 11, 5), (10, 5, 6), (10, 5, -1)):
            with pytest.raises(ValueError, match="counts"):
                one_run_epsilon(m, r, v, DELTA, 0.05)


class TestGaussian:
    @pytest.mark.parametrize(
        ("counts", "least", "most"),
        [
            ((1000, 1000, 900), 3.75, 3.79),
            ((1000, 200, 180), 2.87, 2.91),
            ((400, 120, 119), 5.83, 5.86),
        ],
    )
    def test_agrees_with_privacy_guard(
        self, counts: tuple[int, int, int], least: float, most: float
    ) -> None:
        assert least <= gaussian_epsilon(*counts, DELTA, 0.05) <= most

    @pytest.mark.parametrize("counts", [(200, 200, 150), (400, 120, 119), (300, 40, 31)])
    def test_agrees_with_the_recursion_of_the_paper(self, counts: tuple[int, int, int]) -> None:
        ours = gaussian_epsilon(*counts, DELTA, 0.05)
        assert ours == pytest.approx(mahloujifar_epsilon(*counts), abs=0.05)

    @pytest.mark.parametrize(("m", "bound"), [(100, 8.2), (200, 9.5), (1000, 12.3)])
    def test_perfect_guesses_prove_what_the_notes_say(self, m: int, bound: float) -> None:
        assert gaussian_epsilon(m, m, m, DELTA, 0.05) == pytest.approx(bound, abs=0.06)

    def test_epsilon_of_mu_solves_its_equation(self) -> None:
        for mu in (0.1, 0.5, 1.0, 3.0, 8.0):
            e = gdp_epsilon(mu, DELTA)
            with mpmath.workdps(40):
                spent = mpmath.ncdf(-e / mu + mu / 2) - mpmath.exp(e) * mpmath.ncdf(
                    -e / mu - mu / 2
                )
            assert float(spent) == pytest.approx(DELTA, rel=1e-3)
        assert gdp_epsilon(0.0, DELTA) == 0.0


def coin_scores(m: int, strength: float, seed: int = 0) -> tuple[Scores, "np.ndarray"]:
    generator = np.random.default_rng(seed)
    coins = generator.random(m) < 0.5
    return strength * coins + generator.normal(0, 1, m), coins


class TestAbstention:
    def test_guessing_the_extremes_beats_guessing_all_when_few_are_known(self) -> None:
        scores, coins = coin_scores(1000, 0.0)
        scores[:60] = np.where(coins[:60], 50.0, -50.0)
        every = audit_one_run([(scores, coins)], (1.0,), DELTA, 0.05)
        some = audit_one_run([(scores, coins)], (0.06, 1.0), DELTA, 0.05)
        assert every.epsilon < 0.3
        assert some.epsilon > 2.0

    def test_each_further_look_costs_confidence(self) -> None:
        known = coin_scores(400, 2.0)
        one = audit_one_run([known], (0.5,), DELTA, 0.05)
        many = audit_one_run([known], (0.5,) + (0.4999,) * 9, DELTA, 0.05)
        assert 0 < many.epsilon < one.epsilon

    def test_no_canary_proves_nothing(self) -> None:
        empty = audit_one_run([], (1.0,), DELTA, 0.05)
        assert (empty.epsilon, empty.gaussian, empty.provable) == (0.0, 0.0, 0.0)


class TestIntervals:
    @pytest.mark.parametrize(("k", "n"), [(0, 20), (3, 20), (10, 1000), (20, 20)])
    def test_ends_are_where_the_tails_are_two_and_a_half_percent(self, k: int, n: int) -> None:
        low, high = clopper_pearson(k, n)

        def at_least(count: int, rate: float) -> float:
            terms = (math.comb(n, i) * rate**i * (1 - rate) ** (n - i) for i in range(count, n + 1))
            return math.fsum(terms)

        assert low == 0.0 if k == 0 else at_least(k, low) == pytest.approx(0.025)
        assert high == 1.0 if k == n else 1 - at_least(k + 1, high) == pytest.approx(0.025)

    def test_impossible_counts_are_refused(self) -> None:
        with pytest.raises(ValueError, match="trial"):
            clopper_pearson(3, 2)

    @pytest.mark.parametrize(
        ("hits", "alarms", "bound"),
        [(20, 10, 0), (50, 10, 0.7), (100, 10, 1.5), (300, 10, 2.7), (500, 10, 3.2), (500, 0, 4.9)],
    )
    def test_recognition_proves_what_the_notes_say(
        self, hits: int, alarms: int, bound: float
    ) -> None:
        members = np.array([2.0] * hits + [0.0] * (1000 - hits))
        others = np.array([3.0] * alarms + [1.0] + [0.0] * (999 - alarms))
        seen = recognise(members, others, alarms / 1000 + 1e-9)
        assert (seen.tpr, seen.fpr) == (hits / 1000, alarms / 1000)
        assert recognition_epsilon(seen, 0.0) == pytest.approx(bound, abs=0.06)

    def test_equal_scores_recognise_nobody(self) -> None:
        seen = recognise(np.zeros(500), np.zeros(500), 0.01)
        assert (seen.tpr, seen.fpr, recognition_epsilon(seen, 0.0)) == (0.0, 0.0, 0.0)

    @given(seed=st.integers(0, 2**32), shift=st.floats(0, 3))
    @settings(max_examples=30, deadline=None)
    def test_recognition_of_a_gaussian_never_exceeds_its_epsilon(
        self, seed: int, shift: float
    ) -> None:
        generator = np.random.default_rng(seed)
        members, others = generator.normal(shift, 1, 500), generator.normal(0, 1, 500)
        seen = recognise(members, others, 0.01, confidence=1 - 1e-9)
        assert recognition_epsilon(seen, DELTA) <= max(gdp_epsilon(shift, DELTA), 1e-9)

    def test_auc_counts_pairs(self) -> None:
        generator = np.random.default_rng(1)
        members, others = generator.integers(0, 9, 30) + 1.0, generator.integers(0, 9, 40) + 0.0
        pairs = [(a > b) + 0.5 * (a == b) for a in members for b in others]
        assert auc(members, others) == pytest.approx(np.mean(pairs))

    @given(
        epsilon=st.floats(0, 10),
        delta=st.floats(1e-12, 1e-3),
        fpr=st.floats(0, 1),
        more=st.floats(0, 1),
    )
    def test_the_allowed_rate_is_a_rate_and_grows_with_epsilon(
        self, epsilon: float, delta: float, fpr: float, more: float
    ) -> None:
        allowed = true_positive_bound(epsilon, delta, fpr)
        assert 0.0 <= allowed <= 1.0
        assert allowed <= true_positive_bound(epsilon + more, delta, fpr) + 1e-12
        assert allowed >= min(fpr, 1.0) - 1e-12

    def test_the_allowed_rate_is_that_of_randomised_response(self) -> None:
        # What pure DP at ε = 1 is tight for: accuse where the answer was "in".
        right = 1 / (1 + math.exp(-1))
        assert true_positive_bound(1.0, 1e-9, 1 - right) == pytest.approx(right)
        assert true_positive_bound(0.0, 1e-9, 0.01) == pytest.approx(0.01)


class TestExposure:
    def test_a_canary_that_was_not_learnt_has_one_bit(self) -> None:
        references = np.random.default_rng(0).normal(5, 2, 2000)
        bits = [exposure(score, references) for score in np.random.default_rng(1).normal(5, 2, 501)]
        assert np.median(bits) == pytest.approx(1.0, abs=0.2)

    def test_it_is_the_tail_of_the_fitted_gaussian_far_out(self) -> None:
        references = np.array([-1.0, 1.0] * 50)
        spread = references.std(ddof=1)
        with mpmath.workdps(40):
            for score in (0.5, 5.0, 20.0, 30.0):
                bits = -mpmath.log(mpmath.ncdf(-score / spread), 2)
                assert exposure(score, references) == pytest.approx(float(bits), rel=1e-6)
        assert exposure(1e6, references) == MAX_EXPOSURE

    def test_an_unchanged_model_exposes_nothing(self) -> None:
        assert exposure(0.0, np.zeros(100)) == 1.0
        assert rank_p_value(0.0, np.zeros(100)) == 1.0
        assert exposure(0.1, np.zeros(100)) == MAX_EXPOSURE

    def test_ranks_combine_to_significance(self) -> None:
        references = np.linspace(0, 1, 199)
        assert rank_p_value(2.0, references) == pytest.approx(1 / 200)
        assert combined_p_value([1 / 200] * 10) < 1e-9
        assert combined_p_value([]) == 1.0
        # Fisher 1925: -2 ln 0.05 - 2 ln 0.05 on four degrees of freedom.
        assert combined_p_value([0.05, 0.05]) == pytest.approx(0.0175, abs=1e-4)

    def test_combined_ranks_of_unlearnt_canaries_are_not_too_small(self) -> None:
        generator = np.random.default_rng(2)
        found = 0
        for _ in range(400):
            drawn = generator.normal(size=(10, 101))
            ranks = [rank_p_value(row[0], row[1:]) for row in drawn]
            found += combined_p_value(ranks) < 0.05
        assert found <= 35  # 20 expected; 35 is beyond three standard deviations

    def test_slope_is_bits_per_doubling(self) -> None:
        assert exposure_slope([1, 2, 4, 8, 16], [1, 3, 5, 7, 9]) == pytest.approx(2.0)
        assert exposure_slope([1, 2, 4, 8, 16], [1, 1, 1, 1, 1]) == pytest.approx(0.0)
        assert exposure_slope([1], [4]) == 0.0


class TestQueries:
    @pytest.mark.parametrize(
        "log_p", [-1e-9, -0.1, -1.0, -10.0, -29.9, -30.1, -50.0, -700.0, -5000]
    )
    @pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
    def test_they_are_those_of_the_formula_in_many_digits(self, log_p: float, p: float) -> None:
        with mpmath.workdps(2500):
            one = mpmath.exp(mpmath.mpf(log_p))
            n = mpmath.log(1 - mpmath.mpf(p)) / mpmath.log(1 - one)
            expected = float(max(mpmath.log(n), mpmath.mpf(0)))
        assert float(log_queries(np.array([log_p]), p)[0]) == pytest.approx(expected, abs=1e-6)

    def test_certain_and_impossible_suffixes_have_one_and_endless_queries(self) -> None:
        found = log_queries(np.array([0.0, -np.inf]))
        assert found[0] == 0.0
        assert found[1] == np.inf

    def test_a_suffix_of_one_in_a_thousand_takes_seven_hundred(self) -> None:
        assert math.exp(float(log_queries(np.log(np.array([1e-3])))[0])) == pytest.approx(
            692.8, 1e-3
        )

    @given(st.lists(st.floats(-2000, 0), min_size=2, max_size=20))
    def test_likelier_suffixes_never_need_more(self, logs: list[float]) -> None:
        queries = log_queries(np.array(sorted(logs)))
        assert (np.diff(queries) <= 1e-9).all()
