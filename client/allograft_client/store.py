# SPDX-License-Identifier: Apache-2.0
"""The site's memory: one SQLite file, the only module here that speaks SQL.

Invariants: every packet is in exactly one named state with a reason; a transition is committed
(WAL, synchronous=FULL) before anything about it is announced; a transition names the states it may
start from, so two processes can never both make it. Jobs are the requests of the command line and
the follow-ups of the daemon alike; one left `running` by a killed process is queued again.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from allograft.crypto import canonical
from allograft.errors import RejectedError
from allograft.relay.item import Item
from allograft.sqlite import Database
from allograft_client.rows import (
    AttachmentRow,
    Change,
    ExtraRow,
    ItemRow,
    JobRow,
    ModelRow,
    PacketRow,
    ReceiptRow,
    ScreenedRow,
)

Direction = Literal["out", "in"]
Lane = Literal["light", "heavy"]

#: What a packet can be at this site. See client/README.md for the two life lines.
DONOR_STATES = frozenset(
    {
        "training", "failed", "refused", "awaiting-approval", "offered", "routed", "dispatched",
        "withdrawn",
    }
)  # fmt: skip
RECIPIENT_STATES = frozenset(
    {"received", "verified", "trialled", "kept", "reverted", "refused", "quarantined", "recalled"}
)

_MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE model (
        name TEXT PRIMARY KEY, path TEXT NOT NULL, data TEXT NOT NULL, retention TEXT NOT NULL,
        facts TEXT NOT NULL, time TEXT NOT NULL
    ) STRICT;
    CREATE TABLE packet (
        packet_id TEXT PRIMARY KEY, role TEXT NOT NULL CHECK (role IN ('donor', 'recipient')),
        donor TEXT NOT NULL, kind TEXT NOT NULL, model TEXT NOT NULL, dispatch_id TEXT NOT NULL,
        state TEXT NOT NULL, code TEXT NOT NULL, reason TEXT NOT NULL, facts TEXT NOT NULL,
        time TEXT NOT NULL
    ) STRICT;
    CREATE TABLE extra (
        item_id TEXT PRIMARY KEY, packet_id TEXT NOT NULL, code TEXT NOT NULL,
        reason TEXT NOT NULL, time TEXT NOT NULL
    ) STRICT;
    CREATE TABLE setting (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
    CREATE TABLE history (
        number INTEGER PRIMARY KEY, packet_id TEXT NOT NULL, state TEXT NOT NULL,
        code TEXT NOT NULL, reason TEXT NOT NULL, time TEXT NOT NULL
    ) STRICT;
    CREATE TABLE item (
        number INTEGER PRIMARY KEY, item_id TEXT NOT NULL UNIQUE,
        direction TEXT NOT NULL CHECK (direction IN ('out', 'in')), kind TEXT NOT NULL,
        description BLOB NOT NULL, packet_id TEXT NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('waiting', 'stored', 'done', 'refused')),
        code TEXT NOT NULL, time TEXT NOT NULL
    ) STRICT;
    CREATE INDEX item_state ON item (direction, state);
    CREATE TABLE part (
        item_id TEXT NOT NULL, number INTEGER NOT NULL, PRIMARY KEY (item_id, number)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE job (
        number INTEGER PRIMARY KEY AUTOINCREMENT, lane TEXT NOT NULL, kind TEXT NOT NULL,
        subject TEXT NOT NULL, arguments TEXT NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('queued', 'running', 'done', 'failed')),
        attempts INTEGER NOT NULL, progress TEXT NOT NULL, result TEXT NOT NULL,
        code TEXT NOT NULL, cause TEXT NOT NULL, time TEXT NOT NULL
    ) STRICT;
    CREATE TABLE dispatch_seen (
        dispatch_id TEXT PRIMARY KEY, packet_id TEXT NOT NULL, time TEXT NOT NULL
    ) STRICT;
    CREATE TABLE attachment (
        packet_id TEXT PRIMARY KEY, model TEXT NOT NULL, position INTEGER NOT NULL,
        path TEXT NOT NULL, dose REAL NOT NULL, time TEXT NOT NULL,
        UNIQUE (model, position)
    ) STRICT;
    CREATE TABLE receipt (
        packet_id TEXT NOT NULL, site TEXT NOT NULL, state TEXT NOT NULL, code TEXT NOT NULL,
        time TEXT NOT NULL, PRIMARY KEY (packet_id, site, state, time)
    ) STRICT;
    """,
    """
    CREATE TABLE screened (
        combination TEXT PRIMARY KEY, verdict TEXT NOT NULL, overridden INTEGER NOT NULL,
        report TEXT NOT NULL, time TEXT NOT NULL
    ) STRICT;
    CREATE TABLE spectrum (
        packet_id TEXT PRIMARY KEY, base TEXT NOT NULL, kind TEXT NOT NULL,
        figures TEXT NOT NULL, time TEXT NOT NULL
    ) STRICT;
    CREATE INDEX spectrum_base ON spectrum (base, kind);
    CREATE TABLE ancestry (
        weights_digest TEXT PRIMARY KEY, parents TEXT NOT NULL, time TEXT NOT NULL
    ) STRICT;
    """,
)


