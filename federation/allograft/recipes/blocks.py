# SPDX-License-Identifier: Apache-2.0
"""Where decoder blocks live in each model family, and surgery on them.

Invariant: after `insert_blocks` the model is a stock transformers model of one more depth (it runs
every block, caches, checkpoints and saves); after `remove_blocks` it is bit-equal to what it was.

One edit set serves all families, because each omission is silent somewhere: without
`num_hidden_layers` most families never run the last blocks; without new `layer_idx` values two
blocks share a cache slot and produce wrong tokens; without `layer_types` a block gets another
block's mask. Positions always count the base's own blocks, so several attachments can come and go
in any order. See protos/spec/recipes.md and federation/decisions/0002.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from allograft.crypto import canonical
from allograft.errors import RejectedError
from allograft.recipes.base import ModelShape

#: Set on an inserted block: the id of the attachment that owns it.
_OWNER = "allograft_owner"

#: Set on a block that has others beside it: those, by owner, and the hook that runs them.
_SIDES = "allograft_sides"
_SIDE_HOOK = "allograft_side_hook"

_DOSED_ROWS = 256

#: Config fields that make blocks differ by position in ways this module does not edit.
_POSITION_DEPENDENT = (
    "is_heterogeneous",
    "kv_sharing_modes",
    "num_kv_shared_layers",
    "mlp_layer_types",
    "layers_block_type",
    "scale_attn_by_inverse_layer_idx",
    "add_cross_attention",
    "use_bidirectional_attention",
    "quantization_config",
)


@dataclass(frozen=True, slots=True)
class Family:
    """How one model family lays out its blocks.

    A block adds two branches to the residual stream. `branches` names the module that each branch
    ends in: the output projections, or, where the family normalises after them, the gain of that
    norm (`gain_offset` 1: the norm multiplies by 1 + weight). `linears` are the matrices that
    low-rank changes may target; `transposed` says that they are stored input-first (Conv1D).
    """

    trunk: str
    blocks: str
    branches: tuple[str, str]
    linears: tuple[str, ...]
    gain_offset: bool = False
    transposed: bool = False


_LLAMA_LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
_LLAMA = Family("model", "layers", ("self_attn.o_proj", "mlp.down_proj"), _LLAMA_LINEARS)
_GEMMA = Family(
    "model",
    "layers",
    ("post_attention_layernorm", "post_feedforward_layernorm"),
    _LLAMA_LINEARS,
    gain_offset=True,
)

FAMILIES: Mapping[str, Family] = {
    "gpt2": Family(
        "transformer",
        "h",
        ("attn.c_proj", "mlp.c_proj"),
        ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
        transposed=True,
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
}


def find_family(config: Any) -> Family:
    """The family of a model's configuration.

    Raises:
        RejectedError: AG-RCP-020 for an unknown family, or one whose blocks cannot move.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise RejectedError("AG-RCP-020", f"family {str(config.model_type)[:40]!r} is not known")
    for name in _POSITION_DEPENDENT:
        if getattr(config, name, None):
            raise RejectedError("AG-RCP-020", f"blocks cannot be moved: {name} is set")
    return family


def describe_model(config: Any) -> ModelShape:
    """The shape of a model, from its configuration alone.

    Raises:
        RejectedError: AG-RCP-020 for an unsupported family.
    """
    find_family(config)
    heads = config.num_attention_heads
    rope = getattr(config, "rope_parameters", None)
    intermediate = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    types = getattr(config, "layer_types", None) or ()
    window = getattr(config, "sliding_window", None) or 0
    # Without layer_types a window applies to all blocks or to none.
    slides = "sliding_attention" in types if types else window > 0
    return ModelShape(
        family=config.model_type,
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        vocab=config.vocab_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        intermediate=intermediate or 4 * config.hidden_size,
        rope=canonical.dumps(_plain(rope)).decode() if rope else "",
        layer_types=tuple(types),
        sliding_window=window if slides else 0,
    )


def _plain(rope: Any) -> Any:
    """Rotary parameters without the fields that transformers leaves empty."""
    if isinstance(rope, Mapping):
        return {str(name): _plain(value) for name, value in rope.items() if value is not None}
    return rope


