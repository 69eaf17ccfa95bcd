# SPDX-License-Identifier: Apache-2.0
"""`allograft-site` on packets: donate, approve, dispatch, withdraw; show, try, keep, revert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from allograft.cli.shell import Format, FormatOption, emit
from allograft.errors import RejectedError
from allograft.evaluate.screen import NO_PROOF
from allograft.privacy.page import tell_findings
from allograft.privacy.report import FullReport, read_report
from allograft.recipes.plan import make_recipe_plan
from allograft_client import requests
from allograft_client.follow import follow
from allograft_client.main_model import finish
from allograft_client.options import (
    DoraOption,
    FrozenOption,
    ModulesOption,
    RankingOption,
    RsloraOption,
    StateOption,
    TargetOption,
    TimeoutOption,
    VirtualTokensOption,
    WaitOption,
    open_state,
)
from allograft_client.plan import DonationPlan
from allograft_client.plan_files import find_plan
from allograft_client.protected import REPORT_NAME
from allograft_client.rows import PacketRow
from allograft_client.site import Site

PacketArgument = Annotated[str, typer.Argument(help="Packet id, or the beginning of one.")]

packet_app = typer.Typer(no_args_is_help=True, help="One packet in detail.")
packet_app.command("follow")(follow)


def donate(
    model: Annotated[str, typer.Option(help="Model of this site to train on.")],
    data: Annotated[Path, typer.Option(help="Text to learn from: .txt or .jsonl; never leaves.")],
    domain: Annotated[str, typer.Option(help="What the packet is about, in a few words.")],
    declare: Annotated[
        str, typer.Option(help="Mode open: the data is declared to be `public` or `synthetic`.")
    ] = "",
    declared_by: Annotated[
        str, typer.Option(help="Mode open: role that declares it; never a name.")
    ] = "",
    privacy_plan: Annotated[
        str, typer.Option("--plan", help="Modes strict and measured: the signed privacy plan.")
    ] = "",
    recipe: Annotated[
        str, typer.Option(help="`organ`, `lora`, `delta`, `module_graft` or `prompt`.")
    ] = "organ",
    mode: Annotated[str, typer.Option(help="Privacy mode: open, measured or strict.")] = "open",
    language: Annotated[str, typer.Option(help="Language of the text.")] = "en",
    purpose: Annotated[str, typer.Option(help="What recipients may use it for.")] = (
        "evaluation and local use"
    ),
    allow_merge: Annotated[
        bool, typer.Option("--allow-merge", help="Let recipients write it into snapshots.")
    ] = False,
    allow_distil: Annotated[
        bool, typer.Option("--allow-distil", help="Let recipients train other models on it.")
    ] = False,
    allow_redonate: Annotated[
        bool, typer.Option("--allow-redonate", help="Let recipients pass on what they build on it.")
    ] = False,
    steps: Annotated[int, typer.Option(min=1, help="Updates of the weights.")] = 200,
    batch: Annotated[int, typer.Option(min=1, help="Windows per forward pass.")] = 16,
    accumulation: Annotated[int, typer.Option(min=1, help="Forward passes per step.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    window: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 256,
    blocks: Annotated[int, typer.Option(min=1, help="Organ: how many blocks.")] = 2,
    position: Annotated[int | None, typer.Option(min=0, help="Organ: where they go.")] = None,
    rank: Annotated[int, typer.Option(min=1, help="LoRA: rank.")] = 8,
    alpha: Annotated[float, typer.Option(help="LoRA: scale.")] = 16.0,
    target_module: TargetOption = None,
    rslora: RsloraOption = False,
    dora: DoraOption = False,
    frozen_a: FrozenOption = "",
    modules: ModulesOption = 0,
    ranking: RankingOption = "activation",
    virtual_tokens: VirtualTokensOption = 20,
    tuned: Annotated[
        str,
        typer.Option(
            help="Module graft, mode open: a model of this site that was trained already."
        ),
    ] = "",
    seed: Annotated[int, typer.Option(min=0, help="Seed of split and training.")] = 0,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Less memory, a third more time.")
    ] = False,
    valid_days: Annotated[int, typer.Option(help="Days it can be dispatched and opened.")] = 30,
    retention_days: Annotated[int, typer.Option(help="Days a recipient may keep it.")] = 365,
    state: StateOption = None,
    wait: WaitOption = True,
    timeout_s: TimeoutOption = 86400.0,
    format: FormatOption = Format.text,
) -> None:
    """Train a packet on this site's text, gate it, and prepare its evidence."""
    from allograft_client.donor import plan_donation

    site = open_state(state)
    asked = DonationPlan(
        model=model,
        kind=recipe,
        data=data.resolve(),
        mode=mode,
        nature=declare,
        declared_by=declared_by,
        domain=domain,
        language=language,
        purpose=purpose,
        merge=allow_merge,
        distil=allow_distil,
        redonate=allow_redonate,
        valid_days=valid_days,
        retention_days=retention_days,
        steps=steps,
        batch_windows=batch,
        accumulation=accumulation,
        learning_rate=learning_rate,
        seed=seed,
        window_tokens=window,
        checkpointing=checkpointing,
        recipe=make_recipe_plan(
            recipe,
            blocks=blocks,
            position=position,
            rank=rank,
            alpha=alpha,
            target_modules=tuple(target_module or ()),
            rslora=rslora,
            dora=dora,
            frozen_a=frozen_a,
            modules=modules,
            ranking=ranking,
            virtual_tokens=virtual_tokens,
        ),
        privacy_plan=privacy_plan,
        tuned=tuned,
    )
    if privacy_plan:
        # Mode, kind, training and who is a person were fixed when the plan was signed.
        asked = asked.under(find_plan(site, privacy_plan).plan)
    packet_id, number = plan_donation(site, asked)
    result = {"packet_id": packet_id, **finish(site, number, wait, timeout_s, format)}
    emit(result, format, lambda value: _render_donated(site, packet_id))


