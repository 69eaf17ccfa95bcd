# SPDX-License-Identifier: Apache-2.0
"""Looks for identifiers of people in text that is about to leave (the work of gate G2).

Patterns with checksums where the identifier has one, so that ordinary numbers pass; inside a site
also matchers of what only the site knows (`identifiers`, `overlap`). The result is a count per
rule, never the text that matched: findings travel in dossiers and logs. A finding blocks; nothing
is ever redacted silently. Known limits: without a list untitled names and street lines are not
found, and paraphrase and rare combinations never are, so a clean scan is no claim of
de-identification.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import numpy as np

from allograft.crypto import canonical, dsse
from allograft.errors import RejectedError
from allograft.privacy.folding import fold_text
from allograft.privacy.wordlist import common_words

_START = r"(?<![0-9A-Za-z])"
_END = r"(?![0-9A-Za-z])"

_MONTH = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|"
    r"sep(?:t(?:ember)?)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)"
)

# Machine values of our own documents: digests, identifiers, times, media types and schemas.
_MACHINE = re.compile(
    r"[0-9a-f]{32}|[0-9a-f]{64}|\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z|"
    r"urn:allograft:[a-z-]+:v\d{1,3}|"
    r"https://(?:in-toto\.io|slsa\.dev|model_signing)/[A-Za-z0-9_./-]{1,80}"
)


# A tensor of a lineage sketch in a packet statement.
_SKETCHED = {"name", "shape", "values"}
_LARGEST_PROJECTION = 1e6


def _anything(_: str) -> bool:
    return True


def _digits(text: str) -> str:
    return "".join(character for character in text if character.isdigit())


def luhn_holds(text: str) -> bool:
    """Whether the digits of a text satisfy the Luhn check of payment cards."""
    digits = _digits(text)
    if not 13 <= len(digits) <= 19 or len(set(digits)) == 1:
        return False
    doubled = [int(d) * (2 if i % 2 else 1) for i, d in enumerate(reversed(digits))]
    return sum(value - 9 if value > 9 else value for value in doubled) % 10 == 0


# Lengths by country (ISO 13616 registry); a country that is not here may have any.
_IBAN_LENGTHS = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22,
    "BR": 29, "CH": 21, "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "DO": 28, "EE": 20,
    "EG": 29, "ES": 24, "FI": 18, "FO": 18, "FR": 27, "GB": 22, "GE": 22, "GI": 23, "GR": 27,
    "HR": 21, "HU": 28, "IE": 22, "IL": 23, "IS": 26, "IT": 27, "JO": 30, "KW": 30, "KZ": 20,
    "LB": 28, "LI": 21, "LT": 20, "LU": 20, "LV": 21, "MC": 27, "MD": 24, "ME": 22, "MK": 19,
    "MT": 31, "NL": 18, "NO": 15, "PK": 24, "PL": 28, "PS": 29, "PT": 25, "QA": 29, "RO": 24,
    "RS": 22, "SA": 24, "SE": 24, "SI": 19, "SK": 24, "SM": 27, "TN": 24, "TR": 26, "UA": 29,
    "VA": 22, "XK": 20,
}  # fmt: skip


def iban_holds(text: str) -> bool:
    """Whether a text begins with an IBAN by ISO 7064 mod 97-10; words may follow it."""
    compact = re.sub(r"[ -]", "", text).upper()
    length = _IBAN_LENGTHS.get(compact[:2], len(compact))
    if not 15 <= length <= min(34, len(compact)):
        return False
    moved = compact[4:length] + compact[:4]
    return int("".join(str(int(character, 36)) for character in moved)) % 97 == 1


def nhs_holds(text: str) -> bool:
    """Whether ten digits satisfy the modulus-11 check of NHS numbers."""
    digits = _digits(text)
    if len(digits) != 10 or len(set(digits)) == 1:
        return False
    total = sum(int(digit) * (10 - i) for i, digit in enumerate(digits[:9]))
    check = (11 - total % 11) % 11
    return check != 10 and check == int(digits[9])


def ssn_holds(text: str) -> bool:
    """Whether nine digits are in a range that US social security numbers use."""
    digits = _digits(text)
    area, group, serial = digits[:3], digits[3:5], digits[5:]
    return area not in {"000", "666"} and area < "900" and group != "00" and serial != "0000"


def _ipv4_holds(text: str) -> bool:
    octets = [int(part) for part in text.split(".")]
    return all(octet <= 255 for octet in octets) and any(octet > 9 for octet in octets)


def _phone_holds(text: str) -> bool:
    # No upper bound: a dose that follows a number must not make it none.
    return len(_digits(text)) >= 9


def _card_holds(text: str) -> bool:
    """Whether some neighbouring groups of digits are a card number; others may stand beside it."""
    groups = _digit_groups(text)
    return any(
        luhn_holds("".join(groups[first:last]))
        for first in range(len(groups))
        for last in range(first + 1, len(groups) + 1)
    )


def _long_number_holds(text: str) -> bool:
    # A row of a table is no number with spaces in it: a number has at most four groups, or groups
    # of one length.
    lengths = [len(group) for group in _digit_groups(text)]
    few = any(sum(lengths[first : first + 4]) >= 9 for first in range(len(lengths)))
    return few or any(
        length * same >= 9 for length, same in ((n, len(list(g))) for n, g in groupby(lengths))
    )


def _digit_groups(text: str) -> list[str]:
    return re.split(r"[ -]+", text)


def _postcode_holds(text: str) -> bool:
    # "b12 2nd" and "t1 1st" are ordinals; a postcode in small letters is never written so.
    return not text.endswith(("st", "nd", "rd"))


def _titled_name_holds(text: str) -> bool:
    # In small letters "dr said" is a sentence; "dr okafor" is a person.
    # "MS Windows" and "MS patients" are no persons either.
    title, name = text.split(" ", 1)
    is_certain = name[0].isupper() and title != "MS"
    return is_certain or name.lower() not in common_words()


@dataclass(frozen=True, slots=True)
class Rule:
    """One kind of identifier: a pattern, and a check that a match must also pass.

    Attributes:
        name: Stable; counts are reported under it.
        pattern: What it looks like in folded text.
        holds: The check.
        digits: Fewest digits that a match has; text with fewer is not searched.
        cue: What every match holds, or nothing.
    """

    name: str
    pattern: re.Pattern[str]
    holds: Callable[[str], bool] = _anything
    digits: int = 0
    cue: str = ""


def _rule(
    name: str,
    pattern: str,
    holds: Callable[[str], bool] = _anything,
    digits: int = 0,
    cue: str = "",
) -> Rule:
    return Rule(name, re.compile(pattern), holds, digits, cue)


# The 124 areas of UK postcodes: any two letters would take gene names (IL36 RN) for homes.
_AREAS = (
    "A[BL]|B[ABDHLNRSTX]?|C[ABFHMORTVW]|D[ADEGHLNTY]|E[CHNX]?|F[KY]|G[LUY]?|H[ADGPRSUX]|I[GMPV]|JE|"
    "K[ATWY]|L[ADELNSU]?|M[EKL]?|N[EGNPRW]?|O[LX]|P[AEHLOR]|R[GHM]|S[AEGKLMNOPRSTWY]?|T[ADFNQRSW]|"
    "UB|W[ACDFNRSV]?|YO|ZE"
)

#: Every rule but the one on dates. Odd spaces are allowed where a reader would not mind them.
RULES: tuple[Rule, ...] = (
    _rule(
        "email",
        r"(?i)[a-z0-9._%+-]{1,64}\s?@\s?[a-z0-9-]{1,63}(?:(?:\.| \. )[a-z0-9-]{1,63}){1,8}",
        cue="@",
    ),
    _rule(
        "url-user",
        r"(?i)(?:[a-z][a-z0-9+.-]{1,15}://[^\s/@:]{1,64}(?::[^\s/@]{0,64})?@"
        r"|https?://\S{1,200}(?:/~|/users?/|[?&](?:user|patient|id|name|mrn)=)[^\s/&]{1,64})",
        cue="/",
    ),
    _rule("ipv4", r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d.]*\d)", _ipv4_holds, digits=4),
    _rule("ipv6", r"(?i)(?<![0-9a-f:])(?:[0-9a-f]{1,4}:){4,7}[0-9a-f]{1,4}(?![0-9a-f:])", cue=":"),
    _rule("payment-card", r"(?<![\w.-])\d(?:[ -]{0,3}\d){12,18}(?![\w-])", _card_holds, digits=13),
    _rule(
        "iban", _START + r"(?i:[a-z]{2}\d{2}(?:[ -]?[a-z0-9]){11,30})" + _END, iban_holds, digits=2
    ),
    _rule("nhs-number", _START + r"\d{3}[ -]{0,3}\d{3}[ -]{0,3}\d{4}" + _END, nhs_holds, digits=10),
    _rule("us-ssn", _START + r"\d{3} ?[- ] ?\d{2} ?[- ] ?\d{4}" + _END, ssn_holds, digits=9),
    _rule(
        "phone",
        r"(?<![\w.+-])(?:\+ ?\d[\d ().-]{7,24}\d|\( ?\d{2,5} ?\)[ -]{0,3}\d[\d -]{4,14}\d"
        r"|\d{3} ?[-. ] ?\d{3} ?[-. ] ?\d{4}|0\d{2,4}[ -]{1,3}\d{3,4}[ -]{0,3}\d{3,4})(?![\w-])",
        _phone_holds,
        digits=9,
    ),
    _rule(
        "record-number",
        r"(?i)\b(?:mrn|nhs|(?:medical |hospital |patient |case |chart |account |policy |insurance )"
        r"?(?:record|id|no|number|nr|num|ref)|patient|chart|hospital number)"
        r"\b[ .:#=]{0,3}(?:number|no|id|nr)?[ .:#=]{0,3}[a-z]{0,3}-?\d(?:[ -]?\d){3,11}\b",
        digits=4,
    ),
    _rule(
        "medicare-mbi",
        _START
        + r"(?i:[1-9][AC-HJKMNP-RT-Y][AC-HJKMNP-RT-Y0-9]\d[ -]{0,3}[AC-HJKMNP-RT-Y]"
        + r"[AC-HJKMNP-RT-Y0-9]\d[ -]{0,3}[AC-HJKMNP-RT-Y]{2}\d{2})"
        + _END,
        digits=4,
    ),
    _rule(
        "uk-postcode",
        _START + rf"(?i:(?:(?:{_AREAS})\d[A-Z\d]?|GIR) ?\d[ABD-HJLNP-UW-Z]{{2}})" + _END,
        _postcode_holds,
        digits=2,
    ),
    _rule(
        "titled-name",
        r"\b(?:(?:Mr|Mrs|Ms|Miss|Mx|Dr|Prof|Sir|Dame|Herr|Frau|Mme|Sister|Nurse|Doctor|Professor"
        r"|MR|MRS|MS|DR|PROF|HERR|FRAU)\.? [A-Z]['\w-]{1,30}"
        r"|(?:mr|mrs|dr|prof|herr|frau|mme)\.? [a-z]['\w-]{2,30})",
        _titled_name_holds,
    ),
    _rule("long-number", _START + r"\d(?:[ -]{0,3}\d){8,}" + _END, _long_number_holds, 9),
)

#: Dates finer than a year. Off for our own documents, whose times are typed fields.
DATES = _rule(
    "date",
    r"(?i)(?<![\d-])(?:(?:19|20)\d{2} ?[-/.] ?(?:0?[1-9]|1[0-2]) ?[-/.] ?"
    r"(?:0?[1-9]|[12]\d|3[01])(?!\d)"
    r"|(?:0?[1-9]|[12]\d|3[01]) ?[-/.] ?(?:0?[1-9]|[12]\d|3[01]) ?[-/.] ?"
    r"(?:(?:19|20)\d{2}|\d{2})(?!\d)"
    rf"|\d{{1,2}}(?:st|nd|rd|th)?\.? (?:of )?{_MONTH}\b|\b{_MONTH}\.? \d{{1,2}}(?:st|nd|rd|th)?\b"
    rf"|\b{_MONTH},? (?:19|20)\d{{2}}\b)",
    digits=1,
)

#: Version of the rule set; it is part of a gate's identity.
RULES_VERSION = "2"


def rules_digest() -> str:
    """SHA-256 (hex) over the names and patterns of all rules."""
    described = [[rule.name, rule.pattern.pattern] for rule in (*RULES, DATES)]
    return hashlib.sha256(canonical.dumps(described)).hexdigest()


def scan_text(text: str, *, dates: bool = False) -> dict[str, int]:
    """Count what looks like an identifier in a text, by rule; empty means nothing was found.

    Args:
        text: The text; compatibility forms (full-width digits…) are folded first.
        dates: Also count dates finer than a year.
    """
    folded = fold_text(text)
    counts = {}
    digits = sum(map(folded.count, "0123456789"))
    for rule in (*RULES, DATES) if dates else RULES:
        if digits < rule.digits or (rule.cue and rule.cue not in folded):
            continue
        found = sum(1 for match in rule.pattern.finditer(folded) if rule.holds(match.group()))
        if found:
            counts[rule.name] = found
    return counts


class Matcher(Protocol):
    """What a site knows beyond patterns: its identifier list, its private corpus."""

    @property
    def name(self) -> str:
        """What a gate's figures call it."""

    def count(self, text: str) -> dict[str, int]:
        """Count hits by class; empty means nothing was found. Never the text."""


