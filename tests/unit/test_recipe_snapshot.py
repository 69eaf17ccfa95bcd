# SPDX-License-Identifier: Apache-2.0
"""Model directories are loaded without running anything from them; digests name exact states."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertLMHeadModel

from allograft.errors import RejectedError
from allograft.recipes import blocks
from allograft.recipes.attachment import is_finite
from allograft.recipes.snapshot import load_model, load_tokenizer, state_digest
from kit.tiny import FAMILIES, logits_of, tiny_model, write_model


@pytest.mark.parametrize("family", FAMILIES)
def test_model_directory_loads_to_the_same_state(family: str, tmp_path: Path) -> None:
    model = write_model(tmp_path, family)
    again = load_model(tmp_path)
    assert not again.training
    assert torch.equal(logits_of(again), logits_of(model))
    assert state_digest(again) == state_digest(load_model(tmp_path))


def test_half_precision_on_disk_is_full_precision_on_a_cpu(tmp_path: Path) -> None:
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    assert {value.dtype for value in load_model(tmp_path).parameters()} == {torch.float32}


def test_refuses_pickled_weights(tmp_path: Path) -> None:
    model = write_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(RejectedError, match="AG-RCP-032"):
        load_model(tmp_path)


def test_refuses_remote_code_without_running_it(tmp_path: Path) -> None:
    write_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "evil.EvilConfig",
        "AutoModelForCausalLM": "evil.EvilModel",
    }
    config["model_type"] = "evil"
    (tmp_path / "config.json").write_text(json.dumps(config))
    marker = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    with pytest.raises(RejectedError, match="AG-RCP-032"):
        load_model(tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize("broken", ["config.json", "model.safetensors"])
def test_refuses_incomplete_and_damaged_directories(broken: str, tmp_path: Path) -> None:
    with pytest.raises(RejectedError, match="AG-RCP-032"):
        load_model(tmp_path)
    write_model(tmp_path)
    (tmp_path / broken).write_bytes(b"{broken")
    with pytest.raises(RejectedError, match="AG-RCP-032"):
        load_model(tmp_path)


def test_refuses_weights_with_gaps_instead_of_inventing_them(tmp_path: Path) -> None:
    write_model(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RejectedError, match="1 of its tensors"):
        load_model(tmp_path)


def test_loads_tied_heads_that_files_leave_out(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert torch.equal(logits_of(load_model(tmp_path)), logits_of(model))


def test_refuses_families_that_are_not_supported(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        is_decoder=True,
    )
    BertLMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(RejectedError, match="AG-RCP-020"):
        load_model(tmp_path)


def test_refuses_a_directory_without_tokenizer(tmp_path: Path) -> None:
    write_model(tmp_path)
    with pytest.raises(RejectedError, match="AG-RCP-032"):
        load_tokenizer(tmp_path)


def test_digest_sees_one_bit_one_slot_and_one_setting() -> None:
    model = tiny_model("llama")
    digests = {state_digest(model)}
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        old = weight[0, 0].item()
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
        digests.add(state_digest(model))
        weight[0, 0] = old
    model.model.layers[0].self_attn.layer_idx = 3
    digests.add(state_digest(model))
    model.model.layers[0].self_attn.layer_idx = 0
    model.config.rms_norm_eps *= 2
    digests.add(state_digest(model))
    model.config.rms_norm_eps /= 2
    assert len(digests) == 4
    assert state_digest(model) in digests


def test_digest_covers_half_precision_and_inserted_blocks() -> None:
    model = tiny_model("gpt2").to(torch.bfloat16)
    before = state_digest(model)
    made = blocks.copy_blocks(model, 0, 1)
    blocks.insert_blocks(model, made, 0, 1, "organ-a")
    assert state_digest(model) != before
    assert all(value.dtype == torch.bfloat16 for value in made[0].parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_entry_that_is_not_finite_is_found_wherever_it_stands(
    bad: float, dtype: torch.dtype
) -> None:
    value = torch.randn(37, 19).to(dtype)
    assert is_finite(value)
    for place in (0, 350, 702):
        spoilt = value.clone()
        spoilt.view(-1)[place] = bad
        assert not is_finite(spoilt)
        assert not is_finite(torch.nn.Parameter(spoilt))
    assert is_finite(torch.zeros(0, 3, dtype=dtype))
    assert is_finite(torch.tensor([0, 255], dtype=torch.uint8))
