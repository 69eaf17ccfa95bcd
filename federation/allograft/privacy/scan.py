# SPDX-License-Identifier: Apache-2.0
"""Looks for identifiers of people in text that is about to leave (the work of gate G2).

Patterns with checksums where the identifier has one, so that ordinary numbers pass. The result
is a count per rule, never the text that matched: findings travel in dossiers and logs. A finding
blocks; nothing is ever redacted silently. Known limits: untitled names, street lines, paraphrase
and rare combinations are not found, so a clean scan is no claim of de-identification.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from allograft.crypto import canonical
from allograft.errors import RejectedError

_START = r"(?<![0-9A-Za-z])"
_END = r"(?![0-9A-Za-z])"

# Invisible characters would split an identifier so that no pattern sees it.
_INVISIBLE = re.compile("[\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]")
_DASHES = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-"))

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


def iban_holds(text: str) -> bool:
    """Whether a text is an IBAN by ISO 7064 mod 97-10."""
    compact = re.sub(r"[ -]", "", text).upper()
    if not 15 <= len(compact) <= 34:
        return False
    moved = compact[4:] + compact[:4]
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
    return 9 <= len(_digits(text)) <= 15


@dataclass(frozen=True, slots=True)
class Rule:
    """One kind of identifier: a pattern, and a check that a match must also pass."""

    name: str
    pattern: re.Pattern[str]
    holds: Callable[[str], bool] = _anything


def _rule(name: str, pattern: str, holds: Callable[[str], bool] = _anything) -> Rule:
    return Rule(name, re.compile(pattern), holds)


#: Every rule but the one on dates. Names are stable: counts are reported under them.
RULES: tuple[Rule, ...] = (
    _rule("email", r"(?i)[a-z0-9._%+-]{1,64}\s?@\s?[a-z0-9-]{1,63}(?:\.[a-z0-9-]{1,63}){1,8}"),
    _rule(
        "url-user",
        r"(?i)(?:[a-z][a-z0-9+.-]{1,15}://[^\s/@:]{1,64}(?::[^\s/@]{0,64})?@"
        r"|https?://\S{1,200}(?:/~|/users?/|[?&](?:user|patient|id|name|mrn)=)[^\s/&]{1,64})",
    ),
    _rule("ipv4", r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d.]*\d)", _ipv4_holds),
    _rule("ipv6", r"(?i)(?<![0-9a-f:])(?:[0-9a-f]{1,4}:){4,7}[0-9a-f]{1,4}(?![0-9a-f:])"),
    _rule("payment-card", r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?![\w-])", luhn_holds),
    _rule("iban", _START + r"(?i:[a-z]{2}\d{2}(?:[ -]?[a-z0-9]){11,30})" + _END, iban_holds),
    _rule("nhs-number", _START + r"\d{3}[ -]?\d{3}[ -]?\d{4}" + _END, nhs_holds),
    _rule("us-ssn", _START + r"\d{3}[- ]\d{2}[- ]\d{4}" + _END, ssn_holds),
    _rule(
        "phone",
        r"(?<![\w.+-])(?:\+\d[\d ().-]{7,20}\d|\(\d{2,5}\)[ -]?\d[\d -]{4,10}\d"
        r"|\d{3}[-. ]\d{3}[-. ]\d{4}|0\d{2,4}[ -]\d{3,4}[ -]?\d{3,4})(?![\w-])",
        _phone_holds,
    ),
    _rule(
        "record-number",
        r"(?i)\b(?:mrn|nhs|(?:medical |hospital |patient |case |chart |account |policy |insurance )"
        r"?(?:record|id|no|number|nr|num|ref)|patient|chart|hospital number)"
        r"\b[ .:#=]{0,3}(?:number|no|id|nr)?[ .:#=]{0,3}[a-z]{0,3}-?\d{4,12}\b",
    ),
    _rule(
        "medicare-mbi",
        _START
        + r"[1-9][AC-HJKMNP-RT-Y][AC-HJKMNP-RT-Y0-9]\d-?[AC-HJKMNP-RT-Y][AC-HJKMNP-RT-Y0-9]\d-?"
        r"[AC-HJKMNP-RT-Y]{2}\d{2}" + _END,
    ),
    _rule(
        "uk-postcode",
        _START + r"(?:[A-Z]{1,2}\d[A-Z\d]?|GIR) ?\d[ABD-HJLNP-UW-Z]{2}" + _END,
    ),
    _rule(
        "titled-name",
        r"\b(?:Mr|Mrs|Ms|Miss|Mx|Dr|Prof|Sir|Dame|Herr|Frau|Mme|Sister|Nurse|Doctor|Professor)"
        r"\.? [A-Z][\w'\u2019-]{1,30}",
    ),
    _rule("long-number", _START + r"\d(?:[ -]?\d){8,}" + _END),
)

#: Dates finer than a year. Off for our own documents, whose times are typed fields.
DATES = _rule(
    "date",
    r"(?i)(?<![\d-])(?:(?:19|20)\d{2}[-/.](?:0?[1-9]|1[0-2])[-/.](?:0?[1-9]|[12]\d|3[01])(?!\d)"
    r"|(?:0?[1-9]|[12]\d|3[01])[-/.](?:0?[1-9]|[12]\d|3[01])[-/.](?:(?:19|20)\d{2}|\d{2})(?!\d)"
    rf"|\d{{1,2}}(?:st|nd|rd|th)?\.? {_MONTH}\b|\b{_MONTH}\.? \d{{1,2}}(?:st|nd|rd|th)?\b"
    rf"|\b{_MONTH},? (?:19|20)\d{{2}}\b)",
)

#: Version of the rule set; it is part of a gate's identity.
RULES_VERSION = "1"


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
    folded = _INVISIBLE.sub("", unicodedata.normalize("NFKC", text)).translate(_DASHES)
    counts = {}
    for rule in (*RULES, DATES) if dates else RULES:
        found = sum(1 for match in rule.pattern.finditer(folded) if rule.holds(match.group()))
        if found:
            counts[rule.name] = found
    return counts


def scan_texts(texts: Iterable[str], *, dates: bool = False) -> dict[str, int]:
    """Count identifiers over several texts, by rule."""
    total: dict[str, int] = {}
    for text in texts:
        for name, count in scan_text(text, dates=dates).items():
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


def check_strings(value: canonical.Json, what: str) -> None:
    """Refuse a document that holds what looks like an identifier.

    Args:
        value: The document that would leave (an offer, a statement, a card…).
        what: What it is, in words for the operator.

    Raises:
        RejectedError: AG-PRV-021, naming the rules that matched and never the text.
    """
    counts = scan_texts(strings_of(value))
    if counts:
        raise RejectedError("AG-PRV-021", f"{what}: {describe_counts(counts)}")


def describe_counts(counts: Mapping[str, int]) -> str:
    """Counts in words, such as `2 email, 1 phone`."""
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
