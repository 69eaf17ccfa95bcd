# SPDX-License-Identifier: Apache-2.0
"""A whole small model from signed facts and bare tensors, without a file of configuration.

A configuration file from a donor would decide which code runs. So the family is looked up among
those that this package knows, every other field comes from a fixed list with its type, and what
is built must describe itself as the shape in the facts. Invariant: nothing larger than the payload
is allocated before the payload was found to hold exactly the tensors that the facts call for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from allograft.crypto import canonical
from allograft.errors import RejectedError
from allograft.recipes import blocks as surgery
from allograft.recipes.base import ModelShape
from allograft.recipes.facts import EXPERT_SETTINGS, ExpertFacts

#: Beginning and end marks, which transformers would otherwise take from the family's own tokenizer.
_MARKS = ("bos_token_id", "eos_token_id", "pad_token_id")

#: Bytes of buffers that a model may have whatever the size of its weights.
_FREE_BUFFERS = 64 << 20

_NO_CONFIG = (
    StrictDataclassError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError,
)  # fmt: skip

#: What building a model and running it raises where the numbers do not make one.
NO_MODEL = (*_NO_CONFIG, RuntimeError, AssertionError)


def read_settings(config: Any) -> dict[str, canonical.Json]:
    """What of a configuration its shape does not say, of the names that are allowed."""
    found = {name: getattr(config, name, None) for name in EXPERT_SETTINGS}
    kinds = {name: kind for name, kind in EXPERT_SETTINGS.items() if found[name] is not None}
    return {name: kind(found[name]) for name, kind in kinds.items()}


def build_config(facts: ExpertFacts) -> Any:
    """The configuration that the facts describe.

    Raises:
        RejectedError: AG-RCP-002 if they describe no model, AG-RCP-020 for an unknown family.
    """
    shape = facts.shape
    if shape.family not in surgery.FAMILIES:
        raise RejectedError("AG-RCP-020", f"family {shape.family[:40]!r} is not known")
    fields: dict[str, Any] = {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate,
        "n_inner": shape.intermediate,
        "sliding_window": shape.sliding_window or None,
        "layer_types": list(shape.layer_types) or None,
        "rope_parameters": canonical.loads(shape.rope.encode()) if shape.rope else None,
        # A limit that a donor left open is none, whatever the family's own default.
        **dict.fromkeys(EXPERT_SETTINGS),
        # By their types: JSON has no 30.0, and configurations insist on it.
        **{name: EXPERT_SETTINGS[name](value) for name, value in facts.settings.items()},
        **dict.fromkeys(_MARKS),
    }
    try:
        known = AutoConfig.for_model(shape.family)
        config = AutoConfig.for_model(
            shape.family, **{name: value for name, value in fields.items() if hasattr(known, name)}
        )
        described = surgery.describe_model(config)
    # Whatever a library makes of numbers from outside, they describe no model.
    except _NO_CONFIG as error:
        raise RejectedError("AG-RCP-002", f"not a configuration: {type(error).__name__}") from error
    if described != shape:
        raise RejectedError("AG-RCP-002", "the settings contradict the expert's shape")
    return config


def tensor_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Every weight of a model of this configuration, tied ones once; allocates nothing.

    Raises:
        RejectedError: AG-RCP-002 if it is no model, or one of larger buffers than weights: they are
            allocated too, and no payload shows their size.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except NO_MODEL as error:
        raise RejectedError("AG-RCP-002", f"not a model: {type(error).__name__}") from error
    weights, buffers = (
        sum(value.nbytes for value in some) for some in (model.parameters(), model.buffers())
    )
    if buffers > max(weights, _FREE_BUFFERS):
        raise RejectedError("AG-RCP-002", "the model's buffers are larger than its weights")
    return {name: tuple(value.shape) for name, value in own_parameters(model).items()}


def own_parameters(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """A model's weights by name; a head tied to the embeddings is not one of its own."""
    tied = bool(model.config.tie_word_embeddings)
    named = model.named_parameters()
    return {name: value for name, value in named if not (tied and name == "lm_head.weight")}


def build_model(config: Any, tensors: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    """A frozen model in evaluation mode, in the type of its tensors.

    Args:
        config: From `build_config`.
        tensors: Exactly those of `tensor_shapes`.
    """
    dtype = next(iter(tensors.values())).dtype
    with torch.random.fork_rng(devices=[]):  # the weights it is born with are overwritten
        # Born in its type: converted later, its table of rotations would be rounded too.
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    parameters = own_parameters(model)
    assert parameters.keys() == tensors.keys()
    with torch.no_grad():
        for name, value in parameters.items():
            value.copy_(tensors[name])
    return model.requires_grad_(False).eval()


def describe_whole(model: PreTrainedModel) -> tuple[ModelShape, dict[str, canonical.Json]]:
    """Shape and settings of a model as it stands, from which `build_model` makes it again.

    Raises:
        RejectedError: AG-RCP-020 if it holds or does anything that the facts cannot say.
    """
    shape, settings = surgery.describe_model(model.config), read_settings(model.config)
    facts = ExpertFacts(shape, "whole", "ensemble", 0.0, "float32", settings, {})
    tensors = {name: value.detach().to("cpu") for name, value in own_parameters(model).items()}
    config = build_config(facts)
    if tensor_shapes(config) != {name: tuple(value.shape) for name, value in tensors.items()}:
        raise RejectedError(
            "AG-RCP-020", "the model holds weights that its shape does not call for"
        )
    config._attn_implementation = model.config._attn_implementation
    twin = build_model(config, tensors).to(model.device)
    length = min(shape.vocab, config.max_position_embeddings, 32)
    ids = torch.arange(length, device=model.device)[None]
    with torch.no_grad():
        ours = model(input_ids=ids, use_cache=False).logits
        theirs = twin(input_ids=ids, use_cache=False).logits
    if not torch.equal(ours, theirs):
        raise RejectedError("AG-RCP-020", "the model has settings that an expert cannot state")
    return shape, settings