def base_shape(model: PreTrainedModel) -> ModelShape:
    """The shape of a model's base: as described, less any inserted blocks.

    Raises:
        RejectedError: AG-RCP-020 for an unsupported family.
    """
    described = describe_model(model.config)
    own = [not hasattr(block, _OWNER) for block in model_blocks(model)]
    types = layer_types(model)
    kept = tuple(t for t, is_own in zip(types, own, strict=True) if is_own) if types else ()
    return replace(described, layers=sum(own), layer_types=kept)


def model_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """All blocks in the order in which they run, inserted ones included."""
    family = find_family(model.config)
    return list(getattr(_trunk(model, family), family.blocks))


def base_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The base's own blocks, by their index in the plain base, whatever has been inserted."""
    return [block for block in model_blocks(model) if not hasattr(block, _OWNER)]


def layer_types(model: PreTrainedModel) -> list[str] | None:
    """The attention type of each block as things stand now; None where the family has one type."""
    types = getattr(model.config, "layer_types", None)
    # Blocks beside a block have their types behind those of the list.
    return list(types)[: len(model_blocks(model))] if types is not None else None


def is_inserted(model: PreTrainedModel, owner: str) -> bool:
    """Whether an owner's blocks are in the model's list."""
    return any(getattr(block, _OWNER, None) == owner for block in model_blocks(model))


def has_insertions(model: PreTrainedModel) -> bool:
    """Whether any block is on the model that the base does not have, in its list or beside it."""
    return any(hasattr(block, _OWNER) or sides_of(block) for block in model_blocks(model))


def new_blocks(model: PreTrainedModel, source: int, count: int) -> list[nn.Module]:
    """Fresh blocks of the same make as base blocks `source` … `source + count - 1`.

    They share no tensor with the base: aliased blocks fail exactly like a forgotten `layer_idx`.
    They do share its config object; a deep copy of a block would carry a private copy of it, and a
    later change of the attention implementation would not reach the block. Their weights are
    *uninitialised* until the caller loads them.

    Raises:
        RejectedError: AG-RCP-021 if the base has no such blocks.
    """
    everything = model_blocks(model)
    own = base_blocks(model)
    if count < 1 or source < 0 or source + count > len(own):
        raise RejectedError("AG-RCP-021", f"blocks {source}+{count} of a base with {len(own)}")
    made = []
    for original in own[source : source + count]:
        # The constructor reads layer_types at this index: the new block slides as its source does.
        with torch.device("meta"):
            block = type(original)(model.config, layer_idx=_index_of(everything, original))
        if any(True for _ in block.buffers()):
            raise RejectedError("AG-RCP-020", "this family keeps buffers inside its blocks")
        first = next(original.parameters())
        # The type first: memory for a type that is then changed would be taken twice.
        block.to(first.dtype)
        block.to_empty(device=first.device)
        block.requires_grad_(False)
        block.train(original.training)
        made.append(block)
    return made


def copy_blocks(model: PreTrainedModel, source: int, count: int) -> list[nn.Module]:
    """New blocks that hold copies of the source blocks' weights."""
    made = new_blocks(model, source, count)
    for block, original in zip(made, base_blocks(model)[source : source + count], strict=True):
        fill_block(block, dict(original.named_parameters()))
    return made


