# SPDX-License-Identifier: Apache-2.0
"""Documents in, windows of tokens out.

Invariant: unless they are packed, nothing crosses a document. Documents are tokenised one at a
time, long ones in pieces: one very long string can take a tokenizer many minutes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from allograft.errors import RejectedError
from allograft.recipes.documents import Document

#: A longer document is tokenised in pieces that end at white space.
_PIECE_CHARS = 20_000


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """Token windows of one length.

    Shapes: `tokens` [n, length] with padding on the right, `lengths` [n] (real tokens, at least
    2), `documents` [n] (which document a window begins in). `text_bytes` counts UTF-8 bytes of
    all text, for bits per byte.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    documents: torch.Tensor
    text_bytes: int

    def __len__(self) -> int:
        return int(self.tokens.shape[0])

    def choose(self, chosen: torch.Tensor) -> Windows:
        """Some of the windows, by a mask or by numbers; `text_bytes` stays that of all text."""
        return replace(
            self,
            tokens=self.tokens[chosen],
            lengths=self.lengths[chosen],
            documents=self.documents[chosen],
        )

    def digest(self) -> str:
        """SHA-256 over all tokens, their lengths and whose they are."""
        whole = hashlib.sha256(repr(tuple(self.tokens.shape)).encode())
        whole.update(self.tokens.contiguous().numpy().tobytes())
        whole.update(self.lengths.contiguous().numpy().tobytes())
        whole.update(self.documents.contiguous().numpy().tobytes())
        return whole.hexdigest()


def make_windows(
    documents: Sequence[Document], tokenizer: Any, length: int, *, packed: bool = False
) -> Windows:
    """Cut documents into windows of `length` tokens.

    Args:
        documents: Already split.
        tokenizer: A transformers tokenizer.
        length: Tokens per window, at least 2.
        packed: Join documents end to end, which wastes no padding but lets a window span several
            documents. For training without a per-document privacy unit, and never for evaluation.

    Raises:
        RejectedError: AG-RCP-030 if no window results, AG-RCP-035 for a length below 2.
    """
    if length < 2:
        raise RejectedError("AG-RCP-035", "a window needs at least two tokens")
    rows: list[list[int]] = []
    owners: list[int] = []
    stream: list[int] = []
    for number, document in enumerate(documents):
        stream += _tokenize(document.text, tokenizer)
        whole = len(stream) // length * length if packed else len(stream)
        for start in range(0, whole, length):
            rows.append(stream[start : start + length])
            owners.append(number)
        stream = stream[whole:] if packed else []
    if stream:
        rows.append(stream)
        owners.append(len(documents) - 1)
    text_bytes = sum(len(document.text.encode()) for document in documents)
    return _as_windows(rows, owners, length, text_bytes)


def make_person_windows(
    persons: Sequence[Sequence[Document]], tokenizer: Any, length: int, most: int
) -> Windows:
    """Cut each person's documents, laid end to end, into windows that hold nobody else's text.

    Args:
        persons: The documents of each person.
        tokenizer: A transformers tokenizer.
        length: Tokens per window, at least 2.
        most: Windows per person; what is beyond is not used.

    Returns:
        Windows whose `documents` count persons.

    Raises:
        RejectedError: AG-RCP-030 if no window results, AG-RCP-035 for a length below 2.
    """
    if length < 2:
        raise RejectedError("AG-RCP-035", "a window needs at least two tokens")
    rows: list[list[int]] = []
    owners: list[int] = []
    for number, documents in enumerate(persons):
        stream: list[int] = []
        for document in documents:
            stream += _tokenize(document.text, tokenizer)
            if len(stream) >= most * length:
                break
        cuts = [stream[start : start + length] for start in range(0, len(stream), length)]
        rows += cuts[:most]
        owners += [number] * len(cuts[:most])
    text_bytes = sum(len(d.text.encode()) for documents in persons for d in documents)
    return _as_windows(rows, owners, length, text_bytes)


def _as_windows(
    rows: Sequence[Sequence[int]], owners: Sequence[int], length: int, text_bytes: int
) -> Windows:
    usable = [(row, owner) for row, owner in zip(rows, owners, strict=True) if len(row) >= 2]
    if not usable:
        raise RejectedError("AG-RCP-030", "the documents are too short for a single window")
    tokens = torch.zeros(len(usable), length, dtype=torch.int64)
    for index, (row, _) in enumerate(usable):
        tokens[index, : len(row)] = torch.tensor(row)
    return Windows(
        tokens=tokens,
        lengths=torch.tensor([len(row) for row, _ in usable]),
        documents=torch.tensor([owner for _, owner in usable]),
        text_bytes=text_bytes,
    )


def _tokenize(text: str, tokenizer: Any) -> list[int]:
    """A document's tokens, with the tokenizer's own special tokens and an end mark."""
    ids: list[int] = []
    for index, piece in enumerate(_pieces(text)):
        ids += tokenizer.encode(piece, add_special_tokens=index == 0, verbose=False)
    end = tokenizer.eos_token_id
    if end is not None and (not ids or ids[-1] != end):
        ids.append(end)
    return ids


def _pieces(text: str) -> Iterator[str]:
    while len(text) > _PIECE_CHARS:
        cut = max(text.rfind(mark, 1, _PIECE_CHARS) for mark in ("\n", " "))
        cut = cut if cut > 0 else _PIECE_CHARS
        yield text[:cut]
        text = text[cut:]
    yield text
