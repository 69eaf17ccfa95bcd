# SPDX-License-Identifier: Apache-2.0
"""What an operator sees: the coordinator's state, read from disk whether or not the daemon runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from allograft.crypto import canonical
from allograft.durable import is_directory_locked
from allograft.errors import RejectedError
from allograft.log.store import LogReader
from allograft.roster.client import RosterClient
from allograft.roster.records import Roster
from allograft_server.roster_front import INCOMING
from allograft_server.settings import State, read_settings
from allograft_server.store import Store


@dataclass(frozen=True, slots=True)
class PacketLine:
    """One packet and what became of its deliveries.

    Attributes:
        deliveries: Recipient → state, over all dispatches.
    """

    packet_id: str
    donor: str
    kind: str
    state: str
    deliveries: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Overview:
    """The coordinator at a glance.

    Attributes:
        roster_waits: Whether an imported roster waits for the daemon.
        roster_version: 0 if there is no roster yet.
        roster_expires: Empty if there is no roster yet.
        log_entries: Entries in the log.
        waiting: Items that wait for sites, by kind.
    """

    name: str
    address: str
    running: bool
    roster_waits: bool
    roster_version: int
    roster_expires: str
    sites: int
    log_entries: int
    waiting: Mapping[str, int]
    packets: tuple[PacketLine, ...]


@dataclass(frozen=True, slots=True)
class SiteLine:
    """One site of the roster.

    Attributes:
        standing: `enrolled`, `revoked`, or `expired`.
        seen: When it last answered; empty if never.
        roster_version: The version it last said it trusts.
        witnessed_size: The log size it last cosigned.
        has_card: Whether it told us its models.
    """

    site: str
    standing: str
    seen: str
    roster_version: int
    witnessed_size: int
    has_card: bool


def read_overview(state: State) -> Overview:
    """Read the state directory.

    Raises:
        UnavailableError: AG-STO-003 if there is no coordinator in it.
        RejectedError: AG-CRD-001, AG-CRD-012.
    """
    settings = read_settings(state)
    roster = _read_roster(state)
    store = Store(state.database)
    waiting = Counter(row.item.kind for row in store.items_in("waiting"))
    packets = tuple(
        PacketLine(
            row.packet_id,
            row.donor,
            row.kind,
            row.state,
            {
                delivery.site: delivery.state
                for dispatch in store.dispatches_of(row.packet_id)
                for delivery in store.deliveries(dispatch.dispatch_id)
            },
        )
        for row in store.packets()
    )
    store.close()
    return Overview(
        name=settings.name,
        address=settings.address,
        running=is_directory_locked(state.root),
        roster_waits=(state.roster / INCOMING).exists(),
        roster_version=roster.version if roster else 0,
        roster_expires=canonical.format_time(roster.expires) if roster else "",
        sites=len(roster.sites) if roster else 0,
        log_entries=_log_size(state),
        waiting=dict(waiting),
        packets=packets,
    )


def read_sites(state: State, now: datetime) -> tuple[SiteLine, ...]:
    """Every site of the roster, also the revoked ones.

    Raises:
        UnavailableError: AG-STO-003 if there is no coordinator in the directory.
        RejectedError: AG-ROS-009 if there is no roster yet.
    """
    read_settings(state)
    roster = RosterClient(state.roster).latest()
    store = Store(state.database)
    reported, cards = store.sites(), store.card_sites()
    store.close()
    lines = []
    for name in sorted({*roster.sites, *roster.revoked}):
        row = reported.get(name)
        lines.append(
            SiteLine(
                site=name,
                standing=_standing(roster, name, now),
                seen=row.seen if row else "",
                roster_version=row.roster_version if row else 0,
                witnessed_size=row.witnessed_size if row else 0,
                has_card=name in cards,
            )
        )
    return tuple(lines)


def render_overview(overview: Overview) -> str:
    """The overview as text."""
    version, until = overview.roster_version, overview.roster_expires
    roster = "none yet; see `allograft-coordinator import-roster`"
    if overview.roster_waits:
        roster = "imported; the daemon applies it"
    if version:
        roster = f"version {version}, {overview.sites} sites, until {until}"
    waiting = ", ".join(f"{count} {kind}" for kind, count in sorted(overview.waiting.items()))
    lines = [
        f"coordinator  {overview.name} at {overview.address}",
        f"daemon       {'running' if overview.running else 'not running'}",
        f"roster       {roster}",
        f"log          {overview.log_entries} entries",
        f"waiting      {waiting or 'nothing'}",
    ]
    for packet in overview.packets:
        deliveries = ", ".join(f"{s}: {state}" for s, state in sorted(packet.deliveries.items()))
        lines.append(
            f"packet       {packet.packet_id} {packet.kind} of {packet.donor}, {packet.state}"
            + (f" ({deliveries})" if deliveries else "")
        )
    return "\n".join(lines)


def render_sites(lines: tuple[SiteLine, ...]) -> str:
    """The sites as text, one a line."""
    if not lines:
        return "the roster names no site yet"
    return "\n".join(
        f"{line.site}  {line.standing}  "
        + (f"seen {line.seen}, roster {line.roster_version}, " if line.seen else "never seen, ")
        + (f"witnessed {line.witnessed_size} entries, " if line.witnessed_size else "")
        + ("has a card" if line.has_card else "no card yet")
        for line in lines
    )


def _read_roster(state: State) -> Roster | None:
    try:
        return RosterClient(state.roster).latest()
    except RejectedError:
        return None


def _standing(roster: Roster, site: str, now: datetime) -> str:
    try:
        roster.site(site, now)
    except RejectedError as error:
        return "revoked" if error.code == "AG-ROS-003" else "expired"
    return "enrolled"


def _log_size(state: State) -> int:
    if not state.log.exists():
        return 0
    log = LogReader(state.log)
    try:
        return log.size
    finally:
        log.close()
