# SPDX-License-Identifier: Apache-2.0
"""Claims about sealed streams and key wraps."""

import hashlib
import io

import pytest

from allograft.crypto import seal
from allograft.crypto.keys import SealingKey
from allograft.errors import RejectedError

KEY = bytes(range(32))


@pytest.mark.parametrize("size", [0, 1, 16383, 16384, 16385, 1 << 20, (1 << 20) + 1, 3_500_000])
def test_opens_what_it_sealed_and_tells_both_digests(size):
    plain = hashlib.shake_128(b"x").digest(size)
    sealed_sink, plain_sink = io.BytesIO(), io.BytesIO()
    sealed = seal.seal_stream(io.BytesIO(plain), sealed_sink, KEY, b"context")
    ciphertext = sealed_sink.getvalue()
    opened = seal.open_stream(io.BytesIO(ciphertext), plain_sink, KEY, b"context", size)
    assert plain_sink.getvalue() == plain
    assert sealed.plain_sha256 == opened.plain_sha256 == hashlib.sha256(plain).hexdigest()
    assert sealed.sealed_sha256 == opened.sealed_sha256 == hashlib.sha256(ciphertext).hexdigest()
    assert sealed.sealed_bytes == len(ciphertext) == seal.sealed_size(size)
    assert sealed.plain_bytes == opened.plain_bytes == size


def test_seals_the_same_bytes_differently_each_time():
    assert seal.seal_bytes(b"x", KEY, b"") != seal.seal_bytes(b"x", KEY, b"")


SEALED = seal.seal_bytes(bytes(50_000), KEY, b"context")
DAMAGE = {
    "cut at a chunk boundary": SEALED[: 56 + 16400],
    "cut by a byte": SEALED[:-1],
    "cut to the header": SEALED[:56],
    "empty": b"",
    "appended": SEALED + b"\0",
    "chunks swapped": SEALED[:56] + SEALED[16456:32856] + SEALED[56:16456] + SEALED[32856:],
    "salt changed": bytes([SEALED[0] ^ 1]) + SEALED[1:],
    "commitment changed": SEALED[:30] + bytes([SEALED[30] ^ 1]) + SEALED[31:],
    "last bit changed": SEALED[:-1] + bytes([SEALED[-1] ^ 1]),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_refuses_damaged_streams(name):
    with pytest.raises(RejectedError) as caught:
        seal.open_bytes(DAMAGE[name], KEY, b"context")
    assert caught.value.code == "AG-SEA-001"


@pytest.mark.parametrize(("key", "context"), [(bytes(32), b"context"), (KEY, b"other"), (b"", b"")])
def test_refuses_another_key_or_context(key, context):
    with pytest.raises(RejectedError) as caught:
        seal.open_bytes(SEALED, key, context)
    assert caught.value.code == "AG-SEA-001"


def test_refuses_a_stream_larger_than_announced_before_writing_it_all():
    sealed = seal.seal_bytes(bytes(8 << 20), KEY, b"")
    sink = io.BytesIO()
    with pytest.raises(RejectedError) as caught:
        seal.open_stream(io.BytesIO(sealed), sink, KEY, b"", max_plain_bytes=1 << 20)
    assert caught.value.code == "AG-SEA-003"
    assert len(sink.getvalue()) <= 2 << 20


@pytest.mark.parametrize("size", [0, 1, 3_500_000])
def test_who_watches_sees_the_plaintext_in_order(size):
    plain = hashlib.shake_128(b"x").digest(size)
    sealed, seen = seal.seal_bytes(plain, KEY, b""), bytearray()
    seal.open_stream(io.BytesIO(sealed), io.BytesIO(), KEY, b"", size, seen.extend)
    assert seen == plain


def test_who_watches_sees_only_chunks_whose_tags_are_right():
    plain = hashlib.shake_128(b"x").digest(3_500_000)
    sealed, seen = bytearray(seal.seal_bytes(plain, KEY, b"")), bytearray()
    sealed[2_000_000] ^= 1
    with pytest.raises(RejectedError) as caught:
        seal.open_stream(io.BytesIO(sealed), io.BytesIO(), KEY, b"", len(plain), seen.extend)
    assert caught.value.code == "AG-SEA-001"
    assert 0 < len(seen) < 2_000_000
    assert plain.startswith(seen)


def test_what_a_watcher_raises_stops_the_stream():
    def refuse(_block):
        raise OverflowError

    sealed = seal.seal_bytes(bytes(5 << 20), KEY, b"")
    with pytest.raises(OverflowError):
        seal.open_stream(io.BytesIO(sealed), io.BytesIO(), KEY, b"", 5 << 20, refuse)


def test_a_sink_that_fails_stops_the_stream():
    class Full(io.BytesIO):
        def write(self, _buffer):
            raise OSError(28, "no space")

    with pytest.raises(OSError, match="no space"):
        seal.seal_stream(io.BytesIO(bytes(5 << 20)), Full(), KEY, b"")


def test_unwraps_only_with_the_right_key_and_info():
    alice, bob = SealingKey.generate(), SealingKey.generate()
    wrap = seal.wrap_key(KEY, alice.public, b"info")
    assert len(wrap) == seal.WRAP_BYTES
    assert seal.unwrap_key(wrap, alice, b"info") == KEY
    damaged = wrap[:-1] + bytes([wrap[-1] ^ 1])
    for attempt in ((wrap, bob, b"info"), (wrap, alice, b"x"), (damaged, alice, b"info"),
                    (wrap[:50], alice, b"info")):  # fmt: skip
        with pytest.raises(RejectedError) as caught:
            seal.unwrap_key(*attempt)
        assert caught.value.code == "AG-SEA-002"


def test_refuses_a_wrap_that_holds_no_content_key():
    key = SealingKey.generate()
    with pytest.raises(RejectedError) as caught:
        seal.unwrap_key(seal.wrap_key(b"short", key.public, b""), key, b"")
    assert caught.value.code == "AG-SEA-002"
