# SPDX-License-Identifier: Apache-2.0
"""C2SP cosignatures (`cosignature/v1`, Ed25519): a witness says when it saw a checkpoint.

The signed message is a fixed header, the time, and the checkpoint's text. It does not name the
witness, so one key under two names counts once. See protos/spec/log.md, "Witnesses".
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from allograft.crypto.notekey import NoteKey
from allograft.crypto.vkey import WITNESS, VerifierKey, read_vkey
from allograft.errors import RejectedError
from allograft.log.note import Note, SignatureLine, find_line

_SIGNATURE_BYTES = 8 + 64
_LATEST = datetime(9999, 12, 31, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Cosignature:
    """A verified cosignature."""

    witness: str
    time: datetime


def cosign(text: str, name: str, key: NoteKey, now: datetime) -> SignatureLine:
    """Cosign the text of a checkpoint.

    Args:
        text: The checkpoint's text.
        name: The witness's name.
        key: The witness's key.
        now: The current time (UTC).
    """
    seconds = int(now.timestamp())
    signature = struct.pack(">Q", seconds) + key.sign(_message(text, seconds))
    return SignatureLine(name, VerifierKey(name, WITNESS, key.public).key_id, signature)


def verify_cosignature(line: SignatureLine, text: str, witness: VerifierKey) -> Cosignature:
    """Verify that a line is a witness's cosignature of a checkpoint's text.

    Raises:
        RejectedError: AG-LOG-006.
    """
    if (line.name, line.key_id) != (witness.name, witness.key_id):
        raise RejectedError("AG-LOG-006", "a cosignature by another witness")
    if len(line.signature) != _SIGNATURE_BYTES:
        raise RejectedError("AG-LOG-006", f"a cosignature of {len(line.signature)} bytes")
    (seconds,) = struct.unpack(">Q", line.signature[:8])
    if not 0 < seconds <= int(_LATEST.timestamp()):
        raise RejectedError("AG-LOG-006", "the time of a cosignature makes no sense")
    try:
        witness.key.verify(line.signature[8:], _message(text, seconds))
    except RejectedError as error:
        raise RejectedError("AG-LOG-006", f"not a cosignature by {witness.name}") from error
    return Cosignature(witness.name, datetime.fromtimestamp(seconds, UTC))


def count_cosignatures(note: Note, witness_vkeys: Iterable[str]) -> tuple[Cosignature, ...]:
    """The cosignatures on a note by these witnesses, each key once.

    Lines of others are passed over; a line that names one of these and does not verify refuses the
    whole note, since someone made it up.

    Raises:
        RejectedError: AG-LOG-006 for a line that does not verify, AG-KEY-* for a verifier key.
    """
    found: dict[bytes, Cosignature] = {}
    for text in witness_vkeys:
        witness = read_vkey(text, WITNESS)
        line = find_line(note, witness)
        if line is not None:
            cosignature = verify_cosignature(line, note.text, witness)
            found.setdefault(witness.key.raw, cosignature)
    return tuple(found.values())


def _message(text: str, seconds: int) -> bytes:
    return f"cosignature/v1\ntime {seconds}\n{text}".encode()
