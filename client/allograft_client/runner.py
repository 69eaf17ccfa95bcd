# SPDX-License-Identifier: Apache-2.0
"""Runs a worker: one process for one task that needs tensors, without a network.

A worker reads its task from a file, tells its progress as JSON lines, and ends with one line that
is its result or its refusal. Invariant: what a worker says is data; a worker that dies, or says
anything else, is a failed task and nothing more.
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
_IDLE_S = 600.0

#: Reported as soon as the worker knows it: whether it could leave the network.
Progress = Callable[[Mapping[str, Any]], None]


class Runner:
    """Has workers do tasks, one at a time, and can be told to stop the present one.

    The process that forks workers (see `worker`) holds the loaded libraries. It is started when it
    is first needed and kept for a while, because loading them costs more than many tasks.

    Args:
        directory: Private directory for task files and the workers' error output.
        idle_s: How long the libraries stay loaded after the last task.
    """

    def __init__(self, directory: Path, idle_s: float = _IDLE_S) -> None:
        self._directory = directory
        self._idle_s = idle_s
        self._turn = threading.Lock()  # held while a task runs
        self._lock = threading.Lock()  # guards what follows
        self._server: subprocess.Popen[bytes] | None = None
        self._retirement: threading.Timer | None = None
        self._stopping = False

    def run(self, name: str, task: Mapping[str, Any], progress: Progress) -> Mapping[str, Any]:
        """Run one task to its end and return its result.

        Args:
            name: A file name stem for the task, unique among running tasks.
            task: What to do; see `tasks`.
            progress: Told about every progress line.

        Raises:
            RejectedError: The worker refused, with its code.
            UnavailableError: AG-SIT-007 if the worker died or was stopped, or its own code.
        """
        with self._turn:
            self._directory.mkdir(mode=0o700, exist_ok=True)
            task_file = self._directory / f"{name}.json"
            durable_write(task_file, canonical.dumps(dict(task)))
            server = self._start()
            try:
                return self._follow(server, task_file, progress)
            finally:
                self._rest()

    def stop(self) -> None:
        """End the present worker and start no other; training resumes from its snapshot later."""
        with self._lock:
            self._stopping = True
            if self._retirement is not None:
                self._retirement.cancel()
            server = self._server
        if server is not None:
            _end(server)
            with self._turn:  # whoever follows a task there has seen its end by now
                _close(server)

    def _start(self) -> subprocess.Popen[bytes]:
        """The process that forks workers; a new one unless it lives."""
        with self._lock:
            if self._stopping:
                raise UnavailableError("AG-SIT-007", "the daemon is stopping")
            if self._retirement is not None:
                self._retirement.cancel()
            if self._server is None or self._server.poll() is not None:
                with (self._directory / "worker.log").open("wb") as errors:
                    self._server = subprocess.Popen(
                        [sys.executable, "-m", "allograft_client.worker", str(os.getpid())],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=errors,
                        env=worker_environment(),
                    )
            return self._server

    def _follow(
        self, server: subprocess.Popen[bytes], task_file: Path, progress: Progress
    ) -> Mapping[str, Any]:
        assert server.stdin is not None
        assert server.stdout is not None
        last: dict[str, canonical.Json] = {}
        with contextlib.suppress(BrokenPipeError):  # it ended: reading says how
            os.write(server.stdin.fileno(), json.dumps(str(task_file)).encode() + b"\n")
        status: canonical.Json = None
        while status is None and (line := server.stdout.readline(_LINE_BYTES)):
            message = _read_line(line)
            if "progress" in message:
                progress(canonical.as_mapping(message["progress"]))
            elif "ended" in message:
                status = message["ended"]
            elif message:
                last = message
        if status is None:
            status = _end(server)
            _close(server)
        if "result" in last and status == 0:
            return canonical.as_mapping(last["result"])
        if "error" in last:
            raise _read_error(last["error"])
        raise UnavailableError("AG-SIT-007", f"worker ended with status {status}")

    def _rest(self) -> None:
        """Give the memory back if nothing comes for a while."""
        with self._lock:
            if self._stopping:
                return
            self._retirement = threading.Timer(self._idle_s, self._retire)
            self._retirement.daemon = True
            self._retirement.start()

    def _retire(self) -> None:
        with self._turn, self._lock:
            server, self._server = self._server, None
        if server is not None:
            _end(server)
            _close(server)


def _end(server: subprocess.Popen[bytes]) -> int:
    """End the process that forks workers, and with it its worker; returns the exit status."""
    if server.poll() is None:
        server.terminate()
        try:
            server.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            server.kill()
    return server.wait()


def _close(server: subprocess.Popen[bytes]) -> None:
    for stream in (server.stdin, server.stdout):
        if stream is not None:
            stream.close()


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
        # Looking for a GPU must not open it: an opened one does not survive the fork.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
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
