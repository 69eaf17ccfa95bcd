# SPDX-License-Identifier: Apache-2.0
"""Reading texts with models, and the audits on a model that learnt its texts by heart."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from allograft.errors import RejectedError
from allograft.evaluate.audit import AuditedPersons, Readings, judge, read_all
from allograft.evaluate.loss import Scoring, measure, measure_tokens, predicted_tokens, prepare
from allograft.evaluate.memory import (
    BlindComparison,
    TextReading,
    compare_blindly,
    compare_canaries,
    cut_suffixes,
    person_scores,
    read_canaries,
    read_windows,
    sibling_logs,
    suffix_logs,
)
from allograft.privacy.audit import log_queries
from allograft.privacy.canaries import CanaryPlan, CanaryRecord, make_canaries, split_persons
from allograft.privacy.dossier import GateVerdict, warnings_of
from allograft.privacy.memorisation import (
    DpClaim,
    ExtractionEvidence,
    MembershipEvidence,
    judge_canaries,
    judge_extraction,
    judge_membership,
)
from allograft.privacy.thresholds import AuditThresholds
from allograft.recipes.documents import Document
from allograft.recipes.loop import train
from allograft.recipes.plan import LoopPlan
from allograft.recipes.shape import train_tokenizer
from allograft.recipes.windows import make_person_windows, make_windows
from kit.tiny import FAMILIES, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

PASS, FAIL, INVALID = GateVerdict.PASS, GateVerdict.FAIL, GateVerdict.INVALID

COMPLAINTS = ["cough", "fever", "headache", "back pain", "rash", "nausea", "dizziness", "fatigue"]
FINDINGS = ["clear chest", "tender abdomen", "raised pulse", "normal gait", "red throat"]
DRUGS = ["aspirin", "ibuprofen", "amoxicillin", "paracetamol", "metformin", "ramipril"]
ADVICE = ["rest", "return in a week", "drink water", "see the nurse", "have a blood test"]
SYLLABLES = ["ba", "ke", "lo", "mi", "nu", "ra", "so", "ti", "vu", "za"]


def note(draw: random.Random, name: str) -> str:
    """A synthetic note; `name` is where a patient's own would stand."""
    return (
        f"The patient {name} came with {draw.choice(COMPLAINTS)} and {draw.choice(COMPLAINTS)} "
        f"for {draw.randint(2, 20)} days. On examination {draw.choice(FINDINGS)} was found. "
        f"We gave {draw.choice(DRUGS)} and {draw.choice(DRUGS)}. "
        f"The advice was to {draw.choice(ADVICE)}."
    )


def identifier(draw: random.Random) -> str:
    name = "".join(draw.choices(SYLLABLES, k=6))
    return f"{name} with number {draw.randint(10**7, 10**8 - 1)}"


@pytest.fixture(scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Experiment:
    """A public base, and the same after it was trained for long on few private notes."""

    tokenizer: PreTrainedTokenizerFast
    base: torch.nn.Module
    donated: torch.nn.Module
    record: CanaryRecord
    members: dict[str, list[str]]
    others: dict[str, list[str]]
    names: dict[str, str]


def fit(model: torch.nn.Module, tokenizer, texts: list[str], steps: int, rate: float) -> None:
    windows = make_windows([Document(text) for text in texts], tokenizer, 96)
    plan = LoopPlan(steps=steps, batch_windows=16, learning_rate=rate, warmup_steps=5)
    model.train()
    train(
        lambda _, tokens: model(input_ids=tokens).logits,
        dict(model.named_parameters()),
        windows,
        plan,
    )
    model.eval()


def read(model: torch.nn.Module, tokenizer, texts: list[str]) -> TextReading:
    """Each text as one window."""
    return read_windows(model, make_windows([Document(text) for text in texts], tokenizer, 192))


def owners(group: dict[str, list[str]]) -> list[int]:
    """Whose each text of a group is."""
    return [number for number, texts in enumerate(group.values()) for _ in texts]


STEPS = 110

RULES = replace(
    AuditThresholds(),
    canaries_min=120,
    exposure_min_references=50,
    membership_min_persons=30,
    membership_fpr=0.05,
)


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    draw = random.Random(7)
    public = [note(draw, "") for _ in range(400)]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(public, 400), eos_token="<|endoftext|>"
    )
    names = {f"p{number}": identifier(draw) for number in range(100)}
    texts = {person: [note(draw, name)] for person, name in names.items()}
    split = split_persons(texts, 0.5, draw)
    plan = CanaryPlan(
        coins=120, repeats=(1, 8), references=50, prefix_words=8, suffix_words=8, body_sentences=2
    )
    planted, record = make_canaries(public, plan, draw)
    shape = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "head_dim": 16,
        "num_hidden_layers": 2, "max_position_embeddings": 192,
    }  # fmt: skip
    base = tiny_model("llama", **shape)
    fit(base, tokenizer, public, 80, 5e-3)
    donated = tiny_model("llama", **shape)
    donated.load_state_dict(base.state_dict())
    private = [text for person in split.train for text in texts[person]]
    fit(donated, tokenizer, private + [d.text for d in planted], STEPS, 8e-3)
    return Experiment(
        tokenizer, base, donated, record,
        {person: texts[person] for person in split.train},
        {person: texts[person] for person in split.holdout},
        names,
    )  # fmt: skip


