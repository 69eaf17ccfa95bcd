# SPDX-License-Identifier: Apache-2.0
"""What a leak audit proves: bounds and intervals from counts and scores, nothing else.

Every bound errs towards leaking less: an audit shows that a model leaks, never that it does not.
Scores are one number per text or person, larger where the attacker believes more in membership.
No model is in sight and nothing is random. See protos/spec/audits.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special, stats

Scores = npt.NDArray[np.float64]

#: No bound is told beyond this; it stands for "unbounded" too, as JSON has no infinity.
MAX_EPSILON = 100.0
#: Exposure is told up to so many bits: a Gaussian tail that far out says "much" and no more.
MAX_EXPOSURE = 1000.0

_HALVINGS = 32


def one_run_epsilon(m: int, guesses: int, correct: int, delta: float, p: float) -> float:
    """Lower bound of ε from one training run.

    Steinke, Nasr and Jagielski, "Privacy Auditing with One (1) Training Run" (arXiv 2305.08846),
    theorem 5.2 with its δ term: under (ε, δ)-DP the chance of so many correct guesses is at most
    P[B ≥ v] + 2mδ · max_i P[v > B ≥ v - i] / i with B ~ Binomial(r, e^ε / (1 + e^ε)).

    Args:
        m: Canaries whose inclusion was decided by a fair coin, guessed or not.
        guesses: How many coins were guessed (r); the others are abstentions. Fixed beforehand.
        correct: How many guesses were right (v).
        delta: The δ of the claim.
        p: Chance of a bound that is too high.

    Returns:
        The smallest ε that is not refuted, 0 if none is.
    """
    _check_counts(m, guesses, correct, p)

    def refuted(epsilon: float) -> bool:
        return one_run_p_value(m, guesses, correct, epsilon, delta) < p

    return _largest(refuted, MAX_EPSILON)


def one_run_p_value(m: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Largest chance of `correct` or more right guesses under (ε, δ)-DP; see `one_run_epsilon`."""
    right = special.expit(epsilon)
    tail = float(stats.binom.sf(correct - 1, guesses, right))
    # P[v > B >= v - i] for i = 1, 2, …: running sums of the mass below v.
    below = np.cumsum(stats.binom.pmf(np.arange(correct - 1, -1, -1), guesses, right))
    steepest = float((below / np.arange(1, correct + 1)).max()) if correct else 0.0
    return min(tail + 2.0 * m * delta * steepest, 1.0)


def gaussian_epsilon(m: int, guesses: int, correct: int, delta: float, p: float) -> float:
    """Lower bound of ε from one run, if the mechanism's trade-off curve is a Gaussian one.

    Mahloujifar, Melis and Chaudhuri, "Auditing f-Differential Privacy in One Run" (arXiv
    2410.22235), with abstention. Tighter than `one_run_epsilon` and valid only under its
    assumption, so it informs and does not prove. Arguments as there.
    """
    return gdp_epsilon(_gaussian_mu(m, guesses, correct, p), delta)


def _gaussian_mu(m: int, guesses: int, correct: int, p: float) -> float:
    """Largest μ for which μ-GDP is refuted."""
    _check_counts(m, guesses, correct, p)
    return _largest(lambda mu: not _fits_gdp(m, guesses, correct, mu, p), 20.0)


def _fits_gdp(m: int, guesses: int, correct: int, mu: float, p: float) -> bool:
    """Whether μ-GDP allows `correct` or more right guesses with chance p.

    Over a coin drawn at random: `right` is the mass of it being guessed rightly, `wrong` of being
    guessed wrongly, in runs with i or more right guesses. The trade-off curve f ties them:
    wrong[i - 1] ≥ Φ(Φ⁻¹(right[i]) - μ). Going down from i = v with the least mass that this
    allows, all runs together must fit into 1, that is guesses / m after abstention.
    """
    tail = p / m
    right, wrong = tail * correct, tail * (guesses - correct)
    for i in range(correct - 1, -1, -1):
        needed = max(wrong, float(special.ndtr(special.ndtri(min(right, 1.0)) - mu)))
        right += i / (guesses - i) * (needed - wrong)
        wrong = needed
    return right + wrong <= guesses / m


