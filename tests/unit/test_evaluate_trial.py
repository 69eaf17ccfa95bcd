# SPDX-License-Identifier: Apache-2.0
"""Held-out loss per document, and trials on a tiny model."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from allograft.errors import RejectedError
from allograft.evaluate import trial as trials
from allograft.evaluate.bootstrap import Resampling
from allograft.evaluate.gate import GateRules, Outcome, Reason
from allograft.evaluate.loss import Scoring, measure, prepare
from allograft.evaluate.trial import OwnText, StateSeal, Subject, TrialPlan, run_trial, split_text
from allograft.recipes.base import (
    Attachment,
    Donor,
    Payload,
    Plan,
    Recipient,
    load_recipe,
)
from allograft.recipes.blocks import describe_model
from allograft.recipes.documents import Document
from allograft.recipes.facts import PromptFacts
from allograft.recipes.loop import train
from allograft.recipes.plan import LoopPlan, OrganPlan
from allograft.recipes.prompt import PROMPT_DOSES, TENSOR, PromptRecipe
from allograft.recipes.shape import train_tokenizer
from allograft.recipes.snapshot import state_digest
from allograft.recipes.windows import make_windows
from kit.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ["red", "green", "blue", "cold", "warm", "left", "right", "near", "far", "slow", "fast"]
OTHERS = ["qxqx", "vkvk", "jzjz", "wpwp", "hgfd", "bnmb", "ytyt", "kcxk"]


@pytest.fixture(scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sentences(count: int, seed: int, ending: str, words: list[str] = WORDS) -> list[str]:
    """Documents of random words; each word is followed by an ending that can be learnt."""
    draw = np.random.default_rng(seed)
    return [
        " ".join(f"{word}{ending}" for word in draw.choice(words, size=8)) for _ in range(count)
    ]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    trained = train_tokenizer(sentences(200, 0, ""), vocabulary=300)
    return PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="<|endoftext|>")


@pytest.fixture(scope="module")
def model(tokenizer):
    """A model that knows plain words, so that it has something to lose."""
    made = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=256)
    known = sentences(200, 10, "", WORDS + OTHERS)
    windows = make_windows([Document(content) for content in known], tokenizer, 64)
    plan = LoopPlan(steps=60, learning_rate=1e-2, warmup_steps=2)
    train(
        lambda _, tokens: made(input_ids=tokens).logits,
        dict(made.named_parameters()),
        windows,
        plan,
    )
    return made.eval()


@pytest.fixture(scope="module")
def attachment(model, tokenizer, tmp_path_factory) -> Attachment:
    workdir = tmp_path_factory.mktemp("organ")
    documents = [Document(text) for text in sentences(300, 1, " zz")]
    windows = make_windows(documents, tokenizer, 64)
    loop = LoopPlan(steps=40, learning_rate=1e-2, warmup_steps=2)
    recipe = load_recipe("organ")
    extract = recipe.extract(Donor(model, windows, workdir), Plan(OrganPlan(), loop))
    facts = extract.facts.to_json()
    return recipe.fit(Payload("organ", "5" * 32, workdir, facts), Recipient(model))


@pytest.fixture
def text() -> OwnText:
    return OwnText(sentences(80, 2, " zz"), sentences(80, 3, ""))


def subject(attachment: Attachment, model, tokenizer) -> Subject:
    return Subject(load_recipe("organ"), attachment, model, tokenizer)


PLAN = TrialPlan(
    GateRules(max_retention_loss=5.0, resampling=Resampling(resamples=200)), scoring=Scoring(64)
)


class TestLoss:
    """Loss per document."""

    def test_equals_the_model_s_own_loss(self, model, tokenizer) -> None:
        texts = sentences(5, 4, "")
        found = measure(model, prepare(texts, tokenizer, model))
        for number, content in enumerate(texts):
            ids = torch.tensor([tokenizer.encode(content)])
            with torch.no_grad():
                own = float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            assert found.nats[number] == pytest.approx(own, rel=1e-4)
            assert found.tokens[number] == ids.shape[1] - 1
            assert found.text_bytes[number] == len(content.encode())

    def test_a_long_document_has_every_token_predicted_once(self, model, tokenizer) -> None:
        content = " ".join(sentences(30, 5, ""))
        ids = tokenizer.encode(content)
        assert len(ids) > 200
        found = measure(model, prepare([content], tokenizer, model, Scoring(window_tokens=50)))
        assert found.tokens[0] == len(ids) - 1
        rows = [ids[at : at + 50] for at in range(0, len(ids) - 1, 49)]
        total = 0.0
        for row in rows:
            batch = torch.tensor([row])
            with torch.no_grad():
                total += float(model(input_ids=batch, labels=batch).loss) * (len(row) - 1)
        assert found.nats[0] == pytest.approx(total, rel=1e-4)

    def test_does_not_depend_on_neighbours_in_the_batch(self, model, tokenizer) -> None:
        texts = [*sentences(7, 6, ""), *sentences(7, 7, " zz")]
        together = measure(model, prepare(texts, tokenizer, model))
        alone = [measure(model, prepare([t], tokenizer, model)).nats[0] for t in texts]
        assert together.nats == pytest.approx(alone, rel=1e-4)

    def test_repeats_bit_for_bit_and_leaves_the_mode(self, model, tokenizer) -> None:
        prepared = prepare(sentences(9, 8, ""), tokenizer, model)
        model.train()
        first = measure(model, prepared)
        assert model.training
        model.eval()
        assert np.array_equal(first.nats, measure(model, prepared).nats)

    def test_refuses_empty_documents_and_broken_models(self, model, tokenizer) -> None:
        with pytest.raises(RejectedError) as error:
            prepare(["red", ""], tokenizer, model)
        assert error.value.code == "AG-EVA-001"
        prepared = prepare(sentences(3, 9, ""), tokenizer, model)
        weight = model.model.norm.weight
        kept = weight.detach().clone()
        try:
            with torch.no_grad():
                weight.fill_(math.nan)
            with pytest.raises(RejectedError) as error:
                measure(model, prepared)
        finally:
            with torch.no_grad():
                weight.copy_(kept)
        assert error.value.code == "AG-EVA-002"


class TestSplit:
    """Halves of the own documents."""

    def test_halves_are_disjoint_whatever_the_order_and_repeats(self) -> None:
        texts = [f"document {number}" for number in range(51)]
        one, other = split_text(texts, 1)
        assert sorted(one + other) == sorted(texts)
        assert not set(one) & set(other)
        assert split_text([*reversed(texts), *texts, " "], 1) == (one, other)
        assert split_text(texts, 2) != (one, other)


class TestTrial:
    """Whole trials."""

    def test_keeps_what_helps_and_restores_the_model(
        self, attachment, model, tokenizer, text
    ) -> None:
        before = state_digest(model)
        steps = []
        report = run_trial(subject(attachment, model, tokenizer), text, PLAN, steps.append)
        assert report.decision.outcome is Outcome.KEEP
        assert report.decision.gain.low > 0.1
        assert abs(report.decision.null_gain.value) < 0.5 * report.decision.gain.value
        assert report.bits_per_byte_after < report.bits_per_byte_before
        assert report.state_digest == before == state_digest(model)
        assert report.removals == 7  # three doses, the judged dose, three null packets
        assert report.documents.test == 40
        assert [step.done for step in steps] == list(range(10))
        assert {step.steps for step in steps} == {9}

    def test_reverts_where_retention_is_dear(self, attachment, model, tokenizer, text) -> None:
        plan = replace(PLAN, rules=replace(PLAN.rules, max_retention_loss=0.0))
        other = replace(text, retention=sentences(80, 3, "", OTHERS))
        report = run_trial(subject(attachment, model, tokenizer), other, plan)
        assert report.decision.reason is Reason.RETENTION_LOSS

    def test_a_kind_without_half_doses_is_tried_at_its_own(self, model, tokenizer, text) -> None:
        recipe, count = PromptRecipe(), 4
        facts = PromptFacts(describe_model(model.config), count, "float32")
        vectors = model.get_input_embeddings().weight[:count].detach().clone()
        prompt = Attachment("prompt", "6" * 32, facts, {TENSOR: vectors}, doses=PROMPT_DOSES)
        before, steps = state_digest(model), []
        found = Subject(recipe, prompt, model, tokenizer)
        report = run_trial(found, text, PLAN, steps.append)
        assert [point.dose for point in report.curve] == [1.0]
        assert {step.steps for step in steps} == {max(step.done for step in steps)}
        assert report.state_digest == before == state_digest(model)

    def test_takes_nothing_where_nothing_is_gained(
        self, attachment, model, tokenizer, text
    ) -> None:
        noise = trials.null_packet(attachment, model, 9)
        report = run_trial(subject(noise, model, tokenizer), text, PLAN)
        assert report.decision.outcome is Outcome.REVERT
        assert report.decision.reason in {Reason.NO_GAIN, Reason.NULL_EXPLAINS}

    @pytest.mark.parametrize("short", ["domain", "retention"])
    def test_too_little_text_is_refused_before_anything_is_attached(
        self, attachment, model, tokenizer, text, short
    ) -> None:
        few = replace(text, **{short: getattr(text, short)[:59]})
        with pytest.raises(RejectedError) as error:
            run_trial(subject(attachment, model, tokenizer), few, PLAN)
        assert error.value.code == "AG-EVA-001"

    def test_repeated_documents_do_not_add_up(self, attachment, model, tokenizer, text) -> None:
        repeated = replace(text, domain=text.domain[:10] * 10)
        with pytest.raises(RejectedError) as error:
            run_trial(subject(attachment, model, tokenizer), repeated, PLAN)
        assert error.value.code == "AG-EVA-001"

    def test_a_recipe_that_does_not_restore_is_found_out(
        self, attachment, model, tokenizer, text
    ) -> None:
        class Careless:
            def __init__(self) -> None:
                self._real = load_recipe("organ")

            def attach(self, one, target):
                return self._real.attach(one, target)

            def detach(self, handle) -> None:
                self._real.detach(handle)
                with torch.no_grad():
                    handle.model.model.norm.weight[0] += 1e-6

        kept = model.model.norm.weight.detach().clone()
        try:
            with pytest.raises(RejectedError) as error:
                run_trial(Subject(Careless(), attachment, model, tokenizer), text, PLAN)
        finally:
            with torch.no_grad():
                model.model.norm.weight.copy_(kept)
        assert error.value.code == "AG-EVA-003"

    def test_an_attachment_that_breaks_the_model_is_taken_off(
        self, attachment, model, tokenizer, text
    ) -> None:
        before = state_digest(model)
        name = next(name for name in attachment.tensors if name.endswith("up_proj.weight"))
        broken = replace(
            attachment,
            tensors=dict(attachment.tensors)
            | {name: torch.full_like(attachment.tensors[name], 1e38)},
        )
        with pytest.raises(RejectedError) as error:
            run_trial(subject(broken, model, tokenizer), text, PLAN)
        assert error.value.code == "AG-EVA-002"
        assert state_digest(model) == before

    def test_a_seal_sees_one_changed_bit(self, model) -> None:
        seal = StateSeal(model, [(1, 2, 3), (4, 5)])
        seal.check(model)
        weight = model.model.layers[0].mlp.up_proj.weight
        kept = weight.detach().clone()
        try:
            with torch.no_grad():
                weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
            with pytest.raises(RejectedError) as error:
                seal.check(model)
        finally:
            with torch.no_grad():
                weight.copy_(kept)
        assert error.value.code == "AG-EVA-003"
