# SPDX-License-Identifier: Apache-2.0
"""The coordinator's memory: one SQLite file, the only module here that speaks SQL.

Invariants: every item, packet, dispatch and delivery is in exactly one named state; a change is
committed (WAL, synchronous=FULL) before anything about it is announced; a change names the states
it may start from, so making it twice is the same as making it once.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from allograft.crypto import canonical
from allograft.relay.item import Item
from allograft.sqlite import Database

#: What an item from a site can be. `receiving`: parts are missing. `complete`: all are here, not
#: yet judged. `stored`: accepted. `refused`: never taken, with a code.
InState = Literal["receiving", "complete", "stored", "refused"]
#: What an item for a site can be. `waiting`: announced in every poll. `delivered`, `refused`: the
#: site said so. `void`: overtaken or withdrawn before it was delivered.
OutState = Literal["waiting", "delivered", "refused", "void"]

_MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE item (
        number INTEGER PRIMARY KEY, item_id TEXT NOT NULL UNIQUE,
        direction TEXT NOT NULL CHECK (direction IN ('in', 'out')), site TEXT NOT NULL,
        kind TEXT NOT NULL, description BLOB NOT NULL, subject TEXT NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('receiving', 'complete', 'stored', 'refused',
            'waiting', 'delivered', 'void')),
        code TEXT NOT NULL, time TEXT NOT NULL
    ) STRICT;
    CREATE INDEX item_state ON item (direction, site, state);
    CREATE TABLE item_file (
        sha256 TEXT NOT NULL, item_id TEXT NOT NULL, PRIMARY KEY (sha256, item_id)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE part (
        item_id TEXT NOT NULL, number INTEGER NOT NULL, PRIMARY KEY (item_id, number)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE site (
        site TEXT PRIMARY KEY, roster_version INTEGER NOT NULL, witnessed_size INTEGER NOT NULL,
        seen TEXT NOT NULL
    ) STRICT;
    CREATE TABLE card (
        site TEXT PRIMARY KEY, version INTEGER NOT NULL, envelope BLOB NOT NULL, time TEXT NOT NULL
    ) STRICT;
    CREATE TABLE packet (
        packet_id TEXT PRIMARY KEY, donor TEXT NOT NULL, kind TEXT NOT NULL,
        statement_digest TEXT NOT NULL, offer BLOB NOT NULL, route BLOB NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('routed', 'dispatched', 'withdrawn')),
        time TEXT NOT NULL
    ) STRICT;
    CREATE TABLE dispatch (
        dispatch_id TEXT PRIMARY KEY, packet_id TEXT NOT NULL, item_id TEXT NOT NULL,
        digest TEXT NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('logged', 'released', 'withdrawn', 'expired')),
        not_after TEXT NOT NULL, time TEXT NOT NULL
    ) STRICT;
    CREATE TABLE delivery (
        dispatch_id TEXT NOT NULL, site TEXT NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('held', 'waiting', 'delivered', 'untaken',
            'withdrawn', 'expired', 'kept', 'reverted', 'refused', 'quarantined')),
        code TEXT NOT NULL, time TEXT NOT NULL, PRIMARY KEY (dispatch_id, site)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE to_log (
        number INTEGER PRIMARY KEY, sha256 TEXT NOT NULL UNIQUE, entry BLOB NOT NULL,
        document_sha256 TEXT NOT NULL, document BLOB NOT NULL, subject TEXT NOT NULL, place INTEGER
    ) STRICT;
    CREATE INDEX to_log_subject ON to_log (subject);
    CREATE TABLE receipt (
        number INTEGER PRIMARY KEY, digest TEXT NOT NULL UNIQUE, dispatch_id TEXT NOT NULL,
        site TEXT NOT NULL, state TEXT NOT NULL, code TEXT NOT NULL, envelope BLOB NOT NULL,
        time TEXT NOT NULL
    ) STRICT;
    """,
)


@dataclass(frozen=True, slots=True)
class ItemRow:
    """An item, the site it comes from or goes to, and its state."""

    item: Item
    site: str
    subject: str
    state: str
    code: str

    @property
    def item_id(self) -> str:
        """The item's identity."""
        return self.item.item_id


@dataclass(frozen=True, slots=True)
class SiteRow:
    """What a site last reported."""

    site: str
    roster_version: int
    witnessed_size: int
    seen: str


