# SPDX-License-Identifier: Apache-2.0
"""`allograft`: what operators, keepers of a roster and auditors run; no daemon needed.

Each group of commands is imported when one of its commands is called, so `allograft --help` loads
neither tensor libraries nor Flower, and the auditor's machine needs neither.
"""

from __future__ import annotations

import importlib
from typing import Annotated, NoReturn

import click
import typer
from typer.core import TyperGroup

from allograft.cli import shell

#: Group → the module that defines its `app`, and the line that --help shows.
_GROUPS = {
    "packet": ("allograft.cli.packet", "Inspect, verify, open and lint packets."),
    "dossier": ("allograft.cli.dossier", "Read the privacy evidence of a packet."),
    "roster": ("allograft.cli.roster", "Keep the roster: enrol and revoke sites, publish."),
    "audit": ("allograft.cli.audit", "Verify an exported log offline, without trusting anyone."),
    "evaluate": (
        "allograft.cli.evaluate",
        "Try recipes on kinds of models, beside controls.",
    ),
    "demo": ("allograft.cli.demo.main", "Move one real packet between processes on this machine."),
}


class _Groups(TyperGroup):
    """Groups by name; only the one that is called is imported."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_GROUPS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _GROUPS:
            return None
        return click.Command(cmd_name, help=_GROUPS[cmd_name][1])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in _GROUPS:
            return super().resolve_command(ctx, args)
        module = importlib.import_module(_GROUPS[name][0])
        return name, typer.main.get_command(module.app), args[1:]


app = typer.Typer(
    cls=_Groups,
    no_args_is_help=True,
    add_completion=False,
    help="Share what a model learnt, never the data it learnt it from.",
)


@app.callback()
def _start(
    version: Annotated[bool, shell.version_option("allograft")] = False,
) -> None:
    pass


def main() -> NoReturn:
    """Console entry point."""
    shell.run(app, "allograft")