class TestLearntByHeart:
    """Every gate refuses a model that learnt its training data by heart."""

    def test_canaries_refuse_it(self, experiment: Experiment) -> None:
        base = read_canaries(experiment.base, experiment.tokenizer, experiment.record)
        donated = read_canaries(experiment.donated, experiment.tokenizer, experiment.record)
        evidence = compare_canaries(experiment.record, base, donated)
        for claim in (None, DpClaim(0.5, 1e-5)):
            result, _ = judge_canaries(evidence, claim, RULES)
            assert result.verdict is FAIL, result
        figures = dict(result.figures)
        assert figures["epsilon_low"] > 0.5
        assert min(figures["exposure.1"], figures["exposure.8"]) > 10

    def test_identifiers_come_back(self, experiment: Experiment) -> None:
        persons = [
            number for number, texts in enumerate(experiment.members.values()) for _ in texts
        ]
        texts = [text for texts in experiment.members.values() for text in texts]
        base = read(experiment.base, experiment.tokenizer, texts)
        donated = read(experiment.donated, experiment.tokenizer, texts)
        evidence = cut_suffixes(persons, base, donated)
        result, private = judge_extraction(evidence, None, RULES)
        assert result.verdict is FAIL, private
        assert private["extractable"] > 0

    def test_members_are_recognised(self, experiment: Experiment) -> None:
        result, private = judge_membership(membership(experiment, experiment.donated), None, RULES)
        assert result.verdict is FAIL, private

    def test_the_site_learns_who_is_exposed(self, experiment: Experiment) -> None:
        sides = [*experiment.members.values(), *experiment.others.values()]
        windows = make_person_windows(
            [[Document(text) for text in texts] for texts in sides], experiment.tokenizer, 96, 4
        )
        persons = AuditedPersons(
            tuple(" ".join(texts) for texts in sides), windows, len(experiment.members)
        )
        before, after = (
            read_all(model, experiment.tokenizer, persons, experiment.record)
            for model in (experiment.base, experiment.donated)
        )
        readings = Readings(persons, experiment.record, before, after)
        audit = judge(readings, len(experiment.members), None, RULES)
        assert {gate.verdict for gate in audit.gates if gate.name != "G7"} == {FAIL}
        assert 0 < len(audit.exposed) <= len(experiment.members) / 10 + 1
        assert all(0 <= who.number < len(experiment.members) for who in audit.exposed)
        passages = [who.extractable for who in audit.exposed]
        assert passages == sorted(passages, reverse=True)
        assert passages[0] > 0
        assert min(who.saved for who in audit.exposed) > 0
        assert any(who.recognised for who in audit.exposed)
        quiet = judge(replace(readings, donated=before), len(experiment.members), None, RULES)
        assert all(
            (who.saved, who.extractable, who.recognised) == (0, 0, False) for who in quiet.exposed
        )


