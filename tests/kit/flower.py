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

from allograft.crypto.keys import NodeKey, SigningKey, VerifyKey
from allograft.crypto.tls import make_authority, make_server_certificate
from allograft.errors import UnavailableError
from allograft.relay.item import Item, describe_item
from allograft.relay.memory import ENVIRONMENT
from allograft_server.mailbox import Mailbox
from allograft_server.relay import Relay
from allograft_server.service import CourierService
from allograft_server.settings import Settings, State
from allograft_server.store import ItemRow, Store
from allograft_server.supervisor import Supervisor
from kit.simulated_site import SimulatedSite, serve_site

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
            **ENVIRONMENT,
        }
        with (self._directory / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                self._commands[name], stdout=log, stderr=log, env=environment
            )

    def keep(self) -> None:
        """Start again what ended by itself, as a site's daemon does.

        A SuperNode that reaches the SuperLink before its key is registered there ends with an
        error, which happens when the two start side by side on a busy machine.
        """
        for name, process in list(self.processes.items()):
            if process.poll() is not None:
                self.start(name)

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


class FlowerRelay:
    """The coordinator's relay over real Flower processes, with simulated sites and no roster.

    Args:
        root: A directory for everything.
        names: The sites.
        serves_doors: Whether the simulated sites answer in this process.
    """

    def __init__(self, root: Path, *names: str, serves_doors: bool = True) -> None:
        self._serves_doors = serves_doors
        self.root = root
        self.state, self.settings = make_state(root / "hub")
        self.key = SigningKey.generate()
        self.sites: dict[str, SimulatedSite] = {}
        self.nodes: dict[str, SiteNode] = {}
        self._owners: dict[str, str] = {}
        node_keys: dict[str, str] = {}
        for name in names:
            key = NodeKey.generate()
            node_keys[name] = key.public_openssh
            self._owners[key.public_pem] = name
            self.sites[name] = SimulatedSite(name, root / name, "hub", self.key.public)
            self.nodes[name] = SiteNode(
                root / f"{name}-node",
                key,
                self.settings.address,
                self.state.tls / "ca.pem",
                root / f"{name}.sock",
            )
        self.store = Store.create(self.state.database)
        self.mailbox = Mailbox(self.state.mailbox, 0)
        self.relay = Relay(
            "hub",
            self.key,
            self.store,
            self.mailbox,
            self,
            self,
            lambda: datetime.now(UTC),
            time.monotonic,
        )
        self.supervisor = Supervisor(
            self.state, self.settings, node_keys, lambda: self.relay.heard_s
        )

    # the roster and the desk, as the relay sees them

    def site_of_node(self, public_key: bytes) -> str | None:
        return self._owners.get(public_key.decode())

    def site_keys(self, site: str, now: datetime) -> tuple[VerifyKey, ...]:
        return (self.sites[site].key.public,)

    def check_item(self, item: Item) -> None: ...

    def item_delivered(self, row: ItemRow) -> None:
        self.store.move_item(row.item_id, ("waiting",), "delivered")

    def item_untaken(self, row: ItemRow, code: str) -> None:
        self.store.move_item(row.item_id, ("waiting",), "refused", code)

    def awaits_witnesses(self) -> bool:
        return False

    def checkpoint_for(self, site: str, witnessed_size: int) -> tuple[str, tuple[bytes, ...]]:
        return "", ()

    def cosigned(self, site: str, cosignature: str) -> None: ...

    # driving

    @contextlib.contextmanager
    def running(self) -> Iterator[FlowerRelay]:
        """Everything, for the length of a block."""
        with contextlib.ExitStack() as stack:
            doors = self.sites.items() if self._serves_doors else ()
            for name, site in doors:
                server = serve_site(site, self.root / f"{name}.sock")
                stack.callback(lambda server=server: server.stop(0).wait(5))
            stack.enter_context(CourierService(self.state.socket, self.relay))
            stack.callback(self.supervisor.stop)
            self.supervisor.start()
            for node in self.nodes.values():
                stack.enter_context(node.running())
            yield self

    def tick(self) -> None:
        """What daemons do between calls: keep Flower running, judge what is complete."""
        with contextlib.suppress(UnavailableError):
            self.supervisor.tick()
        for node in self.nodes.values():
            node.keep()
        for row in self.store.items_in("complete"):
            for file in row.item.files:
                self.mailbox.finish_file(row.item_id, file)
            self.store.move_item(row.item_id, ("complete",), "stored")

    def wait_until(
        self, what: str, done: Callable[[], bool], deadline_s: float = DEADLINE_S
    ) -> None:
        """Run until a condition holds, but not for ever."""

        def step() -> bool:
            self.tick()
            return done()

        wait_until(what, step, deadline_s)

    def state_of(self, item: Item) -> str:
        """The state of an item at the coordinator."""
        row = self.store.find_item(item.item_id)
        return row.state if row else "unknown"

    def queue(self, site: str, item: Item) -> Item:
        """Send the files of a stored item on to another site."""
        forwarded = Item("packet", "hub", site, item.files)
        self.store.add_item(forwarded, site, "waiting", "subject")
        return forwarded

    def queue_files(self, site: str, directory: Path) -> Item:
        """Send small files to a site."""
        item = describe_item("roster", "hub", site, sorted(directory.iterdir()))
        for file in item.files:
            self.mailbox.add_file(file, (directory / file.name).read_bytes())
        self.store.add_item(item, site, "waiting", "subject")
        return item
