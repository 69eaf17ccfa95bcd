# SPDX-License-Identifier: Apache-2.0
"""`allograft demo`: options, and what is printed at the end."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from allograft.cli.demo.base import WorldOptions, check_own_files
from allograft.cli.demo.play import PlayOptions, play
from allograft.cli.demo.privacy import play_privacy
from allograft.cli.demo.privacy_report import PrivacyReport, print_privacy_report
from allograft.cli.demo.processes import terminating_as_interrupt
from allograft.cli.demo.report import Report, print_report
from allograft.cli.shell import Format, FormatOption
from allograft.durable import durable_write

app = typer.Typer(add_completion=False)


@app.command()
def demo(
    base: Annotated[
        Path | None, typer.Option(help="Your own model directory instead of a made one.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Your own domain text (.jsonl, .txt, also .gz).")
    ] = None,
    general: Annotated[
        Path | None, typer.Option(help="Your own general text, to stay good at.")
    ] = None,
    declare: Annotated[
        str, typer.Option(help="What --data is declared to be: public or synthetic.")
    ] = "public",
    recipe: Annotated[str, typer.Option(help="What the donor trains: organ or lora.")] = "organ",
    steps: Annotated[int, typer.Option(min=1, help="Training steps of the donor.")] = 140,
    privacy: Annotated[
        bool,
        typer.Option("--privacy", help="Instead: the same organ trained four ways, and who leaks."),
    ] = False,
    report: Annotated[Path | None, typer.Option(help="Write the outcome as JSON.")] = None,
    keep: Annotated[
        Path | None, typer.Option(help="Leave everything in this new directory.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of models and synthetic text.")] = 0,
    format: FormatOption = Format.text,
) -> None:
    """Move one real packet between a coordinator and four sites on this machine.

    A donor trains on notes that nobody wrote; a recipient with the same base keeps what it gets, a
    relative's gate decides, a stranger refuses; a tampered copy is quarantined; a revert is exact;
    and the log is verified offline. Nothing outside this machine is contacted.
    """
    if keep is not None and keep.exists():
        raise typer.BadParameter("--keep names a directory that exists already")
    if report is not None and not os.access(report.resolve().parent, os.W_OK):
        raise typer.BadParameter("--report: its directory cannot be written")
    if privacy and (base or data or general):
        raise typer.BadParameter("--privacy brings its own model and notes")
    check_own_files(WorldOptions(base=base, data=data, general=general))
    as_json = format is Format.json
    console = Console(stderr=as_json)
    options = PlayOptions(
        base=base,
        data=data,
        general=general,
        declare=declare,
        recipe=recipe,
        steps=steps,
        seed=seed,
    )

    def run(directory: Path) -> Report | PrivacyReport:
        if privacy:
            return play_privacy(directory, seed, console)
        return play(directory, options, console)

    with terminating_as_interrupt():
        if keep is not None:
            keep.mkdir(parents=True, mode=0o700)
            outcome = run(keep.resolve())
        else:
            with tempfile.TemporaryDirectory(prefix="allograft-demo-") as directory:
                outcome = run(Path(directory))
    text = json.dumps(outcome.to_json(), indent=2)
    if report is not None:
        durable_write(report.resolve(), text.encode() + b"\n", mode=0o644)
    if as_json:
        print(text)
    elif isinstance(outcome, PrivacyReport):
        print_privacy_report(outcome, console)
    else:
        print_report(outcome, console)
