# SPDX-License-Identifier: Apache-2.0
"""How a benchmark takes its options and tells its figures.

Every benchmark has `--quick` (seconds, prints only) and `--json` (one JSON object on stdout). A
full run also replaces `results/NAME.json` and adds a row to the table of `RESULTS.md`, with the
command, the machine and the date, so that a figure in a README can be traced to a run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

_FOLDER = Path(__file__).resolve().parent
_TABLE = """# Results

One row per full run, appended by the benchmark itself. Ratios travel between machines better than
absolute figures do.

| date | benchmark | figures | machine | command |
|---|---|---|---|---|
"""


@dataclass(frozen=True, slots=True)
class Options:
    """What the person who runs a benchmark asked for."""

    quick: bool
    json: bool


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured value.

    Attributes:
        name: What was measured, in snake case with its unit left out.
        value: The value.
        unit: Such as `s`, `MiB`, `x` (a ratio); may be empty for counts.
        target: What was promised, such as `>= 0.6`; empty if nothing was.
    """

    name: str
    value: float
    unit: str
    target: str = ""

    def __str__(self) -> str:
        """The figure as one short text."""
        number = f"{self.value:,.0f}" if self.value >= 1000 else f"{self.value:.3g}"
        target = f" (target {self.target})" if self.target else ""
        return f"{self.name} {number} {self.unit}".rstrip() + target


def parse_options(description: str, argv: Sequence[str] | None = None) -> Options:
    """Read `--quick` and `--json`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    return Options(arguments.quick, arguments.json)


def publish(
    benchmark: str, figures: Sequence[Figure], options: Options, folder: Path = _FOLDER
) -> None:
    """Print the figures; after a full run also keep them.

    Args:
        benchmark: The name of the module under `benchmarks`.
        figures: What was measured, in reading order.
        options: As `parse_options` returned them.
        folder: Where `RESULTS.md` and `results/` lie.
    """
    now = datetime.now(UTC)
    document = {
        "benchmark": benchmark,
        "command": shlex.join(["python", "-m", f"benchmarks.{benchmark}", *sys.argv[1:]]),
        "date": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "quick": options.quick,
        "machine": describe_machine(),
        "figures": [asdict(figure) for figure in figures],
    }
    text = json.dumps(document, indent=2) + "\n"
    if options.json:
        sys.stdout.write(text)
    else:
        sys.stdout.write("".join(f"{figure}\n" for figure in figures))
    if options.quick:
        return
    results = folder / "results"
    results.mkdir(exist_ok=True)
    (results / f"{benchmark}.json").write_text(text, encoding="utf-8")
    table = folder / "RESULTS.md"
    if not table.exists():
        table.write_text(_TABLE, encoding="utf-8")
    cells = [
        now.strftime("%Y-%m-%d"),
        benchmark,
        "; ".join(str(figure) for figure in figures),
        document["machine"],
        f"`{document['command']}`",
    ]
    row = "| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |"
    lines = table.read_text(encoding="utf-8").splitlines()
    # Below the table stand words about its rows, and tables of their own.
    rule = next(number for number, line in enumerate(lines) if line.startswith("|---"))
    after = next((n for n in range(rule, len(lines)) if not lines[n].startswith("|")), len(lines))
    table.write_text("\n".join([*lines[:after], row, *lines[after:], ""]), "utf-8")


def describe_machine() -> str:
    """Processor, cores, load by others and us, and Python version; no host name."""
    model = platform.machine()
    processors = Path("/proc/cpuinfo")
    if processors.exists():
        for line in processors.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    # A busy machine explains a slow run: ratios that need free cores suffer first.
    load = f"load {os.getloadavg()[0]:.1f}"
    return f"{model}, {os.cpu_count()} cores, {load}, Python {platform.python_version()}"
