# SPDX-License-Identifier: Apache-2.0
"""Texts planted in a training run to see what it keeps, and who is held out of it.

Invariant: canaries are made from public text alone, and every copy is a person of its own whose id
no real person can have. Whether a canary goes in, and who is held out, is decided by coins before
training. The coins stay at the site: who knows them can tell canaries from patients.
"""

from __future__ import annotations

import random
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from allograft.crypto import canonical
from allograft.errors import RejectedError

#: Ids that begin so are canaries; no real person may have one.
CANARY_PREFIX = "canary:"

RECORD_SCHEMA = "allograft.canaries.v1"
_RECORD_BYTES = 64 << 20
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")


class Style(StrEnum):
    """How a canary looks.

    `in-distribution` shuffles public sentences, so that nothing but its combination is new;
    `random-suffix` ends in words drawn at random, which bounds more strongly (arXiv 2503.06808).
    """

    IN_DISTRIBUTION = "in-distribution"
    RANDOM_SUFFIX = "random-suffix"


@dataclass(frozen=True, slots=True)
class CanaryPlan:
    """What is planted; public numbers.

    Attributes:
        coins: Canaries decided by a coin, half of each style. About half of them are planted.
        repeats: Levels of the exposure set: every canary of a level is planted so many times. Three
            give a slope; each further one dilutes the people and costs a fifth of the audit.
        per_level: Canaries of each level.
        references: Alternatives of each canary of the exposure set, which are never planted.
        prefix_words: Words of a public text that a random suffix follows.
        suffix_words: Random words; twelve are 16 tokens or more with usual tokenizers.
        body_sentences: Sentences of an in-distribution canary.
    """

    coins: int = 1000
    repeats: tuple[int, ...] = (1, 4, 16)
    per_level: int = 10
    references: int = 100
    prefix_words: int = 16
    suffix_words: int = 12
    body_sentences: int = 4

    def check(self) -> CanaryPlan:
        """Return itself if it can be made.

        Raises:
            RejectedError: AG-IN-003.
        """
        counts = (self.per_level, self.references, self.prefix_words, self.body_sentences)
        levels = list(self.repeats)
        if (
            self.coins < 0
            or min(counts) < 1
            or self.suffix_words < 4  # fewer would collide, and say little
            or levels != sorted(set(levels))
            or any(not 1 <= level <= 1024 for level in levels)
        ):
            raise RejectedError("AG-IN-003", "a number of the canaries' plan is out of range")
        return self


@dataclass(frozen=True, slots=True)
class CoinCanary:
    """A canary that a coin put in or held out."""

    style: Style
    text: str
    included: bool


@dataclass(frozen=True, slots=True)
class RepeatedCanary:
    """A canary planted a number of times, with what might have stood there instead.

    Attributes:
        repeats: How often it was planted, each time as another person.
        prompt: Public beginning.
        suffix: The secret.
        alternatives: Secrets drawn in the same way that were not planted.
    """

    repeats: int
    prompt: str
    suffix: str
    alternatives: tuple[str, ...]

    @property
    def text(self) -> str:
        """The planted text."""
        return f"{self.prompt} {self.suffix}"

    @property
    def reference_texts(self) -> tuple[str, ...]:
        """The texts it is compared with."""
        return tuple(f"{self.prompt} {other}" for other in self.alternatives)


@dataclass(frozen=True, slots=True)
class PlantedText:
    """A document to train on: one text of one canary person."""

    person: str
    text: str


