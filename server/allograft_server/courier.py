# SPDX-License-Identifier: Apache-2.0
"""The coordinator's courier: a Flower ServerApp that carries frames and understands none.

It asks the coordinator daemon for calls to nodes that are online, sends each as a message, and
hands back each answer. All state that matters is in the daemon: when this process dies, the calls
it carried are made again. Flower delivers at most once, so a call that brings no answer is reported
as failed and never repeated here. See protos/spec/relay.md.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol

import grpc
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from allograft.limits import LIMITS
from allograft.relay.app import BODY, ENVELOPE, MESSAGE_TYPES, RECORD, SMALL_BYTES, STYPE
from allograft.wire.v1 import relay_pb2, relay_pb2_grpc
from allograft_server.settings import SOCKET_VARIABLE

# A node that has answered nothing for this long has lost what it was sent.
STALL_S = 120.0
# Each look is a request to the SuperLink, which takes about 20 ms of a processor. A SuperNode takes
# more than a second for a message; only parts, one behind another, are worth looking for often.
_PARTS_TICK_S = 0.25
_TICK_S = 0.5
_NODES_S = 2.0
_MESSAGE_TTL_S = float(LIMITS.frame_age_s)
_RPC_TIMEOUT_S = 30.0
_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", 2 * LIMITS.part_bytes),
    ("grpc.max_send_message_length", 2 * LIMITS.part_bytes),
    ("grpc.max_reconnect_backoff_ms", 2000),
)

app = ServerApp()


@dataclass(frozen=True, slots=True)
class Carried:
    """A call on its way; without a call id it is no longer waited for."""

    call_id: str
    node_id: int
    method: str
    sent_s: float


class Node(Protocol):
    """What Flower's public API says of a node."""

    node_id: int
    public_key: bytes


@app.main()  # type: ignore[untyped-decorator]  # flwr is untyped here
def main(grid: Grid, context: Context) -> None:
    """Carry frames until the process is stopped."""
    with grpc.insecure_channel(f"unix:{os.environ[SOCKET_VARIABLE]}", _CHANNEL_OPTIONS) as channel:
        courier = Courier(grid, relay_pb2_grpc.CoordinatorCourierStub(channel))
        while True:
            if not courier.tick():
                time.sleep(_PARTS_TICK_S if courier.carries_parts else _TICK_S)


