# SPDX-License-Identifier: Apache-2.0
"""C2SP checkpoints: the note text by which a log commits to its tree.

    allograft/consortium           origin: which log, and the name of its key
    20852163                       tree size, decimal without leading zeros
    CsUYapGGPo4dkMgIAUqom/Xajj7h   root hash, base64 of 32 bytes

Further lines are extensions; this reader keeps them, and our logs and witnesses refuse them.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass

from allograft.crypto.notekey import NoteKey
from allograft.crypto.vkey import VerifierKey
from allograft.errors import RejectedError
from allograft.log.merkle import HASH_BYTES, MAX_SIZE
from allograft.log.note import Note, sign_note, verify_note

_SIZE = re.compile(r"0|[1-9][0-9]{0,18}")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A tree head: which log, how many entries, which root."""

    origin: str
    size: int
    root: bytes
    extensions: tuple[str, ...] = ()

    def to_text(self) -> str:
        """The note text."""
        encoded = base64.b64encode(self.root).decode("ascii")
        return "\n".join((self.origin, str(self.size), encoded, *self.extensions)) + "\n"

    @classmethod
    def from_text(cls, text: str) -> Checkpoint:
        """Read a note text.

        Raises:
            RejectedError: AG-LOG-005.
        """
        lines = text.split("\n")
        if len(lines) < 4 or lines.pop() or not all(lines):
            raise RejectedError("AG-LOG-005", "a checkpoint is not three lines or more")
        if not _SIZE.fullmatch(lines[1]) or int(lines[1]) > MAX_SIZE:
            raise RejectedError("AG-LOG-005", "the tree size of a checkpoint is malformed")
        checkpoint = cls(lines[0], int(lines[1]), _decode(lines[2]), tuple(lines[3:]))
        if checkpoint.to_text() != text:
            raise RejectedError("AG-LOG-005", "a root hash is not canonical base64")
        return checkpoint


def sign_checkpoint(checkpoint: Checkpoint, key: NoteKey) -> Note:
    """Sign a checkpoint as the log that it names."""
    return sign_note(checkpoint.to_text(), checkpoint.origin, key)


def verify_checkpoint(note: Note, log: VerifierKey) -> Checkpoint:
    """The checkpoint of a note that the log signed.

    Raises:
        RejectedError: AG-LOG-004 not signed by it, AG-LOG-005 malformed, of another origin, or
            with extensions, which nobody audits.
    """
    checkpoint = Checkpoint.from_text(verify_note(note, log))
    if checkpoint.origin != log.name:
        raise RejectedError("AG-LOG-005", "a checkpoint of another log")
    if checkpoint.extensions:
        raise RejectedError("AG-LOG-005", "a checkpoint with extension lines")
    return checkpoint


def _decode(text: str) -> bytes:
    try:
        root = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RejectedError("AG-LOG-005", "a root hash is not base64") from error
    if len(root) != HASH_BYTES:
        raise RejectedError("AG-LOG-005", f"a root hash of {len(root)} bytes")
    return root
