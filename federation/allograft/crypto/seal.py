# SPDX-License-Identifier: Apache-2.0
"""Sealing: a stream becomes ciphertext that only holders of its content key can open.

The stream format is Cobblestone-256 (C2SP chunked-encryption): truncation, reordering and another
context are refused, and the key is committed to, so one ciphertext cannot open to two contents.
A content key is wrapped per recipient with HPKE (RFC 9180 base mode, KEM X-Wing); base mode does
not name its sender, so every sealed file also stands in a signed dispatch.

Invariant: memory is constant. Plaintext that `open_stream` wrote is unverified until it returns,
so the sink is always a private temporary file. See protos/spec/packet.md.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

from cryptography.cobblestone import Cobblestone256Decryptor, Cobblestone256Encryptor
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from allograft.crypto.keys import SealingKey, SealingPublicKey
from allograft.errors import RejectedError

CONTENT_KEY_BYTES = 32
#: 1120 bytes of X-Wing encapsulation, the key, and the tag of AES-256-GCM.
WRAP_BYTES = 1120 + CONTENT_KEY_BYTES + 16

_CHUNK = 16_384
_TAG = 16
_PREFIX = 24 + 32  # salt and key commitment
_BLOCK = 1 << 20
_SLOTS = 3  # one block is read, one is transformed, one is hashed
_SUITE = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


class Source(Protocol):
    """A file opened for reading in binary mode."""

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill the buffer as far as possible and return the count; 0 at the end."""


class Sink(Protocol):
    """A file opened for writing in binary mode."""

    def write(self, buffer: memoryview, /) -> int:
        """Write the whole buffer."""


@dataclass(frozen=True, slots=True)
class Sealed:
    """What went in and what came out of `seal_stream`."""

    plain_bytes: int
    plain_sha256: str
    sealed_bytes: int
    sealed_sha256: str


@dataclass(frozen=True, slots=True)
class Opened:
    """What went in and what came out of `open_stream`, once the end was authenticated."""

    plain_bytes: int
    plain_sha256: str
    sealed_bytes: int
    sealed_sha256: str


def generate_content_key() -> bytes:
    """Make a fresh content key; each is used for one stream only."""
    return Cobblestone256Encryptor.generate_key()


def sealed_size(plain_bytes: int) -> int:
    """The one valid length of a sealed stream: the last chunk is always the short one."""
    whole, rest = divmod(plain_bytes, _CHUNK)
    return _PREFIX + whole * (_CHUNK + _TAG) + rest + _TAG


def seal_stream(source: Source, sink: Sink, key: bytes, context: bytes) -> Sealed:
    """Seal everything a source holds.

    Args:
        source: Read from its current position to its end.
        sink: Receives the ciphertext.
        key: A content key made for this stream.
        context: What the ciphertext is bound to; opening it under another context fails.
    """
    encryptor = Cobblestone256Encryptor(key, context)
    flow = _pump(source, sink, encryptor.update_into, encryptor.finalize)
    return Sealed(flow.in_bytes, flow.in_sha256, flow.out_bytes, flow.out_sha256)


def open_stream(
    source: Source,
    sink: Sink,
    key: bytes,
    context: bytes,
    max_plain_bytes: int,
    watch: Callable[[memoryview], None] | None = None,
) -> Opened:
    """Open a sealed stream into a private sink.

    Args:
        source: Read from its current position to its end.
        sink: Receives the plaintext; worthless unless this function returns.
        key: The content key.
        context: The context the stream was sealed under.
        max_plain_bytes: More than this is refused while reading.
        watch: Called with the plaintext too, block by block in order, on a thread of its own. The
            tags of a block were verified before; that the stream is whole and the one that was
            announced is known only when this function returned. Blocks are reused: it keeps none.

    Raises:
        RejectedError: AG-SEA-001 if altered, cut or bound to another context; AG-SEA-003 if larger
            than `max_plain_bytes`.
    """
    try:
        decryptor = Cobblestone256Decryptor(key, context)
        limit = sealed_size(max_plain_bytes)
        flow = _pump(source, sink, decryptor.update_into, decryptor.finalize, limit, watch)
    except (InvalidTag, ValueError) as error:
        raise RejectedError("AG-SEA-001", "a sealed file does not open") from error
    return Opened(flow.out_bytes, flow.out_sha256, flow.in_bytes, flow.in_sha256)


