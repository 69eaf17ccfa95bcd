# SPDX-License-Identifier: Apache-2.0
"""How strongly each of several attachments should act together, learnt on a site's own text.

Each was tried alone, or on top of those before it; together the best doses are others. The search
goes round the attachments, one dose at a time, on one half of the documents. What it finds replaces
the present doses only if the other half confirms it: certainly better than they are, better than
the plain base by the gate's own minimum, and within the gate's limit on general text. Invariant:
the stack ends at the doses it began with; whoever called decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from allograft.crypto import canonical
from allograft.evaluate.bootstrap import Interval, Losses, paired_gain
from allograft.evaluate.gate import GateRules, check_documents
from allograft.evaluate.loss import Prepared, Scoring, measure, prepare
from allograft.evaluate.trial import OwnText, TrialStep, split_text
from allograft.recipes.base import DOSES
from allograft.recipes.stack import Stack

#: Doses that are tried for an attachment that takes any, besides its present one. At 0 it would be
#: as absent.
GRID = (0.0, 0.25, 0.5, 0.75, 1.0)

Doses = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ScalePlan:
    """How to search: the gate's limits, the doses, how often round, the split, the measuring."""

    rules: GateRules = field(default_factory=GateRules)
    grid: Doses = GRID
    rounds: int = 2
    seed: int = 0
    scoring: Scoring = field(default_factory=Scoring)


@dataclass(frozen=True, slots=True)
class ScaleReport:
    """What was found, in nats per token.

    Attributes:
        present: Each attachment's dose before, by id.
        learnt: The best doses on the selection documents.
        accepted: Whether the held-out documents confirm them.
        reason: Why (not).
        selection_present: Loss on the selection documents at the present doses.
        selection_learnt: The same at the learnt ones; never higher.
        gain: What the learnt doses save over the present ones on held-out documents.
        gain_over_base: What they save over the plain base.
        retention_change: How much worse than the base they make general text.
        measurements: How many combinations of doses were measured.
    """

    present: Mapping[str, float]
    learnt: Mapping[str, float]
    accepted: bool
    reason: str
    selection_present: float
    selection_learnt: float
    gain: Interval
    gain_over_base: Interval
    retention_change: Interval
    measurements: int

    @property
    def doses(self) -> Mapping[str, float]:
        """The doses to use: the learnt ones if they are accepted."""
        return self.learnt if self.accepted else self.present

    def to_json(self) -> dict[str, canonical.Json]:
        """The report as a JSON object."""
        return asdict(self)


def learn_scales(
    stack: Stack,
    tokenizer: Any,
    text: OwnText,
    plan: ScalePlan | None = None,
    progress: Callable[[TrialStep], None] | None = None,
) -> ScaleReport:
    """Search for better doses of what is on a stack.

    Raises:
        RejectedError: AG-EVA-001 too little text, AG-EVA-002 a loss is not finite.
    """
    plan = plan or ScalePlan()
    search = _Search(stack, tokenizer, text, plan, progress)
    try:
        return search.run()
    finally:
        search.set(search.present)


class _Search:
    """One search; holds what its steps share."""

    def __init__(
        self,
        stack: Stack,
        tokenizer: Any,
        text: OwnText,
        plan: ScalePlan,
        progress: Callable[[TrialStep], None] | None,
    ) -> None:
        self._stack, self._plan, self._progress = stack, plan, progress
        self._ids = tuple(entry.attachment_id for entry in stack.attachments)
        self.present: Doses = tuple(entry.dose for entry in stack.attachments)
        self._plain: Doses = (0.0,) * len(self._ids)
        # A kind with doses of its own, such as a prompt, refuses those between.
        self._grids: tuple[Doses, ...] = tuple(
            plan.grid if entry.doses == DOSES else (0.0, *entry.doses)
            for entry in stack.attachments
        )
        halves = (*split_text(text.domain, plan.seed), *split_text(text.retention, plan.seed))
        names = ("selection", "test", "retention selection", "retention")
        counts = [(name, len(half)) for name, half in zip(names, halves, strict=True)]
        check_documents(counts, plan.rules)
        self._domain, self._test, self._kept, self._kept_test = (
            prepare(half, tokenizer, stack.model, plan.scoring) for half in halves
        )
        self._found: dict[tuple[Doses, int], Losses] = {}

    def run(self) -> ScaleReport:
        best = self.present
        for _ in range(self._plan.rounds):
            before = best
            for place, grid in enumerate(self._grids):
                tried = {(*best[:place], d, *best[place + 1 :]) for d in grid}
                # What stands is among them, whatever it costs; of equals the smaller change wins.
                order = sorted(tried | {best}, key=lambda d: (self._loss(d), sum(d), d))
                best = next(d for d in order if d == best or self._is_harmless(d))
            if best == before:
                break
        return self._judge(best)

    def set(self, doses: Doses) -> None:
        for key, dose in zip(self._ids, doses, strict=True):
            self._stack.set_dose(key, dose)

    def _judge(self, best: Doses) -> ScaleReport:
        rules = self._plan.rules
        gain = self._gain(self.present, best, self._test)
        over_base = self._gain(self._plain, best, self._test)
        kept = self._gain(self._plain, best, self._kept_test)
        worse = Interval(-kept.value, -kept.high, -kept.low)
        reason = "certainly better on held-out documents"
        # Each test is written so that NaN keeps the present doses.
        if best == self.present:
            reason = "the present doses are the best that were found"
        elif not gain.low > 0.0:
            reason = "held-out documents do not confirm it"
        elif not over_base.low > max(rules.min_gain, 0.0):
            reason = "no certain gain over the plain base"
        elif not worse.high <= rules.max_retention_loss:
            reason = "general text would get worse than the limit"
        return ScaleReport(
            present=dict(zip(self._ids, self.present, strict=True)),
            learnt=dict(zip(self._ids, best, strict=True)),
            accepted=reason == "certainly better on held-out documents",
            reason=reason,
            selection_present=self._loss(self.present),
            selection_learnt=self._loss(best),
            gain=gain,
            gain_over_base=over_base,
            retention_change=worse,
            measurements=len({doses for doses, _ in self._found}),
        )

    def _loss(self, doses: Doses) -> float:
        return self._measure(doses, self._domain).nats_per_token

    def _is_harmless(self, doses: Doses) -> bool:
        """Whether general text stays within the limit, by its upper bound as in the gate."""
        worst = -self._gain(self._plain, doses, self._kept).low
        return worst <= self._plan.rules.max_retention_loss

    def _gain(self, before: Doses, after: Doses, documents: Prepared) -> Interval:
        resampling = self._plan.rules.resampling
        return paired_gain(
            self._measure(before, documents), self._measure(after, documents), resampling
        )

    def _measure(self, doses: Doses, documents: Prepared) -> Losses:
        place = (doses, id(documents))
        if place not in self._found:
            if self._progress is not None:
                most = 1 + self._plan.rounds * sum(len(grid) for grid in self._grids)
                what = "doses " + " ".join(f"{dose:g}" for dose in doses)
                done = len({found for found, _ in self._found})
                self._progress(TrialStep(min(done, most), most, what))
            self.set(doses)
            self._found[place] = measure(self._stack.model, documents)
        return self._found[place]
