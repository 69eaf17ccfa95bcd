# SPDX-License-Identifier: Apache-2.0
"""What `allograft demo --privacy` found, as JSON for scripts and as a table for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

from allograft.cli.demo.report import Audit, SiteOutcome


@dataclass(frozen=True, slots=True)
class Way:
    """One way of training.

    Attributes:
        name: What the table calls it.
        words: How it trains, in words.
        epsilon: What the noise is chosen for; None trains without.
        steps: Updates of the weights.
        learning_rate: Peak rate.
    """

    name: str
    words: str
    epsilon: float | None
    steps: int
    learning_rate: float


@dataclass(frozen=True, slots=True)
class WayOutcome:
    """What came of one way.

    Attributes:
        packet_id: The packet at its donor.
        epsilon: Its promise; None without noise.
        gain: Fall of held-out loss, nats per token, on patients who were not trained on.
        retention_change: Change of the loss on general text, nats per token; negative is worse.
        recognised: Share of patients that the best attack recognises when it wrongly accuses 1 %.
        recognised_low: Lower end of its 95 % interval.
        passages: Passages of one patient alone that come back within 1,000 tries.
        exposure_once: Median exposure of canaries planted once, in bits; 1 is chance.
        exposure_most: The same of canaries planted sixteen times.
        gates: Verdict by gate.
        left: Whether it left the donor.
    """

    packet_id: str
    epsilon: float | None
    gain: float
    retention_change: float
    recognised: float | None
    recognised_low: float | None
    passages: float | None
    exposure_once: float | None
    exposure_most: float | None
    gates: Mapping[str, str]
    left: bool


@dataclass(frozen=True, slots=True)
class PrivacyReport:
    """Everything `--report` writes.

    Attributes:
        seconds: Of the whole story.
        patients: In the ward; about two fifths of them are held out.
        ways: By name.
        recipient: How the packet that left ended at its recipient; None if none left.
        audit: The offline audit of the log.
        page: The dossier of the packet that left, as a page; empty if none left.
    """

    seconds: float
    patients: int
    ways: Mapping[str, WayOutcome]
    recipient: SiteOutcome | None
    audit: Audit
    page: str

    def to_json(self) -> dict[str, object]:
        """The report as a JSON object."""
        return asdict(self)


def print_privacy_report(report: PrivacyReport, console: Console) -> None:
    """Print the closing table."""
    table = Table(title="The same organ, trained four ways", title_justify="left")
    for column in ("training", "domain", "recognised", "passages", "bits x1", "x16", "outcome"):
        table.add_column(column, no_wrap=True)
    for name, way in report.ways.items():
        table.add_row(
            name,
            f"{-way.gain:+.3f}",
            "-" if way.recognised is None else f"{1000 * way.recognised:.0f}",
            "-" if way.passages is None else f"{way.passages:.0f}",
            _bits(way.exposure_once),
            _bits(way.exposure_most),
            _describe(way),
        )
    console.print()
    console.print(table)
    console.print(
        "[dim]Domain: change of loss on patients who were not trained on, nats per token; negative "
        "is better. Recognised: of 1,000 patients, those that the best attack finds at a setting "
        "that wrongly accuses 10; one that knows nothing finds 10. Passages: text of one patient "
        "alone that comes back within 1,000 tries. Bits: how much better a text planted once, or "
        "sixteen times, is known than ones that never were; chance is 1. All of this stays at the "
        "donor.[/dim]"
    )
    for name, way in report.ways.items():
        stopped = {gate: verdict for gate, verdict in way.gates.items() if verdict != "PASS"}
        if "INVALID" in stopped.values() and "FAIL" not in stopped.values():
            console.print(
                f"  {name}: INVALID proves no leak; so few canaries could not have shown one."
            )
    if report.recipient is not None:
        console.print(
            f"  The packet that left was {report.recipient.state}: {report.recipient.reason}"
        )
    console.print(
        f"\nLog of {report.audit.entries} entries verified offline. {report.seconds:.0f} s in all."
    )


def _bits(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _describe(way: WayOutcome) -> str:
    stopped = [gate for gate, verdict in way.gates.items() if verdict != "PASS"]
    if way.left:
        return "[green]left[/green]"
    if stopped:
        worst = "FAIL" if "FAIL" in way.gates.values() else "INVALID"
        return f"[red]{worst} {' '.join(stopped)}[/red]"
    return "[yellow]nobody agreed[/yellow]"
