# SPDX-License-Identifier: Apache-2.0
"""A site's memory of the log: it cosigns a checkpoint only if the log grew from what it saw.

Invariant: the checkpoint is on disk before its cosignature exists, so no crash or restart makes a
witness sign two histories. What it refuses, it remembers nothing of. See protos/spec/log.md,
"Witnesses".
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from allograft.crypto import canonical
from allograft.crypto.notekey import NoteKey
from allograft.crypto.vkey import LOG, WITNESS, make_vkey, read_vkey
from allograft.durable import durable_write, storage_errors
from allograft.errors import RejectedError
from allograft.limits import LIMITS
from allograft.log import cosignature
from allograft.log.checkpoint import Checkpoint, verify_checkpoint
from allograft.log.merkle import verify_consistency
from allograft.log.note import read_note


@dataclass(frozen=True, slots=True)
class _Memory:
    """The newest checkpoint that was cosigned, and the one before it."""

    newest: Checkpoint
    before: Checkpoint | None

    def to_bytes(self) -> bytes:
        before = self.before.to_text() if self.before else ""
        return canonical.dumps({"v": 1, "newest": self.newest.to_text(), "before": before})

    @classmethod
    def from_bytes(cls, content: bytes) -> _Memory:
        fields = canonical.as_object(
            canonical.loads(content, LIMITS.note_bytes), {"v", "newest", "before"}
        )
        before = canonical.as_text(fields["before"])
        return cls(
            Checkpoint.from_text(canonical.as_text(fields["newest"])),
            Checkpoint.from_text(before) if before else None,
        )


class WitnessState:
    """One witness of one log.

    Args:
        path: The file that remembers; created by the first cosignature.
        key: The witness's key.
        name: The witness's name, which is the site's.
    """

    def __init__(self, path: Path, key: NoteKey, name: str) -> None:
        self._path = path
        self._key = key
        self._name = name

    @property
    def vkey(self) -> str:
        """The verifier key that the roster carries."""
        return make_vkey(self._name, WITNESS, self._key.public)

    @property
    def size(self) -> int:
        """Tree size of the last checkpoint that was cosigned; 0 before the first.

        Raises:
            RejectedError: AG-LOG-012 if the file is damaged: it is never guessed at.
        """
        memory = self._read()
        return memory.newest.size if memory else 0

    def cosign(
        self, checkpoint_note: str, consistency: Sequence[bytes], log_vkey: str, now: datetime
    ) -> str:
        """Check a checkpoint against the last one, remember it durably, return the signature line.

        Args:
            checkpoint_note: The signed checkpoint.
            consistency: Proof from `size` to it; empty if `size` is 0 or unchanged.
            log_vkey: The log's key by the roster.
            now: The current time (UTC).

        Raises:
            RejectedError: AG-LOG-003 to -005 not this log's checkpoint, AG-LOG-009 smaller than
                what was seen, AG-LOG-010 a fork, AG-LOG-011 a proof from an earlier size.
            UnavailableError: AG-STO-001.
        """
        note = read_note(checkpoint_note)
        offered = verify_checkpoint(note, read_vkey(log_vkey, LOG))
        with self._locked():
            memory = self._read()
            _check_growth(memory, offered, consistency)
            if memory is None or memory.newest != offered:
                changed = _Memory(offered, memory.newest if memory else None)
                durable_write(self._path, changed.to_bytes())
            return cosignature.cosign(note.text, self._name, self._key, now).to_text()

    def _read(self) -> _Memory | None:
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            return _Memory.from_bytes(content)
        except RejectedError as error:
            raise RejectedError("AG-LOG-012", f"{self._path.name}: {error.cause}") from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One at a time, also between processes: two growing answers must not cross."""
        with storage_errors(self._path.name):
            descriptor = os.open(self._path.with_name(f"{self._path.name}.lock"), _LOCK, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


_LOCK = os.O_RDWR | os.O_CREAT


def _check_growth(
    memory: _Memory | None, offered: Checkpoint, consistency: Sequence[bytes]
) -> None:
    if memory is None:
        # C2SP tlog-witness: a witness that saw nothing takes the first checkpoint as it is.
        if consistency:
            raise RejectedError("AG-LOG-011", "a consistency proof where none is possible")
        return
    newest = memory.newest
    if offered.origin != newest.origin:
        raise RejectedError("AG-LOG-005", "a checkpoint of another log")
    if offered.size < newest.size:
        raise RejectedError(
            "AG-LOG-009", f"the log shrank from {newest.size} to {offered.size} entries"
        )
    if newest.size == 0 and not consistency:
        return
    try:
        verify_consistency(newest.size, offered.size, consistency, newest.root, offered.root)
    except RejectedError as error:
        if offered.size > newest.size and _starts_at(memory.before, offered, consistency):
            raise RejectedError(
                "AG-LOG-011", "the proof starts at an earlier checkpoint"
            ) from error
        raise RejectedError(
            "AG-LOG-010",
            f"size {offered.size} does not contain size {newest.size}",
        ) from error


def _starts_at(
    before: Checkpoint | None, offered: Checkpoint, consistency: Sequence[bytes]
) -> bool:
    """Whether the coordinator missed our last answer and proves growth from the one before."""
    if before is None or before.size == 0:
        return not consistency
    try:
        verify_consistency(before.size, offered.size, consistency, before.root, offered.root)
    except RejectedError:
        return False
    return True
