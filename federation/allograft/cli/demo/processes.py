# SPDX-License-Identifier: Apache-2.0
"""The demo's processes: daemons that are always stopped, and commands that answer in JSON.

Invariant: every daemon runs in a session of its own, and leaving the `Daemons` block ends each
whole session, so neither an error nor Ctrl-C leaves anything behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, TypeVar

from allograft.crypto import canonical
from allograft.errors import RejectedError, UnavailableError

_STOP_SECONDS = 20.0

T = TypeVar("T")


def environment() -> dict[str, str]:
    """The environment of every process: no telemetry, no update checks, no model hub."""
    return os.environ | {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        # Threads that wait for each other must not spin: a dozen processes share this machine.
        "OMP_WAIT_POLICY": "PASSIVE",
    }


def run_json(arguments: Sequence[str], timeout_s: float = 120.0) -> Mapping[str, canonical.Json]:
    """Run one of our commands with `--format json` and return what it printed.

    Raises:
        RejectedError: AG-DEM-001 with the command's own error line, if it failed.
        UnavailableError: AG-DEM-002 if it did not end in time.
    """
    outcome = run_command([*arguments, "--format", "json"], timeout_s)
    if outcome.returncode != 0:
        code, cause = read_error(outcome)
        raise RejectedError("AG-DEM-001", f"{' '.join(arguments[:2])}: {code}: {cause}")
    return canonical.as_mapping(json.loads(outcome.stdout))


def at_once(calls: Iterable[Callable[[], T]]) -> list[T]:
    """Run several commands beside each other; results in the order of the calls.

    Two at a time, which is what two cores can use. If one fails, those under way are waited for.
    """
    with ThreadPoolExecutor(max_workers=2) as pool:
        return list(pool.map(lambda call: call(), calls))


def read_error(outcome: subprocess.CompletedProcess[str]) -> tuple[str, str]:
    """Code and cause of a failed command that ran with `--format json`."""
    for line in reversed(outcome.stderr.splitlines()):
        with contextlib.suppress(ValueError, RejectedError):
            error = canonical.as_mapping(canonical.as_mapping(json.loads(line))["error"])
            return canonical.as_text(error["code"]), canonical.as_text(error["cause"])
    return "no code", f"exit status {outcome.returncode}"


def run_command(
    arguments: Sequence[str], timeout_s: float = 120.0
) -> subprocess.CompletedProcess[str]:
    """Run one of our commands to its end, whatever its exit status.

    Raises:
        UnavailableError: AG-DEM-002 if it did not end in time or is not installed.
    """
    program = _find_program(arguments[0])
    try:
        return subprocess.run(
            [program, *arguments[1:]],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=environment(),
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        cause = f"{' '.join(arguments[:2])} did not end within {timeout_s:.0f} s"
        raise UnavailableError("AG-DEM-002", cause) from error


@dataclass(frozen=True)
class Reporter:
    """A program that says how it stands in lines of JSON, which a file collects."""

    process: subprocess.Popen[bytes]
    output: Path

    def last(self) -> Mapping[str, canonical.Json]:
        """The newest whole line that holds an object; empty before the first."""
        for line in reversed(self.output.read_bytes().split(b"\n")[:-1]):
            with contextlib.suppress(ValueError, RejectedError):
                return canonical.as_mapping(json.loads(line))
        return {}


@contextlib.contextmanager
def reporting(arguments: Sequence[str], output: Path) -> Iterator[Reporter]:
    """Run a program beside this one; it is ended when the block is left, however that happens."""
    with output.open("wb") as sink:
        process = _spawn(arguments, sink)
    try:
        yield Reporter(process, output)
    finally:
        process.kill()
        process.wait()


def free_port() -> int:
    """A TCP port of the loopback interface that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Daemon:
    """One running daemon and the file that takes its output."""

    name: str
    process: subprocess.Popen[bytes]
    log_path: Path

    def check(self) -> None:
        """Raise if the daemon has ended by itself.

        Raises:
            UnavailableError: AG-DEM-003 with the last line it wrote.
        """
        status = self.process.poll()
        if status is not None:
            lines = self.log_path.read_text("utf-8", errors="replace").strip().splitlines()
            last = lines[-1][:200] if lines else "no output"
            raise UnavailableError("AG-DEM-003", f"{self.name} ended with {status}: {last}")


@dataclass
class Daemons:
    """The daemons of one demo; a context manager that ends them all."""

    log_directory: Path
    running: list[Daemon] = field(default_factory=list)

    def start(self, name: str, arguments: Sequence[str]) -> Daemon:
        """Start a daemon in a session of its own."""
        log_path = self.log_directory / f"{name}.log"
        with log_path.open("ab") as output:
            daemon = Daemon(name, _spawn(arguments, output), log_path)
        self.running.append(daemon)
        return daemon

    def check(self) -> None:
        """Raise if any daemon has ended by itself."""
        for daemon in self.running:
            daemon.check()

    def stop(self) -> None:
        """Ask every daemon to end, then end what is left of its session."""
        for daemon in self.running:
            with contextlib.suppress(ProcessLookupError):
                daemon.process.terminate()
        deadline = time.monotonic() + _STOP_SECONDS
        for daemon in self.running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.process.wait(max(0.1, deadline - time.monotonic()))
        for daemon in self.running:
            # The daemon led this session; its children, if any are left, still belong to it.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(daemon.process.pid, signal.SIGKILL)
            daemon.process.wait()
        self.running.clear()

    def __enter__(self) -> Daemons:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # A second Ctrl-C must not leave daemons behind.
        with ignored_interrupts():
            self.stop()


def _find_program(name: str) -> str:
    """A program of the environment that runs the demo, activated or not."""
    beside = os.path.dirname(sys.executable)
    program = shutil.which(name, path=os.pathsep.join((beside, os.environ.get("PATH", ""))))
    if program is None:
        raise UnavailableError("AG-DEM-002", f"{name} is not installed")
    return program


def _spawn(arguments: Sequence[str], output: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [_find_program(arguments[0]), *arguments[1:]],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=environment(),
        start_new_session=True,
    )


@contextlib.contextmanager
def ignored_interrupts() -> Iterator[None]:
    """Hold back Ctrl-C while cleaning up."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


@contextlib.contextmanager
def terminating_as_interrupt() -> Iterator[None]:
    """Treat SIGTERM like Ctrl-C, so that it cleans up too."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
