# SPDX-License-Identifier: Apache-2.0
"""A daemon's database is made once, never silently anew, and each of its failures has a code."""

from __future__ import annotations

import contextlib
import resource
import sqlite3
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from allograft.errors import AllograftError, RejectedError, UnavailableError
from allograft.sqlite import Database


class Notes(Database):
    migrations = ("CREATE TABLE note (text TEXT NOT NULL) STRICT;",)
    newer_code = "AG-SIT-002"

    def add(self, text: str) -> int:
        return self._run("INSERT INTO note VALUES (?)", text)

    def all(self) -> list[str]:
        return [row["text"] for row in self._rows("SELECT text FROM note")]


class NotesWithTimes(Notes):
    migrations = (*Notes.migrations, "ALTER TABLE note ADD COLUMN time TEXT;")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "notes.db"


@pytest.fixture
def notes(path: Path) -> Iterator[Notes]:
    notes = Notes.create(path)
    yield notes
    notes.close()


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process may grow: SQLite sees what a full volume shows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def code_of(call: Callable[[], object]) -> str:
    with pytest.raises(AllograftError) as caught:
        call()
    return caught.value.code


def test_is_readable_by_its_owner_alone(notes: Notes, path: Path) -> None:
    notes.add("one")
    for file in path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file.name


def test_creating_again_keeps_what_is_there(notes: Notes, path: Path) -> None:
    notes.add("one")
    again = Notes.create(path)
    assert again.all() == ["one"]
    again.close()


def test_migrates_what_an_older_version_wrote(notes: Notes, path: Path) -> None:
    notes.add("one")
    newer = NotesWithTimes(path)
    assert newer.all() == ["one"]
    newer.close()
    with pytest.raises(RejectedError, match="AG-SIT-002"):
        Notes(path)


@pytest.mark.parametrize("content", [None, b""])
def test_a_lost_database_is_never_begun_anew(path: Path, content: bytes | None) -> None:
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UnavailableError, match="AG-STO-003"):
        Notes(path)
    assert path.exists() == (content is not None)
    # Once more: the first look did not make it look whole.
    assert code_of(lambda: Notes(path)) == "AG-STO-003"


def test_a_database_that_vanishes_under_a_daemon_is_not_begun_anew(
    notes: Notes, path: Path
) -> None:
    notes.close()  # the next call connects again, as a new thread does
    path.unlink()
    assert code_of(notes.all) == "AG-STO-001"
    assert not path.exists()


@pytest.mark.parametrize("open_database", [Notes, Notes.create])
def test_a_file_that_is_no_database_is_damaged(
    path: Path, open_database: Callable[[Path], Notes]
) -> None:
    path.write_bytes(b"garbage!" * 1024)
    assert code_of(lambda: open_database(path)) == "AG-STO-004"
    assert path.read_bytes() == b"garbage!" * 1024


def test_a_database_with_foreign_tables_is_damaged(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.executescript("CREATE TABLE other (x); PRAGMA user_version = 1;")
    connection.close()
    notes = Notes(path)
    assert code_of(notes.all) == "AG-STO-004"
    assert code_of(lambda: notes.add("one")) == "AG-STO-004"
    notes.close()


def test_pages_that_were_overwritten_are_damage(notes: Notes, path: Path) -> None:
    for _ in range(100):
        notes.add("x" * 1000)
    notes.close()
    with path.open("r+b") as handle:
        handle.seek(4096)
        handle.write(b"\xff" * 4096)
    damaged = Notes(path)
    assert code_of(damaged.all) == "AG-STO-004"
    damaged.close()


def test_a_journal_that_cannot_be_opened_is_a_failing_disk(notes: Notes, path: Path) -> None:
    notes.close()
    path.with_name("notes.db-wal").mkdir()
    assert code_of(lambda: Notes(path)) == "AG-STO-001"


def test_what_a_full_disk_left_of_a_new_database_can_be_finished(path: Path) -> None:
    with full_disk():
        assert code_of(lambda: Notes.create(path)) == "AG-STO-001"
    notes = Notes.create(path)
    notes.add("one")
    assert notes.all() == ["one"]
    notes.close()


def test_a_full_disk_refuses_a_change_and_the_next_opening(notes: Notes, path: Path) -> None:
    notes.add("one")
    with full_disk():
        assert code_of(lambda: notes.add("two")) == "AG-STO-001"
        notes.close()
        assert code_of(lambda: Notes(path)) == "AG-STO-001"
    assert notes.all() == ["one"]


def test_a_defect_is_not_called_a_full_disk(notes: Notes) -> None:
    with pytest.raises(sqlite3.IntegrityError):
        notes._run("INSERT INTO note VALUES (NULL)")
