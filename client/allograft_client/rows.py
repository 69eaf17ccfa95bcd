# SPDX-License-Identifier: Apache-2.0
"""What the site's database hands out: frozen values, one class for each table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allograft.relay.item import Item


@dataclass(frozen=True, slots=True)
class ModelRow:
    """A model of this site; `facts` are what `recipes` measured of it, as JSON."""

    name: str
    path: Path
    data: Path
    retention: Path
    facts: Mapping[str, Any]
    time: str


@dataclass(frozen=True, slots=True)
class PacketRow:
    """A packet, its one state, and why it is in it."""

    packet_id: str
    role: str
    donor: str
    kind: str
    model: str
    dispatch_id: str
    state: str
    code: str
    reason: str
    facts: Mapping[str, Any]
    time: str


@dataclass(frozen=True, slots=True)
class ExtraRow:
    """A copy of a known packet that was quarantined on its own."""

    item_id: str
    packet_id: str
    code: str
    reason: str
    time: str


@dataclass(frozen=True, slots=True)
class Change:
    """One entry of a packet's history."""

    state: str
    code: str
    reason: str
    time: str


@dataclass(frozen=True, slots=True)
class ItemRow:
    """An item of the outbox or inbox."""

    item: Item
    direction: str
    packet_id: str
    state: str
    code: str

    @property
    def item_id(self) -> str:
        """The item's identity."""
        return self.item.item_id


@dataclass(frozen=True, slots=True)
class JobRow:
    """A piece of work; `progress` is the worker's last word about itself."""

    number: int
    lane: str
    kind: str
    subject: str
    arguments: Mapping[str, Any]
    state: str
    attempts: int
    progress: Mapping[str, Any]
    result: Mapping[str, Any]
    code: str
    cause: str
    time: str


@dataclass(frozen=True, slots=True)
class AttachmentRow:
    """A kept attachment; `position` is its place in the model's stack, from 0."""

    packet_id: str
    model: str
    position: int
    path: Path
    dose: float
    time: str


@dataclass(frozen=True, slots=True)
class ScreenedRow:
    """What the screens found in a composed model, named by its `combination_digest`.

    `overridden` says that a person decided to go on despite an alarm.
    """

    combination: str
    verdict: str
    overridden: bool
    report: Mapping[str, Any]
    time: str


@dataclass(frozen=True, slots=True)
class ReceiptRow:
    """What a recipient of one of our packets reported."""

    packet_id: str
    site: str
    state: str
    code: str
    time: str
