# SPDX-License-Identifier: Apache-2.0
"""A hospital that does not exist, and texts with its patients' identifiers planted in them.

Everything follows from a seed. `hide` writes an identifier the way people and programs do: other
case, full-width digits, invisible characters, odd spaces, a line break, look-alike letters.
"""

import random
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from allograft.cli.demo.text import invent_medicine, write_notes

GIVEN = (
    "May", "Grace", "Peter", "Aisha", "Jürgen", "Li", "Mark", "Olga", "Chinedu", "Anne-Marie",
    "Rose", "Tomasz", "Søren", "Fatima", "Will", "Noor", "Ingrid", "Bill", "Kwame", "Zoë",
)  # fmt: skip
FAMILY = (
    "Young", "Okafor", "Müller", "O'Neill", "Brown", "Kowalczyk", "Ng", "Hill", "Baker", "Nguyen",
    "Van der Berg", "Ibrahimović", "Long", "Haddad", "Price", "Łukasik", "Park", "Bianchi", "Wood",
    "Sørensen",
)  # fmt: skip
_STREETS = ("Elm Street", "Mill Road", "Quarry Lane", "St John's Avenue", "Harbour Close")
# None of the demo's invented medicine: a patient must not share a name with a drug.
_SYLLABLES = ("zab", "dov", "kel", "lun", "mig", "nos", "rax", "sif", "tuv", "vez", "gom", "wix")


@dataclass(frozen=True)
class Person:
    given: str
    family: str
    record: str
    phone: str
    street: str
    email: str


def people(count: int, seed: int) -> list[Person]:
    """Patients; some have names that are common words, most have names of their own."""
    draw = random.Random(seed)
    found = []
    for number in range(count):
        family = draw.choice(FAMILY) if number % 3 == 0 else _invent(draw, 4)
        given = draw.choice(GIVEN) if number % 2 == 0 else _invent(draw, 3)
        record = draw.choice((f"{draw.randrange(10**7):07d}", f"KH{draw.randrange(10**6):06d}"))
        phone = f"+44 20 7{draw.randrange(1000):03d} {draw.randrange(10**4):04d}"
        street = f"{draw.randrange(1, 300)} {draw.choice(_STREETS)}"
        plain = unicodedata.normalize("NFKD", given).encode("ascii", "ignore").decode().lower()
        email = f"{plain}.{number}@mail.example"
        found.append(Person(given, family, record, phone, street, email))
    return found


def _invent(draw: random.Random, syllables: int) -> str:
    return "".join(draw.choice(_SYLLABLES) for _ in range(syllables)).capitalize()


def export(patients: list[Person]) -> bytes:
    """The patient index as CSV with a header."""
    lines = ["given,family,mrn,phone,street,email,birth_date,city"]
    lines += [
        f'{p.given},"{p.family}",{p.record},{p.phone},"{p.street}",{p.email},1962-04-17,London'
        for p in patients
    ]
    return "\n".join(lines).encode()


#: Identifiers of one patient that only the list can know, by class.
LISTED: dict[str, Callable[[Person], str]] = {
    "full name": lambda p: f"{p.given} {p.family}",
    "family name first": lambda p: f"{p.family}, {p.given}",
    "name with initial": lambda p: f"Mr {p.given} K. {p.family}",
    "record number": lambda p: p.record,
    "phone": lambda p: p.phone,
    "national phone": lambda p: "0" + p.phone.removeprefix("+44 "),
    "street line": lambda p: p.street,
    "e-mail": lambda p: p.email,
}

