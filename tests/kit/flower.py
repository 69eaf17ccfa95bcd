# SPDX-License-Identifier: Apache-2.0
"""Real Flower processes on loopback: our guarded SuperLink and run, and a site's SuperNode.

Everything that is started here is stopped here, by process id.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from allograft.crypto.keys import NodeKey
from allograft.crypto.tls import make_authority, make_server_certificate
from allograft_server.settings import Settings, State

DEADLINE_S = 90.0


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        return [opened.getsockname()[1] for opened in sockets]


def wait_until(what: str, done: Callable[[], bool], deadline_s: float = DEADLINE_S) -> None:
    """Wait for a condition, but not for ever."""
    end_s = time.monotonic() + deadline_s
    while not done():
        if time.monotonic() > end_s:
            raise AssertionError(f"waited {deadline_s:.0f} s in vain: {what}")
        time.sleep(0.1)


def make_state(root: Path, name: str = "hub") -> tuple[State, Settings]:
    """A coordinator's directories, addresses and certificates, without a roster."""
    public, private = free_ports(2)
    state = State(root)
    state.make_directories()
    settings = Settings(
        name=name,
        host="127.0.0.1",
        port=public,
        listen="127.0.0.1",
        private_port=private,
        reserve_mib=0,
    )
    now = datetime.now(UTC)
    authority = make_authority(name, now)
    server = make_server_certificate(authority, ("127.0.0.1", "localhost"), now)
    (state.tls / "ca.pem").write_bytes(authority.certificate_pem)
    (state.tls / "server.pem").write_bytes(server.certificate_pem)
    (state.tls / "server.key").write_bytes(server.key_pem)
    return state, settings


class SiteNode:
    """A site's SuperNode and the executor that runs its installed courier."""

    def __init__(self, directory: Path, key: NodeKey, address: str, ca: Path, door: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        (self._port,) = free_ports(1)
        self._secret = directory / "executor.secret"
        self._secret.write_bytes(secrets.token_hex(32).encode())
        key_file = directory / "node"
        key_file.write_bytes(key.to_openssh())
        key_file.chmod(0o600)
        self._commands = {
            "supernode": [
                "flower-supernode",
                *("--superlink", address, "--root-certificates", str(ca)),
                *("--auth-supernode-private-key", str(key_file)),
                *("--isolation", "process", "--superexec-auth-secret-file", str(self._secret)),
                *("--host", "127.0.0.1", "--port", str(self._port)),
                *("--node-config", f'courier-socket="{door}"'),
            ],
            "executor": [
                *(sys.executable, "-m", "allograft_client.executor"),
                *("--runtime", f"127.0.0.1:{self._port}", "--secret-file", str(self._secret)),
                *("--parent-pid", str(os.getpid())),
            ],
        }
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str) -> None:
        """Start one of the two processes."""
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(self._directory / "flower"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "OMP_NUM_THREADS": "1",
        }
        with (self._directory / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                self._commands[name], stdout=log, stderr=log, env=environment
            )

    def stop(self) -> None:
        """Stop both."""
        for process in self.processes.values():
            process.kill()
            process.wait(timeout=10)

    @contextlib.contextmanager
    def running(self) -> Iterator[SiteNode]:
        """Both processes, for the length of a block."""
        try:
            self.start("supernode")
            self.start("executor")
            yield self
        finally:
            self.stop()
