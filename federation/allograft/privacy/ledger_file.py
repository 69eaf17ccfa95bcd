# SPDX-License-Identifier: Apache-2.0
"""The privacy ledger on disk: `ledger.jsonl`, one signed entry a line, and `ledger.head` beside it.

An append, as system calls: flock; read and verify all; write the line; fsync; then replace the head
(write, fsync, rename, fsync of the directory); only then is it acknowledged. So after any crash:

- nothing, or a part of a line, was written: the head does not know it, nobody was told, and no step
  was taken on it. The part is cut off before the next append;
- the line is whole but the head is old: the entry counts, and the head is moved to it. Spend that
  was never acknowledged is kept rather than given back;
- the head never runs ahead of the file, so a file shorter than the head was cut by somebody.

At most one entry can be ahead, because the head is brought up to date before anything is appended.
The head beside the file stops accidents. Who can replace both at once is seen by those who keep a
head elsewhere: the site's database (argument `known`) and every dossier. A copy of the whole state
directory, run on two machines, is not seen here at all.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from allograft.crypto.keys import SigningKey, VerifyKey
from allograft.durable import durable_write, locked_directory, storage_errors, sync_directory
from allograft.errors import AllograftError, RejectedError, UnavailableError
from allograft.limits import LIMITS
from allograft.plainfile import read_plain
from allograft.privacy.ledger import (
    EMPTY,
    Act,
    Charge,
    Committed,
    DomainOpened,
    Head,
    Ledger,
    NonprivateRelease,
    Reserved,
    read_entry,
    reserve_for,
    sign_entry,
    verify_line,
)

_LEDGER = "ledger.jsonl"
_HEAD = "ledger.head"
_HEAD_BYTES = 128


@dataclass(frozen=True, slots=True)
class LedgerFile:
    """The ledger in a directory of its own.

    Every method takes the directory's lock for some milliseconds, so the daemon and a command may
    use it at once. All of them raise RejectedError AG-PRV-060 if the ledger was altered, AG-PRV-069
    if it was cut or is gone although `known` says that there was one, and UnavailableError
    AG-PRV-068 if the lock is held, AG-STO-001 if the disk refuses, AG-STO-003 if there never was a
    ledger.

    Attributes:
        directory: Where it is.
        site: Whose it is.
        key: What signs new entries.
        former_keys: Keys the site had before; their entries stay valid.
    """

    directory: Path
    site: str
    key: SigningKey
    former_keys: Sequence[VerifyKey] = ()

    def exists(self) -> bool:
        """Whether there is a ledger, whole or not."""
        return any(self.directory.joinpath(name).exists() for name in (_LEDGER, _HEAD))

    def is_started(self) -> bool:
        """Whether `create` has finished here."""
        return self._head_file.exists()

    def create(self, known: Head = EMPTY) -> None:
        """Start an empty ledger; goes on where an interrupted call stopped.

        Raises:
            RejectedError: AG-PRV-069 if there is or was one: a ledger is never started twice.
        """
        if known != EMPTY:
            raise RejectedError("AG-PRV-069", f"a ledger of {known.count} entries was here before")
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._lock():
            if self._head_file.exists() and self._read_head() != EMPTY:
                raise RejectedError("AG-PRV-069", "a ledger was here before")
            if self._file.exists() and self._file.stat().st_size > 0:
                raise RejectedError("AG-PRV-069", "a ledger is here already")
            durable_write(self._file, b"")
            durable_write(self._head_file, EMPTY.to_text().encode())

    def read(self, known: Head = EMPTY) -> Ledger:
        """The ledger as it stands, after whatever a crash left was finished or cut off.

        Args:
            known: What is remembered of it elsewhere, such as in the site's database.
        """
        with self._lock(known):
            return self._recover(known)

    def head(self, known: Head = EMPTY) -> Head:
        """The head, for the dossier and the site's database."""
        return self.read(known).head

    def open_domain(self, limits: DomainOpened, now: datetime, known: Head = EMPTY) -> Ledger:
        """Fix a domain's limits; the same limits again change nothing.

        Raises:
            RejectedError: AG-PRV-059 for a name or role, AG-PRV-061 for limits out of range or
                others than before, AG-PRV-064 for the clock.
        """
        limits.check()
        return self._record(limits, now, known)

    def reserve(self, charge: Charge, now: datetime, known: Head = EMPTY) -> Reserved:
        """Spend a charge, before its first step; a plan that is still open gets its own back.

        Raises:
            RejectedError: AG-PRV-050 for the event, AG-PRV-062 if the domain is not open,
                AG-PRV-063 if too little is left, AG-PRV-064 for the clock, AG-PRV-065 if the plan
                ended or was reserved otherwise.
        """
        self._record(reserve := reserve_for(charge), now, known)
        return reserve

    def commit(self, ended: Committed, now: datetime, known: Head = EMPTY) -> Ledger:
        """Record how a charge ended; the same again changes nothing. It stays spent.

        Raises:
            RejectedError: AG-PRV-064 for the clock, AG-PRV-065 if the plan was not reserved or
                ended otherwise.
        """
        return self._record(ended, now, known)

    def record_nonprivate(
        self, release: NonprivateRelease, now: datetime, known: Head = EMPTY
    ) -> Ledger:
        """Make a domain's ε infinite, before something without privacy is released.

        Raises:
            RejectedError: AG-PRV-062 if the domain is not open, AG-PRV-064 for the clock.
        """
        return self._record(release, now, known)

    def _record(self, act: Act, now: datetime, known: Head) -> Ledger:
        with self._lock(known):
            ledger = self._recover(known)
            if ledger.is_done(act):
                return ledger
            entry = ledger.next_entry(act, now.replace(microsecond=0))
            payload = entry.to_payload()
            # What we could not read back must not be written: it would lock the site out.
            read_entry(payload)
            self._append(sign_entry(entry, self.key))
            ledger.append(payload)
            durable_write(self._head_file, ledger.head.to_text().encode())
            return ledger

    def _append(self, line: bytes) -> None:
        if len(line) > LIMITS.ledger_entry_bytes:
            raise RejectedError("AG-PRV-060", "an entry is larger than its limit")
        with storage_errors(_LEDGER):
            descriptor = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW)
            try:
                before = os.fstat(descriptor).st_size
                try:
                    _write_all(descriptor, line)
                    os.fsync(descriptor)
                except OSError:
                    # The head does not know it yet. If this fails as well, the next call cuts it.
                    with contextlib.suppress(OSError):
                        os.ftruncate(descriptor, before)
                        os.fsync(descriptor)
                    raise
            finally:
                os.close(descriptor)

    def _recover(self, known: Head) -> Ledger:
        head = self._read_head(known)
        try:
            content = read_plain(self._file, LIMITS.ledger_bytes, follow_links=False)
        except FileNotFoundError as error:
            raise RejectedError("AG-PRV-069", f"{_LEDGER} is gone") from error
        whole, tail = _cut(content)
        ledger = self._replay(whole)
        ledger.check_head(head)
        ledger.check_head(known)
        if ledger.head.count > head.count + 1:
            raise RejectedError("AG-PRV-060", "more than one entry is unknown to the head")
        if tail:
            with storage_errors(_LEDGER):
                os.truncate(self._file, len(content) - len(tail))
                _sync(self._file)
        if ledger.head != head:
            # An entry that a crash left unannounced; the whole file is synced before it counts.
            with storage_errors(_LEDGER):
                _sync(self._file)
                sync_directory(self.directory)
            durable_write(self._head_file, ledger.head.to_text().encode())
        return ledger

    def _replay(self, lines: Sequence[bytes]) -> Ledger:
        ledger = Ledger(self.site)
        keys = (self.key.public, *self.former_keys)
        for number, line in enumerate(lines, 1):
            try:
                ledger.append(verify_line(line, keys))
            except RejectedError as error:
                raise RejectedError("AG-PRV-060", f"line {number}: {error.cause}") from error
        return ledger

    def _read_head(self, known: Head = EMPTY) -> Head:
        try:
            content = read_plain(self._head_file, _HEAD_BYTES, follow_links=False)
        except FileNotFoundError as error:
            if self._file.exists():
                raise RejectedError("AG-PRV-069", f"{_HEAD} is gone") from error
            raise _gone(known) from error
        except RejectedError as error:
            raise RejectedError("AG-PRV-060", error.cause) from error
        return Head.from_text(content.decode("ascii", "replace"))

    @property
    def _file(self) -> Path:
        return self.directory / _LEDGER

    @property
    def _head_file(self) -> Path:
        return self.directory / _HEAD

    def _lock(self, known: Head = EMPTY) -> AbstractContextManager[None]:
        if not self.directory.is_dir():
            raise _gone(known)
        return locked_directory(self.directory, "AG-PRV-068")


def _gone(known: Head) -> AllograftError:
    """Why there is no ledger: one that is remembered was removed, and trying again is no remedy."""
    if known == EMPTY:
        return UnavailableError("AG-STO-003", "there is no privacy ledger")
    return RejectedError("AG-PRV-069", f"the ledger is gone, {known.count} entries are known")


def _cut(content: bytes) -> tuple[list[bytes], bytes]:
    """The whole lines, and what a torn write left after them.

    A write is torn if its newline is missing, or if a power cut left a hole in it: NUL bytes, which
    JSON has none of. Anything else that does not verify was altered.
    """
    *lines, tail = content.split(b"\n")
    if not tail and lines and b"\0" in lines[-1]:
        tail = lines.pop() + b"\n"
    return lines, tail


def _write_all(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
