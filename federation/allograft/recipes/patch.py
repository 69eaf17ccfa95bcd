# SPDX-License-Identifier: Apache-2.0
"""Changes written into weights, and taken out again exactly.

A patched tensor remembers its original and every change on it, by owner. Its value is always
original + the sum of the changes in the order of their owners' ids, so it depends on which
attachments are on the model and not on the history; with none left the original bits return.

The sum is formed a few rows at a time: beside the weights, their originals and the attachments'
own tensors, writing takes one block of rows in float32, never a dense change of a whole matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from allograft.errors import RejectedError
from allograft.recipes.base import Attachment
from allograft.recipes.blocks import has_insertions
from allograft.recipes.mixture import has_experts
from allograft.recipes.shortage import memory_errors

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

    def add_to(self, rows: torch.Tensor, original: torch.Tensor, first: int) -> None:
        """Add the scaled change to some rows of the tensor.

        Args:
            rows: Changed in place, float32.
            original: The same rows without any change on them, float32.
            first: Number of the first of them.
        """
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

    def add_to(self, rows: torch.Tensor, original: torch.Tensor, first: int) -> None:
        """See `Change`."""
        del original
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

    def add_to(self, rows: torch.Tensor, original: torch.Tensor, first: int) -> None:
        """See `Change`."""
        del original
        part = self.value[first : first + len(rows)]
        rows.add_(part.to(rows.device, torch.float32), alpha=self.scale)


@dataclass(frozen=True, slots=True, eq=False)
class Rescaled:
    """scale · (V with each output's row times its factor, less W), for V = W + a low-rank change.

    What DoRA does, with the factors m / |V| of `recipes.lora`.
    """

    low_rank: LowRank
    factors: torch.Tensor  # [outputs], float32
    transposed: bool
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix."""
        return self.low_rank.shape

    def add_to(self, rows: torch.Tensor, original: torch.Tensor, first: int) -> None:
        """See `Change`."""
        after = original.clone()
        self.low_rank.add_to(after, original, first)
        factors = self.factors.to(rows.device)
        after *= factors if self.transposed else factors[first : first + len(rows), None]
        rows.add_(after.sub_(original), alpha=self.scale)


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
        UnavailableError: AG-RCP-027 if memory runs out.
    """
    done: list[tuple[nn.Module, str, Change | None]] = []
    try:
        with memory_errors("writing changes into weights"):
            for module, name, change in places:
                value = _parameter(module, name)
                if tuple(value.shape) != change.shape:
                    raise RejectedError("AG-RCP-003", "a change does not fit its tensor")
                patched: dict[str, _Patches] = vars(module).setdefault(_PATCHES, {})
                patches = patched.get(name) or _Patches(value.detach().clone())
                patched[name] = patches
                done.append((module, name, patches.changes.get(owner)))
                patches.changes[owner] = change
                _write(value, patches)
    except BaseException:
        # Memory may run out in the middle; the model must then be what it was.
        for module, name, before in reversed(done):
            _replace(module, name, owner, before)
        raise


def unpatch(model: PreTrainedModel, owner: str) -> None:
    """Take an owner's changes out, wherever they are.

    Raises:
        RejectedError: AG-RCP-023 if it has none.
    """
    places = [
        (module, name)
        for module in model.modules()
        for name, patches in _find(module).items()
        if owner in patches.changes
    ]
    if not places:
        raise RejectedError("AG-RCP-023", "the attachment is not on this model")
    for module, name in places:
        _replace(module, name, owner, None)


class PatchHandle:
    """An attachment at work as changes of a model's own parameters."""

    def __init__(
        self,
        attachment: Attachment,
        model: PreTrainedModel,
        places: Callable[[Attachment, PreTrainedModel], Iterable[Place]],
    ) -> None:
        """Put it there.

        Args:
            attachment: At the dose at which it is to act.
            model: Changed in place.
            places: An attachment's changes to a model, at the attachment's dose.

        Raises:
            RejectedError: AG-RCP-023 if it is already there; what `places` and `patch` refuse.
            UnavailableError: AG-RCP-027 if memory runs out.
        """
        if has_patches(model, attachment.attachment_id):
            raise RejectedError("AG-RCP-023", "the attachment is already on this model")
        patch(places(attachment, model), attachment.attachment_id)
        self.attachment = attachment
        self.model = model
        self._places = places

    def set_dose(self, dose: float) -> None:
        """Scale every change.

        Raises:
            RejectedError: AG-RCP-021 for a bad dose, AG-RCP-023 after detaching.
            UnavailableError: AG-RCP-027 if memory runs out; the dose is then as before.
        """
        if not has_patches(self.model, self.attachment.attachment_id):
            raise RejectedError("AG-RCP-023", "the attachment is not on this model")
        changed = replace(self.attachment, dose=dose)
        patch(self._places(changed, self.model), changed.attachment_id)
        self.attachment = changed


def has_patches(model: PreTrainedModel, owner: str) -> bool:
    """Whether an owner has changes anywhere on a model."""
    return any(is_patched(module, owner) for module in model.modules())


def is_patched(module: nn.Module, owner: str | None = None) -> bool:
    """Whether a module carries a change (of this owner)."""
    patched = _find(module).values()
    return any(owner is None or owner in patches.changes for patches in patched)


def matrix_shape(module: nn.Module, transposed: bool) -> tuple[int, int]:
    """(outputs, inputs) of a linear module, whichever way round it is stored."""
    first, second = _parameter(module, "weight").shape
    return (second, first) if transposed else (first, second)


def original_value(module: nn.Module, name: str = "weight") -> torch.Tensor:
    """A parameter of a module as it is without any change on it; not a copy."""
    patches = _find(module).get(name)
    return _parameter(module, name).detach() if patches is None else patches.original


def original_values(block: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters of a block as they are without any change on them; not copies."""
    found = {}
    for name, _ in block.named_parameters():
        module, _, parameter = name.rpartition(".")
        found[name] = original_value(block.get_submodule(module), parameter)
    return found


def walk_rows(tensor: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Blocks of rows of a tensor in float32, each with the number of its first row."""
    step = max(1, _BLOCK_ENTRIES * len(tensor) // max(tensor.numel(), 1))
    for first in range(0, len(tensor), step):
        yield first, tensor[first : first + step].to(torch.float32)


def make_dense(change: Change, original: torch.Tensor) -> torch.Tensor:
    """A change of a whole tensor, float32."""
    rows = torch.zeros(change.shape, device=original.device)
    change.add_to(rows, original.to(torch.float32), 0)
    return rows


def has_attachments(model: PreTrainedModel) -> bool:
    """Whether a model carries anything that an attachment put there."""
    changed = has_insertions(model) or has_experts(model)
    return changed or any(
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
        for first, original in walk_rows(patches.original):
            original = original.to(value.device)
            rows = original.clone()
            for change in active:
                change.add_to(rows, original, first)
            value[first : first + len(rows)].copy_(rows)


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    value = getattr(module, name, None)
    if not isinstance(value, nn.Parameter):
        raise RejectedError("AG-RCP-003", "a change targets something without a parameter")
    return value
