# SPDX-License-Identifier: Apache-2.0
"""Frames: one signed call of the coordinator, or one signed answer of a site.

Flower authenticates nodes by a timestamp and binds neither messages nor replies (a registered node
can answer a message meant for another). So every call, answer and acknowledgement carries our own
signature over call id, method, sender, recipient, item, part and the digest of the body. The
courier passes frames on unread. See protos/spec/relay.md.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from allograft.crypto import canonical, dsse
from allograft.crypto.keys import SigningKey, VerifyKey
from allograft.errors import RejectedError
from allograft.limits import LIMITS

PAYLOAD_TYPE = "application/vnd.allograft.relay+json"

#: poll: exchange lists and acknowledgements. take: one part out of the outbox.
#: put: one part into the inbox.
Method = Literal["poll", "take", "put"]
Status = Literal["call", "ok", "refused"]

_FIELDS = {
    "v", "call", "method", "from", "to", "item", "part", "status", "code", "time",
    "body_bytes", "body_sha256",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Header:
    """What a frame's signature binds.

    Attributes:
        call: 32 hex digits, made by the coordinator, repeated in the answer.
        item: The item a `take` or `put` is about; empty for `poll`.
        part: The part number within the item; 0 for `poll`.
        code: The error code of a refused call; empty otherwise.
    """

    call: str
    method: Method
    sender: str
    recipient: str
    status: Status
    time: datetime
    item: str = ""
    part: int = 0
    code: str = ""


@dataclass(frozen=True, slots=True)
class SignedFrame:
    """A header in its signed envelope, beside the body it binds."""

    envelope: bytes
    body: bytes


def sign_frame(header: Header, body: bytes, key: SigningKey) -> SignedFrame:
    """Sign a header together with the digest of its body."""
    payload = canonical.dumps(
        {
            "v": 1,
            "call": header.call,
            "method": header.method,
            "from": header.sender,
            "to": header.recipient,
            "item": header.item,
            "part": header.part,
            "status": header.status,
            "code": header.code,
            "time": canonical.format_time(header.time),
            "body_bytes": len(body),
            "body_sha256": hashlib.sha256(body).hexdigest(),
        }
    )
    return SignedFrame(dsse.sign(payload, PAYLOAD_TYPE, [key]).to_bytes(), body)


def peek_sender(frame: SignedFrame) -> str:
    """The sender a frame claims, to choose the keys to verify it with. Not yet trusted."""
    payload = dsse.Envelope.from_bytes(frame.envelope).payload
    return canonical.as_text(_read_fields(payload)["from"])


def verify_frame(frame: SignedFrame, keys: tuple[VerifyKey, ...], me: str, now: datetime) -> Header:
    """Verify a frame and return its header.

    Args:
        frame: The frame as received.
        keys: The sender's signing keys from the roster.
        me: Our own name; frames for others are refused.
        now: The current time (UTC).

    Raises:
        RejectedError: AG-RLY-001 malformed, -002 bad signature, -003 not for us, -004 stale,
            -005 the body is not the signed one.
    """
    try:
        verified = dsse.verify(frame.envelope, PAYLOAD_TYPE, keys)
    except RejectedError as error:
        raise RejectedError("AG-RLY-002", error.cause) from error
    fields = _read_fields(verified.payload)
    header = _read_header(fields)
    if header.recipient != me:
        raise RejectedError("AG-RLY-003", f"frame for {header.recipient} arrived at {me}")
    if abs(now - header.time) > timedelta(seconds=LIMITS.frame_age_s):
        raise RejectedError("AG-RLY-004", f"frame of {canonical.format_time(header.time)}")
    body_differs = fields["body_bytes"] != len(frame.body)
    if body_differs or fields["body_sha256"] != hashlib.sha256(frame.body).hexdigest():
        raise RejectedError("AG-RLY-005", "the body of a frame is not the signed one")
    return header


def check_answer(call: Header, answer: Header) -> None:
    """Refuse an answer that belongs to another call.

    Raises:
        RejectedError: AG-RLY-003.
    """
    expected = (call.call, call.method, call.recipient, call.sender, call.item, call.part)
    found = (
        answer.call, answer.method, answer.sender, answer.recipient, answer.item, answer.part,
    )  # fmt: skip
    if expected != found or answer.status == "call":
        raise RejectedError("AG-RLY-003", "the answer does not belong to this call")


def _read_fields(payload: bytes) -> dict[str, canonical.Json]:
    try:
        return canonical.as_object(canonical.loads(payload), _FIELDS)
    except RejectedError as error:
        raise RejectedError("AG-RLY-001", f"frame header: {error.cause}") from error


def _read_header(fields: dict[str, canonical.Json]) -> Header:
    try:
        method, status = canonical.as_text(fields["method"]), canonical.as_text(fields["status"])
        if fields["v"] != 1 or method not in {"poll", "take", "put"}:
            raise RejectedError("AG-RLY-001", "unknown frame version or method")
        if status not in {"call", "ok", "refused"}:
            raise RejectedError("AG-RLY-001", "unknown frame status")
        return Header(
            call=canonical.as_text(fields["call"]),
            method=method,  # type: ignore[arg-type]  # checked against the literals above
            sender=canonical.as_text(fields["from"]),
            recipient=canonical.as_text(fields["to"]),
            status=status,  # type: ignore[arg-type]
            time=canonical.parse_time(canonical.as_text(fields["time"])),
            item=canonical.as_text(fields["item"]),
            part=canonical.as_int(fields["part"]),
            code=canonical.as_text(fields["code"]),
        )
    except RejectedError as error:
        if error.code == "AG-RLY-001":
            raise
        raise RejectedError("AG-RLY-001", f"frame header: {error.cause}") from error
