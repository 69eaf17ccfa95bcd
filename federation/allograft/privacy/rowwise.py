# SPDX-License-Identifier: Apache-2.0
"""The clipped sum of several persons from one forward and one backward pass.

A weight matrix's gradient is a sum over tokens of (gradient at its output) times (its input), so
what each row of a batch adds can be had without a pass per row (Goodfellow 2015, arXiv 1510.01799).
Each trained layer's input is kept in the forward pass and its output's gradient is met in the
backward pass, which computes no gradient of a weight. Then there are two ways to a person's share:

* dense: form it, [persons, *weight]. For gains, biases and narrow matrices, such as LoRA's.
* ghost: never form it. Its squared norm is the sum over pairs of tokens of <a, a'> <b, b'> (Li et
  al. 2021, arXiv 2110.05679), and the clipped sum is one product with the factors in it (Bu et al.
  2022, arXiv 2210.00038). For wide matrices, where inputs and gradients are smaller than a share.

Invariant: what a person adds is a function of that person alone, but for rounding. A batch holds
whole persons, no value crosses rows, and a person that is not finite is left out of every product,
because 0 times NaN is NaN.

Only layers that are known by their exact class can be trained this way (`fits`). Everything else
goes through `train.PersonLoop`, which needs to know nothing about a model.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

from allograft.errors import RejectedError

#: Matrices by class, and whether they are stored input-first. By name, because this package does
#: not import transformers; a subclass may compute something else and is not known.
_MATRICES = {
    "torch.nn.modules.linear.Linear": False,
    "transformers.pytorch_utils.Conv1D": True,
}

#: Norms over the last dimension with a gain, weight or 1 + weight, and where they keep their ε.
_RMS_NORMS = {
    "transformers.models.llama.modeling_llama.LlamaRMSNorm": "variance_epsilon",
    "transformers.models.mistral.modeling_mistral.MistralRMSNorm": "variance_epsilon",
    "transformers.models.qwen2.modeling_qwen2.Qwen2RMSNorm": "variance_epsilon",
    "transformers.models.qwen3.modeling_qwen3.Qwen3RMSNorm": "variance_epsilon",
    "transformers.models.gemma2.modeling_gemma2.Gemma2RMSNorm": "eps",
    "transformers.models.gemma3.modeling_gemma3.Gemma3RMSNorm": "eps",
}

_LAYER_NORM = "torch.nn.modules.normalization.LayerNorm"

#: Rounding of a ghost norm, as a share of the squared sum of |a| |b| over tokens, which it cannot
#: exceed before rounding. Always added: where tokens cancel, a norm rounded down would let more
#: than C through. At 128 tokens it makes a norm at most 2e-5 larger.
_GHOST_ROUNDING = 2.0**-22

#: Entries of the products of pairs of tokens that exist at once, 64 MiB.
_PAIR_ENTRIES = 1 << 24


@dataclass(frozen=True, slots=True, eq=False)
class RowLosses:
    """The losses of a batch's rows, each divided so that a person's rows add up to its loss.

    Attributes:
        values: [rows], can be differentiated; row r comes from row r of every layer's input.
        windows: How many rows each person has, in the order of the rows.
    """

    values: torch.Tensor
    windows: tuple[int, ...]


class PersonRows(Protocol):
    """Persons as rows of batches."""

    def split(self, persons: Sequence[int]) -> list[list[int]]:
        """Persons in batches that fit into memory; neighbours have equally many rows."""

    def losses(self, persons: Sequence[int]) -> RowLosses:
        """The losses of one batch."""


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    """A layer and the places of its trained parameters among all; None for a frozen one."""

    module: nn.Module
    weight: int | None
    bias: int | None
    input_first: bool = False
    normalise: Callable[[torch.Tensor], torch.Tensor] | None = None  # of a norm; a matrix has none


@dataclass(frozen=True, slots=True)
class _Group:
    """Neighbouring persons with equally many rows, so that their rows are a view of the batch."""

    rows: slice
    persons: slice
    count: int

    def view(self, value: torch.Tensor) -> torch.Tensor:
        """[rows, tokens, width] as [count, all tokens of a person, width], float32."""
        return value[self.rows].reshape(self.count, -1, value.shape[-1]).float()


def fits(model: nn.Module, parameters: Sequence[nn.Parameter]) -> bool:
    """Whether every trained parameter belongs to exactly one layer of a known class."""
    return _find_layers(model, parameters) is not None


class RowwiseSum:
    """Clipped gradients of several persons at once.

    Args:
        model: Holds the layers; the losses of `rows` come out of it.
        parameters: What learns, float32.
        rows: The persons.

    Raises:
        RejectedError: AG-PRV-080 unless `fits(model, parameters)`.
    """

    def __init__(
        self, model: nn.Module, parameters: Sequence[nn.Parameter], rows: PersonRows
    ) -> None:
        layers = _find_layers(model, parameters)
        if layers is None:
            raise RejectedError("AG-PRV-080", "a trained layer is of no class that is known")
        self._layers = layers
        self._device = parameters[0].device
        self._rows = rows

    def add(
        self,
        persons: Sequence[int],
        factor: Callable[[float], float],
        sums: Sequence[torch.Tensor],
    ) -> list[float]:
        """Add persons' clipped gradients to the sums; see `train.ClippedSum`.

        Raises:
            RejectedError: AG-PRV-080 if a layer sees anything but one row per window.
        """
        losses: list[float] = []
        for batch in self._rows.split(persons):
            losses += self._add_batch(batch, factor, sums)
        return losses

    def _add_batch(
        self,
        persons: Sequence[int],
        factor: Callable[[float], float],
        sums: Sequence[torch.Tensor],
    ) -> list[float]:
        shares = _Shares()
        anchor = torch.zeros((), device=self._device, requires_grad=True)
        with self._tapped(anchor, shares):
            losses = self._rows.losses(persons)
        shares.begin(losses.windows, self._device)
        # Only the anchor is asked for, so that no gradient of a weight is computed.
        torch.autograd.grad(losses.values.sum(), anchor, allow_unused=True)
        with torch.no_grad():
            found = shares.norms().tolist()
            clips = [factor(norm) if math.isfinite(norm) else None for norm in found]
            shares.add_to(sums, clips)
            each = shares.per_person(losses.values.detach().double()[:, None, None])
        return [float(loss) for loss in each[:, 0].tolist()]

    @contextlib.contextmanager
    def _tapped(self, anchor: torch.Tensor, shares: _Shares) -> Iterator[None]:
        """Watch the layers for one forward pass.

        Not in the backward pass: recomputed activations would be met a second time.
        """

        def watch(layer: _Layer) -> Any:
            def hook(_module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> Any:
                (value,) = inputs
                kept = _kept(layer, value.detach())
                tell = functools.partial(shares.take, layer, kept)
                return _Tap.apply(output, anchor, tell)  # type: ignore[no-untyped-call]

            return hook

        handles = [layer.module.register_forward_hook(watch(layer)) for layer in self._layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Tap(torch.autograd.Function):
    """Passes a value through, and tells its gradient on the way back.

    The anchor makes the backward pass come here without any parameter being asked for.
    """

    @staticmethod
    def forward(
        ctx: Any,
        value: torch.Tensor,
        anchor: torch.Tensor,
        tell: Callable[[torch.Tensor], None],
    ) -> torch.Tensor:
        ctx.tell = tell
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor, torch.Tensor, None]:
        (gradient,) = gradients
        tell, ctx.tell = ctx.tell, None  # it holds the layer's input, which may go now
        tell(gradient)
        return gradient, gradient.new_zeros((), dtype=torch.float32), None


@dataclass(slots=True, eq=False)
class _Ghost:
    """A wide matrix's inputs and output gradients, [rows, tokens, width], for each use of it."""

    layer: _Layer
    inputs: list[torch.Tensor] = field(default_factory=list)
    gradients: list[torch.Tensor] = field(default_factory=list)


