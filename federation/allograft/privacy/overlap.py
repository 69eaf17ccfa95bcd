# SPDX-License-Identifier: Apache-2.0
"""Verbatim passages of the private corpus, found again in text that is about to leave.

A passage counts if it is rare: eight words in a row that fewer than k persons (10) share and that
no public text holds. Short strings (fewer than eight words) are compared by 24 letters and digits
from the start of a word. The corpus is kept as sorted 64-bit keyed hashes, 8 bytes a passage.

Passages are hashed with keyed BLAKE2b to 64 bits: a text of a million passages meets an index of a
billion by chance with odds of 5 in 100,000. Without the key the hashes tell nothing, but key and
index together allow guessing: both stay at the site, readable by its user alone.

Not found: paraphrase, a passage in which every eighth word was changed, translations.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeAlias

import numpy as np
import numpy.typing as npt

from allograft.durable import durable_file, storage_errors
from allograft.errors import RejectedError, UnavailableError
from allograft.plainfile import open_plain
from allograft.privacy.folding import fold_text

#: Words of a passage, letters and digits of a short one, and the persons who make it common.
WORDS = 8
LETTERS = 24
COMMON_PERSONS = 10

Hashes: TypeAlias = npt.NDArray[np.uint64]

_WORD = re.compile(r"[^\W_]+")
_MAGIC = b"allograft-overlap-v1\n"
_KEY_BYTES = 32
# Partitions by the hash's highest bits bound memory to a 64th of the corpus's passages.
_PARTITION_BITS = 6
_SPILL = 1 << 16


@dataclass(frozen=True, slots=True)
class Document:
    """A text of the private corpus and whose it is.

    Attributes:
        person: Any stable name of the person; it is hashed and not kept.
        text: The text.
    """

    person: str
    text: str


class OverlapIndex:
    """The rare passages of a private corpus.

    Args:
        hashes: Sorted hashes of the passages.
        key: The secret of 32 bytes that they were made under.
    """

    name = "corpus-overlap"

    def __init__(self, hashes: Hashes, key: bytes) -> None:
        self._hashes = hashes
        self._hasher = _Hasher(key)
        self._key = key

    def __len__(self) -> int:
        """How many rare passages there are; the figure stays at the site."""
        return len(self._hashes)

    def count(self, text: str) -> dict[str, int]:
        """Count passages of a text that stand in the corpus; empty means none was found."""
        passages = self._hasher.hash_leaving(text)
        found = int(np.count_nonzero(_among(passages, self._hashes)))
        return {"private-passage": found} if found else {}

    def write(self, path: Path) -> None:
        """Write the index, readable by this user alone; the key is kept elsewhere.

        Raises:
            UnavailableError: AG-STO-001 when the disk is full or fails.
        """
        with durable_file(path) as sink:
            sink.write(_MAGIC + _key_check(self._key))
            sink.write(self._hashes.astype("<u8", copy=False).tobytes())


def read_index(path: Path, key: bytes) -> OverlapIndex:
    """Read an index that was written under this key.

    Raises:
        RejectedError: AG-PRV-072 if the file is no index, is damaged, or has another key.
        UnavailableError: AG-STO-005 if there is no such file.
    """
    try:
        with open_plain(path) as source:
            head = source.read(len(_MAGIC) + 16)
            content = source.read()
    except FileNotFoundError as error:
        raise UnavailableError("AG-STO-005", f"there is no overlap index {path}") from error
    except OSError as error:
        raise RejectedError("AG-PRV-072", f"{path.name}: {error.strerror}") from error
    if not head.startswith(_MAGIC) or len(content) % 8:
        raise RejectedError("AG-PRV-072", f"{path.name} is not an overlap index")
    # Under another key no passage would ever be found again, which would look like a pass.
    if head[len(_MAGIC) :] != _key_check(key):
        raise RejectedError("AG-PRV-072", f"{path.name} was made under another key")
    hashes = np.frombuffer(content, dtype="<u8").astype(np.uint64, copy=False)
    if len(hashes) and bool((hashes[1:] <= hashes[:-1]).any()):
        raise RejectedError("AG-PRV-072", f"{path.name} is damaged: its hashes are not in order")
    return OverlapIndex(hashes, key)


def index_corpus(
    documents: Iterable[Document],
    public: Iterable[str],
    key: bytes,
    scratch: Path,
    common_persons: int = COMMON_PERSONS,
) -> OverlapIndex:
    """Index the rare passages of a private corpus.

    Args:
        documents: The corpus, in any order; a person may have any number of texts.
        public: Texts that anyone may read; their passages are never counted.
        key: 32 random bytes that stay at the site.
        scratch: Directory for temporary files (hashes only), 16 bytes a passage.
        common_persons: A passage of this many persons or more is common.

    Raises:
        UnavailableError: AG-STO-001 when the disk is full.
    """
    hasher = _Hasher(key)
    with storage_errors("the overlap index"), contextlib.ExitStack() as stack:
        private, allowed = (stack.enter_context(_partitions(scratch)) for _ in range(2))
        for document in documents:
            passages = hasher.hash_corpus(document.text)
            person = np.full(len(passages), hasher.hash_name(document.person))
            private.add(np.stack([passages, person], axis=1))
        for text in public:
            passages = hasher.hash_corpus(text)
            allowed.add(np.stack([passages, np.zeros_like(passages)], axis=1))
        rare = [
            _rare(pairs, common, common_persons)
            for pairs, common in zip(private.read(), allowed.read(), strict=True)
        ]
    return OverlapIndex(np.concatenate(rare), key)


def _rare(pairs: Hashes, allowed: Hashes, common_persons: int) -> Hashes:
    """Passages of one partition that few persons share and no public text holds, sorted."""
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))
    pairs = pairs[order]
    is_new = np.ones(len(pairs), dtype=bool)
    is_new[1:] = (pairs[1:] != pairs[:-1]).any(axis=1)
    passages, persons = np.unique(pairs[is_new, 0], return_counts=True)
    rare: Hashes = passages[persons < common_persons]
    public: Hashes = np.unique(allowed[:, 0])
    return rare[~_among(rare, public)]


def _among(values: Hashes, ordered: Hashes) -> npt.NDArray[np.bool_]:
    """Which values stand in a sorted array."""
    if not len(ordered):
        return np.zeros(len(values), dtype=bool)
    places = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    return np.asarray(ordered[places] == values)


class _Hasher:
    """Keyed BLAKE2b with 64 bits over passages."""

    def __init__(self, key: bytes) -> None:
        if len(key) != _KEY_BYTES:
            raise ValueError(f"the key of an overlap index has {_KEY_BYTES} bytes")
        self._keyed = hashlib.blake2b(digest_size=8, key=key)

    def hash_name(self, name: str) -> np.uint64:
        """The hash of a person's name, which tells persons apart while counting."""
        return np.uint64(int.from_bytes(self._hash(b"p" + name.encode()), "little"))

    def hash_corpus(self, text: str) -> Hashes:
        """Distinct hashes of all passages: both kinds, so that a short string finds its note."""
        words = _words(text)
        return self._hash_all([*_by_words(words), *_by_letters(words)])

    def hash_leaving(self, text: str) -> Hashes:
        """Distinct hashes of the passages by which a leaving text is compared."""
        words = _words(text)
        return self._hash_all(_by_words(words) if len(words) >= WORDS else _by_letters(words))

    def _hash_all(self, passages: Iterable[bytes]) -> Hashes:
        hashes = b"".join(map(self._hash, passages))
        return np.unique(np.frombuffer(hashes, dtype="<u8").astype(np.uint64, copy=False))

    def _hash(self, content: bytes) -> bytes:
        # A copy of the keyed state costs a third of keying afresh.
        state = self._keyed.copy()
        state.update(content)
        return state.digest()