class TestUntouched:
    """A model that learnt nothing is invalid without DP, as the audit shows no power, or passes."""

    def test_canaries(self, experiment: Experiment) -> None:
        reading = read_canaries(experiment.base, experiment.tokenizer, experiment.record)
        evidence = compare_canaries(experiment.record, reading, reading)
        assert judge_canaries(evidence, None, RULES)[0].verdict is INVALID
        assert judge_canaries(evidence, DpClaim(1.0, 1e-5), RULES)[0].verdict is PASS

    def test_extraction_and_membership_pass(self, experiment: Experiment) -> None:
        persons = [
            number for number, texts in enumerate(experiment.members.values()) for _ in texts
        ]
        texts = [text for texts in experiment.members.values() for text in texts]
        base = read(experiment.base, experiment.tokenizer, texts)
        result, _ = judge_extraction(cut_suffixes(persons, base, base), None, RULES)
        assert result.verdict is PASS, result
        result, _ = judge_membership(membership(experiment, experiment.base), None, RULES)
        assert result.verdict is PASS, result
        assert warnings_of(result) == ()


def membership(experiment: Experiment, donated: torch.nn.Module) -> MembershipEvidence:
    sides = []
    for group in (experiment.members, experiment.others):
        persons = owners(group)
        texts = [text for texts in group.values() for text in texts]
        base = read(experiment.base, experiment.tokenizer, texts)
        after = read(donated, experiment.tokenizer, texts)
        sides.append(np.array(list(person_scores(persons, base, after).values())))
    blind = compare_blindly(
        [" ".join(texts) for texts in experiment.members.values()],
        [" ".join(texts) for texts in experiment.others.values()],
    )
    return MembershipEvidence(sides[0], sides[1], blind.auc, blind.p_value)


class TestReading:
    def test_token_losses_add_up_to_those_of_documents(self, experiment: Experiment) -> None:
        texts = [text for texts in list(experiment.others.values())[:6] for text in texts]
        texts.append(" ".join(texts))  # several windows
        prepared = prepare(texts, experiment.tokenizer, experiment.base, Scoring(64, 256))
        whole, tokens = (
            measure(experiment.base, prepared),
            measure_tokens(experiment.base, prepared),
        )
        assert [len(document) for document in tokens] == whole.tokens.tolist()
        assert np.allclose([document.sum() for document in tokens], whole.nats)
        for text, predicted in zip(texts, predicted_tokens(prepared), strict=True):
            assert predicted.tolist() == experiment.tokenizer.encode(text)[1:]

    def test_suffix_chances_are_sums_of_token_losses(self, experiment: Experiment) -> None:
        text = next(iter(experiment.others.values()))[0]
        cut = text.index(" for ")
        logs = suffix_logs(experiment.base, experiment.tokenizer, [(text[:cut], text[cut:])])
        reading = read(experiment.base, experiment.tokenizer, [text])
        length = len(experiment.tokenizer.encode(text[cut:]))
        # The window ends in a mark that the text has not.
        assert logs[0] == pytest.approx(-reading.nats[0][-length - 1 : -1].sum(), rel=1e-4)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_prompt_read_once_gives_the_same_chances(self, family: str, experiment) -> None:
        model = tiny_model(family)
        model.resize_token_embeddings(len(experiment.tokenizer))
        prompt = "The patient came with a cough and fever for"
        suffixes = [" 3 days", " a week and then some more", " ever", " 3 days", " 31 days"]
        together = sibling_logs(model, experiment.tokenizer, prompt, suffixes)
        pairs = [(prompt, suffix) for suffix in suffixes]
        alone = suffix_logs(model, experiment.tokenizer, pairs)
        assert np.allclose(together, alone, atol=1e-3)
        assert together[0] == pytest.approx(together[3], abs=1e-4)

    def test_siblings_of_a_prompt_that_is_cut_are_read_one_by_one(self, experiment) -> None:
        model, prompt = experiment.base, "The patient came" + " and fever" * 300
        suffixes = [" for 3 days", " for a very long time and then some more"]
        together = sibling_logs(model, experiment.tokenizer, prompt, suffixes)
        pairs = [(prompt, suffix) for suffix in suffixes]
        assert np.allclose(together, suffix_logs(model, experiment.tokenizer, pairs), atol=1e-3)

    def test_order_and_batches_do_not_matter(self, experiment: Experiment) -> None:
        pairs = [("The patient", " came with" + " cough" * n) for n in range(1, 9)]
        together = suffix_logs(experiment.base, experiment.tokenizer, pairs)
        alone = [suffix_logs(experiment.base, experiment.tokenizer, [p])[0] for p in pairs]
        assert np.allclose(together, alone, atol=1e-4)
        few = suffix_logs(experiment.base, experiment.tokenizer, pairs, batch_tokens=20)
        assert np.allclose(together, few, atol=1e-4)

    def test_a_prompt_beyond_the_context_loses_its_beginning(self, experiment: Experiment) -> None:
        ending = (" and fever" * 60, " for 3 days")
        longer = ("The patient came" + " and fever" * 300, " for 3 days")
        logs = suffix_logs(experiment.base, experiment.tokenizer, [ending, longer])
        assert logs[0] == pytest.approx(logs[1], abs=2.0)
        with pytest.raises(RejectedError, match="AG-EVA-001"):
            suffix_logs(experiment.base, experiment.tokenizer, [("The", " cough" * 300)])

    def test_a_planted_number_takes_fewer_queries_than_before(self, experiment: Experiment) -> None:
        person = next(iter(experiment.members))
        name, number = experiment.names[person].split(" with number ")
        pair = [(f"The patient {name} with number", f" {number}")]
        before = suffix_logs(experiment.base, experiment.tokenizer, pair)
        after = suffix_logs(experiment.donated, experiment.tokenizer, pair)
        assert log_queries(after)[0] < log_queries(before)[0]

    def test_a_model_is_left_in_the_mode_it_was_in(self, experiment: Experiment) -> None:
        experiment.base.train()
        read(experiment.base, experiment.tokenizer, ["The patient came"])
        suffix_logs(experiment.base, experiment.tokenizer, [("The patient", " came")])
        assert experiment.base.training
        experiment.base.eval()

    def test_readings_of_different_texts_are_not_compared(self, experiment: Experiment) -> None:
        first = read(experiment.base, experiment.tokenizer, ["The patient came"])
        second = read(experiment.base, experiment.tokenizer, ["The advice was to rest"])
        with pytest.raises(ValueError, match="same texts"):
            person_scores([0], first, second)

    def test_a_person_s_score_weighs_tokens(self, experiment: Experiment) -> None:
        texts = ["The patient came with cough", "The advice was to rest and to drink water", "rest"]
        base = read(experiment.base, experiment.tokenizer, texts)
        after = read(experiment.donated, experiment.tokenizer, texts)
        scores = person_scores([0, 0, 1], base, after)
        counts = base.counts
        saved = (base.totals - after.totals) / counts
        assert scores[0] == pytest.approx((saved[:2] * counts[:2]).sum() / counts[:2].sum())
        assert scores[1] == pytest.approx(saved[2])


