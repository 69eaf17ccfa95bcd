# SPDX-License-Identifier: Apache-2.0
"""Both kinds on an accelerator: half-precision base, autocast, recomputation, exact removal."""

from pathlib import Path

import pytest
import torch

from allograft.privacy.dp import DpConstants
from allograft.privacy.rowwise import RowwiseSum
from allograft.privacy.train import PersonLoop, check_agreement, check_step
from allograft.recipes import lora, organ
from allograft.recipes.base import (
    Donor,
    Payload,
    Plan,
    Recipient,
    load_recipe,
)
from allograft.recipes.losses import PersonLosses
from allograft.recipes.plan import LoopPlan, LoraPlan, OrganPlan
from allograft.recipes.snapshot import state_digest
from kit.tiny import FAMILIES, tiny_model, tiny_tokens, tiny_windows

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["organ", "lora"])
def test_learns_and_leaves_without_a_trace(kind: str, family: str, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no accelerator answers")
    model = tiny_model(family).to("cuda", torch.bfloat16)
    plain = state_digest(model)
    loop = LoopPlan(steps=12, batch_windows=24, learning_rate=1e-2, checkpointing=True)
    recipe = load_recipe(kind)
    plan = Plan(OrganPlan(1) if kind == "organ" else LoraPlan(rank=4), loop)
    made = recipe.extract(Donor(model, tiny_windows(), tmp_path), plan)
    assert made.report["last_loss"] < made.report["first_loss"]
    assert state_digest(model) == plain

    payload = Payload(kind, "ab" * 16, tmp_path, made.facts.to_json())
    handle = recipe.attach(recipe.fit(payload, Recipient(model)), model)
    ids = tiny_tokens().to("cuda")
    with torch.no_grad():
        full = model(input_ids=ids, use_cache=False).logits
        handle.set_dose(0.0)
        none = model(input_ids=ids, use_cache=False).logits
    assert not torch.equal(full, none)
    recipe.detach(handle)
    assert state_digest(model) == plain


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["organ", "lora"])
def test_several_persons_at_once_add_up_to_the_same(kind: str, family: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no accelerator answers")
    model = tiny_model(family).to("cuda", torch.bfloat16)
    context = (
        organ._growing(model, organ._plan_facts(model, OrganPlan(1)), LoopPlan())
        if kind == "organ"
        else lora._adapted(model, lora._plan_facts(model, LoraPlan(rank=4)), LoopPlan())
    )
    constants = DpConstants(0.5, 1.0, 4, 0.5, 4.0, 1e-5, 2)
    with context:
        parameters = [value for value in model.parameters() if value.requires_grad]
        with torch.no_grad():
            for value in parameters:
                value.add_(0.05 * torch.randn_like(value))
        losses = PersonLosses(
            lambda _, tokens: model(input_ids=tokens, use_cache=False).logits,
            tiny_windows(), 2, 16, torch.device("cuda"),
        )  # fmt: skip
        rows = RowwiseSum(model, parameters, losses)
        loop = PersonLoop(parameters, losses.loss_of)
        check_agreement(parameters, constants, len(losses), (rows, loop))
        assert check_step(parameters, constants, len(losses), rows).sensitivity <= 1.0001
