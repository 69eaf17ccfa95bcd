# SPDX-License-Identifier: Apache-2.0
"""Text and sizes for the referee's tests."""

import random
from dataclasses import replace

from allograft.evaluate.transfer.plan import ARMS, Size
from allograft.evaluate.transfer.text import Amounts, Question, Sources
from allograft.recipes.documents import Document
from allograft.recipes.shape import Shape


def own(number: int) -> str:
    """A document of words that no other has."""
    return " ".join(f"w{number}x{place}" for place in range(40))


AMOUNTS = Amounts(donor_bytes=100_000, general_bytes=100_000, validation=3, test=4, chars=400)
SOURCES = Sources(
    domain="letters",
    training=[Document(own(n)) for n in range(20)],
    held_out=[Document(own(100 + n)) for n in range(9)],
    general_training=[Document(own(200 + n)) for n in range(20)],
    general_held_out=[Document(own(300 + n)) for n in range(9)],
)


#: Trains every model in a second; its figures mean nothing.
TINY = Size(
    name="tiny",
    shape=Shape(300, 16, 32, 3, 2, 64),
    wide=Shape(300, 24, 48, 2, 2, 64),
    pretrain_steps=3,
    descend_steps=2,
    pretrain_rate=5e-3,
    pretrain_batch=2,
    steps=4,
    batch=2,
    window=24,
    full_rates=(1e-3, 3e-3),
    amounts=Amounts(8_000, 8_000, 3, 4, 160),
    seeds=2,
)


#: One arm of each kind, with one rate.
TINY_ARMS = tuple(
    replace(arm, rates=(arm.rates or TINY.full_rates)[:1])
    for arm in {arm.kind: arm for arm in reversed(ARMS)}.values()
)


def sentences(words: str, count: int, seed: int) -> list[Document]:
    """Documents of words drawn at random."""
    draw = random.Random(seed)
    return [Document(" ".join(draw.choices(words.split(), k=24))) for _ in range(count)]


def tiny_sources() -> Sources:
    """A domain, general text and a wrong domain, each of words of its own."""
    ward, street = "fever pulse drug dose ward nurse scan blood", "road tree house bread rain door"
    asked = sentences(ward, 6, 6)
    return Sources(
        domain="ward",
        training=sentences(ward, 40, 1),
        held_out=sentences(ward, 9, 2),
        general_training=sentences(street, 40, 3),
        general_held_out=sentences(street, 9, 4),
        wrong=sentences("court clause party term lease notice", 40, 5),
        most_shared=1.0,
        questions=[Question(f"{each.body} so", n % 2) for n, each in enumerate(asked)],
        labels=[" drug", " road"],
    )
