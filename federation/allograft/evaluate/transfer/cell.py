# SPDX-License-Identifier: Apache-2.0
"""One cell of the matrix: an arm on a recipient with a seed, as measured. No tensors.

Losses are kept per document, so that every interval, average and table can be made again from the
files alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from allograft.evaluate.bootstrap import Losses


class Role(StrEnum):
    """What an arm is there for."""

    ZERO_SHOT = "zero-shot"
    ORACLE = "oracle"
    RECIPE = "recipe"
    CONTROL = "control"
    BASELINE = "baseline"
    PAPER = "paper"


#: The sets of held-out documents: for choices and for figures, of the domain and general ones.
HELD_OUT = ("validation", "test", "general_validation", "general_test")


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """What a model does on held-out text.

    Attributes:
        validation: Losses on the domain's documents that choices are made on.
        test: On those that figures come from.
        general_validation: On general documents for choices.
        general_test: On general documents for figures.
        correct: For each question of a label task whether the right label had the lowest loss; an
            average over seeds lies between 0 and 1. Empty without such a task.
    """

    validation: Losses
    test: Losses
    general_validation: Losses
    general_test: Losses
    correct: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """All of it as a JSON object."""
        losses = {name: _losses_to_json(getattr(self, name)) for name in HELD_OUT}
        return losses | {"correct": list(self.correct)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Measured:
        """Read it."""
        losses = {name: _losses_from_json(value[name]) for name in HELD_OUT}
        return cls(**losses, correct=tuple(value["correct"]))


@dataclass(frozen=True, slots=True)
class Point:
    """A model with an arm's change at one strength.

    Attributes:
        dose: Dose, mixture weight or 1.
        label: What tells points of one cell apart, such as `dose 0.5` or `position 3`.
        measured: The losses.
    """

    dose: float
    label: str
    measured: Measured


@dataclass(frozen=True, slots=True)
class Cell:
    """What one arm came to on one recipient with one seed.

    Attributes:
        arm: Name in tables.
        role: What it is there for.
        recipient: Name of the model that was changed.
        seed: Of training and noise.
        points: None where the arm could not be put on the recipient at all.
        verdict: The recipe's own: exact, lineage, refuse; empty where no recipe was asked.
        code: Error code of a refusal.
        reason: The verdict in words.
        rate: Peak learning rate; 0 where nothing was trained.
        payload_bytes: What would cross the border.
        seconds: Training, at whoever trains.
        peak_bytes: Memory that the training took above the loaded model.
    """

    arm: str
    role: Role
    recipient: str
    seed: int
    points: tuple[Point, ...]
    verdict: str = ""
    code: str = ""
    reason: str = ""
    rate: float = 0.0
    payload_bytes: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0

    @property
    def forced(self) -> bool:
        """Whether it was measured although the recipe refused."""
        return self.verdict == "refuse" and bool(self.points)

    def to_json(self) -> dict[str, Any]:
        """The cell as a JSON object."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        points = [
            {"dose": p.dose, "label": p.label, "measured": p.measured.to_json()}
            for p in self.points
        ]
        return fields | {"role": str(self.role), "points": points}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Cell:
        """Read a cell."""
        points = tuple(
            Point(p["dose"], p["label"], Measured.from_json(p["measured"])) for p in value["points"]
        )
        return cls(**{**value, "role": Role(value["role"]), "points": points})


def _losses_to_json(losses: Losses) -> dict[str, Any]:
    return {name: getattr(losses, name).tolist() for name in losses.__dataclass_fields__}


def _losses_from_json(value: Mapping[str, Any]) -> Losses:
    return Losses(
        np.array(value["nats"], dtype=np.float64),
        np.array(value["tokens"], dtype=np.int64),
        np.array(value["text_bytes"], dtype=np.int64),
    )
