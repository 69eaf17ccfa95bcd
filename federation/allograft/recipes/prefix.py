# SPDX-License-Identifier: Apache-2.0
"""Cached outputs of the frozen blocks below an organ.

While an organ trains, every block below it computes the same thing in every epoch. One `Replay`
block takes their place and returns the stored hidden state of the batch; masks, rotary angles,
scaled embeddings and norms stay the model's own code. Invariant: losses are those of the uncached
run. The stored activations are as private as the text, so a cache file has no name on disk.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from allograft.durable import storage_errors
from allograft.recipes.blocks import layer_types, model_blocks, only_blocks
from allograft.recipes.windows import Windows

Select = Callable[[torch.Tensor], None]

#: Below this share of the training work a cache is not worth its space.
_WORTHWHILE = 0.05

_BATCH_WINDOWS = 16


@dataclass(frozen=True, slots=True)
class PrefixChoice:
    """Whether and where to cache, and why; `saved` is the estimated share of the work."""

    store: Literal["none", "memory", "file"]
    reason: str
    cache_bytes: int
    passes: float
    saved: float


@dataclass(frozen=True, slots=True)
class CacheBudget:
    """How much space the cached activations may take."""

    ram_bytes: int
    disk_bytes: int


def choose_prefix(
    model: PreTrainedModel, position: int, windows: Windows, passes: float, budget: CacheBudget
) -> PrefixChoice:
    """Weigh the work that a cache saves against the space it takes.

    Work is counted in block forwards: 1 below the organ, 3 in the organ, 2 above it (a frozen
    block above still passes gradients down).

    Args:
        model: With the organ inserted.
        position: How many blocks lie below the organ.
        windows: The training text.
        passes: How often the whole text will be seen.
        budget: The space there is.
    """
    blocks = len(model_blocks(model))
    organ = sum(any(p.requires_grad for p in b.parameters()) for b in model_blocks(model))
    work = passes * (position + 3 * organ + 2 * (blocks - organ - position))
    saved = max(0.0, passes - 1) * position / work
    itemsize = model.get_input_embeddings().weight.element_size()
    size = windows.tokens.numel() * int(model.config.hidden_size) * itemsize
    if saved < _WORTHWHILE:
        return PrefixChoice("none", "too little work would be saved", size, passes, saved)
    if size <= budget.ram_bytes:
        return PrefixChoice("memory", "fits the memory budget", size, passes, saved)
    if size <= budget.disk_bytes:
        return PrefixChoice("file", "fits the disk budget only", size, passes, saved)
    return PrefixChoice("none", "exceeds the memory and disk budgets", size, passes, saved)


class Replay(nn.Module):
    """Stands in for the lower blocks: returns the stored hidden state, [b, t, hidden]."""

    def __init__(self) -> None:
        super().__init__()
        self.current: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Ignore the input, the embedding, but for its length; return the selected batch."""
        assert self.current is not None
        return self.current[:, : hidden_states.shape[1]].to(hidden_states.device)


@contextlib.contextmanager
def replayed_prefix(
    model: PreTrainedModel, position: int, windows: Windows, choice: PrefixChoice, workdir: Path
) -> Iterator[Select]:
    """Run the lower `position` blocks once, then replay them while the block lasts.

    Yields:
        A function that must be told the window numbers of each batch before its forward pass.
    """
    if choice.store == "none":
        yield lambda _: None
        return
    blocks, types = model_blocks(model), layer_types(model) or []
    with only_blocks(model, blocks[:position], types[:position]):
        cached = _record(model, blocks[position - 1], windows, choice, workdir)
    replay = Replay()

    def select(numbers: torch.Tensor) -> None:
        replay.current = cached[numbers]

    with only_blocks(model, [replay, *blocks[position:]], types[:1] + types[position:]):
        yield select


def _record(
    model: PreTrainedModel, last: nn.Module, windows: Windows, choice: PrefixChoice, workdir: Path
) -> torch.Tensor:
    """The output of the last lower block for every window, [n, t, hidden]."""
    outputs: list[torch.Tensor] = []
    hook = last.register_forward_hook(
        lambda _module, _inputs, output: outputs.append(
            output[0] if isinstance(output, tuple) else output
        )
    )
    device = model.get_input_embeddings().weight.device
    cached: torch.Tensor | None = None
    try:
        for numbers in torch.split(torch.arange(len(windows)), _BATCH_WINDOWS):
            tokens = windows.tokens[numbers].to(device)
            half = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
            with torch.no_grad(), half:
                # The trunk alone: the head over the vocabulary would be wasted work.
                model.base_model(input_ids=tokens, use_cache=False)
            hidden = outputs.pop()
            if cached is None:
                shape = (len(windows), *hidden.shape[1:])
                cached = _allocate(shape, hidden.dtype, choice, workdir)
            cached[numbers] = hidden.to("cpu")
    finally:
        hook.remove()
    assert cached is not None
    return cached


def _allocate(
    shape: tuple[int, ...], dtype: torch.dtype, choice: PrefixChoice, workdir: Path
) -> torch.Tensor:
    if choice.store == "memory":
        return torch.empty(shape, dtype=dtype)
    count = torch.Size(shape).numel()
    path = workdir / f"prefix-{secrets.token_hex(4)}.tmp"
    with storage_errors("cached activations"):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            # Reserve the space now: writing to a mapping on a full disk kills the process.
            os.posix_fallocate(descriptor, 0, count * dtype.itemsize)
            return torch.from_file(str(path), shared=True, size=count, dtype=dtype).view(shape)
        finally:
            os.close(descriptor)
            # The mapping keeps the data; without a name nothing is left behind, however we end.
            path.unlink()
