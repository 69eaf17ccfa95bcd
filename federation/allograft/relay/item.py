# SPDX-License-Identifier: Apache-2.0
"""Items: what waits in an outbox or inbox, described without its bytes.

An item is a named set of files. Its identity is the SHA-256 of its canonical description, and the
description carries a digest for every slice of every file, so a transfer can stop anywhere, resume
anywhere, and trust no one in between. See protos/spec/relay.md.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from allograft.crypto import canonical
from allograft.errors import RejectedError
from allograft.limits import LIMITS

#: Kinds of items a site may send to the coordinator, and the other way round.
FROM_SITE = frozenset({"card", "offer", "dispatch", "receipt", "withdrawal"})
FROM_COORDINATOR = frozenset({"roster", "route", "packet", "receipt", "withdrawal"})

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class ItemFile:
    """One file of an item: its size and the digests of the whole and of each slice."""

    name: str
    size_bytes: int
    sha256: str
    parts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PartRef:
    """Where part number `index` of an item lies: a slice of one file."""

    file: ItemFile
    offset: int
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Item:
    """A description of files to move from one party to another."""

    kind: str
    sender: str
    recipient: str
    files: tuple[ItemFile, ...]

    @property
    def item_id(self) -> str:
        """SHA-256 (hex) of the canonical description."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def part_count(self) -> int:
        """How many parts the whole item has, counted over its files in order."""
        return sum(len(file.parts) for file in self.files)

    @property
    def size_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(file.size_bytes for file in self.files)

    def part(self, index: int) -> PartRef:
        """Locate a part by its number.

        Raises:
            RejectedError: AG-RLY-001 for a number the item does not have.
        """
        remaining = index
        for file in self.files:
            if 0 <= remaining < len(file.parts):
                offset = remaining * LIMITS.part_bytes
                size = min(LIMITS.part_bytes, file.size_bytes - offset)
                return PartRef(file, offset, size, file.parts[remaining])
            remaining -= len(file.parts)
        raise RejectedError("AG-RLY-001", f"part {index} of an item with {self.part_count} parts")

    def to_json(self) -> dict[str, canonical.Json]:
        """The description as a JSON object."""
        return {
            "v": 1,
            "kind": self.kind,
            "from": self.sender,
            "to": self.recipient,
            "files": [
                {"name": f.name, "bytes": f.size_bytes, "sha256": f.sha256, "parts": list(f.parts)}
                for f in self.files
            ],
        }

    def to_bytes(self) -> bytes:
        """The canonical description (RFC 8785)."""
        return canonical.dumps(self.to_json())

    @classmethod
    def from_json(cls, value: canonical.Json) -> Item:
        """Read and check a description.

        Raises:
            RejectedError: AG-RLY-001 if malformed, AG-RLY-006 if over a limit.
        """
        try:
            fields = canonical.as_object(value, {"v", "kind", "from", "to", "files"})
            if fields["v"] != 1:
                raise RejectedError("AG-RLY-001", "unknown item version")
            files = tuple(_read_file(entry) for entry in canonical.as_list(fields["files"]))
            item = cls(
                kind=canonical.as_text(fields["kind"]),
                sender=canonical.as_text(fields["from"]),
                recipient=canonical.as_text(fields["to"]),
                files=files,
            )
        except RejectedError as error:
            if error.code.startswith("AG-RLY"):
                raise
            raise RejectedError("AG-RLY-001", f"item description: {error.cause}") from error
        if len(files) > LIMITS.item_files or item.size_bytes > LIMITS.packet_payload_bytes:
            raise RejectedError("AG-RLY-006", f"item of {item.size_bytes} bytes is over the limit")
        if len({f.name for f in files}) != len(files):
            raise RejectedError("AG-RLY-001", "two files of an item share a name")
        return item


def _read_file(value: canonical.Json) -> ItemFile:
    fields = canonical.as_object(value, {"name", "bytes", "sha256", "parts"})
    name = canonical.as_text(fields["name"])
    size = canonical.as_int(fields["bytes"])
    parts = tuple(canonical.as_text(part) for part in canonical.as_list(fields["parts"]))
    digest = canonical.as_text(fields["sha256"])
    if not _NAME.fullmatch(name) or size < 0:
        raise RejectedError("AG-RLY-001", "file name or size of an item is not allowed")
    if not all(_SHA256.fullmatch(d) for d in (digest, *parts)):
        raise RejectedError("AG-RLY-001", "a digest of an item is not SHA-256 in hex")
    # An empty file has no parts; otherwise the number of parts follows from the size alone.
    if len(parts) != -(-size // LIMITS.part_bytes):
        raise RejectedError("AG-RLY-001", f"file {name} has the wrong number of parts")
    return ItemFile(name, size, digest, parts)


def describe_file(path: Path, name: str | None = None) -> ItemFile:
    """Hash a file once and describe it, reading one part at a time."""
    whole = hashlib.sha256()
    parts = []
    size = 0
    with path.open("rb") as handle:
        while part := handle.read(LIMITS.part_bytes):
            whole.update(part)
            parts.append(hashlib.sha256(part).hexdigest())
            size += len(part)
    return ItemFile(name or path.name, size, whole.hexdigest(), tuple(parts))


def describe_item(kind: str, sender: str, recipient: str, files: Iterable[Path]) -> Item:
    """Describe files as an item, in the order of their names."""
    described = sorted((describe_file(path) for path in files), key=lambda f: f.name)
    return Item(kind, sender, recipient, tuple(described))


def check_part(part: PartRef, content: bytes) -> None:
    """Compare a received part with its description.

    Raises:
        RejectedError: AG-RLY-005 if size or digest differ.
    """
    size_differs = len(content) != part.size_bytes
    if size_differs or hashlib.sha256(content).hexdigest() != part.sha256:
        raise RejectedError("AG-RLY-005", f"part of {part.file.name} at {part.offset} differs")


def inline_files(item: Item, directory: Path) -> Mapping[str, bytes]:
    """The files of an item small enough to travel inside a poll; empty for larger items."""
    if item.size_bytes > LIMITS.inline_bytes:
        return {}
    return {file.name: (directory / file.name).read_bytes() for file in item.files}