def fill_block(block: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Copy values into all parameters of a block.

    Not `load_state_dict`: that reports a full memory as a block that does not fit.
    """
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            parameter.copy_(values[name])


def check_weights(model: PreTrainedModel) -> None:
    """Refuse a base whose blocks cannot be copied and changed one by one.

    Raises:
        RejectedError: AG-RCP-026 if the blocks' weights are of several types, or not of a floating
            type (quantised), or if two blocks share one.
    """
    weights = [value for block in base_blocks(model) for value in block.parameters()]
    types = {value.dtype for value in weights}
    if len(types) != 1 or not all(dtype.is_floating_point for dtype in types):
        names = ", ".join(sorted(str(dtype) for dtype in types))
        raise RejectedError("AG-RCP-026", f"the blocks' weights are of type {names}")
    if len({value.data_ptr() for value in weights}) != len(weights):
        raise RejectedError("AG-RCP-026", "two blocks of the base share a weight")


def _share_hooks(original: nn.Module, block: nn.Module) -> None:
    """Give a new block what the model set up on its blocks after construction.

    `gradient_checkpointing_enable` and the first request for hidden states both walk over the
    blocks that exist at that time; a block that comes later would silently be left out.
    """
    theirs = dict(original.named_modules())
    for name, module in block.named_modules():
        twin = theirs.get(name)
        if twin is None:
            continue
        for flag in ("gradient_checkpointing", "_gradient_checkpointing_func"):
            if flag in vars(twin):
                setattr(module, flag, getattr(twin, flag))
        for hook in twin._forward_hooks.values():
            if getattr(hook, "__name__", "") == "output_capturing_hook":
                module.register_forward_hook(hook)


def insert_blocks(
    model: PreTrainedModel, blocks: Sequence[nn.Module], source: int, position: int, owner: str
) -> None:
    """Insert blocks before base block `position` (or after the last one).

    Attachments at one position stand in the order of their ids, so a model depends on which
    attachments it has and not on the order in which they came.

    Args:
        model: Changed in place.
        blocks: From `new_blocks(model, source, len(blocks))`.
        source: Where the blocks' attention types come from.
        position: Counted in the base's own blocks.
        owner: The attachment's id, for `remove_blocks`.

    Raises:
        RejectedError: AG-RCP-021 for a bad position, AG-RCP-023 if the owner is already present.
    """
    everything = model_blocks(model)
    own = base_blocks(model)
    owners = [getattr(block, _OWNER, None) for block in everything]
    if not 0 <= position <= len(own):
        raise RejectedError("AG-RCP-021", f"position {position} in a base of {len(own)} blocks")
    if owner in owners:
        raise RejectedError("AG-RCP-023", "the attachment is already on this model")
    at = 0 if position == 0 else _index_of(everything, own[position - 1]) + 1
    while at < len(owners) and (earlier := owners[at]) is not None and earlier < owner:
        at += 1
    types = layer_types(model)
    for offset, block in enumerate(blocks):
        setattr(block, _OWNER, owner)
        _share_hooks(own[source + offset], block)
    if types is not None:
        origin = [_index_of(everything, own[source + offset]) for offset in range(len(blocks))]
        types = types[:at] + [types[index] for index in origin] + types[at:]
    _write_blocks(model, everything[:at] + list(blocks) + everything[at:], types)


def remove_blocks(model: PreTrainedModel, owner: str) -> None:
    """Take an attachment's blocks out again.

    Raises:
        RejectedError: AG-RCP-023 if the owner has no blocks here.
    """
    everything = model_blocks(model)
    kept = [i for i, block in enumerate(everything) if getattr(block, _OWNER, None) != owner]
    if len(kept) == len(everything):
        raise RejectedError("AG-RCP-023", "the attachment is not on this model")
    types = layer_types(model)
    if types is not None:
        types = [types[index] for index in kept]
    _write_blocks(model, [everything[index] for index in kept], types)


def _write_blocks(
    model: PreTrainedModel, blocks: Sequence[nn.Module], types: list[str] | None
) -> None:
    """The whole edit set: module list, block indices, attention types, depth."""
    family = find_family(model.config)
    trunk = _trunk(model, family)
    chain = nn.ModuleList(blocks)
    chain.training = trunk.training
    setattr(trunk, family.blocks, chain)
    slots = list(blocks)
    for index, block in enumerate(blocks):
        # What stands beside a block has cache slots of its own, behind those of the list.
        beside = [each for _, side in sorted(sides_of(block).items()) for each in side.blocks]
        slots += beside
        if types is not None:
            types = types + [types[index]] * len(beside)
    for index, block in enumerate(slots):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", index)  # noqa: B010  (modules type attributes as tensors)
    if types is not None:
        model.config.layer_types = types
    model.config.num_hidden_layers = len(slots)


@dataclass(slots=True, eq=False)
class Side:
    """Blocks beside a host block: they add dose (O(u) - u) B to its output h, where u = h A + a.

    Attributes:
        blocks: O, blocks of this family in the order in which they run.
        into: A, [width, width].
        shift: a, [width].
        back: B, [width, width].
        dose: At 0 nothing is computed and h passes as it is.
    """

    blocks: list[nn.Module]
    into: torch.Tensor
    shift: torch.Tensor
    back: torch.Tensor
    dose: float

    def add(self, hidden: torch.Tensor, rest: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """The host's output with this side's share; the blocks see the host's masks and caches."""
        if self.dose == 0.0:
            return hidden
        entered = value = hidden @ self.into + self.shift
        for block in self.blocks:
            value = hidden_of(block(value, *rest, **options))
        return hidden + self.dose * ((value - entered) @ self.back)


def sides_of(block: nn.Module) -> Mapping[str, Side]:
    """What stands beside a block, by owner."""
    sides: Mapping[str, Side] = vars(block).get(_SIDES, {})
    return sides


def add_side(model: PreTrainedModel, side: Side, source: int, host: int, owner: str) -> None:
    """Put blocks beside a base block.

    A hook, not a wrapper: the model's list stays as it is and every block keeps its attributes.
    The blocks hold cache slots of their own behind those of the list, so cached generation is
    right. While a side is on it the model MUST NOT be saved: its depth counts blocks that
    `save_pretrained` does not see.

    Args:
        model: Changed in place.
        side: Its blocks from `new_blocks(model, source, …)`.
        source: Where their attention types come from.
        host: Counted in the base's own blocks.
        owner: The attachment's id.

    Raises:
        RejectedError: AG-RCP-021 for a host that does not exist or attends otherwise than the
            blocks, whose mask they would get; AG-RCP-023 if the owner is already present.
    """
    own = base_blocks(model)
    if not 0 <= host < len(own):
        raise RejectedError("AG-RCP-021", f"no block {host} in a base of {len(own)}")
    if any(owner in sides_of(block) for block in own):
        raise RejectedError("AG-RCP-023", "the attachment is already on this model")
    types = base_shape(model).layer_types
    if types and set(types[source : source + len(side.blocks)]) != {types[host]}:
        raise RejectedError("AG-RCP-021", "blocks beside a block that attends in another way")
    block = own[host]
    if not sides_of(block):
        vars(block)[_SIDES] = {}
        vars(block)[_SIDE_HOOK] = block.register_forward_hook(_add_sides, with_kwargs=True)
    vars(block)[_SIDES][owner] = side
    _write_blocks(model, model_blocks(model), layer_types(model))


def remove_side(model: PreTrainedModel, owner: str) -> None:
    """Take blocks away that stand beside a base block.

    Raises:
        RejectedError: AG-RCP-023 if the owner has none here.
    """
    block = next((each for each in base_blocks(model) if owner in sides_of(each)), None)
    if block is None:
        raise RejectedError("AG-RCP-023", "the attachment is not on this model")
    sides = vars(block)[_SIDES]
    del sides[owner]
    if not sides:
        vars(block).pop(_SIDES)
        vars(block).pop(_SIDE_HOOK).remove()
    _write_blocks(model, model_blocks(model), layer_types(model))


def _add_sides(
    host: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any], output: Any
) -> Any:
    hidden = hidden_of(output)
    for _, side in sorted(sides_of(host).items()):
        hidden = side.add(hidden, inputs[1:], options)
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden state of a block's output, which older families wrap in a tuple."""
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


