# SPDX-License-Identifier: Apache-2.0
"""Verbatim passages of the private corpus are found; common and public ones are not."""

from pathlib import Path

import pytest

from allograft.errors import RejectedError
from allograft.privacy.overlap import Document, OverlapIndex, index_corpus, read_index

KEY = bytes(range(32))
RARE = "he fell from the red barn roof while mending a kite for his sister"
COMMON = "the patient was advised to rest and to drink water after every meal"
PUBLIC = "four score and seven years ago our fathers brought forth a new nation"


@pytest.fixture
def index(tmp_path: Path) -> OverlapIndex:
    documents = [Document(f"p{n}", COMMON) for n in range(10)]
    documents += [Document("p1", RARE), Document("p2", PUBLIC)]
    # Ten notes of one person are one person.
    documents += [Document("p3", "x" + RARE[::-1])] * 10
    return index_corpus(documents, [PUBLIC], KEY, tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        RARE,
        f"Summary: {RARE.upper()}!",
        "He  fell\nfrom the r\u200bed barn, roof; while mending",
        "he fell from the red barn roof",  # seven words: by letters
        "fellfromtheredbarnroofwhile",
        "x" + RARE[::-1],
    ],
)
def test_a_rare_passage_is_found(index: OverlapIndex, text: str) -> None:
    assert index.count(text)["private-passage"] > 0


@pytest.mark.parametrize("text", [COMMON, PUBLIC, "a barn roof", "", "he fell from a blue barn"])
def test_common_public_and_short_text_passes(index: OverlapIndex, text: str) -> None:
    assert index.count(text) == {}


def test_nine_persons_are_few_and_ten_are_many(tmp_path: Path) -> None:
    for persons, found in ((9, True), (10, False)):
        documents = [Document(f"p{n}", RARE) for n in range(persons)]
        assert bool(index_corpus(documents, [], KEY, tmp_path).count(RARE)) is found


def test_the_same_person_counts_once_however_the_notes_are_ordered(tmp_path: Path) -> None:
    documents = [Document(f"p{n % 2}", RARE) for n in range(40)]
    assert index_corpus(documents, [], KEY, tmp_path).count(RARE)


def test_an_index_comes_back_under_its_key_alone(index: OverlapIndex, tmp_path: Path) -> None:
    path = tmp_path / "overlap"
    index.write(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert b"barn" not in path.read_bytes()
    assert read_index(path, KEY).count(RARE) == index.count(RARE)
    with pytest.raises(RejectedError) as error:
        read_index(path, bytes(32))
    assert error.value.code == "AG-PRV-072"


@pytest.mark.parametrize("damage", ["cut", "swapped", "other"])
def test_a_damaged_index_is_refused(index: OverlapIndex, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "overlap"
    index.write(path)
    content = path.read_bytes()
    path.write_bytes(
        {
            "cut": content[:-3],
            "swapped": content[:-16] + content[-8:] + content[-16:-8],
            "other": b"x" + content[1:],
        }[damage]
    )
    with pytest.raises(RejectedError) as error:
        read_index(path, KEY)
    assert error.value.code == "AG-PRV-072"


def test_another_key_gives_other_hashes(tmp_path: Path) -> None:
    first, second = (
        index_corpus([Document("p", RARE)], [], key, tmp_path) for key in (KEY, bytes(32))
    )
    first.write(tmp_path / "a")
    second.write(tmp_path / "b")
    assert (tmp_path / "a").read_bytes()[40:] != (tmp_path / "b").read_bytes()[40:]
    assert len(first) == len(second)


def test_nothing_is_left_in_the_scratch_directory(tmp_path: Path) -> None:
    index_corpus([Document("p", RARE)], [PUBLIC], KEY, tmp_path)
    assert list(tmp_path.iterdir()) == []
