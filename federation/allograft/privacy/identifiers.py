# SPDX-License-Identifier: Apache-2.0
"""The site's own list of identifiers, matched against text that is about to leave.

A site's patient index is ground truth that no general recogniser has: names without a title, record
numbers of its own form, street lines. The operator exports it as text (one identifier per line) or
CSV (one per cell). The list, the automaton made of it and the key of its fingerprint never leave
the site, and nothing of them is written anywhere; findings are counts per class.

What counts as a hit:

- **Always**: a full name in either order, a number of six or more digits, letters with digits, a
  street line, an e-mail address; whatever the spacing, case or punctuation, and also where both
  ends touch something that is no letter (or no digit), as in `peter_okafor84`.
- **A single word of a name that is no common word** (Okafor): always, also as Okafor's or Okafors,
  except inside the name of a disease (Wilson disease, Crohn's).
- **A single word that is also a common word** (Young, May) **or has two letters** (Ng): only with a
  capital, and beside a title, another single name of the list with a capital, or a capitalised word
  that is no common word. Otherwise one patient called May would stop every text.
- **A number of five digits**: only after a word such as `MRN` or `patient`. Shorter numbers and
  dates are not taken from the list; dates are the business of the scan's rule.

Not found: misspellings, nicknames, initials, and a single name whose letters are spaced unevenly.
"""

from __future__ import annotations

import copy
import csv
import hashlib
import hmac
import io
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import ahocorasick

from allograft.errors import RejectedError, UnavailableError
from allograft.plainfile import read_plain
from allograft.privacy.folding import fold_text
from allograft.privacy.vocabulary import is_own_word
from allograft.privacy.wordlist import common_words

#: Largest list: 64 MiB are about a million patients.
LIST_BYTES = 64 << 20

#: The figure by which a result of gate G2 says that a list was used.
LIST_FIGURE = "identifier-list"

Class = Literal["name", "number", "address", "email"]

_WORD = re.compile(r"[^\W\d_]+|\d+")
_APOSTROPHE = re.compile(r"(?<=[^\W\d_])'(?=[^\W\d_]{2})")
_SPACED_LETTERS = re.compile(r"(?<![^\W_])[^\W_](?:[ .\-_][^\W_]){2,}(?![^\W_])")
_DATE = re.compile(r"\d{1,4}([-/.])\d{1,2}\1\d{1,4}([ T][\d:.]+)?")

_COLUMNS: Mapping[str, str] = {
    r"(?:given|first|fore|middle|vor)_?names?|given|first|vorname|prenom": "given",
    r"(?:family|last|sur|nach|maiden)_?names?|family|last|surname|nachname|nom": "family",
    r"(?:full_?|patient_?|display_?)?names?": "name",
    r".*(?:mrn|record|nhs|ssn|number|insurance|phone|telephone|mobile|fax|policy|_id|_no).*|id|tel":
        "number",
    r".*(?:street|address|addr|line_?\d|strasse).*": "address",
    r".*e_?mail.*": "email",
    r".*(?:birth|dob|date|sex|gender|city|town|country|state|county|language|title|status|ward).*":
        "skip",
}  # fmt: skip

_STREETS = {
    "street": "st", "road": "rd", "avenue": "ave", "lane": "ln", "drive": "dr", "close": "cl",
    "court": "ct", "square": "sq", "terrace": "ter", "place": "pl", "boulevard": "blvd",
    "strasse": "str",
}  # fmt: skip
_UMLAUTS = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue", "Ä": "Ae", "Ö": "Oe", "Ü": "Ue"})
_TITLES = frozenset({
    "mr", "mrs", "ms", "miss", "mx", "dr", "prof", "sir", "dame", "herr", "frau", "mme", "sister",
    "nurse", "doctor", "professor", "madam",
})  # fmt: skip
# Those that are no words in small letters: "the nurse may" names nobody.
_SURE_TITLES = frozenset({"mr", "mrs", "dr", "prof", "herr", "frau", "mme"})
_CUES = frozenset({
    "mrn", "nhs", "record", "id", "no", "nr", "num", "number", "ref", "patient", "chart", "case",
    "account", "policy", "hospital",
})  # fmt: skip
# What a name before it belongs to: a disease, not a person.
_EPONYMS = frozenset({
    "disease", "diseases", "syndrome", "syndromes", "palsy", "sign", "signs", "test", "score",
    "scale", "criteria", "classification", "tumor", "tumour", "lymphoma", "sarcoma", "anemia",
    "anaemia", "phenomenon", "reflex", "cyst", "hernia", "fracture", "thyroiditis", "procedure",
    "maneuver", "manoeuvre", "chorea", "ataxia", "contracture", "law", "formula", "scan", "stain",
})  # fmt: skip

