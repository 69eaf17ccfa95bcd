# SPDX-License-Identifier: Apache-2.0
"""Random models of every supported family, small enough to train in a second."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from allograft.recipes.windows import Windows

FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")

VOCAB = 61
LAYERS = 4
_SLIDING = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_model(family: str, seed: int = 1, **changes: object) -> PreTrainedModel:
    """A random model with strong weights, so that a wrong block shows in its logits."""
    torch.manual_seed(seed)
    common = _COMMON | changes
    headed = common | {"head_dim": 8}
    if family == "gpt2":
        layout = {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 96}
        ids = {"bos_token_id": 1, "eos_token_id": 2}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, **(layout | ids | changes)))
    elif family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**headed))
    elif family == "mistral":
        model = MistralForCausalLM(MistralConfig(**headed, sliding_window=8))
    elif family == "qwen2":
        types = {"layer_types": _SLIDING, "sliding_window": 8, "use_sliding_window": True}
        model = Qwen2ForCausalLM(Qwen2Config(**(common | types | changes)))
    elif family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**headed))
    elif family == "gemma2":
        types = {"layer_types": _SLIDING, "sliding_window": 8}
        model = Gemma2ForCausalLM(Gemma2Config(**(headed | types | changes)))
    else:
        types = {"layer_types": _SLIDING, "sliding_window": 8}
        model = Gemma3ForCausalLM(Gemma3TextConfig(**(headed | types | changes)))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 2 and "wpe" not in name:
                value.mul_(4.0)
            elif "norm" in name or "ln_" in name or name.endswith("bias"):
                value.add_(0.1 * torch.randn_like(value))
    return model.eval()


def tiny_tokens(rows: int = 2, length: int = 24, seed: int = 3) -> torch.Tensor:
    """Random token rows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (rows, length), generator=generator)


def tiny_windows(rows: int = 24, length: int = 16, seed: int = 5) -> Windows:
    """Learnable text: every token is its predecessor plus a fixed number per row."""
    generator = torch.Generator().manual_seed(seed)
    begin = torch.randint(0, 20, (rows, 1), generator=generator)
    step = torch.randint(1, 3, (rows, 1), generator=generator)
    tokens = 3 + (begin + step * torch.arange(length)) % (VOCAB - 3)
    lengths = torch.full((rows,), length)
    lengths[0] = length // 2  # one padded window
    return Windows(tokens, lengths, torch.arange(rows), rows * length)


@torch.no_grad()
def logits_of(model: PreTrainedModel, tokens: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of a few rows, without a cache."""
    ids = tiny_tokens() if tokens is None else tokens
    return model(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def generate(model: PreTrainedModel, use_cache: bool, **options: object) -> list[int]:
    """Thirty-two greedy tokens after a prompt of twelve."""
    prompt = tiny_tokens(1, 12)
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=32,
        min_new_tokens=32,
        do_sample=False,
        use_cache=use_cache,
        pad_token_id=0,
        **options,
    )
    return out[0, 12:].tolist()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Word n is token n."""
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(VOCAB)}, "w0"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0")


def write_model(directory: Path, family: str = "llama", seed: int = 1) -> PreTrainedModel:
    """Save a tiny model where `load_model` can read it."""
    model = tiny_model(family, seed)
    model.save_pretrained(directory)
    return model
