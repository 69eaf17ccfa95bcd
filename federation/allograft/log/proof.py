# SPDX-License-Identifier: Apache-2.0
"""C2SP tlog-proof: all that a recipient needs to know, offline, that an entry was logged in public.

Index, inclusion path, and a checkpoint with its cosignatures. An entry counts as logged only when
the log signed the checkpoint and enough witnesses saw it: a lone log can show each site another
history. See protos/spec/log.md, "Proof".
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass

from allograft.crypto.vkey import LOG, read_vkey
from allograft.errors import RejectedError
from allograft.limits import LIMITS
from allograft.log.checkpoint import Checkpoint, verify_checkpoint
from allograft.log.cosignature import Cosignature, count_cosignatures
from allograft.log.merkle import HASH_BYTES, MAX_SIZE, leaf_hash, verify_inclusion
from allograft.log.note import Note, read_note
from allograft.roster.records import WitnessPolicy

_HEADER = "c2sp.org/tlog-proof@v1"
_INDEX = re.compile(r"index (0|[1-9][0-9]{0,18})")
_HASHES = 63


@dataclass(frozen=True, slots=True)
class Proof:
    """A proof as read; nothing in it is trusted before `verify_proof`.

    Attributes:
        index: Where the entry stands.
        hashes: From the leaf's sibling up.
        note: The checkpoint with signatures.
        extra: Opaque bytes that nobody signs; ours are empty.
    """

    index: int
    hashes: tuple[bytes, ...]
    note: Note
    extra: bytes | None = None

    def to_bytes(self) -> bytes:
        """The proof's text, the content of `dispatch.proof`."""
        lines = [_HEADER]
        if self.extra is not None:
            lines.append(f"extra {_encode(self.extra)}")
        lines.append(f"index {self.index}")
        lines += [_encode(entry) for entry in self.hashes]
        return ("\n".join(lines) + "\n\n" + self.note.to_text()).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> Proof:
        """Read a proof.

        Raises:
            RejectedError: AG-LOG-008 malformed or over a limit, AG-LOG-003 for its checkpoint.
        """
        if len(content) > LIMITS.proof_bytes:
            raise RejectedError("AG-LOG-008", f"a proof of {len(content)} bytes")
        try:
            head, separator, note = content.decode("utf-8", errors="strict").partition("\n\n")
        except UnicodeDecodeError as error:
            raise RejectedError("AG-LOG-008", "a proof is not UTF-8") from error
        lines = head.split("\n")
        if not separator or lines.pop(0) != _HEADER:
            raise RejectedError("AG-LOG-008", "not a tlog-proof of version 1")
        extra = None
        if lines and lines[0].startswith("extra "):
            extra = _decode(lines.pop(0).removeprefix("extra "))
        index = _read_index(lines.pop(0) if lines else "")
        if len(lines) > _HASHES:
            raise RejectedError("AG-LOG-008", f"a proof of {len(lines)} hashes")
        hashes = tuple(_decode(line) for line in lines)
        if any(len(entry) != HASH_BYTES for entry in hashes):
            raise RejectedError("AG-LOG-008", "a hash of a proof does not have 32 bytes")
        return cls(index, hashes, read_note(note), extra)


@dataclass(frozen=True, slots=True)
class Logged:
    """An entry whose place in a witnessed log was verified."""

    index: int
    entry: bytes
    checkpoint: Checkpoint
    cosignatures: tuple[Cosignature, ...]


def verify_proof(proof: bytes, entry: bytes, policy: WitnessPolicy) -> Logged:
    """Verify that an entry is in the log, as enough witnesses saw it.

    Args:
        proof: The proof as received.
        entry: The entry as received.
        policy: The roster's log key, witnesses and quorum.

    Raises:
        RejectedError: AG-LOG-008 or -003 malformed, -004 or -005 not this log's checkpoint, -006 a
            false cosignature, -007 too few witnesses, -002 the entry is not in the tree.
    """
    read = Proof.from_bytes(proof)
    checkpoint, cosignatures = verify_witnessed(read.note, policy)
    verify_inclusion(leaf_hash(entry), read.index, checkpoint.size, read.hashes, checkpoint.root)
    return Logged(read.index, entry, checkpoint, cosignatures)


def verify_witnessed(
    note: Note, policy: WitnessPolicy
) -> tuple[Checkpoint, tuple[Cosignature, ...]]:
    """The checkpoint of a note that the log signed and enough witnesses cosigned.

    Raises:
        RejectedError: AG-LOG-004 to -007.
    """
    checkpoint = verify_checkpoint(note, read_vkey(policy.log_vkey, LOG))
    cosignatures = count_cosignatures(note, policy.witness_vkeys)
    if len(cosignatures) < max(policy.quorum, 1):
        raise RejectedError(
            "AG-LOG-007", f"{len(cosignatures)} of {policy.quorum} required witnesses"
        )
    return checkpoint, cosignatures


def _read_index(line: str) -> int:
    match = _INDEX.fullmatch(line)
    if match is None or int(match[1]) > MAX_SIZE:
        raise RejectedError("AG-LOG-008", "the index line of a proof is malformed")
    return int(match[1])


def _encode(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")


def _decode(text: str) -> bytes:
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RejectedError("AG-LOG-008", "a line of a proof is not base64") from error
    if _encode(raw) != text:
        raise RejectedError("AG-LOG-008", "a line of a proof is not canonical base64")
    return raw
