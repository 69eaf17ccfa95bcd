# SPDX-License-Identifier: Apache-2.0
"""Changes written into weights, and taken out again exactly.

A patched tensor remembers its original and every change on it, by owner. Its value is always
original + the sum of the changes in the order of their owners' ids, so it depends on which
attachments are on the model and not on the history; with none left the original bits return.

The sum is formed a few rows at a time: beside the weights, their originals and the attachments'
own tensors, writing takes one block of rows in float32, never a dense change of a whole matrix.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from allograft.errors import RejectedError
from allograft.recipes.blocks import has_insertions

_PATCHES = "allograft_patches"

#: Set on a model's trunk while a prompt is on the model: the id of the attachment.
PROMPT_OWNER = "allograft_prompt_owner"

#: Entries of a block of rows, 16 MiB in float32.
_BLOCK_ENTRIES = 1 << 22


class Change(Protocol):
    """What an attachment adds to one tensor, at its dose."""

    @property
    def scale(self) -> float:
        """What the change is multiplied with; at 0 the tensor is as without it, to the bit."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor as it is stored."""
        ...

    def add_to(self, rows: torch.Tensor, first: int) -> None:
        """Add the scaled change to float32 rows of the tensor, the first of them number `first`."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """scale · left right, with left [rows, rank] and right [rank, columns] as stored."""

    left: torch.Tensor
    right: torch.Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix."""
        return len(self.left), self.right.shape[1]

    def add_to(self, rows: torch.Tensor, first: int) -> None:
        """See `Change`."""
        left = self.left[first : first + len(rows)].to(rows.device, torch.float32)
        rows.addmm_(left, self.right.to(rows.device, torch.float32), alpha=self.scale)


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """scale · value."""

    value: torch.Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return tuple(self.value.shape)

    def add_to(self, rows: torch.Tensor, first: int) -> None:
        """See `Change`."""
        part = self.value[first : first + len(rows)]
        rows.add_(part.to(rows.device, torch.float32), alpha=self.scale)


#: A module, the name of its parameter and the change to it.
Place = tuple[nn.Module, str, Change]


@dataclass(slots=True)
class _Patches:
    original: torch.Tensor
    changes: dict[str, Change] = field(default_factory=dict)


def patch(places: Iterable[Place], owner: str) -> None:
    """Add an owner's changes to parameters, or replace its earlier ones there: all or none.

    Raises:
        RejectedError: AG-RCP-003 if a change has another shape than its parameter.
    """
    done: list[tuple[nn.Module, str, Change | None]] = []
    try:
        for module, name, change in places:
            value = _parameter(module, name)
            if tuple(value.shape) != change.shape:
                raise RejectedError("AG-RCP-003", "a change does not fit its tensor")
            patched: dict[str, _Patches] = vars(module).setdefault(_PATCHES, {})
            patches = patched.setdefault(name, _Patches(value.detach().clone()))
            done.append((module, name, patches.changes.get(owner)))
            patches.changes[owner] = change
            _write(value, patches)
    except BaseException:
        # Memory may run out in the middle; the model must then be what it was.
        for module, name, before in reversed(done):
            _replace(module, name, owner, before)
        raise


def unpatch(places: Iterable[tuple[nn.Module, str]], owner: str) -> None:
    """Take an owner's changes out.

    Raises:
        RejectedError: AG-RCP-023 if it has none at one of the places.
    """
    for module, name in places:
        patches = _find(module).get(name)
        if patches is None or owner not in patches.changes:
            raise RejectedError("AG-RCP-023", "the attachment is not on this model")
        _replace(module, name, owner, None)


def is_patched(module: nn.Module, owner: str | None = None) -> bool:
    """Whether a module carries a change (of this owner)."""
    patched = _find(module).values()
    return any(owner is None or owner in patches.changes for patches in patched)


def matrix_shape(module: nn.Module, transposed: bool) -> tuple[int, int]:
    """(outputs, inputs) of a linear module, whichever way round it is stored."""
    first, second = _parameter(module, "weight").shape
    return (second, first) if transposed else (first, second)


def original_of(module: nn.Module, name: str = "weight") -> torch.Tensor:
    """A module's parameter as it is without any change on it; not to be written to."""
    patches = _find(module).get(name)
    return _parameter(module, name).detach() if patches is None else patches.original


def has_attachments(model: PreTrainedModel) -> bool:
    """Whether a model carries anything that an attachment put there."""
    return has_insertions(model) or any(
        is_patched(module) or hasattr(module, PROMPT_OWNER) for module in model.modules()
    )


def _find(module: nn.Module) -> dict[str, _Patches]:
    found: dict[str, _Patches] = vars(module).get(_PATCHES, {})
    return found


def _replace(module: nn.Module, name: str, owner: str, change: Change | None) -> None:
    """Put back what an owner had at a place before, or nothing."""
    patched = _find(module)
    patches = patched[name]
    if change is None:
        del patches.changes[owner]
    else:
        patches.changes[owner] = change
    _write(_parameter(module, name), patches)
    if not patches.changes:
        del patched[name]
    if not patched:
        delattr(module, _PATCHES)


def _write(value: nn.Parameter, patches: _Patches) -> None:
    # A change at dose 0 adds nothing, not even the rounding of a sum.
    active = [patches.changes[owner] for owner in sorted(patches.changes)]
    active = [change for change in active if change.scale != 0.0]
    with torch.no_grad():
        if not active:
            value.copy_(patches.original)
            return
        step = max(1, _BLOCK_ENTRIES * len(value) // value.numel())
        for first in range(0, len(value), step):
            rows = patches.original[first : first + step].to(value.device, torch.float32, copy=True)
            for change in active:
                change.add_to(rows, first)
            value[first : first + step].copy_(rows)


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    value = getattr(module, name, None)
    if not isinstance(value, nn.Parameter):
        raise RejectedError("AG-RCP-003", "a change targets something without a parameter")
    return value
