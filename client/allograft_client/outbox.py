# SPDX-License-Identifier: Apache-2.0
"""What waits to leave: items as directories, offered in polls and taken part by part.

Invariant: an item is announced only after its files are synced and its row is committed together
with the change of state it stands for. A directory without a row was never announced; `sweep`
removes it. Large files are dropped once the coordinator holds them durably.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from allograft.durable import durable_write, storage_errors, sync_directory
from allograft.errors import RejectedError
from allograft.limits import LIMITS
from allograft.relay.item import FROM_SITE, Item, describe_item, inline_files
from allograft.relay.poll import Announcement, Refusal
from allograft_client.rows import ItemRow
from allograft_client.store import Store


class Outbox:
    """The outgoing side of a site's relay.

    Args:
        directory: `outbox/` of the state directory.
        store: The site's database.
        site: Our name.
        coordinator: The name every outgoing item is addressed to.
    """

    def __init__(self, directory: Path, store: Store, site: str, coordinator: str) -> None:
        self._directory = directory
        self._store = store
        self._site = site
        self._coordinator = coordinator

    @contextlib.contextmanager
    def draft(self) -> Iterator[Path]:
        """An empty directory to write an item's files into; it vanishes if not placed."""
        path = self._directory / f".draft-{secrets.token_hex(8)}"
        with storage_errors("the outbox"):
            path.mkdir(mode=0o700)
            try:
                yield path
            finally:
                shutil.rmtree(path, ignore_errors=True)

    def place(self, draft: Path, kind: str) -> Item:
        """Sync a draft's files and move them to their place; nothing is announced yet."""
        if kind not in FROM_SITE:
            raise RejectedError("AG-RLY-006", f"a site sends no items of kind {kind}")
        files = sorted(path for path in draft.iterdir() if path.is_file())
        with storage_errors("the outbox"):
            for path in files:
                _sync_file(path)
            sync_directory(draft)
            item = describe_item(kind, self._site, self._coordinator, files)
            target = self._directory / item.item_id
            if not target.exists():
                os.replace(draft, target)
                sync_directory(self._directory)
        return item

    def announce(self, item: Item, packet_id: str = "") -> None:
        """Let a placed item be taken.

        Call it inside `store.transaction()` together with the change of state it stands for.
        """
        self._store.add_item(item, "out", packet_id)

    def add(self, kind: str, files: Mapping[str, bytes], packet_id: str = "") -> Item:
        """Place and announce an item made of small files."""
        with self.draft() as draft:
            for name, content in files.items():
                durable_write(draft / name, content)
            item = self.place(draft, kind)
        self.announce(item, packet_id)
        return item

    def announcements(self) -> tuple[Announcement, ...]:
        """The items that wait, oldest first, within the limits of one poll."""
        chosen: list[Announcement] = []
        size = 0
        for row in self._store.items("out", "waiting", LIMITS.items_per_poll):
            inline = inline_files(row.item, self._directory / row.item_id)
            # Base64 adds a third; half of a poll's limit leaves room for the rest of the answer.
            size += len(row.item.to_bytes()) + 2 * sum(len(data) for data in inline.values())
            if chosen and size > LIMITS.poll_bytes // 2:
                break
            chosen.append(Announcement(row.item, inline))
        return tuple(chosen)

    def read_part(self, item_id: str, number: int) -> bytes:
        """The bytes of one part.

        Raises:
            RejectedError: AG-SIT-003 if no such item waits, AG-RLY-001 if it has no such part.
        """
        row = self._store.find_item(item_id, "out")
        if row is None or row.state != "waiting":
            raise RejectedError("AG-SIT-003", "no such item waits in the outbox")
        part = row.item.part(number)
        with (self._directory / item_id / part.file.name).open("rb") as handle:
            handle.seek(part.offset)
            return handle.read(part.size_bytes)

    def settle(self, stored: Iterable[str], refused: Iterable[Refusal]) -> tuple[ItemRow, ...]:
        """Record what the coordinator holds or refuses; return the newly refused items."""
        for item_id in stored:
            if self._store.move_item(item_id, "waiting", "stored"):
                self._drop_large_files(item_id)
        newly_refused = []
        for refusal in refused:
            row = self._store.find_item(refusal.item_id, "out")
            code = refusal.code[:16]
            if row and self._store.move_item(refusal.item_id, "waiting", "refused", code):
                newly_refused.append(row)
        return tuple(newly_refused)

    def sweep(self) -> None:
        """Remove what a killed process left behind; call with the directory lock held."""
        for path in self._directory.iterdir():
            row = self._store.find_item(path.name, "out")
            if row is None:
                shutil.rmtree(path, ignore_errors=True)
            elif row.state != "waiting":
                self._drop_large_files(path.name)

    def _drop_large_files(self, item_id: str) -> None:
        # Signed documents stay as evidence; sealed parts can be tens of gigabytes.
        with contextlib.suppress(FileNotFoundError):
            for path in (self._directory / item_id).iterdir():
                if path.suffix == ".sealed":
                    path.unlink(missing_ok=True)


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
