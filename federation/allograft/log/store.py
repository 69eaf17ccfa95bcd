# SPDX-License-Identifier: Apache-2.0
"""The log's storage: entries, complete subtrees, checkpoints and cosignatures in SQLite.

Invariants: a batch of entries is in with all its tree nodes, durably, or not at all; a checkpoint
is signed only for what is on disk, and only one per size ever, so a crash at any point leaves a log
that never contradicts what it signed. One writer; readers may open the file beside it.
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from allograft.crypto.notekey import NoteKey
from allograft.crypto.vkey import LOG, WITNESS, make_vkey, read_vkey
from allograft.errors import RejectedError, UnavailableError
from allograft.limits import LIMITS
from allograft.log import merkle
from allograft.log.checkpoint import Checkpoint, sign_checkpoint
from allograft.log.cosignature import count_cosignatures, verify_cosignature
from allograft.log.note import Note, read_line, read_note
from allograft.log.proof import Proof
from allograft.roster.records import WitnessPolicy

_VERSION = 1

_SCHEMA = """
CREATE TABLE about (origin TEXT NOT NULL, vkey TEXT NOT NULL) STRICT;
CREATE TABLE entry (number INTEGER PRIMARY KEY, content BLOB NOT NULL, hash BLOB NOT NULL UNIQUE)
    STRICT;
CREATE TABLE node (level INTEGER NOT NULL, number INTEGER NOT NULL, hash BLOB NOT NULL,
    PRIMARY KEY (level, number)) STRICT, WITHOUT ROWID;
CREATE TABLE checkpoint (size INTEGER PRIMARY KEY, note TEXT NOT NULL) STRICT;
CREATE TABLE cosignature (size INTEGER NOT NULL REFERENCES checkpoint (size), vkey TEXT NOT NULL,
    line TEXT NOT NULL, PRIMARY KEY (size, vkey)) STRICT, WITHOUT ROWID;
