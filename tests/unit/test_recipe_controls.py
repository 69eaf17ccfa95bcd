# SPDX-License-Identifier: Apache-2.0
"""A change that is turned at random keeps its size and form, and loses its place."""

from pathlib import Path

import pytest
import torch

from allograft.recipes.base import Attachment, Donor, Payload, Plan, Recipient, load_recipe
from allograft.recipes.controls import rotated_packet, starting_point
from allograft.recipes.delta import delta_places, packed_directions
from allograft.recipes.factors import unpack
from allograft.recipes.plan import (
    DeltaPlan,
    ExpertPlan,
    LoopPlan,
    LoraPlan,
    ModuleGraftPlan,
    OrganPlan,
    PromptPlan,
    RecipePlan,
)
from allograft.recipes.snapshot import state_digest
from kit.tiny import logits_of, tiny_model, tiny_windows

KINDS: dict[str, tuple[str, RecipePlan]] = {
    "organ": ("organ", OrganPlan(2, 1, 3)),
    "replaced": ("organ", OrganPlan(1, 2, 2, "replace")),
    "lora": ("lora", LoraPlan(rank=2)),
    "delta": ("delta", DeltaPlan(bits=8, energy=1.0, vectors=True, embeddings=True)),
    "module_graft": ("module_graft", ModuleGraftPlan()),
    "prompt": ("prompt", PromptPlan(virtual_tokens=4)),
    "expert": ("expert", ExpertPlan()),
}


def make(name: str, model, workdir: Path) -> Attachment:
    kind, plan = KINDS[name]
    recipe = load_recipe(kind)
    loop = LoopPlan(steps=2, batch_windows=8, learning_rate=1e-2, warmup_steps=0)
    made = recipe.extract(Donor(model, tiny_windows(), workdir), Plan(plan, loop))
    return recipe.fit(Payload(kind, "a" * 32, workdir, made.facts.to_json()), Recipient(model))


def changes(attachment: Attachment, model) -> dict[str, torch.Tensor]:
    """Every matrix of a packet's change; of a LoRA's the product."""
    if attachment.kind == "delta":
        places = delta_places(model)
        shapes = {t: module.get_parameter(n).shape for t, (module, n) in places.items()}
        found = {}
        for target, packed in packed_directions(attachment).items():
            left, right = unpack(packed, *shapes[target])
            found[target] = left.T @ right
        return found
    if attachment.kind == "lora":
        downs = {n: v for n, v in attachment.tensors.items() if "lora_A" in n}
        return {n: attachment.tensors[n.replace("_A", "_B")] @ v for n, v in downs.items()}
    start = starting_point(attachment, model)
    return {
        name: value - start.get(name, torch.zeros_like(value))
        for name, value in attachment.tensors.items()
        if value.dim() == 2
    }


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("name", KINDS)
def test_a_turned_change_has_the_singular_values_and_not_the_directions(
    name: str, family: str, tmp_path: Path
) -> None:
    model = tiny_model(family)
    attachment = make(name, model, tmp_path)
    turned = rotated_packet(attachment, model, seed=3)
    before, after = changes(attachment, model), changes(turned, model)
    # Whole numbers are rounded a second time.
    slack = 0.03 if attachment.kind == "delta" else 1e-4
    cosines = []
    for key, value in before.items():
        theirs, ours = (torch.linalg.svdvals(each) for each in (value, after[key]))
        torch.testing.assert_close(ours, theirs, rtol=slack, atol=slack * float(theirs[0]) + 1e-9)
        if float(theirs[0]) > 1e-6:
            product = (value * after[key]).sum() / (value.norm() * after[key].norm())
            cosines.append(abs(float(product)))
    # Of matrices of a few hundred numbers one may point somewhat the same way.
    assert sum(cosines) / len(cosines) < 0.3
    again = rotated_packet(attachment, model, seed=3)
    assert all(torch.equal(value, again.tensors[key]) for key, value in turned.tensors.items())
    other = rotated_packet(attachment, model, seed=4)
    assert any(not torch.equal(value, other.tensors[key]) for key, value in turned.tensors.items())


@pytest.mark.parametrize("name", KINDS)
def test_a_turned_packet_comes_and_goes_like_the_packet(name: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    turned = rotated_packet(make(name, model, tmp_path), model, seed=0)
    plain, before = state_digest(model), logits_of(model)
    recipe = load_recipe(turned.kind)
    handle = recipe.attach(turned, model)
    assert not torch.equal(logits_of(model)[..., -1, :], before[..., -1, :])
    recipe.detach(handle)
    assert state_digest(model) == plain
    assert torch.equal(logits_of(model), before)
