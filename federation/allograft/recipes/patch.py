# SPDX-License-Identifier: Apache-2.0
"""Changes of weights, and their undoing to the bit.

A low-rank change of a linear module stands beside its weight: the module's output gains what the
two factors make of its input. The weight is not touched, so attaching costs next to nothing, and
undoing is taking the factors away. `folded` writes such changes into the weights for a while, for
exports; a merged weight is rounded once more, in its own type, than the sum of two outputs.

Every other change is written into the tensor, which remembers its original and every change on it,
by owner. Its value is always original + the sum of the changes in the order of their owners' ids,
so it depends on which attachments are on the model and not on the history; with none left the
original bits return. The sum is formed a few rows at a time: beside the weights, their originals
and the attachments' own tensors, writing takes one block of rows in float32, never a dense change
of a whole matrix.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from allograft.errors import RejectedError
from allograft.recipes.base import Attachment
from allograft.recipes.blocks import has_insertions
from allograft.recipes.mixture import has_experts
from allograft.recipes.shortage import memory_errors

_PATCHES = "allograft_patches"
_BESIDE = "allograft_beside"

#: Set on a model's trunk while a prompt is on the model: the id of the attachment.
PROMPT_OWNER = "allograft_prompt_owner"

# A weight of either is multiplied with the input and nothing else; GPT-2's is stored transposed.
_LINEAR = (nn.Linear, Conv1D)

#: Entries of a block of rows, 4 MiB in float32: three are held at a time.
_BLOCK_ENTRIES = 1 << 20


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

    def apply(self, inputs: torch.Tensor, transposed: bool) -> torch.Tensor:
        """What the change adds to a linear module's output, [..., outputs].

        Args:
            inputs: The module's, [..., inputs].
            transposed: Whether its weight is stored as [inputs, outputs].
        """
        if transposed:
            return inputs @ self.left * self.scale @ self.right
        return inputs @ self.right.T * self.scale @ self.left.T

    def to(self, value: torch.Tensor) -> LowRank:
        """The same in the place and type of the matrix; not a copy where it is already."""
        return replace(self, left=self.left.to(value), right=self.right.to(value))


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


@dataclass(slots=True, eq=False)
class _Written:
    """The changes in one parameter."""

    module: nn.Module
    name: str
    original: torch.Tensor
    changes: dict[str, Change] = field(default_factory=dict)

    def put(self, owner: str, change: Change | None) -> None:
        """Replace an owner's change, or take it out."""
        if change is None:
            self.changes.pop(owner, None)
        else:
            self.changes[owner] = change
        _write(_parameter(self.module, self.name), self)
        if not self.changes:
            written = _written_in(self.module)
            del written[self.name]
            if not written:
                delattr(self.module, _PATCHES)


@dataclass(slots=True, eq=False)
class _Beside:
    """The low-rank changes beside one linear module's weight."""

    module: nn.Module
    hook: RemovableHandle
    changes: dict[str, LowRank] = field(default_factory=dict)

    def put(self, owner: str, change: LowRank | None) -> None:
        """Replace an owner's change, or take it away."""
        if change is None:
            self.changes.pop(owner, None)
        else:
            self.changes[owner] = change.to(_parameter(self.module, "weight"))
        if not self.changes:
            self.hook.remove()
            delattr(self.module, _BESIDE)


def patch(places: Iterable[Place], owner: str) -> None:
    """Put an owner's changes on parameters, or replace its earlier ones there: all or none.

    Raises:
        RejectedError: AG-RCP-003 if a change has another shape than its parameter.
        UnavailableError: AG-RCP-027 if memory runs out.
    """
    _patch(places, owner, beside=True)


def _patch(places: Iterable[Place], owner: str, beside: bool) -> None:
    undo: list[Callable[[], None]] = []
    try:
        with memory_errors("writing changes into weights"):
            for module, name, change in places:
                if tuple(_parameter(module, name).shape) != change.shape:
                    raise RejectedError("AG-RCP-003", "a change does not fit its tensor")
                if beside and isinstance(change, LowRank) and isinstance(module, _LINEAR):
                    aside = _ensure_beside(module)
                    undo.append(partial(aside.put, owner, aside.changes.get(owner)))
                    aside.put(owner, change)
                else:
                    written = _ensure_written(module, name)
                    undo.append(partial(written.put, owner, written.changes.get(owner)))
                    written.put(owner, change)
    except BaseException:
        # Memory may run out in the middle; the model must then be what it was.
        for put_back in reversed(undo):
            put_back()
        raise


