# SPDX-License-Identifier: Apache-2.0
"""Keeps Flower running: the guarded SuperLink, its executor, the node list and the one run.

Called again and again by the daemon, it compares what is with what should be and does the next
missing thing, so a killed process, a failed run and a changed roster are all the same case. Each
child is the leader of its own process group and is stopped by its own id, never by name.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from allograft.crypto.keys import node_key_pem
from allograft.crypto.keystore import read_private, write_private
from allograft.errors import RejectedError, UnavailableError
from allograft.relay.memory import ENVIRONMENT
from allograft_server.app_bundle import app_directory, build_bundle
from allograft_server.flower_private import ControlClient
from allograft_server.settings import SOCKET_VARIABLE, Settings, State

_STOP_S = 5.0
_LONGEST_PAUSE_S = 30.0
_LOG_BYTES = 16 << 20
_SETTLED_S = 30.0  # a child that lived this long starts again without a pause
_RUN_CHECK_S = 5.0
# Flower itself takes 50 seconds to notice that a ServerApp is gone.
_SILENCE_S = 20.0
#: What children inherit; anything else in the operator's environment is none of their business.
_INHERITED = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "TZ", "VIRTUAL_ENV", "PYTHONPATH")


@dataclass(slots=True)
class Child:
    """One process that is kept running."""

    name: str
    command: tuple[str, ...]
    environment: dict[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    started_s: float = 0.0
    failures: int = 0
    resume_s: float = 0.0

    def keep(self) -> bool:
        """Start the process unless it runs; true if it was started just now."""
        now_s = time.monotonic()
        if self.process is not None:
            if self.process.poll() is None:
                return False
            lived_s = now_s - self.started_s
            self.failures = 0 if lived_s > _SETTLED_S else self.failures + 1
            pause_s = min(2.0**self.failures - 1, _LONGEST_PAUSE_S)
            self.resume_s = now_s + pause_s
            code = self.process.returncode
            structlog.get_logger("supervisor").warning(
                "child-ended", child=self.name, exit=code, restart_in_s=pause_s
            )
            self.process = None
        if now_s < self.resume_s:
            return False
        self._start()
        return True

    def _start(self) -> None:
        if self.log.exists() and self.log.stat().st_size > _LOG_BYTES:
            os.replace(self.log, self.log.with_suffix(".log.1"))
        try:
            with self.log.open("ab") as log:
                self.process = subprocess.Popen(
                    self.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=self.environment,
                    start_new_session=True,
                )
        except OSError as error:
            raise UnavailableError("AG-CRD-010", f"cannot start {self.name}") from error
        self.started_s = time.monotonic()

    def stop(self) -> None:
        """End the process and its own children: ask, wait, then kill."""
        process, self.process = self.process, None
        if process is None:
            return
        for number, wait_s in ((signal.SIGTERM, _STOP_S), (signal.SIGKILL, _STOP_S)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=wait_s)
                if number == signal.SIGKILL:
                    return
        # The leader is gone after the first signal, but a grandchild may not be: both are sent.


@dataclass(slots=True)
class Supervisor:
    """Flower as the coordinator wants it.

    Attributes:
        node_keys: What the roster says now: site → OpenSSH public key of its node.
        heard_s: When the ServerApp last asked for calls, by the monotonic clock.
    """

    state: State
    settings: Settings
    node_keys: Mapping[str, str] = field(default_factory=dict)
    heard_s: Callable[[], float] = time.monotonic
    _children: list[Child] = field(default_factory=list)
    _control: ControlClient | None = None
    _synced: Mapping[str, str] | None = None
    _checked_s: float = 0.0
    _answering_s: float = 0.0  # since when the SuperLink answers and the run is the same

    def start(self) -> None:
        """Make the secrets and prepare the children; `tick` starts them."""
        for name in ("executor.secret", "operator.token"):
            if not (self.state.flower / name).exists():
                write_private(self.state.flower / name, secrets.token_hex(32).encode())
        self._children = [self._superlink(), self._executor()]
        token = read_private(self.state.flower / "operator.token").decode("ascii")
        self._control = ControlClient(
            self.settings.private_address, self.state.tls / "ca.pem", token
        )

    def tick(self) -> None:
        """Do what is missing.

        Raises:
            UnavailableError: AG-CRD-010, AG-CRD-011; the next tick tries again.
        """
        superlink, executor = self._children
        if superlink.keep():
            self._synced = None
            self._checked_s = 0.0
            self._answering_s = 0.0
        executor.keep()
        if dict(self.node_keys) != self._synced:
            self._sync_nodes()
        if time.monotonic() - self._checked_s > _RUN_CHECK_S:
            self._ensure_run()
            self._checked_s = time.monotonic()

    def stop(self) -> None:
        """Stop every child."""
        if self._control is not None:
            self._control.close()
        for child in reversed(self._children):
            child.stop()

    def children(self) -> dict[str, int]:
        """Process ids of the children that run."""
        return {
            child.name: child.process.pid
            for child in self._children
            if child.process is not None and child.process.poll() is None
        }

    def _sync_nodes(self) -> None:
        """Register the nodes of the roster and take all others out."""
        assert self._control is not None
        wanted = {node_key_pem(key): site for site, key in self.node_keys.items()}
        known = {node.public_key.decode("ascii", "replace"): node for node in self._control.nodes()}
        for pem, node in known.items():
            if pem not in wanted:
                self._control.unregister_node(node.node_id)
        for pem, site in wanted.items():
            if pem not in known:
                self._register(pem, site)
        self._synced = dict(self.node_keys)
        structlog.get_logger("supervisor").info("nodes-registered", count=len(wanted))

    def _register(self, pem: str, site: str) -> None:
        assert self._control is not None
        try:
            self._control.register_node(pem, site)
        except RejectedError as error:
            # Flower takes no key back that was once unregistered: such a site makes a new one.
            structlog.get_logger("supervisor").warning(
                "node-refused", site=site, code=error.code, cause=error.cause
            )

    def _ensure_run(self) -> None:
        """Exactly one run whose ServerApp is heard; others are ended, a missing one submitted."""
        assert self._control is not None
        runs = self._control.active_runs()
        now_s = time.monotonic()
        self._answering_s = self._answering_s or now_s
        is_silent = now_s - max(self.heard_s(), self._answering_s) > _SILENCE_S
        kept = 0 if is_silent else 1
        for run_id in runs[kept:]:
            self._control.stop_run(run_id)
        if not runs[:kept]:
            run_id = self._control.start_run(build_bundle(app_directory()))
            self._answering_s = now_s
            structlog.get_logger("supervisor").info("run-submitted", run=run_id)

    def _superlink(self) -> Child:
        return Child(
            "superlink",
            (
                sys.executable, "-m", "allograft_server.superlink",
                "--state", str(self.state.root),
                "--public-host", self.settings.listen,
                "--public-port", str(self.settings.port),
                "--private-port", str(self.settings.private_port),
                "--parent-pid", str(os.getpid()),
            ),
            self._environment("superlink"),
            self.state.run / "superlink.log",
        )  # fmt: skip

    def _executor(self) -> Child:
        return Child(
            "executor",
            (
                "flower-superexec",
                "--runtime-api-address", self.settings.private_address,
                "--root-certificates", str(self.state.tls / "ca.pem"),
                "--superexec-auth-secret-file", str(self.state.flower / "executor.secret"),
                "--parent-pid", str(os.getpid()),
            ),
            self._environment("executor"),
            self.state.run / "executor.log",
        )  # fmt: skip

    def _environment(self, name: str) -> dict[str, str]:
        home = self.state.flower / name
        home.mkdir(mode=0o700, exist_ok=True)
        # Flower finds its own programs by name, so our environment's bin comes first.
        programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        inherited = {key: os.environ[key] for key in _INHERITED if key in os.environ}
        return {
            **inherited,
            "PATH": programs,
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            # At INFO each message is three lines, for ever; every call is in the audit file.
            "FLWR_LOG_LEVEL": "WARNING",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "2",
            SOCKET_VARIABLE: str(self.state.socket),
            # Idle thread pools of numeric libraries only cost memory.
            "OMP_NUM_THREADS": "1",
            **ENVIRONMENT,
        }
