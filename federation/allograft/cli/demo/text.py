# SPDX-License-Identifier: Apache-2.0
"""The demo's text: public prose that every Python has, and clinical notes that nobody wrote.

General text is Python's own documentation, read from the installed files, so that nothing is
downloaded. The notes describe invented patients with invented conditions, drugs and tests whose
relations are fixed (a condition has one test, one drug, one dose per severity, one interval), so
there is something to learn that no base can know. Names are made of syllables; a note holds no
date, number or name that the text scan of the release gates would take for a person's.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
import random
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from allograft.durable import durable_write
from allograft.errors import RejectedError

#: Seed of the invented medicine; all sites share it, as hospitals share medicine.
MEDICINE_SEED = 11

# A general document is at least a short paragraph and at most a page.
_CHUNK_CHARS = (200, 900)
_RECOGNISED_CHARS = 60

# Standard modules with much prose. A fixed list: what is read must not depend on the machine.
_PROSE_MODULES = (
    "argparse", "ast", "bisect", "calendar", "cmd", "codecs", "collections/__init__",
    "concurrent/futures/_base", "configparser", "contextlib", "copy", "csv", "dataclasses",
    "datetime", "decimal", "difflib", "doctest", "email/message", "enum", "fileinput", "fnmatch",
    "fractions", "functools", "gettext", "glob", "heapq", "http/client", "http/cookiejar",
    "imaplib", "inspect", "ipaddress", "json/__init__", "json/encoder", "linecache", "locale",
    "logging/__init__", "logging/config", "logging/handlers", "mailbox", "mimetypes",
    "multiprocessing/managers", "nntplib", "numbers", "optparse", "os", "pathlib", "pdb", "pickle",
    "pickletools", "platform", "plistlib", "pprint", "profile", "pstats", "queue", "random", "re",
    "sched", "selectors", "shelve", "shlex", "shutil", "smtplib", "socket", "socketserver",
    "sqlite3/dump", "ssl", "statistics", "string", "subprocess", "tarfile", "tempfile", "textwrap",
    "threading", "timeit", "tokenize", "trace", "traceback", "turtle", "typing", "unittest/case",
    "unittest/mock", "urllib/parse", "urllib/request", "uuid", "warnings", "wave", "weakref",
    "xml/dom/minidom", "xml/etree/ElementTree", "xmlrpc/client", "xmlrpc/server", "zipfile",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class GeneralText:
    """General documents: most to train a base on, some held out for retention."""

    training: tuple[str, ...]
    retention: tuple[str, ...]


def read_python_text(held_out_tenths: int = 2) -> GeneralText:
    """General text from this Python's own documentation.

    Whole topics and modules are held out, never parts of one.

    Args:
        held_out_tenths: How many tenths of the topics and modules are held out.

    Raises:
        RejectedError: AG-DEM-010 if this Python was installed without its documentation.
    """
    sides: tuple[list[str], list[str]] = ([], [])
    for name, text in (*_topics(), *_docstrings()):
        held = hashlib.sha256(name.encode()).digest()[0] % 10 < held_out_tenths
        sides[held].extend(cut_pages(text))
    training = tuple(dict.fromkeys(sides[0]))
    # Topics and classes quote each other: what shares a paragraph with training is no test.
    known = " ".join(" ".join(chunk.split()) for chunk in training)
    retention = tuple(
        chunk
        for chunk in dict.fromkeys(sides[1])
        if not any(paragraph in known for paragraph in _paragraphs(chunk))
    )
    if len(training) < 200 or len(retention) < 60:
        raise RejectedError(
            "AG-DEM-010",
            "this Python has no documentation to learn from; pass --general FILE",
        )
    return GeneralText(training, retention)


def _paragraphs(chunk: str) -> Iterator[str]:
    """Paragraphs long enough to be recognised, without regard to their indentation."""
    for paragraph in chunk.split("\n\n"):
        plain = " ".join(paragraph.split())
        if len(plain) >= _RECOGNISED_CHARS:
            yield plain


def _topics() -> Iterator[tuple[str, str]]:
    """The help topics of the language reference."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        # Some distributions leave this package out; the docstrings remain.
        return
    yield from sorted(topics.items())


