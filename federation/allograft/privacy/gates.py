# SPDX-License-Identifier: Apache-2.0
"""Release gates that need no private data: type (G0), text (G2) and structure (G6).

Invariant: a packet goes on only if every gate says PASS. A gate that refuses says FAIL, a gate
that cannot judge says INVALID, and a gate that stops in any other way leaves no dossier at all:
each of the three denies. Results hold figures and counts, never text or values. See
protos/spec/privacy.md.
"""

from __future__ import annotations

import math
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from allograft.crypto import canonical
from allograft.errors import AllograftError, RejectedError
from allograft.packet.kinds import find_kind
from allograft.packet.tensors import CheckedTensors, check_file, check_shapes
from allograft.privacy.dossier import GateResult, GateVerdict
from allograft.privacy.egress import WIRE_DTYPES, AllowList, WireDtype
from allograft.privacy.scan import (
    RULES_VERSION,
    Matcher,
    describe_counts,
    record_text,
    scan_texts,
    strings_of,
)

#: Parts of this name hold text: strict JSON, one record on each line of at most this size.
TEXT_SUFFIX = ".jsonl"
RECORD_BYTES = 1 << 20

#: What a gate measured, to be reported whether it passes or not.
Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Submission:
    """A built payload with everything that would leave beside it.

    Attributes:
        kind: The packet's kind.
        payload: The rebuilt payload directory.
        allowed: The tensors its file must hold.
        wire_dtype: Their number format.
        documents: Every document that would leave, by what it is: statements, offer, provenance.
        matchers: What the site knows beyond patterns; only a site has any.
    """

    kind: str
    payload: Path
    allowed: AllowList
    wire_dtype: WireDtype
    documents: tuple[tuple[str, canonical.Json], ...]
    matchers: tuple[Matcher, ...] = ()


@dataclass(frozen=True, slots=True)
class Gate:
    """A named, versioned rule: it fills in figures and raises to refuse."""

    name: str
    version: str
    judge: Callable[[Submission, Figures], None]


def holds_text(kind: str) -> bool:
    """Whether a kind of packet carries text of its own, beside what its documents say.

    Raises:
        RejectedError: AG-PKT-001 for an unknown kind.
    """
    return any(name.endswith(TEXT_SUFFIX) for name in find_kind(kind).parts)


def run_gates(submission: Submission) -> tuple[GateResult, ...]:
    """Run all gates, also after one has refused: the operator sees everything at once."""
    return tuple(run_gate(gate, submission) for gate in GATES)


def check_results(results: Sequence[GateResult]) -> None:
    """Refuse unless there are results and all of them passed.

    Raises:
        RejectedError: AG-PRV-020.
    """
    if not results:
        raise RejectedError("AG-PRV-020", "no gate ran")
    for result in results:
        if result.verdict is not GateVerdict.PASS:
            raise RejectedError(
                "AG-PRV-020", f"gate {result.name}: {result.verdict}: {result.reason}"
            )


def run_gate(gate: Gate, submission: Submission) -> GateResult:
    """Run one gate and return its result, whatever happens inside."""
    return settle(gate.name, gate.version, lambda figures: gate.judge(submission, figures))


