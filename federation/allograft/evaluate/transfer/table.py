# SPDX-License-Identifier: Apache-2.0
"""A run's figures as Markdown: nothing is compared unless the baselines are in order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from allograft.evaluate.bootstrap import Interval
from allograft.evaluate.transfer.cell import Role
from allograft.evaluate.transfer.figures import Figures, Harm, Row
from allograft.evaluate.transfer.plan import MatrixPlan
from allograft.evaluate.transfer.text import Texts

_HEAD = (
    "arm", "recipient", "strength", "domain gain", "recovery", "general worse", "accuracy",
    "payload", "train", "peak", "seeds harmed",
)  # fmt: skip

_TITLES = {
    Role.ORACLE: "Oracle: the recipient itself, fully fine-tuned on the donor's text",
    Role.RECIPE: "Recipes",
    Role.BASELINE: "Baselines",
    Role.CONTROL: "Controls (a real gain is none of these)",
    Role.PAPER: "The papers' own settings",
}

_LEGEND = (
    "Bits per byte on test documents; brackets are 95 % intervals of the paired bootstrap over "
    "documents, after averaging over seeds. Domain gain: positive is better. General worse: "
    "positive is worse. Recovery: share of the oracle's gain on that recipient. Rates, doses, "
    "weights and positions were chosen on validation documents; a recipe is shown at its full "
    "dose and at the one a gate with the example policy would choose. A seed is harmed if its "
    "interval of the gain lies below zero. *Forced*: measured although the recipe refuses."
)


def render(figures: Figures, texts: Texts, plan: MatrixPlan) -> str:
    """The whole page. Without sanity it says why, and compares nothing."""
    size = plan.size
    lines = [
        f"Donor's text: {texts.domain}. {texts.nature}".rstrip(),
        "",
        f"{len(texts.training):,} training documents, {len(texts.validation)} + "
        f"{len(texts.test)} held out. {texts.overlap}",
        f"General text, in the same way: {texts.general_overlap}",
        "",
        f"Size `{size.name}`: {size.steps} steps of {size.batch} windows of {size.window} tokens "
        f"for every training, {size.seeds} seeds of each recipe; costly controls and the oracles "
        f"of other recipients {size.control_seeds}.",
        "",
        f"Sanity rule: {figures.sanity.reason}.",
    ]
    if not figures.sanity.holds:
        lines += ["", "**The sanity rule fails, so no comparison is shown.**"]
        return "\n".join(lines) + "\n"
    if texts.questions:
        lines += ["", _tell_task(texts)]
    lines += ["", _LEGEND, "", *_zero_shot(figures)]
    for role, title in _TITLES.items():
        rows = [row for row in figures.rows if row.role is role]
        if rows:
            lines += ["", f"**{title}**", "", *_table(_HEAD, [_cells(row) for row in rows])]
    if figures.refusals:
        refused = [(each.arm, each.recipient, each.code, each.reason) for each in figures.refusals]
        head = ("arm", "recipient", "code", "reason")
        lines += ["", "**Refused, and tensors do not even fit**", "", *_table(head, refused)]
    lines += ["", *(f"- {_tell_harm(harm)}" for harm in figures.harms)]
    return "\n".join(lines) + "\n"


def _zero_shot(figures: Figures) -> list[str]:
    rows = [
        (each.recipient, f"{each.domain:.3f}", f"{each.general:.3f}", _percent(each.accuracy))
        for each in figures.zero_shot
    ]
    return _table(("recipient, untouched", "domain", "general", "accuracy"), rows)


def _cells(row: Row) -> tuple[str, ...]:
    verdict = f" ({row.verdict}{', *forced*' if row.forced else ''})" if row.verdict else ""
    spread = ""
    if row.seeds > 1:
        spread = f"; seeds {min(row.seed_gains):+.3f} to {max(row.seed_gains):+.3f}"
    return (
        row.arm,
        f"{row.recipient}{verdict}",
        f"{row.strength} ({row.chosen_by})" if row.chosen_by else row.strength,
        _interval(row.gain) + spread,
        _percent(row.recovery),
        _interval(row.general),
        _percent(row.accuracy),
        _bytes(row.payload_bytes),
        f"{row.seconds:.1f} s" if row.seconds else "",
        _bytes(row.peak_bytes),
        f"{row.harmed} of {row.seeds}",
    )


def _interval(value: Interval) -> str:
    return f"{value.value:+.3f} [{value.low:+.3f}, {value.high:+.3f}]"


def _percent(value: Interval | None) -> str:
    if value is None:
        return ""
    return f"{value.value:.0%} [{value.low:.0%}, {value.high:.0%}]"


def _bytes(count: int) -> str:
    if not count:
        return ""
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


def _tell_task(texts: Texts) -> str:
    most = max(Counter(question.right for question in texts.questions).values())
    return (
        f"Label task: {len(texts.questions)} questions, {len(texts.labels)} labels, the label of "
        f"lowest loss counts. Always naming the commonest label is right in "
        f"{most / len(texts.questions):.1%}."
    )


def _tell_harm(harm: Harm) -> str:
    said = f"{harm.arm} at full dose: {harm.harmed} of {harm.of} recipients and seeds harmed"
    if harm.forced:
        said += f"; forced on those it refuses, {harm.forced_harmed} of {harm.forced}"
    return said + "."


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines]
