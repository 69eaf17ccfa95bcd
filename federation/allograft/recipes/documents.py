# SPDX-License-Identifier: Apache-2.0
"""Private text in, documents out. Free of tensor libraries.

Invariant: documents are deduplicated and split *before* they are cut into windows: a split by
window would put halves of one document on both sides.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import unicodedata
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allograft.errors import RejectedError

#: Characters of the normalised beginning by which two documents count as near-duplicates.
PREFIX_CHARS = 100

_SEPARATOR = "<|endoftext|>"
_PAIRS = (("prompt", "completion"), ("question", "answer"))


@dataclass(frozen=True, slots=True)
class Document:
    """One unit of text: one patient letter, one answer, one contract.

    `prompt` is the question's part where there is one. It is trained on like the rest; it is kept
    apart because answers repeat under different questions. `person` is the id of whom it is about,
    where the reader was asked for it.
    """

    body: str
    prompt: str = ""
    person: str = ""

    @property
    def text(self) -> str:
        """The whole text."""
        return f"{self.prompt}\n{self.body}" if self.prompt else self.body


def read_documents(path: Path, person_field: str = "") -> list[Document]:
    """Read a text file into documents, dropping empty ones.

    `.jsonl` holds one JSON object per line with `text`, `prompt`+`completion` or
    `question`+`answer`. Any other file is plain text: documents are separated by `<|endoftext|>`
    where that occurs, and by blank lines otherwise. Either may be gzip-compressed (`.gz`).

    Args:
        path: The file.
        person_field: Name of the JSONL field that holds a person's id; every record must have it.

    Raises:
        RejectedError: AG-RCP-031 if unreadable, AG-RCP-030 if nothing is in it, AG-PRV-081 if a
            record does not say whom it is about.
    """
    text = _read_text(path)
    stem = path.name.removesuffix(".gz")
    if stem.endswith(".jsonl"):
        lines = enumerate(text.split("\n"), 1)
        found = [_read_record(number, line, person_field) for number, line in lines]
        documents = [document for document in found if document is not None]
    elif person_field:
        raise RejectedError("AG-PRV-081", "plain text does not say whom it is about")
    else:
        cuts = text.split(_SEPARATOR) if _SEPARATOR in text else re.split(r"\n\s*\n", text)
        documents = [Document(cut.strip()) for cut in cuts]
    documents = [document for document in documents if document.body.strip()]
    if not documents:
        raise RejectedError("AG-RCP-030", "the file holds no text")
    return documents


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise RejectedError("AG-RCP-031", f"not UTF-8 at byte {error.start}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise RejectedError("AG-RCP-031", f"cannot read it: {type(error).__name__}") from error


def _read_record(number: int, line: str, person_field: str) -> Document | None:
    if not line.strip():
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RejectedError("AG-RCP-031", f"line {number} is not JSON") from error
    if not isinstance(record, dict):
        raise RejectedError("AG-RCP-031", f"line {number} is not a JSON object")
    document = _find_text(number, record, person_field)
    try:
        # A lone surrogate is JSON, but no tokenizer takes it: refused before anything is paid for.
        f"{document.text}{document.person}".encode()
    except UnicodeEncodeError as error:
        raise RejectedError("AG-RCP-031", f"line {number} holds half a character") from error
    return document


def _find_text(number: int, record: Mapping[str, Any], person_field: str) -> Document:
    person = _read_person(number, record, person_field) if person_field else ""
    if isinstance(record.get("text"), str):
        return Document(record["text"], person=person)
    for first, second in _PAIRS:
        if isinstance(record.get(first), str) and isinstance(record.get(second), str):
            return Document(record[second], record[first], person)
    raise RejectedError("AG-RCP-031", f"line {number} has none of the known text fields")


def _read_person(number: int, record: Mapping[str, Any], field: str) -> str:
    person = record.get(field)
    # Numbers are ids too; a missing one must not make everybody the same person.
    if isinstance(person, bool) or not isinstance(person, str | int) or not str(person).strip():
        raise RejectedError("AG-PRV-081", f"line {number} has no person's id in {field[:40]!a}")
    # As the register of people writes it: one person in two compositions is one unit of privacy.
    return unicodedata.normalize("NFC", str(person)).strip()


def group_persons(documents: Sequence[Document]) -> dict[str, list[Document]]:
    """The documents of each person, persons in the order of their first document."""
    persons: dict[str, list[Document]] = {}
    for document in documents:
        persons.setdefault(document.person, []).append(document)
    return persons


def drop_near_duplicates(documents: Sequence[Document]) -> list[Document]:
    """Keep the first of the documents whose bodies begin alike.

    Answers share templates and whole paragraphs across questions; without this, held-out figures
    measure memory.
    """
    seen: set[str] = set()
    kept = []
    for document in documents:
        key = " ".join(document.body.lower().split())[:PREFIX_CHARS]
        if key not in seen:
            seen.add(key)
            kept.append(document)
    return kept


def split_documents(
    documents: Sequence[Document], held_out: float, seed: int = 0
) -> tuple[list[Document], list[Document]]:
    """Split near-duplicate-free documents into training and held-out ones.

    Args:
        documents: All documents.
        held_out: Fraction that is held out, at least one document.
        seed: Same seed and documents, same split.

    Raises:
        RejectedError: AG-RCP-030 with fewer than two distinct documents.
    """
    unique = drop_near_duplicates(documents)
    if len(unique) < 2:
        raise RejectedError("AG-RCP-030", "fewer than two distinct documents")
    order = list(range(len(unique)))
    random.Random(seed).shuffle(order)  # noqa: S311  (a split, not a secret)
    count = min(max(1, round(held_out * len(unique))), len(unique) - 1)
    held = set(order[:count])
    train = [document for index, document in enumerate(unique) if index not in held]
    return train, [unique[index] for index in sorted(held)]
