# SPDX-License-Identifier: Apache-2.0
"""Next-token losses of windows: of a batch, of one person, of several persons at once.

Invariant: what is computed for a person depends on that person's windows and on public constants
alone. So a person's windows are padded to a length that no other person has a say in; whoever
shares a batch has the same length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

from allograft.privacy.rowwise import RowLosses
from allograft.recipes.windows import Windows

#: (window numbers [b], tokens [b, t]) to logits [b, t, vocabulary].
Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

#: Lengths that a person's windows are padded to, as parts of a whole window. More of them would
#: compute less padding in more and smaller batches.
_LENGTHS = 4


def token_losses(logits: torch.Tensor, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each next token in nats, [b, t - 1]; 0 on padding."""
    positions = torch.arange(1, tokens.shape[1], device=tokens.device)
    padding = positions[None, :] >= lengths.to(tokens.device)[:, None]
    labels = tokens[:, 1:].masked_fill(padding, -100)
    flat = logits[:, :-1].float().flatten(0, 1)
    losses = functional.cross_entropy(flat, labels.flatten(), reduction="none", ignore_index=-100)
    return losses.view_as(labels)


class PersonLosses:
    """The mean loss over all tokens of a person's windows.

    Args:
        forward: The model.
        windows: The training text; `windows.documents` tells persons apart.
        most: Windows of one person that are used.
        batch_windows: Windows of a batch of several persons; one person's are never parted.
        device: Where the model is.
    """

    def __init__(
        self,
        forward: Forward,
        windows: Windows,
        most: int,
        batch_windows: int,
        device: torch.device,
    ) -> None:
        self._forward = forward
        self._windows = windows
        self._batch_windows = batch_windows
        self._device = device
        owners = sorted(set(windows.documents.tolist()))
        self._numbers = [torch.nonzero(windows.documents == owner)[:most, 0] for owner in owners]

    def __len__(self) -> int:
        return len(self._numbers)

    def loss_of(self, person: int) -> torch.Tensor:
        """The loss of one person, a scalar."""
        numbers = self._numbers[person]
        # Most persons fill no whole window: padding is not computed.
        losses = self._losses(numbers, int(self._windows.lengths[numbers].max()))
        return losses.sum() / self._targets(person)

    def split(self, persons: Sequence[int]) -> list[list[int]]:
        """Persons in batches of one length and of a bounded number of windows."""
        ordered = sorted(persons, key=self._size)
        batches: list[list[int]] = []
        length = used = 0
        for person in ordered:
            padded, windows = self._size(person)
            if not batches or padded != length or used + windows > self._batch_windows:
                batches.append([])
                length, used = padded, 0
            batches[-1].append(person)
            used += windows
        return batches

    def losses(self, persons: Sequence[int]) -> RowLosses:
        """The losses of one batch from `split`, a row for each window."""
        numbers = torch.cat([self._numbers[person] for person in persons])
        windows = tuple(len(self._numbers[person]) for person in persons)
        targets = torch.tensor([self._targets(person) for person in persons])
        each = torch.repeat_interleave(targets, torch.tensor(windows)).to(self._device)
        losses = self._losses(numbers, max(self._size(person)[0] for person in persons))
        return RowLosses(losses.sum(1) / each, windows)

    def widest(self) -> int:
        """A person with the most windows."""
        return max(range(len(self)), key=lambda person: len(self._numbers[person]))

    def _losses(self, numbers: torch.Tensor, length: int) -> torch.Tensor:
        tokens = self._windows.tokens[numbers, :length].to(self._device)
        half = self._device.type == "cuda"
        with torch.autocast(self._device.type, torch.bfloat16, enabled=half):
            logits = self._forward(numbers, tokens)
        return token_losses(logits, tokens, self._windows.lengths[numbers])

    def _targets(self, person: int) -> int:
        return int((self._windows.lengths[self._numbers[person]] - 1).sum())

    def _size(self, person: int) -> tuple[int, int]:
        """The length that a person's windows are padded to, and how many there are."""
        numbers = self._numbers[person]
        whole = self._windows.tokens.shape[1]
        part = -(-whole // _LENGTHS)
        longest = int(self._windows.lengths[numbers].max())
        return min(whole, -(-longest // part) * part), len(numbers)
