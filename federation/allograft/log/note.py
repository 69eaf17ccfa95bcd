# SPDX-License-Identifier: Apache-2.0
"""C2SP signed notes, Ed25519 only; verifier keys are in `crypto.vkey`.

A note is text, an empty line, and signature lines. A line is ours when both key name and key id
match; such a line must verify, all others are passed over. The text is returned only after that.
See protos/spec/log.md, "Notes".
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass

from allograft.crypto.notekey import NoteKey
from allograft.crypto.vkey import LOG, VerifierKey, check_name
from allograft.errors import RejectedError
from allograft.limits import LIMITS

_DASH = "\N{EM DASH}"


@dataclass(frozen=True, slots=True)
class SignatureLine:
    """One signature line, unverified.

    Attributes:
        key_id: First four bytes of what a key's name, type and public key hash to.
        signature: The bytes after the key id.
    """

    name: str
    key_id: bytes
    signature: bytes

    def to_text(self) -> str:
        """The line with its newline."""
        return f"{_DASH} {self.name} {_encode(self.key_id + self.signature)}\n"


@dataclass(frozen=True, slots=True)
class Note:
    """A note as read; nothing in it is trusted before `verify_note`."""

    text: str
    lines: tuple[SignatureLine, ...]

    def to_text(self) -> str:
        """The note with its signature lines."""
        return self.text + "\n" + "".join(line.to_text() for line in self.lines)


def find_line(note: Note, key: VerifierKey) -> SignatureLine | None:
    """The first line of a note that claims to be by this key."""
    for line in note.lines:
        if (line.name, line.key_id) == (key.name, key.key_id):
            return line
    return None


def sign_note(text: str, name: str, key: NoteKey) -> Note:
    """Sign a text that ends in a newline."""
    check_name(name)
    _check_text(text)
    key_id = VerifierKey(name, LOG, key.public).key_id
    line = SignatureLine(name, key_id, key.sign(text.encode()))
    return Note(text, (line,))


def read_note(content: str | bytes) -> Note:
    """Take a note apart.

    Raises:
        RejectedError: AG-LOG-003 if malformed or over a limit.
    """
    try:
        encoded = content.encode() if isinstance(content, str) else content
        note = encoded.decode("utf-8", errors="strict")
    except UnicodeError as error:
        raise RejectedError("AG-LOG-003", "a note is not UTF-8") from error
    if len(encoded) > LIMITS.note_bytes:
        raise RejectedError("AG-LOG-003", f"a note of {len(encoded)} bytes")
    text, separator, signatures = note.rpartition("\n\n")
    if not separator or not signatures.endswith("\n"):
        raise RejectedError("AG-LOG-003", "a note is not text, empty line and signatures")
    _check_text(text + "\n")
    entries = signatures[:-1].split("\n")
    if len(entries) > LIMITS.cosignatures:
        raise RejectedError("AG-LOG-003", f"a note with {len(entries)} signatures")
    return Note(text + "\n", tuple(read_line(entry + "\n") for entry in entries))


def read_line(line: str) -> SignatureLine:
    """Read one signature line with its newline.

    Raises:
        RejectedError: AG-LOG-003.
    """
    fields = line.removesuffix("\n").split(" ")
    if len(fields) != 3 or fields[0] != _DASH or not line.endswith("\n"):
        raise RejectedError("AG-LOG-003", "a signature line is malformed")
    try:
        check_name(fields[1])
    except RejectedError as error:
        raise RejectedError("AG-LOG-003", error.cause) from error
    raw = _decode(fields[2], "a signature")
    if len(raw) < 5:
        raise RejectedError("AG-LOG-003", "a signature line is too short")
    return SignatureLine(fields[1], raw[:4], raw[4:])


def verify_note(note: Note, key: VerifierKey) -> str:
    """The text of a note that this key signed.

    Raises:
        RejectedError: AG-LOG-004 if it has no line of this key, or one that does not verify.
    """
    line = find_line(note, key)
    if line is None:
        raise RejectedError("AG-LOG-004", f"a note is not signed by {key.name}")
    try:
        key.key.verify(line.signature, note.text.encode())
    except RejectedError as error:
        raise RejectedError("AG-LOG-004", f"a signature of {key.name} does not fit") from error
    return note.text


def _check_text(text: str) -> None:
    if not text.endswith("\n") or any(c < " " and c != "\n" for c in text):
        raise RejectedError("AG-LOG-003", "the text of a note holds control characters")


def _encode(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")


def _decode(text: str, what: str) -> bytes:
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RejectedError("AG-LOG-003", f"{what} is not base64") from error
    # Python accepts stray bits after the last byte; a second spelling of one signature.
    if _encode(raw) != text:
        raise RejectedError("AG-LOG-003", f"{what} is not canonical base64")
    return raw
