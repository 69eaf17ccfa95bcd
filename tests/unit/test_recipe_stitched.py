# SPDX-License-Identifier: Apache-2.0
"""Blocks beside a block, and the stitched organ that needs them: experimental, and out of reach."""

from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from allograft.errors import RejectedError
from allograft.packet.kinds import find_kind
from allograft.recipes import blocks
from allograft.recipes.base import (
    BUILT_IN_KINDS,
    EXPERIMENTAL_KINDS,
    Attachment,
    Declaration,
    Donor,
    ModelCard,
    Payload,
    Plan,
    Recipient,
    load_recipe,
)
from allograft.recipes.export import export_merged
from allograft.recipes.facts import StitchedFacts
from allograft.recipes.lora import LoraRecipe
from allograft.recipes.organ import OrganRecipe
from allograft.recipes.patch import has_attachments
from allograft.recipes.plan import LoopPlan, LoraPlan, OrganPlan, make_recipe_plan
from allograft.recipes.snapshot import state_digest
from allograft.recipes.stack import Stack
from allograft.recipes.stitched import StitchedRecipe, fit_maps, record_hidden
from kit.tiny import (
    FAMILIES,
    LAYERS,
    generate,
    logits_of,
    tiny_model,
    tiny_tokens,
    tiny_windows,
)

LOOP = LoopPlan(steps=2, batch_windows=24, learning_rate=1e-2, warmup_steps=0)
RECIPE = StitchedRecipe()
PROBE = tiny_windows(seed=9)


def make(family: str, workdir: Path, recipient=None, key: str = "a") -> Attachment:
    """An organ of one stranger's, worn by another."""
    folder = workdir / key
    folder.mkdir()
    donor = Donor(tiny_model(family), tiny_windows(), folder, probe=PROBE)
    made = RECIPE.extract(donor, Plan(OrganPlan(1), LOOP))
    model = recipient or tiny_model(family, seed=2)
    payload = Payload("stitched", key * 32, folder, made.facts.to_json())
    return RECIPE.fit(payload, Recipient(model, probe=PROBE))


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_beside_a_block_cache_and_leave_without_a_trace(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, seed=2)
    digest, before = state_digest(model), logits_of(model)
    handle = RECIPE.attach(make(family, tmp_path), model)
    assert has_attachments(model)
    half = logits_of(model)
    assert not torch.equal(half, before)
    assert generate(model, use_cache=True) == generate(model, use_cache=False)
    static = generate(model, True, cache_implementation="static", disable_compile=True)
    assert static == generate(model, use_cache=False)
    attached = state_digest(model)
    handle.set_dose(0.25)
    assert state_digest(model) != attached
    assert 0 < (logits_of(model) - before).norm() < (half - before).norm()
    handle.set_dose(0.0)
    assert torch.equal(logits_of(model), before)
    RECIPE.detach(handle)
    assert state_digest(model) == digest
    assert torch.equal(logits_of(model), before)
    assert not any(block._forward_hooks for block in blocks.model_blocks(model))


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_shared_cache_slots_would_be_noticed(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, seed=2)
    RECIPE.attach(make(family, tmp_path), model)
    (side,) = blocks.sides_of(blocks.base_blocks(model)[-1]).values()
    for module in side.blocks[0].modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = LAYERS - 1
    assert generate(model, use_cache=True) != generate(model, use_cache=False)


@pytest.mark.parametrize("family", ["gpt2", "gemma3_text"])
def test_sides_insertions_and_adapters_come_and_go_in_any_order(
    family: str, tmp_path: Path
) -> None:
    model = tiny_model(family, seed=2)
    plain = state_digest(model)
    pieces = [(RECIPE, make(family, tmp_path)), (RECIPE, make(family, tmp_path, key="d"))]
    plans = ((OrganRecipe(), OrganPlan(2, 2, 4), "b"), (LoraRecipe(), LoraPlan(2), "c"))
    for recipe, plan, key in plans:
        (tmp_path / key).mkdir()
        made = recipe.extract(Donor(model, tiny_windows(), tmp_path / key), Plan(plan, LOOP))
        payload = Payload(recipe.kind, key * 32, tmp_path / key, made.facts.to_json())
        pieces.append((recipe, recipe.fit(payload, Recipient(model))))
    digests = set()
    for order in list(permutations(range(4)))[::5]:
        handles = {number: pieces[number][0].attach(pieces[number][1], model) for number in order}
        digests.add(state_digest(model))
        assert generate(model, use_cache=True) == generate(model, use_cache=False)
        for number in order:
            pieces[number][0].detach(handles[number])
        assert state_digest(model) == plain
    assert len(digests) == 1