def settle(name: str, version: str, judge: Callable[[Figures], None]) -> GateResult:
    """Run a rule that fills in figures and raises to refuse, and turn it into a result.

    `RejectedError` is FAIL; any other error of ours says that the rule cannot judge: INVALID.
    """
    figures: Figures = {}
    verdict, reason = GateVerdict.PASS, ""
    started = time.monotonic()
    try:
        judge(figures)
    except RejectedError as error:
        verdict, reason = GateVerdict.FAIL, f"{error.code}: {error.cause}"
    except AllograftError as error:
        verdict, reason = GateVerdict.INVALID, f"{error.code}: {error.cause}"
    except (OSError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        # The type only: the message could quote what the gate was reading.
        verdict, reason = GateVerdict.INVALID, f"the gate stopped: {type(error).__name__}"
    cost_ms = round(1000 * (time.monotonic() - started))
    return GateResult(name, version, verdict, tuple(sorted(figures.items())), cost_ms, reason)


def _judge_type(submission: Submission, figures: Figures) -> None:
    """G0: a known kind, whose payload is exactly the files that the kind has."""
    expected = find_kind(submission.kind).parts
    found = {entry.name: entry for entry in os.scandir(submission.payload)}
    figures["files"] = len(found)
    if found.keys() != set(expected):
        raise RejectedError("AG-PRV-040", f"the payload is not exactly {', '.join(expected)}")
    size = 0
    for name, entry in found.items():
        status = entry.stat(follow_symlinks=False)
        if not stat.S_ISREG(status.st_mode):
            raise RejectedError("AG-PRV-040", f"{name} is not a regular file")
        size += status.st_size
    figures["bytes"] = size
    if not submission.documents:
        raise RejectedError("AG-PRV-040", "no statement is submitted with the payload")


def _judge_text(submission: Submission, figures: Figures) -> None:
    """G2: no string of any document and no record of a text part looks like an identifier."""
    findings = []
    # A recipient sees from the figures whether more than patterns was asked; never how much.
    figures |= {matcher.name: 1 for matcher in submission.matchers}
    figures["strings"] = 0

    def judge(what: str, texts: Sequence[str], dates: bool) -> None:
        counts = scan_texts(texts, dates=dates, matchers=submission.matchers)
        figures["strings"] += len(texts)
        for rule, count in counts.items():
            figures[rule] = figures.get(rule, 0) + count
        if counts:
            findings.append(f"{what}: {describe_counts(counts)}")

    for what, document in submission.documents:
        judge(what, list(strings_of(document)), dates=False)
    for name in find_kind(submission.kind).parts:
        if name.endswith(TEXT_SUFFIX):
            for number, record in enumerate(_records(submission.payload / name), 1):
                # A text payload carries dates of people, not times of documents.
                judge(f"{name} line {number}", [record_text(record)], dates=True)
    if findings:
        raise RejectedError(_text_code(figures), "; ".join(findings)[:400])


def _text_code(figures: Figures) -> str:
    return "AG-PRV-074" if "private-passage" in figures else "AG-PRV-021"


def _records(path: Path) -> Iterator[canonical.Json]:
    """The records of a text part, one JSON value on each line.

    Raises:
        RejectedError: AG-PRV-073 for a line that is too long or no strict JSON: what cannot be read
            cannot be judged.
    """
    with path.open("rb") as handle:
        number = 0
        while line := handle.readline(RECORD_BYTES + 1):
            number += 1
            if len(line) > RECORD_BYTES:
                raise RejectedError("AG-PRV-073", f"{path.name}: line {number} is too long")
            try:
                yield canonical.loads(line)
            except RejectedError as error:
                raise RejectedError(
                    "AG-PRV-073", f"{path.name}: line {number} is not strict JSON"
                ) from error


def _judge_structure(submission: Submission, figures: Figures) -> None:
    """G6: allowed names, shapes and dtype; finite values; norms within reach of the base."""
    # Each kind so far has one tensor file, whose tensors the allow-list names.
    kind = find_kind(submission.kind)
    (name,) = kind.parts
    dtype = WIRE_DTYPES[submission.wire_dtype]
    with (submission.payload / name).open("rb") as handle:
        checked = check_file(handle, kind.rules)
        expected = {
            name: (each.integers.dtype if each.integers else dtype, each.shape)
            for name, each in submission.allowed.items()
        }
        check_shapes(checked.table, expected)
        for entry in checked.table.entries:
            if integers := submission.allowed[entry.name].integers:
                handle.seek(entry.offset)
                integers.check(handle.read(entry.size_bytes))
    parameters = sum(math.prod(entry.shape) for entry in checked.table.entries)
    figures["tensors"] = len(checked.table.entries)
    figures["parameters"] = parameters
    figures["norm"] = checked.frobenius_norm
    figures["largest_rms_ratio"] = _largest_ratio(checked, submission.allowed)
    if not figures["largest_rms_ratio"] <= 1.0:
        raise RejectedError("AG-PRV-041", "a tensor's values are far larger than its base's")


def _largest_ratio(checked: CheckedTensors, allowed: AllowList) -> float:
    ratios = []
    for figure in checked.figures:
        limit = allowed[figure.name]
        rms = figure.frobenius_norm / math.sqrt(math.prod(limit.shape))
        ratios.append(rms / limit.max_rms)
    return max(ratios)


#: All gates of the open mode, in order.
GATES: tuple[Gate, ...] = (
    Gate("G0", "1", _judge_type),
    Gate("G2", RULES_VERSION, _judge_text),
    Gate("G6", "1", _judge_structure),
)
