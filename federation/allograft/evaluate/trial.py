# SPDX-License-Identifier: Apache-2.0
"""A trial: does a packet help this model on this site's own text?

Invariant: after every measurement the attachment is gone, and that is shown, not assumed: the
model's state digest and its logits on a probe are equal, bit for bit, to what they were before.
The verdict comes from `gate`, on documents that neither the dose nor anything else was chosen on.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from allograft.errors import RejectedError
from allograft.evaluate.bootstrap import Losses
from allograft.evaluate.gate import (
    Decision,
    DosePoint,
    DoseTrial,
    Evidence,
    GateRules,
    check_documents,
    choose_dose,
    decide,
    dose_curve,
)
from allograft.evaluate.loss import Prepared, Scoring, measure, pad_batch, prepare
from allograft.evaluate.report import DocumentCounts, TrialReport
from allograft.recipes.base import DOSES, Attachment, Recipe
from allograft.recipes.controls import null_packet
from allograft.recipes.snapshot import state_digest

_PROBE_ROWS = 4
_PROBE_TOKENS = 64


@dataclass(frozen=True, slots=True)
class OwnText:
    """The recipient's documents: text of the packet's domain, and text it must stay good at."""

    domain: Sequence[str]
    retention: Sequence[str]


@dataclass(frozen=True, slots=True)
class TrialPlan:
    """How to try: thresholds, doses, draws of noise, seed and the way documents are measured."""

    rules: GateRules = field(default_factory=GateRules)
    doses: tuple[float, ...] = DOSES
    nulls: int = 3
    seed: int = 0
    scoring: Scoring = field(default_factory=Scoring)


@dataclass(frozen=True, slots=True)
class TrialStep:
    """What the progress callback is told: measurements done, of how many, and what comes next."""

    done: int
    steps: int
    what: str


@dataclass(frozen=True, slots=True)
class Subject:
    """What is tried: an attachment with its recipe, on a model with its tokenizer."""

    recipe: Recipe
    attachment: Attachment
    model: Any
    tokenizer: Any


def run_trial(
    subject: Subject,
    text: OwnText,
    plan: TrialPlan,
    progress: Callable[[TrialStep], None] | None = None,
) -> TrialReport:
    """Try an attachment at every dose and judge it.

    The model is left exactly as it was, also when this raises.

    Raises:
        RejectedError: AG-EVA-001 too little text, AG-EVA-002 a loss is not finite, AG-EVA-003
            the model was not restored.
    """
    return _Trial(subject, text, plan, progress).run()


def split_text(texts: Sequence[str], seed: int) -> tuple[list[str], list[str]]:
    """Halves of a set of documents, by digest: same text, same half, whatever its place.

    Duplicates count once, so that no document can be on both sides or weigh twice.
    """
    salt = f"{seed}\0".encode()
    ordered = sorted(
        {text for text in texts if text.strip()},
        key=lambda text: hashlib.sha256(salt + text.encode("utf-8")).digest(),
    )
    half = len(ordered) // 2
    return ordered[:half], ordered[half:]


class StateSeal:
    """What a model was: its state digest and its logits on a few rows of tokens."""

    def __init__(self, model: Any, rows: Sequence[Sequence[int]]) -> None:
        self._rows = [tuple(row) for row in rows]
        self.digest = state_digest(model)
        self._logits = self._probe(model)

    def check(self, model: Any) -> None:
        """Compare a model with what it was.

        Raises:
            RejectedError: AG-EVA-003 if a weight or a logit differs in one bit.
        """
        if state_digest(model) != self.digest:
            raise RejectedError("AG-EVA-003", "the model's state differs after detaching")
        if not torch.equal(self._probe(model), self._logits):
            raise RejectedError("AG-EVA-003", "the model's logits differ after detaching")

    @torch.no_grad()
    def _probe(self, model: Any) -> torch.Tensor:
        was_training = model.training
        model.eval()
        try:
            ids, mask = pad_batch(self._rows, model.device)
            logits: torch.Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        finally:
            model.train(was_training)
        return logits.cpu()


def seal_state(model: Any, prepared: Prepared) -> StateSeal:
    """Remember a model's state, with the beginnings of some documents as the probe."""
    rows = [w.tokens[:_PROBE_TOKENS] for batch in prepared.batches for w in batch[:1]]
    return StateSeal(model, rows[:_PROBE_ROWS])