#: Identifiers of nobody on the list, that patterns must find, by class.
PATTERNS: dict[str, Callable[[random.Random], str]] = {
    "e-mail": lambda d: f"{_small(d)}.{_small(d)}@clinic{d.randrange(9)}.example",
    "ssn": lambda d: f"{_number(d, 3, 599)}-{_number(d, 2)}-{_number(d, 4)}",
    "nhs": lambda d: d.choice(("943 476 5919", "9434765919", "943-476-5919")),
    "card": lambda d: d.choice(("4111 1111 1111 1111", "5500-0000-0000-0004", "4012888888881881")),
    "iban": lambda d: d.choice(("GB82 WEST 1234 5698 7654 32", "DE89370400440532013000")),
    "phone": lambda d: f"+49 30 {d.randrange(10**6, 10**7)}",
    "us phone": lambda d: f"({_number(d, 3)}) {_number(d, 3)}-{_number(d, 4)}",
    "record number": lambda d: f"MRN {d.randrange(10**5, 10**8)}",
    "mbi": lambda d: f"{d.randrange(1, 10)}EG{d.randrange(10)}-TE4-MK{_number(d, 2)}",
    "postcode": lambda d: f"{d.choice(('SW', 'LS', 'EH'))}{d.randrange(1, 20)} {d.randrange(10)}AB",
    "titled name": lambda d: f"{d.choice(('Dr', 'Mrs', 'Mr', 'Prof'))} {_invent(d, 3)}",
    "user address": lambda d: f"https://host.example/users/{_small(d)}",
    "ipv4": lambda d: f"192.168.{d.randrange(256)}.{d.randrange(256)}",
    "long number": lambda d: str(d.randrange(10**8, 10**12)),
    "iso date": lambda d: f"19{_number(d, 2)}-{_number(d, 2, 12)}-{_number(d, 2, 28)}",
    "day first date": lambda d: f"{d.randrange(1, 29)}/{d.randrange(1, 13)}/19{_number(d, 2)}",
    "written date": lambda d: f"{d.randrange(1, 29)} {d.choice(('March', 'Aug', 'May'))} 1971",
}


def _small(draw: random.Random) -> str:
    return _invent(draw, 2).lower()


def _number(draw: random.Random, digits: int, most: int | None = None) -> str:
    return f"{draw.randrange(1, (most or 10**digits - 1) + 1):0{digits}d}"


_WIDE = str.maketrans({c: chr(ord(c) + 0xFEE0) for c in map(chr, range(0x21, 0x7F))})
_WIDE_DIGITS = str.maketrans({c: chr(ord(c) + 0xFEE0) for c in "0123456789"})
_LOOKALIKE = str.maketrans(
    "aeopcxyAEOPCTM",
    "\u0430\u0435\u043e\u0440\u0441\u0445\u0443\u0410\u0415\u041e\u0420\u0421\u0422\u041c",
)
_INVISIBLE = "\u200b\u200d\u2060\ufeff\u00ad\u034f\ufe0f\U000e0061"


def _invisible(text: str, draw: random.Random) -> str:
    return "".join(c + (draw.choice(_INVISIBLE) if draw.random() < 0.4 else "") for c in text)


def _spaced(text: str, draw: random.Random) -> str:
    odd = ("  ", "\u00a0", "\u2009", "\t", "\n", " \u3000")
    return "".join(draw.choice(odd) if c == " " else c for c in text)


def _dashed(text: str, draw: random.Random) -> str:
    return text.replace("-", draw.choice("\u2010\u2011\u2012\u2013\u2014\u2212\ufe63\uff0d"))


#: Ways to write the same identifier; a reader recognises all of them.
DISGUISES: dict[str, Callable[[str, random.Random], str]] = {
    "plain": lambda text, draw: text,
    "small letters": lambda text, draw: text.lower(),
    "capitals": lambda text, draw: text.upper(),
    "full width": lambda text, draw: text.translate(_WIDE),
    "full-width digits": lambda text, draw: text.translate(_WIDE_DIGITS),
    "invisible": _invisible,
    "odd spaces": _spaced,
    "other dashes": _dashed,
    "look-alikes": lambda text, draw: text.translate(_LOOKALIKE),
    "accents": lambda text, draw: "".join(c + "\u0301" * c.isalpha() for c in text),
}


@dataclass(frozen=True)
class Planted:
    """A text that must not leave."""

    kind: str
    disguise: str
    text: str


def plant(patients: list[Person], count: int, seed: int) -> Iterator[Planted]:
    """Notes, each with one identifier somewhere; every class meets every disguise in turn."""
    draw = random.Random(seed)
    notes = write_notes(invent_medicine(), 500, seed)
    kinds = [("listed", name) for name in LISTED] + [("pattern", name) for name in PATTERNS]
    for number in range(count):
        family, kind = kinds[number % len(kinds)]
        disguise = list(DISGUISES)[(number // len(kinds)) % len(DISGUISES)]
        if family == "listed":
            identifier = LISTED[kind](draw.choice(patients))
        else:
            identifier = PATTERNS[kind](draw)
        words = draw.choice(notes).text.split(" ")
        words.insert(draw.randrange(len(words) + 1), DISGUISES[disguise](identifier, draw))
        yield Planted(f"{family} {kind}", disguise, " ".join(words))
