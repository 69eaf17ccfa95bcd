# SPDX-License-Identifier: Apache-2.0
"""What arrives: items part by part, each checked, synced and recorded before it is acknowledged.

Invariant: a part's row exists only if its bytes lie on disk, synced; an item is `done` only if all
of it does, and in the same transaction the job that looks at it is queued. So a process killed
between any two steps loses at most the part in hand, and nothing is acted upon twice.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from allograft.durable import storage_errors, sync_directory
from allograft.errors import RejectedError, UnavailableError
from allograft.limits import LIMITS
from allograft.relay.item import FROM_COORDINATOR, Item, check_part
from allograft.relay.poll import Announcement, Refusal, Want
from allograft_client.rows import ItemRow
from allograft_client.store import Lane, Store


class Inbox:
    """The incoming side of a site's relay.

    Args:
        directory: `inbox/` of the state directory.
        store: The site's database.
        site: Our name; items for others are refused.
        reserve_bytes: Free space that incoming items may not use.
    """

    def __init__(self, directory: Path, store: Store, site: str, reserve_bytes: int) -> None:
        self._directory = directory
        self._store = store
        self._site = site
        self._reserve_bytes = reserve_bytes

    def take_announcements(
        self, announced: Iterable[Announcement]
    ) -> tuple[tuple[str, ...], tuple[Refusal, ...]]:
        """Record announced items and take the small ones whole.

        Returns:
            The announced items that lie here durably, and those that never will.
        """
        done, refused = [], []
        for entry in announced:
            item_id = entry.item.item_id
            try:
                if self._take_announcement(entry):
                    done.append(item_id)
            except RejectedError as error:
                refused.append(Refusal(item_id, error.code))
        return tuple(done), tuple(refused)

    def _take_announcement(self, entry: Announcement) -> bool:
        item = entry.item
        if item.recipient != self._site:
            raise RejectedError("AG-RLY-003", "an item for another site was announced")
        if item.kind not in FROM_COORDINATOR:
            raise RejectedError("AG-RLY-006", f"items of kind {item.kind[:32]!r} do not come here")
        row = self._store.find_item(item.item_id, "in")
        if row is None:
            self._store.add_item(item, "in")
        elif row.state != "waiting":
            return row.state == "done"
        if entry.inline:
            return self._take_inline(item, entry.inline)
        return self._try_complete(item)

    def _take_inline(self, item: Item, inline: Mapping[str, bytes]) -> bool:
        for file in item.files:
            content = inline[file.name]
            differs = len(content) != file.size_bytes
            if differs or hashlib.sha256(content).hexdigest() != file.sha256:
                raise RejectedError("AG-RLY-005", f"inline file {file.name} differs")
        try:
            partial = self._open_partial(item)
            with storage_errors("the inbox"):
                for file in item.files:
                    _write_at(partial / file.name, 0, inline[file.name])
        except UnavailableError:
            return False  # announced again in the next poll
        return self._complete(item)

    def wants(self) -> tuple[Want, ...]:
        """The next missing parts, oldest item first, as many as may be on their way at once."""
        left = LIMITS.parts_in_flight
        wants = []
        for row in self._store.items("in", "waiting"):
            missing = self._missing(row.item)
            if missing and left and self._has_room(row.item, len(missing)):
                wants.append(Want(row.item_id, tuple(missing[:left])))
                left -= len(wants[-1].parts)
        return tuple(wants)

    def put_part(self, item_id: str, number: int, content: bytes) -> None:
        """Store one part of an announced item; storing it again is no error.

        Raises:
            RejectedError: AG-SIT-003 unknown item, AG-RLY-001 no such part, AG-RLY-005 wrong bytes.
            UnavailableError: AG-STO-001 if the disk is full; what was stored before stays.
        """
        row = self._store.find_item(item_id, "in")
        if row is None or row.state == "refused":
            raise RejectedError("AG-SIT-003", "no such item was announced")
        if row.state == "done":
            return
        part = row.item.part(number)
        check_part(part, content)
        if number not in self._store.parts(item_id):
            if not self._has_room(row.item, 1):
                raise UnavailableError("AG-STO-001", "no room for incoming items")
            partial = self._open_partial(row.item)
            with storage_errors("the inbox"):
                _write_at(partial / part.file.name, part.offset, content)
            self._store.add_part(item_id, number)
        self._try_complete(row.item)

    def path(self, row: ItemRow) -> Path:
        """Where the files of a done item lie."""
        return self._directory / row.item_id

    def check_files(self, row: ItemRow) -> Path:
        """Compare the files of a done item with their whole digests and return their directory.

        Raises:
            RejectedError: AG-RLY-005.
        """
        directory = self.path(row)
        for file in row.item.files:
            whole = hashlib.sha256()
            with (directory / file.name).open("rb") as handle:
                while block := handle.read(1 << 20):
                    whole.update(block)
            if whole.hexdigest() != file.sha256:
                raise RejectedError("AG-RLY-005", f"file {file.name} differs from its digest")
        return directory

    def remove(self, row: ItemRow) -> None:
        """Delete the files of an item that has been dealt with."""
        shutil.rmtree(self.path(row), ignore_errors=True)

    # --- completion ---

    def _missing(self, item: Item) -> list[int]:
        present = self._store.parts(item.item_id)
        return [number for number in range(item.part_count) if number not in present]

    def _try_complete(self, item: Item) -> bool:
        final, partial = self._directory / item.item_id, self._partial(item)
        if not final.exists() and not partial.exists():
            # Someone emptied the inbox: what the rows say is no longer true.
            self._store.forget_parts(item.item_id)
        return not self._missing(item) and self._complete(item)

    def _complete(self, item: Item) -> bool:
        """Rename the directory, then commit; a kill between the two is repaired by a repeat."""
        final = self._directory / item.item_id
        with storage_errors("the inbox"):
            if not final.exists():
                partial = self._open_partial(item)
                sync_directory(partial)
                os.replace(partial, final)
                sync_directory(self._directory)
        with self._store.transaction():
            if self._store.move_item(item.item_id, "waiting", "done"):
                self._store.forget_parts(item.item_id)
                lane: Lane = "heavy" if item.kind == "packet" else "light"
                self._store.add_job(lane, "take-in", item.item_id)
        return True

    def _partial(self, item: Item) -> Path:
        return self._directory / f"{item.item_id}.partial"

    def _open_partial(self, item: Item) -> Path:
        partial = self._partial(item)
        with storage_errors("the inbox"):
            if not partial.exists():
                partial.mkdir(mode=0o700)
                sync_directory(self._directory)
            for file in item.files:
                path = partial / file.name
                if not path.exists():
                    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        return partial

    def _has_room(self, item: Item, parts: int) -> bool:
        needed = min(item.size_bytes, parts * LIMITS.part_bytes)
        return shutil.disk_usage(self._directory).free - self._reserve_bytes >= needed


def _write_at(path: Path, offset: int, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW)
    try:
        view = memoryview(content)
        while view:
            written = os.pwrite(descriptor, view, offset)
            view, offset = view[written:], offset + written
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
