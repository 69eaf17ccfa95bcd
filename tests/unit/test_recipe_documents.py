# SPDX-License-Identifier: Apache-2.0
"""Text to windows: split by document, deduplicated, and refused with a code when unusable."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st

from allograft.errors import RejectedError
from allograft.privacy.population import Population
from allograft.recipes.documents import (
    Document,
    drop_near_duplicates,
    group_persons,
    read_documents,
    split_documents,
)
from allograft.recipes.windows import make_windows


class Letters:
    """A tokenizer of one token per character, with a start and an end mark."""

    eos_token_id = 2

    def __init__(self) -> None:
        self.longest = 0

    def encode(self, text: str, add_special_tokens: bool, verbose: bool) -> list[int]:
        self.longest = max(self.longest, len(text))
        return [1] * add_special_tokens + [3 + ord(letter) % 200 for letter in text]


def write(path: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["notes.jsonl", "notes.jsonl.gz"])
def test_reads_json_lines_of_every_known_form(name: str, tmp_path: Path) -> None:
    lines = [
        {"text": "one", "id": 7},
        {"prompt": "why", "completion": "because"},
        {"question": "what", "answer": "that", "src": "x"},
        {"text": "  "},
    ]
    path = write(tmp_path / name, "\n".join(map(json.dumps, lines)) + "\n\n")
    assert read_documents(path) == [
        Document("one"),
        Document("because", "why"),
        Document("that", "what"),
    ]


@pytest.mark.parametrize("name", ["notes.txt", "notes.txt.gz"])
def test_reads_plain_text_by_blank_lines_or_end_marks(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, "one\nline\n\n \ntwo\r\n\r\nthree\n")
    assert [d.body for d in read_documents(path)] == ["one\nline", "two", "three"]
    write(path, "one\n\nstill one<|endoftext|>two<|endoftext|>")
    assert [d.body for d in read_documents(path)] == ["one\n\nstill one", "two"]


def test_reads_a_byte_order_mark_as_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "one"}')
    assert read_documents(path) == [Document("one")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"caf\xe9"),
        ("a.jsonl", b'{"text": "\xff"}'),
        ("a.jsonl", b"{not json}"),
        ("a.jsonl", b"[1, 2]"),
        ("a.jsonl", b'{"body": "x"}'),
        ("a.jsonl", b'{"text": 3}'),
        ("a.jsonl", b'{"prompt": "x"}'),
        ("a.jsonl", b"[" * 100_000),
        ("a.jsonl", b'{"text": "x", "more": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        ("a.jsonl", b'{"text": "half \\ud800 a character"}'),
        ("a.jsonl", b'{"prompt": "\\udfff", "completion": "x"}'),
    ],
)
def test_refuses_unreadable_text(name: str, content: bytes, tmp_path: Path) -> None:
    with pytest.raises(RejectedError, match="AG-RCP-031") as caught:
        read_documents(write(tmp_path / name, content))
    assert "caf" not in str(caught.value)  # never quotes what it read


def test_refuses_half_a_character_in_a_persons_id(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "x", "person": "a\\ud800"}')
    with pytest.raises(RejectedError, match="AG-RCP-031"):
        read_documents(path, "person")


def test_a_whole_surrogate_pair_is_one_character(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "\\ud83d\\ude00"}')
    assert read_documents(path) == [Document("\U0001f600")]


def test_a_person_is_one_unit_however_the_id_is_composed(tmp_path: Path) -> None:
    """As one unit in training as in the register, or its gradient would be clipped twice."""
    ids = ["M\u00fcller-1", "Mu\u0308ller-1", " M\u00fcller-1\u00a0"]
    lines = [json.dumps({"text": str(number), "person": who}) for number, who in enumerate(ids)]
    persons = group_persons(read_documents(write(tmp_path / "a.jsonl", "\n".join(lines)), "person"))
    assert {who: len(found) for who, found in persons.items()} == {"M\u00fcller-1": 3}
    assert len(Population(tmp_path, b"k" * 32)._digests(ids)) == len(persons)


def test_refuses_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(RejectedError, match="AG-RCP-031"):
        read_documents(tmp_path / "absent.txt")
    whole = gzip.compress(b"some text " * 100)
    for name, content in (("a.txt.gz", b"no gzip"), ("b.txt.gz", whole[:-20])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RejectedError, match="AG-RCP-031"):
            read_documents(tmp_path / name)


@pytest.mark.parametrize(("name", "content"), [("a.txt", ""), ("a.txt", " \n\n "), ("a.jsonl", "")])
def test_refuses_empty_text(name: str, content: str, tmp_path: Path) -> None:
    with pytest.raises(RejectedError, match="AG-RCP-030"):
        read_documents(write(tmp_path / name, content))


def test_answers_that_begin_alike_count_once_whatever_was_asked() -> None:
    answer = "The same long answer, repeated for many diseases. " * 4
    documents = [
        Document(answer + "A", "what is A?"),
        Document(answer.upper().replace(" ", "  ") + "B", "what is B?"),
        Document("Something else.", "what is A?"),
    ]
    assert drop_near_duplicates(documents) == [documents[0], documents[2]]


@given(st.integers(2, 60), st.floats(0, 1), st.integers(0, 5))
def test_split_loses_nothing_and_shares_nothing(count: int, held_out: float, seed: int) -> None:
    documents = [Document(f"document {number}") for number in range(count)]
    train, held = split_documents(documents, held_out, seed)
    assert train
    assert held
    assert sorted(d.body for d in train + held) == sorted(d.body for d in documents)
    assert (train, held) == split_documents(documents, held_out, seed)


def test_refuses_to_split_a_single_distinct_document() -> None:
    with pytest.raises(RejectedError, match="AG-RCP-030"):
        split_documents([Document("same text"), Document("Same  TEXT")], 0.5)


def test_windows_never_cross_a_document() -> None:
    documents = [Document("abcdef"), Document("hi"), Document("jklm")]
    windows = make_windows(documents, Letters(), 4)
    assert windows.documents.tolist() == [0, 0, 1, 2, 2]
    assert windows.lengths.tolist() == [4, 4, 4, 4, 2]
    assert windows.tokens[0, 0] == windows.tokens[-2, 0] == 1  # a document's start mark
    assert windows.tokens[-1, : windows.lengths[-1]].tolist()[-1] == 2  # and its end mark
    assert windows.text_bytes == 12


@given(st.lists(st.text("abc", min_size=1, max_size=30), min_size=1, max_size=8), st.integers(2, 9))
def test_windows_hold_every_token_of_every_document(texts: list[str], length: int) -> None:
    tokenizer = Letters()
    documents = [Document(text) for text in texts]
    windows = make_windows(documents, tokenizer, length)
    for number, text in enumerate(texts):
        expected = [*tokenizer.encode(text, True, False), 2]
        mine = [
            token
            for row, size, owner in zip(
                windows.tokens, windows.lengths, windows.documents, strict=True
            )
            if owner == number
            for token in row[:size].tolist()
        ]
        # A last piece of one token predicts nothing and is dropped.
        kept = len(expected) - (len(expected) % length == 1)
        assert mine == expected[:kept]
    packed = make_windows(documents, tokenizer, length, packed=True)
    whole = [t for text in texts for t in [*tokenizer.encode(text, True, False), 2]]
    flat = [t for row, size in zip(packed.tokens, packed.lengths, strict=True) for t in row[:size]]
    assert [int(token) for token in flat] == whole[: len(flat)]
    assert len(whole) - len(flat) == (len(whole) % length == 1)


def test_long_documents_are_tokenised_in_pieces() -> None:
    tokenizer = Letters()
    text = "word " * 30_000
    windows = make_windows([Document(text)], tokenizer, 512)
    assert tokenizer.longest <= 20_000
    total = int(windows.lengths.sum())
    assert total == len(text) + 2


def test_refuses_windows_too_short_or_none() -> None:
    with pytest.raises(RejectedError, match="AG-RCP-035"):
        make_windows([Document("abc")], Letters(), 1)
    with pytest.raises(RejectedError, match="AG-RCP-030"):
        make_windows([], Letters(), 8)


def test_digest_tells_data_apart() -> None:
    first, second = (make_windows([Document(t)], Letters(), 8) for t in ("abc", "abd"))
    assert first.digest() != second.digest()
    assert first.digest() == make_windows([Document("abc")], Letters(), 8).digest()
    assert first.tokens.dtype == torch.int64
