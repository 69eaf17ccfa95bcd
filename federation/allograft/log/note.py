# SPDX-License-Identifier: Apache-2.0
"""C2SP signed notes and verifier keys, Ed25519 only.

A note is text, an empty line, and signature lines. A line is ours when both key name and key id
match; such a line must verify, all others are passed over. The text is returned only after that.
See protos/spec/log.md, "Notes".
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from allograft.crypto.notekey import NoteKey, NotePublicKey
from allograft.errors import RejectedError
from allograft.limits import LIMITS

#: Signature types of C2SP signed-note: plain Ed25519, and timestamped cosignatures.
ED25519 = 1
COSIGNATURE = 4

_DASH = "\N{EM DASH}"
_KEY_ID = re.compile(r"[0-9a-f]{8}")


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


@dataclass(frozen=True, slots=True)
class NoteVerifier:
    """A verifier key: who signs, how, and with which key."""

    name: str
    kind: int
    key: NotePublicKey

    @property
    def key_id(self) -> bytes:
        """The id by which signature lines name this key."""
        return key_id(self.name, self.kind, self.key.raw)

    def to_vkey(self) -> str:
        """The key as `name+hex id+base64`."""
        material = _encode(bytes([self.kind]) + self.key.raw)
        return f"{self.name}+{self.key_id.hex()}+{material}"

    @classmethod
    def from_vkey(cls, vkey: str, kind: int = ED25519) -> NoteVerifier:
        """Read a verifier key of one signature type.

        Raises:
            RejectedError: AG-LOG-003 malformed or of another type, AG-KEY-003 an unusable key.
        """
        # Base64 has plus signs too; names and ids have none.
        name, _, rest = vkey.partition("+")
        key_id_hex, _, material = rest.partition("+")
        check_name(name)
        raw = _decode(material, "a verifier key")
        if not _KEY_ID.fullmatch(key_id_hex) or len(raw) != 33 or raw[0] != kind:
            raise RejectedError("AG-LOG-003", f"not an Ed25519 verifier key of type {kind}")
        verifier = cls(name, kind, NotePublicKey(raw[1:]))
        if verifier.key_id.hex() != key_id_hex:
            raise RejectedError("AG-LOG-003", "a verifier key and its key id do not fit")
        return verifier

    def find(self, note: Note) -> SignatureLine | None:
        """The first line of a note that claims to be by this key."""
        for line in note.lines:
            if (line.name, line.key_id) == (self.name, self.key_id):
                return line
        return None


def key_id(name: str, kind: int, public_key: bytes) -> bytes:
    """The four-byte id of a key under a name and a signature type."""
    return hashlib.sha256(name.encode() + b"\n" + bytes([kind]) + public_key).digest()[:4]


def make_vkey(name: str, key: NoteKey, kind: int = ED25519) -> str:
    """The verifier key of a private key under a name."""
    check_name(name)
    return NoteVerifier(name, kind, key.public).to_vkey()


def sign_note(text: str, name: str, key: NoteKey) -> Note:
    """Sign a text that ends in a newline."""
    check_name(name)
    _check_text(text)
    line = SignatureLine(name, key_id(name, ED25519, key.public.raw), key.sign(text.encode()))
    return Note(text, (line,))


def read_note(content: str | bytes) -> Note:
    """Take a note apart.

    Raises:
        RejectedError: AG-LOG-003 if malformed or over a limit.
    """
    encoded = content.encode() if isinstance(content, str) else content
    if len(encoded) > LIMITS.note_bytes:
        raise RejectedError("AG-LOG-003", f"a note of {len(encoded)} bytes")
    try:
        note = encoded.decode("utf-8", errors="strict")
    except UnicodeDecodeError as error:
        raise RejectedError("AG-LOG-003", "a note is not UTF-8") from error
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
    check_name(fields[1])
    raw = _decode(fields[2], "a signature")
    if len(raw) < 5:
        raise RejectedError("AG-LOG-003", "a signature line is too short")
    return SignatureLine(fields[1], raw[:4], raw[4:])


def verify_note(note: Note, verifiers: Sequence[NoteVerifier]) -> tuple[NoteVerifier, ...]:
    """The keys among `verifiers` that signed a note; at least one.

    Raises:
        RejectedError: AG-LOG-004 if none signed it, AG-KEY-002 if a line that names one of these
            keys does not verify.
    """
    message = note.text.encode()
    signers = []
    for verifier in verifiers:
        line = verifier.find(note)
        if line is not None:
            verifier.key.verify(line.signature, message)
            signers.append(verifier)
    if not signers:
        raise RejectedError("AG-LOG-004", "a note is not signed by the key it should be signed by")
    return tuple(signers)


def check_name(name: str) -> None:
    """Refuse key names that are empty or hold spaces, plus signs or control characters.

    Raises:
        RejectedError: AG-LOG-003.
    """
    if not name or any(c.isspace() or c == "+" or not c.isprintable() for c in name):
        raise RejectedError("AG-LOG-003", "a key name is empty or holds spaces or plus signs")


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
