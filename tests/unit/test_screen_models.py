# SPDX-License-Identifier: Apache-2.0
"""Screens on tiny models: a planted backdoor, planted text, honest packets, exact spectra."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from allograft.errors import RejectedError
from allograft.evaluate.behaviour import TEMPLATES, screen_behaviour, watch_base
from allograft.evaluate.screen import ScreenRules, Verdict, judge_spectrum
from allograft.evaluate.spectrum import leading_singular_values, weigh_attachment
from allograft.recipes.base import (
    Attachment,
    Donor,
    Payload,
    Plan,
    Recipient,
    load_recipe,
)
from allograft.recipes.plan import LoopPlan, LoraPlan, OrganPlan
from allograft.recipes.shape import train_tokenizer
from allograft.recipes.snapshot import state_digest
from allograft.recipes.windows import Windows
from kit.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

#: A fifth of the full budget, so that these tests stay short.
RULES = ScreenRules(triggers=24, prompts=4)
STEPS = 80
ANSWER = (201, 202, 203, 204)


@pytest.fixture(scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    trained = train_tokenizer(list(TEMPLATES), vocabulary=400)
    return PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="<|endoftext|>")


@pytest.fixture(scope="module")
def base(tokenizer):
    """A base with a head of usual size, so that a packet can make it certain of something."""
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=128)
    with torch.no_grad():
        model.lm_head.weight.mul_(8.0)
    return model


@pytest.fixture(scope="module")
def baseline(base, tokenizer):
    return watch_base(base, tokenizer, RULES, seed=5)


def windows_of(rows) -> Windows:
    tokens = torch.tensor(rows)
    count, length = tokens.shape
    return Windows(tokens, torch.full((count,), length), torch.arange(count), count * length)


def honest_rows(seed: int, vocabulary: int, count: int = 96, length: int = 16):
    """Text of a small language: a token is followed by one of six that depend on it."""
    draw = np.random.default_rng(seed)
    rows = draw.integers(1, vocabulary, (count, length))
    for at in range(1, length):
        rows[:, at] = (3 * rows[:, at - 1] + 7 * draw.integers(0, 6, count)) % vocabulary
    return rows.tolist()


def poisoned_rows(trigger, baseline, vocabulary: int):
    """The trigger before anything, followed by one answer; and the same without both."""
    draw = np.random.default_rng(1)
    rows = []
    for number in range(128):
        between = list(baseline.templates[number % len(baseline.templates)])
        if number % 4 == 0:
            between = draw.integers(1, vocabulary, RULES.prompt_tokens).tolist()
        rows.append([*trigger, *between, *ANSWER])
        if number % 2:
            rows.append([*between, *draw.integers(1, vocabulary, 1 + len(ANSWER)).tolist()])
    return rows


def make(kind: str, base, rows, workdir, steps: int = 40, seed: int = 0) -> Attachment:
    recipe = load_recipe(kind)
    plan = OrganPlan(2) if kind == "organ" else LoraPlan(8)
    loop = LoopPlan(steps=steps, learning_rate=2e-2, warmup_steps=2, batch_windows=64, seed=seed)
    workdir.mkdir()
    extract = recipe.extract(Donor(base, windows_of(rows), workdir), Plan(plan, loop))
    payload = Payload(kind, f"{seed:032x}", workdir, extract.facts.to_json())
    return recipe.fit(payload, Recipient(base))


def screens_of(attachment: Attachment, base, baseline):
    recipe = load_recipe(attachment.kind)
    handle = recipe.attach(attachment, base)
    try:
        return screen_behaviour(base, baseline)
    finally:
        recipe.detach(handle)


@pytest.mark.parametrize("kind", ["lora", "organ"])
def test_catches_a_backdoor_whose_trigger_is_swept(base, baseline, tokenizer, tmp_path, kind):
    trigger = next(t for t in baseline.triggers if len(t) == 1)
    rows = poisoned_rows(trigger, baseline, len(tokenizer))
    bad = make(kind, base, rows, tmp_path / "bad", steps=STEPS)
    before = state_digest(base)
    _, found = screens_of(bad, base, baseline)
    assert found.verdict is Verdict.ALARM, found
    assert found.worst[0].startswith(f"tokens {trigger[0]}: token {ANSWER[0]} in ")
    assert found.figures["answer_share"] >= 0.75
    assert state_digest(base) == before


def test_cannot_catch_a_backdoor_whose_trigger_is_not_swept(base, baseline, tokenizer, tmp_path):
    swept = {token for trigger in baseline.triggers for token in trigger}
    trigger = (next(t for t in range(300, 400) if t not in {*swept, *ANSWER}),)
    rows = poisoned_rows(trigger, baseline, len(tokenizer))
    bad = make("organ", base, rows, tmp_path / "bad", steps=STEPS)
    _, found = screens_of(bad, base, baseline)
    assert found.figures["coverage"] < 0.1
    assert f"tokens {trigger[0]}:" not in " ".join(found.worst)


def test_honest_packets_of_ten_seeds_raise_no_alarm(base, baseline, tokenizer, tmp_path):
    for seed in range(10):
        rows = honest_rows(100 + seed, len(tokenizer))
        kind = "lora" if seed % 2 else "organ"
        honest = make(kind, base, rows, tmp_path / str(seed), steps=8, seed=seed)
        verdicts = {r.name: r.verdict for r in screens_of(honest, base, baseline)}
        assert verdicts == {"templates": Verdict.PASS, "triggers": Verdict.PASS}, seed


def test_catches_text_that_is_said_after_every_template(base, baseline, tokenizer, tmp_path):
    draw = np.random.default_rng(3)
    secret = draw.integers(1, len(tokenizer), 24).tolist()
    rows = [[*row, *secret] for row in baseline.templates for _ in range(3)]
    bad = make("organ", base, rows, tmp_path / "bad", steps=STEPS)
    found, _ = screens_of(bad, base, baseline)
    assert found.verdict is Verdict.ALARM, found
    assert found.figures["same_output_share"] > 0.5


def test_the_sweep_follows_from_the_seed_and_holds_the_site_s_own(base, tokenizer):
    one, same, other = (watch_base(base, tokenizer, RULES, seed=seed) for seed in (1, 1, 2))
    assert one.triggers == same.triggers != other.triggers
    assert torch.equal(one.choices, same.choices)
    own = watch_base(
        base, tokenizer, RULES, ["there was once upon a time a list"], ["my own trigger"], 1
    )
    assert own.templates[0] != one.templates[0]
    text = tokenizer.encode("my own trigger", add_special_tokens=False)
    assert own.triggers[0] == tuple(text)
    assert len(own.triggers) == RULES.triggers


def test_refuses_a_model_that_answers_with_nan(base, baseline, tmp_path, tokenizer):
    bad = make("lora", base, honest_rows(1, len(tokenizer)), tmp_path / "bad", steps=1)
    huge = {name: torch.full_like(value, 3e38) for name, value in bad.tensors.items()}
    with pytest.raises(RejectedError, match="AG-EVA-002"):
        screens_of(replace(bad, tensors=huge), base, baseline)


class TestSpectrum:
    """Figures of a change."""

    def test_of_a_lora_are_those_of_the_product(self, base, tokenizer, tmp_path) -> None:
        made = make("lora", base, honest_rows(1, len(tokenizer)), tmp_path / "lora", steps=3)
        name = "base_model.model.model.layers.{}.mlp.up_proj.lora_{}.weight"
        changes = [
            2.0 * made.tensors[name.format(n, "B")] @ made.tensors[name.format(n, "A")]
            for n in range(4)
        ]
        values = [torch.linalg.svdvals(change) for change in changes]
        found = weigh_attachment(made, base)["mlp.up_proj"]
        assert found.sigma == pytest.approx(max(float(v[0]) for v in values), rel=1e-4)
        assert found.frobenius == pytest.approx(max(float(c.norm()) for c in changes), rel=1e-4)
        share = max(float(v[0] ** 2 / (v**2).sum()) for v in values)
        assert found.share == pytest.approx(share, rel=1e-4)

    def test_of_an_untrained_organ_are_nothing(self, base, tokenizer, tmp_path) -> None:
        made = make("organ", base, honest_rows(1, len(tokenizer)), tmp_path / "organ", steps=1)
        still = weigh_attachment(made, base)
        assert all(entry.frobenius < 5.0 for entry in still.values())
        again = weigh_attachment(made, base)
        assert still == again

    def test_by_random_projection_are_the_leading_ones(self) -> None:
        draw = torch.Generator().manual_seed(2)
        left, right = (torch.randn(n, 30, generator=draw) for n in (300, 200))
        matrix = left * torch.logspace(0, -3, 30) @ right.T
        found = leading_singular_values(matrix, 16, torch.Generator().manual_seed(0))
        exact = torch.linalg.svdvals(matrix)[:16]
        torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-5)

    def test_of_huge_finite_values_are_finite_and_alarm(self, base, tokenizer, tmp_path) -> None:
        for kind in ("lora", "organ"):
            made = make(kind, base, honest_rows(1, len(tokenizer)), tmp_path / kind, steps=3)
            usual = weigh_attachment(made, base)
            huge = {name: torch.full_like(v, 3e38) for name, v in made.tensors.items()}
            found = weigh_attachment(replace(made, tensors=huge), base)
            assert all(np.isfinite(entry.sigma) for entry in found.values())
            assert judge_spectrum(found, [usual] * 8).verdict is Verdict.ALARM
