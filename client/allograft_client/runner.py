# SPDX-License-Identifier: Apache-2.0
"""Runs a worker: one subprocess for one task that needs tensors, without a network.

A worker reads its task from a file, tells its progress as JSON lines on standard output, and ends
with one line that is its result or its refusal. Invariant: what a worker says is data; a worker
that dies, or says anything else, is a failed task and nothing more.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from allograft.crypto import canonical
from allograft.durable import durable_write
from allograft.errors import CODES, RejectedError, UnavailableError

_LINE_BYTES = 1 << 20
_STOP_S = 10.0

#: Reported as soon as the worker knows it: whether it could leave the network.
Progress = Callable[[Mapping[str, Any]], None]


class Runner:
    """Starts workers and can be told to stop the present ones.

    Args:
        directory: Private directory for task files and the workers' error output.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopping = False

    def run(self, name: str, task: Mapping[str, Any], progress: Progress) -> Mapping[str, Any]:
        """Run one task to its end and return its result.

        Args:
            name: A file name stem for the task, unique among running tasks.
            task: What to do; see `worker`.
            progress: Told about every progress line.

        Raises:
            RejectedError: The worker refused, with its code.
            UnavailableError: AG-SIT-007 if the worker died or was stopped, or its own code.
        """
        self._directory.mkdir(mode=0o700, exist_ok=True)
        task_file = self._directory / f"{name}.json"
        durable_write(task_file, canonical.dumps(dict(task)))
        with (self._directory / f"{name}.log").open("wb") as errors:
            process = self._start(task_file, errors.fileno())
            try:
                return self._follow(process, progress)
            finally:
                self._end(process)

    def stop(self) -> None:
        """End all workers; training resumes from its snapshot later."""
        with self._lock:
            self._stopping = True
            processes = list(self._running)
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()

    def _start(self, task_file: Path, errors: int) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._stopping:
                raise UnavailableError("AG-SIT-007", "the daemon is stopping")
            process = subprocess.Popen(
                [sys.executable, "-m", "allograft_client.worker", str(task_file), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=worker_environment(),
            )
            self._running.add(process)
            return process

    def _follow(self, process: subprocess.Popen[bytes], progress: Progress) -> Mapping[str, Any]:
        assert process.stdout is not None
        last: dict[str, canonical.Json] = {}
        while line := process.stdout.readline(_LINE_BYTES):
            message = _read_line(line)
            if "progress" in message:
                progress(canonical.as_mapping(message["progress"]))
            elif message:
                last = message
        status = process.wait()
        if "result" in last and status == 0:
            return canonical.as_mapping(last["result"])
        if "error" in last:
            raise _read_error(last["error"])
        raise UnavailableError("AG-SIT-007", f"worker ended with status {status}")

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        with self._lock:
            self._running.discard(process)
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if process.stdout is not None:
            process.stdout.close()


def worker_environment() -> dict[str, str]:
    """A worker's environment: no hub, no telemetry, no progress bars of libraries."""
    return os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # Threads that wait for each other must not spin. On two cores beside the daemons, spinning
        # made a training step 2.8 times slower (measured); on a quiet machine not spinning costs
        # a seventh.
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONUNBUFFERED": "1",
    }


def _read_line(line: bytes) -> dict[str, canonical.Json]:
    # Libraries may print to standard output; what is not one of our objects is no message.
    try:
        message = json.loads(line)
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}


def _read_error(value: canonical.Json) -> RejectedError | UnavailableError:
    fields = canonical.as_object(value, {"code", "cause", "retry"})
    code, cause = canonical.as_text(fields["code"]), canonical.as_text(fields["cause"])
    if code not in CODES:
        return UnavailableError("AG-SIT-007", "the worker gave an unknown code")
    return UnavailableError(code, cause) if fields["retry"] else RejectedError(code, cause)
