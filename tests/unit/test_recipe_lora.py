# SPDX-License-Identifier: Apache-2.0
"""LoRA: trained by PEFT, readable by PEFT, and attached to the right block whatever is inserted."""

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from allograft.errors import RejectedError
from allograft.packet.tensors import check_file
from allograft.recipes import blocks
from allograft.recipes.attachment import load_attachment, save_attachment
from allograft.recipes.base import (
    Attachment,
    Donor,
    Extract,
    Payload,
    Plan,
    Recipient,
)
from allograft.recipes.export import export_peft
from allograft.recipes.lora import LoraRecipe, target_linears
from allograft.recipes.patch import folded, has_attachments
from allograft.recipes.plan import LoopPlan, LoraPlan, OrganPlan
from allograft.recipes.snapshot import state_digest
from kit.tiny import FAMILIES, LAYERS, logits_of, tiny_model, tiny_windows

LOOP = LoopPlan(steps=6, batch_windows=24, learning_rate=1e-2, warmup_steps=2)
RECIPE = LoraRecipe()
PACKET = "cd" * 16


def extract(model, workdir: Path, plan: LoraPlan | None = None, loop=LOOP, **donor) -> Extract:
    return RECIPE.extract(
        Donor(model, tiny_windows(), workdir, **donor), Plan(plan or LoraPlan(rank=4), loop)
    )


