# SPDX-License-Identifier: Apache-2.0
"""Both kinds on a real trained model and real medical text: they learn what was held out."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from allograft.recipes.base import (
    Donor,
    Payload,
    Plan,
    Recipient,
    load_recipe,
)
from allograft.recipes.controls import null_packet
from allograft.recipes.documents import read_documents, split_documents
from allograft.recipes.export import export_merged
from allograft.recipes.losses import token_losses
from allograft.recipes.plan import LoopPlan, LoraPlan, OrganPlan
from allograft.recipes.snapshot import load_model, load_tokenizer, state_digest
from allograft.recipes.stack import Stack
from allograft.recipes.windows import Windows, make_windows
from kit.shared import shared_path


@torch.no_grad()
def mean_loss(model, windows: Windows) -> float:
    logits = model(input_ids=windows.tokens, use_cache=False).logits
    losses = token_losses(logits, windows.tokens, windows.lengths)
    return float(losses.sum() / (windows.lengths - 1).sum())


@pytest.mark.parametrize(
    ("kind", "recipe"), [("organ", OrganPlan(1)), ("lora", LoraPlan(rank=8))], ids=["organ", "lora"]
)
def test_held_out_medical_text_gets_likelier(
    kind: str, recipe: OrganPlan | LoraPlan, tmp_path: Path
) -> None:
    directory = shared_path("data/models/stories260K/hf")
    documents = read_documents(shared_path("data/medical/medquad.jsonl.gz"))[:400]
    model, tokenizer = load_model(directory), load_tokenizer(directory)
    plain = state_digest(model)
    train, held_out = split_documents(documents, 0.1)
    texts = [make_windows(part, tokenizer, 96) for part in (train, held_out[:5])]
    loop = LoopPlan(steps=40, batch_windows=8, learning_rate=5e-3, warmup_steps=4)

    code = load_recipe(kind)
    made = code.extract(Donor(model, texts[0], tmp_path), Plan(recipe, loop))
    assert state_digest(model) == plain
    payload = Payload(kind, "ab" * 16, tmp_path, made.facts.to_json())
    attachment = code.fit(payload, Recipient(model))

    before = mean_loss(model, texts[1])
    stack = Stack(model)
    handle = stack.attach(attachment)
    after = mean_loss(model, texts[1])
    handle.set_dose(0.5)
    half = mean_loss(model, texts[1])
    assert after < half < before - 0.1

    export_merged(stack, tokenizer, tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert mean_loss(again, texts[1]) == pytest.approx(half, abs=1e-6)
    ids = tokenizer("Once upon a time", return_tensors="pt")
    tales = [
        again.generate(**ids, max_new_tokens=32, do_sample=False, use_cache=use, pad_token_id=0)
        for use in (True, False)
    ]
    assert torch.equal(*tales)

    stack.detach(attachment.attachment_id)
    assert state_digest(model) == plain
    noise = null_packet(attachment, model, seed=1)
    stack.attach(noise)
    assert mean_loss(model, texts[1]) > after
    stack.detach(noise.attachment_id)
    assert state_digest(model) == plain