@contextlib.contextmanager
def checkpointed(model: PreTrainedModel, enabled: bool) -> Iterator[None]:
    """Recompute the activations of blocks during backward passes, with dropout still off.

    transformers recomputes only blocks in training mode, and training mode turns dropout on; so
    the blocks alone are put into it, and what is inside them stays in evaluation mode.
    """
    blocks = model_blocks(model) if enabled else []
    # Set directly: transformers is renaming the method that does this, and warns about the old one.
    recompute = functools.partial(checkpoint, use_reentrant=False)
    before = [vars(block).copy() for block in blocks]
    for block in blocks:
        vars(block).update(
            training=True, gradient_checkpointing=True, _gradient_checkpointing_func=recompute
        )
    try:
        yield
    finally:
        for block, attributes in zip(blocks, before, strict=True):
            vars(block).clear()
            vars(block).update(attributes)


@contextlib.contextmanager
def only_blocks(
    model: PreTrainedModel, blocks: Sequence[nn.Module], types: Sequence[str]
) -> Iterator[None]:
    """Let a model run other blocks for a while; everything is as before when the block ends.

    Args:
        model: Changed for the duration.
        blocks: What runs instead.
        types: Their attention types; ignored where the family has none.
    """
    before, before_types = model_blocks(model), layer_types(model)
    _write_blocks(model, blocks, list(types) if before_types is not None else None)
    try:
        yield
    finally:
        _write_blocks(model, before, before_types)


