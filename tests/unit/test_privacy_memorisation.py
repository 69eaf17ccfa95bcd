# SPDX-License-Identifier: Apache-2.0
"""Gates on memory: what refuses, what cannot judge, what passes, and what may be published."""

from dataclasses import asdict, replace

import numpy as np
import pytest

from allograft.errors import RejectedError
from allograft.privacy.dossier import GateResult, GateVerdict, warnings_of
from allograft.privacy.dp import DpConstants
from allograft.privacy.gates import check_results
from allograft.privacy.memorisation import (
    CanaryEvidence,
    DpClaim,
    ExtractionEvidence,
    MembershipEvidence,
    RepeatedEvidence,
    judge_canaries,
    judge_extraction,
    judge_membership,
    judge_plan,
    judge_population,
)
from allograft.privacy.thresholds import AuditThresholds

RULES = AuditThresholds()
CLAIM = DpClaim(3.0, 1e-5)
PLAN = DpConstants(0.01, 1.0, 1000, 1.0, 100.0, 1e-5, 4)

PASS, FAIL, INVALID = GateVerdict.PASS, GateVerdict.FAIL, GateVerdict.INVALID


def figure(result: GateResult, name: str) -> float:
    return dict(result.figures)[name]


class TestPlan:
    def judge(self, claimed: float = 2.5, recomputed: float = 2.5, **changes):
        claim = changes.pop("claim", DpClaim(claimed, 1e-5))
        return judge_plan(PLAN, claim, lambda _: recomputed, RULES, **changes)[0]

    def test_a_claim_that_follows_from_its_plan_passes(self) -> None:
        result = self.judge()
        assert (result.name, result.verdict, result.reason) == ("G1", PASS, "")
        assert figure(result, "recomputed") == 2.5

    @pytest.mark.parametrize(("claimed", "recomputed"), [(2.0, 2.5), (2.5, 2.0), (3.5, 3.5)])
    def test_another_or_too_large_an_epsilon_fails(self, claimed: float, recomputed: float) -> None:
        result = self.judge(claimed, recomputed)
        assert result.verdict is FAIL
        assert "AG-PRV-077" in result.reason

    def test_nan_never_passes(self) -> None:
        assert self.judge(float("nan"), 2.5).verdict is FAIL
        assert self.judge(2.5, float("nan")).verdict is INVALID
        assert self.judge(0.0, 0.0).verdict is FAIL

    def test_another_delta_fails(self) -> None:
        assert self.judge(claim=DpClaim(2.5, 1e-6)).verdict is FAIL

    def test_constants_derived_from_the_data_fail(self) -> None:
        derived = replace(PLAN, sampling_rate=1 / 1013)
        assert judge_plan(derived, CLAIM, lambda _: 3.0, RULES)[0].verdict is FAIL

    def test_an_accountant_that_stops_makes_it_invalid(self) -> None:
        def broken(_: DpConstants) -> float:
            raise ValueError("secret")

        result, _ = judge_plan(PLAN, CLAIM, broken, RULES)
        assert result.verdict is INVALID
        assert "secret" not in result.reason


def suffixes(count: int = 200) -> ExtractionEvidence:
    base = np.random.default_rng(0).normal(-60, 5, count)
    return ExtractionEvidence(
        base, base + 1.0, np.ones(count, dtype=np.bool_), np.arange(count) // 10
    )


def with_first(evidence: ExtractionEvidence, **values: object) -> ExtractionEvidence:
    """The evidence with other values for its first suffix."""
    changed = {
        name: getattr(evidence, name).copy()
        for name in ("log_base", "log_donated", "telling", "owners")
    }
    for name, value in values.items():
        changed[name][0] = value
    return ExtractionEvidence(**changed)


