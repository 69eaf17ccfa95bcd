# SPDX-License-Identifier: Apache-2.0
"""What a recipe extracts passes the egress guard and the gates, and a recipient can fit it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from allograft.privacy import egress, gates, shapes
from allograft.recipes.base import Donor, Payload, Plan, Recipient, load_recipe
from allograft.recipes.plan import DeltaPlan, LoopPlan, LoraPlan, OrganPlan, RecipePlan
from allograft.recipes.snapshot import load_model
from kit.tiny import tiny_model, tiny_windows

EXTRACTS: dict[str, tuple[str, RecipePlan]] = {
    "insert": ("organ", OrganPlan()),
    "replace": ("organ", OrganPlan(1, mode="replace")),
    "insert-8": ("organ", OrganPlan(wire_bits=8)),
    "replace-8": ("organ", OrganPlan(1, mode="replace", wire_bits=8)),
    "lora": ("lora", LoraPlan(rank=2)),
    "delta": ("delta", DeltaPlan(vectors=True, embeddings=True)),
}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("made", EXTRACTS)
@pytest.mark.parametrize("wire", ["bf16", "f32"])
def test_an_extract_survives_the_way_out(tmp_path: Path, made: str, family: str, wire: str) -> None:
    kind, choice = EXTRACTS[made]
    tiny_model(family).save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base")
    (tmp_path / "work").mkdir()
    (tmp_path / "payload").mkdir()
    recipe = load_recipe(kind)
    plan = Plan(choice, LoopPlan(steps=2, batch_windows=2))
    extract = recipe.extract(Donor(model, tiny_windows(), tmp_path / "work"), plan)

    facts = egress.with_wire_dtype(extract.facts.to_json(), wire)
    allowed = shapes.allow_list(kind, facts, shapes.read_base(tmp_path / "base"))
    (source,) = extract.files
    part = egress.rebuild_file(source, tmp_path / "payload" / source.name, allowed, wire)
    submission = gates.Submission(
        kind, tmp_path / "payload", allowed, wire, (("statement", {"facts": facts}),)
    )
    gates.check_results(gates.run_gates(submission))
    assert part.size_bytes < source.stat().st_size or wire == "f32"

    payload = Payload(kind, "5" * 32, tmp_path / "payload", facts)
    attachment = recipe.fit(payload, Recipient(model))
    ids = torch.tensor([[1, 2, 3, 4]])
    before = model(input_ids=ids).logits
    handle = recipe.attach(replace(attachment, dose=1.0), model)
    assert not torch.equal(model(input_ids=ids).logits, before)
    recipe.detach(handle)
    assert torch.equal(model(input_ids=ids).logits, before)
