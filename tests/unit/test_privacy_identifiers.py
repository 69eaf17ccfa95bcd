# SPDX-License-Identifier: Apache-2.0
"""The site's identifier list finds its patients and lets other text pass."""

from pathlib import Path

import pytest

from allograft.errors import RejectedError, UnavailableError
from allograft.privacy.identifiers import IdentifierMatcher, parse_identifiers, read_identifiers

INDEX = """given,family,mrn,phone,street,email,dob,city
May,Young,0043219,+44 20 7946 0958,12 Elm Street,m.young@mail.example,1962-04-17,London
Peter,Okafor,AB12345,,,,,
Jürgen,Müller,,,,,,
Li,Ng,,,,,,
Anne-Marie,O'Neill,54321,,,,,
Carl,Wilson,,,,,,
"""


@pytest.fixture(scope="module")
def matcher() -> IdentifierMatcher:
    return IdentifierMatcher(parse_identifiers(INDEX.encode()))


@pytest.mark.parametrize(
    "text",
    [
        "seen with May Young", "YOUNG, MAY", "may young", "PeterOkafor84", "peter j. okafor",
        "p e t e r  o k a f o r", "Okafor", "okafor's wife", "Okafors Befund", "O k a f o r",
        "o\u200bkafor", "Mueller", "Muller", "M\u00dcLLER", "M\u0443 Okafor", "Mr Young",
        "mr young", "Mr Ng", "Li Ng", "oneill", "O\u2019Neill", "May Schmidt", "wilson was seen",
        "Carl Wilson disease",
    ],
)  # fmt: skip
def test_finds_names(matcher: IdentifierMatcher, text: str) -> None:
    assert "listed-name" in matcher.count(text)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("0043219", "listed-number"),
        ("MRN0043219", "listed-number"),
        ("MRN 43219", "listed-number"),
        ("00 43 219", "listed-number"),
        ("\uff10\uff10\uff14\uff13\uff12\uff11\uff19", "listed-number"),
        ("ab-12345", "listed-number"),
        ("patient 54321", "listed-number"),
        ("020 7946 0958", "listed-number"),
        ("0044-20-79460958", "listed-number"),
        ("12 elm st.", "listed-address"),
        ("12 Elm\nStreet", "listed-address"),
        ("M.Young @ mail . example", "listed-email"),
    ],
)
def test_finds_numbers_streets_and_addresses(
    matcher: IdentifierMatcher, text: str, kind: str
) -> None:
    assert kind in matcher.count(text)


@pytest.mark.parametrize(
    "text",
    [
        "Young people may come in May.", "In May the young", "The Young Report",
        "MAY CAUSE DROWSINESS",
        "an MRI May show it", "the nurse may wait", "Wilson disease", "Wilson's disease",
        "54321 people", "10043219", "12 elms", "London", "an entire week", "17 April 1962",
    ],
)  # fmt: skip
def test_lets_words_and_other_numbers_pass(matcher: IdentifierMatcher, text: str) -> None:
    assert matcher.count(text) == {}


def test_a_list_without_a_header_is_judged_by_form() -> None:
    found = parse_identifiers(b"Okafor, Peter\n0043219\n12 Elm Street\n1962-04-17\na@b.example\n")
    matcher = IdentifierMatcher(found)
    assert found.skipped == 1
    assert matcher.count("peter okafor of 12 elm street, 0043219") == {
        "listed-name": 3, "listed-number": 1, "listed-address": 1,
    }  # fmt: skip


def test_counts_hold_no_text(matcher: IdentifierMatcher) -> None:
    counts = matcher.count("May Young, 0043219, 12 Elm Street")
    assert set(counts) == {"listed-name", "listed-number", "listed-address"}
    assert all(isinstance(count, int) for count in counts.values())


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"\xff\xfeM\x00a\x00y", "AG-PRV-070"),
        (b"May\x00Young", "AG-PRV-070"),
        (b"", "AG-PRV-071"),
        (b"\n \n1\n1962-04-17\n", "AG-PRV-071"),
        (b"city,dob\nLondon,1962-04-17\n", "AG-PRV-071"),
    ],
)
def test_a_list_that_matches_nothing_is_refused(content: bytes, code: str) -> None:
    with pytest.raises(RejectedError) as error:
        parse_identifiers(content)
    assert error.value.code == code


def test_a_missing_list_is_not_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError) as error:
        read_identifiers(tmp_path / "patients.csv")
    assert error.value.code == "AG-STO-005"


def test_the_fingerprint_is_keyed_and_changes_with_the_list() -> None:
    first, other = parse_identifiers(b"Peter Okafor\n"), parse_identifiers(b"Olga Okafor\n")
    key = bytes(32)
    assert first.fingerprint(key) == first.fingerprint(key)
    assert first.fingerprint(key) != other.fingerprint(key)
    assert first.fingerprint(key) != first.fingerprint(b"\x01" * 32)
