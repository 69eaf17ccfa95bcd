# SPDX-License-Identifier: Apache-2.0
"""Text of an evaluation: split by document, freed of near-duplicates, with what overlap is left.

Answers of one collection share templates, so strongly that a table of word counts can beat every
neural recipe on a careless split. So near-duplicates are removed on both sides and across them,
the removal is counted, and the overlap that remains is told beside every table.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from allograft.crypto import canonical
from allograft.errors import RejectedError
from allograft.recipes.documents import Document, drop_near_duplicates

#: Words of a passage, as the text gate compares them.
PASSAGE_WORDS = 8

_WORD = re.compile(r"[^\W_]+")
#: Of a held-out document's passages; beyond it the document counts as a near-duplicate.
MOST_SHARED = 0.3

_LEAST_CHARS = 40  # shorter documents say more about their length than about a model


@dataclass(frozen=True, slots=True)
class Amounts:
    """How much text is taken; documents beyond it are not used.

    Attributes:
        donor_bytes: Training text of the donor.
        general_bytes: Training text of the reference models.
        validation: Held-out documents that choices are made on.
        test: Held-out documents that figures come from.
        chars: Characters of a held-out document that are measured.
        questions: Items of a label task that are asked.
    """

    donor_bytes: int
    general_bytes: int
    validation: int
    test: int
    chars: int
    questions: int = 40


@dataclass(frozen=True, slots=True)
class Question:
    """One item of a label task: the text before the label, and the number of the right one."""

    prompt: str
    right: int


@dataclass(frozen=True, slots=True)
class Sources:
    """Documents as somebody supplies them, training and held-out already apart.

    Attributes:
        domain: What the donor's text is, in a few words.
        training: The donor's.
        held_out: Of the same domain, from other documents (better: other sources).
        general_training: What reference models are trained on.
        general_held_out: What a recipient must stay good at.
        wrong: Text of another domain for the wrong-domain control; may be empty.
        nature: Where it comes from and how it was split, in a sentence.
        most_shared: A held-out document of the domain is dropped if more than this share of its
            passages stands in training text.
        questions: Held-out items of a label task; may be empty.
        labels: The labels to choose among, as they follow a prompt.
    """

    domain: str
    training: Sequence[Document]
    held_out: Sequence[Document]
    general_training: Sequence[Document]
    general_held_out: Sequence[Document]
    wrong: Sequence[Document] = ()
    nature: str = ""
    most_shared: float = MOST_SHARED
    questions: Sequence[Question] = ()
    labels: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Overlap:
    """What was removed, and what training and held-out text of the domain still share.

    Attributes:
        read: Held-out documents supplied.
        alike: Of those, dropped because another held-out or training document begins alike.
        shared: Of those, dropped because too many of their passages stand in training text.
        training_alike: Training documents dropped because another begins alike.
        passages: Share of the remaining test documents' passages that stand in training text.
        documents: Share of the remaining test documents with at least one such passage.
        most_shared: The share of passages from which a document was dropped.
    """

    read: int
    alike: int
    shared: int
    training_alike: int
    passages: float
    documents: float
    most_shared: float

    def __str__(self) -> str:
        """The removal and the rest, in a sentence."""
        return (
            f"Of {self.read:,} held-out documents {self.alike:,} began like another and "
            f"{self.shared:,} shared more than {self.most_shared:.0%} of their passages of "
            f"{PASSAGE_WORDS} words with training text: removed. Of the training documents "
            f"{self.training_alike:,} began like another: removed. What remains: "
            f"{self.passages:.1%} of the test documents' passages stand in training text, and "
            f"{self.documents:.0%} of the documents have one."
        )


@dataclass(frozen=True, slots=True)
class Texts:
    """Everything a run reads. Documents of no two fields overlap."""

    domain: str
    nature: str
    training: tuple[str, ...] = field(repr=False)
    validation: tuple[str, ...] = field(repr=False)
    test: tuple[str, ...] = field(repr=False)
    general_training: tuple[str, ...] = field(repr=False)
    general_validation: tuple[str, ...] = field(repr=False)
    general_test: tuple[str, ...] = field(repr=False)
    wrong: tuple[str, ...] = field(repr=False)
    overlap: Overlap
    general_overlap: Overlap
    questions: tuple[Question, ...] = ()
    labels: tuple[str, ...] = ()

    def digest(self) -> str:
        """SHA-256 (hex) over all of it."""
        return hashlib.sha256(canonical.dumps(_plain(asdict(self)))).hexdigest()


def make_texts(sources: Sources, amounts: Amounts) -> Texts:
    """Remove near-duplicates, cut to size and measure what is shared.

    Raises:
        RejectedError: AG-EVA-001 if too few documents are left.
    """
    training, held, overlap = _separate(
        sources.training, sources.held_out, amounts, amounts.donor_bytes, sources.most_shared
    )
    general, kept, general_overlap = _separate(
        sources.general_training,
        sources.general_held_out,
        amounts,
        amounts.general_bytes,
        MOST_SHARED,
    )
    cut = amounts.validation
    return Texts(
        domain=sources.domain,
        nature=sources.nature,
        training=training,
        validation=held[:cut],
        test=held[cut:],
        general_training=general,
        general_validation=kept[:cut],
        general_test=kept[cut:],
        wrong=_take(_shuffle(drop_near_duplicates(sources.wrong)), amounts.donor_bytes),
        overlap=overlap,
        general_overlap=general_overlap,
        questions=_choose_questions(sources, training, amounts.questions),
        labels=tuple(sources.labels),
    )


def _separate(
    training: Sequence[Document],
    held_out: Sequence[Document],
    amounts: Amounts,
    most_bytes: int,
    most_shared: float,
) -> tuple[tuple[str, ...], tuple[str, ...], Overlap]:
    """Training texts, held-out texts (validation first, then test), and what they share."""
    unique = drop_near_duplicates(training)
    # Judged together: a held-out document that begins like a training document is dropped.
    both = drop_near_duplicates([*unique, *held_out])
    distinct = [d for d in both[len(unique) :] if len(d.text) >= _LEAST_CHARS]
    taken = _take(_shuffle(unique), most_bytes)
    known = set[str]().union(*(_passages(text) for text in taken))
    left, shared = [], 0
    for document in _shuffle(distinct):
        text = document.text[: amounts.chars]
        if _share(text, known) > most_shared:
            shared += 1
        else:
            left.append(text)
    wanted = amounts.validation + amounts.test
    if len(left) < wanted or not taken:
        raise RejectedError(
            "AG-EVA-001", f"{len(left)} held-out documents are left, {wanted} needed"
        )
    test = left[amounts.validation : wanted]
    shares = [_share(text, known) for text in test]
    counts = [len(_passages(text)) for text in test]
    found = sum(share * count for share, count in zip(shares, counts, strict=True))
    overlap = Overlap(
        read=len(held_out),
        alike=len(held_out) - len(both) + len(unique),
        shared=shared,
        training_alike=len(training) - len(unique),
        passages=found / max(1, sum(counts)),
        documents=sum(share > 0 for share in shares) / len(test),
        most_shared=most_shared,
    )
    return taken, tuple(left[:wanted]), overlap


def _choose_questions(sources: Sources, training: Sequence[str], most: int) -> tuple[Question, ...]:
    """Questions whose passages are not those of training text, in an order of their own."""
    known = set[str]().union(*(_passages(text) for text in training))
    left = [q for q in sources.questions if _share(q.prompt, known) <= sources.most_shared]
    return tuple(sorted(left, key=lambda q: _digest(q.prompt))[:most])


def _passages(text: str) -> set[str]:
    words = _WORD.findall(text.casefold())
    ends = range(PASSAGE_WORDS, len(words) + 1)
    return {" ".join(words[end - PASSAGE_WORDS : end]) for end in ends}


def _share(text: str, known: set[str]) -> float:
    own = _passages(text)
    return len(own & known) / len(own) if own else 0.0


def _shuffle(documents: Sequence[Document]) -> list[Document]:
    """An order that follows from the documents' content alone."""
    return sorted(documents, key=lambda document: _digest(document.text))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _take(documents: Sequence[Document], most_bytes: int) -> tuple[str, ...]:
    taken: list[str] = []
    total = 0
    for document in documents:
        total += len(document.text.encode())
        if total > most_bytes and taken:
            break
        taken.append(document.text)
    return tuple(taken)


def _plain(value: object) -> canonical.Json:
    """Tuples as lists, for canonical JSON."""
    if isinstance(value, dict):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    assert isinstance(value, str | int | float)
    return value