_FULL_NAME_LETTERS = 5
_STRONG_DIGITS = 6
_WEAK_DIGITS = 5
_PHONE_TAIL = 9


@dataclass(frozen=True, slots=True)
class IdentifierList:
    """Identifiers by what they are, folded; made by `parse_identifiers`.

    Attributes:
        compact: Letters and digits of identifiers that always count, with their class.
        words: Single words of names.
        skipped: How many cells held nothing usable (dates, cities, lone digits).
    """

    compact: Mapping[str, Class]
    words: frozenset[str]
    skipped: int

    def fingerprint(self, key: bytes) -> str:
        """A keyed digest (HMAC-SHA-256, hex) by which a site tells versions of its list apart.

        Without the key, which stays at the site, it tells nothing: not even whether a guessed list
        is the one.
        """
        digest = hmac.new(key, digestmod=hashlib.sha256)
        for entry in (*sorted(self.compact), "", *sorted(self.words)):
            digest.update(entry.encode() + b"\n")
        return digest.hexdigest()


def read_identifiers(path: Path) -> IdentifierList:
    """Read a site's identifier list.

    Raises:
        RejectedError: AG-PRV-070 if it is not text or too large, AG-PRV-071 if it is empty.
        UnavailableError: AG-STO-005 if there is no such file.
    """
    try:
        content = read_plain(path, LIST_BYTES)
    except FileNotFoundError as error:
        raise UnavailableError("AG-STO-005", f"there is no identifier list {path}") from error
    except OSError as error:
        raise RejectedError("AG-PRV-070", f"{path.name}: {error.strerror}") from error
    except RejectedError as error:
        raise RejectedError("AG-PRV-070", error.cause) from error
    return parse_identifiers(content)


