# SPDX-License-Identifier: Apache-2.0
"""What every command line of Allograft shares: output formats, error lines, exit codes.

Invariant: a failure prints `PROGRAM: error: CODE: cause` and `PROGRAM: hint: fix` on stderr (one
JSON object with `--format json`), and leaves with 1 rejected, 2 usage, 3 unavailable, 70 defect,
130 interrupted. Misuse, interruption and defects have no code; in JSON it is empty. Results go to
stdout alone, so scripts can read them.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from enum import Enum, StrEnum
from pathlib import PurePath
from typing import Annotated, Any, NoReturn, TypeVar

import click
import typer

import allograft
from allograft.crypto import canonical
from allograft.durable import explain
from allograft.errors import AllograftError, RejectedError

EXIT_REJECTED = 1
EXIT_USAGE = 2
EXIT_UNAVAILABLE = 3
EXIT_DEFECT = 70  # EX_SOFTWARE of sysexits.h: neither the input nor the environment is at fault
EXIT_INTERRUPTED = 130

T = TypeVar("T")


class Format(StrEnum):
    """How a command writes its result."""

    text = "text"
    json = "json"


#: Annotation of the one `format` parameter that every command has.
FormatOption = Annotated[
    Format, typer.Option("--format", help="How to write the result: text for people, or json.")
]


def version_option(program: str) -> Any:
    """The `--version` option of a program, for an `Annotated` parameter of its callback."""

    def show(wanted: bool) -> None:
        if wanted:
            click.echo(f"{program} {allograft.__version__}")
            raise typer.Exit

    return typer.Option("--version", callback=show, is_eager=True, help="Show the version.")


def emit(value: T, format: Format, render: Callable[[T], str]) -> None:
    """Write a result to stdout.

    Args:
        value: A dataclass, a mapping, or a list of them.
        format: What the person asked for.
        render: Makes the text for people.
    """
    if format is Format.json:
        click.echo(json.dumps(to_json(value), indent=2, sort_keys=True, ensure_ascii=False))
    else:
        click.echo(render(value))


def to_json(value: Any) -> Any:
    """A result as JSON values: times in UTC, bytes in hex, paths as text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: to_json(getattr(value, field.name)) for field in fields}
    if isinstance(value, Mapping):
        return {str(name): to_json(entry) for name, entry in value.items()}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, datetime):
        return canonical.format_time(value)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, str):
        entries = sorted(value) if isinstance(value, set | frozenset) else value
        return [to_json(entry) for entry in entries]
    return value


def run(app: typer.Typer, program: str) -> NoReturn:
    """Run a command line and leave the process with its exit code.

    Args:
        app: The commands.
        program: The name that starts each error line, such as ``allograft-site``.
    """
    status = invoke(app, program, sys.argv[1:])
    if sys.stdout is not None:
        try:
            sys.stdout.flush()
        except OSError:
            # Reported already. The interpreter would try once more and leave with a status of its
            # own, so what stdout did not take goes nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


def invoke(app: typer.Typer, program: str, arguments: Sequence[str]) -> int:
    """Run a command line and return its exit code."""
    command = typer.main.get_command(app)
    complain = _Complaint(program, _asks_for_json(arguments))
    try:
        result = command.main(list(arguments), prog_name=program, standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return EXIT_USAGE
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else program
        complain("", error.format_message(), f"see `{path} --help`")
        return EXIT_USAGE
    except click.ClickException as error:
        complain("", error.format_message())
        return EXIT_USAGE
    except AllograftError as error:
        complain(error.code, error.cause, error.fix)
        return EXIT_REJECTED if isinstance(error, RejectedError) else EXIT_UNAVAILABLE
    except (click.Abort, KeyboardInterrupt):
        complain("", "interrupted")
        return EXIT_INTERRUPTED
    except OSError as error:
        found = explain(error)
        complain(found.code, found.cause, found.fix)
        return EXIT_UNAVAILABLE
    except Exception as error:  # noqa: BLE001  (the last line of defence before a traceback)
        # The type only: the message of an unexpected exception may quote training text or paths.
        complain(
            "", f"unexpected {type(error).__name__}", "this is a defect; please report what you ran"
        )
        return EXIT_DEFECT
    return result if isinstance(result, int) else 0


@dataclasses.dataclass(frozen=True, slots=True)
class _Complaint:
    """Writes a failure to stderr in the form that the person asked for."""

    program: str
    as_json: bool

    def __call__(self, code: str, cause: str, hint: str = "") -> None:
        if self.as_json:
            fields = {"code": code, "cause": cause, "hint": hint}
            click.echo(json.dumps({"error": fields}, sort_keys=True), err=True)
            return
        click.echo(f"{self.program}: error: {f'{code}: ' if code else ''}{cause}", err=True)
        if hint:
            click.echo(f"{self.program}: hint: {hint}", err=True)


def _asks_for_json(arguments: Sequence[str]) -> bool:
    # Read before parsing: an error must know its format even when parsing has not got there.
    pairs = itertools.pairwise(arguments)
    return ("--format", "json") in pairs or "--format=json" in arguments
