# SPDX-License-Identifier: Apache-2.0
"""Held-out loss of a causal language model, document by document.

Invariant: the figures depend on the model, the tokenizer and the text only. Batches are formed
from token counts, so two measurements of the same texts run the same shapes in the same order,
and a restored model gives bit-equal results on the same device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from allograft.errors import RejectedError
from allograft.evaluate.bootstrap import Losses
from allograft.recipes.windows import Windows


@dataclass(frozen=True, slots=True)
class Scoring:
    """How documents are measured.

    Attributes:
        window_tokens: Longest piece the model sees at once; longer documents are cut into
            windows, and each token is predicted once.
        batch_tokens: Tokens per forward pass, padding included; bounds memory.
    """

    window_tokens: int = 512
    batch_tokens: int = 8192


@dataclass(frozen=True, slots=True)
class _Window:
    document: int
    start: int  # place of its first token in the document
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Prepared:
    """Documents cut into windows once, to be measured many times."""

    batches: tuple[tuple[_Window, ...], ...]
    tokens: tuple[int, ...]
    text_bytes: tuple[int, ...]


def prepare(
    texts: Sequence[str], tokenizer: Any, model: Any, scoring: Scoring | None = None
) -> Prepared:
    """Tokenise documents and lay them out in batches.

    The first token of a document is predicted where the tokenizer puts a start token before it,
    and otherwise only conditions the rest.

    Raises:
        RejectedError: AG-EVA-001 if a document has fewer than two tokens.
    """
    scoring = scoring or Scoring()
    limit = min(scoring.window_tokens, context_tokens(model))
    windows: list[_Window] = []
    counts = []
    for number, ids in enumerate(encode_all(tokenizer, texts)):
        if len(ids) < 2:
            raise RejectedError("AG-EVA-001", "a document is empty")
        # Windows share one token: the last of one conditions the first of the next.
        windows.extend(
            _Window(number, at, tuple(ids[at : at + limit]))
            for at in range(0, len(ids) - 1, limit - 1)
        )
        counts.append(len(ids) - 1)
    batches = tuple(_batches(windows, scoring.batch_tokens))
    return Prepared(batches, tuple(counts), tuple(len(text.encode("utf-8")) for text in texts))


def encode_all(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Tokens of several texts, each with the tokenizer's own special ones."""
    # Together: of short texts most of the time is the call.
    return list(tokenizer(list(texts), verbose=False)["input_ids"]) if texts else []


def prepare_windows(windows: Windows, scoring: Scoring | None = None) -> Prepared:
    """Lay out windows as a run was trained on them, each as a document of its own.

    Their text is not known, so bits per byte cannot be told.
    """
    scoring = scoring or Scoring()
    rows = [
        _Window(number, 0, tuple(row[:length]))
        for number, (row, length) in enumerate(
            zip(windows.tokens.tolist(), windows.lengths.tolist(), strict=True)
        )
    ]
    batches = tuple(_batches(rows, scoring.batch_tokens))
    counts = tuple(len(row.tokens) - 1 for row in rows)
    return Prepared(batches, counts, tuple(0 for _ in rows))


def context_tokens(model: Any) -> int:
    """How many tokens the model can see at once."""
    return max(int(getattr(model.config, "max_position_embeddings", 1 << 30)), 2)


def _batches(windows: list[_Window], batch_tokens: int) -> Iterator[tuple[_Window, ...]]:
    """Group windows of similar length, so that little of a batch is padding."""
    ordered = sorted(windows, key=lambda window: (len(window.tokens), window.document))
    batch: list[_Window] = []
    for window in ordered:
        if batch and (len(batch) + 1) * len(window.tokens) > batch_tokens:
            yield tuple(batch)
            batch = []
        batch.append(window)
    if batch:
        yield tuple(batch)


@torch.no_grad()
def measure(model: Any, prepared: Prepared) -> Losses:
    """Measure prepared documents with the model as it is now.

    The model is put into evaluation mode for the measurement and back afterwards.

    Raises:
        RejectedError: AG-EVA-002 if a loss is not a finite number.
    """
    nats = np.zeros(len(prepared.tokens), dtype=np.float64)
    with evaluating(model):
        for batch in prepared.batches:
            for window, value in zip(batch, _batch_nats(model, batch), strict=True):
                nats[window.document] += value
    if not np.isfinite(nats).all():
        raise RejectedError("AG-EVA-002", "a document has a loss that is not a finite number")
    return Losses(
        nats,
        np.array(prepared.tokens, dtype=np.int64),
        np.array(prepared.text_bytes, dtype=np.int64),
    )


@torch.no_grad()
def measure_tokens(model: Any, prepared: Prepared) -> tuple[npt.NDArray[np.float64], ...]:
    """Loss of each predicted token in nats, one array per document, in reading order.

    A token at the beginning of a window is predicted from little before it, so its loss is too
    high there.

    Raises:
        RejectedError: AG-EVA-002 if a loss is not a finite number.
    """
    nats = tuple(np.zeros(count, dtype=np.float64) for count in prepared.tokens)
    with evaluating(model):
        for batch in prepared.batches:
            losses = _batch_losses(model, batch).cpu().numpy()
            for window, row in zip(batch, losses, strict=True):
                size = len(window.tokens) - 1
                nats[window.document][window.start : window.start + size] = row[:size]
    if not all(np.isfinite(document).all() for document in nats):
        raise RejectedError("AG-EVA-002", "a token has a loss that is not a finite number")
    return nats


def predicted_tokens(prepared: Prepared) -> tuple[npt.NDArray[np.int64], ...]:
    """The tokens whose losses `measure_tokens` tells, in the same layout."""
    ids = tuple(np.zeros(count, dtype=np.int64) for count in prepared.tokens)
    for batch in prepared.batches:
        for window in batch:
            size = len(window.tokens) - 1
            ids[window.document][window.start : window.start + size] = window.tokens[1:]
    return ids


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Put a model into evaluation mode, and back afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _batch_nats(model: Any, batch: Sequence[_Window]) -> list[float]:
    """Summed loss of each window of a batch, accumulated in 64 bits."""
    return [float(value) for value in _batch_losses(model, batch).sum(dim=1).cpu()]


def _batch_losses(model: Any, batch: Sequence[_Window]) -> torch.Tensor:
    """Loss of each token of a batch in 64 bits, [windows, longest - 1]; 0 on padding."""
    ids, mask = pad_batch([window.tokens for window in batch], model.device)
    # No attention mask: what is real never looks right, where padding stands, and without a mask
    # attention takes its fast path.
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    return losses.view(len(batch), -1).double() * mask[:, 1:]


def pad_batch(
    rows: Sequence[Sequence[int]], device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token rows as a padded batch with its mask; padding stands right, so it changes nothing."""
    width = max(len(row) for row in rows)
    ids = torch.zeros((len(rows), width), dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[number, : len(row)] = 1
    return ids.to(device), mask.to(device)
