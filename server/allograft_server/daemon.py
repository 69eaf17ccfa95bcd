# SPDX-License-Identifier: Apache-2.0
"""The coordinator daemon: puts the parts together and turns the crank.

One main loop keeps the roster, Flower, the log and the post going; the ServerApp's calls are
answered beside it, on the service's own threads. A step that fails is logged with its code and
tried again, and none of them can stop another.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from types import FrameType

import structlog

from allograft.crypto import keystore
from allograft.durable import DAEMON_WAIT_S, lock_directory
from allograft.errors import AllograftError
from allograft.log.store import LogStore
from allograft.relay.item import Item
from allograft.relay.memory import return_memory_early
from allograft.roster.records import log_origin
from allograft_server.journal import configure_journal
from allograft_server.mailbox import Mailbox
from allograft_server.post import Post
from allograft_server.relay import Relay
from allograft_server.roster_front import Keys, RosterFront
from allograft_server.service import CourierService
from allograft_server.settings import State, read_settings
from allograft_server.store import ItemRow, Store
from allograft_server.supervisor import Supervisor
from allograft_server.witnessing import Witnessing

_TICK_S = 0.2
_SLOW_TICK_S = 2.0


def utc_now() -> datetime:
    """The current time in whole seconds, as documents carry it."""
    return datetime.now(UTC).replace(microsecond=0)


class Desk:
    """What the relay asks of the post and of the log, behind one door."""

    def __init__(self, post: Post, witnessing: Witnessing) -> None:
        self._post = post
        self._witnessing = witnessing

    def check_item(self, item: Item) -> None:
        """As `Post.check_item`."""
        self._post.check_item(item)

    def item_delivered(self, row: ItemRow) -> None:
        """As `Post.item_delivered`."""
        self._post.item_delivered(row)

    def item_untaken(self, row: ItemRow, code: str) -> None:
        """As `Post.item_untaken`."""
        self._post.item_untaken(row, code)

    def awaits_witnesses(self) -> bool:
        """As `Witnessing.awaits_witnesses`."""
        return self._witnessing.awaits_witnesses()

    def checkpoint_for(self, site: str, witnessed_size: int) -> tuple[str, tuple[bytes, ...]]:
        """As `Witnessing.checkpoint_for`."""
        return self._witnessing.checkpoint_for(site, witnessed_size)

    def cosigned(self, site: str, cosignature: str) -> None:
        """As `Witnessing.cosigned`."""
        self._witnessing.cosigned(site, cosignature)


class Coordinator:
    """Everything of a coordinator but Flower, opened together.

    Args:
        state: The state directory; the caller holds its lock.

    Raises:
        UnavailableError: AG-STO-003 if the directory is incomplete.
        RejectedError: AG-CRD-001, AG-KEY-*, AG-LOG-012.
    """

    def __init__(self, state: State) -> None:
        self.settings = read_settings(state)
        me = self.settings.name
        self.keys = read_keys(state)
        log_key = keystore.read_note_key(state.log_key)
        self.store = Store(state.database)
        self.mailbox = Mailbox(state.mailbox, self.settings.reserve_mib << 20)
        self.log = LogStore(state.log, log_origin(me), log_key)
        self.post = Post(
            me,
            self.keys.signing,
            self.store,
            self.mailbox,
            lambda: self.roster.current(),
            utc_now,
        )
        self.roster = RosterFront(state, me, self.keys, self.store, self.post, utc_now)
        self.witnessing = Witnessing(self.log, self.store, self.post, self.roster.current)
        self.relay = Relay(
            me,
            self.keys.signing,
            self.store,
            self.mailbox,
            self.roster,
            Desk(self.post, self.witnessing),
            utc_now,
            time.monotonic,
        )

    def judge(self) -> None:
        """Judge what is complete."""
        for row in self.store.items_in("complete"):
            self.post.judge(row)
            judged = self.store.find_item(row.item_id)
            state, code = (judged.state, judged.code) if judged else ("unknown", "")
            structlog.get_logger("post").info(
                "judged", site=row.site, kind=row.item.kind, state=state, code=code
            )

    def close(self) -> None:
        """Close the databases."""
        self.log.close()
        self.store.close()


class Daemon:
    """A running coordinator; `run` returns when `stop` was called or a signal arrived."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._stopped = threading.Event()
        self._log = structlog.get_logger("daemon")
        self._complaints: dict[str, str] = {}

    def stop(self) -> None:
        """Ask `run` to end."""
        self._stopped.set()

    def run(self) -> None:
        """Run until stopped.

        Raises:
            UnavailableError: AG-STO-002 if another process uses the directory for longer than
                `DAEMON_WAIT_S`, AG-STO-003 if there is no coordinator in it.
            RejectedError: AG-CRD-001, AG-KEY-*, AG-LOG-012.
        """
        read_settings(self._state)
        release = lock_directory(self._state.root, DAEMON_WAIT_S)
        try:
            coordinator = Coordinator(self._state)
            try:
                self._run(coordinator)
            finally:
                coordinator.close()
        finally:
            release()

    def _run(self, coordinator: Coordinator) -> None:
        settings = coordinator.settings
        supervisor = Supervisor(self._state, settings, heard_s=lambda: coordinator.relay.heard_s)
        coordinator.post.sweep_all()
        self._log.info("daemon-started", pid=os.getpid(), port=settings.port)
        with CourierService(self._state.socket, coordinator.relay):
            supervisor.start()
            try:
                self._loop(coordinator, supervisor)
            finally:
                supervisor.stop()
        self._log.info("daemon-stopped", pid=os.getpid())

    def _loop(self, coordinator: Coordinator, supervisor: Supervisor) -> None:
        slow_s = -_SLOW_TICK_S
        while not self._stopped.wait(_TICK_S):
            self._step("judge", coordinator.judge)
            self._step("log", coordinator.witnessing.tick)
            if time.monotonic() - slow_s >= _SLOW_TICK_S:
                slow_s = time.monotonic()
                self._step("roster", coordinator.roster.tick)
                supervisor.node_keys = coordinator.roster.node_keys()
                self._step("expiry", coordinator.post.expire)
                self._step("flower", supervisor.tick)

    def _step(self, name: str, step: Callable[[], None]) -> None:
        """Run one step; a failure that lasts is told once, not five times a second."""
        try:
            step()
        except AllograftError as error:
            if self._complaints.get(name) != str(error):
                self._complaints[name] = str(error)
                self._log.warning("step-failed", step=name, code=error.code, cause=error.cause)
        else:
            self._complaints.pop(name, None)


def read_keys(state: State) -> Keys:
    """The keys that the roster names.

    Raises:
        UnavailableError: AG-STO-003 if one is missing.
        RejectedError: AG-KEY-* if one is malformed or readable by others.
    """
    return Keys(
        keystore.read_signing_key(state.signing_key), keystore.read_note_key(state.timestamp_key)
    )


def serve(state: State) -> None:
    """Run the daemon until SIGTERM or SIGINT.

    Raises:
        AllograftError: As `Daemon.run`.
    """
    return_memory_early()
    configure_journal(sys.stderr)
    daemon = Daemon(state)

    def handle(_number: int, _frame: FrameType | None) -> None:
        daemon.stop()

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)
    daemon.run()
