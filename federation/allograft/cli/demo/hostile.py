# SPDX-License-Identifier: Apache-2.0
"""A hostile coordinator, for the demo: it holds the coordinator's key and a site's front door.

It takes the sealed packet that the real coordinator holds, flips one bit, describes the result with
fresh and consistent digests, signs every frame properly and delivers it through the same socket and
service that the site's courier uses. Only the donor's signature can expose it.
"""

from __future__ import annotations

import secrets
import shutil
from datetime import UTC, datetime
from pathlib import Path

import grpc

from allograft.crypto.keys import SigningKey
from allograft.errors import UnavailableError
from allograft.limits import LIMITS
from allograft.relay.frame import Header, Method, SignedFrame, sign_frame
from allograft.relay.item import Item, describe_item
from allograft.relay.poll import Announcement, PollCall
from allograft.wire.v1 import relay_pb2, relay_pb2_grpc

_DEADLINE_S = 30.0
_MESSAGE_BYTES = LIMITS.part_bytes + (1 << 20)


def tamper(packet: Path, copy: Path) -> None:
    """Copy a sealed packet and flip one bit in the middle of its first part."""
    shutil.copytree(packet, copy)
    part = copy / "part-000.sealed"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)


class HostileCoordinator:
    """Delivers any packet directory to a site, with the coordinator's own signing key."""

    def __init__(self, coordinator_id: str, key: SigningKey) -> None:
        self._name = coordinator_id
        self._key = key

    def deliver(self, packet: Path, site: str, socket: Path) -> None:
        """Announce a packet to a site and put every part of it into its inbox.

        Raises:
            UnavailableError: AG-DEM-003 if the site's door does not answer.
        """
        files = [path for path in packet.iterdir() if path.is_file()]
        item = describe_item("packet", self._name, site, files)
        options = [
            ("grpc.max_send_message_length", _MESSAGE_BYTES),
            ("grpc.max_receive_message_length", _MESSAGE_BYTES),
        ]
        with grpc.insecure_channel(f"unix:{socket}", options=options) as channel:
            door = relay_pb2_grpc.SiteCourierStub(channel)
            try:
                announced = PollCall(announced=(Announcement(item),)).to_bytes()
                self._send(door, site, "poll", announced)
                for index in range(item.part_count):
                    self._send(door, site, "put", read_part(packet, item, index), item, index)
                self._send(door, site, "poll", announced)
            except grpc.RpcError as error:
                raise UnavailableError(
                    "AG-DEM-003", f"the door of {site} does not answer"
                ) from error

    def _send(
        self,
        door: relay_pb2_grpc.SiteCourierStub,
        site: str,
        method: Method,
        body: bytes,
        item: Item | None = None,
        part: int = 0,
    ) -> None:
        header = Header(
            call=secrets.token_hex(16),
            method=method,
            sender=self._name,
            recipient=site,
            status="call",
            time=datetime.now(UTC).replace(microsecond=0),
            item=item.item_id if item else "",
            part=part,
        )
        frame: SignedFrame = sign_frame(header, body, self._key)
        door.Exchange(
            relay_pb2.Frame(envelope=frame.envelope, body=frame.body), timeout=_DEADLINE_S
        )


def read_part(directory: Path, item: Item, index: int) -> bytes:
    """The bytes of one part of an item whose files lie in a directory."""
    part = item.part(index)
    with (directory / part.file.name).open("rb") as handle:
        handle.seek(part.offset)
        return handle.read(part.size_bytes)