def unpatch(model: PreTrainedModel, owner: str) -> None:
    """Take an owner's changes away, wherever they are.

    Raises:
        RejectedError: AG-RCP-023 if it has none.
    """
    places = [
        place
        for module in model.modules()
        for place in _changed_in(module)
        if owner in place.changes
    ]
    if not places:
        raise RejectedError("AG-RCP-023", "the attachment is not on this model")
    for place in places:
        place.put(owner, None)


@contextlib.contextmanager
def folded(model: PreTrainedModel) -> Iterator[None]:
    """Write the changes that stand beside weights into them, for the length of a block.

    Raises:
        UnavailableError: AG-RCP-027 if memory runs out.
    """
    found = [
        (module, owner, change)
        for module in model.modules()
        for owner, change in changes_beside(module).items()
    ]
    moved: list[tuple[nn.Module, str, LowRank]] = []
    try:
        for module, owner, change in found:
            _patch([(module, "weight", change)], owner, beside=False)
            moved.append((module, owner, change))
            _ensure_beside(module).put(owner, None)
        yield
    finally:
        for module, owner, change in moved:
            _ensure_beside(module).put(owner, change)
            _written_in(module)["weight"].put(owner, None)


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
    return any(owner is None or owner in place.changes for place in _changed_in(module))


def changes_beside(module: nn.Module) -> dict[str, LowRank]:
    """The low-rank changes beside a module's weight, by owner; those written are not among them."""
    beside: _Beside | None = vars(module).get(_BESIDE)
    return {} if beside is None else {name: beside.changes[name] for name in sorted(beside.changes)}


def matrix_shape(module: nn.Module, transposed: bool) -> tuple[int, int]:
    """(outputs, inputs) of a linear module, whichever way round it is stored."""
    first, second = _parameter(module, "weight").shape
    return (second, first) if transposed else (first, second)


def original_value(module: nn.Module, name: str = "weight") -> torch.Tensor:
    """A parameter of a module as it is without any change on it; not a copy."""
    patches = _written_in(module).get(name)
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


def _written_in(module: nn.Module) -> dict[str, _Written]:
    """What is written into a module's parameters, by name."""
    found: dict[str, _Written] = vars(module).get(_PATCHES, {})
    return found


def _changed_in(module: nn.Module) -> list[_Written | _Beside]:
    beside: _Beside | None = vars(module).get(_BESIDE)
    return [*_written_in(module).values(), *([] if beside is None else [beside])]


def _ensure_written(module: nn.Module, name: str) -> _Written:
    written: dict[str, _Written] = vars(module).setdefault(_PATCHES, {})
    if name not in written:
        original = _parameter(module, name).detach().clone()
        written[name] = _Written(module, name, original)
    return written[name]


def _ensure_beside(module: nn.Module) -> _Beside:
    beside: _Beside | None = vars(module).get(_BESIDE)
    if beside is None:
        beside = _Beside(module, module.register_forward_hook(_add_beside))
        vars(module)[_BESIDE] = beside
    return beside


def _add_beside(
    module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
) -> torch.Tensor:
    # Read from the module, not bound: a copy of the model has changes of its own.
    beside: _Beside = vars(module)[_BESIDE]
    weight = _parameter(module, "weight")
    # In the order of owners' ids, so that history does not show.
    for owner in sorted(beside.changes):
        change = beside.changes[owner]
        # At dose 0 not even the rounding of a sum.
        if change.scale == 0.0:
            continue
        if change.left.device != weight.device or change.left.dtype != weight.dtype:
            # A pipeline moves a model to its device.
            change = beside.changes[owner] = change.to(weight)
        output = output + change.apply(inputs[0], isinstance(module, Conv1D))
    return output


def _write(value: nn.Parameter, patches: _Written) -> None:
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