def gdp_epsilon(mu: float, delta: float) -> float:
    """The ε at which μ-GDP has this δ (Dong, Roth and Su, arXiv 1905.02383, corollary 2.13)."""
    if mu <= 0.0:
        return 0.0

    def spends_more(epsilon: float) -> bool:
        first = float(special.ndtr(mu / 2 - epsilon / mu))
        second = math.exp(epsilon + float(special.log_ndtr(-mu / 2 - epsilon / mu)))
        return first - second > delta

    return _largest(spends_more, MAX_EPSILON)


@dataclass(frozen=True, slots=True)
class OneRun:
    """Bounds from one set of canaries, best over several numbers of guesses.

    Attributes:
        epsilon: Lower bound of ε.
        gaussian: The same under a Gaussian trade-off curve; informs only.
        provable: The bound that perfect guesses would have given: what the audit can refute.
    """

    epsilon: float
    gaussian: float
    provable: float


def audit_one_run(
    groups: Sequence[tuple[Scores, npt.NDArray[np.bool_]]],
    fractions: Sequence[float],
    delta: float,
    p: float,
) -> OneRun:
    """Guess coins from scores and bound ε.

    With k guesses, the k/2 highest scores are guessed "in" and the k/2 lowest "out". The best of
    all groups and numbers of guesses counts, so each is tested at p / (groups x fractions)
    (Bonferroni).

    Args:
        groups: Sets of canaries as (scores [m], coins [m]); they may overlap.
        fractions: Which parts of a set are guessed, chosen beforehand.
        delta: The δ of the claim.
        p: Chance of any bound being too high.
    """
    share = p / max(len(groups) * len(fractions), 1)
    epsilon = gaussian = provable = 0.0
    for scores, included in groups:
        m = len(scores)
        order = np.argsort(scores, kind="stable")
        for fraction in fractions:
            half = int(m * fraction) // 2
            if half == 0:
                continue
            right = int(included[order[m - half :]].sum()) + int((~included[order[:half]]).sum())
            epsilon = max(epsilon, one_run_epsilon(m, 2 * half, right, delta, share))
            gaussian = max(gaussian, gaussian_epsilon(m, 2 * half, right, delta, share))
            provable = max(provable, one_run_epsilon(m, 2 * half, 2 * half, delta, share))
    return OneRun(epsilon, gaussian, provable)