def _words(text: str) -> list[str]:
    return _WORD.findall(fold_text(text).casefold())


def _by_words(words: Sequence[str]) -> Iterator[bytes]:
    for start in range(len(words) - WORDS + 1):
        yield " ".join(words[start : start + WORDS]).encode()


def _by_letters(words: Sequence[str]) -> Iterator[bytes]:
    """Runs of letters and digits from each word's start, without regard to spaces."""
    stream, start = "".join(words), 0
    for word in words:
        if start + LETTERS > len(stream):
            return
        # No run of words begins with a colon, so the two kinds cannot meet.
        yield b":" + stream[start : start + LETTERS].encode()
        start += len(word)


class _Partitions:
    """Pairs of hashes, spilled to one temporary file for each value of their highest bits."""

    def __init__(self, files: Sequence[IO[bytes]]) -> None:
        self._files = files
        self._waiting: list[Hashes] = []
        self._count = 0

    def add(self, pairs: Hashes) -> None:
        self._waiting.append(pairs)
        self._count += len(pairs)
        if self._count >= _SPILL:
            self._spill()

    def read(self) -> Iterator[Hashes]:
        self._spill()
        for file in self._files:
            file.seek(0)
            yield np.frombuffer(file.read(), dtype=np.uint64).reshape(-1, 2)

    def _spill(self) -> None:
        if not self._waiting:
            return
        pairs = np.concatenate(self._waiting)
        self._waiting, self._count = [], 0
        numbers = pairs[:, 0] >> np.uint64(64 - _PARTITION_BITS)
        order = np.argsort(numbers, kind="stable")
        bounds = np.searchsorted(numbers[order], np.arange(len(self._files) + 1))
        for number, file in enumerate(self._files):
            file.write(pairs[order[bounds[number] : bounds[number + 1]]].tobytes())


@contextlib.contextmanager
def _partitions(scratch: Path) -> Iterator[_Partitions]:
    with contextlib.ExitStack() as stack:
        yield _Partitions(
            [
                stack.enter_context(tempfile.TemporaryFile(dir=scratch))
                for _ in range(1 << _PARTITION_BITS)
            ]
        )


def _key_check(key: bytes) -> bytes:
    return hashlib.blake2b(b"allograft overlap key", digest_size=16, key=key).digest()