CREATE TABLE document (sha256 TEXT PRIMARY KEY, content BLOB NOT NULL) STRICT, WITHOUT ROWID;
"""


class LogReader:
    """A log as it stands on disk; safe to use from several threads.

    Args:
        path: The database.

    Raises:
        UnavailableError: AG-STO-003 if it does not exist, AG-STO-001 if it cannot be read.
        RejectedError: AG-LOG-012 if it is no log, or one of a newer version.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise UnavailableError("AG-STO-003", f"there is no log {path.name}")
        self._lock = threading.RLock()
        with _database_errors(path.name):
            self._db = _connect(path)
            self.origin, self.vkey = self._read_about(path)

    def _read_about(self, path: Path) -> tuple[str, str]:
        version = self._one("PRAGMA user_version")[0]
        if version != _VERSION:
            raise RejectedError("AG-LOG-012", f"{path.name} is of version {version}")
        origin, vkey = self._one("SELECT origin, vkey FROM about")
        return origin, vkey

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._db.close()

    @property
    def size(self) -> int:
        """Number of entries."""
        return int(self._one("SELECT COALESCE(MAX(number) + 1, 0) FROM entry")[0])

    def entry(self, index: int) -> bytes:
        """One entry.

        Raises:
            RejectedError: AG-LOG-002 if there is none at this index.
        """
        row = self._maybe("SELECT content FROM entry WHERE number = ?", index)
        if row is None:
            raise RejectedError("AG-LOG-002", f"the log has no entry {index}")
        return bytes(row[0])

    def find(self, entry: bytes) -> int | None:
        """Where an entry stands, if it is in the log."""
        row = self._maybe("SELECT number FROM entry WHERE hash = ?", merkle.leaf_hash(entry))
        return None if row is None else int(row[0])

    def document(self, sha256: str) -> bytes | None:
        """A document that an entry announces, if it was kept."""
        row = self._maybe("SELECT content FROM document WHERE sha256 = ?", sha256)
        return None if row is None else bytes(row[0])

    def inclusion(self, index: int, size: int) -> list[bytes]:
        """The inclusion proof of an entry in the tree of a size.

        Raises:
            RejectedError: AG-LOG-002 if there is no such entry or size.
        """
        self._check_size(size)
        return merkle.inclusion_proof(index, size, self.node)

    def consistency(self, old: int, new: int) -> list[bytes]:
        """The consistency proof between two sizes; empty from nothing or to the same size.

        Raises:
            RejectedError: AG-LOG-002 if there are no such sizes.
        """
        self._check_size(new)
        if old in {0, new}:
            return []
        return merkle.consistency_proof(old, new, self.node)

    def root(self, size: int) -> bytes:
        """The root of the tree of a size.

        Raises:
            RejectedError: AG-LOG-002 if the log is not that large.
        """
        self._check_size(size)
        return merkle.root(size, self.node)

    def witnessed(self, policy: WitnessPolicy) -> Note:
        """The newest checkpoint that enough witnesses cosigned, with their cosignatures.

        Raises:
            RejectedError: AG-LOG-017 if there is none yet.
        """
        note = self._witnessed(policy, "SELECT size FROM checkpoint ORDER BY size DESC", ())
        if note is None:
            raise RejectedError("AG-LOG-017", f"a log of {self.size} entries without a quorum")
        return note

    def proof(self, index: int, policy: WitnessPolicy) -> bytes | None:
        """The proof that an entry is logged; None until enough witnesses have seen it.

        Raises:
            RejectedError: AG-LOG-002 if there is no such entry.
        """
        self.entry(index)
        query = "SELECT size FROM checkpoint WHERE size > ? ORDER BY size"
        note = self._witnessed(policy, query, (index,))
        if note is None:
            return None
        size = Checkpoint.from_text(note.text).size
        return Proof(index, tuple(self.inclusion(index, size)), note).to_bytes()

    def _witnessed(
        self, policy: WitnessPolicy, query: str, arguments: Sequence[int]
    ) -> Note | None:
        """The first of the selected checkpoints that has a quorum."""
        for (size,) in self._all(query, *arguments):
            note = self._cosigned(size, policy)
            if len(note.lines) - 1 >= max(policy.quorum, 1):
                return note
        return None

    def _cosigned(self, size: int, policy: WitnessPolicy) -> Note:
        """A checkpoint with the cosignatures of the policy's witnesses, and no others."""
        note = read_note(self._one("SELECT note FROM checkpoint WHERE size = ?", size)[0])
        rows = self._all("SELECT vkey, line FROM cosignature WHERE size = ? ORDER BY vkey", size)
        lines = tuple(read_line(line) for vkey, line in rows if vkey in policy.witness_vkeys)
        return Note(note.text, note.lines + lines)

    def _check_size(self, size: int) -> None:
        if not 0 <= size <= self.size:
            raise RejectedError("AG-LOG-002", f"the log does not have {size} entries yet")

    def node(self, level: int, number: int) -> bytes:
        """The hash of a complete subtree.

        Raises:
            RejectedError: AG-LOG-012 if it is not there.
        """
        row = self._maybe("SELECT hash FROM node WHERE level = ? AND number = ?", level, number)
        if row is None:
            raise RejectedError("AG-LOG-012", "a node of the tree is missing")
        return bytes(row[0])

    def _all(self, query: str, *arguments: object) -> list[tuple]:  # type: ignore[type-arg]
        with self._lock, _database_errors("the log"):
            return self._db.execute(query, arguments).fetchall()

    def _maybe(self, query: str, *arguments: object) -> tuple | None:  # type: ignore[type-arg]
        rows = self._all(query, *arguments)
        return rows[0] if rows else None

    def _one(self, query: str, *arguments: object) -> tuple:  # type: ignore[type-arg]
        row = self._maybe(query, *arguments)
        if row is None:
            raise RejectedError("AG-LOG-012", "a row of the log is missing")
        return row