class Store(Database):
    """The database of one site."""

    migrations = _MIGRATIONS
    newer_code = "AG-SIT-002"

    # --- models ---

    def put_model(self, row: ModelRow) -> None:
        """Add or replace a model."""
        self._run(
            "INSERT INTO model VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET "
            "path = excluded.path, data = excluded.data, retention = excluded.retention, "
            "facts = excluded.facts, time = excluded.time",
            row.name, str(row.path), str(row.data), str(row.retention), _write(row.facts), row.time,
        )  # fmt: skip

    def models(self) -> tuple[ModelRow, ...]:
        """All models, by name."""
        rows = self._rows("SELECT * FROM model ORDER BY name")
        return tuple(self._parse(_model, row) for row in rows)

    def model(self, name: str) -> ModelRow:
        """One model.

        Raises:
            RejectedError: AG-SIT-003 if there is none of this name.
        """
        rows = self._rows("SELECT * FROM model WHERE name = ?", name)
        if not rows:
            raise RejectedError("AG-SIT-003", f"no model named {name[:64]!r}")
        return self._parse(_model, rows[0])

    # --- packets ---

    def add_packet(self, row: PacketRow) -> None:
        """Record a new packet with its first state."""
        with self.transaction():
            self._run(
                "INSERT INTO packet VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                row.packet_id, row.role, row.donor, row.kind, row.model, row.dispatch_id, row.state,
                row.code, row.reason, _write(row.facts), row.time,
            )  # fmt: skip
            self._remember(row.packet_id, row.state, row.code, row.reason)

    def move_packet(
        self,
        packet_id: str,
        before: Sequence[str],
        after: str,
        reason: str,
        code: str = "",
    ) -> None:
        """Change a packet's state.

        Args:
            packet_id: The packet.
            before: The states this transition may start from.
            after: The new state.
            reason: One line for people; it stays with the packet.
            code: The error code if the state is a refusal.

        Raises:
            RejectedError: AG-SIT-004 if the packet is in another state.
        """
        with self.transaction():
            row = self.packet(packet_id)
            if row.state not in before:
                raise RejectedError(
                    "AG-SIT-004", f"packet {packet_id} is {row.state}, not {' or '.join(before)}"
                )
            self._run(
                "UPDATE packet SET state = ?, code = ?, reason = ?, time = ? WHERE packet_id = ?",
                after, code, reason, now_text(), packet_id,
            )  # fmt: skip
            self._remember(packet_id, after, code, reason)

    def _remember(self, packet_id: str, state: str, code: str, reason: str) -> None:
        self._run(
            "INSERT INTO history (packet_id, state, code, reason, time) VALUES (?, ?, ?, ?, ?)",
            packet_id, state, code, reason, now_text(),
        )  # fmt: skip

    def add_packet_facts(self, packet_id: str, **facts: object) -> None:
        """Merge facts into a packet's record without a change of state."""
        with self.transaction():
            merged = {**self.packet(packet_id).facts, **facts}
            self._run("UPDATE packet SET facts = ? WHERE packet_id = ?", _write(merged), packet_id)

    def describe_packet(self, packet_id: str, kind: str, model: str, dispatch_id: str) -> None:
        """Record what verification found: the kind, the model it fits, the dispatch it came by."""
        self._run(
            "UPDATE packet SET kind = ?, model = ?, dispatch_id = ? WHERE packet_id = ?",
            kind, model, dispatch_id, packet_id,
        )  # fmt: skip

    def add_extra(self, item_id: str, packet_id: str, code: str, reason: str) -> None:
        """Record a copy of a known packet that was turned away without changing it."""
        self._run(
            "INSERT OR IGNORE INTO extra VALUES (?, ?, ?, ?, ?)",
            item_id, packet_id, code, reason, now_text(),
        )  # fmt: skip

    def extras(self) -> tuple[ExtraRow, ...]:
        """Copies that were turned away, oldest first."""
        rows = self._rows("SELECT * FROM extra ORDER BY rowid")
        return tuple(ExtraRow(**dict(row)) for row in rows)

    # --- settings that the daemon keeps for itself ---

    def setting(self, name: str, default: str = "") -> str:
        """A remembered value."""
        rows = self._rows("SELECT value FROM setting WHERE name = ?", name)
        return str(rows[0]["value"]) if rows else default

    def set_setting(self, name: str, value: str) -> None:
        """Remember a value."""
        self._run("INSERT OR REPLACE INTO setting VALUES (?, ?)", name, value)

    def has_packet(self, packet_id: str) -> bool:
        """Whether the packet is known here."""
        return bool(self._rows("SELECT 1 FROM packet WHERE packet_id = ?", packet_id))

    def packet(self, packet_id: str) -> PacketRow:
        """One packet, by its whole identifier or an unambiguous beginning of it.

        Raises:
            RejectedError: AG-SIT-003.
        """
        if not packet_id or not packet_id.isalnum():
            raise RejectedError("AG-SIT-003", "a packet is named by the hex digits of its id")
        rows = self._rows("SELECT * FROM packet WHERE packet_id GLOB ? LIMIT 2", packet_id + "*")
        if len(rows) != 1:
            found = "more than one packet begins" if rows else "no packet here begins"
            raise RejectedError("AG-SIT-003", f"{found} with {packet_id[:32]}")
        return self._parse(_packet, rows[0])

    def packets(self) -> tuple[PacketRow, ...]:
        """All packets, oldest first."""
        rows = self._rows("SELECT * FROM packet ORDER BY rowid")
        return tuple(self._parse(_packet, row) for row in rows)

    def history(self, packet_id: str) -> tuple[Change, ...]:
        """The states a packet went through, oldest first."""
        rows = self._rows("SELECT * FROM history WHERE packet_id = ? ORDER BY number", packet_id)
        return tuple(Change(r["state"], r["code"], r["reason"], r["time"]) for r in rows)

    # --- items ---

    def add_item(self, item: Item, direction: Direction, packet_id: str = "") -> None:
        """Record an item that waits to be sent or received; knowing it already is no error."""
        self._run(
            "INSERT INTO item (item_id, direction, kind, description, packet_id, state, code, time)"
            " VALUES (?, ?, ?, ?, ?, 'waiting', '', ?) ON CONFLICT (item_id) DO NOTHING",
            item.item_id, direction, item.kind, item.to_bytes(), packet_id, now_text(),
        )  # fmt: skip

    def find_item(self, item_id: str, direction: Direction) -> ItemRow | None:
        """One item, or None."""
        rows = self._rows(
            "SELECT * FROM item WHERE item_id = ? AND direction = ?", item_id, direction
        )
        return self._parse(_item, rows[0]) if rows else None

    def items(self, direction: Direction, state: str, limit: int = -1) -> tuple[ItemRow, ...]:
        """Items in one state, oldest first."""
        rows = self._rows(
            "SELECT * FROM item WHERE direction = ? AND state = ? ORDER BY number LIMIT ?",
            direction, state, limit,
        )  # fmt: skip
        return tuple(self._parse(_item, row) for row in rows)

    def move_item(self, item_id: str, before: str, after: str, code: str = "") -> bool:
        """Change an item's state; False if it was not in `before`."""
        return bool(
            self._run(
                "UPDATE item SET state = ?, code = ? WHERE item_id = ? AND state = ?",
                after, code, item_id, before,
            )
        )  # fmt: skip

    def add_part(self, item_id: str, number: int) -> None:
        """Record that a part lies on disk, synced."""
        self._run("INSERT OR IGNORE INTO part VALUES (?, ?)", item_id, number)

    def parts(self, item_id: str) -> frozenset[int]:
        """Numbers of the parts that lie on disk."""
        rows = self._rows("SELECT number FROM part WHERE item_id = ?", item_id)
        return frozenset(row["number"] for row in rows)

    def forget_parts(self, item_id: str) -> None:
        """Drop the part records of an item that is complete or refused."""
        self._run("DELETE FROM part WHERE item_id = ?", item_id)

    def set_item_packet(self, item_id: str, packet_id: str) -> None:
        """Record which packet an incoming item is a copy of."""
        self._run("UPDATE item SET packet_id = ? WHERE item_id = ?", packet_id, item_id)

    # --- jobs ---

    def add_job(
        self, lane: Lane, kind: str, subject: str, arguments: Mapping[str, Any] | None = None
    ) -> int:
        """Queue work and return its number."""
        with self.transaction():
            cursor = self._connection().execute(
                "INSERT INTO job (lane, kind, subject, arguments, state, attempts, progress,"
                " result, code, cause, time)"
                " VALUES (?, ?, ?, ?, 'queued', 0, '{}', '{}', '', '', ?)",
                (lane, kind, subject, _write(arguments or {}), now_text()),
            )
            return int(cursor.lastrowid or 0)

    def next_job(self, lane: Lane) -> JobRow | None:
        """Take the oldest queued job of a lane and mark it running."""
        with self.transaction():
            rows = self._rows(
                "SELECT * FROM job WHERE lane = ? AND state = 'queued' ORDER BY number LIMIT 1",
                lane,
            )
            if not rows:
                return None
            number = rows[0]["number"]
            self._run(
                "UPDATE job SET state = 'running', attempts = attempts + 1 WHERE number = ?",
                number,
            )
            return self.job(number)

    def requeue_jobs(self) -> int:
        """Queue again what a killed process left running; call with the directory lock held."""
        return self._run("UPDATE job SET state = 'queued' WHERE state = 'running'")

    def set_progress(self, number: int, progress: Mapping[str, Any]) -> None:
        """Replace a job's progress."""
        self._run("UPDATE job SET progress = ? WHERE number = ?", _write(progress), number)

    def finish_job(self, number: int, result: Mapping[str, Any] | None = None) -> None:
        """Mark a job done."""
        self._run(
            "UPDATE job SET state = 'done', result = ? WHERE number = ?",
            _write(result or {}), number,
        )  # fmt: skip

    def fail_job(self, number: int, code: str, cause: str) -> None:
        """Mark a job failed, with the reason."""
        self._run(
            "UPDATE job SET state = 'failed', code = ?, cause = ? WHERE number = ?",
            code, cause, number,
        )  # fmt: skip

    def requeue_job(self, number: int, code: str, cause: str) -> None:
        """Put a job back because something it needs is not there now."""
        self._run(
            "UPDATE job SET state = 'queued', code = ?, cause = ? WHERE number = ?",
            code, cause, number,
        )  # fmt: skip

    def job(self, number: int) -> JobRow:
        """One job.

        Raises:
            RejectedError: AG-SIT-003.
        """
        rows = self._rows("SELECT * FROM job WHERE number = ?", number)
        if not rows:
            raise RejectedError("AG-SIT-003", f"no job number {number}")
        return self._parse(_job, rows[0])

    def has_open_job(self, kind: str, subject: str) -> bool:
        """Whether a job of this kind waits or runs for a subject."""
        return bool(
            self._rows(
                "SELECT 1 FROM job WHERE kind = ? AND subject = ?"
                " AND state IN ('queued', 'running')",
                kind, subject,
            )
        )  # fmt: skip

    def open_jobs(self, subject: str) -> tuple[JobRow, ...]:
        """Jobs that wait or run for a subject, oldest first."""
        rows = self._rows(
            "SELECT * FROM job WHERE subject = ? AND state IN ('queued', 'running')"
            " ORDER BY number",
            subject,
        )
        return tuple(self._parse(_job, row) for row in rows)

    def jobs(self, limit: int = 50) -> tuple[JobRow, ...]:
        """The newest jobs, oldest of them first."""
        rows = self._rows("SELECT * FROM job ORDER BY number DESC LIMIT ?", limit)
        return tuple(self._parse(_job, row) for row in reversed(rows))

    # --- dispatches and attachments ---

    def claim_dispatch(self, dispatch_id: str, packet_id: str) -> bool:
        """Remember a dispatch; False if it was seen before (a replay)."""
        return bool(
            self._run(
                "INSERT OR IGNORE INTO dispatch_seen VALUES (?, ?, ?)",
                dispatch_id, packet_id, now_text(),
            )
        )  # fmt: skip

    def is_dispatch_seen(self, dispatch_id: str) -> bool:
        """Whether a dispatch was taken in before."""
        return bool(self._rows("SELECT 1 FROM dispatch_seen WHERE dispatch_id = ?", dispatch_id))

    def push_attachment(self, packet_id: str, model: str, path: Path, dose: float) -> None:
        """Put an attachment on top of a model's stack."""
        with self.transaction():
            position = len(self.attachments(model))
            self._run(
                "INSERT INTO attachment VALUES (?, ?, ?, ?, ?, ?)",
                packet_id, model, position, str(path), dose, now_text(),
            )  # fmt: skip

    def set_attachment_dose(self, packet_id: str, dose: float) -> None:
        """Record at which dose an attachment is kept."""
        self._run("UPDATE attachment SET dose = ? WHERE packet_id = ?", dose, packet_id)

    def drop_attachment(self, packet_id: str) -> None:
        """Take an attachment out of its model's stack; those above move down."""
        with self.transaction():
            rows = self._rows("SELECT * FROM attachment WHERE packet_id = ?", packet_id)
            self._run("DELETE FROM attachment WHERE packet_id = ?", packet_id)
            for row in rows:
                for above in self.attachments(row["model"]):
                    if above.position > row["position"]:
                        self._run(
                            "UPDATE attachment SET position = ? WHERE packet_id = ?",
                            above.position - 1, above.packet_id,
                        )  # fmt: skip

    def attachments(self, model: str) -> tuple[AttachmentRow, ...]:
        """A model's stack of kept attachments, bottom first."""
        rows = self._rows("SELECT * FROM attachment WHERE model = ? ORDER BY position", model)
        return tuple(
            AttachmentRow(
                row["packet_id"], row["model"], row["position"], Path(row["path"]), row["dose"],
                row["time"],
            )
            for row in rows
        )  # fmt: skip

    # --- screens ---

    def put_screened(
        self, combination: str, verdict: str, overridden: bool, report: Mapping[str, Any]
    ) -> None:
        """Record what the screens of a composed model found; the latest counts."""
        self._run(
            "INSERT OR REPLACE INTO screened VALUES (?, ?, ?, ?, ?)",
            combination, verdict, int(overridden), _write(report), now_text(),
        )  # fmt: skip

    def screened(self, combination: str) -> ScreenedRow | None:
        """What the screens of a composed model found, or None if nobody ran them."""
        rows = self._rows("SELECT * FROM screened WHERE combination = ?", combination)
        if not rows:
            return None
        return self._parse(_screened, rows[0])

    def put_spectrum(
        self, packet_id: str, base: str, kind: str, figures: Mapping[str, Any]
    ) -> None:
        """Add a kept packet's figures to the bank of its base and kind."""
        self._run(
            "INSERT OR REPLACE INTO spectrum VALUES (?, ?, ?, ?, ?)",
            packet_id, base, kind, _write(figures), now_text(),
        )  # fmt: skip

    def drop_spectrum(self, packet_id: str) -> None:
        """Forget a packet's figures."""
        self._run("DELETE FROM spectrum WHERE packet_id = ?", packet_id)

    def spectra(self, base: str, kind: str, but: str = "", limit: int = 64) -> tuple[Any, ...]:
        """The bank of a base and kind, newest first, as JSON objects; without one packet."""
        rows = self._rows(
            "SELECT figures FROM spectrum WHERE base = ? AND kind = ? AND packet_id <> ?"
            " ORDER BY rowid DESC LIMIT ?",
            base, kind, but, limit,
        )  # fmt: skip
        return tuple(self._parse(_spectrum, row) for row in rows)

    def put_ancestry(self, weights_digest: str, parents: Sequence[Any]) -> None:
        """Remember which packets a snapshot holds that this site exported."""
        self._run(
            "INSERT OR REPLACE INTO ancestry VALUES (?, ?, ?)",
            weights_digest, json.dumps(list(parents)), now_text(),
        )  # fmt: skip

    def ancestry(self, weights_digest: str) -> tuple[Any, ...]:
        """The packets inside a snapshot that this site exported, as JSON objects."""
        rows = self._rows("SELECT parents FROM ancestry WHERE weights_digest = ?", weights_digest)
        return self._parse(_ancestry, rows[0]) if rows else ()

    # --- receipts ---

    def add_receipt(self, row: ReceiptRow) -> None:
        """Record a recipient's receipt for one of our packets."""
        self._run(
            "INSERT OR IGNORE INTO receipt VALUES (?, ?, ?, ?, ?)",
            row.packet_id, row.site, row.state, row.code, row.time,
        )  # fmt: skip

    def receipts(self, packet_id: str) -> tuple[ReceiptRow, ...]:
        """Receipts for one packet, oldest first."""
        rows = self._rows("SELECT * FROM receipt WHERE packet_id = ? ORDER BY rowid", packet_id)
        return tuple(
            ReceiptRow(r["packet_id"], r["site"], r["state"], r["code"], r["time"]) for r in rows
        )


