# SPDX-License-Identifier: Apache-2.0
"""`allograft-site`: what the operator of a site runs.

Three commands join a consortium: `init` (then send the request and compare fingerprints), `join`,
`serve`. Requests work whether or not the daemon runs. Nothing here loads tensor libraries or
Flower; workers and the daemon do.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, NoReturn

import click
import typer

from allograft.cli import shell
from allograft.cli.shell import Format, FormatOption, emit
from allograft.crypto import canonical
from allograft.errors import RejectedError
from allograft_client import doctor, main_model, main_packet, main_policy, main_privacy, requests
from allograft_client.contact import is_silent, last_heard
from allograft_client.membership import (
    Membership,
    NewSite,
    create_site,
    join_consortium,
    read_invitation,
)
from allograft_client.options import StateOption, find_home, open_state
from allograft_client.screens import describe_combination, is_screened_out

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Run a site: donate what its models learnt, and try what others offer. Never the data.",
)
app.add_typer(main_model.app, name="model")
app.add_typer(main_packet.packet_app, name="packet")
app.add_typer(main_privacy.plan_app, name="plan")
app.add_typer(main_privacy.ledger_app, name="ledger")
app.add_typer(main_policy.app, name="policy")
for _command in (
    main_packet.donate,
    main_packet.recipes,
    main_packet.approve,
    main_packet.dispatch,
    main_packet.withdraw,
    main_packet.packets,
    main_packet.trial,
    main_packet.keep,
    main_packet.revert,
):
    app.command()(_command)


@app.callback()
def _start(
    version: Annotated[bool, shell.version_option("allograft-site")] = False,
) -> None:
    pass


@app.command()
def init(
    site: Annotated[str, typer.Option(help="Name of the site: a-z, 0-9 and dashes.")],
    valid_days: Annotated[int, typer.Option(min=1, max=3650, help="Enrolment to ask for.")] = 365,
    state: StateOption = None,
    format: FormatOption = Format.text,
) -> None:
    """Make the site's keys and its enrolment request."""
    made = create_site(find_home(state), site, valid_days)
    emit(made, format, _render_new)


@app.command()
def join(
    invitation: Annotated[Path, typer.Argument(help="File from the keeper of the roster.")],
    root_fingerprint: Annotated[
        str, typer.Option(help="As the keeper told it; asked for if not given.", show_default=False)
    ] = "",
    state: StateOption = None,
    format: FormatOption = Format.text,
) -> None:
    """Trust the consortium's roster, after comparing its root's fingerprint."""
    home = find_home(state)
    home.settings()
    read = read_invitation(invitation)
    compared = root_fingerprint or _confirm(read.root_fingerprint)
    emit(join_consortium(home, read, compared), format, _render_joined)


@app.command()
def serve(state: StateOption = None) -> None:
    """Run the site's daemon until it is stopped; it dials one port, outwards only."""
    from allograft_client.daemon import serve as run_daemon  # Loads gRPC and the relay.

    run_daemon(find_home(state))


@app.command()
def status(state: StateOption = None, format: FormatOption = Format.text) -> None:
    """Show what the site is doing and what waits for a person."""
    site = open_state(state)
    packets = site.store.packets()
    jobs = [job for job in site.store.jobs() if job.state in {"queued", "running", "failed"}]
    heard = last_heard(site.store)
    is_running = doctor.is_running(site.home)
    value = {
        "site": site.name,
        "coordinator": site.trust.coordinator,
        "roster_version": site.trust.latest_roster().version,
        "coordinator_heard": canonical.format_time(heard) if heard else "",
        "coordinator_silent": is_silent(heard, datetime.now(UTC)),
        "daemon": "running" if is_running else "stopped",
        "models": [model.name for model in site.store.models()],
        "screened": {
            model.name: describe_combination(site, model)
            for model in site.store.models()
            if site.store.attachments(model.name)
        },
        "packets": dict(Counter(row.state for row in packets)),
        "outbox": len(site.store.items("out", "waiting")),
        "inbox": [
            {
                "kind": row.item.kind,
                "parts": row.item.part_count,
                "present": len(site.store.parts(row.item_id)),
            }
            for row in site.store.items("in", "waiting")
        ],
        "jobs": [
            {
                "job": job.number,
                "kind": job.kind,
                "subject": job.subject,
                "state": "queued" if job.state == "running" and not is_running else job.state,
                "progress": requests.describe_progress(job, is_running),
                "details": dict(job.progress),
                "code": job.code,
                "cause": job.cause,
            }
            for job in jobs
        ],
        "waiting_for_people": [
            {"packet_id": row.packet_id, "state": row.state, "reason": row.reason}
            for row in packets
            if row.state in {"awaiting-approval", "routed", "verified", "trialled"}
            or is_screened_out(row)
        ],
    }
    emit(value, format, _render_status)


