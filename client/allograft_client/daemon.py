# SPDX-License-Identifier: Apache-2.0
"""The site daemon: one process that owns the state directory and everything private in it.

It holds the directory's lock, opens the courier's door, keeps the SuperNode and the executor
running, and does jobs in two lanes. It only ever connects outwards, through the SuperNode.
Invariant: it stops the children it started, by their pid, and leaves every job resumable.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

import structlog

from allograft.crypto import keystore
from allograft.durable import DAEMON_WAIT_S, durable_write, lock_directory
from allograft.errors import AllograftError
from allograft.relay import memory
from allograft_client.card import publish_card
from allograft_client.contact import Watch
from allograft_client.exchange import Exchange, Parties
from allograft_client.jobs import run_lane
from allograft_client.journal import configure_journal
from allograft_client.service import SiteService
from allograft_client.settings import Home
from allograft_client.site import Site, open_site
from allograft_client.store import Lane, Store
from allograft_client.supervise import Child, Program
from allograft_client.trial import queue_ended

_TICK_S = 0.5
_UPKEEP_S = 5.0
_LANES: tuple[Lane, ...] = ("light", "heavy")


class Daemon:
    """A running site; `run` returns when `stop` was called or a signal arrived.

    Args:
        home: The state directory.
    """

    def __init__(self, home: Home) -> None:
        self._home = home
        self._stopped = threading.Event()
        self._log = structlog.get_logger("daemon")

    def stop(self) -> None:
        """Ask `run` to end."""
        self._stopped.set()

    def run(self) -> None:
        """Run until stopped.

        Raises:
            UnavailableError: AG-STO-002 if another daemon or a long command uses the directory for
                longer than `DAEMON_WAIT_S`, AG-STO-003 if it was never initialised or a key is
                missing.
            RejectedError: AG-SIT-008 if the site has not joined; AG-KEY-* or AG-ROS-*.
        """
        self._home.settings()
        release = lock_directory(self._home.root, DAEMON_WAIT_S)
        try:
            self._run_locked()
        finally:
            release()

    def _run_locked(self) -> None:
        store = Store(self._home.database)
        site = open_site(self._home, store)
        # Not held, but needed for every packet that arrives.
        site.sealing_key()
        requeued = store.requeue_jobs()
        site.outbox.sweep()
        service = SiteService(
            self._exchange(site),
            self._home.courier_socket,
            site.settings.courier_uids,
            self._alarm,
        )
        lanes = [
            threading.Thread(target=run_lane, args=(site, lane, self._stopped), name=lane)
            for lane in _LANES
        ]
        children = self._children(site)
        self._log.info("daemon-started", site=site.name, job=requeued, pid=os.getpid())
        try:
            for lane in lanes:
                lane.start()
            self._loop(site, children)
        finally:
            self._stopped.set()
            site.runner.stop()
            for child in children:
                child.stop()
            service.close()
            for lane in lanes:
                if lane.ident is not None:
                    lane.join()
            store.close()
            self._log.info("daemon-stopped", site=site.name)

    def _loop(self, site: Site, children: Sequence[Child]) -> None:
        ticks = 0
        watch = Watch(site.store, self._log, datetime.now(UTC))
        while not self._stopped.is_set():
            # Children are started by this thread, because the kernel ends them with it.
            for child in children:
                child.tend()
            if ticks % round(_UPKEEP_S / _TICK_S) == 0:
                self._keep_up(site, watch)
            ticks += 1
            self._stopped.wait(_TICK_S)

    def _keep_up(self, site: Site, watch: Watch) -> None:
        """What follows from files and from time: a card, the end of retention, a silent peer."""
        try:
            watch.look(datetime.now(UTC))
            queue_ended(site)
            publish_card(site)
        except AllograftError as error:
            self._log.warning("upkeep-failed", code=error.code, cause=error.cause)

    def _exchange(self, site: Site) -> Exchange:
        return Exchange(
            Parties(site.name, site.trust.coordinator, site.key),
            site.trust.latest_roster,
            site.store,
            (site.outbox, site.inbox),
            site.trust.witness(),
            self._alarm,
        )

    def _alarm(self, code: str, cause: str) -> None:
        self._log.warning("refused", code=code, cause=cause)

    def _children(self, site: Site) -> list[Child]:
        runtime = _Runtime(site)
        environment = flower_environment(self._home.path("run", "flower"))
        supernode = Program(
            "supernode", runtime.supernode, environment, self._home.path("run", "supernode.log")
        )
        executor = Program(
            "executor", runtime.executor, environment, self._home.path("run", "executor.log")
        )
        return [Child(supernode), Child(executor)]


class _Runtime:
    """How the two Flower processes are started, and the loopback port they share."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._home = site.home
        self._port = site.settings.runtime_port or _free_port()
        self._secret = self._home.path("run", "superexec.secret")
        # Fresh for every daemon: nothing but our own executor may acquire tasks.
        durable_write(self._secret, secrets.token_bytes(32))
        self._authority = self._home.path("run", "superlink-ca.pem")
        durable_write(self._authority, site.trust.authority_pem)
        # `flower-supernode` reads the key file by itself; its mode is checked here.
        keystore.read_node_key(self._home.path("keys", "node"))

    def supernode(self) -> list[str]:
        """The stock SuperNode, isolated, without dependency installation."""
        socket_path = self._home.courier_socket
        return [
            "flower-supernode",
            "--superlink", self._site.trust.superlink_address,
            "--root-certificates", str(self._authority),
            "--auth-supernode-private-key", str(self._home.path("keys", "node")),
            "--isolation", "process",
            "--superexec-auth-secret-file", str(self._secret),
            "--host", "127.0.0.1",
            "--port", str(self._port),
            "--node-config", f'courier-socket="{socket_path}"',
        ]  # fmt: skip

    def executor(self) -> list[str]:
        """Our executor, which runs the installed courier and no other app."""
        return [
            sys.executable,
            "-m", "allograft_client.executor",
            "--runtime", f"127.0.0.1:{self._port}",
            "--secret-file", str(self._secret),
            "--parent-pid", str(os.getpid()),
        ]  # fmt: skip


def flower_environment(home: Path) -> dict[str, str]:
    """The environment of Flower processes: a home of their own, telemetry and updates off."""
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    programs = str(Path(sys.executable).parent)
    return os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PATH": programs + os.pathsep + os.environ.get("PATH", ""),
        "PYTHONUNBUFFERED": "1",
        **memory.ENVIRONMENT,
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def serve(home: Home) -> None:
    """Run the daemon until SIGTERM or SIGINT.

    Raises:
        AllograftError: As `Daemon.run`.
    """
    memory.return_memory_early()
    configure_journal(sys.stderr)
    daemon = Daemon(home)

    def handle(_number: int, _frame: FrameType | None) -> None:
        daemon.stop()

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)
    daemon.run()
