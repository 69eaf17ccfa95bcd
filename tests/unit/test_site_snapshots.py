# SPDX-License-Identifier: Apache-2.0
"""A donation from a snapshot that was trained elsewhere: only where nobody's privacy is claimed."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from allograft.errors import RejectedError
from allograft.provenance.lineage import digest_weights
from allograft.recipes.plan import DeltaPlan, OrganPlan
from allograft_client.plan import DonationPlan
from allograft_client.tasks import perform
from kit.tiny import tiny_model, write_model

OPEN = DonationPlan(
    model="ward",
    kind="delta",
    data=Path("/private/notes.txt"),
    mode="open",
    nature="synthetic",
    declared_by="data-owner",
    domain="cardiology",
    recipe=DeltaPlan(bits=8),
    tuned="ward-tuned",
    stage="post-sft",
)

MEASURED = {"mode": "measured", "nature": "", "declared_by": "", "privacy_plan": "p"}


def test_provenance_says_snapshots_and_neither_where_nor_how_they_were_trained() -> None:
    public = OPEN.check().public_json()
    assert public["source"] == "snapshots"
    assert "loop" not in public
    assert "/private" not in str(public)
    assert "ward-tuned" not in str(public)
    assert DonationPlan.from_json(OPEN.to_json()) == OPEN


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "organ", "recipe": OrganPlan()},
        {"tuned": ""},
        MEASURED,
        {**MEASURED, "tuned": "", "stage": "base", "recipe": DeltaPlan(embeddings=True)},
        {"recipe": DeltaPlan(bits=5)},
    ],
)
def test_refuses_snapshots_where_they_cannot_be_meant(
    changes: dict[str, object],
) -> None:
    with pytest.raises(RejectedError, match="AG-RCP-035"):
        replace(OPEN, **changes).check()


def test_a_worker_compares_two_directories_and_trains_nothing(tmp_path: Path) -> None:
    write_model(tmp_path / "base")
    tuned = tiny_model("llama")
    with torch.no_grad():
        tuned.model.layers[2].mlp.up_proj.weight.add_(0.1)
    tuned.save_pretrained(tmp_path / "tuned")
    (tmp_path / "work").mkdir()
    task = {
        "task": "train",
        "model": str(tmp_path / "base"),
        "workdir": str(tmp_path / "work"),
        "plan": {**OPEN.training_json()},
        "tuned": str(tmp_path / "tuned"),
        "tuned_digest": digest_weights(tmp_path / "tuned"),
        "stage": "post-sft",
        "base_digest": digest_weights(tmp_path / "base"),
    }
    stages: list[object] = []
    result = perform(task, stages.append)
    assert result["files"] == ["delta.safetensors"]
    # One number was added everywhere: a change of rank one, in one matrix.
    ranks = result["facts"]["ranks"]
    assert ranks.pop("mlp.up_proj.weight") == [[0, 0], [0, 0], [1, 0], [0, 0]]
    assert all(pair == [0, 0] for pairs in ranks.values() for pair in pairs)
    assert result["report"]["energy_kept"] > 0.999
    with pytest.raises(RejectedError, match="AG-RCP-012"):
        perform({**task, "base_digest": "0" * 64}, stages.append)
    with torch.no_grad():
        tuned.model.layers[1].mlp.up_proj.weight.add_(0.1)
    tuned.save_pretrained(tmp_path / "tuned")
    with pytest.raises(RejectedError, match="AG-RCP-028"):  # edited after it was added
        perform(task, stages.append)