class Courier:
    """One round at a time between the grid and the daemon."""

    def __init__(self, grid: Grid, daemon: relay_pb2_grpc.CoordinatorCourierStub) -> None:
        self._grid = grid
        self._daemon = daemon
        self._session = secrets.token_hex(16)
        self._carried: dict[str, Carried] = {}  # by Flower's message id
        self._answered_s: dict[int, float] = {}  # by node: when it last answered
        self._online: dict[int, Node] = {}
        self._looked_s = -_NODES_S

    @property
    def carries_parts(self) -> bool:
        """Whether any part is on its way."""
        return any(carried.method != "poll" for carried in self._carried.values())

    def tick(self) -> bool:
        """Send what is to be sent, bring what was answered; false if nothing moved."""
        if time.monotonic() - self._looked_s >= _NODES_S:
            nodes = (node for node in self._grid.get_nodes() if node.status == "online")
            self._online = {node.node_id: node for node in nodes}
            self._looked_s = time.monotonic()
        try:
            sent = self._send(self._online.values())
            return self._collect() or sent
        except grpc.RpcError as error:
            if error.code() not in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}:
                raise
            # The daemon restarts, or an answer did not reach it. A new session makes it forget the
            # calls under way and make them again; what still comes back for them is dropped there.
            self._session = secrets.token_hex(16)
            return False

    def _send(self, online: Iterable[Node]) -> bool:
        nodes = [
            relay_pb2.Node(node_id=node.node_id, public_key=node.public_key) for node in online
        ]
        request = relay_pb2.NextRequest(online=nodes, session=self._session)
        reply = self._daemon.Next(request, timeout=_RPC_TIMEOUT_S)
        for call in reply.calls:
            message = Message(
                pack(call.frame),
                dst_node_id=call.node_id,
                message_type=MESSAGE_TYPES[call.method],
                ttl=_MESSAGE_TTL_S,
            )
            # One by one: a push holds all its messages in memory several times.
            ids = list(self._grid.push_messages([message]))
            if ids and ids[0]:
                self._carried[ids[0]] = Carried(
                    call.call_id, call.node_id, call.method, time.monotonic()
                )
            else:
                self._fail(call.call_id, "the SuperLink took no message")
        return bool(reply.calls)

    def _collect(self) -> bool:
        moved = False
        for message_ids in self._batches():
            # For a node that went offline this pull also deletes the message from the SuperLink.
            for reply in self._grid.pull_messages(message_ids):
                carried = self._carried.pop(reply.metadata.reply_to_message_id, None)
                if carried is not None:
                    self._settle(carried, reply)
                    moved = True
        for message_id, carried in list(self._carried.items()):
            if carried.node_id not in self._online:
                del self._carried[message_id]
                self._fail(carried.call_id, "the node went offline")
            elif carried.call_id and self._has_stalled(carried):
                # Kept without its call: a late reply, or Flower's notice that the message expired,
                # is still pulled, because what nobody pulls stays in the SuperLink's store.
                self._carried[message_id] = replace(carried, call_id="")
                self._fail(carried.call_id, "the node did not answer")
        return moved

    def _batches(self) -> list[list[str]]:
        """What to pull at once: all small answers, and one by one the next part of each node.

        Each pull is a request, and a pull of several parts would hold them all in memory.
        """
        small: list[str] = []
        takes: dict[int, str] = {}
        for message_id, carried in self._carried.items():
            if carried.method == "take":
                takes.setdefault(carried.node_id, message_id)
            else:
                small.append(message_id)
        return ([small] if small else []) + [[message_id] for message_id in takes.values()]

    def _has_stalled(self, carried: Carried) -> bool:
        since_s = max(carried.sent_s, self._answered_s.get(carried.node_id, 0.0))
        return time.monotonic() - since_s > STALL_S

    def _settle(self, carried: Carried, reply: Message) -> None:
        if not carried.call_id:
            return
        if reply.has_error():
            self._fail(carried.call_id, f"Flower error {reply.error.code}")
            return
        self._answered_s[carried.node_id] = time.monotonic()
        frame = unpack(reply.content)
        if frame is None:
            self._fail(carried.call_id, "the answer is no frame")
            return
        request = relay_pb2.SettleRequest(call_id=carried.call_id, frame=frame)
        self._daemon.Settle(request, timeout=_RPC_TIMEOUT_S)

    def _fail(self, call_id: str, reason: str) -> None:
        if not call_id:
            return
        request = relay_pb2.SettleRequest(call_id=call_id, failure=reason)
        self._daemon.Settle(request, timeout=_RPC_TIMEOUT_S)


def pack(frame: relay_pb2.Frame) -> RecordDict:
    """A frame as the content of a message.

    A small frame is one record of bytes: each object of a message costs a request at every hop,
    and a record has a third of the objects of two arrays. Only arrays are moved in chunks.
    """
    if len(frame.envelope) + len(frame.body) <= SMALL_BYTES:
        return RecordDict({RECORD: ConfigRecord({ENVELOPE: frame.envelope, BODY: frame.body})})
    return RecordDict(
        {RECORD: ArrayRecord({ENVELOPE: _array(frame.envelope), BODY: _array(frame.body)})}
    )


def unpack(content: RecordDict) -> relay_pb2.Frame | None:
    """The frame in a message, or nothing if the content has another shape."""
    record = content.get(RECORD)
    if not isinstance(record, ArrayRecord | ConfigRecord) or set(record) != {ENVELOPE, BODY}:
        return None
    fields = [getattr(record[name], "data", record[name]) for name in (ENVELOPE, BODY)]
    if not all(isinstance(field, bytes) for field in fields):
        return None
    return relay_pb2.Frame(envelope=fields[0], body=fields[1])


def _array(content: bytes) -> Array:
    return Array(dtype="uint8", shape=(len(content),), stype=STYPE, data=content)