def clopper_pearson(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Exact two-sided interval of a proportion (Clopper and Pearson 1934)."""
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError("more successes than trials, or no trial")
    tail = (1.0 - confidence) / 2.0
    low = (
        0.0
        if successes == 0
        else float(special.betaincinv(successes, trials - successes + 1, tail))
    )
    high = (
        1.0
        if successes == trials
        else float(special.betaincinv(successes + 1, trials - successes, 1.0 - tail))
    )
    return low, high


@dataclass(frozen=True, slots=True)
class Recognition:
    """How many members an attacker recognises who wrongly accuses few.

    Attributes:
        tpr: Recognised share of the members, with its interval.
        tpr_low: Lower end.
        tpr_high: Upper end.
        fpr: Wrongly accused share of the others; at most what was asked for.
        fpr_low: Lower end.
        fpr_high: Upper end; the true rate at this threshold is below it.
    """

    tpr: float
    tpr_low: float
    tpr_high: float
    fpr: float
    fpr_low: float
    fpr_high: float


def accusing_score(others: Scores, fpr: float) -> float:
    """The score that at most `fpr` of the others exceed; who exceeds it is taken for a member."""
    accused = int(fpr * len(others))
    return float(np.sort(others)[::-1][accused]) if accused < len(others) else -math.inf


def recognise(members: Scores, others: Scores, fpr: float, confidence: float = 0.95) -> Recognition:
    """Recognition at the lowest threshold that accuses at most `fpr` of the others.

    The threshold is the score of the others that exactly k lie above, k fixed beforehand. So the
    exact interval of k in n covers its true false-positive rate, and given the threshold, members
    count as independent draws. Those of one run share a model: an approximation, no theorem.
    """
    accused, threshold = int(fpr * len(others)), accusing_score(others, fpr)
    hits, alarms = int((members > threshold).sum()), int((others > threshold).sum())
    tpr_low, tpr_high = clopper_pearson(hits, len(members), confidence)
    # Ties may leave fewer alarms than k; the interval is that of k.
    fpr_low, _ = clopper_pearson(alarms, len(others), confidence)
    _, fpr_high = clopper_pearson(accused, len(others), confidence)
    return Recognition(
        hits / len(members), tpr_low, tpr_high, alarms / len(others), fpr_low, fpr_high
    )


def recognition_epsilon(seen: Recognition, delta: float) -> float:
    """Lower bound of ε from a recognition: ln((TPR_low - δ) / FPR_high), at least 0."""
    surplus = seen.tpr_low - delta
    return max(math.log(surplus / seen.fpr_high), 0.0) if surplus > 0.0 else 0.0


def auc(members: Scores, others: Scores) -> float:
    """Chance that a member scores above another, ties counted half (Mann-Whitney)."""
    ranks = stats.rankdata(np.concatenate([members, others]))
    count = len(members)
    above = float(ranks[:count].sum()) - count * (count + 1) / 2.0
    return above / (count * len(others))


def column_aucs(scores: Scores, members: npt.NDArray[np.bool_]) -> Scores:
    """`auc` of each column of [persons, columns], whose members may differ [columns]."""
    ranks = stats.rankdata(scores, axis=0)
    count = members.sum(axis=0)
    above = np.where(members, ranks, 0.0).sum(axis=0) - count * (count + 1) / 2.0
    return np.asarray(above / (count * (len(scores) - count)), dtype=np.float64)


def exposure(score: float, references: Scores) -> float:
    """Exposure of a canary in bits: how rare so high a score is among its alternatives.

    Carlini et al., "The Secret Sharer" (arXiv 1802.08232), section 4.3, by extrapolation: -log2
    of the tail of a Gaussian fitted to the alternatives' scores. A canary that was never learnt
    has 1 bit in the median. Beyond log2 of the number of alternatives it rests on the fit.
    """
    spread = float(references.std(ddof=1))
    surplus = score - float(references.mean())
    if spread == 0.0:
        # A model that nothing changed scores all alike: chance, not knowledge.
        return 1.0 if surplus <= 0.0 else MAX_EXPOSURE
    bits = -float(special.log_ndtr(-surplus / spread)) / math.log(2)
    return min(bits, MAX_EXPOSURE)


def rank_p_value(score: float, references: Scores) -> float:
    """Chance of a rank so high if the canary was an alternative like the others; no fit in it."""
    return float((1 + (references >= score).sum()) / (1 + len(references)))


def combined_p_value(p_values: Sequence[float]) -> float:
    """Fisher's combination of independent p-values: are these canaries known at all."""
    if not p_values:
        return 1.0
    statistic = -2.0 * sum(math.log(value) for value in p_values)
    return float(stats.chi2.sf(statistic, 2 * len(p_values)))


def exposure_slope(repeats: Sequence[int], medians: Sequence[float]) -> float:
    """Bits of exposure gained per doubling of the repeats (least squares over log2)."""
    if len(set(repeats)) < 2:
        return 0.0
    return float(np.polyfit(np.log2(repeats), np.asarray(medians, dtype=np.float64), 1)[0])


def log_queries(log_probability: Scores, p: float = 0.5) -> Scores:
    """How many samples give back a suffix with chance p, as a natural logarithm.

    (n, p)-discoverable extraction, Hayes et al. (arXiv 2410.19482):
    n = ln(1 - p) / ln(1 - p_z), at least 1, where p_z is the suffix's probability.

    Args:
        log_probability: ln p_z, any shape; -inf for a suffix that is never sampled.
        p: Chance to see it at least once.
    """
    logs = np.minimum(np.asarray(log_probability, dtype=np.float64), 0.0)
    # ln(-ln(1 - e^x)): for small e^x it is x + e^x / 2, where 1 - e^x would round to 1.
    with np.errstate(divide="ignore"):
        miss = np.where(logs < -30.0, logs, np.log(-np.log1p(-np.exp(np.maximum(logs, -30.0)))))
    return np.asarray(np.maximum(math.log(-math.log1p(-p)) - miss, 0.0), dtype=np.float64)


def _check_counts(m: int, guesses: int, correct: int, p: float) -> None:
    if not 0 <= correct <= guesses <= m or not 0.0 < p < 1.0:
        raise ValueError("counts are not 0 <= correct <= guesses <= m, or p is not a chance")


def _largest(holds: Callable[[float], bool], limit: float) -> float:
    """Where a property that holds from 0 upwards ends; 0 if it does not hold at 0."""
    if not holds(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while high < limit and holds(high):
        low, high = high, 2.0 * high
    high = min(high, limit)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2.0
        if holds(middle):
            low = middle
        else:
            high = middle
    return low
