# SPDX-License-Identifier: Apache-2.0
"""The one way a file reaches the disk: whole, synced, or not at all.

Invariant: after `durable_write` returns, the new content survives a power cut; if it raises or
the process dies, the old content (or absence) is untouched.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from allograft.errors import UnavailableError

_LOCK = "daemon.lock"
_ASKING_S = 1.0  # longer than anyone takes to ask whether a directory is locked
_POLL_S = 0.05

#: How long a daemon waits at its start for a command that works in its state directory. Commands
#: of the light lane take a second or two; one that trains is not waited for.
DAEMON_WAIT_S = 10.0
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


def explain(error: OSError) -> UnavailableError:
    """What an operating system's refusal means: AG-STO-001 for the disk, AG-STO-005 for a path."""
    reason = error.strerror or type(error).__name__
    # Of a failed rename the second name is the one that a person gave.
    path = error.filename2 or error.filename
    cause = f"{path}: {reason}" if isinstance(path, str) else reason
    return UnavailableError("AG-STO-001" if error.errno in _FULL else "AG-STO-005", cause)


@contextlib.contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Turn a full or failing disk into AG-STO-001; other errors pass through.

    Args:
        what: What was being written, in words for the operator.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            reason = os.strerror(error.errno or 0)
            raise UnavailableError("AG-STO-001", f"cannot write {what}: {reason}") from error
        raise


def sync_directory(path: Path) -> None:
    """Make renames inside a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def durable_file(path: Path, mode: int = 0o600) -> Iterator[IO[bytes]]:
    """Open a file for writing that replaces `path` only when the block ends without error.

    The temporary file lives in the same directory, so the final rename stays on one file system.

    Raises:
        UnavailableError: AG-STO-001 when the disk is full or fails.
    """
    with storage_errors(path.name):
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
        try:
            with os.fdopen(descriptor, "wb") as handle:
                yield handle
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)


def durable_write(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Replace a file's content, durably and atomically.

    Raises:
        UnavailableError: AG-STO-001 when the disk is full or fails.
    """
    with durable_file(path, mode) as handle:
        handle.write(content)


def lock_directory(path: Path, wait_s: float = _ASKING_S) -> Callable[[], None]:
    """Take the exclusive lock of a state directory for the life of this process.

    Args:
        path: The directory.
        wait_s: How long to wait for another process that holds it (s).

    Returns:
        A function that releases the lock.

    Raises:
        UnavailableError: AG-STO-002 when another process still holds it after that time.
    """
    descriptor = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    end_s = time.monotonic() + wait_s
    while not _try_lock(descriptor, fcntl.LOCK_EX):
        if time.monotonic() >= end_s:
            os.close(descriptor)
            raise UnavailableError("AG-STO-002", f"{path} is locked by another process")
        time.sleep(_POLL_S)
    return lambda: os.close(descriptor)


@contextlib.contextmanager
def locked_directory(path: Path, code: str) -> Iterator[None]:
    """Hold the exclusive lock of a state directory while the block lasts.

    Raises:
        UnavailableError: `code` when another process holds it.
    """
    try:
        release = lock_directory(path)
    except UnavailableError as error:
        raise UnavailableError(code, error.cause) from error
    try:
        yield
    finally:
        release()


def is_directory_locked(path: Path) -> bool:
    """Whether a process holds the lock of a state directory; changes nothing there."""
    try:
        descriptor = os.open(path / _LOCK, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        # Shared: others who ask at the same moment do not take each other for a daemon.
        return not _try_lock(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
