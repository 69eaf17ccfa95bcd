# SPDX-License-Identifier: Apache-2.0
"""Sealed files on their way: content-addressed, so one upload serves any number of recipients.

`files/<sha256>` are whole, verified files. `partial/<item id>/<sha256>` are files whose parts are
still arriving, apart for every item: a description that lies spoils no other site's upload. A part
is written and synced before the store records it; a file leaves `partial` only after all of it was
hashed again. Nothing here can open what it holds. See protos/spec/relay.md.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from allograft.durable import durable_write, storage_errors, sync_directory
from allograft.errors import RejectedError, UnavailableError
from allograft.relay.item import Item, ItemFile, PartRef, check_part

_READ_BYTES = 1 << 20


class Mailbox:
    """The files of all items.

    Args:
        directory: `mailbox/` of the state directory.
        reserve_bytes: Free space that arriving parts must leave on the volume.
    """

    def __init__(self, directory: Path, reserve_bytes: int) -> None:
        self._files = directory / "files"
        self._partial = directory / "partial"
        self._reserve_bytes = reserve_bytes
        for path in (directory, self._files, self._partial):
            path.mkdir(mode=0o700, exist_ok=True)

    def path(self, file: ItemFile) -> Path:
        """Where a whole file lies."""
        return self._files / file.sha256

    def has(self, file: ItemFile) -> bool:
        """Whether a file is here, whole."""
        return self.path(file).exists()

    def read(self, item: Item, name: str, max_bytes: int) -> bytes:
        """Read one small file of an item whole.

        Raises:
            RejectedError: AG-RLY-006 if the item has no such file or it is larger than `max_bytes`.
        """
        for file in item.files:
            if file.name == name and file.size_bytes <= max_bytes:
                return self.path(file).read_bytes()
        raise RejectedError("AG-RLY-006", f"the item has no readable {name}")

    def read_part(self, part: PartRef) -> bytes:
        """Read one part of a whole file."""
        with self.path(part.file).open("rb") as handle:
            handle.seek(part.offset)
            return handle.read(part.size_bytes)

    def add_file(self, file: ItemFile, content: bytes) -> None:
        """Store a whole small file.

        Raises:
            RejectedError: AG-RLY-005 if the bytes are not the described ones.
            UnavailableError: AG-STO-001 if the disk is full.
        """
        differs = len(content) != file.size_bytes
        if differs or hashlib.sha256(content).hexdigest() != file.sha256:
            raise RejectedError("AG-RLY-005", f"file {file.name} differs from its description")
        if not self.has(file):
            self._check_room(len(content))
            durable_write(self.path(file), content)

    def add_part(self, item_id: str, part: PartRef, content: bytes) -> None:
        """Store one part durably.

        Raises:
            RejectedError: AG-RLY-005 if the bytes are not the described ones.
            UnavailableError: AG-STO-001 if the disk is full; what was stored before stays.
        """
        check_part(part, content)
        self._check_room(len(content))
        with storage_errors("the mailbox"):
            directory = self._partial / item_id
            directory.mkdir(mode=0o700, exist_ok=True)
            path = directory / part.file.sha256
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            try:
                view = memoryview(content)
                offset = part.offset
                while view:
                    written = os.pwrite(descriptor, view, offset)
                    view, offset = view[written:], offset + written
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            sync_directory(directory)

    def finish_file(self, item_id: str, file: ItemFile) -> None:
        """Hash a file whose parts are all here, and move it among the whole ones.

        Raises:
            RejectedError: AG-RLY-005 if the whole is not the described one.
        """
        if self.has(file):
            return
        if not file.parts:
            durable_write(self.path(file), b"")
            return
        path = self._partial / item_id / file.sha256
        digest = hashlib.sha256()
        with path.open("rb") as handle:
            while block := handle.read(_READ_BYTES):
                digest.update(block)
        if digest.hexdigest() != file.sha256:
            # Each part fitted its own digest, so the description contradicts itself.
            raise RejectedError("AG-RLY-005", f"the parts of {file.name} do not make the file")
        os.replace(path, self.path(file))
        sync_directory(self._files)

    def drop_partial(self, item_id: str) -> None:
        """Delete what is left of an upload that is over."""
        shutil.rmtree(self._partial / item_id, ignore_errors=True)

    def drop(self, files: Iterable[ItemFile]) -> None:
        """Delete whole files that no item needs any more."""
        for file in files:
            self.path(file).unlink(missing_ok=True)

    def drop_others(self, is_kept: Callable[[str], bool], uploads: Collection[str]) -> None:
        """Delete whole files that are not kept, and uploads of other items than these."""
        for path in self._files.iterdir():
            if not is_kept(path.name):
                path.unlink()
        for path in self._partial.iterdir():
            if path.name not in uploads:
                self.drop_partial(path.name)

    def has_room(self, size_bytes: int) -> bool:
        """Whether so many bytes fit without touching the reserve."""
        return shutil.disk_usage(self._files).free - size_bytes >= self._reserve_bytes

    def _check_room(self, size_bytes: int) -> None:
        if not self.has_room(size_bytes):
            raise UnavailableError("AG-STO-001", "the volume of the mailbox is full")


def parts_of(item: Item, file: ItemFile) -> range:
    """The part numbers that belong to one file of an item."""
    first = 0
    for other in item.files:
        if other is file:
            break
        first += len(other.parts)
    return range(first, first + len(file.parts))


def missing_parts(item: Item, present: frozenset[int], mailbox: Mailbox) -> list[int]:
    """Parts of an item that are neither recorded nor in a file that is already whole."""
    missing: list[int] = []
    for file in item.files:
        if not mailbox.has(file):
            missing += [number for number in parts_of(item, file) if number not in present]
    return missing
