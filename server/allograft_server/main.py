# SPDX-License-Identifier: Apache-2.0
"""`allograft-coordinator`: found a coordinator, give it its roster, run it, look at it.

Heavy imports (Flower, gRPC, the log) are made inside the commands that need them, so that help and
mistakes answer at once. None of them needs torch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from allograft.cli import shell
from allograft.cli.shell import Format, FormatOption, emit
from allograft_server.settings import State

app = typer.Typer(
    help="Coordinator of an Allograft consortium: routes sealed packets it cannot open.",
    no_args_is_help=True,
    add_completion=False,
)

_VARIABLE = "ALLOGRAFT_COORDINATOR_STATE"

StateOption = Annotated[
    Path,
    typer.Option(
        "--state", envvar=_VARIABLE, help="The coordinator's state directory.", show_default=False
    ),
]


@app.callback()
def _start(
    version: Annotated[bool, shell.version_option("allograft-coordinator")] = False,
) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Founded:
    """What `init` made."""

    name: str
    address: str
    request: Path
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Imported:
    """What `import-roster` took."""

    version: int
    sites: tuple[str, ...]
    root_fingerprint: str


@app.command()
def init(
    name: Annotated[str, typer.Option("--name", help="The coordinator's id: a-z, 0-9 and -.")],
    address: Annotated[str, typer.Option("--address", help="HOST:PORT that sites will dial.")],
    state: StateOption,
    format: FormatOption = Format.text,
) -> None:
    """Make the coordinator's keys, its TLS certificate and its enrolment request."""
    from allograft.roster.enrolment import fingerprint
    from allograft_server.founding import found_coordinator

    home = _home(state)
    request = found_coordinator(home, name, address, _now())
    emit(
        Founded(name, address, home.enrolment, fingerprint(request)),
        format,
        lambda made: (
            f"made {home.root}\n"
            f"give {made.request} to the keepers of the roster\n"
            f"fingerprint to compare with them: {made.fingerprint}"
        ),
    )


@app.command("import-roster")
def import_roster(
    published: Annotated[Path, typer.Argument(help="What `allograft roster publish` wrote.")],
    state: StateOption,
    format: FormatOption = Format.text,
) -> None:
    """Take a published roster; a running daemon applies it within seconds."""
    from allograft_server import roster_front
    from allograft_server.daemon import read_keys
    from allograft_server.settings import read_settings

    home = _home(state)
    settings = read_settings(home)
    keys = read_keys(home)
    roster, fingerprint = roster_front.import_roster(home, published, settings.name, keys, _now())
    emit(
        Imported(roster.version, tuple(sorted(roster.sites)), fingerprint),
        format,
        lambda taken: (
            f"took a roster of {len(taken.sites)} sites: {', '.join(taken.sites)}\n"
            f"fingerprint of its root: {taken.root_fingerprint}"
        ),
    )


@app.command()
def serve(state: StateOption) -> None:
    """Run the coordinator until it is stopped."""
    from allograft_server.daemon import serve as run_daemon

    run_daemon(_home(state))


@app.command()
def status(state: StateOption, format: FormatOption = Format.text) -> None:
    """Show the coordinator, its log and every packet with its deliveries."""
    from allograft_server.overview import read_overview, render_overview

    emit(read_overview(_home(state)), format, render_overview)


@app.command()
def sites(state: StateOption, format: FormatOption = Format.text) -> None:
    """Show every site of the roster and when it last answered."""
    from allograft_server.overview import read_sites, render_sites

    emit(read_sites(_home(state), _now()), format, render_sites)


def _home(path: Path) -> State:
    return State(Path(os.path.abspath(path)))


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def main() -> NoReturn:
    """The console script."""
    shell.run(app, "allograft-coordinator")
