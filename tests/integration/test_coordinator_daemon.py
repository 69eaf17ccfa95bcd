# SPDX-License-Identifier: Apache-2.0
"""The coordinator daemon as a process, with the Flower processes it starts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from kit.coordination import Coordination
from kit.flower import free_ports, wait_until


class Served:
    """A coordinator daemon in a process of its own."""

    def __init__(self, root: Path) -> None:
        self.world = Coordination(root, "donor")
        self.world.coordinator.close()
        self.state = self.world.state
        port, private = free_ports(2)
        config = self.state.config.read_text()
        lines = [
            f"port = {port}" if line.startswith("port =") else
            f"private_port = {private}" if line.startswith("private_port =") else line
            for line in config.splitlines()
        ]  # fmt: skip
        self.state.config.write_text("\n".join(lines) + "\n")
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        with (self.state.root / "daemon.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", "from allograft_server.main import main; main()", "serve",
                 "--state", str(self.state.root)],
                stdout=log, stderr=log,
            )  # fmt: skip
        return self.process

    def events(self) -> list[str]:
        lines = (self.state.root / "daemon.log").read_text().splitlines()
        return [json.loads(line)["event"] for line in lines]

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    served = Served(tmp_path)
    try:
        wait_until("the run is submitted", lambda: "run-submitted" in served.events())
        wait_until("the ServerApp runs", lambda: len(served.children()) >= 3)
        yield served
    finally:
        served.process.kill()
        served.process.wait(timeout=10)


def gone(processes: list[psutil.Process]) -> Callable[[], bool]:
    return lambda: not any(process.is_running() for process in processes)


def test_it_stops_everything_it_started(served: Served) -> None:
    children = served.children()
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(timeout=30) == 0
    wait_until("all children are gone", gone(children), 15)
    assert served.events()[-1] == "daemon-stopped"
    assert not served.state.socket.exists()


def test_nothing_outlives_a_killed_daemon_and_the_next_one_goes_on(served: Served) -> None:
    children = served.children()
    served.process.kill()
    served.process.wait(timeout=10)
    wait_until("all children are gone", gone(children), 30)
    served.start()
    # The run was not lost with the SuperLink: its ServerApp is started again.
    wait_until("the ServerApp runs again", lambda: len(served.children()) >= 3)


def test_a_second_daemon_leaves_the_first_alone(served: Served) -> None:
    second = subprocess.run(
        [sys.executable, "-c", "from allograft_server.main import main; main()", "serve",
         "--state", str(served.state.root)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert second.returncode == 3
    assert "AG-STO-002" in second.stderr
    assert served.process.poll() is None
    assert served.state.socket.exists()


def test_the_socket_is_private(served: Served) -> None:
    assert served.state.socket.stat().st_mode & 0o777 == 0o600
    assert served.state.run.stat().st_mode & 0o777 == 0o700


def test_the_log_of_the_daemon_is_json_and_tells_no_secret(served: Served) -> None:
    time.sleep(1)
    content = (served.state.root / "daemon.log").read_text()
    assert served.events()
    for name in ("operator.token", "executor.secret"):
        assert (served.state.flower / name).read_text() not in content
    assert "PRIVATE" not in content
    environment = Path(f"/proc/{served.children()[0].pid}/environ")
    if environment.exists():
        assert b"ALLOGRAFT_COORDINATOR_STATE" not in environment.read_bytes()
    assert os.fspath(served.state.root) not in content