def fit(model, workdir: Path, made: Extract, packet_id: str = PACKET) -> Attachment:
    return RECIPE.fit(Payload("lora", packet_id, workdir, made.facts.to_json()), Recipient(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_learns_fits_and_leaves_the_base_as_it_was(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    digest, before = state_digest(model), logits_of(model)
    modules = [type(module) for module in model.modules()]
    made = extract(model, tmp_path)
    assert [type(module) for module in model.modules()] == modules
    assert state_digest(model) == digest
    assert made.report["last_loss"] < made.report["first_loss"]
    assert all(value.requires_grad and value.grad is None for value in model.parameters())
    handle = RECIPE.attach(fit(model, tmp_path, made), model)
    full = logits_of(model)
    assert not torch.equal(full, before)
    handle.set_dose(0.5)
    assert 0 < (logits_of(model) - before).norm() < (full - before).norm()
    handle.set_dose(0.0)
    assert torch.equal(logits_of(model), before)
    handle.set_dose(1.0)
    assert torch.equal(logits_of(model), full)
    RECIPE.detach(handle)
    assert state_digest(model) == digest
    assert not has_attachments(model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dose", [1.0, 0.5])
def test_peft_loads_the_exported_directory_with_equal_logits(
    family: str, dose: float, tmp_path: Path
) -> None:
    import peft

    model = tiny_model(family)
    attachment = replace(fit(model, tmp_path, extract(model, tmp_path)), dose=dose)
    export_peft(attachment, tmp_path / "adapter")
    twin = tiny_model(family)
    with warnings.catch_warnings():
        # PEFT reads a property that transformers 5.23 has renamed.
        warnings.filterwarnings(
            "ignore", message=".*is_gradient_checkpointing", category=FutureWarning
        )
        adapted = peft.PeftModel.from_pretrained(twin, tmp_path / "adapter").eval()
    theirs = logits_of(adapted)
    RECIPE.attach(attachment, model)
    torch.testing.assert_close(logits_of(model), theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(theirs, logits_of(tiny_model(family)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_lands_on_the_same_blocks_after_an_organ_was_inserted(
    family: str, tmp_path: Path
) -> None:
    """An identity organ in front must change nothing; by index, every block after it would move."""
    model = tiny_model(family)
    attachment = fit(model, tmp_path, extract(model, tmp_path))
    plain = tiny_model(family)
    RECIPE.attach(attachment, plain)
    silent = blocks.copy_blocks(model, 0, 2)
    for block in silent:
        blocks.silence(blocks.find_family(model.config), block)
    blocks.insert_blocks(model, silent, 0, 1, "organ-a")
    digest = state_digest(model)
    # Fitting, too, is against the base: its shape has not changed.
    handle = RECIPE.attach(fit(model, tmp_path, extract(tiny_model(family), tmp_path)), model)
    assert torch.equal(logits_of(model), logits_of(plain))
    RECIPE.detach(handle)
    assert state_digest(model) == digest


def test_peft_itself_lands_on_the_wrong_block_without_a_word(tmp_path: Path) -> None:
    """The trap this package avoids; when PEFT closes it, this test says so."""
    import peft

    model = tiny_model("qwen3")
    attachment = fit(model, tmp_path, extract(model, tmp_path))
    export_peft(attachment, tmp_path / "adapter")
    right = tiny_model("qwen3")
    RECIPE.attach(attachment, right)
    silent = blocks.copy_blocks(model, 0, 2)
    for block in silent:
        blocks.silence(blocks.find_family(model.config), block)
    blocks.insert_blocks(model, silent, 0, 1, "organ-a")
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*is_gradient_checkpointing", category=FutureWarning
        )
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    assert not torch.allclose(logits_of(adapted), logits_of(right), rtol=1e-2, atol=1e-2)


def test_payload_has_pefts_names_and_no_embedding(tmp_path: Path) -> None:
    extract(tiny_model("llama", tie_word_embeddings=True), tmp_path)
    with (tmp_path / "adapter_model.safetensors").open("rb") as handle:
        names = {entry.name for entry in check_file(handle).table.entries}
    assert len(names) == LAYERS * 7 * 2
    assert "base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight" in names
    assert not any("embed" in name or "lm_head" in name for name in names)


def test_tied_embeddings_are_left_alone(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    attachment = fit(model, tmp_path, extract(model, tmp_path))
    before = model.get_input_embeddings().weight.clone()
    RECIPE.attach(attachment, model)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert torch.equal(model.lm_head.weight, before)


def test_chosen_targets_are_the_only_ones_changed(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    made = extract(model, tmp_path, LoraPlan(2, 4.0, ("c_proj",)))
    assert made.facts.settings.target_modules == ("c_proj",)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    RECIPE.attach(fit(model, tmp_path, made), model)
    with folded(model):
        changed = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    assert {name.split(".", 3)[3] for name in changed} == {
        "attn.c_proj.weight",
        "mlp.c_proj.weight",
    }


def test_targets_name_modules_of_the_family() -> None:
    assert target_linears("gpt2", ("c_proj",)) == ("attn.c_proj", "mlp.c_proj")
    assert len(target_linears("gemma2", ())) == 7
    with pytest.raises(RejectedError, match="AG-RCP-021"):
        target_linears("llama", ("lm_head",))
    with pytest.raises(RejectedError, match="AG-RCP-020"):
        target_linears("bert", ())


def test_several_adapters_add_up_in_any_order(tmp_path: Path) -> None:
    model = tiny_model("llama")
    plain = state_digest(model)
    made = []
    for number in range(3):
        workdir = tmp_path / str(number)
        workdir.mkdir()
        loop = replace(LOOP, seed=number)
        made.append(fit(model, workdir, extract(model, workdir, loop=loop), f"{number}" * 32))
    digests = set()
    for order in ((0, 1, 2), (2, 0, 1)):
        handles = {number: RECIPE.attach(made[number], model) for number in order}
        digests.add(state_digest(model))
        RECIPE.detach(handles[1])
        digests.add(state_digest(model))
        RECIPE.detach(handles[0])
        RECIPE.detach(handles[2])
        assert state_digest(model) == plain
    assert len(digests) == 2


def test_adapter_can_be_stored_and_read_back(tmp_path: Path) -> None:
    model = tiny_model("mistral")
    attachment = fit(model, tmp_path, extract(model, tmp_path))
    save_attachment(attachment, tmp_path / "kept")
    again = load_attachment(tmp_path / "kept")
    assert again.facts == attachment.facts
    assert all(torch.equal(v, again.tensors[n]) for n, v in attachment.tensors.items())


@pytest.mark.parametrize("how", ["missing", "extra", "rank", "nan"])
def test_refuses_payloads_that_do_not_fit(how: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    made = extract(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    if how == "missing":
        del tensors[name]
    elif how == "extra":
        tensors["base_model.model.lm_head.lora_A.weight"] = torch.zeros(4, 32)
    elif how == "rank":
        tensors[name] = tensors[name][:2].contiguous()
    else:
        tensors[name][0, 0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(RejectedError, match="AG-RCP-003"):
        fit(model, tmp_path, made)


def test_refuses_bad_settings_and_plans(tmp_path: Path) -> None:
    model = tiny_model("llama")
    for plan in (LoraPlan(rank=0), LoraPlan(alpha=0.0), LoraPlan(rank=100_000)):
        with pytest.raises(RejectedError, match="AG-PKT-009"):
            extract(model, tmp_path, plan)
    with pytest.raises(RejectedError, match="AG-RCP-035"):
        RECIPE.extract(Donor(model, tiny_windows(), tmp_path), Plan(OrganPlan(), LOOP))


def test_refuses_double_use(tmp_path: Path) -> None:
    model = tiny_model("llama")
    made = extract(model, tmp_path)
    attachment = fit(model, tmp_path, made)
    handle = RECIPE.attach(attachment, model)
    with pytest.raises(RejectedError, match="AG-RCP-023"):
        RECIPE.attach(attachment, model)
    with pytest.raises(RejectedError, match="AG-RCP-022"):
        extract(model, tmp_path)
    with pytest.raises(RejectedError, match="AG-RCP-021"):
        handle.set_dose(1.5)
    RECIPE.detach(handle)
    with pytest.raises(RejectedError, match="AG-RCP-023"):
        RECIPE.detach(handle)
    with pytest.raises(RejectedError, match="AG-RCP-023"):
        handle.set_dose(0.5)
    with pytest.raises(RejectedError, match="AG-RCP-010"):
        RECIPE.attach(attachment, tiny_model("qwen3"))
    with pytest.raises(RejectedError, match="AG-RCP-021"):
        RECIPE.attach(replace(attachment, dose=-1.0), model)
    assert not has_attachments(model)


def test_training_seed_decides_the_adapter_and_leaves_the_global_one(tmp_path: Path) -> None:
    tensors = []
    for number in range(2):
        workdir = tmp_path / str(number)
        workdir.mkdir()
        torch.manual_seed(number)
        state = torch.random.get_rng_state()
        model = tiny_model("llama")
        torch.random.set_rng_state(state)
        extract(model, workdir)
        assert torch.equal(torch.random.get_rng_state(), state)
        tensors.append(load_file(workdir / "adapter_model.safetensors"))
    assert all(torch.equal(value, tensors[1][name]) for name, value in tensors[0].items())