def approve(
    packet: PacketArgument,
    role: Annotated[str, typer.Option(help="Role that agrees, as the policy names it.")],
    despite_warnings: Annotated[
        bool,
        typer.Option("--despite-warnings", help="Agree although an audit warns; read them first."),
    ] = False,
    state: StateOption = None,
    wait: WaitOption = True,
    timeout_s: TimeoutOption = 600.0,
    format: FormatOption = Format.text,
) -> None:
    """Agree to a packet's dossier in a role; the last role needed offers the packet."""
    site = open_state(state)
    packet_id = site.store.packet(packet).packet_id
    arguments = {"role": role, "despite_warnings": despite_warnings}
    number = requests.request(site, "approve", packet_id, arguments)
    result = {"packet_id": packet_id, **finish(site, number, wait, timeout_s, format)}
    emit(result, format, lambda _: _render_with_warnings(site.store.packet(packet_id)))


def dispatch(
    packet: PacketArgument,
    to: Annotated[list[str], typer.Option(help="Recipient; give it several times for several.")],
    state: StateOption = None,
    wait: WaitOption = True,
    timeout_s: TimeoutOption = 3600.0,
    format: FormatOption = Format.text,
) -> None:
    """Seal a packet for named sites and let it leave."""
    from allograft_client.dispatcher import queue_dispatch

    site = open_state(state)
    packet_id = site.store.packet(packet).packet_id
    number = queue_dispatch(site, packet_id, sorted(set(to)))
    result = {"packet_id": packet_id, **finish(site, number, wait, timeout_s, format)}
    emit(result, format, lambda _: _render_dispatched(site.store.packet(packet_id)))


def withdraw(
    packet: PacketArgument,
    state: StateOption = None,
    wait: WaitOption = True,
    timeout_s: TimeoutOption = 600.0,
    format: FormatOption = Format.text,
) -> None:
    """Take a packet back: stop its delivery and tell its holders to detach it."""
    _act("withdraw", packet, state, wait, timeout_s, format)


def trial(
    packet: PacketArgument,
    despite_alarm: Annotated[
        bool,
        typer.Option(
            "--despite-alarm", help="Go on if a screen alarms; your decision is recorded."
        ),
    ] = False,
    state: StateOption = None,
    wait: WaitOption = True,
    timeout_s: TimeoutOption = 86400.0,
    format: FormatOption = Format.text,
) -> None:
    """Screen a verified packet and try it on this site's own text; the gate decides."""
    arguments = {"despite_alarm": True} if despite_alarm else {}
    _act("trial", packet, state, wait, timeout_s, format, arguments)


