# SPDX-License-Identifier: Apache-2.0
"""DoRA and rsLoRA are PEFT's to the last digit; a frozen A is drawn alike by everyone."""

import hashlib
import math
import struct
import warnings
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
from allograft.recipes.attachment import load_attachment, save_attachment
from allograft.recipes.base import Attachment, Donor, Extract, Payload, Plan, Recipient
from allograft.recipes.controls import null_packet
from allograft.recipes.export import export_peft
from allograft.recipes.frozen import draw_a
from allograft.recipes.lora import PAYLOAD, LoraRecipe, changes_of
from allograft.recipes.patch import folded, has_attachments, make_dense
from allograft.recipes.plan import LoopPlan, LoraPlan, read_recipe_plan
from allograft.recipes.snapshot import state_digest
from allograft.recipes.stack import Stack
from kit.tiny import FAMILIES, generate, logits_of, tiny_model, tiny_windows

LOOP = LoopPlan(steps=6, batch_windows=24, learning_rate=1e-2, warmup_steps=2)
RECIPE = LoraRecipe()
SEED = "wards-of-the-north.2026"
PLANS = {
    "rslora": LoraPlan(rank=4, rslora=True),
    "dora": LoraPlan(rank=4, dora=True),
    "both": LoraPlan(rank=4, rslora=True, dora=True),
    "frozen": LoraPlan(rank=4, frozen_a=SEED),
}


def make(
    model, workdir: Path, plan: LoraPlan, packet_id: str = "cd" * 16, **loop
) -> tuple[Extract, Attachment]:
    workdir.mkdir(exist_ok=True)
    made = RECIPE.extract(Donor(model, tiny_windows(), workdir), Plan(plan, replace(LOOP, **loop)))
    return made, fit(model, workdir, made, packet_id)


def fit(model, workdir: Path, made: Extract, packet_id: str = "cd" * 16) -> Attachment:
    return RECIPE.fit(Payload("lora", packet_id, workdir, made.facts.to_json()), Recipient(model))


def load_with_peft(model, directory: Path):
    import peft

    with warnings.catch_warnings():
        # PEFT reads a property that transformers 5.23 has renamed.
        warnings.filterwarnings(
            "ignore", message=".*is_gradient_checkpointing", category=FutureWarning
        )
        return peft.PeftModel.from_pretrained(model, directory).eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", ["rslora", "dora", "frozen"])
def test_variants_learn_fit_and_leave_the_base_as_it_was(
    family: str, variant: str, tmp_path: Path
) -> None:
    model = tiny_model(family)
    digest, before = state_digest(model), logits_of(model)
    made, attachment = make(model, tmp_path, PLANS[variant])
    assert state_digest(model) == digest
    assert made.report["last_loss"] < made.report["first_loss"]
    assert all(value.requires_grad and value.grad is None for value in model.parameters())
    handle = RECIPE.attach(attachment, model)
    full = logits_of(model)
    assert generate(model, use_cache=True) == generate(model, use_cache=False)
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
@pytest.mark.parametrize(
    ("variant", "dose"), [("rslora", 0.3), ("dora", 1.0), ("both", 0.3), ("frozen", 1.0)]
)
def test_peft_loads_exported_variants_and_merges_to_equal_weights(
    family: str, variant: str, dose: float, tmp_path: Path
) -> None:
    model = tiny_model(family)
    _, attachment = make(model, tmp_path, PLANS[variant])
    attachment = replace(attachment, dose=dose)
    model.save_pretrained(tmp_path / "base")
    export_peft(attachment, tmp_path / "adapter", base=tmp_path / "base")
    theirs = load_with_peft(tiny_model(family), tmp_path / "adapter")
    RECIPE.attach(attachment, model)
    torch.testing.assert_close(logits_of(model), logits_of(theirs), rtol=1e-4, atol=1e-4)
    merged = theirs.merge_and_unload().state_dict()
    base = tiny_model(family).state_dict()
    changed = 0
    with folded(model):
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, merged[name], rtol=2e-6, atol=2e-6)
            changed += not torch.equal(value, base[name])
    assert changed == 4 * (4 if family == "gpt2" else 7)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_dora_at_a_part_of_its_dose_is_a_step_on_the_straight_line(
    family: str, tmp_path: Path
) -> None:
    model = tiny_model(family)
    _, attachment = make(model, tmp_path, PLANS["dora"])
    names = [name for name, value in model.named_parameters() if value.ndim == 2]
    states = []
    for dose in (0.0, 0.25, 1.0):
        handle = RECIPE.attach(replace(attachment, dose=dose), model)
        states.append({name: model.state_dict()[name].clone() for name in names})
        RECIPE.detach(handle)
    start, part, end = states
    for name in names:
        line = start[name] + 0.25 * (end[name] - start[name])
        torch.testing.assert_close(part[name], line, rtol=1e-5, atol=1e-6)


