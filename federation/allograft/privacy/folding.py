# SPDX-License-Identifier: Apache-2.0
"""One spelling for text that is compared with identifiers, however it was written.

Full-width digits, invisible characters, look-alike letters, accents and odd spaces all hide an
identifier from a pattern while a reader still sees it. Folding is one-way and for comparison only:
what leaves is never the folded text. It is no defence against an insider who encodes (base64, a
word for every digit); separation of duties is.
"""

from __future__ import annotations

import re
import unicodedata

# Braille blank and the Hangul fillers look like spaces and are none to Unicode.
_SPACES = re.compile("[\\s\u2800\u3164\uffa0]+")
_DASHES = {0x02D7, 0x2043, 0x2212}
# Blanks and vowels without a shape that Unicode counts as letters.
_SHAPELESS = {0x115F, 0x1160, 0x17B4, 0x17B5}

# Cyrillic and Greek letters that look like ASCII ones, and Latin letters that people type without
# their stroke. Words of those scripts change too, which is harmless: lists are folded alike.
_CYRILLIC = ("АВЕЅІЈКМНОРСТУХавеѕіјкмнорстухһԁԛԝ", "ABESIJKMHOPCTYXabesijkmhopctyxhdqw")
_GREEK = ("ΑΒΕΖΗΙΚΜΝΟΡΤΥΧαινορτυχ", "ABEZHIKMNOPTYXaivoptux")
_STROKED = ("øØłŁđĐðÐıħĦ", "oOlLdDdDihH")
_JOINED = {"æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE", "þ": "th", "Þ": "Th"}
_APOSTROPHES = dict.fromkeys("\u2018\u2019\u02bc\u02b9\u2032\u00b4", "'")
_LETTERS = {
    **dict(zip(*_CYRILLIC, strict=True)),
    **dict(zip(*_GREEK, strict=True)),
    **dict(zip(*_STROKED, strict=True)),
    **_JOINED,
    **_APOSTROPHES,
}


class _Plain(dict[int, str]):
    """What a character becomes, worked out when it first turns up."""

    def __missing__(self, code: int) -> str:
        plain = self[code] = _plain(chr(code))
        return plain


def _plain(character: str) -> str:
    if character in _LETTERS:
        return _LETTERS[character]
    if character.isspace():
        return character
    category = unicodedata.category(character)
    # Control and format characters, and marks: they split a word for a pattern, not for a reader.
    if category in {"Cc", "Cf", "Mn", "Me"} or ord(character) in _SHAPELESS:
        return ""
    if category == "Pd" or ord(character) in _DASHES:
        return "-"
    return str(unicodedata.decimal(character)) if category == "Nd" else character


_PLAIN = _Plain()


def fold_text(text: str) -> str:
    """The text in its one spelling: compatibility forms, marks, dashes and white space folded.

    Case is kept, because a capital tells a name from a word. Each run of white space, line ends
    included, becomes one space: a number that a line break splits is still that number.
    """
    if not text.isascii():
        # NFKD would turn the acute accent, typed as an apostrophe, into a space.
        text = unicodedata.normalize("NFKD", text.replace("\u00b4", "'")).translate(_PLAIN)
        # Hangul was taken apart; put together, a syllable counts as one letter again.
        text = unicodedata.normalize("NFKC", text)
    elif not text.isprintable():
        text = text.translate(_PLAIN)
    return _SPACES.sub(" ", text)