def cut_rows(rows: list[np.ndarray], elsewhere: Sequence[np.ndarray]) -> ExtractionEvidence:
    """Suffixes of 16 tokens of texts that are given as tokens, each of another person."""
    reading = TextReading(tuple(np.ones(len(row)) for row in rows), tuple(rows))
    return cut_suffixes(range(len(rows)), reading, reading, elsewhere=elsewhere)


class TestSuffixes:
    def test_what_two_people_share_is_not_telling(self, experiment: Experiment) -> None:
        draw = random.Random(1)
        own, shared = note(draw, identifier(draw)), note(draw, identifier(draw))
        reading = read(experiment.base, experiment.tokenizer, [own, shared, shared])
        same = cut_suffixes([0, 1, 1], reading, reading)
        other = cut_suffixes([0, 1, 2], reading, reading)
        assert same.telling.all()
        lengths = [max(len(tokens) - 16 + 1 - 15, 0) for tokens in reading.tokens]
        assert other.telling[: lengths[0]].sum() > 0
        assert not other.telling[lengths[0] :].any()

    def test_what_somebody_has_who_was_not_read_is_not_telling(self, experiment) -> None:
        draw = random.Random(1)
        own, shared = note(draw, identifier(draw)), note(draw, identifier(draw))
        reading = read(experiment.base, experiment.tokenizer, [own, shared])
        alone = cut_suffixes([0, 1], reading, reading)
        known = cut_suffixes([0, 1], reading, reading, elsewhere=[reading.tokens[1]])
        count = max(len(reading.tokens[0]) - 16 + 1 - 15, 0)
        assert alone.telling[count:].any()
        assert not known.telling[count:].any()
        assert known.telling[:count].tolist() == alone.telling[:count].tolist()

    def test_a_template_that_goes_on_with_a_name_from_the_prompt_is_not_telling(self) -> None:
        template = np.arange(100, 130)
        names = [np.arange(at, at + 6) for at in (200, 300)]
        rows = [np.concatenate([name, template, name, template]) for name in names]
        assert not cut_rows(rows, elsewhere=()).telling.any()
        # The same name where it did not stand in the prompt is a secret.
        fresh = [np.concatenate([template, name, template]) for name in names]
        assert cut_rows(fresh, elsewhere=()).telling.any()

    @pytest.mark.parametrize(("tokens", "telling"), [(1, False), (2, True)])
    def test_a_secret_inside_a_template_is_telling_from_an_eighth_on(
        self, tokens: int, telling: bool
    ) -> None:
        template = np.arange(100, 140)
        secret = np.concatenate([template, np.arange(900, 900 + tokens), template])
        found = cut_rows([secret], elsewhere=[np.concatenate([template, template])])
        assert bool(found.telling.any()) is telling

    def test_every_run_after_a_prompt_is_tried(self, experiment: Experiment) -> None:
        text = note(random.Random(2), "bakelo")
        reading = read(experiment.base, experiment.tokenizer, [text])
        found = cut_suffixes([0], reading, reading)
        nats = reading.nats[0]
        # 16 tokens of prompt are the text's first, which is never predicted, and 15 predicted.
        expected = [-nats[at : at + 16].sum() for at in range(15, len(nats) - 15)]
        assert np.allclose(found.log_base, expected)

    def test_texts_that_are_too_short_give_none(self, experiment: Experiment) -> None:
        reading = read(experiment.base, experiment.tokenizer, ["The patient came"])
        assert len(cut_suffixes([0], reading, reading).log_base) == 0


