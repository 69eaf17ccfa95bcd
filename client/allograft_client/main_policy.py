# SPDX-License-Identifier: Apache-2.0
"""`allograft-site policy …`: what may leave and come in, and who signed that."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from allograft.cli.shell import Format, FormatOption, emit
from allograft.privacy.policy import AUDITED_MODES
from allograft.privacy.signed_policy import check_unchanged
from allograft_client import policy_desk
from allograft_client.options import StateOption, find_home
from allograft_client.policy_desk import PolicyState

app = typer.Typer(
    no_args_is_help=True, help="What may leave and come in; strict and measured need it signed."
)


@app.command("sign")
def sign(
    role: Annotated[str, typer.Option(help="The role that read policy.toml and decides so.")],
    state: StateOption = None,
    format: FormatOption = Format.text,
) -> None:
    """Sign policy.toml as it stands; the copy that was signed is kept in policy.toml.sig."""
    signing = policy_desk.sign(find_home(state), role)
    signed, before = signing.signed, signing.before
    value = {
        "digest": signed.policy.digest,
        "role": signed.role,
        "time": signed.time,
        "weaker": list(signed.weaker),
        "compared_with": None
        if before is None
        else {"digest": before.policy.digest, "role": before.role, "time": before.time},
        "note": signing.note,
    }
    emit(value, format, _render_signed)


@app.command("show")
def show(state: StateOption = None, format: FormatOption = Format.text) -> None:
    """Show the policy with defaults filled in, its signature, and what became weaker since."""
    emit(_describe(policy_desk.read_state(find_home(state))), format, _render_policy)


@app.command("check")
def check(
    mode: Annotated[
        str, typer.Option(help="Also ask whether packets may be made under this mode.")
    ] = "",
    state: StateOption = None,
    format: FormatOption = Format.text,
) -> None:
    """Refuse a policy that is not the signed one, naming the fields that became weaker."""
    found = policy_desk.read_state(find_home(state))
    _check(found, mode)
    emit(_describe(found), format, _render_signature)


def _check(found: PolicyState, mode: str) -> None:
    for name in [mode] if mode else found.policy.donate.modes:
        found.policy.check_mode(name)
    if not mode or mode in AUDITED_MODES:
        check_unchanged(found.policy, found.signed)


def _describe(found: PolicyState) -> dict[str, Any]:
    policy, signed = found.policy, found.signed
    return {
        "digest": policy.digest,
        "donate": policy.donate.model_dump(mode="json"),
        "receive": policy.receive.model_dump(mode="json"),
        "receipt": policy.receipt.model_dump(mode="json"),
        "audit": policy.audit.model_dump(mode="json"),
        "signed": found.is_signed,
        "last_signature": None
        if signed is None
        else {"digest": signed.policy.digest, "role": signed.role, "time": signed.time},
        "weaker": list(found.weaker),
    }


def _render_signed(value: dict[str, Any]) -> str:
    lines = [f"Signed by role {value['role']} at {value['time']}: {value['digest'][:16]}…"]
    if value["note"]:
        lines.append(value["note"])
    if value["weaker"]:
        lines.append(f"Weaker than what was signed before: {', '.join(value['weaker'])}")
    return "\n".join(lines)


def _render_policy(value: dict[str, Any]) -> str:
    lines = []
    for section in ("donate", "receive", "receipt", "audit"):
        lines.append(f"[{section}]")
        lines += [f"  {name} = {_write(entry)}" for name, entry in value[section].items()]
    return "\n".join([*lines, _render_signature(value)])


def _write(entry: object) -> str:
    return ", ".join(map(str, entry)) or "none" if isinstance(entry, list) else str(entry)


def _render_signature(value: dict[str, Any]) -> str:
    last = value["last_signature"]
    if last is None:
        return "Not signed: open works, strict and measured refuse [AG-PRV-006]."
    by = f"by role {last['role']} at {last['time']}"
    if value["signed"]:
        return f"Signed {by}."
    weaker = ", ".join(value["weaker"]) or "no field"
    return f"Changed since it was signed {by} [AG-PRV-007]; weaker: {weaker}."
