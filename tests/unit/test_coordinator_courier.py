# SPDX-License-Identifier: Apache-2.0
"""The coordinator's courier carries frames unread between a grid and the daemon."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from allograft.wire.v1 import relay_pb2
from allograft_server import courier as module
from allograft_server.courier import Courier, pack, unpack


@pytest.fixture(autouse=True)
def task_identity() -> Iterator[None]:
    # Flower makes messages only inside a task.
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 7, 1, 11
    yield
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = None


@dataclass
class Node:
    node_id: int
    public_key: bytes = b"pem"
    status: str = "online"


class FakeGrid(Grid):  # type: ignore[misc]
    """Flower without a network: messages wait until the test answers them."""

    def __init__(self, *nodes: Node) -> None:
        self.nodes = list(nodes)
        self.pushed: dict[str, Message] = {}
        self.replies: dict[str, Message] = {}
        self.pulled: list[str] = []
        self.takes = True

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        return None

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return [node.node_id for node in self.nodes]

    def get_nodes(self) -> Iterable[Any]:
        return self.nodes

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            identity = message.object_id
            message.metadata.__dict__["_message_id"] = identity
            self.pushed[identity] = message
            ids.append(identity if self.takes else None)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        ids = list(message_ids)
        self.pulled += ids
        return [self.replies.pop(i) for i in ids if i in self.replies]

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
        raise AssertionError("it sleeps three seconds")

    def answer(self, content: RecordDict | Error) -> None:
        (identity, message), *_ = self.pushed.items()
        del self.pushed[identity]
        self.replies[identity] = Message(content, reply_to=message)


class Down(grpc.RpcError):
    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE


@dataclass
class FakeDaemon:
    calls: list[relay_pb2.Call] = field(default_factory=list)
    online: list[tuple[int, bytes]] = field(default_factory=list)
    sessions: set[str] = field(default_factory=set)
    settled: list[relay_pb2.SettleRequest] = field(default_factory=list)
    is_down: bool = False

    def Next(  # noqa: N802
        self, request: relay_pb2.NextRequest, timeout: float
    ) -> relay_pb2.NextReply:
        if self.is_down:
            raise Down
        self.online = [(node.node_id, node.public_key) for node in request.online]
        self.sessions.add(request.session)
        calls, self.calls = self.calls, []
        return relay_pb2.NextReply(calls=calls)

    def Settle(  # noqa: N802
        self, request: relay_pb2.SettleRequest, timeout: float
    ) -> relay_pb2.SettleReply:
        self.settled.append(request)
        return relay_pb2.SettleReply()


FRAME = relay_pb2.Frame(envelope=b"envelope", body=b"body")


def call(node_id: int = 5, method: str = "put") -> relay_pb2.Call:
    return relay_pb2.Call(call_id="c1", node_id=node_id, frame=FRAME, method=method)


@pytest.fixture(autouse=True)
def fresh_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_NODES_S", 0.0)


@pytest.fixture
def daemon() -> FakeDaemon:
    return FakeDaemon()


@pytest.fixture
def grid() -> FakeGrid:
    return FakeGrid(Node(5), Node(6, status="offline"))


@pytest.fixture
def courier(grid: FakeGrid, daemon: FakeDaemon) -> Courier:
    return Courier(grid, daemon)


def test_reports_only_nodes_that_are_online(courier: Courier, daemon: FakeDaemon) -> None:
    courier.tick()
    assert daemon.online == [(5, b"pem")]


@pytest.mark.parametrize("body", [b"", b"body", bytes(range(256)) * 64])
def test_a_frame_survives_packing(body: bytes) -> None:
    frame = relay_pb2.Frame(envelope=b"envelope", body=body)
    assert unpack(pack(frame)) == frame


def test_carries_a_call_and_its_answer(
    courier: Courier, daemon: FakeDaemon, grid: FakeGrid
) -> None:
    daemon.calls = [call(method="take")]
    assert courier.tick()
    (message,) = grid.pushed.values()
    assert message.metadata.message_type == "query.take"
    assert message.metadata.dst_node_id == 5
    assert unpack(message.content) == FRAME
    answer = relay_pb2.Frame(envelope=b"signed", body=b"part")
    grid.answer(pack(answer))
    assert courier.tick()
    (settled,) = daemon.settled
    assert settled.call_id == "c1"
    assert settled.frame == answer
    assert not courier.tick()


def test_reports_a_flower_error_as_a_failed_call(
    courier: Courier, daemon: FakeDaemon, grid: FakeGrid
) -> None:
    daemon.calls = [call()]
    courier.tick()
    grid.answer(Error(code=2, reason="text that a site wrote"))
    courier.tick()
    (settled,) = daemon.settled
    assert settled.failure == "Flower error 2"  # the site's text goes no further


@pytest.mark.parametrize(
    "content",
    [
        RecordDict({}),
        RecordDict({"frame": ConfigRecord({"envelope": b""})}),
        RecordDict({"frame": ConfigRecord({"envelope": b"", "body": "text"})}),
        RecordDict({"frame": ArrayRecord({})}),
    ],
)
def test_an_answer_of_another_shape_is_a_failed_call(
    courier: Courier, daemon: FakeDaemon, grid: FakeGrid, content: RecordDict
) -> None:
    daemon.calls = [call()]
    courier.tick()
    grid.answer(content)
    courier.tick()
    assert daemon.settled[0].failure == "the answer is no frame"


def test_gives_up_on_a_node_that_went_offline(
    courier: Courier, daemon: FakeDaemon, grid: FakeGrid
) -> None:
    daemon.calls = [call()]
    courier.tick()
    grid.nodes = []
    courier.tick()
    assert daemon.settled[0].failure == "the node went offline"
    grid.pulled.clear()
    courier.tick()
    assert grid.pulled == []


def test_gives_up_on_a_node_that_makes_no_progress(
    courier: Courier, daemon: FakeDaemon, grid: FakeGrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon.calls = [call()]
    courier.tick()
    assert daemon.settled == []
    monkeypatch.setattr(module, "STALL_S", -1.0)
    courier.tick()
    assert daemon.settled[0].failure == "the node did not answer"
    monkeypatch.setattr(module, "STALL_S", 60.0)
    grid.answer(pack(FRAME))
    courier.tick()
    assert len(daemon.settled) == 1
    assert grid.replies == {}  # nothing is left behind in the SuperLink's store


def test_pulls_one_part_at_a_time_and_everything_small_together(
    courier: Courier, daemon: FakeDaemon, grid: FakeGrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = ("take", "take", "poll", "put")
    daemon.calls = [
        relay_pb2.Call(
            call_id=f"c{n}",
            node_id=5,
            method=method,
            frame=relay_pb2.Frame(envelope=b"e%d" % n, body=b""),
        )
        for n, method in enumerate(methods)
    ]
    courier.tick()
    pulls: list[list[str]] = []
    monkeypatch.setattr(grid, "pull_messages", lambda ids: pulls.append(list(ids)) or [])
    courier.tick()
    first, _, poll, put = grid.pushed
    assert pulls == [[poll, put], [first]]


def test_reports_a_message_that_the_superlink_does_not_take(
    courier: Courier, daemon: FakeDaemon, grid: FakeGrid
) -> None:
    grid.takes = False
    daemon.calls = [call()]
    courier.tick()
    assert daemon.settled[0].failure == "the SuperLink took no message"


def test_outlives_a_restart_of_the_daemon(
    courier: Courier, daemon: FakeDaemon, grid: FakeGrid
) -> None:
    daemon.calls = [call()]
    courier.tick()
    daemon.is_down = True
    assert not courier.tick()
    daemon.is_down = False
    grid.answer(pack(FRAME))
    courier.tick()
    assert daemon.settled[0].frame == FRAME
    assert len(daemon.sessions) == 2  # the daemon makes all its calls again


def test_every_courier_process_is_a_session_of_its_own(grid: FakeGrid, daemon: FakeDaemon) -> None:
    for _ in range(2):
        Courier(grid, daemon).tick()
    assert len(daemon.sessions) == 2


def test_a_small_frame_is_one_record_and_a_large_one_is_arrays_of_its_bytes() -> None:
    assert isinstance(pack(FRAME)["frame"], ConfigRecord)
    large = relay_pb2.Frame(envelope=b"envelope", body=b"\x07" * 300_000)
    array = pack(large)["frame"]["body"]
    assert isinstance(array, Array)
    assert (array.dtype, array.shape, array.stype) == ("uint8", (300_000,), "opaque")
    assert unpack(pack(large)) == large