@dataclass(frozen=True, slots=True)
class CanaryRecord:
    """What was planted and what was not. Private: it never leaves the site."""

    coins: tuple[CoinCanary, ...]
    repeated: tuple[RepeatedCanary, ...] = field(default=())

    def to_json(self) -> dict[str, canonical.Json]:
        """The record as a JSON object."""
        return {
            "schema": RECORD_SCHEMA,
            "coins": [
                {"style": str(c.style), "text": c.text, "included": c.included} for c in self.coins
            ],
            "repeated": [
                {
                    "repeats": c.repeats,
                    "prompt": c.prompt,
                    "suffix": c.suffix,
                    "alternatives": list(c.alternatives),
                }
                for c in self.repeated
            ],
        }

    @classmethod
    def from_json(cls, value: canonical.Json) -> CanaryRecord:
        """Read a record.

        Raises:
            RejectedError: AG-IN-003 if malformed.
        """
        fields = canonical.as_object(value, {"schema", "coins", "repeated"})
        if fields["schema"] != RECORD_SCHEMA:
            raise RejectedError("AG-IN-003", f"not a {RECORD_SCHEMA} document")
        return cls(
            tuple(_read_coin(entry) for entry in canonical.as_list(fields["coins"])),
            tuple(_read_repeated(entry) for entry in canonical.as_list(fields["repeated"])),
        )


def _read_coin(value: canonical.Json) -> CoinCanary:
    entry = canonical.as_object(value, {"style", "text", "included"})
    style = canonical.as_text(entry["style"])
    if style not in tuple(Style):
        raise RejectedError("AG-IN-003", "a canary has an unknown style")
    included = canonical.as_bool(entry["included"])
    return CoinCanary(Style(style), canonical.as_text(entry["text"]), included)


def _read_repeated(value: canonical.Json) -> RepeatedCanary:
    entry = canonical.as_object(value, {"repeats", "prompt", "suffix", "alternatives"})
    others = tuple(canonical.as_text(other) for other in canonical.as_list(entry["alternatives"]))
    return RepeatedCanary(
        canonical.as_int(entry["repeats"]),
        canonical.as_text(entry["prompt"]),
        canonical.as_text(entry["suffix"]),
        others,
    )


def make_canaries(
    public_texts: Sequence[str], plan: CanaryPlan | None = None, rng: random.Random | None = None
) -> tuple[tuple[PlantedText, ...], CanaryRecord]:
    """Make canaries and decide which are planted.

    Args:
        public_texts: Public material that looks like the private texts. What it holds may be told
            to anyone: never private text, which a canary would carry into every later report.
        plan: What to make.
        rng: Source of all choices; the operating system's randomness unless a test replaces it.

    Returns:
        The documents to add to the training data, in random order, and the private record.

    Raises:
        RejectedError: AG-PRV-079 if the public material is too small, AG-IN-003 for a plan out of
            range.
    """
    plan = (plan or CanaryPlan()).check()
    maker = _Maker(public_texts, plan, rng or secrets.SystemRandom())
    record = CanaryRecord(tuple(maker.coins()), tuple(maker.repeated()))
    return maker.plant(record), record


