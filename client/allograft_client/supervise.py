# SPDX-License-Identifier: Apache-2.0
"""Children that must always run: started, started again with growing pauses, and stopped by pid.

Invariant: only processes that this object started are ever signalled, and each is reaped. Output
of a child goes to a file of its own under `run/`, cut off when it grows, because a stock program's
log lines are not ours to vouch for.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 30.0
_STEADY_S = 60.0  # a child that ran this long starts afresh with the shortest pause
_STOP_S = 10.0
_LOG_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Program:
    """How a child is started.

    Attributes:
        name: For logs and status.
        arguments: Program and arguments, made anew for each start (ports may change).
        environment: Its whole environment.
        log: Where its output goes.
    """

    name: str
    arguments: Callable[[], Sequence[str]]
    environment: Mapping[str, str]
    log: Path


class Child:
    """One supervised program; call `tend` now and then from one thread."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._start_at = 0.0
        self._pause_s = _FIRST_PAUSE_S
        self._log = structlog.get_logger("supervisor")
        self.starts = 0

    @property
    def pid(self) -> int | None:
        """The process id while it runs."""
        running = self._process is not None and self._process.poll() is None
        return self._process.pid if running and self._process else None

    def tend(self) -> None:
        """Start the child if it is due, and notice if it ended."""
        now = time.monotonic()
        if self._process is not None:
            status = self._process.poll()
            if status is None:
                return
            self._process = None
            if now - self._started >= _STEADY_S:
                self._pause_s = _FIRST_PAUSE_S
            self._log.warning(
                "child-ended", name=self._program.name, status=status, seconds=self._pause_s
            )
            self._start_at = now + self._pause_s
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        if now >= self._start_at:
            self._start(now)

    def stop(self) -> None:
        """Ask the child to end, then end it."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _start(self, now: float) -> None:
        log = self._program.log
        # Started through `confine`, so that the child ends even if this process is killed.
        command = [sys.executable, "-m", "allograft_client.confine", str(os.getpid())]
        with contextlib.suppress(FileNotFoundError):
            if log.stat().st_size > _LOG_BYTES:
                os.replace(log, log.with_suffix(".old"))
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [*command, *self._program.arguments()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(self._program.environment),
            )
        self._started = now
        self.starts += 1
        self._log.info("child-started", name=self._program.name, pid=self._process.pid)
