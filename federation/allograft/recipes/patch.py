# SPDX-License-Identifier: Apache-2.0
"""Changes written into weights, and taken out again exactly.

A patched matrix remembers its original and every change on it, by owner. Its value is always
original + the sum of the changes in the order of their owners' ids, so it depends on which
attachments are on the model and not on the history; with none left the original bits return.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel

from allograft.errors import RejectedError
from allograft.recipes.blocks import has_insertions

_PATCHES = "allograft_patches"


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """scale · B A, with A [rank, inputs] and B [outputs, rank]."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    transposed: bool  # the matrix is stored input-first

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that it fits, as stored."""
        outputs, inputs = self.b.shape[0], self.a.shape[1]
        return (inputs, outputs) if self.transposed else (outputs, inputs)

    def dense(self, original: torch.Tensor) -> torch.Tensor:
        """The change as a matrix in the storage order of the weight, in float32."""
        device = original.device
        product = self.b.to(device, torch.float32) @ self.a.to(device, torch.float32)
        return (product.T if self.transposed else product) * self.scale


@dataclass(frozen=True, slots=True, eq=False)
class DoraChange:
    """scale · (m V / |V| - W), where V is the original W with a low-rank change.

    m [outputs] and |V| are lengths of each output's row. A row of V without length stays without:
    PEFT would divide by zero.
    """

    low_rank: Change
    magnitude: torch.Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that it fits, as stored."""
        return self.low_rank.shape

    def dense(self, original: torch.Tensor) -> torch.Tensor:
        """The change as a matrix in the storage order of the weight, in float32."""
        before = original.to(torch.float32)
        after = before + self.low_rank.dense(original)
        wanted = self.magnitude.to(after.device, torch.float32)
        found = row_lengths(after, self.low_rank.transposed)
        factors = torch.where(found > 0.0, wanted / found, 0.0)
        after *= factors if self.low_rank.transposed else factors[:, None]
        return after.sub_(before).mul_(self.scale)


@dataclass(frozen=True, slots=True, eq=False)
class DenseChange:
    """scale · a matrix in the storage order of the weight."""

    matrix: torch.Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that it fits, as stored."""
        return tuple(self.matrix.shape)

    def dense(self, original: torch.Tensor) -> torch.Tensor:
        """The change, in float32."""
        return self.matrix.to(original.device, torch.float32) * self.scale


AnyChange = Change | DoraChange | DenseChange


@dataclass(slots=True)
class _Patches:
    original: torch.Tensor
    changes: dict[str, AnyChange] = field(default_factory=dict)


def patch(module: nn.Module, owner: str, change: AnyChange) -> None:
    """Add a change to a module's weight, or replace this owner's earlier one.

    Raises:
        RejectedError: AG-RCP-003 if the change has another shape than the weight.
    """
    weight = _weight(module)
    if change.shape != tuple(weight.shape):
        raise RejectedError("AG-RCP-003", "a change does not fit its matrix")
    patches: _Patches | None = getattr(module, _PATCHES, None)
    if patches is None:
        patches = _Patches(weight.detach().clone())
        setattr(module, _PATCHES, patches)
    patches.changes[owner] = change
    _write(weight, patches)


def unpatch(module: nn.Module, owner: str) -> None:
    """Take an owner's change out.

    Raises:
        RejectedError: AG-RCP-023 if it has none here.
    """
    patches: _Patches | None = getattr(module, _PATCHES, None)
    if patches is None or owner not in patches.changes:
        raise RejectedError("AG-RCP-023", "the attachment is not on this model")
    del patches.changes[owner]
    _write(_weight(module), patches)
    if not patches.changes:
        delattr(module, _PATCHES)


def is_patched(module: nn.Module, owner: str | None = None) -> bool:
    """Whether a module carries a change (of this owner)."""
    patches: _Patches | None = getattr(module, _PATCHES, None)
    return patches is not None and (owner is None or owner in patches.changes)


def matrix_shape(module: nn.Module, transposed: bool) -> tuple[int, int]:
    """(outputs, inputs) of a linear module, whichever way round it is stored."""
    first, second = _weight(module).shape
    return (second, first) if transposed else (first, second)


def original_weight(module: nn.Module) -> torch.Tensor:
    """A linear module's weight as it is without any change on it."""
    patches: _Patches | None = getattr(module, _PATCHES, None)
    return _weight(module).detach() if patches is None else patches.original


def row_lengths(weight: torch.Tensor, transposed: bool) -> torch.Tensor:
    """The length of each output's row, [outputs], in float32."""
    lengths: torch.Tensor = weight.to(torch.float32).norm(dim=0 if transposed else 1)
    return lengths


def has_attachments(model: PreTrainedModel) -> bool:
    """Whether a model carries anything that an attachment put there."""
    return has_insertions(model) or any(is_patched(module) for module in model.modules())


def _write(weight: nn.Parameter, patches: _Patches) -> None:
    with torch.no_grad():
        # A change at dose 0 adds nothing, not even the rounding of a sum.
        active = {owner: c for owner, c in patches.changes.items() if c.scale != 0.0}
        if not active:
            weight.copy_(patches.original)
            return
        original = patches.original.to(weight.device)
        total = original.to(torch.float32, copy=True)
        for owner in sorted(active):
            total += active[owner].dense(original)
        weight.copy_(total)


def _weight(module: nn.Module) -> nn.Parameter:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 2:
        raise RejectedError("AG-RCP-003", "a change targets something without a matrix")
    return weight