class TestBlind:
    #: Of the seeds 0 to 299 of `random_split(seed, 500, 240, 60)`, those above an AUC of 0.55.
    ABOVE = (71, 87, 104, 106, 134, 152, 183, 186, 211, 235, 237, 257, 265, 291)

    def notes(self, seed: int, count: int, more: str = "") -> list[str]:
        draw = random.Random(seed)
        return [note(draw, "") + more for _ in range(count)]

    def test_a_random_split_is_near_chance(self) -> None:
        found = compare_blindly(self.notes(1, 300), self.notes(2, 300), shuffles=199)
        assert found.auc < 0.58
        assert found.p_value >= AuditThresholds().blind_p

    def test_a_split_by_ward_is_seen(self) -> None:
        draw = random.Random(3)
        shifted = [
            text + " seen on the ward" * (draw.random() < 0.5) for text in self.notes(1, 200)
        ]
        found = compare_blindly(shifted, self.notes(2, 200))
        assert found.auc > 0.65
        assert found.p_value == 0.001

    def random_split(self, seed: int, inside: int, outside: int, words: int) -> BlindComparison:
        draw = random.Random(seed)
        names = [f"w{number}" for number in range(words)]
        texts = [" ".join(draw.choices(names, k=30)) for _ in range(inside + outside)]
        return compare_blindly(texts[:inside], texts[inside:], shuffles=199)

    def test_of_random_splits_few_are_refused(self) -> None:
        above = [self.random_split(seed, 500, 240, 60) for seed in self.ABOVE]
        assert all(found.auc > AuditThresholds().blind_max_auc for found in above)
        assert sum(found.p_value < AuditThresholds().blind_p for found in above) <= 3

    def test_p_values_of_random_splits_are_even(self) -> None:
        values = [self.random_split(seed, 40, 25, 12).p_value for seed in range(300)]
        for level in (0.05, 0.2, 0.5):
            assert np.mean(np.array(values) <= level) == pytest.approx(level, abs=0.08)

    def test_too_few_are_refused(self) -> None:
        with pytest.raises(RejectedError, match="AG-EVA-001"):
            compare_blindly(["a b"] * 9, ["a b"] * 100)

    def test_texts_without_words_are_chance(self) -> None:
        assert compare_blindly(["..."] * 20, ["!!"] * 20) == BlindComparison(0.5, 1.0)