def now_text() -> str:
    """The current time as documents write it."""
    return canonical.format_time(datetime.now(UTC))


def _write(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)


def _model(row: sqlite3.Row) -> ModelRow:
    return ModelRow(
        row["name"], Path(row["path"]), Path(row["data"]), Path(row["retention"]),
        _object(row["facts"]), row["time"],
    )  # fmt: skip


def _packet(row: sqlite3.Row) -> PacketRow:
    known = DONOR_STATES if row["role"] == "donor" else RECIPIENT_STATES
    if row["state"] not in known:
        raise ValueError
    return PacketRow(**{**dict(row), "facts": _object(row["facts"])})


def _item(row: sqlite3.Row) -> ItemRow:
    item = Item.from_json(canonical.loads(row["description"]))
    return ItemRow(item, row["direction"], row["packet_id"], row["state"], row["code"])


def _job(row: sqlite3.Row) -> JobRow:
    fields = dict(row)
    for name in ("arguments", "progress", "result"):
        fields[name] = _object(fields[name])
    return JobRow(**fields)


def _screened(row: sqlite3.Row) -> ScreenedRow:
    return ScreenedRow(
        row["combination"], row["verdict"], bool(row["overridden"]), _object(row["report"]),
        row["time"],
    )  # fmt: skip


def _spectrum(row: sqlite3.Row) -> Any:
    return json.loads(row["figures"])


def _ancestry(row: sqlite3.Row) -> tuple[Any, ...]:
    return tuple(json.loads(row["parents"]))


def _object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise TypeError
    return value