class LogStore(LogReader):
    """The log of a coordinator, for its one writer.

    Args:
        path: The database; made if it does not exist.
        origin: The log's origin, `allograft/<coordinator>`.
        key: The log's key.

    Raises:
        RejectedError: AG-LOG-012 if the database is of another log or key.
        UnavailableError: AG-STO-001.
    """

    def __init__(self, path: Path, origin: str, key: NoteKey) -> None:
        self._key = key
        vkey = make_vkey(origin, LOG, key.public)
        _create(path, origin, vkey)
        super().__init__(path)
        if (self.origin, self.vkey) != (origin, vkey):
            raise RejectedError("AG-LOG-012", f"{path.name} is of another log or key")

    def append(self, entries: Sequence[bytes], documents: Sequence[bytes] = ()) -> tuple[int, ...]:
        """Append entries in one transaction; an entry that is in already keeps its index.

        Args:
            entries: What `sign_event` made, verified by the caller.
            documents: Documents that these entries announce, kept for auditors.

        Returns:
            The index of each entry, in order.

        Raises:
            RejectedError: AG-LOG-001 for an entry that is empty or too large.
            UnavailableError: AG-STO-001; nothing was appended then.
        """
        if any(not 0 < len(entry) <= LIMITS.entry_bytes for entry in entries):
            raise RejectedError("AG-LOG-001", "an entry is empty or too large")
        kept = [(hashlib.sha256(document).hexdigest(), document) for document in documents]
        return self._append(entries, kept)

    def append_roster(self, entry: bytes, digest: str, bundle: bytes) -> int:
        """Append a roster's entry and keep the roster's files with it; returns the index.

        Args:
            entry: The roster event, by the coordinator.
            digest: The roster's digest, as the event names it.
            bundle: The roster as `bundle.pack` writes it.

        Raises:
            RejectedError: AG-LOG-001 for an entry that is empty or too large.
            UnavailableError: AG-STO-001; nothing was appended then.
        """
        return self._append([entry], [(digest, bundle)])[0]

    def checkpoint(self) -> str:
        """The newest checkpoint as a signed note; a new one if the log grew."""
        with self._transaction():
            return self._checkpoint()

    def offer(
        self, witness_vkey: str, witnessed_size: int, policy: WitnessPolicy
    ) -> tuple[str, tuple[bytes, ...]]:
        """What a witness should cosign now: a checkpoint, and the consistency proof to it.

        One checkpoint is offered to everyone until it has a quorum, and only then a newer one:
        while entries keep coming, witnesses that ask at different times would otherwise sign
        different checkpoints and none would ever have enough.

        Args:
            witness_vkey: The witness's key by the roster.
            witnessed_size: The size that the witness says it cosigned last.
            policy: Whose cosignatures count.

        Returns:
            Empty values if there is nothing for this witness to do.
        """
        if witness_vkey not in policy.witness_vkeys:
            return "", ()
        with self._transaction():
            note = self._pending(policy)
        size = Checkpoint.from_text(read_note(note).text).size
        seen = self._maybe(
            "SELECT 1 FROM cosignature WHERE size = ? AND vkey = ?", size, witness_vkey
        )
        if size == 0 or seen is not None or witnessed_size > size:
            return "", ()
        return note, tuple(self.consistency(witnessed_size, size))

    def add_cosignature(self, size: int, line: str, witness_vkey: str) -> None:
        """Keep a witness's cosignature of the checkpoint of a size, after verifying it.

        Raises:
            RejectedError: AG-LOG-006 if it is not one, AG-LOG-002 if no such checkpoint was signed.
        """
        row = self._maybe("SELECT note FROM checkpoint WHERE size = ?", size)
        if row is None:
            raise RejectedError("AG-LOG-002", f"no checkpoint of size {size} was signed")
        text = read_note(row[0]).text
        verify_cosignature(read_line(line), text, read_vkey(witness_vkey, WITNESS))
        with self._transaction():
            query = "INSERT OR REPLACE INTO cosignature VALUES (?, ?, ?)"
            self._db.execute(query, (size, witness_vkey, line))

    def collect(self, line: str, witness_vkey: str) -> int:
        """Keep a cosignature of whichever recent checkpoint it fits; returns that size.

        Raises:
            RejectedError: AG-LOG-006 if it fits none.
        """
        rows = self._all("SELECT size FROM checkpoint ORDER BY size DESC LIMIT 16")
        for (size,) in rows:
            try:
                self.add_cosignature(size, line, witness_vkey)
            except RejectedError as error:
                if error.code != "AG-LOG-006":
                    raise
                continue
            return int(size)
        raise RejectedError("AG-LOG-006", "a cosignature fits none of the newest checkpoints")

    def _append(
        self, entries: Sequence[bytes], documents: Sequence[tuple[str, bytes]]
    ) -> tuple[int, ...]:
        with self._transaction():
            indices = tuple(self._append_one(entry) for entry in entries)
            self._db.executemany("INSERT OR IGNORE INTO document VALUES (?, ?)", documents)
        return indices

    def _append_one(self, entry: bytes) -> int:
        known = self.find(entry)
        if known is not None:
            return known
        number, leaf = self.size, merkle.leaf_hash(entry)
        self._db.execute("INSERT INTO entry VALUES (?, ?, ?)", (number, entry, leaf))
        nodes = merkle.grow(number, leaf, self.node)
        self._db.executemany("INSERT INTO node VALUES (?, ?, ?)", list(nodes))
        return number

    def _pending(self, policy: WitnessPolicy) -> str:
        row = self._maybe("SELECT size, note FROM checkpoint ORDER BY size DESC LIMIT 1")
        if row is None or row[0] == 0:
            return self._checkpoint()
        found = count_cosignatures(self._cosigned(row[0], policy), policy.witness_vkeys)
        return self._checkpoint() if len(found) >= policy.quorum else str(row[1])

    def _checkpoint(self) -> str:
        """Sign the present size once; inside a transaction, so no other size can overtake it."""
        size = self.size
        row = self._maybe("SELECT note FROM checkpoint WHERE size = ?", size)
        if row is not None:
            return str(row[0])
        checkpoint = Checkpoint(self.origin, size, merkle.root(size, self.node))
        note = sign_checkpoint(checkpoint, self._key).to_text()
        self._db.execute("INSERT INTO checkpoint VALUES (?, ?)", (size, note))
        return note

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock, _database_errors("the log"):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30)
    # FULL: a checkpoint that was shown to a witness must survive a power cut.
    connection.executescript(
        "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON;"
    )
    return connection


def _create(path: Path, origin: str, vkey: str) -> None:
    """Make the tables in one transaction; a file that a crash left empty is begun again."""
    with _database_errors(path.name):
        connection = _connect(path)
        try:
            connection.execute("BEGIN IMMEDIATE")
            if connection.execute("PRAGMA user_version").fetchone()[0] == 0:
                for statement in _SCHEMA.strip().removesuffix(";").split(";"):
                    connection.execute(statement)
                connection.execute("INSERT INTO about VALUES (?, ?)", (origin, vkey))
                connection.execute(f"PRAGMA user_version = {_VERSION}")
            connection.execute("COMMIT")
            path.chmod(0o600)
        finally:
            connection.close()


@contextmanager
def _database_errors(what: str) -> Iterator[None]:
    try:
        yield
    except sqlite3.DatabaseError as error:
        name = getattr(error, "sqlite_errorname", "")
        if name in {"SQLITE_NOTADB", "SQLITE_CORRUPT"}:
            raise RejectedError("AG-LOG-012", f"{what} is damaged") from error
        raise UnavailableError("AG-STO-001", f"cannot use {what}: {name}") from error
