# SPDX-License-Identifier: Apache-2.0
"""An opened lora is a directory that PEFT itself loads, with the donor's logits."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from allograft.packet import adapter, tensors
from allograft.recipes.blocks import FAMILIES

# peft reads an attribute that transformers 5 has renamed; neither is ours to change.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize(
    ("build", "family", "modules"),
    [(llama, "llama", ("q_proj", "down_proj")), (gpt2, "gpt2", ("c_attn",))],
)
def test_peft_loads_the_rebuilt_directory(tmp_path, build, family, modules):
    transposed = adapter.is_transposed(family)
    donor = get_peft_model(
        build(),
        LoraConfig(
            r=4, lora_alpha=8, target_modules=list(modules), fan_in_fan_out=transposed,
            init_lora_weights=False, task_type="CAUSAL_LM",
        ),
    )  # fmt: skip
    raw = {
        name: tensors.RawTensor("F32", tuple(value.shape), value.detach().numpy().tobytes())
        for name, value in get_peft_model_state_dict(donor).items()
    }
    with (tmp_path / "adapter_model.safetensors").open("wb") as sink:
        tensors.write_tensors(sink, raw)
    settings = adapter.AdapterSettings(4, 8.0, modules)
    config = adapter.render_adapter_config(settings, transposed=transposed)
    (tmp_path / adapter.CONFIG_NAME).write_bytes(config)
    loaded = PeftModel.from_pretrained(build(), tmp_path).eval()
    ids = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, donor.eval()(ids).logits)
        assert not torch.equal(loaded(ids).logits, build()(ids).logits)


def test_families_agree_on_who_is_transposed():
    for family, known in FAMILIES.items():
        assert adapter.is_transposed(family) == known.transposed
