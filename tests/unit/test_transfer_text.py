# SPDX-License-Identifier: Apache-2.0
"""Near-duplicates are removed on both sides and across them, and the removal is counted."""

from dataclasses import replace

import pytest

from allograft.errors import RejectedError
from allograft.evaluate.transfer.text import Question, make_texts
from allograft.recipes.documents import Document
from kit.transfer import AMOUNTS, SOURCES, own


def test_disjoint_text_is_kept_and_nothing_is_shared() -> None:
    texts = make_texts(SOURCES, AMOUNTS)
    assert (len(texts.validation), len(texts.test)) == (3, 4)
    assert not set(texts.validation) & set(texts.test)
    assert (texts.overlap.alike, texts.overlap.shared, texts.overlap.passages) == (0, 0, 0.0)
    assert all(len(text) <= AMOUNTS.chars for text in texts.test)


def test_a_document_that_begins_like_another_is_dropped_on_either_side() -> None:
    twin = Document(own(3) + " with another end")
    sources = replace(
        SOURCES,
        training=[*SOURCES.training, twin],
        held_out=[*SOURCES.held_out, Document(own(3) + " and a third end")],
    )
    found = make_texts(sources, AMOUNTS).overlap
    assert (found.training_alike, found.alike, found.shared) == (1, 1, 0)


def test_a_document_that_shares_passages_with_training_is_dropped() -> None:
    # It begins differently, so that only its passages give it away.
    copy = Document("an opening of its own that nobody wrote before " + own(5)[:350])
    found = make_texts(replace(SOURCES, held_out=[*SOURCES.held_out, copy]), AMOUNTS).overlap
    assert (found.alike, found.shared) == (0, 1)
    assert "1 shared more than 30%" in str(found)


def test_what_overlap_is_left_is_told() -> None:
    # A tenth of each held-out document was seen in training: too little to be dropped.
    shared = "this very sentence of eight words is everywhere"
    sources = replace(
        SOURCES,
        training=[*SOURCES.training, Document(f"{shared} {own(50)}")],
        held_out=[Document(f"{own(100 + n)[:300]} {shared}") for n in range(9)],
    )
    found = make_texts(sources, AMOUNTS).overlap
    assert found.shared == 0
    assert found.documents == 1.0
    assert 0 < found.passages < 0.1


def test_general_text_is_separated_in_the_same_way() -> None:
    sources = replace(SOURCES, general_held_out=[*SOURCES.general_held_out, Document(own(204))])
    assert make_texts(sources, AMOUNTS).general_overlap.alike == 1


def test_a_question_of_training_text_is_not_asked() -> None:
    fresh, known = Question(own(500), 0), Question(own(7), 1)
    sources = replace(SOURCES, questions=[fresh, known], labels=["yes", "no"])
    assert make_texts(sources, AMOUNTS).questions == (fresh,)


def test_refuses_too_few_documents() -> None:
    with pytest.raises(RejectedError, match="AG-EVA-001"):
        make_texts(replace(SOURCES, held_out=SOURCES.held_out[:6]), AMOUNTS)


def test_the_digest_covers_all_text() -> None:
    changed = replace(SOURCES, wrong=[Document(own(900))])
    digests = {make_texts(each, AMOUNTS).digest() for each in (SOURCES, changed)}
    assert len(digests) == 2
