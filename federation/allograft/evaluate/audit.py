# SPDX-License-Identifier: Apache-2.0
"""The audits of a packet: read with the base and with the packet, compare, and let the gates judge.

The attacker's own position: the base is public, the packet is what would leave, and the texts are
the site's. Gates G3, G4, G5 and G7 come out of it with what may be published and what may not.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from allograft.evaluate.memory import (
    CanaryReading,
    Numbers,
    TextReading,
    compare_blindly,
    compare_canaries,
    cut_suffixes,
    person_scores,
    read_canaries,
    read_windows,
)
from allograft.privacy.audit import accusing_score
from allograft.privacy.canaries import CanaryRecord
from allograft.privacy.dossier import GateResult
from allograft.privacy.memorisation import (
    DpClaim,
    ExtractionEvidence,
    MembershipEvidence,
    find_extractable,
    judge_canaries,
    judge_extraction,
    judge_membership,
    judge_population,
)
from allograft.privacy.thresholds import AuditThresholds
from allograft.recipes.windows import Windows

#: Rates of false accusations at which the curve of the membership attack is drawn.
_RATES = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)


#: Most windows of a person that the audits read. A longer record is judged by its beginning: the
#: attack averages over windows, and more of them tell little more about the same person.
AUDITED_WINDOWS = 8

#: Most persons that a report names.
EXPOSED_PERSONS = 50


@dataclass(frozen=True, slots=True)
class AuditedPersons:
    """Some persons trained on, then some held out.

    Attributes:
        texts: All text of each person, for the classifier that never sees the model.
        windows: What the run saw of each, and would have seen of those held out; `documents` counts
            persons in the order of `texts`. Who is too short for a window has none.
        members: How many of them were trained on.
        elsewhere: What the run saw, or would have seen, of everybody else: what stands there too
            is a template, and no secret of one person.
    """

    texts: tuple[str, ...]
    windows: Windows
    members: int
    elsewhere: Windows | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """Persons and canaries as one model reads them."""

    texts: TextReading
    canaries: CanaryReading


@dataclass(frozen=True, slots=True)
class Readings:
    """What is to be compared."""

    persons: AuditedPersons
    canaries: CanaryRecord
    base: Reading
    donated: Reading


@dataclass(frozen=True, slots=True)
class ExposedPerson:
    """A person trained on whom the packet knows better than most.

    Attributes:
        number: Place among the audited.
        saved: Nats per token that the packet saves on the person's text.
        extractable: Passages of this person alone that come back within few tries.
        recognised: Whether the membership attack finds the person.
    """

    number: int
    saved: float
    extractable: int
    recognised: bool


@dataclass(frozen=True, slots=True)
class Audit:
    """What came of it; everything but `gates` stays at the site.

    Attributes:
        gates: What may be published.
        figures: By gate, by name.
        exposure: Repeats of a planted text, and the median exposure (bits).
        roc: False-positive rate and true-positive rate of the membership attack.
        exposed: The tenth of the persons trained on that the packet knows best, worst first.
    """

    gates: tuple[GateResult, ...]
    figures: Mapping[str, Mapping[str, float]]
    exposure: tuple[tuple[float, float], ...]
    roc: tuple[tuple[float, float], ...]
    exposed: tuple[ExposedPerson, ...]


def read_all(
    model: Any, tokenizer: Any, persons: AuditedPersons, canaries: CanaryRecord
) -> Reading:
    """Read all persons and canaries with a model as it is now.

    Raises:
        RejectedError: AG-EVA-001 for a canary without two tokens, AG-EVA-002 if a loss is not
            finite.
    """
    return Reading(read_windows(model, persons.windows), read_canaries(model, tokenizer, canaries))


def judge(
    readings: Readings, trained: int, claimed: DpClaim | None, thresholds: AuditThresholds
) -> Audit:
    """Run G3, G4, G5 and G7.

    Args:
        readings: What was read.
        trained: Persons trained on, canaries not counted.
        claimed: What the run promises; None without differential privacy.
        thresholds: The site's thresholds.
    """
    persons = readings.persons
    owners = persons.windows.documents.tolist()
    base, donated = readings.base.texts, readings.donated.texts
    scores = person_scores(owners, base, donated)
    members = np.array([scores[owner] for owner in scores if owner < persons.members])
    others = np.array([scores[owner] for owner in scores if owner >= persons.members])
    inside = [number for number, owner in enumerate(owners) if owner < persons.members]
    suffixes = cut_suffixes(
        [owners[number] for number in inside],
        _some(base, inside),
        _some(donated, inside),
        thresholds.extraction_suffix_tokens,
        [] if persons.elsewhere is None else _tokens(persons.elsewhere),
    )
    canaries = compare_canaries(
        readings.canaries, readings.base.canaries, readings.donated.canaries
    )
    blind = compare_blindly(persons.texts[: persons.members], persons.texts[persons.members :])
    membership = MembershipEvidence(members, others, blind.auc, blind.p_value)
    found = {
        "G3": judge_extraction(suffixes, claimed, thresholds),
        "G4": judge_canaries(canaries, claimed, thresholds),
        "G5": judge_membership(membership, claimed, thresholds),
        "G7": judge_population(trained, claimed, thresholds),
    }
    exposure = [
        (float(name.partition(".")[2]), value)
        for name, value in found["G4"][0].figures
        if name.startswith("exposure.")
    ]
    return Audit(
        gates=tuple(result for result, _ in found.values()),
        figures={
            name: dict(private) or dict(result.figures) for name, (result, private) in found.items()
        },
        exposure=tuple(sorted(exposure)),
        roc=_curve(members, others),
        exposed=_expose(scores, suffixes, persons.members, others, thresholds),
    )


def _expose(
    scores: Mapping[int, float],
    suffixes: ExtractionEvidence,
    members: int,
    others: Numbers,
    thresholds: AuditThresholds,
) -> tuple[ExposedPerson, ...]:
    """Who could be told apart or quoted first, so that a site knows whose records to look at."""
    _, found = find_extractable(suffixes, thresholds)
    passages = Counter(suffixes.owners[found].tolist())
    ranked = sorted(
        (number for number in scores if number < members),
        key=lambda number: (-passages[number], -scores[number]),
    )
    count = min(math.ceil(len(ranked) / 10), EXPOSED_PERSONS)
    bar = accusing_score(others, thresholds.membership_fpr) if len(others) else math.inf
    return tuple(
        ExposedPerson(number, scores[number], passages[number], scores[number] > bar)
        for number in ranked[:count]
    )


def _tokens(windows: Windows) -> list[npt.NDArray[np.int64]]:
    """The tokens of each window without its first, as a reading has them."""
    rows = zip(windows.tokens.numpy(), windows.lengths.tolist(), strict=True)
    return [row[1:length] for row, length in rows]


def _some(reading: TextReading, numbers: Sequence[int]) -> TextReading:
    nats = tuple(reading.nats[number] for number in numbers)
    return TextReading(nats, tuple(reading.tokens[number] for number in numbers))


def _curve(members: Any, others: Any) -> tuple[tuple[float, float], ...]:
    """How many members an attacker recognises who may wrongly accuse so many others."""
    if not len(members) or not len(others):
        return ()
    falling = np.sort(others)[::-1]
    points = []
    for rate in _RATES:
        # One more than may be accused: scores must exceed his.
        bar = falling[min(int(rate * len(falling)), len(falling) - 1)]
        points.append((rate, float((members > bar).mean())))
    return tuple(points)
