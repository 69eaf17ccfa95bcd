# SPDX-License-Identifier: Apache-2.0
"""What the demo found, as JSON for scripts and as a table for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class PacketFigures:
    """The one real packet."""

    id: str
    kind: str
    payload_bytes: int
    sealed_bytes: int


@dataclass(frozen=True, slots=True)
class SiteOutcome:
    """How one site ended.

    Attributes:
        verdict: What the site's check said before anything was opened.
        state: The packet's final state there.
        reason: Code or words behind the state.
        gain: Fall of held-out loss on the site's own domain text, nats per token; None untried.
        gain_low: Lower end of its 95 % interval.
        null_gain: The same fall for noise of the packet's norm, at its luckiest draw.
        retention_change: Rise of loss on its general text, nats per token; None untried.
        dose: The dose that the gate chose; None untried.
    """

    verdict: str
    state: str
    reason: str
    gain: float | None = None
    gain_low: float | None = None
    null_gain: float | None = None
    retention_change: float | None = None
    dose: float | None = None


@dataclass(frozen=True, slots=True)
class Tampered:
    """What became of the copy with one flipped bit."""

    state: str
    error: str


@dataclass(frozen=True, slots=True)
class Foreign:
    """Why a stranger's key did not open the packet."""

    error: str


@dataclass(frozen=True, slots=True)
class Revert:
    """Whether taking the organ out restored state and logits bit for bit."""

    bit_exact: bool


@dataclass(frozen=True, slots=True)
class Audit:
    """The offline audit of the exported log."""

    entries: int
    verified: bool
    witnesses: int


@dataclass(frozen=True, slots=True)
class Report:
    """Everything `--report` writes."""

    seconds: float
    packet: PacketFigures
    sites: Mapping[str, SiteOutcome]
    tampered: Tampered
    foreign: Foreign
    revert: Revert
    audit: Audit

    def to_json(self) -> dict[str, object]:
        """The report as a JSON object."""
        return asdict(self)


def print_report(report: Report, console: Console) -> None:
    """Print the closing tables."""
    packet = report.packet
    sites = Table(title="What happened to the packet", title_justify="left")
    for column in ("site", "check", "outcome", "domain", "by noise", "general", "dose"):
        sites.add_column(column, no_wrap=True)
    for name, site in report.sites.items():
        sites.add_row(
            name,
            site.verdict,
            _outcome(site.state),
            _change(None if site.gain is None else -site.gain),
            _change(None if site.null_gain is None else -site.null_gain),
            _change(site.retention_change),
            "" if site.dose is None else f"{site.dose:g}",
        )
    console.print()
    console.print(sites)
    for name, site in report.sites.items():
        console.print(f"  {name}: {site.reason}")
    console.print(
        "[dim]Columns 4 to 6: change of loss in nats per token, on text of the site that no choice "
        "was made on; negative is better. By noise: a packet of random weights of equal norm.[/dim]"
    )
    checks = Table(title="What was tried against it", title_justify="left", show_header=False)
    checks.add_column("attack")
    checks.add_column("result")
    checks.add_row("one bit flipped in a sealed part", _result(report.tampered))
    checks.add_row("opened with another site's key", f"refused: {report.foreign.error}")
    checks.add_row(
        "kept organ taken out again",
        "restored bit for bit" if report.revert.bit_exact else "[red]NOT restored exactly[/red]",
    )
    checks.add_row(
        "log checked offline from its export",
        f"{report.audit.entries} entries, {report.audit.witnesses} witnesses: "
        + ("verified" if report.audit.verified else "[red]NOT verified[/red]"),
    )
    console.print()
    console.print(checks)
    console.print(
        f"\nPacket {packet.id[:12]}… ({packet.kind}): {packet.payload_bytes:,} bytes of tensors, "
        f"{packet.sealed_bytes:,} sealed. {report.seconds:.0f} s in all."
    )


def _outcome(state: str) -> str:
    color = {"kept": "green", "reverted": "yellow", "refused": "yellow"}.get(state, "white")
    return f"[{color}]{state}[/{color}]"


def _change(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}"


def _result(tampered: Tampered) -> str:
    return f"{tampered.state}: {tampered.error}"