@contextlib.contextmanager
def attached(recipe: Recipe, attachment: Attachment, model: Any, seal: StateSeal) -> Iterator[None]:
    """Attach for the length of a block, detach whatever happens, and prove the removal.

    Raises:
        RejectedError: AG-EVA-003 if the model was not restored.
    """
    handle = recipe.attach(attachment, model)
    try:
        yield
    finally:
        recipe.detach(handle)
        seal.check(model)


class _Trial:
    """One run of a trial; holds what its steps share."""

    def __init__(
        self,
        subject: Subject,
        text: OwnText,
        plan: TrialPlan,
        progress: Callable[[TrialStep], None] | None,
    ) -> None:
        self._subject = subject
        self._plan = plan
        self._progress = progress
        self._done = 0
        self._removals = 0
        self._started = time.monotonic()
        selection, test = split_text(text.domain, plan.seed)
        kept_selection, kept_test = split_text(text.retention, plan.seed)
        self._counts = DocumentCounts(
            len(selection), len(test), len(kept_selection), len(kept_test)
        )
        check_documents(
            (
                ("selection", len(selection)),
                ("test", len(test)),
                ("retention selection", len(kept_selection)),
                ("retention", len(kept_test)),
            ),
            plan.rules,
        )
        self._selection = self._prepare(selection)
        self._test = self._prepare(test)
        self._kept_selection = self._prepare(kept_selection)
        self._kept_test = self._prepare(kept_test)
        self._seal = seal_state(subject.model, self._selection)
        own = subject.attachment.doses
        # A kind that has no half doses says which it has.
        self._doses = plan.doses if own == DOSES else own

    def run(self) -> TrialReport:
        curve = self._try_doses()
        dose = choose_dose(curve, self._plan.rules)
        evidence = self._gather(dose)
        decision = decide(evidence, self._plan.rules)
        self._tell("judged")
        return self._report(decision, curve, evidence)

    def _try_doses(self) -> tuple[DosePoint, ...]:
        before, kept = self._measure(None, 0.0, (self._selection, self._kept_selection))
        trials = []
        for dose in self._doses:
            measured = self._measure(
                self._subject.attachment, dose, (self._selection, self._kept_selection)
            )
            trials.append(DoseTrial(dose, *measured))
        return dose_curve(before, kept, trials, self._plan.rules.resampling)

    def _gather(self, dose: float) -> Evidence:
        documents = (self._test, self._kept_test)
        before, kept_before = self._measure(None, 0.0, documents)
        after, kept_after = self._measure(self._subject.attachment, dose, documents)
        nulls = tuple(self._measure_null(number, dose) for number in range(self._plan.nulls))
        return Evidence(dose, before, after, nulls, kept_before, kept_after)

    def _measure_null(self, number: int, dose: float) -> Losses:
        subject = self._subject
        null = null_packet(subject.attachment, subject.model, self._plan.seed + number)
        (after,) = self._measure(null, dose, (self._test,), what="null packet")
        return after

    def _measure(
        self,
        attachment: Attachment | None,
        dose: float,
        documents: Sequence[Prepared],
        what: str = "",
    ) -> tuple[Losses, ...]:
        model = self._subject.model
        self._tell(what or ("without the packet" if attachment is None else f"dose {dose:g}"))
        self._done += 1
        if attachment is None:
            return tuple(measure(model, prepared) for prepared in documents)
        with attached(self._subject.recipe, replace(attachment, dose=dose), model, self._seal):
            measured = tuple(measure(model, prepared) for prepared in documents)
        self._removals += 1
        return measured

    def _prepare(self, texts: Sequence[str]) -> Prepared:
        subject = self._subject
        return prepare(texts, subject.tokenizer, subject.model, self._plan.scoring)

    def _tell(self, what: str) -> None:
        if self._progress is not None:
            # Without and at each dose, then on the test documents without, at the dose, and nulls.
            steps = len(self._doses) + self._plan.nulls + 3
            self._progress(TrialStep(self._done, steps, what))

    def _report(
        self, decision: Decision, curve: tuple[DosePoint, ...], evidence: Evidence
    ) -> TrialReport:
        attachment = self._subject.attachment
        return TrialReport(
            attachment_id=attachment.attachment_id,
            kind=attachment.kind,
            decision=decision,
            curve=curve,
            documents=self._counts,
            bits_per_byte_before=evidence.test_before.bits_per_byte,
            bits_per_byte_after=evidence.test_after.bits_per_byte,
            state_digest=self._seal.digest,
            removals=self._removals,
            seed=self._plan.seed,
            device=str(self._subject.model.device),
            seconds=time.monotonic() - self._started,
        )
