# SPDX-License-Identifier: Apache-2.0
"""C2SP verifier keys: `name+hex key id+base64(type || key)`, one line that names a note's signer.

Roster files carry the log's and the witnesses' keys in this form. Reading checks the point, so an
unusable key is refused when it is enrolled and not when it first verifies something.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass
from typing import Literal

from allograft.crypto.notekey import NotePublicKey
from allograft.errors import RejectedError

#: Signature types of C2SP signed-note: plain Ed25519 (a log), timestamped cosignature (a witness).
Kind = Literal[1, 4]
LOG: Kind = 1
WITNESS: Kind = 4

_VKEY = re.compile(r"([^+]{1,128})\+([0-9a-f]{8})\+([A-Za-z0-9+/]{44})")


@dataclass(frozen=True, slots=True)
class VerifierKey:
    """A named Ed25519 key for one signature type."""

    name: str
    kind: Kind
    key: NotePublicKey

    @property
    def key_id(self) -> bytes:
        """First four bytes of SHA-256 over name, newline, type and key."""
        material = self.name.encode() + b"\n" + bytes([self.kind]) + self.key.raw
        return hashlib.sha256(material).digest()[:4]

    def to_text(self) -> str:
        """The key as one line without newline."""
        encoded = base64.b64encode(bytes([self.kind]) + self.key.raw).decode("ascii")
        return f"{self.name}+{self.key_id.hex()}+{encoded}"


def make_vkey(name: str, kind: Kind, key: NotePublicKey) -> str:
    """The verifier key of a public key under a name, as one line.

    Raises:
        RejectedError: AG-KEY-001 if the name cannot stand in one.
    """
    check_name(name)
    return VerifierKey(name, kind, key).to_text()


def read_vkey(text: str, kind: Kind) -> VerifierKey:
    """Read a verifier key of one type.

    Raises:
        RejectedError: AG-KEY-001 malformed or of another type, AG-KEY-003 an unusable point.
    """
    match = _VKEY.fullmatch(text)
    if match is None:
        raise RejectedError("AG-KEY-001", "a verifier key is not name+id+base64")
    try:
        raw = base64.b64decode(match[3], validate=True)
    except binascii.Error as error:
        raise RejectedError("AG-KEY-001", "a verifier key is not base64") from error
    if raw[0] != kind:
        raise RejectedError("AG-KEY-001", f"a verifier key is of type {raw[0]}, not {kind}")
    check_name(match[1])
    key = VerifierKey(match[1], kind, NotePublicKey(raw[1:]))
    # Also refuses a second base64 spelling of the same key.
    if key.to_text() != text:
        raise RejectedError("AG-KEY-001", "a verifier key does not fit its own id")
    return key


def check_name(name: str) -> None:
    """Refuse key names that are empty or hold spaces, plus signs or control characters.

    Raises:
        RejectedError: AG-KEY-001.
    """
    if not name or any(c.isspace() or c == "+" or not c.isprintable() for c in name):
        raise RejectedError("AG-KEY-001", "a key name is empty or holds spaces or plus signs")
