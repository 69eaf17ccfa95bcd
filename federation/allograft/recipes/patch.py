# SPDX-License-Identifier: Apache-2.0
"""Low-rank changes written into weights, and taken out again exactly.

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
from allograft.recipes.mixture import has_experts

_PATCHES = "allograft_patches"


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """scale · B A, with A [rank, inputs] and B [outputs, rank]."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    transposed: bool  # the matrix is stored input-first

    def dense(self, device: torch.device) -> torch.Tensor:
        """The change as a matrix in the storage order of the weight, in float32."""
        product = self.b.to(device, torch.float32) @ self.a.to(device, torch.float32)
        return (product.T if self.transposed else product) * self.scale


@dataclass(slots=True)
class _Patches:
    original: torch.Tensor
    changes: dict[str, Change] = field(default_factory=dict)


def patch(module: nn.Module, owner: str, change: Change) -> None:
    """Add a change to a module's weight, or replace this owner's earlier one.

    Raises:
        RejectedError: AG-RCP-003 if the change has another shape than the weight.
    """
    weight = _weight(module)
    if matrix_shape(module, change.transposed) != (change.b.shape[0], change.a.shape[1]):
        raise RejectedError("AG-RCP-003", "a low-rank change does not fit its matrix")
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


def has_attachments(model: PreTrainedModel) -> bool:
    """Whether a model carries anything that an attachment put there."""
    changed = has_insertions(model) or any(is_patched(module) for module in model.modules())
    return changed or has_experts(model)


def _write(weight: nn.Parameter, patches: _Patches) -> None:
    with torch.no_grad():
        # A change at dose 0 adds nothing, not even the rounding of a sum.
        active = {owner: c for owner, c in patches.changes.items() if c.scale != 0.0}
        if not active:
            weight.copy_(patches.original)
            return
        total = patches.original.to(weight.device, torch.float32, copy=True)
        for owner in sorted(active):
            total += active[owner].dense(weight.device)
        weight.copy_(total)


def _weight(module: nn.Module) -> nn.Parameter:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 2:
        raise RejectedError("AG-RCP-003", "a low-rank change targets something without a matrix")
    return weight
