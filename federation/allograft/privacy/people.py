# SPDX-License-Identifier: Apache-2.0
"""Who is trained on, who is held out, and what is planted: fixed by coins before training.

One private file per donation, written before the first gradient, so that a restart continues with
the same coins. It holds ids of real people and never leaves the site.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from allograft.crypto import canonical
from allograft.durable import durable_write
from allograft.errors import RejectedError
from allograft.plainfile import read_plain
from allograft.privacy.canaries import (
    CanaryPlan,
    CanaryRecord,
    PersonSplit,
    PlantedText,
    make_canaries,
    split_persons,
)

_FORMAT = "allograft-coins-v1"
_FILE_BYTES = 256 << 20
_FIELDS = {"format", "split", "planted", "canaries", "audited_members", "audited_others"}

#: Most persons of each side whose texts the audits read. A thousand would narrow the interval
#: around a recognised share of 10 % from 7.5-13.0 % to 8.2-12.0 %, at twice the cost.
AUDITED_PERSONS = 500


@dataclass(frozen=True, slots=True)
class People:
    """The coins of one donation.

    Attributes:
        split: Who is trained on and who is held out.
        planted: Canaries among the training texts, each a person of its own.
        canaries: What was planted and what was not.
        audited_members: Of those trained on, whom the audits look at.
        audited_others: Of those held out, whom the audits look at.
    """

    split: PersonSplit
    planted: tuple[PlantedText, ...]
    canaries: CanaryRecord
    audited_members: tuple[str, ...]
    audited_others: tuple[str, ...]

    def save(self, path: Path) -> None:
        """Write it where only this user can read it.

        Raises:
            UnavailableError: AG-STO-001 when the disk is full or fails.
        """
        document: dict[str, canonical.Json] = {
            "format": _FORMAT,
            "split": self.split.to_json(),
            "planted": [[planted.person, planted.text] for planted in self.planted],
            "canaries": self.canaries.to_json(),
            "audited_members": list(self.audited_members),
            "audited_others": list(self.audited_others),
        }
        durable_write(path, canonical.dumps(document), mode=0o600)


def draw_people(
    ids: Iterable[str],
    public_texts: Sequence[str],
    holdout: float,
    plan: CanaryPlan | None = None,
    rng: random.Random | None = None,
) -> People:
    """Toss every coin of a donation.

    Args:
        ids: All persons of the data.
        public_texts: What canaries are made of; never private text.
        holdout: Chance of each person to be held out; a public constant.
        plan: How many canaries.
        rng: The operating system's randomness unless a test replaces it.

    Raises:
        RejectedError: AG-IN-003 for an unusable id or chance, AG-PRV-079 if the public texts are
            too few.
    """
    rng = rng or secrets.SystemRandom()
    split = split_persons(ids, holdout, rng)
    planted, record = make_canaries(public_texts, plan, rng)
    return People(split, planted, record, _some(split.train, rng), _some(split.holdout, rng))


def read_people(path: Path) -> People:
    """Read what `People.save` wrote.

    Raises:
        OSError: It cannot be opened.
        RejectedError: AG-IN-001 to -003 if it is no such file.
    """
    content = read_plain(path, _FILE_BYTES)
    fields = canonical.as_object(canonical.loads(content, max_bytes=_FILE_BYTES), _FIELDS)
    if fields["format"] != _FORMAT:
        raise RejectedError("AG-IN-003", f"not a {_FORMAT} document")
    planted = []
    for entry in canonical.as_list(fields["planted"]):
        person, text = canonical.as_list(entry)
        planted.append(PlantedText(canonical.as_text(person), canonical.as_text(text)))
    return People(
        split=PersonSplit.from_json(fields["split"]),
        planted=tuple(planted),
        canaries=CanaryRecord.from_json(fields["canaries"]),
        audited_members=_texts(fields["audited_members"]),
        audited_others=_texts(fields["audited_others"]),
    )


def _some(persons: Sequence[str], rng: random.Random) -> tuple[str, ...]:
    return tuple(rng.sample(persons, min(len(persons), AUDITED_PERSONS)))


def _texts(value: canonical.Json) -> tuple[str, ...]:
    return tuple(canonical.as_text(entry) for entry in canonical.as_list(value))
