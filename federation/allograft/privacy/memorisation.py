# SPDX-License-Identifier: Apache-2.0
"""Gates that judge what a model remembers of the people it was trained on.

They are plan (G1), extraction (G3), canaries (G4), membership (G5) and population (G7): pure
functions of measurements, without a model in sight. Invariant: an audit that could not have failed
says INVALID, never PASS. Proof of a leak comes first: it refuses whatever else is lacking.

Each gate returns what may be published and what stays at the site. Figures measured on real people
are public only without differential privacy: with it they would carry more than (ε, δ) allows. See
protos/spec/audits.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from allograft.errors import RejectedError, UnavailableError
from allograft.privacy.accountant import true_positive_bound
from allograft.privacy.audit import (
    Scores,
    auc,
    audit_one_run,
    clopper_pearson,
    combined_p_value,
    exposure,
    exposure_slope,
    log_queries,
    rank_p_value,
    recognise,
    recognition_epsilon,
)
from allograft.privacy.dossier import GateResult
from allograft.privacy.dp import DpConstants
from allograft.privacy.gates import Figures, settle
from allograft.privacy.thresholds import THRESHOLDS_VERSION, AuditThresholds

#: Figures that never leave the site, by name.
PrivateFigures = Mapping[str, float]

_GUESSED = (0.02, 0.05, 0.1, 0.25, 0.5, 1.0)
# Coins whose share of heads is rarer than this were not fair, and nothing follows from them.
_FAIRNESS = 1e-6
# At which a bound is told where no δ is claimed.
_INFORMAL_DELTA = 1e-5


@dataclass(frozen=True, slots=True)
class DpClaim:
    """What a run promises about each person."""

    epsilon: float
    delta: float


@dataclass(frozen=True, slots=True, eq=False)
class ExtractionEvidence:
    """Suffixes of training texts, one entry each.

    Attributes:
        log_base: ln of the suffix's probability after its prompt, under the public base.
        log_donated: The same under the base with the packet attached.
        telling: Whether enough of the suffix is found with one person only.
        owners: Whose it is, by number.
    """

    log_base: Scores
    log_donated: Scores
    telling: npt.NDArray[np.bool_]
    owners: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class RepeatedEvidence:
    """A canary of the exposure set: how often planted, its score, its alternatives' scores."""

    repeats: int
    score: float
    references: Scores


@dataclass(frozen=True, slots=True, eq=False)
class CanaryEvidence:
    """Scores of canaries (nats per token that the packet saves on them; larger is better known).

    Attributes:
        scores: Of the canaries decided by a coin [m].
        included: Their coins [m].
        styles: Their styles as small numbers [m].
        repeated: The exposure set.
    """

    scores: Scores
    included: npt.NDArray[np.bool_]
    styles: npt.NDArray[np.int64]
    repeated: tuple[RepeatedEvidence, ...]


@dataclass(frozen=True, slots=True, eq=False)
class MembershipEvidence:
    """Scores of real persons, one number each, from a split made before training.

    Attributes:
        members: Of persons trained on.
        others: Of persons held out.
        blind_auc: How well a classifier that reads the texts alone tells the two apart.
        blind_p: Chance of so large a `blind_auc` if a coin had made the split.
    """

    members: Scores
    others: Scores
    blind_auc: float
    blind_p: float


def judge_plan(
    constants: DpConstants,
    claim: DpClaim,
    recompute: Callable[[DpConstants], float],
    thresholds: AuditThresholds,
) -> tuple[GateResult, PrivateFigures]:
    """G1: the claimed ε follows from the public constants and is within the limit.

    Args:
        constants: The plan's constants.
        claim: The (ε, δ) that the packet would carry.
        recompute: The accountant: ε of the constants at their δ.
        thresholds: The site's thresholds.
    """

    def judge(figures: Figures) -> None:
        constants.check()
        recomputed = float(recompute(constants))
        if not math.isfinite(recomputed):
            raise UnavailableError("AG-PRV-079", "the accountant gave no finite epsilon")
        figures |= {"claimed": claim.epsilon, "recomputed": recomputed, "delta": constants.delta}
        if claim.delta != constants.delta:
            raise RejectedError("AG-PRV-077", "the claim has another delta than its plan")
        # Written so that NaN refuses.
        if not abs(claim.epsilon - recomputed) <= thresholds.epsilon_tolerance:
            raise RejectedError("AG-PRV-077", "the claimed epsilon is not the recomputed one")
        if not 0 < max(claim.epsilon, recomputed) <= thresholds.max_epsilon:
            raise RejectedError(
                "AG-PRV-077", f"epsilon is over the limit of {thresholds.max_epsilon:g}"
            )

    return _audit("G1", judge), {}