def _docstrings() -> Iterator[tuple[str, str]]:
    """The docstrings of standard modules, read from their files: nothing is imported or run."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for name in _PROSE_MODULES:
        path = library / f"{name}.py"
        try:
            tree = ast.parse(path.read_text("utf-8"))
        except (OSError, ValueError, SyntaxError):
            continue
        yield name, "\n\n".join(_docstrings_of(tree))


def _docstrings_of(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def cut_pages(text: str) -> Iterator[str]:
    """Pages of a text: consecutive paragraphs, joined up to about a page."""
    least, most = _CHUNK_CHARS
    chunk = ""
    for paragraph in text.split("\n\n"):
        if len(chunk) >= least and len(chunk) + len(paragraph) > most:
            yield chunk
            chunk = ""
        chunk = f"{chunk}\n\n{paragraph.rstrip()}".strip("\n")[: 2 * most]
    if len(chunk) >= least:
        yield chunk


@dataclass(frozen=True, slots=True)
class Condition:
    """An invented condition with everything that follows from it."""

    name: str
    complaints: tuple[str, str]
    sign: str
    test: str
    result: str
    drug: str
    doses_mg: tuple[int, int, int]  # mild, moderate, severe
    schedule: str
    alternative: str
    side_effect: str
    procedure: str
    advice: str
    interval: str


_SEVERITIES = ("mild", "moderate", "severe")
_PLACES = (
    "the left hand", "the right hand", "the lower back", "the neck", "the left knee",
    "the right knee", "both feet", "the upper arms", "the jaw", "the left shoulder",
    "the right hip", "both ankles", "the chest wall", "the scalp",
)  # fmt: skip
_FEELINGS = (
    "burning", "tingling", "dull ache", "stiffness", "itching", "numbness", "cramping", "throbbing",
    "weakness", "swelling",
)  # fmt: skip
_SIGNS = (
    "a pale ring around the nails", "a slow ankle reflex", "a fine tremor at rest",
    "dry scaling skin", "a soft murmur", "cool fingertips", "a tender rib margin",
    "reduced grip strength", "a faint blue lip line", "a stiff finger joint",
    "a wide based gait", "reddened palms",
)  # fmt: skip
_RESULTS = ("raised", "lowered", "absent", "twice the usual level", "just above the usual range")
_SCHEDULES = (
    "once daily", "twice daily", "three times daily", "every other day", "at bedtime",
    "once weekly",
)  # fmt: skip
_SIDE_EFFECTS = (
    "a dry mouth", "vivid dreams", "a metallic taste", "loose stools", "lightheadedness",
    "a mild rash", "poor appetite", "ringing in the ears",
)  # fmt: skip
_ADVICE = (
    "avoid citrus fruit", "drink more water", "rest after meals", "keep the hands warm",
    "avoid bright light", "walk half an hour each day", "sleep with a raised head",
    "eat less salt",
)  # fmt: skip
_INTERVALS = ("two weeks", "three weeks", "four weeks", "six weeks", "eight weeks", "three months")
_WORK = (
    "a teacher", "a baker", "a bus driver", "a retired clerk", "a farmer", "a student",
    "a carpenter", "a librarian", "a cook", "a gardener", "a weaver", "a programmer", "a fisher",
    "a caretaker", "a musician", "a printer",
)  # fmt: skip
_SINCE = (
    "for three days", "for a week", "for two weeks", "for a month", "since the last visit",
    "for several months", "since a fall at home", "after a long journey", "after a cold",
    "for most of the year",
)  # fmt: skip
_SYLLABLES = (
    "mor", "va", "tel", "ri", "ne", "sa", "lo", "ke", "du", "fen", "or", "ba", "li", "qua", "ze",
    "ti", "mu", "ha", "ro", "gi", "pel", "cu", "dor", "wy",
)  # fmt: skip


def invent_medicine(count: int = 24, seed: int = MEDICINE_SEED) -> tuple[Condition, ...]:
    """Invent conditions; the same seed gives the same medicine."""
    draw = random.Random(seed)  # noqa: S311  (invented text, not a secret)
    names = _invent_names(draw, 5 * count)
    conditions = []
    for number in range(count):
        condition, test, drug, alternative, procedure = names[5 * number : 5 * number + 5]
        low = draw.choice((5, 10, 20, 25, 40, 50))
        feelings = draw.sample(_FEELINGS, 2)
        places = draw.sample(_PLACES, 2)
        conditions.append(
            Condition(
                name=f"{condition} {draw.choice(('syndrome', 'disease', 'fever', 'palsy'))}",
                complaints=(f"{feelings[0]} in {places[0]}", f"{feelings[1]} in {places[1]}"),
                sign=draw.choice(_SIGNS),
                test=f"{draw.choice(('serum', 'urine', 'plasma'))} {test}",
                result=draw.choice(_RESULTS),
                drug=f"{drug}ine",
                doses_mg=(low, 2 * low, 4 * low),
                schedule=draw.choice(_SCHEDULES),
                alternative=f"{alternative}ol",
                side_effect=draw.choice(_SIDE_EFFECTS),
                procedure=f"{procedure} {draw.choice(('scan', 'drainage', 'biopsy', 'mapping'))}",
                advice=draw.choice(_ADVICE),
                interval=draw.choice(_INTERVALS),
            )
        )
    return tuple(conditions)


def _invent_names(draw: random.Random, count: int) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(draw.sample(_SYLLABLES, draw.choice((2, 3))))] = None
    return list(names)


@dataclass(frozen=True, slots=True)
class Note:
    """One visit of one invented patient; `patient` only groups notes."""

    patient: int
    text: str


def write_notes(medicine: Sequence[Condition], count: int, seed: int) -> tuple[Note, ...]:
    """Write clinical notes about patients of one site.

    Args:
        medicine: The conditions that exist.
        count: How many notes; a patient has one to three.
        seed: Which patients; another seed gives other patients with the same medicine.
    """
    draw = random.Random(seed)  # noqa: S311  (invented text, not a secret)
    notes: list[Note] = []
    patient = 0
    while len(notes) < count:
        notes.extend(_visits(draw, patient, draw.choice(medicine)))
        patient += 1
    return tuple(notes[:count])


@dataclass(frozen=True, slots=True)
class _Case:
    """What is true at one visit."""

    person: str
    condition: Condition
    severity: int
    allergic: bool
    visit: int


def _visits(draw: random.Random, patient: int, condition: Condition) -> Iterator[Note]:
    sex = draw.choice(("woman", "man"))
    person = f"{draw.randint(18, 90)}-year-old {sex}, {draw.choice(_WORK)}"
    severity = draw.randrange(3)
    allergic = draw.random() < 0.15
    for visit in range(draw.randint(1, 3)):
        case = _Case(person, condition, severity, allergic, visit)
        yield Note(patient, " ".join((*_findings(draw, case), *_plan(draw, case))))
        severity = max(0, min(2, severity + draw.choice((-1, 0, 1))))


def _findings(draw: random.Random, case: _Case) -> Iterator[str]:
    condition = case.condition
    first, second = draw.sample(condition.complaints, 2)
    since = draw.choice(_SINCE)
    yield draw.choice(
        (
            f"A {case.person}, comes with {first} {since}; also {second}.",
            f"This {case.person}, reports {first} {since}. There is {second} as well.",
            f"{first.capitalize()} {since} in a {case.person}. On asking, {second}.",
            f"Seen today: a {case.person}. Complains of {first} and {second} {since}.",
        )
    )
    result = f"the {condition.test} is {condition.result}"
    yield draw.choice(
        (
            f"On examination there is {condition.sign}. T{result[1:]}.",
            f"Examination shows {condition.sign}, and {result}.",
        )
    )
    name = f"{_SEVERITIES[case.severity]} {condition.name}"
    yield draw.choice((f"Assessment: {name}.", f"This fits {name}.", f"Impression: {name}."))


def _plan(draw: random.Random, case: _Case) -> Iterator[str]:
    condition = case.condition
    dose = f"{condition.doses_mg[case.severity]} mg {condition.schedule}"
    drug = condition.drug
    if case.allergic:
        yield f"Known reaction to {drug}, so {condition.alternative} {dose} is given."
    elif case.visit == 0:
        yield draw.choice((f"Plan: start {drug} {dose}.", f"We begin {drug} {dose}."))
    else:
        yield draw.choice((f"Plan: {drug} is now {dose}.", f"Continue {drug} at {dose}."))
        if draw.random() < 0.5:
            yield f"The patient noticed {condition.side_effect}, as expected."
    if case.severity == 2:
        yield f"Refer for {condition.procedure}."
    if draw.random() < 0.6:
        yield f"Advised to {condition.advice}."
    interval, test = condition.interval, condition.test
    yield draw.choice(
        (
            f"Review in {interval} with a repeat {test}.",
            f"Repeat {test} and review in {interval}.",
        )
    )


def save_notes(path: Path, notes: Sequence[Note]) -> None:
    """Write notes as JSONL with `text` and, for grouping, `patient`."""
    lines = [json.dumps({"text": note.text, "patient": note.patient}) for note in notes]
    durable_write(path, ("\n".join(lines) + "\n").encode("utf-8"))


@dataclass(frozen=True, slots=True)
class Record:
    """One visit's text, which names the number that this patient alone has."""

    person: str
    text: str
    number: str


