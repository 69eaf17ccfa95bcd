# SPDX-License-Identifier: Apache-2.0
"""Module grafts: ranked whole modules that go on at a dose and come off to the last bit."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from allograft.errors import RejectedError
from allograft.evaluate.spectrum import weigh_attachment
from allograft.privacy.dp import DpConstants
from allograft.privacy.egress import rebuild_file
from allograft.privacy.shapes import allow_list, read_base
from allograft.recipes import blocks
from allograft.recipes.base import (
    Attachment,
    Declaration,
    Donor,
    Extract,
    ModelCard,
    Payload,
    Plan,
    Recipient,
)
from allograft.recipes.controls import null_packet
from allograft.recipes.facts import ModuleGraftFacts, read_facts
from allograft.recipes.graft import (
    PAYLOAD,
    ModuleGraftRecipe,
    draw_prompts,
    keep_first,
    linear_modules,
    measure_outputs,
)
from allograft.recipes.lora import LoraRecipe
from allograft.recipes.patch import has_attachments
from allograft.recipes.plan import (
    LoopPlan,
    LoraPlan,
    ModuleGraftPlan,
    make_recipe_plan,
    read_recipe_plan as read_plan,
)
from allograft.recipes.snapshot import state_digest
from kit.tiny import FAMILIES, LAYERS, generate, logits_of, tiny_model, tiny_windows

LOOP = LoopPlan(steps=4, batch_windows=24, learning_rate=2e-3, warmup_steps=1)
RECIPE = ModuleGraftRecipe()
LAST = "blocks.3.mlp.down_proj"


def extract(model, workdir: Path, plan=ModuleGraftPlan(), tuned=None, **loop) -> Extract:  # noqa: B008
    workdir.mkdir(exist_ok=True)
    donor = Donor(model, tiny_windows(), workdir, tuned=tuned)
    return RECIPE.extract(donor, Plan(plan, replace(LOOP, **loop)))


def fit(model, workdir: Path, made: Extract) -> Attachment:
    payload = Payload("module_graft", "ab" * 16, workdir, made.facts.to_json())
    return RECIPE.fit(payload, Recipient(model))


def tuned_in_one_place(family: str = "llama"):
    """The base but for one module that nothing else of the blocks depends on."""
    tuned = tiny_model(family)
    with torch.no_grad():
        linear_modules(tuned)[LAST].weight.mul_(3.0)
    return tuned


@pytest.mark.parametrize("family", FAMILIES)
def test_a_graft_learns_fits_and_leaves_the_base_as_it_was(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    digest, before = state_digest(model), logits_of(model)
    made = extract(model, tmp_path, ModuleGraftPlan(5))
    assert state_digest(model) == digest
    assert made.report["last_loss"] < made.report["first_loss"]
    assert all(value.requires_grad and value.grad is None for value in model.parameters())
    old = {name: value.clone() for name, value in model.state_dict().items()}
    handle = RECIPE.attach(fit(model, tmp_path, made), model)
    full = logits_of(model)
    assert not torch.equal(full, before)
    assert generate(model, use_cache=True) == generate(model, use_cache=False)
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, old[n])}
    stem = f"{blocks.FAMILIES[family].trunk}.{blocks.FAMILIES[family].blocks}."
    grafted = {name.replace("blocks.", stem, 1) for name in made.facts.modules}
    assert {name.rpartition(".")[0] for name in changed} == grafted
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
def test_every_linear_module_counts_once_whatever_its_class(family: str) -> None:
    """GPT-2 has no `nn.Linear` in its blocks, and one module for query, key and value."""
    modules = linear_modules(tiny_model(family))
    assert len(modules) == LAYERS * (4 if family == "gpt2" else 7)
    assert all(module.weight.ndim == 2 for module in modules.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_all_modules_of_a_snapshot_at_full_dose_are_its_own_modules(
    family: str, tmp_path: Path
) -> None:
    model, tuned = tiny_model(family), tiny_model(family)
    with torch.no_grad():
        for place, module in enumerate(linear_modules(tuned).values()):
            module.weight.add_(0.01 * (place + 1))
            if module.bias is not None:
                module.bias.sub_(0.02)
    made = extract(model, tmp_path, tuned=tuned)
    assert made.facts.source == "snapshot"
    assert "first_loss" not in made.report
    RECIPE.attach(fit(model, tmp_path, made), model)
    torch.testing.assert_close(model.state_dict(), tuned.state_dict(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits_of(model), logits_of(tuned), rtol=1e-4, atol=1e-4)


def test_output_is_measured_at_the_last_token_of_each_prompt() -> None:
    model = tiny_model("gpt2")
    prompts = draw_prompts(model, 0)
    with torch.no_grad():
        states = model(input_ids=prompts, output_hidden_states=True).hidden_states
        block = model.transformer.h[0]
        expected = block.attn.c_attn(block.ln_1(states[0]))[:, -1].abs().mean()
    found = measure_outputs(model, prompts)
    assert found["blocks.0.attn.c_attn"] == pytest.approx(float(expected), rel=1e-5)
    assert found.keys() == linear_modules(model).keys()


def test_rankings_put_first_what_they_say(tmp_path: Path) -> None:
    model, tuned = tiny_model("llama"), tuned_in_one_place()
    orders = {}
    for ranking in ("activation", "change", "random", "bottom"):
        made = extract(model, tmp_path, ModuleGraftPlan(0, ranking), tuned)
        orders[ranking] = made.facts.modules
        assert sorted(made.facts.modules) == sorted(linear_modules(model))
        assert (made.facts.calibration == "") == (ranking in {"change", "random"})
    assert orders["activation"][0] == orders["change"][0] == orders["bottom"][-1] == LAST
    first = extract(model, tmp_path, ModuleGraftPlan(1), tuned).facts
    assert first.modules == (LAST,)
    before, after = (measure_outputs(m, draw_prompts(model, 0))[LAST] for m in (model, tuned))
    assert first.scores == (float(f"{after - before:.3g}"),)
    moved = tuned.model.layers[3].mlp.down_proj.weight - model.model.layers[3].mlp.down_proj.weight
    by_change = extract(model, tmp_path, ModuleGraftPlan(1, "change"), tuned).facts
    assert by_change.scores == (float(f"{float(moved.detach().norm()):.3g}"),)


def test_random_modules_follow_from_the_seed(tmp_path: Path) -> None:
    model, tuned = tiny_model("llama"), tuned_in_one_place()
    plan = ModuleGraftPlan(6, "random")
    chosen = [extract(model, tmp_path, plan, tuned, seed=seed).facts for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1]
    assert chosen[0].modules != chosen[2].modules
    assert set(chosen[0].scores) == {0.0}


def test_calibration_says_nothing_of_the_donors_text(tmp_path: Path) -> None:
    model = tiny_model("llama")
    digests = []
    for seed, rows in ((0, 5), (0, 6), (1, 5)):
        donor = Donor(model, tiny_windows(seed=rows), tmp_path)
        plan = Plan(ModuleGraftPlan(2), replace(LOOP, steps=1, seed=seed))
        digests.append(RECIPE.extract(donor, plan).facts.calibration)
    assert digests[0] == digests[1] != digests[2]
    assert len(digests[0]) == 64


def test_a_recipient_can_use_fewer_modules(tmp_path: Path) -> None:
    model = tiny_model("mistral")
    made = extract(model, tmp_path, ModuleGraftPlan(6))
    whole = fit(model, tmp_path, made)
    two = keep_first(whole, 2)
    assert two.facts.modules == made.facts.modules[:2]
    assert two.facts.scores == made.facts.scores[:2]
    assert {name.rpartition(".")[0] for name in two.tensors} == set(two.facts.modules)
    digest = state_digest(model)
    handle = RECIPE.attach(two, model)
    assert state_digest(model) != digest
    RECIPE.detach(handle)
    assert state_digest(model) == digest
    for count in (0, 7):
        with pytest.raises(RejectedError, match="AG-RCP-021"):
            keep_first(whole, count)


def test_a_graft_stacks_with_an_adapter_in_any_order(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    plain = state_digest(model)
    graft = fit(model, tmp_path, extract(model, tmp_path, ModuleGraftPlan(9)))
    lora = LoraRecipe()
    made = lora.extract(Donor(model, tiny_windows(), tmp_path), Plan(LoraPlan(rank=2), LOOP))
    payload = Payload("lora", "cd" * 16, tmp_path, made.facts.to_json())
    adapter = lora.fit(payload, Recipient(model))
    both = [(RECIPE, graft), (lora, adapter)]
    digests = set()
    for order in (both, both[::-1]):
        handles = [(recipe, recipe.attach(made, model)) for recipe, made in order]
        digests.add(state_digest(model))
        for recipe, handle in handles:
            recipe.detach(handle)
        assert state_digest(model) == plain
    assert len(digests) == 1


def test_a_graft_lands_on_the_same_blocks_after_an_organ_was_inserted(tmp_path: Path) -> None:
    model = tiny_model("gemma3_text")
    graft = fit(model, tmp_path, extract(model, tmp_path, ModuleGraftPlan(9)))
    plain = tiny_model("gemma3_text")
    RECIPE.attach(graft, plain)
    silent = blocks.copy_blocks(model, 0, 2)
    for block in silent:
        blocks.silence(blocks.find_family(model.config), block)
    blocks.insert_blocks(model, silent, 0, 1, "organ-a")
    RECIPE.attach(graft, model)
    assert torch.equal(logits_of(model), logits_of(plain))


def test_only_relatives_of_the_base_may_open_a_graft(tmp_path: Path) -> None:
    model = tiny_model("llama")
    facts = extract(model, tmp_path, ModuleGraftPlan(1)).facts
    statement = Declaration("module_graft", "aa" * 32, "bb" * 32, facts.to_json())
    card = ModelCard("aa" * 32, "bb" * 32, facts.shape)
    assert RECIPE.check(statement, card).level == "exact"
    other = replace(card, weights_digest="cc" * 32)
    assert RECIPE.check(statement, other).code == "AG-RCP-012"
    assert RECIPE.check(statement, replace(other, lineage_cosine=0.97)).level == "lineage"
    for cosine in (0.89, math.nan):
        verdict = RECIPE.check(statement, replace(other, lineage_cosine=cosine))
        assert verdict.code == "AG-RCP-013"
    deeper = replace(card, shape=replace(facts.shape, layers=5))
    assert RECIPE.check(statement, deeper).code == "AG-RCP-010"


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "gemma2"])
def test_the_egress_guard_knows_exactly_the_tensors_of_a_graft(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "base")
    made = extract(model, tmp_path / "work", ModuleGraftPlan(9))
    base = read_base(tmp_path / "base")
    allowed = allow_list("module_graft", made.facts.to_json(), base)
    for name, value in load_file(made.files[0]).items():
        assert float(value.square().mean().sqrt()) <= allowed[name].max_rms
    (tmp_path / "out").mkdir()
    rebuild_file(made.files[0], tmp_path / "out" / PAYLOAD, allowed)
    again = replace(made, facts=replace(made.facts, dtype="bfloat16"))
    assert fit(model, tmp_path / "out", again).tensors.keys() == allowed.keys()
    fewer = replace(made.facts, modules=made.facts.modules[1:], scores=made.facts.scores[1:])
    others = allow_list("module_graft", fewer.to_json(), base)
    with pytest.raises(RejectedError, match="AG-PRV-040"):
        rebuild_file(made.files[0], tmp_path / "out" / "x.safetensors", others)
    number, stem = made.facts.modules[0].split(".", 2)[1:]
    respelt = [f"blocks.0{number}.{stem}", f"blocks.{chr(0x660 + int(number))}.{stem}"]
    unknown = ["blocks.9.mlp.c_fc", "blocks.0.ln_1", "blocks.0.input_layernorm", "wte"]
    for module in respelt + unknown:
        with pytest.raises(RejectedError, match="AG-PRV-040"):
            allow_list("module_graft", {"modules": [module]}, base)


def test_null_moves_each_module_as_far(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    graft = fit(model, tmp_path, extract(model, tmp_path, ModuleGraftPlan(4)))
    null = null_packet(graft, model, seed=2)
    assert null.tensors.keys() == graft.tensors.keys()
    for name, value in graft.tensors.items():
        assert not torch.equal(null.tensors[name], value)
        torch.testing.assert_close(null.tensors[name].norm(), value.norm(), rtol=1e-4, atol=0)
    digest = state_digest(model)
    RECIPE.detach(RECIPE.attach(null, model))
    assert state_digest(model) == digest


def test_spectrum_is_that_of_the_modules_actual_difference(tmp_path: Path) -> None:
    model, tuned = tiny_model("llama"), tuned_in_one_place()
    graft = fit(model, tmp_path, extract(model, tmp_path, ModuleGraftPlan(1), tuned))
    figures = weigh_attachment(graft, model)
    assert set(figures) == {"mlp.down_proj.weight"}
    change = 2.0 * model.model.layers[3].mlp.down_proj.weight.detach()
    found = figures["mlp.down_proj.weight"]
    assert found.frobenius == pytest.approx(float(change.norm()), rel=1e-4)
    assert found.sigma == pytest.approx(float(torch.linalg.svdvals(change)[0]), rel=1e-3)


def test_a_private_graft_is_trained_on_several_persons_at_once(tmp_path: Path) -> None:
    constants = DpConstants(0.3, 0.5, 3, 1.0, 5.0, 1e-6, 4)
    for family in ("gpt2", "qwen2"):
        model = tiny_model(family)
        digest = state_digest(model)
        donor = Donor(model, tiny_windows(), tmp_path, private_way="joint")
        plan = Plan(ModuleGraftPlan(3), LoopPlan(steps=3, warmup_steps=1), constants)
        assert RECIPE.extract(donor, plan).report["noise"] == "chacha20"
        assert state_digest(model) == digest


def graft_facts() -> ModuleGraftFacts:
    shape = blocks.describe_model(tiny_model("llama").config)
    return ModuleGraftFacts(shape, (LAST,), (0.5,), "activation", "ab" * 32, "trained", "float32")


@pytest.mark.parametrize(
    "change",
    [
        {"modules": ["blocks.4.mlp.up_proj"]}, {"modules": []}, {"modules": [LAST, LAST]},
        {"modules": ["lm_head"]}, {"scores": []}, {"scores": [-1.0]}, {"ranking": "best"},
        {"source": "found"}, {"dtype": "int8"}, {"scores": [0.5, 0.5]}, {"scores": [0.1234]},
        {"modules": [LAST.replace("3", "03")]}, {"modules": [LAST.replace("3", "\u0663")]},
    ],
)  # fmt: skip
def test_refuses_facts_that_contradict_each_other(change: dict) -> None:
    facts = graft_facts().to_json()
    assert read_facts("module_graft", facts) == graft_facts()
    with pytest.raises(RejectedError, match="AG-RCP-002"):
        read_facts("module_graft", facts | change)


def test_refuses_modules_that_the_family_lacks(tmp_path: Path) -> None:
    facts = replace(graft_facts(), modules=("blocks.0.attn.c_attn",))
    payload = Payload("module_graft", "ab" * 16, tmp_path, facts.to_json())
    with pytest.raises(RejectedError, match="AG-RCP-002"):
        RECIPE.fit(payload, Recipient(tiny_model("llama")))


@pytest.mark.parametrize("how", ["missing", "extra", "shape", "nan"])
def test_refuses_payloads_that_do_not_fit(how: str, tmp_path: Path) -> None:
    model, tuned = tiny_model("llama"), tuned_in_one_place()
    made = extract(model, tmp_path, ModuleGraftPlan(2), tuned)
    tensors = load_file(tmp_path / PAYLOAD)
    name = f"{LAST}.weight"
    if how == "missing":
        del tensors[name]
    elif how == "extra":
        tensors["lm_head.weight"] = torch.zeros(61, 32)
    elif how == "shape":
        tensors[name] = tensors[name].T.contiguous()
    else:
        tensors[name][0, 0] = float("nan")
    save_file(tensors, tmp_path / PAYLOAD)
    with pytest.raises(RejectedError, match="AG-RCP-003"):
        fit(model, tmp_path, made)


def test_refuses_what_cannot_be_made(tmp_path: Path) -> None:
    model = tiny_model("llama")
    cases = (
        (ModuleGraftPlan(29), None, "AG-RCP-035"),
        (LoraPlan(), None, "AG-RCP-035"),
        (ModuleGraftPlan(1), tiny_model("llama"), "AG-RCP-035"),  # nothing changed
        (ModuleGraftPlan(1), tiny_model("qwen3"), "AG-RCP-010"),
    )
    for plan, tuned, code in cases:
        with pytest.raises(RejectedError, match=code):
            extract(model, tmp_path, plan, tuned)
    broken = tuned_in_one_place()
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(RejectedError, match="AG-RCP-033"):
        extract(model, tmp_path, ModuleGraftPlan(1, "change"), broken)
    with pytest.raises(RejectedError, match="AG-RCP-035"):
        read_plan("module_graft", {"modules": 3, "ranking": "best"})
    asked = make_recipe_plan("module_graft", ["modules=3", "ranking=change"])
    assert read_plan("module_graft", asked.to_json()) == asked == ModuleGraftPlan(3, "change")


def test_refuses_double_use(tmp_path: Path) -> None:
    model, tuned = tiny_model("llama"), tuned_in_one_place()
    graft = fit(model, tmp_path, extract(model, tmp_path, ModuleGraftPlan(1), tuned))
    handle = RECIPE.attach(graft, model)
    with pytest.raises(RejectedError, match="AG-RCP-023"):
        RECIPE.attach(graft, model)
    with pytest.raises(RejectedError, match="AG-RCP-022"):
        extract(model, tmp_path)
    with pytest.raises(RejectedError, match="AG-RCP-021"):
        handle.set_dose(1.5)
    RECIPE.detach(handle)
    for act in (lambda: RECIPE.detach(handle), lambda: handle.set_dose(0.5)):
        with pytest.raises(RejectedError, match="AG-RCP-023"):
            act()
    with pytest.raises(RejectedError, match="AG-RCP-010"):
        RECIPE.attach(graft, tiny_model("qwen3"))
    assert not has_attachments(model)