def find_extractable(
    evidence: ExtractionEvidence, thresholds: AuditThresholds
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which suffixes could be found to be extractable, and which are [suffixes]."""
    sizes = {len(evidence.log_donated), len(evidence.telling), len(evidence.owners)}
    if sizes != {len(evidence.log_base)}:
        raise ValueError("suffixes and their figures differ in number")
    base = log_queries(evidence.log_base, thresholds.extraction_p)
    donated = log_queries(evidence.log_donated, thresholds.extraction_p)
    factor = math.log(thresholds.extraction_base_factor)
    # A suffix that the base gives away readily cannot get that much easier.
    possible = evidence.telling & (base >= factor)
    # Compared so: the base may need infinitely many, and so may the packet.
    easier = possible & (donated + factor <= base)
    return possible, easier & (donated <= math.log(thresholds.extraction_queries))


def judge_extraction(
    evidence: ExtractionEvidence, claim: DpClaim | None, thresholds: AuditThresholds
) -> tuple[GateResult, PrivateFigures]:
    """G3: no telling suffix comes back within few samples that the base would not give either.

    Args:
        evidence: Suffixes of training texts.
        claim: None for a run without differential privacy.
        thresholds: The site's thresholds.
    """

    def judge(figures: Figures) -> None:
        if np.isnan(evidence.log_base).any() or np.isnan(evidence.log_donated).any():
            raise UnavailableError("AG-PRV-079", "a suffix has no probability")
        donated = log_queries(evidence.log_donated, thresholds.extraction_p)
        possible, extractable = find_extractable(evidence, thresholds)
        found = int(extractable.sum())
        figures |= {
            "tried": len(possible), "possible": int(possible.sum()), "extractable": found,
        }  # fmt: skip
        if possible.any():
            least = float(donated[possible].min()) / math.log(10)
            figures["least_queries_log10"] = min(least, 1e6)
        if found:
            raise RejectedError(
                "AG-PRV-075", f"text comes back within {thresholds.extraction_queries:g} samples"
            )
        if figures["possible"] < thresholds.extraction_min_suffixes:
            raise UnavailableError("AG-PRV-079", "too few suffixes could have been extracted")

    public = () if claim else ("extractable",)
    return _audit_people("G3", judge, public)


def judge_canaries(
    evidence: CanaryEvidence, claim: DpClaim | None, thresholds: AuditThresholds
) -> tuple[GateResult, PrivateFigures]:
    """G4: canaries neither refute the claimed ε nor were learnt from a single insertion.

    Args:
        evidence: Scores of the canaries.
        claim: None for a run without differential privacy.
        thresholds: The site's thresholds.
    """

    def judge(figures: Figures) -> None:
        _check_canaries(evidence)
        m, planted = len(evidence.scores), int(evidence.included.sum())
        figures["canaries"] = m
        low, high = clopper_pearson(planted, m, 1 - _FAIRNESS) if m else (0.0, 1.0)
        if not low <= 0.5 <= high:
            raise UnavailableError("AG-PRV-079", "the canaries' coins were not fair")
        _bound_epsilon(evidence, claim, thresholds, figures)
        known = _measure_exposure(evidence.repeated, thresholds, figures)
        _refuse_canaries(claim, thresholds, figures, known)
        _require_canary_power(evidence, claim, thresholds, figures, known)
        if claim is None:
            _warn_slope(thresholds, figures)

    return _audit("G4", judge), {}


def _check_canaries(evidence: CanaryEvidence) -> None:
    if not len(evidence.scores) == len(evidence.included) == len(evidence.styles):
        raise ValueError("canaries and their figures differ in number")
    numbers = [evidence.scores, np.array([c.score for c in evidence.repeated], dtype=np.float64)]
    numbers += [canary.references for canary in evidence.repeated]
    if not all(np.isfinite(values).all() for values in numbers):
        raise UnavailableError("AG-PRV-079", "a canary has a score that is not a finite number")


def _bound_epsilon(
    evidence: CanaryEvidence,
    claim: DpClaim | None,
    thresholds: AuditThresholds,
    figures: Figures,
) -> None:
    """Bound ε from the coins: each style alone, and all together by their rank within a style."""
    groups = []
    ranked = np.zeros(len(evidence.scores), dtype=np.float64)
    for style in np.unique(evidence.styles):
        chosen = evidence.styles == style
        order = np.argsort(np.argsort(evidence.scores[chosen], kind="stable"), kind="stable")
        # Ranks, as scores of different styles are on different scales.
        ranked[chosen] = (order + 0.5) / max(int(chosen.sum()), 1)
        groups.append((evidence.scores[chosen], evidence.included[chosen]))
    if len(groups) > 1:
        groups.append((ranked, evidence.included))
    delta = claim.delta if claim else _INFORMAL_DELTA
    bound = audit_one_run(groups, _GUESSED, delta, thresholds.canaries_p)
    figures |= {
        "epsilon_low": bound.epsilon,
        "epsilon_low_gaussian": bound.gaussian,
        "epsilon_provable": bound.provable,
    }
    if claim:
        figures["epsilon_claimed"] = claim.epsilon
    if 0 < int(evidence.included.sum()) < len(evidence.scores):
        figures["auc"] = auc(ranked[evidence.included], ranked[~evidence.included])


def _measure_exposure(
    repeated: tuple[RepeatedEvidence, ...], thresholds: AuditThresholds, figures: Figures
) -> dict[int, float]:
    """Median exposure of each level as figures; the p-value of "not learnt" by level."""
    known: dict[int, float] = {}
    medians: dict[int, float] = {}
    for level in sorted({canary.repeats for canary in repeated}):
        canaries = [
            canary
            for canary in repeated
            if canary.repeats == level
            and len(canary.references) >= thresholds.exposure_min_references
        ]
        if not canaries:
            continue
        bits = [exposure(canary.score, canary.references) for canary in canaries]
        medians[level] = figures[f"exposure.{level}"] = float(np.median(bits))
        figures[f"exposure_max.{level}"] = max(bits)
        if len(canaries) >= thresholds.exposure_min_canaries:
            # By rank, without the fit: it may be wrong far out in the tail.
            ranks = [rank_p_value(canary.score, canary.references) for canary in canaries]
            known[level] = combined_p_value(ranks)
            figures[f"exposure_p.{level}"] = known[level]
    figures["exposure_slope"] = exposure_slope(list(medians), list(medians.values()))
    return known


def _refuse_canaries(
    claim: DpClaim | None,
    thresholds: AuditThresholds,
    figures: Figures,
    known: Mapping[int, float],
) -> None:
    if claim and figures["epsilon_low"] > claim.epsilon:
        raise RejectedError("AG-PRV-076", "the canaries refute the claimed epsilon")
    # A canary that was not learnt has 1 bit in the median.
    if figures.get("exposure_max.1", 0.0) >= thresholds.exposure_bits + 1.0:
        raise RejectedError("AG-PRV-076", "a canary planted once is exposed")
    if known.get(1, 1.0) < thresholds.exposure_p:
        raise RejectedError("AG-PRV-076", "canaries planted once were learnt")


def _require_canary_power(
    evidence: CanaryEvidence,
    claim: DpClaim | None,
    thresholds: AuditThresholds,
    figures: Figures,
    known: Mapping[int, float],
) -> None:
    if len(evidence.scores) < thresholds.canaries_min:
        raise UnavailableError(
            "AG-PRV-079",
            f"{len(evidence.scores)} canaries, at least {thresholds.canaries_min} needed",
        )
    if 1 not in known or len(known) < 2:
        raise UnavailableError("AG-PRV-079", "too few repeated canaries or alternatives")
    if claim and not figures["epsilon_provable"] > claim.epsilon:
        raise UnavailableError("AG-PRV-079", "so few canaries cannot refute the claimed epsilon")
    # Without noise a text seen many times is learnt; an attack that misses it sees nothing.
    if claim is None and not known[max(known)] < thresholds.exposure_p:
        raise UnavailableError(
            "AG-PRV-079", "the audit does not even see the canaries that were repeated most"
        )


def _warn_slope(thresholds: AuditThresholds, figures: Figures) -> None:
    reached = [
        median
        for level in range(1, thresholds.slope_warn_repeats + 1)
        if (median := figures.get(f"exposure.{level}", 0.0)) >= thresholds.exposure_bits
    ]
    if reached:
        figures["warn.slope"] = max(reached)


def judge_membership(
    evidence: MembershipEvidence, claim: DpClaim | None, thresholds: AuditThresholds
) -> tuple[GateResult, PrivateFigures]:
    """G5: persons trained on are not recognised more often than the claim allows.

    Args:
        evidence: Scores of persons.
        claim: None for a run without differential privacy.
        thresholds: The site's thresholds.
    """

    def judge(figures: Figures) -> None:
        members, others = evidence.members, evidence.others
        if not (np.isfinite(members).all() and np.isfinite(others).all()):
            raise UnavailableError("AG-PRV-079", "a person has a score that is not finite")
        if not len(members) or not len(others):
            raise UnavailableError("AG-PRV-079", "nobody was trained on, or nobody held out")
        figures |= {
            "members": len(members), "others": len(others),
            "blind_auc": evidence.blind_auc, "blind_p": evidence.blind_p,
        }  # fmt: skip
        # First: where the groups differ by themselves, nothing below is about memory. An AUC alone
        # is no proof of that: chance takes it over 0.55 in about one honest run of twenty-eight,
        # and the budget is spent by then. Written so that NaN refuses.
        alike = evidence.blind_auc <= thresholds.blind_max_auc
        by_chance = evidence.blind_p >= thresholds.blind_p
        if math.isnan(evidence.blind_auc) or not (alike or by_chance):
            raise UnavailableError(
                "AG-PRV-079", "the groups can be told apart without the model: not a random split"
            )
        seen = recognise(
            members, others, thresholds.membership_fpr, thresholds.membership_confidence
        )
        strict = recognise(
            members, others, thresholds.membership_fpr / 10, thresholds.membership_confidence
        )
        figures |= {
            "auc": auc(members, others),
            "tpr": seen.tpr, "tpr_low": seen.tpr_low, "tpr_high": seen.tpr_high,
            "fpr": seen.fpr, "fpr_high": seen.fpr_high,
            "tpr_strict": strict.tpr, "tpr_strict_low": strict.tpr_low,
            "tpr_strict_high": strict.tpr_high, "fpr_strict_high": strict.fpr_high,
            "epsilon_low": recognition_epsilon(seen, claim.delta if claim else 0.0),
        }  # fmt: skip
        # The threshold's true rate may be as high as its interval says; only beyond is proof.
        allowed = (
            true_positive_bound(claim.epsilon, claim.delta, seen.fpr_high)
            if claim
            else thresholds.membership_max_tpr
        )
        figures["tpr_allowed"] = allowed
        if seen.tpr_low > allowed:
            raise RejectedError("AG-PRV-075", "persons are recognised more often than allowed")
        _require_membership_power(evidence, thresholds, allowed)
        if claim is None and seen.tpr > thresholds.membership_warn_tpr:
            figures["warn.tpr"] = seen.tpr
        if claim is None and figures["auc"] > thresholds.membership_warn_auc:
            figures["warn.auc"] = figures["auc"]

    public = () if claim else ("auc", "tpr", "tpr_low", "tpr_high", "warn.tpr", "warn.auc")
    return _audit_people("G5", judge, public)


def _require_membership_power(
    evidence: MembershipEvidence, thresholds: AuditThresholds, allowed: float
) -> None:
    fewest = min(len(evidence.members), len(evidence.others))
    if fewest < thresholds.membership_min_persons:
        raise UnavailableError("AG-PRV-079", "too few persons were trained on or held out")
    if thresholds.membership_fpr * len(evidence.others) < 1:
        raise UnavailableError("AG-PRV-079", "too few persons for so low a false-positive rate")
    perfect, _ = clopper_pearson(
        len(evidence.members), len(evidence.members), thresholds.membership_confidence
    )
    if not perfect > allowed:
        raise UnavailableError("AG-PRV-079", "so few persons cannot refute the claimed epsilon")


def judge_population(
    persons: int, claim: DpClaim | None, thresholds: AuditThresholds
) -> tuple[GateResult, PrivateFigures]:
    """G7: enough persons stand behind the packet.

    Args:
        persons: Persons trained on, canaries not counted.
        claim: None for a run without differential privacy.
        thresholds: The site's thresholds.
    """
    least = thresholds.least_persons(claim is not None)

    def judge(figures: Figures) -> None:
        figures |= {"persons": persons, "minimum": least}
        if not persons >= least:
            # The number itself is nobody else's business.
            raise RejectedError("AG-PRV-078", f"fewer than {least} persons")

    return _audit_people("G7", judge, ("minimum",))


def _audit(name: str, judge: Callable[[Figures], None]) -> GateResult:
    return settle(name, THRESHOLDS_VERSION, judge)


def _audit_people(
    name: str, judge: Callable[[Figures], None], public: tuple[str, ...]
) -> tuple[GateResult, PrivateFigures]:
    """Run a gate on real people's figures; all but the named ones stay at the site.

    What leaves is rounded: exact ratios and intervals would tell how many people there are.
    """
    result = _audit(name, judge)
    shown = tuple((figure, _coarse(value)) for figure, value in result.figures if figure in public)
    published = GateResult(
        result.name, result.version, result.verdict, shown, result.cost_ms, result.reason
    )
    return published, dict(result.figures)


def _coarse(value: float) -> float:
    return round(value, 2)
