# SPDX-License-Identifier: Apache-2.0
"""C2SP tlog-tiles: a log as static files that any auditor's tool can read.

Sans-IO: which tiles a tree of some size has, their paths, and their bytes. Tile `n` of level `l`
holds 256 hashes of complete subtrees over 256**l entries; bundles hold the entries themselves, each
after its 16-bit length.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from allograft.errors import RejectedError
from allograft.log.merkle import HASH_BYTES, Node

WIDTH = 256
_LEVEL_BITS = 8


@dataclass(frozen=True, slots=True)
class Tile:
    """One tile of a tree.

    Attributes:
        level: 0 for leaves.
        index: Position within the level.
        width: How many hashes it has; 256 if full.
    """

    level: int
    index: int
    width: int

    @property
    def path(self) -> str:
        """Where the hashes are, below the log's folder."""
        return f"tile/{self.level}/{self._place}"

    @property
    def entries_path(self) -> str:
        """Where the entries of a tile of level 0 are."""
        return f"tile/entries/{self._place}"

    @property
    def start(self) -> int:
        """Index of its first hash within the level."""
        return self.index * WIDTH

    @property
    def _place(self) -> str:
        groups = [f"{self.index % 1000:03d}"]
        rest = self.index // 1000
        while rest:
            groups.insert(0, f"x{rest % 1000:03d}")
            rest //= 1000
        suffix = "" if self.width == WIDTH else f".p/{self.width}"
        return "/".join(groups) + suffix

    def encode(self, node: Node) -> bytes:
        """The tile's bytes, from a reader of complete subtrees."""
        level = self.level * _LEVEL_BITS
        return b"".join(node(level, self.start + place) for place in range(self.width))


def list_tiles(size: int) -> Iterator[Tile]:
    """Every tile of a tree, level by level."""
    level = 0
    while size >> (level * _LEVEL_BITS):
        hashes = size >> (level * _LEVEL_BITS)
        for index in range(hashes // WIDTH):
            yield Tile(level, index, WIDTH)
        if hashes % WIDTH:
            yield Tile(level, hashes // WIDTH, hashes % WIDTH)
        level += 1


def decode_tile(content: bytes, width: int) -> tuple[bytes, ...]:
    """The hashes of a tile.

    Raises:
        RejectedError: AG-LOG-013 if it is not as wide as it should be.
    """
    if len(content) != width * HASH_BYTES:
        raise RejectedError("AG-LOG-013", f"a tile of {len(content)} bytes")
    return tuple(content[at : at + HASH_BYTES] for at in range(0, len(content), HASH_BYTES))


def encode_entries(entries: Sequence[bytes]) -> bytes:
    """An entry bundle."""
    return b"".join(struct.pack(">H", len(entry)) + entry for entry in entries)


def decode_entries(content: bytes, width: int) -> tuple[bytes, ...]:
    """The entries of a bundle.

    Raises:
        RejectedError: AG-LOG-013 if it does not hold exactly this many.
    """
    entries = []
    at = 0
    while at + 2 <= len(content):
        (length,) = struct.unpack_from(">H", content, at)
        entry = content[at + 2 : at + 2 + length]
        if len(entry) != length:
            break
        entries.append(entry)
        at += 2 + length
    if at != len(content) or len(entries) != width:
        raise RejectedError("AG-LOG-013", f"an entry bundle does not hold {width} entries")
    return tuple(entries)
