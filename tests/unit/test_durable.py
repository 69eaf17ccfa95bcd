# SPDX-License-Identifier: Apache-2.0
"""One process holds a state directory; asking who does never stands in its way."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from allograft.durable import DAEMON_WAIT_S, is_directory_locked, lock_directory
from allograft.errors import UnavailableError
from kit.waiting import Clock, wait_by


def ask_slowly(path: Path) -> Callable[[], None]:
    """What `is_directory_locked` does, caught in the middle; returns what ends it."""
    descriptor = os.open(path / "daemon.lock", os.O_RDONLY | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return lambda: os.close(descriptor)


def test_a_directory_is_held_by_one_process_until_it_lets_go(tmp_path: Path) -> None:
    release = lock_directory(tmp_path)
    assert is_directory_locked(tmp_path)
    with pytest.raises(UnavailableError, match="AG-STO-002"):
        lock_directory(tmp_path)
    release()
    assert not is_directory_locked(tmp_path)
    lock_directory(tmp_path)()


def test_a_daemon_waits_for_a_command_and_not_for_ever(tmp_path: Path, monkeypatch) -> None:
    command = lock_directory(tmp_path)
    wait_by(clock := Clock(at_s=8.0, then=command), monkeypatch)
    release = lock_directory(tmp_path, DAEMON_WAIT_S)
    assert 8.0 <= clock.now_s < DAEMON_WAIT_S
    with pytest.raises(UnavailableError, match="AG-STO-002"):
        lock_directory(tmp_path, DAEMON_WAIT_S)
    release()


def test_asking_leaves_nothing_behind(tmp_path: Path) -> None:
    assert not is_directory_locked(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_two_that_ask_at_once_do_not_see_a_daemon(tmp_path: Path) -> None:
    end = ask_slowly(tmp_path)
    assert not is_directory_locked(tmp_path)
    end()


def test_a_daemon_that_starts_while_someone_asks_is_not_turned_away(tmp_path: Path) -> None:
    asking = threading.Timer(0.2, ask_slowly(tmp_path))
    asking.start()
    release = lock_directory(tmp_path)
    asking.join()
    assert is_directory_locked(tmp_path)
    release()