def keep(
    packet: PacketArgument,
    state: StateOption = None,
    wait: WaitOption = True,
    timeout_s: TimeoutOption = 600.0,
    format: FormatOption = Format.text,
) -> None:
    """Attach a packet that passed its trial."""
    _act("keep", packet, state, wait, timeout_s, format)


def revert(
    packet: PacketArgument,
    state: StateOption = None,
    wait: WaitOption = True,
    timeout_s: TimeoutOption = 3600.0,
    format: FormatOption = Format.text,
) -> None:
    """Take a kept packet out, and show that the model is bit-equal to before; or decline it."""
    _act("revert", packet, state, wait, timeout_s, format)


def packets(state: StateOption = None, format: FormatOption = Format.text) -> None:
    """Show every packet in its one state, with the reason."""
    site = open_state(state)
    rows = site.store.packets()
    listed = {
        "packets": [describe_packet(site, row) for row in rows],
        "extras": [
            {
                "item": extra.item_id,
                "packet_id": extra.packet_id,
                "state": "quarantined",
                "code": extra.code,
                "reason": extra.reason,
                "time": extra.time,
            }
            for extra in site.store.extras()
        ],
    }
    emit(listed, format, lambda value: _render_packets(rows, value))


@packet_app.command("show")
def show(
    packet: PacketArgument, state: StateOption = None, format: FormatOption = Format.text
) -> None:
    """Show one packet: state, reason, history, figures, receipts."""
    site = open_state(state)
    row = site.store.packet(packet)
    described = describe_packet(site, row)
    emit(described, format, lambda value: _render_packet(value))


@packet_app.command("people")
def people(
    packet: PacketArgument, state: StateOption = None, format: FormatOption = Format.text
) -> None:
    """Name the persons whom a packet knows best, and what the audits found. Stays in the house."""
    site = open_state(state)
    row = site.store.packet(packet)
    path = site.packet_path(row.packet_id, REPORT_NAME)
    if not path.is_file():
        raise RejectedError("AG-SIT-019", f"packet {row.packet_id[:12]} was not audited here")
    report = read_report(path)
    described = {
        "packet_id": row.packet_id,
        "people": [
            {
                "person": who.person,
                "saved": who.saved,
                "extractable": who.extractable,
                "recognised": who.recognised,
            }
            for who in report.people
        ],
        "figures": {gate: dict(figures) for gate, figures in report.figures.items()},
    }
    emit(described, format, lambda _: _render_people(report))


def describe_packet(site: Site, row: PacketRow) -> dict[str, Any]:
    """A packet as the command line shows it."""
    return {
        "packet_id": row.packet_id,
        "role": row.role,
        "donor": row.donor,
        "kind": row.kind,
        "model": row.model,
        "dispatch_id": row.dispatch_id,
        "state": row.state,
        "code": row.code,
        "reason": row.reason,
        "progress": requests.find_progress(site, row.packet_id),
        "time": row.time,
        "facts": row.facts,
        "history": [
            {"state": c.state, "code": c.code, "reason": c.reason, "time": c.time}
            for c in site.store.history(row.packet_id)
        ],
        "receipts": [
            {"site": r.site, "state": r.state, "code": r.code, "time": r.time}
            for r in site.store.receipts(row.packet_id)
        ],
    }


def _act(
    kind: str,
    packet: str,
    state: Path | None,
    wait: bool,
    timeout_s: float,
    format: Format,
    arguments: Mapping[str, Any] | None = None,
) -> None:
    site = open_state(state)
    packet_id = site.store.packet(packet).packet_id
    number = requests.request(site, kind, packet_id, arguments)
    result = {"packet_id": packet_id, **finish(site, number, wait, timeout_s, format)}
    emit(result, format, lambda _: _line(site.store.packet(packet_id)))


def _line(row: PacketRow, progress: str = "") -> str:
    code = f" [{row.code}]" if row.code else ""
    words = progress or row.reason
    return f"{row.packet_id[:12]}  {row.role:9}  {row.state:17}  {words}{code}"


def _render_people(report: FullReport) -> str:
    lines = [
        "For this site alone: these are ids from its data. The audits read 500 people at most.",
        "",
        *tell_findings(report),
    ]
    if report.people:
        lines += ["", f"{'person':32}  recognised  passages that come back  nats per token saved"]
        lines += [
            f"{who.person[:32]:32}  {'yes' if who.recognised else 'no':10}  "
            f"{who.extractable:23,}  {who.saved:20.3f}"
            for who in report.people
        ]
    return "\n".join(lines)


