# SPDX-License-Identifier: Apache-2.0
"""What a donor asked for: one donation, as the command line states it and the job keeps it.

It is fixed before the data is opened, and every number in it goes into the signed provenance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from allograft.crypto import canonical
from allograft.errors import RejectedError
from allograft.privacy.dp import DpConstants
from allograft.privacy.modes import AdmittedMode, Mode, admit_mode, declare
from allograft.privacy.plan import PrivacyPlan
from allograft.recipes.plan import (
    DeltaPlan,
    LoopPlan,
    RecipePlan,
    make_recipe_plan,
    read_recipe_plan,
)

# Training parameter of a privacy plan → how it is read, for the loop.
_LOOP: Mapping[str, Callable[[canonical.Json], Any]] = {
    "steps": canonical.as_int,
    "batch_windows": canonical.as_int,
    "accumulation": canonical.as_int,
    "learning_rate": canonical.as_number,
    "seed": canonical.as_int,
    "checkpointing": canonical.as_bool,
}

# Of one person, in a mode without differential privacy: nobody's records may dominate.
_MOST_WINDOWS = 50


@dataclass(frozen=True, slots=True)
class DonationPlan:
    """One donation.

    Attributes:
        data: The text to learn from; its path never leaves the site.
        nature: `public` or `synthetic`, what the data is declared to be in mode `open`.
        declared_by: The role that declares it.
        domain: What the packet will be about, in a few words.
        recipe: What its kind lets a donor choose.
        valid_days: How long it can be dispatched and opened.
        retention_days: How long a recipient may keep it attached.
        privacy_plan: Id of the signed privacy plan that the modes `strict` and `measured` need.
        person_field: JSONL field that says whom a record is about; the privacy plan fixes it.
        holdout: Chance of each person to be held out of training, for the audits.
        private: Constants of the privacy plan; None without differential privacy.
        tuned: Kind delta: directory of a snapshot that was trained from the model elsewhere; its
            path never leaves the site. Nothing is trained then.
        stage: Kind delta: what the model has been through; `base` for a public base.
    """

    model: str
    kind: str
    data: Path
    mode: str
    nature: str
    declared_by: str
    domain: str
    recipe: RecipePlan
    language: str = "en"
    purpose: str = "evaluation and local use"
    merge: bool = False
    distil: bool = False
    redonate: bool = False
    valid_days: int = 30
    retention_days: int = 365
    steps: int = 200
    batch_windows: int = 16
    accumulation: int = 1
    learning_rate: float = 1e-3
    seed: int = 0
    window_tokens: int = 256
    checkpointing: bool = False
    max_documents: int = 240
    privacy_plan: str = ""
    person_field: str = "person"
    holdout: float = 0.3
    private: DpConstants | None = None
    tuned: str = ""
    stage: str = "base"

    def admitted(self) -> AdmittedMode:
        """The privacy mode with its declaration.

        Raises:
            RejectedError: AG-PRV-010 to -012.
        """
        declared = self.nature or self.declared_by or self.mode == Mode.OPEN
        return admit_mode(self.mode, declare(self.nature, self.declared_by) if declared else None)

    def under(self, plan: PrivacyPlan) -> DonationPlan:
        """The donation that a privacy plan was made for; the rest stays as asked.

        Raises:
            RejectedError: AG-IN-003 if the plan's training is not that of a donation.
        """
        training = canonical.as_object(
            dict(plan.training), {"recipe", "loop", "window_tokens", "holdout", "person_field"}
        )
        loop = canonical.as_mapping(training["loop"])
        changes = {name: read(loop[name]) for name, read in _LOOP.items() if name in loop}
        return replace(
            self,
            mode=str(plan.mode),
            kind=plan.kind,
            recipe=read_recipe_plan(plan.kind, training["recipe"]),
            private=plan.constants,
            privacy_plan=plan.plan_id,
            purpose=plan.purpose,
            window_tokens=canonical.as_int(training["window_tokens"]),
            holdout=canonical.as_number(training["holdout"]),
            person_field=canonical.as_text(training["person_field"]),
            **changes,
        )

    @classmethod
    def planned_by(cls, plan: PrivacyPlan) -> DonationPlan:
        """The donation that a privacy plan would pay for, but for its data and card.

        Raises:
            RejectedError: AG-PRV-052 if no donation trains as the plan says; as `under`, `check`.
        """
        recipe = make_recipe_plan(plan.kind)
        bare = cls("", plan.kind, Path(), str(plan.mode), "", "", "", recipe).under(plan).check()
        if bare.planned_json() != dict(plan.training):
            raise RejectedError("AG-PRV-052", "no donation trains as the plan says")
        return bare

    @property
    def windows_per_person(self) -> int:
        """Most windows of one person that a run sees."""
        return _MOST_WINDOWS if self.private is None else self.private.windows_per_person

    @property
    def is_protected(self) -> bool:
        """Whether the data is private: people are the unit, and nothing measured on it leaves."""
        return self.mode != Mode.OPEN

    def check(self) -> DonationPlan:
        """Return itself if it can be run.

        Raises:
            RejectedError: AG-IN-003, AG-PRV-010 to -012 for the mode, AG-RCP-035 for the loop,
                AG-RCP-029 for a search on private data.
        """
        if not 1 <= self.valid_days <= 3650 or not 1 <= self.retention_days <= 3650:
            raise RejectedError("AG-IN-003", "validity and retention last 1 to 3650 days")
        for text in (self.domain, self.language, self.purpose):
            canonical.as_line(text)
        # Written so that NaN refuses.
        if not 0 < self.holdout < 1:
            raise RejectedError("AG-IN-003", "the share of held-out persons is not between 0 and 1")
        self.loop().check()
        self.admitted()
        self._check_delta()
        if self.is_protected != bool(self.privacy_plan):
            needs = "needs a signed privacy plan" if self.is_protected else "has no privacy plan"
            raise RejectedError("AG-PRV-053", f"mode {self.mode} {needs}")
        searches: int = getattr(self.recipe, "search_steps", 0)
        if self.is_protected and searches:
            raise RejectedError("AG-RCP-029", "each trial on private data is a run of its own")
        return self

    def _check_delta(self) -> None:
        if (self.tuned or self.stage != "base") and self.kind != "delta":
            raise RejectedError("AG-RCP-035", "only a delta is made from snapshots")
        if self.stage != "base" and not self.tuned:
            raise RejectedError("AG-RCP-035", "a stage is that of a model from which --tuned came")
        if self.tuned and self.is_protected:
            # Nobody here saw that training: there is nothing to bound, and nobody to hold out.
            raise RejectedError("AG-RCP-035", "a snapshot from elsewhere is for mode open only")
        if isinstance(self.recipe, DeltaPlan):
            self.recipe.check()
            if self.recipe.embeddings and self.mode == Mode.MEASURED:
                # Which rows changed tells which words people used, and nothing bounds it.
                raise RejectedError("AG-RCP-035", "mode measured has no embeddings learn")

    def loop(self) -> LoopPlan:
        """How to train."""
        return LoopPlan(
            steps=self.steps,
            batch_windows=self.batch_windows,
            accumulation=self.accumulation,
            learning_rate=self.learning_rate,
            seed=self.seed,
            checkpointing=self.checkpointing,
            snapshot_s=20.0,
        )

    def training_json(self) -> dict[str, canonical.Json]:
        """The part a worker trains by."""
        private = None if self.private is None else self.private.to_json()
        loop = asdict(self.loop())
        return {
            "kind": self.kind,
            "recipe": self.recipe.to_json(),
            "loop": loop,
            "private": private,
        }

    def planned_json(self) -> dict[str, canonical.Json]:
        """The public training parameters, as a privacy plan fixes them.

        The field that names a person is one of them: by the number of a note, ε would be that of a
        note, and the register would know nobody again.
        """
        training = self.training_json()
        return {
            "recipe": training["recipe"],
            "loop": training["loop"],
            "window_tokens": self.window_tokens,
            "holdout": self.holdout,
            "person_field": self.person_field,
        }

    def public_json(self) -> dict[str, canonical.Json]:
        """What the signed provenance says about the method; nothing of it names the data."""
        if self.tuned:
            return {
                "method": self.kind,
                "recipe": self.recipe.to_json(),
                "source": "snapshots",
                "stage": self.stage,
                "mode": self.mode,
            }
        return {
            "method": self.kind,
            **self.training_json(),
            "window_tokens": self.window_tokens,
            "mode": self.mode,
        }

    def to_json(self) -> dict[str, Any]:
        """The plan as a job keeps it."""
        private = None if self.private is None else self.private.to_json()
        recipe = self.recipe.to_json()
        return {**asdict(self), "data": str(self.data), "recipe": recipe, "private": private}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> DonationPlan:
        """Read back what `to_json` wrote."""
        private = None if fields["private"] is None else DpConstants.from_json(fields["private"])
        recipe = read_recipe_plan(fields["kind"], fields["recipe"])
        data = Path(fields["data"])
        return cls(**{**fields, "data": data, "recipe": recipe, "private": private})