@dataclass(frozen=True, slots=True)
class PacketRow:
    """A packet that was offered."""

    packet_id: str
    donor: str
    kind: str
    statement_digest: str
    offer: bytes
    route: bytes
    state: str


@dataclass(frozen=True, slots=True)
class DispatchRow:
    """A dispatch; `item_id` is the item that brought it, `digest` that of its envelope."""

    dispatch_id: str
    packet_id: str
    item_id: str
    digest: str
    state: str
    not_after: str


@dataclass(frozen=True, slots=True)
class DeliveryRow:
    """What became of a dispatch at one recipient."""

    dispatch_id: str
    site: str
    state: str
    code: str


@dataclass(frozen=True, slots=True)
class QueuedEntry:
    """An entry that waits for its place in the log, with the document that it announces.

    Attributes:
        document_sha256: SHA-256 (hex) of the document; a roster's digest is that of its file set.
    """

    entry: bytes
    document_sha256: str
    document: bytes


class Store(Database):
    """The database of the coordinator."""

    migrations = _MIGRATIONS
    newer_code = "AG-CRD-012"

    # --- items ---

    def add_item(self, item: Item, site: str, state: str, subject: str, code: str = "") -> None:
        """Record an item with its first state; knowing it already is no error."""
        direction = "in" if item.sender == site else "out"
        with self.transaction():
            self._run(
                "INSERT INTO item (item_id, direction, site, kind, description, subject, state,"
                " code, time) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (item_id) DO NOTHING",
                item.item_id, direction, site, item.kind, item.to_bytes(), subject, state, code,
                _now(),
            )  # fmt: skip
            if state not in {"refused", "void"}:
                for file in item.files:
                    self._run(
                        "INSERT OR IGNORE INTO item_file VALUES (?, ?)", file.sha256, item.item_id
                    )

    def find_item(self, item_id: str) -> ItemRow | None:
        """One item, or None."""
        rows = self._rows("SELECT * FROM item WHERE item_id = ?", item_id)
        return _item(rows[0]) if rows else None

    def items(self, site: str, *states: str) -> tuple[ItemRow, ...]:
        """A site's items in any of these states, oldest first."""
        rows = self._rows(
            "SELECT * FROM item WHERE site = ? AND state IN (SELECT value FROM json_each(?))"
            " ORDER BY number",
            site, json.dumps(states),
        )  # fmt: skip
        return tuple(_item(row) for row in rows)

    def items_in(self, state: str) -> tuple[ItemRow, ...]:
        """All items in one state, oldest first."""
        rows = self._rows("SELECT * FROM item WHERE state = ? ORDER BY number", state)
        return tuple(_item(row) for row in rows)

    def items_of(self, subject: str, kind: str) -> tuple[ItemRow, ...]:
        """Items of one kind about one subject, oldest first."""
        rows = self._rows(
            "SELECT * FROM item WHERE subject = ? AND kind = ? ORDER BY number", subject, kind
        )
        return tuple(_item(row) for row in rows)

    def move_item(self, item_id: str, before: tuple[str, ...], after: str, code: str = "") -> bool:
        """Change an item's state; False if it was in none of `before`.

        An item that is over no longer keeps its files in the mailbox.
        """
        with self.transaction():
            moved = self._run(
                "UPDATE item SET state = ?, code = ? WHERE item_id = ?"
                " AND state IN (SELECT value FROM json_each(?))",
                after, code, item_id, json.dumps(before),
            )  # fmt: skip
            if moved and after in {"refused", "delivered", "void"}:
                self.release_files(item_id)
            if moved and after != "receiving":
                self._run("DELETE FROM part WHERE item_id = ?", item_id)
        return bool(moved)

    def release_files(self, item_id: str) -> None:
        """Let the mailbox forget an item's files, unless another item keeps them."""
        self._run("DELETE FROM item_file WHERE item_id = ?", item_id)

    def is_file_kept(self, sha256: str) -> bool:
        """Whether any item still needs a file of the mailbox."""
        return bool(self._rows("SELECT 1 FROM item_file WHERE sha256 = ? LIMIT 1", sha256))

    def add_part(self, item_id: str, number: int) -> None:
        """Record that a part lies on disk, synced."""
        self._run("INSERT OR IGNORE INTO part VALUES (?, ?)", item_id, number)

    def parts(self, item_id: str) -> frozenset[int]:
        """Numbers of the parts that lie on disk."""
        rows = self._rows("SELECT number FROM part WHERE item_id = ?", item_id)
        return frozenset(row["number"] for row in rows)

    # --- sites and cards ---

    def report_site(self, site: str, roster_version: int, witnessed_size: int) -> None:
        """Record what a site said in its last answer."""
        self._run(
            "INSERT INTO site VALUES (?, ?, ?, ?) ON CONFLICT (site) DO UPDATE SET roster_version ="
            " excluded.roster_version, witnessed_size = excluded.witnessed_size,"
            " seen = excluded.seen",
            site, roster_version, witnessed_size, _now(),
        )  # fmt: skip

    def sites(self) -> dict[str, SiteRow]:
        """Every site that ever answered, by name."""
        return {row["site"]: SiteRow(**dict(row)) for row in self._rows("SELECT * FROM site")}

    def put_card(self, site: str, version: int, envelope: bytes) -> bool:
        """Keep a card if it is newer than the one that is known."""
        return bool(
            self._run(
                "INSERT INTO card VALUES (?, ?, ?, ?) ON CONFLICT (site) DO UPDATE SET version ="
                " excluded.version, envelope = excluded.envelope, time = excluded.time"
                " WHERE excluded.version > card.version",
                site, version, envelope, _now(),
            )
        )  # fmt: skip

    def cards(self) -> tuple[bytes, ...]:
        """The newest card of every site, as signed."""
        return tuple(row["envelope"] for row in self._rows("SELECT * FROM card ORDER BY site"))

    def card_sites(self) -> frozenset[str]:
        """Sites that sent a card."""
        return frozenset(row["site"] for row in self._rows("SELECT site FROM card"))

    # --- packets, dispatches, deliveries ---

    def add_packet(self, row: PacketRow) -> None:
        """Record an offer with its route."""
        self._run(
            "INSERT INTO packet VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
            row.packet_id, row.donor, row.kind, row.statement_digest, row.offer, row.route,
            row.state, _now(),
        )  # fmt: skip

    def find_packet(self, packet_id: str) -> PacketRow | None:
        """One packet, or None."""
        rows = self._rows("SELECT * FROM packet WHERE packet_id = ?", packet_id)
        return _packet(rows[0]) if rows else None

    def packets(self) -> tuple[PacketRow, ...]:
        """All packets, oldest first."""
        return tuple(_packet(row) for row in self._rows("SELECT * FROM packet ORDER BY rowid"))

    def move_packet(self, packet_id: str, before: tuple[str, ...], after: str) -> bool:
        """Change a packet's state; False if it was in none of `before`."""
        return bool(
            self._run(
                "UPDATE packet SET state = ? WHERE packet_id = ?"
                " AND state IN (SELECT value FROM json_each(?))",
                after, packet_id, json.dumps(before),
            )
        )  # fmt: skip

    def add_dispatch(self, row: DispatchRow, audience: tuple[str, ...]) -> None:
        """Record a dispatch and a held delivery for each of its recipients."""
        with self.transaction():
            self._run(
                "INSERT INTO dispatch VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
                row.dispatch_id, row.packet_id, row.item_id, row.digest, row.state, row.not_after,
                _now(),
            )  # fmt: skip
            for site in audience:
                self._run(
                    "INSERT INTO delivery VALUES (?, ?, 'held', '', ?) ON CONFLICT DO NOTHING",
                    row.dispatch_id, site, _now(),
                )  # fmt: skip

    def find_dispatch(self, dispatch_id: str) -> DispatchRow | None:
        """One dispatch, or None."""
        rows = self._rows("SELECT * FROM dispatch WHERE dispatch_id = ?", dispatch_id)
        return _dispatch(rows[0]) if rows else None

    def dispatches(self, *states: str) -> tuple[DispatchRow, ...]:
        """Dispatches in any of these states, oldest first."""
        rows = self._rows(
            "SELECT * FROM dispatch WHERE state IN (SELECT value FROM json_each(?)) ORDER BY rowid",
            json.dumps(states),
        )
        return tuple(_dispatch(row) for row in rows)

    def dispatches_of(self, packet_id: str) -> tuple[DispatchRow, ...]:
        """All dispatches of a packet, oldest first."""
        rows = self._rows("SELECT * FROM dispatch WHERE packet_id = ? ORDER BY rowid", packet_id)
        return tuple(_dispatch(row) for row in rows)

    def move_dispatch(self, dispatch_id: str, before: tuple[str, ...], after: str) -> bool:
        """Change a dispatch's state; False if it was in none of `before`."""
        return bool(
            self._run(
                "UPDATE dispatch SET state = ? WHERE dispatch_id = ?"
                " AND state IN (SELECT value FROM json_each(?))",
                after, dispatch_id, json.dumps(before),
            )
        )  # fmt: skip

    def deliveries(self, dispatch_id: str) -> tuple[DeliveryRow, ...]:
        """The deliveries of a dispatch, by site."""
        rows = self._rows(
            "SELECT dispatch_id, site, state, code FROM delivery WHERE dispatch_id = ?"
            " ORDER BY site",
            dispatch_id,
        )
        return tuple(DeliveryRow(**dict(row)) for row in rows)

    def find_delivery(self, dispatch_id: str, site: str) -> DeliveryRow | None:
        """One delivery, or None."""
        rows = [row for row in self.deliveries(dispatch_id) if row.site == site]
        return rows[0] if rows else None

    def move_delivery(
        self, dispatch_id: str, site: str, before: tuple[str, ...], after: str, code: str = ""
    ) -> bool:
        """Change a delivery's state; False if it was in none of `before`."""
        return bool(
            self._run(
                "UPDATE delivery SET state = ?, code = ?, time = ? WHERE dispatch_id = ?"
                " AND site = ? AND state IN (SELECT value FROM json_each(?))",
                after, code, _now(), dispatch_id, site, json.dumps(before),
            )
        )  # fmt: skip

    def set_route(self, packet_id: str, route: bytes) -> None:
        """Replace a packet's route by a newer one."""
        self._run("UPDATE packet SET route = ? WHERE packet_id = ?", route, packet_id)

    # --- entries on their way into the log ---

    def queue_entry(self, queued: QueuedEntry, subject: str = "") -> None:
        """Queue an entry for the log in the transaction of what it announces."""
        self._run(
            "INSERT INTO to_log (sha256, entry, document_sha256, document, subject)"
            " VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
            hashlib.sha256(queued.entry).hexdigest(), queued.entry, queued.document_sha256,
            queued.document, subject,
        )  # fmt: skip

    def has_entry(self, subject: str) -> bool:
        """Whether an entry about this subject was queued, ever."""
        return bool(self._rows("SELECT 1 FROM to_log WHERE subject = ? LIMIT 1", subject))

    def queued_entries(self) -> tuple[tuple[int, QueuedEntry], ...]:
        """Entries that are not known to be in the log, with their numbers, oldest first."""
        rows = self._rows(
            "SELECT number, entry, document_sha256, document FROM to_log WHERE place IS NULL"
            " ORDER BY number"
        )
        return tuple(
            (row["number"], QueuedEntry(row["entry"], row["document_sha256"], row["document"]))
            for row in rows
        )

    def place_entry(self, number: int, place: int) -> None:
        """Record where in the log an entry stands; the log keeps its document from now on."""
        self._run("UPDATE to_log SET place = ?, document = x'' WHERE number = ?", place, number)

    def place_of(self, subject: str) -> int | None:
        """Where in the log the entry about a subject stands, or None while it is queued."""
        rows = self._rows("SELECT place FROM to_log WHERE subject = ?", subject)
        return rows[0]["place"] if rows else None

    # --- receipts ---

    def add_receipt(
        self, digest: str, dispatch_id: str, site: str, state: str, code: str, envelope: bytes
    ) -> None:
        """Keep a receipt; keeping it twice is no error."""
        self._run(
            "INSERT INTO receipt (digest, dispatch_id, site, state, code, envelope, time)"
            " VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (digest) DO NOTHING",
            digest, dispatch_id, site, state, code, envelope, _now(),
        )  # fmt: skip


def _now() -> str:
    return canonical.format_time(datetime.now(UTC))


def _item(row: sqlite3.Row) -> ItemRow:
    item = Item.from_json(canonical.loads(row["description"]))
    return ItemRow(item, row["site"], row["subject"], row["state"], row["code"])


def _packet(row: sqlite3.Row) -> PacketRow:
    fields = dict(row)
    del fields["time"]
    return PacketRow(**fields)


def _dispatch(row: sqlite3.Row) -> DispatchRow:
    fields = dict(row)
    del fields["time"]
    return DispatchRow(**fields)
