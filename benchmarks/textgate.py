# SPDX-License-Identifier: Apache-2.0
"""The text gate: how often it stops clean text, what it misses, and how fast it is.

Missed: notes with one identifier of a known class under a known disguise (tests/kit/planted.py);
the figure must be 0. False alarms: documents that hold no person and are stopped all the same, by
patterns (with dates) and by the list of an invented hospital whose patients' names are common words
as often as not. Python's documentation holds real e-mail addresses, network addresses and names of
its authors, so not each of its alarms is false. Where ../shared/data/medical lies beside the
checkout, MedQuAD's answers are measured too. Speeds are per second of processor time, because the
machine is shared. Passages: notes of other invented patients share sentences with the corpus, which
is what the overlap gate is to find, so text written from a private template is stopped.
"""

from __future__ import annotations

import gzip
import importlib
import json
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from allograft.cli.demo.text import invent_medicine, read_python_text, write_notes
from allograft.privacy.identifiers import IdentifierMatcher, parse_identifiers
from allograft.privacy.overlap import Document, index_corpus
from allograft.privacy.scan import scan_text, scan_texts
from benchmarks import report

_ROOT = Path(__file__).resolve().parents[1]
_MEDQUAD = _ROOT.parent / "shared" / "data" / "medical" / "medquad.jsonl.gz"


def main() -> None:
    """Measure and tell."""
    options = report.parse_options("false alarms, misses and speed of the text gate")
    # The invented hospital belongs to the tests, which are no package of ours.
    sys.path.insert(0, str(_ROOT / "tests"))
    hospital = importlib.import_module("kit.planted")
    patients = hospital.people(2_000 if options.quick else 200_000, seed=1)
    index = hospital.export(patients)
    start, resident = time.process_time(), _resident_mib()
    matcher = IdentifierMatcher(parse_identifiers(index))
    figures = [
        report.Figure("list_patients", len(patients), ""),
        report.Figure("list_build", time.process_time() - start, "CPU s"),
        report.Figure("list_memory", _resident_mib() - resident, "MiB"),
    ]
    planted = [p.text for p in hospital.plant(patients, 1_000 if options.quick else 10_000, seed=7)]
    missed = sum(not scan_texts([text], dates=True, matchers=[matcher]) for text in planted)
    figures += [
        report.Figure("planted", len(planted), ""),
        report.Figure("missed", missed, "", "0"),
    ]
    for name, texts in _clean(1_000 if options.quick else 2_000):
        figures += [
            report.Figure(f"{name}_documents", len(texts), ""),
            report.Figure(f"{name}_stopped_by_patterns", _percent(texts, scan_text), "%"),
            report.Figure(f"{name}_stopped_by_list", _percent(texts, matcher.count), "%"),
        ]
    notes = write_notes(invent_medicine(), 2_000 if options.quick else 6_000, seed=5)
    texts = [note.text for note in notes]
    figures += [
        report.Figure("patterns_speed", _speed(texts, lambda t: scan_text(t, dates=True)), "MB/s"),
        report.Figure("list_speed", _speed(texts, matcher.count), "MB/s"),
    ]
    figures += _overlap([Document(str(note.patient), note.text) for note in notes])
    report.publish("textgate", figures, options)


def _clean(count: int) -> Iterator[tuple[str, Sequence[str]]]:
    """Text that holds nobody of the list."""
    yield "notes", [note.text for note in write_notes(invent_medicine(), count, seed=21)]
    python = read_python_text()
    yield "python_docs", [*python.training, *python.retention][:count]
    if _MEDQUAD.exists():
        with gzip.open(_MEDQUAD, "rt", encoding="utf-8") as lines:
            records = [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]
        yield "medquad", [f"{record['question']} {record['answer']}" for record in records]


def _overlap(documents: Sequence[Document]) -> list[report.Figure]:
    size = sum(len(document.text) for document in documents) / 1e6
    public = read_python_text()
    with tempfile.TemporaryDirectory(prefix="allograft-bench-") as folder:
        start = time.process_time()
        index = index_corpus(
            documents, public.training[:200], secrets.token_bytes(32), Path(folder)
        )
        seconds = time.process_time() - start
    texts = [document.text for document in documents]
    others = [note.text for note in write_notes(invent_medicine(), 500, seed=99)]
    return [
        report.Figure("overlap_index_speed", size / seconds, "MB/s"),
        report.Figure("overlap_passages", len(index), ""),
        report.Figure("overlap_speed", _speed(texts, index.count), "MB/s"),
        report.Figure("overlap_own_notes_stopped", _percent(texts, index.count), "%", "100"),
        report.Figure("overlap_python_docs_stopped", _percent(public.retention, index.count), "%"),
        report.Figure("overlap_same_template_stopped", _percent(others, index.count), "%"),
    ]


def _percent(texts: Sequence[str], count: Callable[[str], dict[str, int]]) -> float:
    return 100 * sum(bool(count(text)) for text in texts) / len(texts)


def _speed(texts: Sequence[str], count: Callable[[str], dict[str, int]]) -> float:
    start = time.process_time()
    for text in texts:
        count(text)
    return sum(map(len, texts)) / 1e6 / (time.process_time() - start)


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


if __name__ == "__main__":
    main()