def seal_bytes(plain: bytes, key: bytes, context: bytes) -> bytes:
    """Seal a small document in memory."""
    sink = io.BytesIO()
    seal_stream(io.BytesIO(plain), sink, key, context)
    return sink.getvalue()


def open_bytes(sealed: bytes, key: bytes, context: bytes) -> bytes:
    """Open a small sealed document in memory.

    Raises:
        RejectedError: AG-SEA-001 if altered, cut or bound to another context.
    """
    sink = io.BytesIO()
    open_stream(io.BytesIO(sealed), sink, key, context, max_plain_bytes=len(sealed))
    return sink.getvalue()


def wrap_key(key: bytes, recipient: SealingPublicKey, info: bytes) -> bytes:
    """Wrap a content key for one recipient; `info` is what the wrap is bound to.

    Raises:
        RejectedError: AG-KEY-001 if the recipient's key is malformed.
    """
    return _SUITE.encrypt(key, recipient.hpke, info=info)


def unwrap_key(wrap: bytes, key: SealingKey, info: bytes) -> bytes:
    """Recover a content key.

    Raises:
        RejectedError: AG-SEA-002 if the wrap is for another key, another use, or damaged.
    """
    try:
        content_key = _SUITE.decrypt(wrap, key.hpke, info=info)
    except (InvalidTag, ValueError) as error:
        raise RejectedError("AG-SEA-002", "a key wrap does not open with our key") from error
    if len(content_key) != CONTENT_KEY_BYTES:
        raise RejectedError("AG-SEA-002", "a key wrap holds no content key")
    return content_key


@dataclass(frozen=True, slots=True)
class _Flow:
    in_bytes: int
    in_sha256: str
    out_bytes: int
    out_sha256: str


class _Lane:
    """Gives blocks in order to workers on a thread each, while the caller goes on with the next.

    SHA-256 is two to four times slower than the cipher and releases the GIL, so the two hashes
    of a stream run beside it. A slot's buffer is reused only after all workers are done with it.
    """

    def __init__(self, stack: ExitStack, *workers: Callable[[memoryview], None]) -> None:
        self._workers = [(stack.enter_context(ThreadPoolExecutor(1)), work) for work in workers]
        self._pending: list[list[Future[None]]] = [[] for _ in range(_SLOTS)]
        self.size_bytes = 0

    def feed(self, slot: int, block: memoryview) -> None:
        self.size_bytes += len(block)
        self._pending[slot] = [pool.submit(work, block) for pool, work in self._workers]

    def wait(self, slot: int) -> None:
        for pending in self._pending[slot]:
            pending.result()

    def drain(self) -> None:
        for slot in range(_SLOTS):
            self.wait(slot)


def _pump(
    source: Source,
    sink: Sink,
    update_into: Callable[[memoryview, memoryview], int],
    finalize: Callable[[], bytes],
    max_in_bytes: int | None = None,
    watch: Callable[[memoryview], None] | None = None,
) -> _Flow:
    """Move a stream through a cipher block by block, hashing both sides."""
    # Large enough for either direction: a chunk may be held back, and tags are added.
    out_size = _BLOCK + _BLOCK // 1024 + _CHUNK + 128
    in_slots = [memoryview(bytearray(_BLOCK)) for _ in range(_SLOTS)]
    out_slots = [memoryview(bytearray(out_size)) for _ in range(_SLOTS)]
    in_digest, out_digest = hashlib.sha256(), hashlib.sha256()
    with ExitStack() as stack:
        incoming = _Lane(stack, in_digest.update)
        outgoing = _Lane(stack, out_digest.update, *([watch] if watch else []))
        slot = 0
        while count := source.readinto(in_slots[slot]):
            if max_in_bytes is not None and incoming.size_bytes + count > max_in_bytes:
                raise RejectedError("AG-SEA-003", "a sealed file is larger than announced")
            block = in_slots[slot][:count]
            incoming.feed(slot, block)
            outgoing.wait(slot)
            written = out_slots[slot][: update_into(block, out_slots[slot])]
            outgoing.feed(slot, written)
            sink.write(written)
            slot = (slot + 1) % _SLOTS
            incoming.wait(slot)
        last = memoryview(finalize())
        outgoing.wait(slot)
        outgoing.feed(slot, last)
        sink.write(last)
        incoming.drain()
        outgoing.drain()
    return _Flow(
        incoming.size_bytes, in_digest.hexdigest(), outgoing.size_bytes, out_digest.hexdigest()
    )
