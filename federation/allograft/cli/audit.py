# SPDX-License-Identifier: Apache-2.0
"""`allograft audit`: verify, read and export the log; everything but `export` is offline.

Every command that reads an export verifies all of it first: there is no way to look at a log that
was changed and not be told.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from allograft.cli.shell import Format, FormatOption, emit
from allograft.errors import RejectedError
from allograft.log.audit import Audited, audit_folder
from allograft.log.event import Event
from allograft.log.export import Exported, export_log, is_witnessed
from allograft.log.store import LogReader

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Verify an exported log, trusting no one."
)

_Folder = Annotated[
    Path, typer.Argument(exists=True, file_okay=False, help="What `audit export` wrote.")
]
_RootOption = Annotated[
    str,
    typer.Option(
        "--root-fingerprint", help="Fingerprint of the roster's root, as its keeper tells it."
    ),
]


@dataclass(frozen=True, slots=True)
class Witnessed:
    """Who saw the log, and when."""

    witness: str
    time: datetime


@dataclass(frozen=True, slots=True)
class Verdict:
    """A log that was verified; a log that was not is an error.

    Attributes:
        root_compared: Whether the roster's root is the one that the auditor expected.
        events: How many events of each kind.
        missing_documents: Announced documents that are not in the folder.
        unchecked_receipts: Receipts that could not be compared with the audience of a dispatch.
    """

    origin: str
    entries: int
    root_hash: str
    events: dict[str, int]
    rosters: int
    quorum: int
    witnesses: tuple[Witnessed, ...]
    missing_documents: int
    unchecked_receipts: int
    root_fingerprint: str
    root_compared: bool


@dataclass(frozen=True, slots=True)
class EventLine:
    """One event with its place in the log."""

    index: int
    event: Event


@app.command()
def verify(
    folder: _Folder, root_fingerprint: _RootOption = "", format: FormatOption = Format.text
) -> None:
    """Verify every tile, roster, signature, the order of events, and the witnesses."""
    audited = audit_folder(folder, root_fingerprint)
    emit(_judge(audited, bool(root_fingerprint)), format, _render_verdict)


@app.command("list")
def list_events(
    folder: _Folder,
    packet: Annotated[str, typer.Option(help="Only events about this packet.")] = "",
    site: Annotated[str, typer.Option(help="Only events by this site or coordinator.")] = "",
    root_fingerprint: _RootOption = "",
    format: FormatOption = Format.text,
) -> None:
    """List the events of a log, after verifying it."""
    audited = audit_folder(folder, root_fingerprint)
    lines = tuple(
        EventLine(index, event)
        for index, event in enumerate(audited.events)
        if packet in {"", event.packet_id} and site in {"", event.actor}
    )
    emit(lines, format, lambda found: "\n".join(_render_line(line) for line in found))


@app.command()
def show(
    folder: _Folder,
    index: Annotated[int, typer.Argument(min=0, help="Number of the entry, from 0.")],
    root_fingerprint: _RootOption = "",
    format: FormatOption = Format.text,
) -> None:
    """Show one event of a log, after verifying it."""
    audited = audit_folder(folder, root_fingerprint)
    if index >= audited.size:
        raise RejectedError("AG-LOG-002", f"the log has {audited.size} entries")
    emit(EventLine(index, audited.events[index]), format, _render_event)


@app.command()
def export(
    state: Annotated[Path, typer.Option(help="The coordinator's state directory, or its log.db.")],
    out: Annotated[Path, typer.Option(help="An empty or absent directory.")],
    wait_s: Annotated[
        int,
        typer.Option("--wait-s", min=0, help="Wait this long until every entry is witnessed."),
    ] = 0,
    format: FormatOption = Format.text,
) -> None:
    """Write the log up to its newest witnessed checkpoint as a folder for auditors."""
    log = LogReader(state / "log.db" if state.is_dir() else state)
    try:
        _await_witnesses(log, wait_s)
        exported = export_log(log, out)
    finally:
        log.close()
    emit(exported, format, _render_exported)


def _await_witnesses(log: LogReader, wait_s: int) -> None:
    """Wait until nothing is unwitnessed; if that takes too long, export what there is."""
    end_s = time.monotonic() + wait_s
    while not is_witnessed(log) and time.monotonic() < end_s:
        time.sleep(0.5)


def _judge(audited: Audited, root_compared: bool) -> Verdict:
    events: dict[str, int] = {}
    for event in audited.events:
        events[event.event] = events.get(event.event, 0) + 1
    return Verdict(
        origin=audited.origin,
        entries=audited.size,
        root_hash=audited.root.hex(),
        events=events,
        rosters=audited.rosters,
        quorum=audited.quorum,
        witnesses=tuple(Witnessed(c.witness, c.time) for c in audited.cosignatures),
        missing_documents=audited.missing_documents,
        unchecked_receipts=audited.unchecked_receipts,
        root_fingerprint=audited.root_fingerprint,
        root_compared=root_compared,
    )


def _render_verdict(verdict: Verdict) -> str:
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(verdict.events.items()))
    lines = [
        f"The log {verdict.origin} is whole: {verdict.entries} entries ({kinds}).",
        f"  root hash  {verdict.root_hash}",
        f"  witnesses  {len(verdict.witnesses)}, {verdict.quorum} needed",
        *(f"    {w.witness:<24} {w.time:%Y-%m-%d %H:%M:%S} UTC" for w in verdict.witnesses),
        f"  rosters    {verdict.rosters}, all led back to root {verdict.root_fingerprint}",
    ]
    if verdict.missing_documents:
        lines.append(
            f"WARNING: {verdict.missing_documents} announced documents are not in the folder; what "
            "they said was not checked."
        )
    if verdict.unchecked_receipts:
        lines.append(
            f"WARNING: {verdict.unchecked_receipts} receipts could not be compared with the "
            "audience of their dispatch."
        )
    if not verdict.root_compared:
        lines.append("  Compare that root with the roster's keeper, or give --root-fingerprint.")
    return "\n".join(lines)


def _render_line(line: EventLine) -> str:
    event = line.event
    about = f"{event.packet_id[:12]:<12} {event.outcome}".rstrip()
    start = f"{line.index:>6}  {event.time:%Y-%m-%d %H:%M:%S}"
    return f"{start}  {event.event:<10} {event.actor:<20} {about}"


def _render_event(line: EventLine) -> str:
    event = line.event
    fields = {
        "entry": str(line.index),
        "event": event.event,
        "by": f"{event.actor} ({event.role})",
        "time": f"{event.time:%Y-%m-%d %H:%M:%S} UTC",
        "packet": event.packet_id,
        "dispatch": event.dispatch_id,
        "outcome": event.outcome,
        "document": f"{event.document_name} {event.document_sha256}",
    }
    return "\n".join(f"{name:<9} {value}" for name, value in fields.items() if value)


def _render_exported(exported: Exported) -> str:
    waiting = f"; {exported.waiting} newer ones wait for witnesses" if exported.waiting else ""
    return (
        f"{exported.entries} entries of {exported.origin}, {exported.rosters} rosters, "
        f"{exported.documents} documents{waiting}"
    )
