# SPDX-License-Identifier: Apache-2.0
"""Options that every command of `allograft-site` shares, and how a command opens the state."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from allograft_client.journal import silence_journal
from allograft_client.settings import Home
from allograft_client.site import Site, open_site

STATE_VARIABLE = "ALLOGRAFT_SITE_STATE"
_DEFAULT = Path("~/.local/state/allograft-site")

StateOption = Annotated[
    Path | None,
    typer.Option(
        "--state",
        help=f"State directory; ${STATE_VARIABLE} or {_DEFAULT} if not given.",
        show_default=False,
    ),
]
WaitOption = Annotated[
    bool, typer.Option("--wait/--no-wait", help="Wait until it is done, or only queue it.")
]
TimeoutOption = Annotated[
    float, typer.Option("--timeout", min=1.0, help="Seconds to wait; the request stays queued.")
]
TargetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--target-module",
        help="LoRA: change the modules of this name only, such as q_proj; give it several times. "
        "All linear modules if not given.",
        show_default=False,
    ),
]
RsloraOption = Annotated[
    bool, typer.Option("--rslora", help="LoRA: scale by alpha / sqrt(rank), not alpha / rank.")
]
DoraOption = Annotated[
    bool, typer.Option("--dora", help="LoRA: learn the length of each output's row besides.")
]
FrozenOption = Annotated[
    str,
    typer.Option(
        "--frozen-a",
        help="LoRA: name of the consortium's public seed that A is drawn from; B alone learns.",
        show_default=False,
    ),
]
ModulesOption = Annotated[
    int, typer.Option("--modules", min=0, help="Module graft: how many modules; 0 for all.")
]
RankingOption = Annotated[
    str,
    typer.Option(
        "--ranking",
        help="Module graft: which come first, by activation, change, random or bottom.",
    ),
]
VirtualTokensOption = Annotated[
    int, typer.Option("--virtual-tokens", min=1, help="Prompt: how many vectors.")
]


def find_home(state: Path | None) -> Home:
    """The state directory that the person means."""
    chosen = state or Path(os.environ.get(STATE_VARIABLE) or _DEFAULT)
    return Home(chosen.expanduser().resolve())


def open_state(state: Path | None) -> Site:
    """Open the site for a command.

    Raises:
        UnavailableError: AG-STO-003 if `init` has not run there.
        RejectedError: AG-SIT-008 if the site has not joined.
    """
    silence_journal()
    return open_site(find_home(state))
