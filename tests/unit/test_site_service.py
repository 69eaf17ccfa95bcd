# SPDX-License-Identifier: Apache-2.0
"""The unix socket: who may connect, and what passes through."""

import os
import socket
import stat
import tempfile
import threading
from pathlib import Path

import grpc
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from allograft.errors import RejectedError, UnavailableError
from allograft.limits import LIMITS
from allograft.relay.frame import SignedFrame, check_answer, sign_frame, verify_frame
from allograft.relay.item import Item
from allograft.relay.poll import PollCall
from allograft.wire.v1 import relay_pb2, relay_pb2_grpc
from allograft_client import courier
from allograft_client.service import GuardedSocket, SiteService, peer_uid
from kit.coordinator import SiteKit


@pytest.fixture
def run():
    # Socket paths are limited to about 100 bytes; pytest's own directories can be longer.
    with tempfile.TemporaryDirectory(prefix="ag-") as directory:
        yield Path(directory) / "run"


@pytest.fixture
def site(tmp_path):
    kit = SiteKit(tmp_path)
    yield kit
    kit.store.close()


@pytest.fixture
def service(site, run):
    door = SiteService(
        site.exchange, run / "courier.sock", (), lambda *alarm: site.alarms.append(alarm)
    )
    yield run / "courier.sock"
    door.close()


def exchange(path, frame):
    with grpc.insecure_channel(f"unix:{path}") as channel:
        stub = relay_pb2_grpc.SiteCourierStub(channel)
        return stub.Exchange(relay_pb2.Frame(envelope=frame.envelope, body=frame.body), timeout=20)


def test_passes_a_call_in_and_its_answer_out(site, service):
    header = site.header()
    answer = exchange(service, sign_frame(header, PollCall().to_bytes(), site.coordinator))
    found = verify_frame(
        SignedFrame(answer.envelope, answer.body), (site.key.public,), "consortium", site.now
    )
    check_answer(header, found)


def test_gives_a_stranger_the_code_and_nothing_signed(site, service):
    with pytest.raises(grpc.RpcError) as error:
        exchange(service, SignedFrame(b"{}", b""))
    assert error.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert error.value.details() == "AG-SIG-001"
    assert site.alarms[0][0] == "AG-SIG-001"


def test_socket_and_directory_are_private(service):
    assert stat.S_IMODE(service.stat().st_mode) == 0o600
    assert stat.S_IMODE(service.parent.stat().st_mode) == 0o700


def test_hangs_up_on_other_users_before_a_byte_is_read(run):
    run.mkdir()
    alarms, reached = [], threading.Event()
    with socket.socket(socket.AF_UNIX) as inner:
        inner.bind(str(run / "inner"))
        inner.listen()
        door = GuardedSocket(
            run / "door", run / "inner", frozenset({os.geteuid() + 1}),
            lambda *alarm: (alarms.append(alarm), reached.set()),
        )  # fmt: skip
        with socket.socket(socket.AF_UNIX) as caller:
            caller.settimeout(20)
            caller.connect(str(run / "door"))
            assert caller.recv(1) == b""
        assert reached.wait(20)
        inner.setblocking(False)
        with pytest.raises(BlockingIOError):
            inner.accept()
        door.close()
    assert alarms[0][0] == "AG-SIT-005"


def test_reads_the_peers_user_from_the_kernel():
    left, right = socket.socketpair(socket.AF_UNIX)
    with left, right:
        assert peer_uid(left) == os.geteuid()


def test_refuses_a_socket_path_the_kernel_would_cut(site, tmp_path):
    with pytest.raises(RejectedError, match="AG-SIT-011"):
        SiteService(site.exchange, tmp_path / ("d" * 100) / "s", (), lambda *_: None)


def test_replaces_the_socket_of_a_killed_daemon(site, run):
    run.mkdir()
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(run / "courier.sock"))
    door = SiteService(site.exchange, run / "courier.sock", (), lambda *_: None)
    exchange(
        run / "courier.sock", sign_frame(site.header(), PollCall().to_bytes(), site.coordinator)
    )
    door.close()


# --- the courier ---


@pytest.fixture
def identity():
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 7, 1, 11
    yield
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = None


def message(content, kind):
    made = Message(content, 1, f"query.{kind}")
    made.metadata.__dict__["_message_id"] = "1"
    return made


def context(path) -> Context:
    return Context(7, 1, {courier.SOCKET_KEY: str(path)}, RecordDict(), {})


def test_the_courier_carries_a_whole_part_both_ways(site, service, identity):
    content = os.urandom(LIMITS.part_bytes)
    item: Item = site.outbox.add("dispatch", {"part-000.sealed": content})
    header = site.header("take", item=item.item_id)
    call = sign_frame(header, b"", site.coordinator)
    record = courier.to_record(relay_pb2.Frame(envelope=call.envelope, body=call.body))
    reply = courier.app(message(record, "take"), context(service))
    answer = courier.from_record(reply.content)
    found = verify_frame(
        SignedFrame(answer.envelope, answer.body), (site.key.public,), "consortium", site.now
    )
    check_answer(header, found)
    assert answer.body == content


def test_the_courier_says_so_when_the_daemon_is_away(run, identity):
    record = courier.to_record(relay_pb2.Frame(envelope=b"{}", body=b""))
    with pytest.raises(UnavailableError, match="AG-RLY-007"):
        courier.app(message(record, "poll"), context(run / "nobody.sock"))


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"frame": ConfigRecord({"envelope": b"{}"})}),
        RecordDict({"frame": ConfigRecord({"envelope": b"{}", "body": 7})}),
        RecordDict({"frame": ArrayRecord({"envelope": Array("uint8", (1,), "opaque", b"x")})}),
    ],
)
def test_the_courier_refuses_messages_of_another_shape(content, run, identity):
    with pytest.raises(RejectedError, match="AG-RLY-001"):
        courier.app(message(content, "poll"), context(run))
