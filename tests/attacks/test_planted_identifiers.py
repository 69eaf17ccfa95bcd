# SPDX-License-Identifier: Apache-2.0
"""Ten thousand notes, each with an identifier of one class under one disguise; none may pass."""

from collections import Counter

import pytest

from allograft.cli.demo.text import invent_medicine, write_notes
from allograft.privacy.identifiers import IdentifierMatcher, parse_identifiers
from allograft.privacy.scan import scan_texts
from kit.planted import DISGUISES, LISTED, PATTERNS, export, people, plant


@pytest.fixture(scope="module")
def matcher() -> IdentifierMatcher:
    return IdentifierMatcher(parse_identifiers(export(people(2000, seed=1))))


def passing(matcher: IdentifierMatcher, count: int, seed: int) -> tuple[Counter, int]:
    patients = people(2000, seed=1)
    passed: Counter = Counter()
    seen = set()
    for planted in plant(patients, count, seed):
        seen.add((planted.kind, planted.disguise))
        if not scan_texts([planted.text], dates=True, matchers=[matcher]):
            passed[planted.kind, planted.disguise] += 1
    return passed, len(seen)


def test_every_class_under_every_disguise_is_found(matcher: IdentifierMatcher) -> None:
    combinations = (len(LISTED) + len(PATTERNS)) * len(DISGUISES)
    passed, seen = passing(matcher, 2 * combinations, seed=3)
    assert (dict(passed), seen) == ({}, combinations)


@pytest.mark.slow  # 20 to 40 s
def test_none_of_ten_thousand_passes(matcher: IdentifierMatcher) -> None:
    passed, _ = passing(matcher, 10_000, seed=7)
    assert dict(passed) == {}


def test_clean_notes_pass(matcher: IdentifierMatcher) -> None:
    notes = [note.text for note in write_notes(invent_medicine(), 500, seed=9)]
    assert scan_texts(notes, dates=True, matchers=[matcher]) == {}
