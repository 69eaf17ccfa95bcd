# SPDX-License-Identifier: Apache-2.0
"""The audits of a packet: read with the base and with the packet, compare, and let the gates judge.

The attacker's own position: the base is public, the packet is what would leave, and the texts are
the site's. Gates G3, G4, G5 and G7 come out of it with what may be published and what may not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from allograft.evaluate.memory import (
    CanaryReading,
    TextReading,
    blind_auc,
    compare_canaries,
    cut_suffixes,
    person_scores,
    read_canaries,
    read_texts,
)
from allograft.privacy.canaries import CanaryRecord
from allograft.privacy.dossier import GateResult
from allograft.privacy.memorisation import (
    DpClaim,
    MembershipEvidence,
    judge_canaries,
    judge_extraction,
    judge_membership,
    judge_population,
)
from allograft.privacy.thresholds import AuditThresholds

#: Rates of false accusations at which the curve of the membership attack is drawn.
_RATES = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)


@dataclass(frozen=True, slots=True)
class PersonTexts:
    """All texts of some persons, one string each: trained on, and held out."""

    members: tuple[str, ...]
    others: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Reading:
    """Persons and canaries as one model reads them."""

    texts: TextReading
    canaries: CanaryReading


@dataclass(frozen=True, slots=True)
class Readings:
    """What is to be compared."""

    texts: PersonTexts
    canaries: CanaryRecord
    base: Reading
    donated: Reading


@dataclass(frozen=True, slots=True)
class Audit:
    """What came of it; everything but `gates` stays at the site.

    Attributes:
        gates: What may be published.
        figures: By gate, by name.
        exposure: Repeats of a planted text, and the median exposure (bits).
        roc: False-positive rate and true-positive rate of the membership attack.
    """

    gates: tuple[GateResult, ...]
    figures: Mapping[str, Mapping[str, float]]
    exposure: tuple[tuple[float, float], ...]
    roc: tuple[tuple[float, float], ...]


def read_all(model: Any, tokenizer: Any, texts: PersonTexts, canaries: CanaryRecord) -> Reading:
    """Read all persons and canaries with a model as it is now.

    Raises:
        RejectedError: AG-EVA-001 for a text without two tokens, AG-EVA-002 if a loss is not
            finite.
    """
    return Reading(
        read_texts(model, tokenizer, [*texts.members, *texts.others]),
        read_canaries(model, tokenizer, canaries),
    )


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
    names = [str(number) for number in range(_count(readings.texts))]
    split = len(readings.texts.members)
    base, donated = readings.base.texts, readings.donated.texts
    scores = person_scores(names, base, donated)
    members = np.array([scores[name] for name in names[:split]])
    others = np.array([scores[name] for name in names[split:]])
    suffixes = cut_suffixes(
        names[:split],
        _head(base, split),
        _head(donated, split),
        thresholds.extraction_suffix_tokens,
    )
    canaries = compare_canaries(
        readings.canaries, readings.base.canaries, readings.donated.canaries
    )
    blind = blind_auc(readings.texts.members, readings.texts.others)
    found = {
        "G3": judge_extraction(suffixes, claimed, thresholds),
        "G4": judge_canaries(canaries, claimed, thresholds),
        "G5": judge_membership(MembershipEvidence(members, others, blind), claimed, thresholds),
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
    )


def _count(texts: PersonTexts) -> int:
    return len(texts.members) + len(texts.others)


def _head(reading: TextReading, count: int) -> TextReading:
    return TextReading(reading.nats[:count], reading.tokens[:count])


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