def scan_texts(
    texts: Iterable[str], *, dates: bool = False, matchers: Sequence[Matcher] = ()
) -> dict[str, int]:
    """Count identifiers over several texts, by rule and by class of each matcher.

    Args:
        texts: The texts.
        dates: Also count dates finer than a year.
        matchers: Present only inside the site; what they know never leaves it.
    """
    total: dict[str, int] = {}
    for text in texts:
        found = [scan_text(text, dates=dates), *(matcher.count(text) for matcher in matchers)]
        for counts in found:
            for name, count in counts.items():
                total[name] = total.get(name, 0) + count
    return total


def strings_of(value: canonical.Json) -> Iterator[str]:
    """Every string of a JSON value, names of fields included, machine values left out.

    Machine values are those that match one of our own fixed forms entirely: digests, packet ids,
    times in whole seconds, schema names, and the numbers of a lineage sketch.
    """
    if isinstance(value, str):
        if not _MACHINE.fullmatch(value):
            yield value
    elif isinstance(value, list):
        for entry in value:
            yield from strings_of(entry)
    elif isinstance(value, dict):
        numbers = value.keys() == _SKETCHED and _holds_numbers(value["values"])
        for name, entry in value.items():
            yield from strings_of(name)
            if not (numbers and name == "values"):
                yield from strings_of(entry)


