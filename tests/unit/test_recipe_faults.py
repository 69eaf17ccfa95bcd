# SPDX-License-Identifier: Apache-2.0
"""Bases that cannot be worked on, and memory that runs out: a coded error, and the model as it was.

A fault is injected at every single tensor write of an attach in turn, so that no place in the
middle is left out.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BitsAndBytesConfig, MambaConfig, Qwen2MoeConfig

from allograft.errors import AllograftError, RejectedError, UnavailableError
from allograft.recipes import blocks
from allograft.recipes.base import Attachment, Donor, Payload, Plan, Recipient, load_recipe
from allograft.recipes.plan import LoopPlan, LoraPlan, OrganPlan
from allograft.recipes.shortage import memory_errors
from allograft.recipes.snapshot import load_model, state_digest
from allograft.recipes.stack import Stack
from kit.tiny import generate, tiny_model, tiny_windows

LOOP = LoopPlan(steps=2, batch_windows=8, learning_rate=1e-2, warmup_steps=0)
KINDS = {
    "insert": OrganPlan(2, 1, 3),
    "replace": OrganPlan(1, 2, 2, "replace"),
    "dora": LoraPlan(rank=2, dora=True),
}


def make(model, workdir: Path, name: str, key: str) -> Attachment:
    kind = "lora" if name == "dora" else "organ"
    folder = workdir / f"{name}-{key}"
    folder.mkdir()
    recipe = load_recipe(kind)
    made = recipe.extract(Donor(model, tiny_windows(), folder), Plan(KINDS[name], LOOP))
    return recipe.fit(Payload(kind, key * 32, folder, made.facts.to_json()), Recipient(model))


@contextmanager
def failing_write(number: int, error: Exception) -> Iterator[list[int]]:
    """Let the given write into a tensor fail, once; counts all of them."""
    original, seen = torch.Tensor.copy_, [0]

    def write(self, *values, **options):
        seen[0] += 1
        if seen[0] == number:
            raise error
        return original(self, *values, **options)

    torch.Tensor.copy_ = write
    try:
        yield seen
    finally:
        torch.Tensor.copy_ = original


ERRORS = (
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    torch.OutOfMemoryError("CUDA out of memory"),
)


@pytest.mark.parametrize("family", ["gpt2", "gemma3_text"])
@pytest.mark.parametrize("name", KINDS)
def test_memory_that_runs_out_anywhere_in_an_attach_leaves_the_model_as_it_was(
    name: str, family: str, tmp_path: Path
) -> None:
    model = tiny_model(family)
    attachment = replace(make(model, tmp_path, name, "b"), dose=0.5)
    stack = Stack(model)
    stack.attach(make(tiny_model(family), tmp_path, "dora", "a"))
    before = state_digest(model)
    with failing_write(0, ERRORS[0]) as writes:
        stack.attach(attachment)
        stack.detach(attachment.attachment_id)
    assert state_digest(model) == before
    with failing_write(0, ERRORS[0]) as writes:
        stack.attach(attachment)
    total = writes[0]
    attached = state_digest(model)
    stack.detach(attachment.attachment_id)
    assert total > 4
    for number in range(1, total + 1, max(1, total // 12)):
        error = ERRORS[number % len(ERRORS)]
        with failing_write(number, error), pytest.raises(UnavailableError, match="AG-RCP-027"):
            stack.attach(attachment)
        assert state_digest(model) == before
        assert [each.attachment_id[0] for each in stack.attachments] == ["a"]
    stack.attach(attachment)
    assert state_digest(model) == attached


@pytest.mark.parametrize("name", KINDS)
def test_memory_that_runs_out_while_a_dose_changes_leaves_the_dose(
    name: str, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    attachment = make(model, tmp_path, name, "b")
    handle = load_recipe(attachment.kind).attach(attachment, model)
    full = state_digest(model)
    with failing_write(3, MemoryError()), pytest.raises(UnavailableError, match="AG-RCP-027"):
        handle.set_dose(0.25)
    assert state_digest(model) == full
    assert handle.attachment.dose == 1.0
    handle.set_dose(0.25)
    assert state_digest(model) != full


def test_stack_takes_all_off_again_when_memory_runs_out_at_its_last(tmp_path: Path) -> None:
    model = tiny_model("llama")
    plain = state_digest(model)
    both = [make(model, tmp_path, "dora", "a"), make(model, tmp_path, "insert", "b")]
    with failing_write(0, ERRORS[0]) as writes:
        Stack(copy.deepcopy(model)).attach_all(both)
    with failing_write(writes[0] - 1, MemoryError()), pytest.raises(UnavailableError):
        Stack(model).attach_all(both)
    assert state_digest(model) == plain


def test_other_errors_are_not_called_a_lack_of_memory() -> None:
    with pytest.raises(RuntimeError, match="size mismatch"), memory_errors("adding"):
        raise RuntimeError("size mismatch")
    with pytest.raises(ValueError, match="no"), memory_errors("adding"):
        raise ValueError("no")


def spoil(model, how: str):
    """A base with one defect."""
    first, second = blocks.base_blocks(model)[1:3]
    if how == "mixed":
        second.mlp.to(torch.bfloat16)
    elif how == "integer":
        weight = torch.zeros_like(second.mlp.up_proj.weight, dtype=torch.int8)
        second.mlp.up_proj.weight = torch.nn.Parameter(weight, requires_grad=False)
    else:
        second.mlp.down_proj.weight = first.mlp.down_proj.weight
    return model


@pytest.mark.parametrize("how", ["mixed", "integer", "shared"])
@pytest.mark.parametrize("name", ["insert", "replace"])
def test_refuses_bases_whose_blocks_cannot_be_changed_one_by_one(
    name: str, how: str, tmp_path: Path
) -> None:
    attachment = make(tiny_model("llama"), tmp_path, name, "a")
    model = spoil(tiny_model("llama"), how)
    before = state_digest(model)
    with pytest.raises(RejectedError, match="AG-RCP-026"):
        load_recipe("organ").attach(attachment, model)
    donor = Donor(model, tiny_windows(), tmp_path)
    with pytest.raises(RejectedError, match="AG-RCP-026"):
        load_recipe("organ").extract(donor, Plan(KINDS[name], LOOP))
    assert state_digest(model) == before


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BertConfig(), "'bert'"),
        (MambaConfig(), "'mamba'"),
        (Qwen2MoeConfig(), "'qwen2_moe'"),
        (tiny_model("llama", num_kv_shared_layers=2).config, "num_kv_shared_layers"),
        (tiny_model("gpt2", add_cross_attention=True).config, "add_cross_attention"),
        (tiny_model("gemma3_text", use_bidirectional_attention=True).config, "bidirectional"),
        (
            tiny_model("llama", quantization_config=BitsAndBytesConfig().to_dict()).config,
            "quantization_config",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses_families_that_cannot_be_served_and_says_why(config, reason: str) -> None:
    with pytest.raises(RejectedError, match="AG-RCP-020") as refused:
        blocks.describe_model(config)
    assert reason in refused.value.cause


def test_refuses_to_load_a_base_with_weights_that_are_not_finite(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    with torch.no_grad():
        blocks.base_blocks(model)[0].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(RejectedError, match="AG-RCP-032"):
        load_model(tmp_path)


def test_refuses_to_load_a_base_that_lacks_a_layer(tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    state = {name: value for name, value in model.state_dict().items() if ".layers.2." not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(RejectedError, match="AG-RCP-032"):
        load_model(tmp_path)


def test_refused_attaches_leave_generation_as_it_was(tmp_path: Path) -> None:
    """Every refusal of a bad attachment, one after the other, on one model."""
    model = tiny_model("mistral")
    good = make(model, tmp_path, "insert", "a")
    before, said = state_digest(model), generate(model, use_cache=True)
    recipe = load_recipe("organ")
    for bad in (replace(good, dose=2.0), replace(good, facts=_elsewhere(good))):
        with pytest.raises(AllograftError):
            recipe.attach(bad, model)
    assert state_digest(model) == before
    assert generate(model, use_cache=True) == said


def _elsewhere(attachment: Attachment):
    shape = replace(attachment.facts.shape, hidden=64)
    return replace(attachment.facts, shape=shape)