@torch.no_grad()
def output_of(model, block: torch.nn.Module) -> torch.Tensor:
    """What a block of a model puts out, with everything that is attached."""
    seen: list[torch.Tensor] = []
    hook = block.register_forward_hook(lambda _m, _i, output: seen.append(output))
    model.model(input_ids=tiny_tokens(), use_cache=False)
    hook.remove()
    return seen[0]


def test_worn_by_its_own_base_it_is_the_gate_around_the_organ(tmp_path: Path) -> None:
    """The maps are then the identity: h + dose (O(h) - h)."""
    model = tiny_model("llama")
    attachment = make("llama", tmp_path, recipient=model)
    into = attachment.tensors["stitch.into"]
    torch.testing.assert_close(into, torch.eye(32), rtol=1e-3, atol=1e-3)
    assert attachment.report["alignment"] == pytest.approx(1.0, abs=1e-5)
    last = blocks.model_blocks(model)[-1]
    plain = output_of(model, last)
    handle = RECIPE.attach(attachment, model)
    worn = output_of(model, last)
    RECIPE.detach(handle)
    kept = {n: v for n, v in attachment.tensors.items() if n.startswith("blocks.")}
    organ = Attachment("organ", "f" * 64, attachment.facts.organ, kept)
    whole = output_of(model, OrganRecipe().attach(organ, model).blocks[-1])
    torch.testing.assert_close(worn, plain + 0.5 * (whole - plain), rtol=1e-3, atol=1e-3)


