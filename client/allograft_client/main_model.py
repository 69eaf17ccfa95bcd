# SPDX-License-Identifier: Apache-2.0
"""`allograft-site model …`: the models that packets are made on and tried on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from allograft.cli.shell import Format, FormatOption, emit
from allograft.errors import UnavailableError
from allograft_client import requests
from allograft_client.options import StateOption, TimeoutOption, WaitOption, open_state
from allograft_client.rows import ModelRow
from allograft_client.screens import describe_combination
from allograft_client.site import Site, model_ancestors

app = typer.Typer(
    no_args_is_help=True, help="Models of this site: digests leave it, weights never do."
)


@app.command("add")
def add(
    name: Annotated[str, typer.Argument(help="What this site calls the model.")],
    path: Annotated[Path, typer.Option(help="Directory with config, tokenizer and safetensors.")],
    data: Annotated[Path, typer.Option(help="This site's own text of its domain, to try on.")],
    retention: Annotated[Path, typer.Option(help="General text the model must stay good at.")],
    state: StateOption = None,
    wait: WaitOption = True,
    timeout_s: TimeoutOption = 3600.0,
    format: FormatOption = Format.text,
) -> None:
    """Measure a model and let the coordinator know its digests and shape."""
    site = open_state(state)
    for what, given in (("data", data), ("retention", retention)):
        if not given.is_file():
            raise UnavailableError("AG-STO-005", f"--{what}: there is no file {given}")
    if not path.is_dir():
        raise UnavailableError("AG-STO-005", f"--path: there is no directory {path}")
    arguments = {
        "path": str(path.resolve()),
        "data": str(data.resolve()),
        "retention": str(retention.resolve()),
    }
    number = requests.request(site, "add-model", name, arguments)
    result = finish(site, number, wait, timeout_s, format)
    emit(result, format, lambda value: _render_added(site, name, value))


@app.command("list")
def list_models(state: StateOption = None, format: FormatOption = Format.text) -> None:
    """Show the models with what is attached to each."""
    site = open_state(state)
    models = [describe_model(site, model) for model in site.store.models()]
    emit({"models": models}, format, lambda value: _render_models(value["models"]))


@app.command("export")
def export(
    name: Annotated[str, typer.Argument(help="A model of this site.")],
    out: Annotated[Path, typer.Option(help="Directory to write; must not exist.")],
    as_format: Annotated[
        str, typer.Option("--as", help="`merged` snapshot or `peft` adapter directory.")
    ] = "merged",
    state: StateOption = None,
    timeout_s: TimeoutOption = 3600.0,
    format: FormatOption = Format.text,
) -> None:
    """Write a model with its kept attachments for other tools; the copy is yours to guard."""
    site = open_state(state)
    if as_format not in {"merged", "peft"}:
        raise typer.BadParameter("--as is merged or peft")
    arguments = {"out": str(out.resolve()), "format": as_format}
    number = requests.request(site, "export", site.store.model(name).name, arguments)
    result = finish(site, number, True, timeout_s, format)
    emit(result, format, lambda value: f"Wrote {value['out']} with {value['attachments']} packets.")


@app.command("screen")
def screen(
    name: Annotated[str, typer.Argument(help="A model of this site.")],
    state: StateOption = None,
    wait: WaitOption = True,
    timeout_s: TimeoutOption = 3600.0,
    format: FormatOption = Format.text,
) -> None:
    """Screen what is kept on a model, as it is composed now; no screen proves absence."""
    site = open_state(state)
    number = requests.request(site, "screen", site.store.model(name).name)
    result = finish(site, number, wait, timeout_s, format)
    emit(result, format, lambda value: render_screened(value) if wait else "Queued.")


@app.command("scale")
def scale(
    name: Annotated[str, typer.Argument(help="A model of this site.")],
    apply: Annotated[
        bool, typer.Option("--apply", help="Keep the doses if held-out text confirms them.")
    ] = False,
    state: StateOption = None,
    wait: WaitOption = True,
    timeout_s: TimeoutOption = 86400.0,
    format: FormatOption = Format.text,
) -> None:
    """Learn on this site's own text how strongly its attachments should act together."""
    site = open_state(state)
    arguments = {"apply": apply}
    number = requests.request(site, "scale", site.store.model(name).name, arguments)
    result = finish(site, number, wait, timeout_s, format)
    emit(result, format, lambda value: _render_scales(value) if wait else "Queued.")