class TestExtraction:
    def judge(self, evidence: ExtractionEvidence, claim: DpClaim | None = None) -> GateResult:
        return judge_extraction(evidence, claim, RULES)[0]

    def test_suffixes_out_of_reach_pass(self) -> None:
        assert self.judge(suffixes()).verdict is PASS

    def test_one_telling_suffix_within_reach_fails(self) -> None:
        result = self.judge(with_first(suffixes(), log_donated=-4.0))
        assert result.verdict is FAIL
        assert "AG-PRV-075" in result.reason

    def test_reach_is_a_thousand_queries(self) -> None:
        # ln 2 / p queries: 1000 at ln p = -7.274.
        assert self.judge(with_first(suffixes(), log_donated=-7.27)).verdict is FAIL
        assert self.judge(with_first(suffixes(), log_donated=-7.28)).verdict is PASS

    def test_what_the_base_gives_as_easily_is_not_held_against_the_packet(self) -> None:
        # A hundred times fewer queries are 4.605 nats.
        assert self.judge(with_first(suffixes(), log_donated=-5, log_base=-9.5)).verdict is PASS
        assert self.judge(with_first(suffixes(), log_donated=-5, log_base=-9.7)).verdict is FAIL

    def test_what_several_people_share_is_a_template(self) -> None:
        shared = with_first(suffixes(), log_donated=-1.0, telling=False)
        assert self.judge(shared).verdict is PASS

    def test_never_sampled_suffixes_are_out_of_reach(self) -> None:
        never = with_first(suffixes(), log_donated=-np.inf, log_base=-np.inf)
        assert self.judge(never).verdict is PASS
        assert self.judge(with_first(suffixes(), log_base=-np.inf, log_donated=-1)).verdict is FAIL

    def test_too_few_suffixes_are_invalid_unless_one_leaks(self) -> None:
        few = suffixes(99)
        assert self.judge(few).verdict is INVALID
        assert self.judge(with_first(few, log_donated=-1.0)).verdict is FAIL
        assert self.judge(suffixes(0)).verdict is INVALID

    def test_suffixes_that_the_base_gives_away_could_not_have_failed(self) -> None:
        low, telling = np.full(500, -1.0), np.ones(500, np.bool_)
        easy = ExtractionEvidence(low, low, telling, np.arange(500))
        assert self.judge(easy).verdict is INVALID

    def test_nan_is_invalid(self) -> None:
        assert self.judge(with_first(suffixes(), log_donated=np.nan)).verdict is INVALID

    def test_figures_of_a_dp_packet_stay_at_the_site(self) -> None:
        public, private = judge_extraction(suffixes(), CLAIM, RULES)
        assert public.figures == ()
        assert private["possible"] == 200
        public, _ = judge_extraction(suffixes(), None, RULES)
        assert public.figures == (("extractable", 0.0),)


LEVELS = (1, 2, 4, 8, 16)


def canaries(
    m: int = 1000,
    leak: float = 0.0,
    bits: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0, 0.0),
    per_level: int = 10,
    seed: int = 3,
) -> CanaryEvidence:
    """Canaries of which planted ones score `leak` deviations higher, repeated ones by level."""
    draw = np.random.default_rng(seed)
    coins = draw.random(m) < 0.5
    styles = np.arange(m) % 2
    scores = draw.normal(0, 1, m) + leak * coins
    repeated = []
    for level, shift in zip(LEVELS, bits, strict=True):
        for _ in range(per_level):
            values = draw.normal(0, 1, 201)
            repeated.append(RepeatedEvidence(level, float(values[0] + shift), values[1:]))
    # Styles are on different scales, as in life.
    return CanaryEvidence(np.where(styles, 5 * scores + 9, scores), coins, styles, tuple(repeated))


SEEN = (0.0, 0.3, 0.8, 1.5, 4.0)