def test_maps_recover_a_known_rotation_scale_and_shift() -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(400, 16, generator=generator)
    rotation, _ = torch.linalg.qr(torch.randn(16, 16, generator=generator))
    shift = torch.randn(16, generator=generator)
    maps = fit_maps(x, 2.5 * x @ rotation + shift)
    torch.testing.assert_close(maps.into, 2.5 * rotation, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(maps.shift, shift, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(maps.into @ maps.back, torch.eye(16), rtol=1e-4, atol=1e-4)
    assert maps.alignment == pytest.approx(1.0, abs=1e-6)
    strangers = fit_maps(x, torch.randn(400, 16, generator=generator))
    assert strangers.alignment < 0.2


def test_hidden_states_are_recorded_for_real_tokens_only() -> None:
    hidden = record_hidden(tiny_model("gpt2"), PROBE)
    assert hidden.shape == (int(PROBE.lengths.sum()), 32)


def test_is_out_of_reach_unless_it_is_named() -> None:
    with pytest.raises(RejectedError, match="AG-RCP-001"):
        load_recipe("stitched")
    with pytest.raises(RejectedError, match="AG-PKT-001"):
        find_kind("stitched")
    with pytest.raises(RejectedError, match="AG-RCP-001"):
        make_recipe_plan("stitched")
    assert {StitchedRecipe.kind} == EXPERIMENTAL_KINDS
    assert not EXPERIMENTAL_KINDS & BUILT_IN_KINDS


@pytest.mark.parametrize("dose", [0.51, 1.0, -0.1, float("nan")])
def test_refuses_more_than_half_a_dose(dose: float, tmp_path: Path) -> None:
    model = tiny_model("llama", seed=2)
    attachment = make("llama", tmp_path)
    assert attachment.dose == 0.5
    digest = state_digest(model)
    with pytest.raises(RejectedError, match="AG-RCP-021"):
        RECIPE.attach(replace(attachment, dose=dose), model)
    assert state_digest(model) == digest
    handle = RECIPE.attach(attachment, model)
    with pytest.raises(RejectedError, match="AG-RCP-021"):
        handle.set_dose(dose)
    with pytest.raises(RejectedError, match="AG-RCP-023"):
        RECIPE.attach(attachment, model)
    RECIPE.detach(handle)
    with pytest.raises(RejectedError, match="AG-RCP-023"):
        handle.set_dose(0.1)


def test_refuses_a_host_that_attends_in_another_way(tmp_path: Path) -> None:
    """Two blocks before the end, one slides; both would get the last block's mask."""
    model = tiny_model("gemma2")
    donor = Donor(model, tiny_windows(), tmp_path, probe=PROBE)
    made = RECIPE.extract(donor, Plan(OrganPlan(2), LOOP))
    payload = Payload("stitched", "a" * 32, tmp_path, made.facts.to_json())
    attachment = RECIPE.fit(payload, Recipient(model, probe=PROBE))
    digest = state_digest(model)
    with pytest.raises(RejectedError, match="AG-RCP-021"):
        RECIPE.attach(attachment, model)
    assert state_digest(model) == digest


def test_refuses_to_save_what_no_stock_model_can_hold(tmp_path: Path) -> None:
    model = tiny_model("llama", seed=2)
    RECIPE.attach(make("llama", tmp_path), model)
    with pytest.raises(RejectedError, match="AG-RCP-024"):
        export_merged(Stack(model), None, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("probe", [None, tiny_windows(seed=10)])
def test_refuses_another_probe_than_the_donors(probe, tmp_path: Path) -> None:
    model = tiny_model("llama")
    donor = Donor(model, tiny_windows(), tmp_path, probe=PROBE)
    made = RECIPE.extract(donor, Plan(OrganPlan(1), LOOP))
    payload = Payload("stitched", "a" * 32, tmp_path, made.facts.to_json())
    with pytest.raises(RejectedError, match="AG-RCP-034"):
        RECIPE.fit(payload, Recipient(model, probe=probe))


def test_refuses_payloads_and_models_that_do_not_fit(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with pytest.raises(RejectedError, match="AG-RCP-030"):
        RECIPE.extract(Donor(model, tiny_windows(), tmp_path), Plan(OrganPlan(1), LOOP))
    made = RECIPE.extract(
        Donor(model, tiny_windows(), tmp_path, probe=PROBE), Plan(OrganPlan(1), LOOP)
    )
    assert [path.name for path in tmp_path.iterdir()] == ["stitched.safetensors"]
    payload = Payload("stitched", "a" * 32, tmp_path, made.facts.to_json())
    with pytest.raises(RejectedError, match="AG-RCP-010"):
        RECIPE.fit(payload, Recipient(tiny_model("qwen3"), probe=PROBE))
    facts = StitchedFacts.from_json(made.facts.to_json())
    with pytest.raises(RejectedError, match="AG-RCP-002"):
        replace(facts, organ=replace(facts.organ, position=1))
    path = tmp_path / "stitched.safetensors"
    tensors = load_file(path)
    tensors["probe.hidden"] = tensors["probe.hidden"][1:].contiguous()
    save_file(tensors, path)
    with pytest.raises(RejectedError, match="AG-RCP-003"):
        RECIPE.fit(payload, Recipient(model, probe=PROBE))


def test_check_asks_for_shape_and_tokenizer_and_promises_nothing(tmp_path: Path) -> None:
    model = tiny_model("llama")
    made = RECIPE.extract(
        Donor(model, tiny_windows(), tmp_path, probe=PROBE), Plan(OrganPlan(1), LOOP)
    )
    declared = Declaration("stitched", "aa", "tt", made.facts.to_json())
    deeper = replace(blocks.describe_model(model.config), layers=9)
    verdict = RECIPE.check(declared, ModelCard("bb", "tt", deeper))
    assert (verdict.level, verdict.needs[0]) == ("behavioural", "probe")
    assert RECIPE.check(declared, ModelCard("bb", "uu", deeper)).code == "AG-RCP-011"
    wider = replace(deeper, hidden=64)
    assert RECIPE.check(declared, ModelCard("bb", "tt", wider)).code == "AG-RCP-010"
