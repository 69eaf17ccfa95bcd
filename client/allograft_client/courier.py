# SPDX-License-Identifier: Apache-2.0
"""The site's Flower app: it carries opaque bytes between Flower and the site daemon's socket.

Invariant: a handler never looks into a frame, never keeps one, never trains and never waits for
more than one call of the local socket. The socket's path comes from the SuperNode's own command
line (`--node-config`), never from the submitted app. See protos/spec/relay.md.
"""

from __future__ import annotations

from functools import cache

import grpc
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from allograft.errors import RejectedError, UnavailableError
from allograft.limits import LIMITS
from allograft.relay.app import BODY, ENVELOPE, MESSAGE_TYPES, RECORD, SMALL_BYTES, STYPE
from allograft.wire.v1 import relay_pb2, relay_pb2_grpc

#: Key of the SuperNode's node configuration that names the daemon's socket.
SOCKET_KEY = "courier-socket"

_DEADLINE_S = 60.0
_MESSAGE_BYTES = LIMITS.part_bytes + (1 << 20)
_OPTIONS = (
    ("grpc.max_send_message_length", _MESSAGE_BYTES),
    ("grpc.max_receive_message_length", _MESSAGE_BYTES),
)

app = ClientApp()


@cache
def _door(socket_path: str) -> relay_pb2_grpc.SiteCourierStub:
    return relay_pb2_grpc.SiteCourierStub(
        grpc.insecure_channel(f"unix:{socket_path}", options=_OPTIONS)
    )


def to_record(frame: relay_pb2.Frame) -> RecordDict:
    """A frame as Flower carries it: bytes that Flower does not interpret.

    A small frame is one record, because each object of a message costs a request at every hop;
    a large one is two arrays, because only arrays are moved in chunks.
    """
    if len(frame.envelope) + len(frame.body) <= SMALL_BYTES:
        return RecordDict({RECORD: ConfigRecord({ENVELOPE: frame.envelope, BODY: frame.body})})
    return RecordDict(
        {RECORD: ArrayRecord({ENVELOPE: _to_array(frame.envelope), BODY: _to_array(frame.body)})}
    )


def from_record(content: RecordDict) -> relay_pb2.Frame:
    """The frame inside a Flower message.

    Raises:
        RejectedError: AG-RLY-001 if the message has another shape.
    """
    record = content.get(RECORD)
    if isinstance(record, ArrayRecord | ConfigRecord) and set(record) == {ENVELOPE, BODY}:
        fields = [getattr(record[name], "data", record[name]) for name in (ENVELOPE, BODY)]
        if len(content) == 1 and all(isinstance(field, bytes) for field in fields):
            return relay_pb2.Frame(envelope=fields[0], body=fields[1])
    raise RejectedError("AG-RLY-001", "a Flower message does not hold one frame")


def _to_array(content: bytes) -> Array:
    return Array(dtype="uint8", shape=(len(content),), stype=STYPE, data=content)


def carry(message: Message, context: Context) -> Message:
    """Pass one frame to the daemon and its answer back.

    Raises:
        UnavailableError: AG-RLY-007 if the daemon does not answer; Flower reports the failure and
            the coordinator calls again later.
    """
    call = from_record(message.content)
    try:
        answer = _door(str(context.node_config[SOCKET_KEY])).Exchange(call, timeout=_DEADLINE_S)
    except grpc.RpcError as error:
        raise UnavailableError("AG-RLY-007", f"site daemon: {error.code().name}") from error
    return Message(to_record(answer), reply_to=message)


for message_type in MESSAGE_TYPES.values():
    app.query(message_type.removeprefix("query."))(carry)
