# SPDX-License-Identifier: Apache-2.0
"""`allograft-site packet follow`: what happens to a packet, line by line, as it happens."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import click
import typer

from allograft.cli.shell import Format, FormatOption, to_json
from allograft.errors import RejectedError, UnavailableError
from allograft_client.options import StateOption, TimeoutOption, open_state
from allograft_client.requests import find_progress
from allograft_client.rows import ReceiptRow
from allograft_client.site import Site
from allograft_client.store import DONOR_STATES, RECIPIENT_STATES

_LOOK_S = 0.5


@dataclass(frozen=True, slots=True)
class Glimpse:
    """A packet at one moment: its state, what a worker does about it, who answered."""

    packet_id: str
    state: str
    code: str
    reason: str
    progress: str
    receipts: tuple[ReceiptRow, ...]


def follow(
    packet: Annotated[str, typer.Argument(help="Packet id; it need not have arrived yet.")],
    until: Annotated[
        list[str] | None, typer.Option(help="State to stop at; may be given several times.")
    ] = None,
    state: StateOption = None,
    timeout_s: TimeoutOption = 86400.0,
    format: FormatOption = Format.text,
) -> None:
    """Print each change of a packet; without --until, for ever."""
    wanted = frozenset(until or ())
    if not wanted <= DONOR_STATES | RECIPIENT_STATES:
        known = ", ".join(sorted(DONOR_STATES | RECIPIENT_STATES))
        raise RejectedError("AG-IN-003", f"--until: the states are {known}")
    site = open_state(state)
    for glimpse in _changes(site, packet, timeout_s):
        if format is Format.json:
            click.echo(json.dumps(to_json(glimpse), sort_keys=True, ensure_ascii=False))
        else:
            click.echo(_render(glimpse))
        if glimpse.state in wanted:
            return


def _changes(site: Site, packet: str, timeout_s: float) -> Iterator[Glimpse]:
    end_s = time.monotonic() + timeout_s
    last: Glimpse | None = None
    while time.monotonic() < end_s:
        glimpse = _look(site, packet)
        if glimpse is not None and glimpse != last:
            yield glimpse
            last = glimpse
        time.sleep(_LOOK_S)
    where = f"it is {last.state}" if last else "it is not here"
    raise UnavailableError("AG-SIT-009", f"the packet reached no state to stop at; {where}")


def _look(site: Site, packet: str) -> Glimpse | None:
    try:
        row = site.store.packet(packet)
    except RejectedError:
        return None  # not here yet
    return Glimpse(
        packet_id=row.packet_id,
        state=row.state,
        code=row.code,
        reason=row.reason,
        progress=find_progress(site, row.packet_id),
        receipts=site.store.receipts(row.packet_id),
    )


def _render(glimpse: Glimpse) -> str:
    code = f" [{glimpse.code}]" if glimpse.code else ""
    told = "".join(f"; {receipt.site}: {receipt.state}" for receipt in glimpse.receipts)
    words = glimpse.progress or glimpse.reason
    return f"{glimpse.packet_id[:12]}  {glimpse.state:17}  {words}{code}{told}"