class TestCanaries:
    def judge(self, evidence: CanaryEvidence, claim: DpClaim | None, rules=RULES) -> GateResult:
        return judge_canaries(evidence, claim, rules)[0]

    def test_a_flat_model_passes_under_dp_and_is_invalid_without(self) -> None:
        assert self.judge(canaries(), CLAIM).verdict is PASS
        result = self.judge(canaries(), None)
        assert result.verdict is INVALID
        assert "repeated most" in result.reason

    def test_without_dp_it_passes_where_only_repeats_are_seen(self) -> None:
        result = self.judge(canaries(bits=SEEN), None)
        assert result.verdict is PASS
        assert figure(result, "exposure.16") > figure(result, "exposure.1")
        assert figure(result, "exposure_slope") > 0.5

    def test_an_unchanged_model_has_no_power_without_dp(self) -> None:
        flat = RepeatedEvidence(1, 0.0, np.zeros(200))
        repeated = tuple(replace(flat, repeats=level) for level in LEVELS for _ in range(10))
        coins = np.arange(1000) % 2 == 0
        unchanged = CanaryEvidence(np.zeros(1000), coins, np.zeros(1000, np.int64), repeated)
        assert self.judge(unchanged, None).verdict is INVALID

    def test_a_refuted_epsilon_fails(self) -> None:
        leaking = canaries(leak=8.0)
        result = self.judge(leaking, DpClaim(1.0, 1e-5))
        assert result.verdict is FAIL
        assert "refute" in result.reason
        assert figure(result, "epsilon_low") > 3
        assert figure(result, "epsilon_low_gaussian") > figure(result, "epsilon_low")

    def test_an_epsilon_that_is_not_refuted_passes(self) -> None:
        # Gaussian scores one deviation apart have epsilon 4.4 at this delta.
        assert self.judge(canaries(leak=0.5), CLAIM).verdict is PASS

    def test_single_insertions_that_were_learnt_fail_in_every_mode(self) -> None:
        for claim in (CLAIM, None):
            result = self.judge(canaries(bits=(2.0, 2, 2, 2, 4)), claim)
            assert result.verdict is FAIL
            assert "planted once" in result.reason

    def test_one_exposed_canary_fails(self) -> None:
        evidence = canaries(bits=SEEN)
        first = evidence.repeated[0]
        exposed = (
            replace(first, score=float(first.references.mean()) + 5.0),
            *evidence.repeated[1:],
        )
        result = self.judge(replace(evidence, repeated=exposed), None)
        assert result.verdict is FAIL
        assert "exposed" in result.reason

    def test_too_few_canaries_are_invalid(self) -> None:
        assert self.judge(canaries(m=999), CLAIM).verdict is INVALID
        assert self.judge(canaries(m=0), CLAIM).verdict is INVALID
        assert self.judge(canaries(per_level=9), CLAIM).verdict is INVALID
        assert self.judge(replace(canaries(), repeated=()), CLAIM).verdict is INVALID

    def test_canaries_that_cannot_refute_so_large_an_epsilon_are_invalid(self) -> None:
        result = self.judge(canaries(), DpClaim(8.0, 1e-5))
        assert result.verdict is INVALID
        assert "refute" in result.reason

    def test_proof_comes_before_lack_of_power(self) -> None:
        few = canaries(m=300, leak=9.0)
        assert self.judge(few, DpClaim(0.5, 1e-5)).verdict is FAIL

    def test_too_few_alternatives_do_not_count(self) -> None:
        evidence = canaries()
        short = tuple(replace(c, references=c.references[:99]) for c in evidence.repeated)
        assert self.judge(replace(evidence, repeated=short), CLAIM).verdict is INVALID

    def test_coins_that_were_not_fair_are_invalid(self) -> None:
        evidence = canaries()
        for coins in (np.ones(1000, np.bool_), np.arange(1000) < 300):
            result = self.judge(replace(evidence, included=coins), CLAIM)
            assert result.verdict is INVALID
            assert "fair" in result.reason

    def test_scores_that_are_not_finite_are_invalid(self) -> None:
        evidence = canaries()
        broken = evidence.scores.copy()
        broken[7] = np.inf
        assert self.judge(replace(evidence, scores=broken), CLAIM).verdict is INVALID

    def test_a_steep_slope_warns_without_dp(self) -> None:
        steep = canaries(bits=(0.0, 1.0, 4.5, 6.0, 9.0))
        result = self.judge(steep, None)
        assert result.verdict is PASS
        assert warnings_of(result) == ("canaries repeated a few times are remembered",)
        assert warnings_of(self.judge(steep, CLAIM)) == ()

    def test_all_figures_are_about_canaries_and_may_be_published(self) -> None:
        public, private = judge_canaries(canaries(), CLAIM, RULES)
        assert private == {}
        assert len(public.figures) <= 64
        assert figure(public, "epsilon_claimed") == 3.0


def people(
    shift: float, count: int = 1000, known: float = 1.0, blind: tuple[float, float] = (0.5, 0.5)
) -> MembershipEvidence:
    """Members of whom a share scores higher."""
    draw = np.random.default_rng(5)
    raised = shift * (draw.random(count) < known)
    return MembershipEvidence(draw.normal(0, 1, count) + raised, draw.normal(0, 1, count), *blind)