def dosed_names(family: Family, block: nn.Module) -> list[str]:
    """The parameters of a block that a dose scales: those that its two branches end in."""
    names = [name for name, _ in block.named_parameters()]
    return [name for name in names if name.rpartition(".")[0] in family.branches]


def write_dose(
    family: Family, block: nn.Module, undosed: Mapping[str, torch.Tensor], dose: float
) -> None:
    """Scale both residual branches of a block to `dose` times their full strength.

    Args:
        family: The block's family.
        block: Changed in place, in its parameters only; it stays a stock module.
        undosed: The dosed parameters at full strength, by name within the block.
        dose: 1 writes them unchanged; 0 makes the block an exact identity.

    Raises:
        RejectedError: AG-RCP-021 if the dose is not between 0 and 1.
    """
    if not 0.0 <= dose <= 1.0:
        raise RejectedError("AG-RCP-021", "a dose lies between 0 and 1")
    parameters = dict(block.named_parameters())
    with torch.no_grad():
        for name in dosed_names(family, block):
            full = undosed[name]
            if dose == 1.0:
                parameters[name].copy_(full)
            elif family.gain_offset:
                parameters[name].copy_((full.float() + 1.0) * dose - 1.0)
            elif dose == 0.0:
                parameters[name].zero_()  # not 0 * x: that keeps minus signs and NaN
            else:
                # A few rows at a time: a float32 copy of a large matrix would be a tenth of a
                # large organ's payload.
                targets = torch.split(parameters[name], _DOSED_ROWS)
                for target, part in zip(targets, torch.split(full, _DOSED_ROWS), strict=True):
                    target.copy_(part.float() * dose)


def silence(family: Family, block: nn.Module) -> None:
    """Make a block an exact identity that can still learn: its own weights at dose 0.

    Before a norm this zeroes the output projections. Where a norm follows them (Gemma) it sets
    that norm's gain 1 + w to zero instead: behind a zeroed projection the norm would divide by
    sqrt(eps) and the first gradient would be a thousand times too large.
    """
    full = {name: value.detach().clone() for name, value in block.named_parameters()}
    write_dose(family, block, full, 0.0)


def count_blocks_run(model: PreTrainedModel, input_ids: torch.Tensor) -> int:
    """How many blocks a forward pass really runs; a block that never runs raises no error."""
    ran: list[int] = []
    hooks = [
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
        for number, block in enumerate(model_blocks(model))
    ]
    try:
        with torch.no_grad():
            model(input_ids=input_ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return len(set(ran))


def _trunk(model: PreTrainedModel, family: Family) -> nn.Module:
    trunk = getattr(model, family.trunk, None)
    # A wrapper (such as PEFT's) forwards attributes and would be edited at the wrong level.
    if not isinstance(model, PreTrainedModel) or not isinstance(trunk, nn.Module):
        raise RejectedError("AG-RCP-020", f"not a plain causal model: {type(model).__name__}")
    return trunk


def _index_of(blocks: Sequence[nn.Module], block: nn.Module) -> int:
    """Position by identity; `list.index` would compare by equality."""
    return next(index for index, candidate in enumerate(blocks) if candidate is block)