class _Shares:
    """What each person of one batch adds to each parameter."""

    def __init__(self) -> None:
        self._groups: list[_Group] = []
        self._owners = torch.empty(0)
        self._count = 0
        self._dense: dict[int, torch.Tensor] = {}
        self._ghosts: dict[int, _Ghost] = {}

    def begin(self, windows: Sequence[int], device: torch.device) -> None:
        """Learn whose rows are whose, between the forward and the backward pass."""
        self._groups = _group(windows)
        self._count = len(windows)
        owners = [person for person, rows in enumerate(windows) for _ in range(rows)]
        self._owners = torch.tensor(owners, device=device)

    def take(self, layer: _Layer, inputs: torch.Tensor, gradient: torch.Tensor) -> None:
        """Note one use of a layer."""
        rows = len(self._owners)
        if min(inputs.ndim, gradient.ndim) < 2 or {len(inputs), len(gradient)} != {rows}:
            raise RejectedError("AG-PRV-080", "a trained layer does not keep rows apart")
        a = inputs.reshape(rows, -1, inputs.shape[-1])
        b = gradient.reshape(rows, -1, gradient.shape[-1])
        if layer.bias is not None:
            self._add_dense(layer.bias, self.per_person(b))
        if layer.weight is None:
            return
        if layer.normalise is not None:
            self._add_dense(layer.weight, self.per_person(layer.normalise(a.float()) * b))
        elif layer.weight not in self._ghosts and self._is_narrow(layer.weight, a, b):
            self._add_dense(layer.weight, self._products(layer, a, b))
        else:
            ghost = self._ghosts.setdefault(layer.weight, _Ghost(layer))
            ghost.inputs.append(a)
            ghost.gradients.append(b)

    def norms(self) -> torch.Tensor:
        """Each person's norm over all parameters, float64 [persons]."""
        squares = torch.zeros(self._count, dtype=torch.float64, device=self._owners.device)
        for share in self._dense.values():
            norms = torch.linalg.vector_norm(share.flatten(1), dim=1, dtype=torch.float64)
            squares += norms.square()
        for group in self._groups:
            self._add_ghost_squares(group, squares[group.persons])
        return squares.sqrt()

    def add_to(self, sums: Sequence[torch.Tensor], clips: Sequence[float | None]) -> None:
        """Add all shares times their factors; a person without a factor is left out."""
        kept = [person for person, clip in enumerate(clips) if clip is not None]
        if not kept:
            return
        device = self._owners.device
        factors = torch.tensor([clip or 0.0 for clip in clips], dtype=torch.float32, device=device)
        persons: torch.Tensor | slice = slice(None)
        rows: torch.Tensor | slice = slice(None)
        if len(kept) < self._count:
            persons = torch.tensor(kept, device=device)
            rows = torch.isin(self._owners, persons)
        for place, share in self._dense.items():
            flat = share.flatten(1)[persons]
            sums[place].view(-1).addmv_(flat.T, factors[persons])
        scale = factors[self._owners][rows, None, None]
        for place, ghost in self._ghosts.items():
            for inputs, gradient in zip(ghost.inputs, ghost.gradients, strict=True):
                a = inputs[rows].flatten(0, 1).float()
                b = (gradient[rows].float() * scale).flatten(0, 1)
                left, right = (a, b) if ghost.layer.input_first else (b, a)
                sums[place].addmm_(left.T, right)

    def per_person(self, value: torch.Tensor) -> torch.Tensor:
        """[rows, tokens, width], summed over each person's tokens: [persons, width]."""
        dtype = torch.promote_types(value.dtype, torch.float32)
        sums = value.sum(1, dtype=dtype)
        total = sums.new_zeros(self._count, sums.shape[1])
        return total.index_add_(0, self._owners, sums)

    def _is_narrow(self, place: int, a: torch.Tensor, b: torch.Tensor) -> bool:
        """Whether shares of a matrix take less space than its inputs and gradients."""
        share = self._count * a.shape[-1] * b.shape[-1]
        return place in self._dense or share <= a.numel() + b.numel()

    def _add_dense(self, place: int, share: torch.Tensor) -> None:
        before = self._dense.get(place)
        self._dense[place] = share if before is None else before.add_(share)

    def _products(self, layer: _Layer, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Shares of a matrix, [persons, *weight]."""
        left, right = (a, b) if layer.input_first else (b, a)
        shape = (self._count, left.shape[-1], right.shape[-1])
        shares = torch.empty(shape, dtype=torch.float32, device=a.device)
        for group in self._groups:
            out = shares[group.persons]
            torch.bmm(group.view(left).mT, group.view(right), out=out)
        return shares

    def _add_ghost_squares(self, group: _Group, squares: torch.Tensor) -> None:
        """Add the squared norms of one group's persons over all wide matrices."""
        shared, products = None, torch.empty(0)
        for ghost in self._ghosts.values():
            a = _join([group.view(value) for value in ghost.inputs])
            b = _join([group.view(value) for value in ghost.gradients])
            step = max(1, _PAIR_ENTRIES // a.shape[1] ** 2)
            for first in range(0, group.count, step):
                part = slice(first, first + step)
                # Query, key and value read one input, and so do gate and up. A part of it begins at
                # the same place, so the address alone would not do.
                key = (first, *(_identify(value) for value in ghost.inputs))
                if key != shared:
                    shared, products = key, torch.bmm(a[part], a[part].mT)
                pairs = torch.bmm(b[part], b[part].mT)
                lengths = products.diagonal(dim1=1, dim2=2) * pairs.diagonal(dim1=1, dim2=2)
                most = lengths.double().sqrt().sum(1).square()
                found = pairs.mul_(products).sum((1, 2), dtype=torch.float64)
                squares[part] += found.clamp(min=0.0) + _GHOST_ROUNDING * most


def _identify(value: torch.Tensor) -> tuple[object, ...]:
    """What two tensors have in common only if they hold the same numbers."""
    return value.data_ptr(), value.dtype, value.shape, value.stride()


def _group(windows: Sequence[int]) -> list[_Group]:
    groups: list[_Group] = []
    row = person = 0
    while person < len(windows):
        end = person
        while end < len(windows) and windows[end] == windows[person]:
            end += 1
        rows = windows[person] * (end - person)
        groups.append(_Group(slice(row, row + rows), slice(person, end), end - person))
        row, person = row + rows, end
    return groups


def _join(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """The tokens of all uses of a layer, whose gradients add up; without a copy for one use."""
    return values[0] if len(values) == 1 else torch.cat(list(values), 1)


def _kept(layer: _Layer, value: torch.Tensor) -> torch.Tensor:
    """A layer's input as its own arithmetic sees it: half as large under autocast."""
    device = value.device.type
    if layer.normalise is None and torch.is_autocast_enabled(device):
        return value.to(torch.get_autocast_dtype(device))
    return value


def _find_layers(model: nn.Module, parameters: Sequence[nn.Parameter]) -> list[_Layer] | None:
    """The layers that hold the parameters; None unless each is known and each has one holder."""
    places = {id(parameter): place for place, parameter in enumerate(parameters)}
    layers: list[_Layer] = []
    held: list[int] = []
    for module in model.modules():
        own = {
            name: places[id(value)]
            for name, value in module.named_parameters(recurse=False, remove_duplicate=False)
            if id(value) in places
        }
        if not own:
            continue
        layer = _as_layer(module, own)
        if layer is None:
            return None
        layers.append(layer)
        held += own.values()
    return layers if sorted(held) == list(range(len(parameters))) else None


def _as_layer(module: nn.Module, own: dict[str, int]) -> _Layer | None:
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    weight, bias = own.get("weight"), own.get("bias")
    if kind in _MATRICES:
        return _Layer(module, weight, bias, input_first=_MATRICES[kind])
    if kind in _RMS_NORMS:
        epsilon = float(getattr(module, _RMS_NORMS[kind]))
        return _Layer(module, weight, None, normalise=lambda x: _rms_normalise(x, epsilon))
    if kind == _LAYER_NORM and isinstance(module, nn.LayerNorm):
        shape, eps = module.normalized_shape, module.eps
        if len(shape) == 1:
            return _Layer(
                module, weight, bias, normalise=lambda x: functional.layer_norm(x, shape, eps=eps)
            )
    return None


def _rms_normalise(value: torch.Tensor, epsilon: float) -> torch.Tensor:
    return value * torch.rsqrt(value.square().mean(-1, keepdim=True) + epsilon)