class TestMembership:
    def judge(self, evidence: MembershipEvidence, claim: DpClaim | None = None) -> GateResult:
        return judge_membership(evidence, claim, RULES)[0]

    def test_unrecognised_members_pass(self) -> None:
        for claim in (None, CLAIM):
            result = self.judge(people(0.0), claim)
            assert result.verdict is PASS
            assert warnings_of(result) == ()

    def test_recognised_members_fail_without_dp(self) -> None:
        result = self.judge(people(3.0))
        assert result.verdict is FAIL
        assert "AG-PRV-075" in result.reason

    def test_recognition_beyond_the_claim_fails_under_dp(self) -> None:
        assert self.judge(people(3.0), DpClaim(1.0, 1e-5)).verdict is FAIL
        # Under (3, 1e-5) a threshold of 1 % may be one of 1.8 %, and 37 % be recognised.
        assert self.judge(people(2.0), CLAIM).verdict is PASS

    def test_a_recognisable_tail_warns(self) -> None:
        result = self.judge(people(6.0, known=0.06))
        assert result.verdict is PASS
        assert any("recognised" in warning for warning in warnings_of(result))
        assert any("higher" in warning for warning in warnings_of(self.judge(people(0.8))))

    def test_groups_that_differ_by_themselves_are_invalid(self) -> None:
        for shift in (0.0, 3.0):
            assert self.judge(people(shift, blind=(0.56, 0.009))).verdict is INVALID
        nan = float("nan")
        for blind in ((nan, 0.5), (0.56, nan), (nan, nan)):
            assert self.judge(people(0.0, blind=blind)).verdict is INVALID

    def test_groups_that_chance_alone_makes_differ_pass(self) -> None:
        result, private = judge_membership(people(0.0, blind=(0.58, 0.01)), CLAIM, RULES)
        assert result.verdict is PASS
        assert (private["blind_auc"], private["blind_p"]) == (0.58, 0.01)
        assert "blind_p" not in dict(result.figures)

    def test_too_few_persons_are_invalid(self) -> None:
        assert self.judge(people(0.0, count=199)).verdict is INVALID
        one = MembershipEvidence(np.zeros(0), np.zeros(9), 0.5, 0.5)
        assert self.judge(one).verdict is INVALID

    def test_persons_that_cannot_refute_so_large_an_epsilon_are_invalid(self) -> None:
        result = self.judge(people(0.0), DpClaim(8.0, 1e-5))
        assert result.verdict is INVALID
        assert "refute" in result.reason

    def test_proof_comes_before_lack_of_power(self) -> None:
        assert self.judge(people(8.0, count=150)).verdict is FAIL

    def test_scores_that_are_not_finite_are_invalid(self) -> None:
        evidence = people(0.0)
        evidence.members[3] = np.nan
        assert self.judge(evidence).verdict is INVALID

    def test_member_figures_of_a_dp_packet_stay_at_the_site(self) -> None:
        public, private = judge_membership(people(0.0), CLAIM, RULES)
        assert public.figures == ()
        assert private["members"] == 1000
        assert private["tpr_low"] <= private["tpr"] <= private["tpr_high"]

    def test_without_dp_rounded_rates_are_published_and_numbers_of_people_are_not(self) -> None:
        public, _ = judge_membership(people(0.0), None, RULES)
        names = {name for name, _ in public.figures}
        assert names == {"auc", "tpr", "tpr_low", "tpr_high"}
        assert all(value == round(value, 2) for _, value in public.figures)


class TestPopulation:
    @pytest.mark.parametrize(("claim", "least"), [(CLAIM, 500), (None, 2000)])
    def test_the_minimum_passes_and_one_less_fails(self, claim, least: int) -> None:
        assert judge_population(least, claim, RULES)[0].verdict is PASS
        result, private = judge_population(least - 1, claim, RULES)
        assert result.verdict is FAIL
        assert private["persons"] == least - 1

    def test_the_number_of_people_is_not_published(self) -> None:
        public, _ = judge_population(12345, CLAIM, RULES)
        assert public.figures == (("minimum", 500),)


def test_results_go_through_the_same_door_as_all_gates() -> None:
    good = judge_population(9999, None, RULES)[0]
    check_results([good])
    for bad in (judge_population(1, None, RULES)[0], judge_extraction(suffixes(0), None, RULES)[0]):
        with pytest.raises(RejectedError, match="AG-PRV-020"):
            check_results([good, bad])


class TestThresholds:
    def test_come_back_as_they_were(self) -> None:
        changed = replace(RULES, canaries_min=200, max_epsilon=1.0)
        assert AuditThresholds.from_json(changed.to_json()) == changed

    def test_every_field_is_written(self) -> None:
        assert RULES.to_json() == {"version": "1"} | asdict(RULES)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("version", "2"), ("canaries_min", 0), ("canaries_min", 10.5), ("exposure_p", 0.0),
            ("max_epsilon", 0.0), ("blind_max_auc", 0.4), ("blind_p", 0.0), ("membership_fpr", 1.0),
            ("extraction_base_factor", 0.5), ("more", 1),
        ],
    )  # fmt: skip
    def test_others_are_refused(self, name: str, value: object) -> None:
        with pytest.raises(RejectedError, match="AG-IN-003"):
            AuditThresholds.from_json(RULES.to_json() | {name: value})

    def test_nan_is_refused(self) -> None:
        with pytest.raises(RejectedError, match="AG-IN-003"):
            replace(RULES, max_epsilon=float("nan")).check()
