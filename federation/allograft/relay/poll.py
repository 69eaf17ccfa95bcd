# SPDX-License-Identifier: Apache-2.0
"""The two bodies of a poll: what the coordinator tells a site, and what the site answers.

A poll is idempotent. It carries whole lists, not changes, so a lost call or answer costs one round
and never an item. See protos/spec/relay.md.
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from allograft.crypto import canonical
from allograft.errors import RejectedError
from allograft.limits import LIMITS
from allograft.relay.item import Item


@dataclass(frozen=True, slots=True)
class Announcement:
    """An item that waits for its recipient; small ones come with their bytes."""

    item: Item
    inline: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Want:
    """The parts of an announced item that the recipient still lacks (at most the next few)."""

    item_id: str
    parts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Refusal:
    """An item that its recipient will never take, and why."""

    item_id: str
    code: str


@dataclass(frozen=True, slots=True)
class PollCall:
    """Coordinator to site.

    Attributes:
        announced: Items that wait for the site.
        stored: Items of the site's outbox that the coordinator holds durably.
        refused: Items of the site's outbox that the coordinator will not take.
        checkpoint: The log's newest signed checkpoint (note text), to be witnessed; may be empty.
        consistency: Hashes (32 bytes each) from the site's witnessed size to the checkpoint.
    """

    announced: tuple[Announcement, ...] = ()
    stored: tuple[str, ...] = ()
    refused: tuple[Refusal, ...] = ()
    checkpoint: str = ""
    consistency: tuple[bytes, ...] = ()

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        return canonical.dumps(
            {
                "v": 1,
                "announced": [_write_announcement(entry) for entry in self.announced],
                "stored": list(self.stored),
                "refused": [_write_refusal(entry) for entry in self.refused],
                "checkpoint": self.checkpoint,
                "consistency": [base64.b64encode(h).decode() for h in self.consistency],
            }
        )

    @classmethod
    def from_bytes(cls, content: bytes) -> PollCall:
        """Read a call body.

        Raises:
            RejectedError: AG-RLY-001 if malformed or over a limit.
        """
        with _poll_errors():
            fields = _read(
                content, {"v", "announced", "stored", "refused", "checkpoint", "consistency"}
            )
            return cls(
                announced=_read_announcements(fields["announced"]),
                stored=tuple(
                    canonical.as_text(entry) for entry in canonical.as_list(fields["stored"])
                ),
                refused=tuple(
                    _read_refusal(entry) for entry in canonical.as_list(fields["refused"])
                ),
                checkpoint=canonical.as_text(fields["checkpoint"]),
                consistency=tuple(
                    _base64(entry) for entry in canonical.as_list(fields["consistency"])
                ),
            )


@dataclass(frozen=True, slots=True)
class PollAnswer:
    """Site to coordinator.

    Attributes:
        outbox: Items that wait to be taken, oldest first.
        wants: Missing parts of announced items, oldest item first.
        done: Announced items that the site holds durably.
        refused: Announced items that the site will not take.
        roster_version: Version of the roster the site trusts; 0 if none.
        witnessed_size: Tree size of the last checkpoint the site witnessed.
        cosignature: The signature line for the offered checkpoint; may be empty.
    """

    outbox: tuple[Announcement, ...] = ()
    wants: tuple[Want, ...] = ()
    done: tuple[str, ...] = ()
    refused: tuple[Refusal, ...] = ()
    roster_version: int = 0
    witnessed_size: int = 0
    cosignature: str = ""

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        return canonical.dumps(
            {
                "v": 1,
                "outbox": [_write_announcement(entry) for entry in self.outbox],
                "wants": [{"item": w.item_id, "parts": list(w.parts)} for w in self.wants],
                "done": list(self.done),
                "refused": [_write_refusal(entry) for entry in self.refused],
                "roster_version": self.roster_version,
                "witnessed_size": self.witnessed_size,
                "cosignature": self.cosignature,
            }
        )

    @classmethod
    def from_bytes(cls, content: bytes) -> PollAnswer:
        """Read an answer body.

        Raises:
            RejectedError: AG-RLY-001 if malformed or over a limit.
        """
        with _poll_errors():
            fields = _read(
                content,
                {
                    "v", "outbox", "wants", "done", "refused", "roster_version", "witnessed_size",
                    "cosignature",
                },
            )  # fmt: skip
            return cls(
                outbox=_read_announcements(fields["outbox"]),
                wants=tuple(_read_want(entry) for entry in canonical.as_list(fields["wants"])),
                done=tuple(canonical.as_text(entry) for entry in canonical.as_list(fields["done"])),
                refused=tuple(
                    _read_refusal(entry) for entry in canonical.as_list(fields["refused"])
                ),
                roster_version=canonical.as_int(fields["roster_version"]),
                witnessed_size=canonical.as_int(fields["witnessed_size"]),
                cosignature=canonical.as_text(fields["cosignature"]),
            )


@contextlib.contextmanager
def _poll_errors() -> Iterator[None]:
    """Give everything that is wrong inside a body the relay's own code."""
    try:
        yield
    except RejectedError as error:
        if error.code.startswith("AG-RLY"):
            raise
        raise RejectedError("AG-RLY-001", f"poll body: {error.cause}") from error


def _read(content: bytes, names: set[str]) -> dict[str, canonical.Json]:
    fields = canonical.as_object(canonical.loads(content, LIMITS.poll_bytes), names)
    if fields["v"] != 1:
        raise RejectedError("AG-RLY-001", "unknown poll version")
    return fields


def _write_announcement(entry: Announcement) -> dict[str, canonical.Json]:
    return {
        "item": entry.item.to_json(),
        "inline": {name: base64.b64encode(data).decode() for name, data in entry.inline.items()},
    }


def _read_announcements(value: canonical.Json) -> tuple[Announcement, ...]:
    entries = canonical.as_list(value)
    if len(entries) > LIMITS.items_per_poll:
        raise RejectedError("AG-RLY-001", f"poll announces {len(entries)} items")
    announcements = []
    for entry in entries:
        fields = canonical.as_object(entry, {"item", "inline"})
        item = Item.from_json(fields["item"])
        inline = canonical.as_mapping(fields["inline"])
        if inline and set(inline) != {file.name for file in item.files}:
            raise RejectedError("AG-RLY-001", "inline files are not the files of the item")
        announcements.append(Announcement(item, {k: _base64(v) for k, v in inline.items()}))
    return tuple(announcements)


def _write_refusal(entry: Refusal) -> dict[str, canonical.Json]:
    return {"item": entry.item_id, "code": entry.code}


def _read_refusal(value: canonical.Json) -> Refusal:
    fields = canonical.as_object(value, {"item", "code"})
    return Refusal(canonical.as_text(fields["item"]), canonical.as_text(fields["code"]))


def _read_want(value: canonical.Json) -> Want:
    fields = canonical.as_object(value, {"item", "parts"})
    parts = tuple(canonical.as_int(part) for part in canonical.as_list(fields["parts"]))
    if len(parts) > LIMITS.parts_in_flight:
        raise RejectedError("AG-RLY-001", f"{len(parts)} parts wanted at once")
    return Want(canonical.as_text(fields["item"]), parts)


def _base64(value: canonical.Json) -> bytes:
    try:
        return base64.b64decode(canonical.as_text(value), validate=True)
    except ValueError as error:
        raise RejectedError("AG-RLY-001", "inline bytes are not base64") from error