class _Maker:
    """Draws texts that differ from each other and from all public texts."""

    def __init__(self, public_texts: Sequence[str], plan: CanaryPlan, rng: random.Random) -> None:
        self._plan = plan
        self._rng = rng
        self._sentences = sorted({s for text in public_texts for s in _sentences(text)})
        self._words = sorted({word for text in public_texts for word in text.split()})
        self._prompts = [
            " ".join(words[: plan.prefix_words])
            for words in (text.split() for text in public_texts)
            if len(words) >= plan.prefix_words
        ]
        # Far fewer, and canaries or their alternatives would coincide or share what is learnt.
        sentences = max(20, 2 * plan.body_sentences)
        if len(self._sentences) < sentences or len(self._words) < 50 or len(self._prompts) < 10:
            raise RejectedError(
                "AG-PRV-079",
                f"canaries need at least {sentences} public sentences, 50 words and 10 texts of "
                f"{plan.prefix_words} words",
            )
        self._made = set(public_texts)

    def coins(self) -> Iterable[CoinCanary]:
        """The canaries decided by a coin, in an order that says nothing."""
        styles = [tuple(Style)[number % 2] for number in range(self._plan.coins)]
        self._rng.shuffle(styles)
        for style in styles:
            text = self._new(style)
            yield CoinCanary(style, text, self._rng.getrandbits(1) == 1)

    def repeated(self) -> Iterable[RepeatedCanary]:
        """The exposure set, level by level."""
        for repeats in self._plan.repeats:
            for _ in range(self._plan.per_level):
                prompt = self._rng.choice(self._prompts)
                # One draw of all, so that the secret is as random as what it is compared with.
                secret, *others = self._distinct_suffixes(self._plan.references + 1)
                yield RepeatedCanary(repeats, prompt, secret, tuple(others))

    def plant(self, record: CanaryRecord) -> tuple[PlantedText, ...]:
        """The documents of a record, each a person of its own."""
        texts = [canary.text for canary in record.coins if canary.included]
        texts += [canary.text for canary in record.repeated for _ in range(canary.repeats)]
        self._rng.shuffle(texts)
        return tuple(
            PlantedText(f"{CANARY_PREFIX}{self._rng.getrandbits(128):032x}", text) for text in texts
        )

    def _new(self, style: Style) -> str:
        for _ in range(100):
            if style is Style.RANDOM_SUFFIX:
                text = f"{self._rng.choice(self._prompts)} {self._suffix()}"
            else:
                text = " ".join(self._rng.sample(self._sentences, self._plan.body_sentences))
            if text not in self._made:
                self._made.add(text)
                return text
        raise RejectedError("AG-PRV-079", "the public material is too small for so many canaries")

    def _distinct_suffixes(self, count: int) -> list[str]:
        found: dict[str, None] = {}
        for _ in range(10 * count):
            found[self._suffix()] = None
            if len(found) == count:
                return list(found)
        raise RejectedError("AG-PRV-079", "the public material has too few words for alternatives")

    def _suffix(self) -> str:
        return " ".join(self._rng.choices(self._words, k=self._plan.suffix_words))


def _sentences(text: str) -> Iterable[str]:
    for sentence in _SENTENCE_END.split(text):
        stripped = " ".join(sentence.split())
        if len(stripped.split()) >= 3:
            yield stripped


@dataclass(frozen=True, slots=True)
class PersonSplit:
    """Who is trained on and who is held out, decided before training. Private."""

    train: tuple[str, ...]
    holdout: tuple[str, ...]

    def to_json(self) -> dict[str, canonical.Json]:
        """The split as a JSON object."""
        return {"train": list(self.train), "holdout": list(self.holdout)}

    @classmethod
    def from_json(cls, value: canonical.Json) -> PersonSplit:
        """Read a split.

        Raises:
            RejectedError: AG-IN-003 if malformed, or if somebody is on both sides.
        """
        fields = canonical.as_object(value, {"train", "holdout"})
        train, holdout = (
            tuple(canonical.as_text(person) for person in canonical.as_list(fields[side]))
            for side in ("train", "holdout")
        )
        if len({*train, *holdout}) != len(train) + len(holdout):
            raise RejectedError("AG-IN-003", "a split names a person twice")
        return cls(train, holdout)


def split_persons(
    persons: Iterable[str], holdout: float, rng: random.Random | None = None
) -> PersonSplit:
    """Hold persons out of training, each by a coin of its own.

    The split must be made before training and by chance: one made afterwards, or by date, measures
    how the groups differ and not what the model remembers (arXiv 2406.17975).

    Args:
        persons: Ids of all persons; repetitions count once.
        holdout: Chance of each to be held out.
        rng: Source of the coins; the operating system's randomness unless a test replaces it.

    Raises:
        RejectedError: AG-IN-003 if an id is that of a canary or the chance is none.
    """
    if not 0.0 < holdout < 1.0:
        raise RejectedError("AG-IN-003", "the share of held-out persons must be between 0 and 1")
    rng = rng or secrets.SystemRandom()
    train: list[str] = []
    held: list[str] = []
    # Sorted: the order of a data set must not decide which coin is whose.
    for person in sorted(set(persons)):
        if person.startswith(CANARY_PREFIX):
            raise RejectedError("AG-IN-003", f"a person's id begins with {CANARY_PREFIX}")
        (held if rng.random() < holdout else train).append(person)
    return PersonSplit(tuple(train), tuple(held))
