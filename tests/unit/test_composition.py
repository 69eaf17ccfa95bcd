# SPDX-License-Identifier: Apache-2.0
"""Several attachments on one model: doses learnt together, and one of them for each request."""

from dataclasses import replace

import pytest
import torch

from allograft.errors import RejectedError
from allograft.evaluate.bootstrap import Resampling
from allograft.evaluate.gate import GateRules
from allograft.evaluate.scales import ScalePlan, learn_scales
from allograft.evaluate.trial import OwnText, TrialStep
from allograft.recipes import blocks
from allograft.recipes.base import Attachment, Donor, Payload, Plan, Recipient
from allograft.recipes.facts import PromptFacts
from allograft.recipes.lora import LoraRecipe
from allograft.recipes.plan import LoopPlan, LoraPlan
from allograft.recipes.prompt import PROMPT_DOSES, TENSOR
from allograft.recipes.router import BASE, Router
from allograft.recipes.snapshot import state_digest
from allograft.recipes.stack import Stack
from allograft.recipes.windows import Windows
from kit.tiny import VOCAB, logits_of, tiny_model

UP, DOWN = "a" * 32, "b" * 32


class Numbers:
    """A tokenizer of texts that are numbers with spaces between."""

    pad_token_id = 0

    def encode(self, text: str, **_: object) -> list[int]:
        return [int(word) for word in text.split()]

    def __call__(self, texts: list[str], **_: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [self.encode(text) for text in texts]}

    def decode(self, tokens: list[int], **_: object) -> str:
        return " ".join(map(str, tokens))


def counting(step: int, rows: int = 80, length: int = 14) -> list[list[int]]:
    """Texts that count up or down by a step, of many lengths."""
    return [
        [3 + (begin + step * place) % (VOCAB - 3) for place in range(length - begin % 5)]
        for begin in range(rows)
    ]


def texts(rows: list[list[int]]) -> list[str]:
    return [" ".join(map(str, row)) for row in rows]


def noise(rows: int = 80) -> list[str]:
    generator = torch.Generator().manual_seed(4)
    return texts(torch.randint(3, VOCAB, (rows, 40), generator=generator).tolist())


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Attachment, ...]:
    """Two adapters: one learnt to count up by one, one to count down by seven."""
    found = []
    for key, step in ((UP, 1), (DOWN, -7)):
        rows = counting(step, length=18)
        windows = Windows(
            torch.tensor([row + [0] * (18 - len(row)) for row in rows]),
            torch.tensor([len(row) for row in rows]),
            torch.arange(len(rows)),
            0,
        )
        workdir = tmp_path_factory.mktemp("lora")
        loop = LoopPlan(steps=40, batch_windows=20, learning_rate=2e-2, warmup_steps=2)
        model = tiny_model("llama")
        extract = LoraRecipe().extract(Donor(model, windows, workdir), Plan(LoraPlan(4), loop))
        payload = Payload("lora", key, workdir, extract.facts.to_json())
        found.append(LoraRecipe().fit(payload, Recipient(model)))
    return tuple(found)


def router(made: tuple[Attachment, ...], **options: float) -> Router:
    return Router(tiny_model("llama"), Numbers(), made, **options)


def test_each_request_goes_to_whoever_knows_its_domain_and_unknown_ones_to_the_base(
    made: tuple[Attachment, ...],
) -> None:
    requests = [*texts(counting(1, 8)), *texts(counting(-7, 8)), *noise(8), "5", ""]
    chosen = [choice.attachment_id for choice in router(made).choose(requests)]
    assert chosen == [UP] * 8 + [DOWN] * 8 + [BASE] * 10


def test_losses_behind_a_choice_are_those_of_each_model_alone(
    made: tuple[Attachment, ...],
) -> None:
    rows = counting(1, 3)
    found = router(made).choose(texts(rows))
    model = tiny_model("llama")
    for key, attachment in ((BASE, None), (UP, made[0]), (DOWN, made[1])):
        handle = LoraRecipe().attach(attachment, model) if attachment else None
        for row, choice in zip(rows, found, strict=True):
            ids = torch.tensor([row])
            nats = torch.nn.functional.cross_entropy(logits_of(model, ids)[0, :-1], ids[0, 1:])
            assert choice.losses[key] == pytest.approx(float(nats), abs=1e-4)
        if handle:
            LoraRecipe().detach(handle)


def test_a_margin_sends_small_advantages_to_the_base(made: tuple[Attachment, ...]) -> None:
    (choice,) = router(made).choose(texts(counting(1, 1)))
    advantage = choice.losses[BASE] - choice.losses[UP]
    wide = router(made, margin=advantage + 0.01)
    assert wide.choose(texts(counting(1, 1)))[0].attachment_id == BASE