def parse_identifiers(content: bytes) -> IdentifierList:
    """Read an identifier list from the bytes of its file.

    Columns whose header is known are read as what they say (given and family names of a row become
    full names); without a header each cell is judged by its form.

    Raises:
        RejectedError: AG-PRV-070 if it is not text, AG-PRV-071 if nothing in it can be matched.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RejectedError("AG-PRV-070", "the identifier list is not UTF-8 text") from error
    if "\x00" in text:
        raise RejectedError("AG-PRV-070", "the identifier list holds NUL bytes")
    collected = _Collected()
    try:
        rows = iter(_rows(text))
        first = next(rows, [])
        columns = [_column(cell) for cell in first]
        if not any(columns):
            collected.add_row(first, [])
            columns = []
        for row in rows:
            collected.add_row(row, columns)
    except csv.Error as error:
        raise RejectedError("AG-PRV-070", "a line of the identifier list is too long") from error
    if not collected.compact and not collected.words:
        # An empty list would pass everything while the gate's result says that a list was used.
        raise RejectedError("AG-PRV-071", "no cell of the identifier list can be matched")
    return IdentifierList(collected.compact, frozenset(collected.words), collected.skipped)


def _rows(text: str) -> Iterator[Sequence[str]]:
    """The cells of each line: separated as its first line is, or the whole line.

    One comma makes no CSV: "Okafor, Peter" is one name. A header that we know, quotes or more
    commas do.
    """
    lines = text.splitlines()
    head = lines[0] if lines else ""
    for separator in ("\t", ";", ","):
        if separator in head and (separator != "," or any(map(_column, head.split(",")))):
            yield from csv.reader(io.StringIO(text, newline=""), delimiter=separator)
            return
    for line in lines:
        yield (
            next(csv.reader([line]), []) if line.startswith('"') or line.count(",") > 1 else [line]
        )


def _column(header: str) -> str:
    """What a column holds by its header; empty if the header is none that we know."""
    name = "_".join(_WORD.findall(fold_text(header).lower()))
    return next((kind for form, kind in _COLUMNS.items() if re.fullmatch(form, name)), "")


class _Collected:
    """What the cells read so far are good for."""

    def __init__(self) -> None:
        self.compact: dict[str, Class] = {}
        self.words: set[str] = set()
        self.skipped = 0

    def add_row(self, row: Sequence[str], columns: Sequence[str]) -> None:
        names: dict[str, str] = {}
        for number, cell in enumerate(row):
            if not cell.strip():
                continue
            kind = columns[number] if number < len(columns) else ""
            before = len(self.compact) + len(self.words)
            for spelling in {cell, cell.translate(_UMLAUTS)}:
                self._add_cell(fold_text(spelling).strip(), kind)
            self.skipped += kind == "skip" or before == len(self.compact) + len(self.words)
            if kind in {"given", "family"}:
                names[kind] = cell
        if len(names) == 2:
            for spelling in {names["given"], names["given"].split()[0]}:
                full = f"{spelling} {names['family']}"
                for written in {full, full.translate(_UMLAUTS)}:
                    self._add_name(fold_text(written))

    def _add_cell(self, cell: str, kind: str) -> None:
        if kind == "skip" or (not kind and _DATE.fullmatch(cell)):
            return
        if kind == "email" or (not kind and "@" in cell):
            self._add("email", _compact(cell), 6)
        elif kind == "address" or (not kind and _looks_like_address(cell)):
            self._add_address(cell)
        elif any(character.isdigit() for character in cell):
            self._add_number(_compact(cell))
        elif kind != "number":
            self._add_name(cell)

    def _add(self, kind: Class, compact: str, least: int) -> None:
        if len(compact) >= least:
            self.compact.setdefault(compact, kind)

    def _add_number(self, compact: str) -> None:
        if not compact.isdigit():
            if sum(character.isdigit() for character in compact) >= 3:
                self._add("number", compact, 5)
            return
        self._add("number", compact, _STRONG_DIGITS)
        self._add("number", compact.lstrip("0"), _WEAK_DIGITS)
        if len(compact) > _PHONE_TAIL:
            # +44 20…, 0044 20… and 020… end alike; so do record numbers with and without a prefix.
            self._add("number", compact[-_PHONE_TAIL:], _PHONE_TAIL)

    def _add_address(self, cell: str) -> None:
        words = _words(cell)
        if len(words) < 2 or common_words().issuperset(words):
            return
        for change in ({}, _STREETS, {short: long for long, short in _STREETS.items()}):
            self._add("address", "".join(change.get(word, word) for word in words), 7)

    def _add_name(self, cell: str) -> None:
        words = [word for word in _words(cell) if not word.isdigit()]
        words = [word for word in words if word not in _TITLES] or words
        self.words.update(word for word in words if len(word) > 1)
        whole = [word for word in words if len(word) > 1]
        if len(whole) < 2:
            return
        for ordered in (words, whole, whole[-1:] + whole[:-1], whole[1:] + whole[:1],
                        [whole[0], whole[-1]], [whole[-1], whole[0]]):  # fmt: skip
            self._add("name", "".join(ordered), _FULL_NAME_LETTERS)


def _looks_like_address(cell: str) -> bool:
    words = _words(cell)
    letters = sum(len(word) for word in words if not word.isdigit())
    has_digits = any(word.isdigit() for word in words)
    return has_digits and len(words) >= 2 and letters >= 4


def _words(folded: str) -> list[str]:
    return _WORD.findall(_APOSTROPHE.sub("", folded).casefold())


def _compact(folded: str) -> str:
    return "".join(_words(folded))


class IdentifierMatcher:
    """Counts the identifiers of a site's list in texts.

    A string that is entirely one of our documents' own words (`gates`, `lora`) or a public name is
    not compared: a patient of that name would otherwise stop every document of the site.

    200,000 patients with five identifiers each take 31 s of processor time to read and build, once
    per process, and 490 MiB.
    """

    name = LIST_FIGURE

    def __init__(self, identifiers: IdentifierList) -> None:
        self.skipped = identifiers.skipped
        self._public: frozenset[str] = frozenset()
        common = common_words()
        self._plain = frozenset(
            word for word in identifiers.words if len(word) > 2 and word not in common
        )
        self._doubtful = identifiers.words - self._plain
        self._automaton = ahocorasick.Automaton()
        for compact, kind in identifiers.compact.items():
            self._automaton.add_word(compact, (len(compact), kind))
        self._automaton.make_automaton()

    def excusing(self, names: Iterable[str]) -> IdentifierMatcher:
        """The same matcher, which passes strings that are entirely one of some public names."""
        other = copy.copy(self)
        other._public = frozenset(names)
        return other

    def count(self, text: str) -> dict[str, int]:
        """Count hits by class, such as `listed-name`; empty means nothing was found."""
        if text in self._public or is_own_word(text):
            return {}
        folded = _APOSTROPHE.sub("", _join_letters(fold_text(text)))
        tokens = [_Token(written) for written in _WORD.findall(folded)]
        # "Rose K. Hill" is Rose Hill.
        named = [token for token in tokens if len(token.word) > 1 or token.word.isdigit()]
        whole = list(self._whole(tokens)) or list(self._whole(named))
        counts: dict[str, int] = {}
        for kind in (*whole, *self._single(tokens)):
            counts[f"listed-{kind}"] = counts.get(f"listed-{kind}", 0) + 1
        return counts

    def _whole(self, tokens: Sequence[_Token]) -> Iterator[Class]:
        """Identifiers that always count, found without regard to what separates their parts."""
        if not len(self._automaton):
            return
        stream = "".join(token.word for token in tokens)
        ends: list[int] = []
        for token in tokens:
            ends.append((ends[-1] if ends else 0) + len(token.word))
        counted = 0
        for last, (length, kind) in self._automaton.iter(stream):
            start, end = last + 1 - length, last + 1
            if end == counted:
                continue  # the same number without its zeros or its country code
            index = bisect_left(ends, end)
            if ends[index] != end:
                continue  # it ends inside a word or a number
            if kind == "number" and stream[start:end].isdigit():
                holds = _number_holds(stream, tokens, ends, start, end)
            else:
                holds = start == 0 or ends[bisect_left(ends, start)] == start
            if holds:
                counted = end
                yield kind

    def _single(self, tokens: Sequence[_Token]) -> Iterator[Class]:
        """Single words of names."""
        for index, token in enumerate(tokens):
            word = token.word
            if self._is_plain(word):
                if not _is_eponym(tokens, index):
                    yield "name"
            elif word in self._doubtful:
                before = tokens[index - 1] if index else None
                after = tokens[index + 1] if index + 1 < len(tokens) else None
                titles = _TITLES if token.is_capital else _SURE_TITLES
                is_titled = before is not None and before.word in titles
                is_named = token.is_capital and (self._supports(before) or self._supports(after))
                if is_titled or (is_named and not _is_eponym(tokens, index)):
                    yield "name"

    def _is_plain(self, word: str) -> bool:
        if word in self._plain:
            return True
        # Okafor's lost its apostrophe only if it was never typed: Okafors.
        is_genitive = len(word) > 4 and word.endswith("s") and word not in common_words()
        return is_genitive and word[:-1] in self._plain

    def _supports(self, other: _Token | None) -> bool:
        """Whether a neighbour makes a person of a common word."""
        if other is None or not other.is_capital:
            return False
        return other.word in self._doubtful or (
            len(other.word) > 1 and other.word not in common_words() and not other.is_shout
        )


class _Token:
    """A word or a number of the folded text."""

    __slots__ = ("is_capital", "is_shout", "word")

    def __init__(self, written: str) -> None:
        self.word = written.casefold()
        self.is_capital = written[0].isupper()
        # All capitals: an abbreviation (MRI), which makes no person of the word beside it.
        self.is_shout = len(written) > 1 and written.isupper()


def _join_letters(folded: str) -> str:
    """Words whose letters are spaced, as whole words: `O k a f o r` is Okafor."""
    return _SPACED_LETTERS.sub(lambda match: re.sub(r"[ .\-_]", "", match.group()), folded)


def _number_holds(
    stream: str, tokens: Sequence[_Token], ends: Sequence[int], start: int, end: int
) -> bool:
    """Whether a run of digits is the whole number, leading zeros and a country code aside."""
    if end - start >= _PHONE_TAIL:
        return True
    first = start
    while first and stream[first - 1] == "0" and ends[bisect_left(ends, first)] != first:
        first -= 1
    index = bisect_left(ends, first) if first else -1
    if first and ends[index] != first:
        return False  # it begins inside a number
    if end - first >= _STRONG_DIGITS:
        return True
    near = tokens[max(0, index - 2) : index + 1]
    return any(token.word in _CUES for token in near)


def _is_eponym(tokens: Sequence[_Token], index: int) -> bool:
    """Whether the name of a disease follows, as in `Wilson disease` or `Crohn's disease`."""
    return any(token.word in _EPONYMS for token in tokens[index + 1 : index + 4])
