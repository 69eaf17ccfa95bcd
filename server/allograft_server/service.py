# SPDX-License-Identifier: Apache-2.0
"""The door through which the ServerApp reaches the coordinator daemon: gRPC on a unix socket.

The socket has mode 0600 in a directory of mode 0700, so only processes of the coordinator's own
user pass. What comes through is not trusted for that: every answer is verified by `relay`.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import grpc

from allograft.errors import AllograftError, RejectedError
from allograft.limits import LIMITS
from allograft.relay.frame import SignedFrame
from allograft.wire.v1 import relay_pb2, relay_pb2_grpc
from allograft_server.relay import OnlineNode, Relay

# One frame with its part; the envelope and the field headers take far less than the rest.
_MESSAGE_BYTES = LIMITS.part_bytes + LIMITS.poll_bytes
_SOCKET_PATH_BYTES = 107  # sun_path of Linux, less its final zero


class CourierServicer(relay_pb2_grpc.CoordinatorCourierServicer):
    """Translates between protobuf and the relay."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay

    def Next(  # noqa: N802  (gRPC's name)
        self, request: relay_pb2.NextRequest, context: grpc.ServicerContext
    ) -> relay_pb2.NextReply:
        """Calls to make now."""
        online = [OnlineNode(node.node_id, node.public_key) for node in request.online]
        try:
            calls = self._relay.next_calls(online, request.session)
        except AllograftError as error:
            # A full disk, say. The courier waits and asks again; no text leaves, only the code.
            context.abort(grpc.StatusCode.UNAVAILABLE, error.code)
        return relay_pb2.NextReply(
            calls=[
                relay_pb2.Call(
                    call_id=call.header.call,
                    node_id=call.node_id,
                    method=call.header.method,
                    frame=relay_pb2.Frame(envelope=call.frame.envelope, body=call.frame.body),
                )
                for call in calls
            ]
        )

    def Settle(  # noqa: N802  (gRPC's name)
        self, request: relay_pb2.SettleRequest, context: grpc.ServicerContext
    ) -> relay_pb2.SettleReply:
        """An answer, or the news that there is none."""
        answer = None
        if request.WhichOneof("outcome") == "frame":
            answer = SignedFrame(request.frame.envelope, request.frame.body)
        self._relay.settle(request.call_id, answer)
        return relay_pb2.SettleReply()


class CourierService:
    """The running server; a context manager."""

    def __init__(self, socket: Path, relay: Relay) -> None:
        """Prepare the server.

        Raises:
            RejectedError: AG-CRD-001 if the path is too long for a socket.
        """
        if len(os.fsencode(socket)) > _SOCKET_PATH_BYTES:
            raise RejectedError("AG-CRD-001", "the state directory's path is too long for a socket")
        self._socket = socket
        self._server = grpc.server(
            # Two threads: while one answer is stored, the next may arrive.
            ThreadPoolExecutor(max_workers=2, thread_name_prefix="courier"),
            options=(
                ("grpc.max_receive_message_length", _MESSAGE_BYTES),
                ("grpc.max_send_message_length", _MESSAGE_BYTES),
            ),
        )
        relay_pb2_grpc.add_CoordinatorCourierServicer_to_server(
            CourierServicer(relay), self._server
        )

    def __enter__(self) -> CourierService:
        self._socket.parent.mkdir(mode=0o700, exist_ok=True)
        self._socket.parent.chmod(0o700)
        self._socket.unlink(missing_ok=True)
        self._server.add_insecure_port(f"unix:{self._socket}")
        self._socket.chmod(0o600)
        self._server.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.stop(grace=2).wait(timeout=5)
        self._socket.unlink(missing_ok=True)