def test_answers_are_those_of_the_chosen_attachment_and_nothing_stays_on(
    made: tuple[Attachment, ...],
) -> None:
    model = tiny_model("llama")
    digest = state_digest(model)
    routes = Router(model, Numbers(), made)
    prompts = [*texts(counting(1, 3)), *texts(counting(-7, 2)), *noise(1)]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    answers = routes.generate(prompts, **options)
    assert state_digest(model) == digest
    known = {made[0].attachment_id: made[0], made[1].attachment_id: made[1]}
    for prompt, answer in zip(prompts, answers, strict=True):
        alone = tiny_model("llama")
        if answer.choice.attachment_id:
            LoraRecipe().attach(known[answer.choice.attachment_id], alone)
        ids = torch.tensor([Numbers().encode(prompt)])
        mask = torch.ones_like(ids)
        said = alone.generate(ids, attention_mask=mask, pad_token_id=0, **options)
        assert answer.text == Numbers().decode(said[0, ids.shape[1] :].tolist())
    assert {answer.choice.attachment_id for answer in answers} == {UP, DOWN, BASE}


def test_routed_loss_beats_the_base_on_known_domains_and_equals_it_on_others(
    made: tuple[Attachment, ...],
) -> None:
    def halves(rows: list[str]) -> tuple[list[str], list[str]]:
        words = [row.split() for row in rows]
        return [" ".join(w[:7]) for w in words], [" ".join(w[7:]) for w in words]

    base = router(())
    for rows in (texts(counting(1, 6)), texts(counting(-7, 6))):
        routed, plain = router(made).score(*halves(rows)), base.score(*halves(rows))
        assert all(ours < theirs for ours, theirs in zip(routed, plain, strict=True))
    assert router(made).score(*halves(noise(6))) == base.score(*halves(noise(6)))


def test_routing_starts_from_the_plain_base(made: tuple[Attachment, ...]) -> None:
    model = tiny_model("llama")
    LoraRecipe().attach(made[0], model)
    with pytest.raises(RejectedError, match="AG-RCP-022"):
        Router(model, Numbers(), made)
    with pytest.raises(RejectedError, match="AG-RCP-023"):
        router((made[0], made[0]))


def stacked(made: tuple[Attachment, ...], *doses: float) -> Stack:
    stack = Stack(tiny_model("llama"))
    stack.attach_all(replace(each, dose=dose) for each, dose in zip(made, doses, strict=True))
    return stack


def plan(limit: float) -> ScalePlan:
    resampling = Resampling(resamples=200)
    return ScalePlan(GateRules(max_retention_loss=limit, resampling=resampling))


def test_learnt_doses_help_and_the_stack_is_left_as_it_was(made: tuple[Attachment, ...]) -> None:
    stack = stacked(made, 0.25, 1.0)
    digest = state_digest(stack.model)
    found = learn_scales(stack, Numbers(), OwnText(texts(counting(1)), noise()), plan(9.0))
    assert found.accepted, found.reason
    assert found.selection_learnt < found.selection_present
    assert found.gain.low > 0
    assert found.learnt[UP] > 0.25
    assert found.learnt[DOWN] < 1.0
    assert found.doses == found.learnt
    assert state_digest(stack.model) == digest
    assert [entry.dose for entry in stack.attachments] == [0.25, 1.0]


def test_present_doses_stay_where_nothing_better_is_found(made: tuple[Attachment, ...]) -> None:
    known = learn_scales(
        stacked(made, 0.25, 1.0), Numbers(), OwnText(texts(counting(1)), noise()), plan(9.0)
    )
    again = learn_scales(
        stacked(made, known.learnt[UP], known.learnt[DOWN]),
        Numbers(),
        OwnText(texts(counting(1)), noise()),
        plan(9.0),
    )
    assert not again.accepted
    assert again.doses == known.learnt
    assert again.selection_learnt == again.selection_present


def test_no_doses_are_accepted_that_the_gate_would_refuse(made: tuple[Attachment, ...]) -> None:
    """As above, but general text would have to become better by a nat."""
    text = OwnText(texts(counting(1)), noise())
    bound = learn_scales(stacked(made, 0.25, 1.0), Numbers(), text, plan(-1.0))
    assert bound.learnt == bound.present
    assert not bound.accepted


def test_a_prompt_beside_others_is_tried_at_the_doses_that_it_takes(
    made: tuple[Attachment, ...],
) -> None:
    shape = blocks.base_shape(tiny_model("llama"))
    vectors = 0.02 * torch.randn(2, shape.hidden, generator=torch.Generator().manual_seed(5))
    facts = PromptFacts(shape, 2, "float32")
    prompt = Attachment("prompt", "c" * 32, facts, {TENSOR: vectors}, doses=PROMPT_DOSES)
    stack = Stack(tiny_model("llama"))
    stack.attach_all([replace(made[0], dose=0.25), prompt])
    steps: list[TrialStep] = []
    text = OwnText(texts(counting(1)), noise())
    found = learn_scales(stack, Numbers(), text, replace(plan(9.0), rounds=1), steps.append)
    tried = [step.what.split()[1:] for step in steps]
    assert {doses[0] for doses in tried} == {"0", "0.25", "0.5", "0.75", "1"}
    assert {doses[1] for doses in tried} == {"0", "1"}
    assert found.learnt["c" * 32] in {0.0, 1.0}