def record_text(value: canonical.Json) -> str:
    """One record of a text payload as the text that is scanned.

    Everything is in it, also what `strings_of` leaves out: numbers, and strings of the form of our
    machine values, in which a payload could carry digits. Names of fields stand before their
    values (`mrn: 43219`), then the values alone, because an identifier can be spread over fields.
    """
    values = list(_leaves(value, with_names=False))
    return "\n".join([*_leaves(value, with_names=True), *(values if len(values) > 1 else [])])


def _leaves(value: canonical.Json, with_names: bool) -> Iterator[str]:
    if isinstance(value, dict):
        for name, entry in value.items():
            if with_names:
                yield name
            yield from _leaves(entry, with_names)
    elif isinstance(value, list):
        for entry in value:
            yield from _leaves(entry, with_names)
    elif isinstance(value, float) and value.is_integer():
        yield str(int(value))
    elif value is not None and not isinstance(value, bool):
        yield str(value)


def _holds_numbers(value: canonical.Json) -> bool:
    """Whether a string is float32 numbers in base64, of a size that a projection can have.

    Letters read as float32 are far larger, so text does not pass as numbers.
    """
    try:
        content = base64.b64decode(value, validate=True) if isinstance(value, str) else b""
    except (binascii.Error, ValueError):
        return False
    if not content or len(content) % 4:
        return False
    return bool((np.abs(np.frombuffer(content, dtype="<f4")) < _LARGEST_PROJECTION).all())


def check_strings(value: canonical.Json, what: str, matchers: Sequence[Matcher] = ()) -> None:
    """Refuse a document that holds what looks like an identifier.

    Args:
        value: The document that would leave (an offer, a statement, a card…).
        what: What it is, in words for the operator.
        matchers: What the site knows beyond patterns.

    Raises:
        RejectedError: AG-PRV-021, naming the rules that matched and never the text.
    """
    counts = scan_texts(strings_of(value), matchers=matchers)
    if counts:
        raise RejectedError("AG-PRV-021", f"{what}: {describe_counts(counts)}")


def check_envelope(envelope: bytes, what: str, matchers: Sequence[Matcher] = ()) -> None:
    """Refuse a signed document whose payload holds what looks like an identifier.

    It looks at the very bytes that were signed, so a field that a later version adds is not
    forgotten here.

    Raises:
        RejectedError: AG-PRV-021 as `check_strings`, AG-SIG-001 or AG-IN-001 if it is no envelope
            of a JSON document.
    """
    payload = canonical.loads(dsse.Envelope.from_bytes(envelope).payload)
    check_strings(payload, what, matchers)


def describe_counts(counts: Mapping[str, int]) -> str:
    """Counts in words, such as `2 email, 1 phone`."""
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