@app.command("doctor")
def examine(state: StateOption = None, format: FormatOption = Format.text) -> int:
    """Check what this site needs to work; each finding with its cause and its fix."""
    findings = doctor.examine(find_home(state))
    emit({"findings": [asdict(finding) for finding in findings]}, format, _render_findings)
    is_broken = any(finding.level == "error" for finding in findings)
    return shell.EXIT_UNAVAILABLE if is_broken else 0


def main() -> NoReturn:
    """Console entry point."""
    shell.run(app, "allograft-site")


def _confirm(fingerprint: str) -> str:
    if not sys.stdin.isatty():
        raise RejectedError("AG-ROS-010", "nobody compared it; give --root-fingerprint")
    click.echo(f"The invitation's root has the fingerprint\n\n  {_groups(fingerprint)}\n", err=True)
    click.echo("Ask the keeper of the roster, by telephone, to read theirs aloud.", err=True)
    if not typer.confirm("Is it the same?", err=True):
        raise RejectedError("AG-ROS-010", "the fingerprints were found to differ")
    return fingerprint


def _groups(fingerprint: str) -> str:
    return " ".join(fingerprint[start : start + 4] for start in range(0, len(fingerprint), 4))


def _render_new(made: NewSite) -> str:
    return "\n".join(
        [
            f"Site {made.site} has keys in {made.state}/keys; they never leave this machine.",
            f"1. Send {made.request} to the keeper of the roster.",
            f"2. Tell them this fingerprint by telephone: {made.fingerprint}",
            "3. When they send an invitation: allograft-site join INVITATION, then "
            "allograft-site serve.",
            "Until you write policy.toml (see policy.toml.example) nothing leaves and nothing "
            "attaches.",
        ]
    )


def _render_joined(membership: Membership) -> str:
    return "\n".join(
        [
            f"{membership.site} joined the consortium of {membership.coordinator} "
            f"({membership.address}).",
            f"Roster version {membership.roster_version}, {len(membership.sites)} sites: "
            + ", ".join(membership.sites),
            "Leaves this site from now on: a card with the digests and shapes of its models, and "
            "what the policy accepts.",
            "Next: allograft-site serve.",
        ]
    )


def _render_status(value: dict[str, Any]) -> str:
    packets = ", ".join(f"{count} {state}" for state, count in sorted(value["packets"].items()))
    lines = [
        f"{value['site']} at {value['coordinator']}, roster version {value['roster_version']}; "
        f"daemon {value['daemon']}",
        _render_contact(value),
        f"models: {', '.join(value['models']) or 'none'}",
        f"packets: {packets or 'none'}",
        f"outbox: {value['outbox']} items wait to be taken",
    ]
    lines += [
        f"{name}: attachments together {found['verdict']}, {found['reason']}"
        for name, found in value["screened"].items()
        if found["verdict"] != "PASS"
    ]
    lines += [
        f"inbox: {entry['kind']}, {entry['present']} of {entry['parts']} parts"
        for entry in value["inbox"]
    ]
    for job in value["jobs"]:
        words = f"{job['code']}: {job['cause']}" if job["state"] == "failed" else job["progress"]
        lines.append(f"job {job['job']}: {job['kind']} {job['subject'][:12]}: {words}")
    lines += [
        f"waits for you: {entry['packet_id'][:12]} is {entry['state']}: {entry['reason']}"
        for entry in value["waiting_for_people"]
    ]
    return "\n".join(lines)


def _render_contact(value: dict[str, Any]) -> str:
    heard = value["coordinator_heard"]
    if not value["coordinator_silent"]:
        return f"coordinator: heard at {heard}"
    since = f"not heard since {heard}" if heard else "never heard"
    return f"coordinator: {since} [AG-SIT-015]; `allograft-site doctor` tells why"


def _render_findings(value: dict[str, Any]) -> str:
    lines = []
    for finding in value["findings"]:
        code = f" [{finding['code']}]" if finding["code"] else ""
        lines.append(f"{finding['level']:7}  {finding['check']:11}  {finding['detail']}{code}")
        if finding["fix"]:
            lines.append(f"{'':22}fix: {finding['fix']}")
    return "\n".join(lines)
