# SPDX-License-Identifier: Apache-2.0
"""`allograft evaluate`: every recipe on every kind of recipient, beside its controls."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from allograft.cli.demo import text as demo_text
from allograft.cli.shell import Format, FormatOption, emit
from allograft.errors import RejectedError
from allograft.evaluate.transfer.figures import make_figures
from allograft.evaluate.transfer.plan import ARMS, SIZES, MatrixPlan
from allograft.evaluate.transfer.report import RunReport
from allograft.evaluate.transfer.run import Progress, run_matrix
from allograft.evaluate.transfer.text import MOST_SHARED, Sources, Texts, make_texts
from allograft.evaluate.transfer.world import OwnModels, is_large
from allograft.recipes.documents import Document, read_documents, split_documents

app = typer.Typer(add_completion=False)

_HELD_OUT = 0.3


@app.command()
def evaluate(
    base: Annotated[Path | None, typer.Option(help="Your own model directory as the base.")] = None,
    recipient: Annotated[
        list[str] | None,
        typer.Option(help="NAME=DIRECTORY of another model to try packets on; repeatable."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="The donor's documents (.jsonl, .txt, also .gz).")
    ] = None,
    general: Annotated[
        Path | None, typer.Option(help="General documents, to stay good at.")
    ] = None,
    wrong: Annotated[
        Path | None, typer.Option(help="Documents of another domain, for the control.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Minutes: tiny models.")] = False,
    size: Annotated[str, typer.Option(help="quick, cpu or gpu.")] = "cpu",
    recipe: Annotated[list[str] | None, typer.Option(help="Only these kinds; repeatable.")] = None,
    controls: Annotated[bool, typer.Option(help="Run controls and baselines too.")] = True,
    cache: Annotated[
        Path, typer.Option(help="Models and finished cells; a second run goes on from here.")
    ] = Path("allograft-evaluation"),
    out: Annotated[
        Path | None, typer.Option(help="Where the results are written; by default the cache.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes, of one thread each.")] = min(
        4, os.cpu_count() or 1
    ),
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    format: FormatOption = Format.text,
) -> None:
    """Measure what recipes move between models, and whether it is more than controls explain.

    Without files it makes models of this Python's documentation and donors of invented clinical
    notes. Nothing is compared unless full fine-tuning <= LoRA < zero-shot on the donor's text.
    """
    name = "quick" if quick else size
    if name not in SIZES:
        raise typer.BadParameter(f"--size is one of {', '.join(SIZES)}")
    arms = tuple(arm for arm in ARMS if not recipe or arm.kind in recipe or arm.reference)
    scale = 0.1 if base is not None and is_large(base) else 1.0
    plan = MatrixPlan(SIZES[name], arms, device, rate_scale=scale, controls=controls)
    own = OwnModels(base, _read_recipients(recipient or []))
    texts = make_texts(_read_sources(data, general, wrong), plan.size.amounts)
    report = run_report(cache, texts, plan, own, workers)
    files = report.write(out or cache, "evaluation")
    emit(report.to_json(), format, lambda _: report.to_markdown() + _list(files))
    if not report.figures.sanity.holds:
        raise RejectedError("AG-EVA-006", report.figures.sanity.reason)


def run_report(
    cache: Path, texts: Texts, plan: MatrixPlan, own: OwnModels, workers: int
) -> RunReport:
    """Run a matrix with its progress on stderr."""
    began = time.monotonic()
    console = Console(stderr=True)
    with console.status("looking for what an earlier run finished") as status:

        def tell(step: Progress) -> None:
            words = f"{step.phase}: {step.done} of {step.of}, {step.what}"
            if console.is_terminal:
                status.update(words)
            else:
                console.print(words)

        cells = run_matrix(cache, texts, plan, own, workers, tell)
    reference = next(arm.name for arm in plan.arms if arm.reference)
    return RunReport(make_figures(cells, reference), texts, plan, time.monotonic() - began)


def _read_sources(data: Path | None, general: Path | None, wrong: Path | None) -> Sources:
    """A person's files, or text that is made here."""
    if general is None:
        python = demo_text.read_python_text()
        trained, kept = (
            [Document(text) for text in texts] for texts in (python.training, python.retention)
        )
    else:
        trained, kept = split_documents(read_documents(general), _HELD_OUT)
    if data is None:
        medicine = demo_text.invent_medicine()
        own, held = (
            [Document(note.text) for note in demo_text.write_notes(medicine, count, seed)]
            for count, seed in ((1500, 0), (400, 1))
        )
        nature = (
            "Held-out notes are of other patients, but all are made of the same sentences: only "
            "the n-gram baseline beside them tells what a gain is worth."
        )
        most_shared = 0.95
    else:
        own, held = split_documents(read_documents(data), _HELD_OUT)
        nature, most_shared = "Split by document.", MOST_SHARED
    return Sources(
        domain=data.name if data else "invented clinical notes",
        training=own,
        held_out=held,
        general_training=trained,
        general_held_out=kept,
        wrong=read_documents(wrong) if wrong else (),
        nature=nature,
        most_shared=most_shared,
    )


def _read_recipients(named: list[str]) -> dict[str, Path]:
    found = {}
    for each in named:
        name, equals, directory = each.partition("=")
        if not equals or not name:
            raise typer.BadParameter("--recipient takes NAME=DIRECTORY")
        found[name] = Path(directory)
    return found


def _list(files: tuple[Path, ...]) -> str:
    return "\nWritten: " + ", ".join(map(str, files))