def test_dora_at_a_part_of_its_dose_needs_the_base_to_be_exported(tmp_path: Path) -> None:
    _, attachment = make(tiny_model("llama"), tmp_path, PLANS["dora"])
    with pytest.raises(RejectedError, match="AG-RCP-024"):
        export_peft(replace(attachment, dose=0.5), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_row_without_length_stays_zero_instead_of_becoming_nan(tmp_path: Path) -> None:
    model = tiny_model("llama")
    _, attachment = make(model, tmp_path, PLANS["dora"])
    name = "base_model.model.model.layers.2.mlp.up_proj"
    attachment.tensors[f"{name}.lora_B.weight"][3] = 0.0
    weight = model.model.layers[2].mlp.up_proj.weight
    with torch.no_grad():
        weight[3] = 0.0
    digest = state_digest(model)
    handle = RECIPE.attach(attachment, model)
    assert torch.equal(weight[3], torch.zeros_like(weight[3]))
    assert bool(torch.isfinite(logits_of(model)).all())
    RECIPE.detach(handle)
    assert state_digest(model) == digest


def test_variants_stack_in_any_order(tmp_path: Path) -> None:
    """DoRA's change is of the base's own weights, whatever else is on the matrix."""
    model = tiny_model("qwen3")
    plain = state_digest(model)
    made = [
        make(model, tmp_path / name, plan, f"{number}" * 32)[1]
        for number, (name, plan) in enumerate(PLANS.items())
    ]
    digests = set()
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        stack = Stack(model)
        for number in order:
            stack.attach(made[number])
        digests.add(state_digest(model))
        for number in order:
            stack.detach(made[number].attachment_id)
        assert state_digest(model) == plain
    assert len(digests) == 1


def test_rslora_scales_by_the_root_of_the_rank(tmp_path: Path) -> None:
    model = tiny_model("llama")
    _, attachment = make(model, tmp_path, LoraPlan(rank=9, alpha=6.0, rslora=True))
    assert attachment.facts.settings.scale == 2.0
    assert {change.scale for _, _, change in changes_of(attachment, model)} == {2.0}


def test_a_variant_survives_being_stored(tmp_path: Path) -> None:
    model = tiny_model("mistral")
    for name, plan in PLANS.items():
        _, attachment = make(model, tmp_path / name, plan)
        save_attachment(attachment, tmp_path / name / "kept")
        again = load_attachment(tmp_path / name / "kept")
        assert again.facts == attachment.facts
        assert again.tensors.keys() == attachment.tensors.keys()
        assert read_recipe_plan("lora", plan.to_json()) == plan


def drawn_by_another_hand(seed: str, module: str, row: int, column: int, inputs: int) -> float:
    """One entry of A as the specification words it, without any array library."""
    message = f"allograft lora A v1\n{seed}\n{module}".encode()
    place = 4 * (row * inputs + column)
    (word,) = struct.unpack("<I", hashlib.shake_256(message).digest(place + 4)[place:])
    value = (2 * (word >> 8) + 1 - 2**24) / 2**24 * (1.0 / math.sqrt(inputs))
    return struct.unpack("<f", struct.pack("<f", value))[0]


def test_frozen_a_is_drawn_as_the_specification_says() -> None:
    module = "base_model.model.model.layers.3.self_attn.q_proj"
    a = draw_a(SEED, module, 8, 48)
    assert (a.dtype, a.shape) == (torch.float32, (8, 48))
    for row, column in ((0, 0), (0, 47), (3, 5), (7, 47)):
        assert float(a[row, column]) == drawn_by_another_hand(SEED, module, row, column, 48)
    # Pinned: consortia hold adapters that were trained on these bits.
    digest = hashlib.sha256(a.numpy().tobytes()).hexdigest()
    assert digest == "c9aefb42809539e46ed46ce67143c7960c8f9b0a574c9bfa21fda4f80d3848ae"
    assert torch.equal(draw_a(SEED, module, 4, 48), a[:4])
    assert not torch.equal(draw_a("other", module, 8, 48), a)
    assert not torch.equal(draw_a(SEED, module.replace(".3.", ".2."), 8, 48), a)


def test_frozen_a_has_the_spread_of_pefts_own_initialisation() -> None:
    a = draw_a(SEED, "m", 64, 256)
    assert float(a.abs().max()) < 1 / 16
    assert abs(float(a.mean())) < 1e-3
    torch.testing.assert_close(float(a.std()), 1 / 16 / math.sqrt(3), rtol=0.02, atol=0.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_b_travels_with_a_frozen_a_and_the_recipient_draws_the_rest(
    family: str, tmp_path: Path
) -> None:
    model = tiny_model(family)
    _, attachment = make(model, tmp_path / "frozen", PLANS["frozen"])
    make(model, tmp_path / "whole", LoraPlan(rank=4))
    ours, whole = (load_file(tmp_path / name / PAYLOAD) for name in ("frozen", "whole"))
    assert not any("lora_A" in name for name in ours)
    assert ours.keys() == {name for name in whole if "lora_B" in name}
    for name in ours:
        stem = name.removesuffix(".lora_B.weight")
        a = attachment.tensors[f"{stem}.lora_A.weight"]
        assert torch.equal(a, draw_a(SEED, stem, *a.shape))


def test_adapters_on_one_frozen_a_average_exactly(tmp_path: Path) -> None:
    model = tiny_model("llama")
    kept = [make(model, tmp_path / str(seed), PLANS["frozen"], seed=seed)[1] for seed in range(2)]
    mean = replace(
        kept[0],
        tensors={n: (v + kept[1].tensors[n]) / 2 for n, v in kept[0].tensors.items()},
    )
    changes = [
        [
            make_dense(change, module.weight.detach())
            for _, module, change in changes_of(made, model)
        ]
        for made in (*kept, mean)
    ]
    for first, second, both in zip(*changes, strict=True):
        assert not torch.equal(first, second)
        torch.testing.assert_close(both, (first + second) / 2, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("variant", ["dora", "frozen"])
def test_the_egress_guard_knows_exactly_the_tensors_of_a_variant(
    family: str, variant: str, tmp_path: Path
) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "base")
    made, attachment = make(model, tmp_path / "work", PLANS[variant])
    allowed = allow_list("lora", made.facts.to_json(), read_base(tmp_path / "base"))
    for name, value in load_file(made.files[0]).items():
        assert float(value.square().mean().sqrt()) <= allowed[name].max_rms
    (tmp_path / "out").mkdir()
    rebuild_file(made.files[0], tmp_path / "out" / PAYLOAD, allowed)
    again = replace(made, facts=replace(made.facts, dtype="bfloat16"))
    refitted = fit(model, tmp_path / "out", again)
    assert refitted.tensors.keys() == attachment.tensors.keys()
    plain = made.facts.to_json() | {"dora": False, "frozen_a": ""}
    others = allow_list("lora", plain, read_base(tmp_path / "base"))
    with pytest.raises(RejectedError, match="AG-PRV-040"):
        rebuild_file(made.files[0], tmp_path / "out" / "x.safetensors", others)


@pytest.mark.parametrize("how", ["missing", "long", "nan"])
def test_refuses_lengths_that_do_not_fit(how: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    made, _ = make(model, tmp_path, PLANS["dora"])
    tensors = load_file(tmp_path / PAYLOAD)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_magnitude_vector"
    if how == "missing":
        del tensors[name]
    elif how == "long":
        tensors[name] = torch.ones(49)
    else:
        tensors[name][0] = float("nan")
    save_file(tensors, tmp_path / PAYLOAD)
    with pytest.raises(RejectedError, match="AG-RCP-003"):
        fit(model, tmp_path, made)


def test_refuses_a_shipped_a_where_it_is_drawn(tmp_path: Path) -> None:
    model = tiny_model("llama")
    made, attachment = make(model, tmp_path, PLANS["frozen"])
    save_file(dict(attachment.tensors), tmp_path / PAYLOAD)
    with pytest.raises(RejectedError, match="AG-RCP-003"):
        fit(model, tmp_path, made)


@pytest.mark.parametrize(
    "plan",
    [
        LoraPlan(frozen_a="a\nb"), LoraPlan(frozen_a="Upper"), LoraPlan(frozen_a="n" * 65),
        LoraPlan(frozen_a=SEED, dora=True),
    ],
)  # fmt: skip
def test_refuses_settings_that_mean_nothing(plan: LoraPlan, tmp_path: Path) -> None:
    with pytest.raises(RejectedError, match="AG-PKT-009"):
        make(tiny_model("llama"), tmp_path, plan)


@pytest.mark.parametrize("variant", ["dora", "frozen"])
def test_null_keeps_what_everyone_knows_and_moves_the_rest_as_far(
    variant: str, tmp_path: Path
) -> None:
    model = tiny_model("gemma2")
    _, attachment = make(model, tmp_path, PLANS[variant])
    null = null_packet(attachment, model, seed=1)
    for name, value in attachment.tensors.items():
        if variant == "frozen" and "lora_A" in name:
            assert torch.equal(null.tensors[name], value)
        elif "magnitude" in name:
            target = name.removeprefix("base_model.model.").removesuffix(".lora_magnitude_vector")
            lengths = model.get_submodule(target).weight.norm(dim=1)
            moved, far = null.tensors[name] - lengths, value - lengths
            assert 0 < far.norm() < 0.5 * lengths.norm()
            torch.testing.assert_close(moved.norm(), far.norm(), rtol=1e-2, atol=1e-5)
        else:
            torch.testing.assert_close(null.tensors[name].norm(), value.norm(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("variant", list(PLANS))
def test_spectrum_is_that_of_the_weights_actual_difference(variant: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    _, attachment = make(model, tmp_path, PLANS[variant])
    figures = weigh_attachment(replace(attachment, dose=0.1), model)["mlp.down_proj"]
    before = {n: v.clone() for n, v in model.state_dict().items() if "down_proj" in n}
    RECIPE.attach(attachment, model)
    with folded(model):
        changes = [model.state_dict()[n] - v for n, v in before.items()]
    sigma = max(float(torch.linalg.svdvals(change)[0]) for change in changes)
    assert figures.sigma == pytest.approx(sigma, rel=1e-3)
    frobenius = max(float(change.norm()) for change in changes)
    assert figures.frobenius == pytest.approx(frobenius, rel=1e-3)


def test_private_dora_takes_persons_one_at_a_time_and_frozen_a_several(tmp_path: Path) -> None:
    """DoRA's lengths belong to no layer that can be summed by rows; nothing is guessed."""
    constants = DpConstants(0.3, 0.5, 3, 1.0, 5.0, 1e-6, 4)
    loop = LoopPlan(steps=3, warmup_steps=1)
    for way, variant, works in (
        ("auto", "dora", True), ("joint", "dora", False), ("joint", "frozen", True),
    ):  # fmt: skip
        model = tiny_model("llama")
        digest = state_digest(model)
        donor = Donor(model, tiny_windows(), tmp_path, private_way=way)
        plan = Plan(PLANS[variant], loop, constants)
        if works:
            assert RECIPE.extract(donor, plan).report["noise"] == "chacha20"
        else:
            with pytest.raises(RejectedError, match="AG-PRV-080"):
                RECIPE.extract(donor, plan)
        assert state_digest(model) == digest


def test_dora_of_a_half_precision_base_is_computed_in_full_precision(tmp_path: Path) -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    digest = state_digest(model)
    _, attachment = make(model, tmp_path, PLANS["dora"])
    handle = RECIPE.attach(attachment, model)
    a, b, lengths = (
        attachment.tensors[f"base_model.model.model.layers.0.mlp.up_proj.{name}"].float()
        for name in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    )
    base = tiny_model("llama").to(torch.bfloat16).model.layers[0].mlp.up_proj.weight.float()
    changed = base + 4.0 * b @ a
    changed *= (lengths / changed.norm(dim=1))[:, None]
    weight = model.model.layers[0].mlp.up_proj.weight
    torch.testing.assert_close(weight, changed.to(torch.bfloat16), rtol=0, atol=1e-6)
    RECIPE.detach(handle)
    assert state_digest(model) == digest