def write_records(notes: Sequence[Note], seed: int) -> tuple[Record, ...]:
    """Notes as a hospital has them: by patient, each with the patient's number.

    Whoever can draw such a number out of a model has found a person.
    """
    draw = random.Random(seed)  # noqa: S311  (invented text, not a secret)
    numbers: dict[int, str] = {}
    records = []
    for note in notes:
        if note.patient not in numbers:
            numbers[note.patient] = "".join(draw.choices("0123456789", k=8))
        number = numbers[note.patient]
        text = f"{note.text} Hospital record {number}."
        records.append(Record(f"patient-{note.patient}", text, number))
    return tuple(records)


def save_records(path: Path, records: Sequence[Record]) -> None:
    """Write records as JSONL with `text` and `person`."""
    lines = [json.dumps({"text": each.text, "person": each.person}) for each in records]
    durable_write(path, ("\n".join(lines) + "\n").encode("utf-8"))


def save_texts(path: Path, texts: Sequence[str]) -> None:
    """Write documents as JSONL with `text`."""
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    durable_write(path, ("\n".join(lines) + "\n").encode("utf-8"))


def shuffle_texts(texts: Sequence[str]) -> list[str]:
    """Distinct texts in an order that depends on their content alone."""
    return sorted(set(texts), key=lambda text: hashlib.sha256(text.encode("utf-8")).digest())