@app.command("route")
def route(
    name: Annotated[str, typer.Argument(help="A model of this site.")],
    state: StateOption = None,
    wait: WaitOption = True,
    timeout_s: TimeoutOption = 86400.0,
    format: FormatOption = Format.text,
) -> None:
    """Show which attachment, or none, would answer requests like this site's own text."""
    site = open_state(state)
    number = requests.request(site, "route", site.store.model(name).name)
    result = finish(site, number, wait, timeout_s, format)
    emit(result, format, lambda value: _render_routes(value) if wait else "Queued.")


def _render_scales(value: dict[str, Any]) -> str:
    report = value["report"]
    lines = [
        f"packet {packet_id[:12]}: dose {report['present'][packet_id]:g}, learnt {learnt:g}, "
        f"kept at {value['doses'][packet_id]:g}"
        for packet_id, learnt in sorted(report["learnt"].items())
    ]
    gain, worse = report["gain"], report["retention_change"]
    lines.append(
        f"{'Confirmed' if report['accepted'] else 'Not accepted'}: {report['reason']}. Held out: "
        f"{gain['value']:+.3f} nats per token saved [{gain['low']:+.3f}, {gain['high']:+.3f}], "
        f"general text {worse['value']:+.3f} against the plain base."
    )
    return "\n".join(lines)


def _render_routes(value: dict[str, Any]) -> str:
    lines = []
    for what in ("domain", "retention"):
        found = value[what]
        if not found["documents"]:
            lines.append(f"{what}: no document is long enough")
            continue
        shares = [f"{n} by packet {key[:12]}" for key, n in sorted(found["chosen"].items())]
        lines.append(
            f"{what}: of {found['documents']} documents {', '.join(shares)}, {found['base']} by "
            f"the base; loss {found['loss_base']:.3f} with the base, {found['loss_routed']:.3f} "
            "routed, nats per token"
        )
    return "\n".join(lines)


def render_screened(found: dict[str, Any]) -> str:
    """How a combination stands, in one line."""
    by_hand = "; kept despite it, by an operator's decision" if found.get("overridden") else ""
    return f"  together: {found['verdict']}, {found['reason']}{by_hand}"


def finish(site: Site, number: int, wait: bool, timeout_s: float, format: Format) -> dict[str, Any]:
    """The result of a job, or a note that it waits for the daemon."""
    if not wait:
        return {"job": number, "state": "queued"}
    with requests.progress_line(format is Format.text) as show:
        job = requests.await_job(site, number, timeout_s, show)
    return {"job": number, **job.result}


def describe_model(site: Site, model: ModelRow) -> dict[str, Any]:
    """A model as the command line shows it."""
    base = model.facts["base"]
    return {
        "name": model.name,
        "path": str(model.path),
        "weights_digest": base["weights_digest"],
        "architecture": base["architecture"],
        "documents": model.facts["documents"],
        "retention_documents": model.facts["retention_documents"],
        "attachments": [
            {"packet_id": entry.packet_id, "dose": entry.dose}
            for entry in site.store.attachments(model.name)
        ],
        "screened": describe_combination(site, model),
        "parents": [entry.parent.packet_id for entry in model_ancestors(model)],
    }


def _render_added(site: Site, name: str, value: dict[str, Any]) -> str:
    if value.get("state") == "queued":
        return f"Queued: `allograft-site status` shows when {name} has been measured."
    model = describe_model(site, site.store.model(name))
    return (
        f"{name}: weights {value['weights_digest'][:16]}…, {model['documents']} documents to try "
        f"on, {model['retention_documents']} for retention.\n"
        "Leaves this site: the digests and the shape, on the site's card.\n"
        "Does not leave: weights, text, paths."
    )


def _render_models(models: list[dict[str, Any]]) -> str:
    if not models:
        return "No models yet: `allograft-site model add`."
    lines = []
    for model in models:
        shape = model["architecture"]
        lines.append(
            f"{model['name']}: {shape['family']}, {shape['layers']} layers of {shape['hidden']}, "
            f"weights {model['weights_digest'][:16]}…"
        )
        lines += [
            f"  + packet {entry['packet_id'][:12]} at dose {entry['dose']:g}"
            for entry in model["attachments"]
        ]
        lines += [f"  contains packet {packet_id[:12]}" for packet_id in model["parents"]]
        if model["attachments"]:
            lines.append(render_screened(model["screened"]))
    return "\n".join(lines)
