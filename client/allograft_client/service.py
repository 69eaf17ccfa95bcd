# SPDX-License-Identifier: Apache-2.0
"""The site's one door for Flower processes: SiteCourier.Exchange on a unix socket.

Invariant: bytes reach the gRPC server only from processes whose user the kernel vouches for.
grpc-python does not show a peer's credentials, so `GuardedSocket` accepts on the public socket,
asks SO_PEERCRED, and only then joins the connection to the gRPC server's private socket, which
lies in a directory of its own with mode 0700.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import struct
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

from allograft.errors import RejectedError, UnavailableError
from allograft.limits import LIMITS
from allograft.relay.frame import SignedFrame
from allograft.wire.v1 import relay_pb2, relay_pb2_grpc
from allograft_client.exchange import Exchange
from allograft_client.settings import SOCKET_PATH_BYTES

#: A frame is one part and its signed header.
MESSAGE_BYTES = LIMITS.part_bytes + (1 << 20)

_CONNECTIONS = 8
_BLOCK_BYTES = 1 << 18
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


class _Courier(relay_pb2_grpc.SiteCourierServicer):
    def __init__(self, exchange: Exchange, alarm: Callable[[str, str], None]) -> None:
        self._exchange = exchange
        self._alarm = alarm

    def Exchange(  # noqa: N802  (the name is fixed by the .proto)
        self, request: relay_pb2.Frame, context: grpc.ServicerContext
    ) -> relay_pb2.Frame:
        try:
            answer = self._exchange.answer(SignedFrame(request.envelope, request.body))
        except RejectedError as error:
            self._alarm(error.code, error.cause)
            # The code alone: causes may name what a stranger should not learn.
            context.abort(grpc.StatusCode.PERMISSION_DENIED, error.code)
        except UnavailableError as error:
            self._alarm(error.code, error.cause)
            context.abort(grpc.StatusCode.UNAVAILABLE, error.code)
        return relay_pb2.Frame(envelope=answer.envelope, body=answer.body)


class GuardedSocket:
    """A unix socket that lets only some users through to another unix socket.

    Args:
        path: The public socket; its directory must be private to its owner.
        inner: The socket connections are joined to.
        uids: Users that may connect.
        alarm: Told about refused connections: a code and a cause.
    """

    def __init__(
        self,
        path: Path,
        inner: Path,
        uids: frozenset[int],
        alarm: Callable[[str, str], None],
    ) -> None:
        self._path = path
        self._inner = inner
        self._uids = uids
        self._alarm = alarm
        self._slots = threading.BoundedSemaphore(_CONNECTIONS)
        self._listener = _listen(path)
        self._thread = threading.Thread(target=self._accept, name="courier-door", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop accepting; open connections end with the inner server."""
        # shutdown() wakes the blocked accept(); close() alone would not.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(timeout=5)
        self._path.unlink(missing_ok=True)

    def _accept(self) -> None:
        while True:
            try:
                caller, _ = self._listener.accept()
            except OSError:
                return
            uid = peer_uid(caller)
            if uid not in self._uids:
                self._alarm("AG-SIT-005", f"connection of user {uid} refused")
                caller.close()
            elif not self._slots.acquire(blocking=False):
                self._alarm("AG-SIT-005", "too many connections to the courier socket")
                caller.close()
            else:
                threading.Thread(target=self._join, args=(caller,), daemon=True).start()

    def _join(self, caller: socket.socket) -> None:
        try:
            with caller, socket.socket(socket.AF_UNIX) as inner:
                inner.connect(str(self._inner))
                back = threading.Thread(target=_copy, args=(inner, caller), daemon=True)
                back.start()
                _copy(caller, inner)
                back.join()
        except OSError:
            # One side hung up; gRPC clients connect again by themselves.
            return
        finally:
            self._slots.release()


def peer_uid(connection: socket.socket) -> int:
    """The user at the other end of a unix socket, as the kernel recorded it at connect()."""
    content = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(content)
    return int(uid)


def _copy(source: socket.socket, target: socket.socket) -> None:
    """Copy until the source ends, then end the target's input too."""
    with contextlib.suppress(OSError):
        while block := source.recv(_BLOCK_BYTES):
            target.sendall(block)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def _listen(path: Path) -> socket.socket:
    if len(os.fsencode(path)) > SOCKET_PATH_BYTES:
        raise RejectedError("AG-SIT-011", f"{len(os.fsencode(path))} bytes: {path}")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.parent.chmod(0o700)
    # The state directory's lock is held: a socket file here is what a killed daemon left.
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(_CONNECTIONS)
    except OSError:
        listener.close()
        raise
    return listener


class SiteService:
    """The running door; `close` it to stop.

    Args:
        exchange: Answers the calls.
        path: The public unix socket.
        uids: Users that may connect besides our own.
        alarm: Told about refusals: a code and a cause.
    """

    def __init__(
        self,
        exchange: Exchange,
        path: Path,
        uids: tuple[int, ...],
        alarm: Callable[[str, str], None],
    ) -> None:
        self._private = Path(tempfile.mkdtemp(prefix="allograft-"))
        inner = self._private / "grpc.sock"
        self._server = grpc.server(
            ThreadPoolExecutor(max_workers=2, thread_name_prefix="exchange"),
            options=[
                ("grpc.max_receive_message_length", MESSAGE_BYTES),
                ("grpc.max_send_message_length", MESSAGE_BYTES),
            ],
        )
        relay_pb2_grpc.add_SiteCourierServicer_to_server(_Courier(exchange, alarm), self._server)
        try:
            self._server.add_insecure_port(f"unix:{inner}")
            self._server.start()
            self._door = GuardedSocket(path, inner, frozenset({os.geteuid(), *uids}), alarm)
        except (OSError, RejectedError):
            self._server.stop(grace=None).wait()
            shutil.rmtree(self._private, ignore_errors=True)
            raise

    def close(self) -> None:
        """Stop listening and wait for the call in hand."""
        self._door.close()
        self._server.stop(grace=2).wait()
        shutil.rmtree(self._private, ignore_errors=True)