def _render_donated(site: Site, packet_id: str) -> str:
    row = site.store.packet(packet_id)
    facts = row.facts
    if "payload_bytes" not in facts:
        return _line(row)
    figures = facts["evaluation"]
    return "\n".join(
        [
            _line(row),
            f"Held-out gain {figures['gain']:+.3f} nats per token at dose {facts['dose']:g} "
            f"({figures['result'].lower()}); gates passed: "
            + ", ".join(gate["name"] for gate in facts["gates"]),
            f"Would leave this site, once approved and dispatched: {facts['payload_bytes']:,} bytes"
            " of tensors, sealed for the recipients alone, and signed statements about them.",
            "Does not leave: the text, its path, the model's own weights.",
            *_warnings(facts),
        ]
    )


def _render_dispatched(row: PacketRow) -> str:
    sent = row.facts.get("dispatches", [])
    if not sent:
        return _line(row)
    return (
        f"{_line(row)}\n{sent[-1]['sealed_bytes']:,} sealed bytes wait to be fetched; "
        f"only {', '.join(sent[-1]['sites'])} can open them."
    )


def _render_packets(rows: Sequence[PacketRow], value: dict[str, Any]) -> str:
    described = zip(rows, value["packets"], strict=True)
    lines = [_line(row, packet["progress"]) for row, packet in described]
    lines += [
        f"{extra['packet_id'][:12]}  copy       quarantined        {extra['reason']} "
        f"[{extra['code']}]"
        for extra in value["extras"]
    ]
    return "\n".join(lines) or "No packets yet."


def _warnings(facts: Mapping[str, Any]) -> list[str]:
    """What whoever approves must weigh, a line each."""
    return [
        f"warning: {gate['name']}: {words}"
        for gate in facts.get("gates", [])
        for words in gate.get("warnings", [])
    ]


def _render_with_warnings(row: PacketRow) -> str:
    return "\n".join([_line(row), *_warnings(row.facts)])


def _describe_scan(listed: Mapping[str, int] | None) -> str:
    if listed is None:
        return "scanned for patterns; the site names no list of identifiers"
    return (
        "scanned for patterns and with the site's list of identifiers, of which "
        f"{listed['skipped']} cells cannot be matched"
    )


def _render_packet(value: dict[str, Any]) -> str:
    lines = [
        f"packet {value['packet_id']} ({value['kind'] or 'kind unknown'}) by {value['donor']}",
        f"state  {value['state']}: {value['reason']}"
        + (f" [{value['code']}]" if value["code"] else ""),
    ]
    if value["progress"]:
        lines.append(f"now    {value['progress']}")
    if value["model"]:
        lines.append(f"model  {value['model']}")
    lines += _warnings(value["facts"])
    if "gates" in value["facts"]:
        lines.append(f"text   {_describe_scan(value['facts'].get('identifier_list'))}")
    for screen in value["facts"].get("screens", []):
        lines.append(f"screen {screen['verdict']} at dose {screen['dose']:g}; {NO_PROOF}")
        lines += [
            f"       {result['name']}: {result['verdict']}, {result['reason']}"
            for result in screen["screens"]
        ]
        if screen["verdict"] == "ALARM":
            lines += [f"       {line}" for r in screen["screens"] for line in r["worst"]]
    if value["facts"].get("overridden"):
        lines.append("       tried despite the alarm, by an operator's decision")
    if trial_figures := value["facts"].get("trial"):
        lines.append(
            f"trial  gain {trial_figures['gain']:+.3f} "
            f"[{trial_figures['gain_low']:+.3f}, {trial_figures['gain_high']:+.3f}], null "
            f"{trial_figures['null_gain']:+.3f}, loss on general text "
            f"{trial_figures['retention_change']:+.3f}, dose {trial_figures['dose']:g}"
        )
    for proposal in value["facts"].get("proposals", []):
        lines.append(f"route  {proposal['site']}: {proposal['verdict']} — {proposal['reason']}")
    for receipt in value["receipts"]:
        lines.append(
            f"told   {receipt['site']}: {receipt['state']} {receipt['code']} {receipt['time']}"
        )
    lines += [f"  {c['time']}  {c['state']:17}  {c['reason']}" for c in value["history"]]
    return "\n".join(lines)
