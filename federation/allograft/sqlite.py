# SPDX-License-Identifier: Apache-2.0
"""How a daemon's SQLite file is made, opened and migrated, and what its failures are called.

The SQL itself stands in the `store.py` of each application. Invariants: a commit survives a power
cut (WAL, synchronous=FULL); only `create` makes a file, because one that got lost must never come
back empty: it holds what was seen, promised and refused before.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar, Self, TypeVar

from allograft.durable import storage_errors
from allograft.errors import RejectedError, UnavailableError

T = TypeVar("T")

# The statements are fixed and tested, so one that is wrong in itself (SQLITE_ERROR) met tables that
# no version of ours made.
_DAMAGED = frozenset({sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_ERROR})


class Database:
    """A SQLite file; every thread gets its own connection. Applications derive their store from it.

    Attributes:
        migrations: One script for each version of the schema, oldest first.
        newer_code: What a database is refused with that a newer version wrote.
    """

    migrations: ClassVar[tuple[str, ...]]
    newer_code: ClassVar[str]

    def __init__(self, path: Path) -> None:
        """Open the file and bring its schema up to date.

        Raises:
            RejectedError: `newer_code`.
            UnavailableError: AG-STO-001 if it cannot be used, AG-STO-003 if it is missing or empty,
                AG-STO-004 if it is damaged.
        """
        self._path = path
        self._local = threading.local()
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(cls, path: Path) -> Self:
        """Make the file if it is not there, or finish one whose making was interrupted; open it.

        Raises:
            AllograftError: As for opening.
        """
        with storage_errors(path.name):
            # SQLite gives its journal files the mode of the database.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        with _coded_errors(path), contextlib.closing(_connect(path)) as connection:
            if _version(connection) == 0:
                _migrate(connection, cls.migrations)
        return cls(path)

    def close(self) -> None:
        """Close this thread's connection."""
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is not None:
            connection.close()
            self._local.connection = None

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Make the calls inside one transaction; nests into an outer one.

        Raises:
            UnavailableError: AG-STO-001 if the disk is full or the database stays locked,
                AG-STO-004 if it is damaged.
        """
        with _coded_errors(self._path):
            connection = self._connection()
            if connection.in_transaction:
                yield
                return
            try:
                connection.execute("BEGIN IMMEDIATE")
                yield
                connection.execute("COMMIT")
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")

    def _run(self, sql: str, *values: object) -> int:
        """Run a statement in a transaction; returns how many rows it changed."""
        with self.transaction():
            return self._connection().execute(sql, values).rowcount

    def _rows(self, sql: str, *values: object) -> list[sqlite3.Row]:
        """The rows of a query."""
        with _coded_errors(self._path):
            return self._connection().execute(sql, values).fetchall()

    def _parse(self, read: Callable[[sqlite3.Row], T], row: sqlite3.Row) -> T:
        """What a row says; one that we cannot have written is damage, not a defect.

        Raises:
            UnavailableError: AG-STO-004.
        """
        try:
            return read(row)
        except (ValueError, KeyError, TypeError, RecursionError, RejectedError) as error:
            what = read.__name__.strip("_")
            cause = f"{self._path.name}: a row of {what} is not one that we wrote"
            raise UnavailableError("AG-STO-004", cause) from error

    def _connection(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = _connect(self._path)
        return connection

    def _open(self) -> None:
        name = self._path.name
        with _coded_errors(self._path):
            version = _version(self._connection()) if self._path.exists() else 0
            if version == 0:
                raise UnavailableError("AG-STO-003", f"{name} is missing or empty")
            if version > len(self.migrations):
                raise RejectedError(self.newer_code, f"{name} has schema {version}, a newer one")
            _migrate(self._connection(), self.migrations)


def _connect(path: Path) -> sqlite3.Connection:
    # mode=rw: a file that vanished under a running daemon is not made anew by its next thread.
    uri = f"{path.absolute().as_uri()}?mode=rw"
    connection = sqlite3.connect(uri, uri=True, timeout=30, isolation_level=None)
    try:
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
    except BaseException:
        connection.close()
        raise
    return connection


def _version(connection: sqlite3.Connection) -> int:
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    return version


def _migrate(connection: sqlite3.Connection, migrations: tuple[str, ...]) -> None:
    done = _version(connection)
    for number, script in enumerate(migrations[done:], done + 1):
        # One transaction per step: a killed migration leaves the previous schema.
        connection.executescript(
            f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {number}; COMMIT;"
        )


@contextlib.contextmanager
def _coded_errors(path: Path) -> Iterator[None]:
    """Give SQLite's errors their codes; those that only a defect can cause pass through."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        # The low byte is the error, the rest says where it happened.
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED:
            raise UnavailableError("AG-STO-004", f"{path.name}: {error}") from error
        if isinstance(error, sqlite3.OperationalError):
            raise UnavailableError("AG-STO-001", f"{path.name}: {error}") from error
        raise
