# SPDX-License-Identifier: Apache-2.0
"""`allograft roster`: the keepers' commands, for a machine that stays offline.

Nothing here opens a connection. A site is enrolled only after its fingerprint was compared; keys
that are kept on other media are asked for by the name of their file.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from allograft.cli.shell import Format, FormatOption, emit
from allograft.errors import RejectedError, UnavailableError
from allograft.limits import LIMITS
from allograft.roster import enrolment
from allograft.roster.keeper import Keeper

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Keep the roster: enrol and revoke sites, publish.",
)

_Directory = Annotated[Path, typer.Argument(help="The keeper's directory.")]
_Request = Annotated[Path, typer.Argument(help="A site's SITE.enrol.json.")]


@dataclass(frozen=True, slots=True)
class Founded:
    """What `init` made."""

    directory: Path
    coordinator: str
    coordinator_fingerprint: str
    root_fingerprint: str
    root_keys: int
    threshold: int


@dataclass(frozen=True, slots=True)
class Enrolled:
    """A site that will be in the next published roster."""

    site: str
    fingerprint: str
    not_after: datetime


@dataclass(frozen=True, slots=True)
class Revoked:
    """A site that will be out of the next published roster."""

    site: str
    reason: str


@dataclass(frozen=True, slots=True)
class Publication:
    """What `publish` wrote."""

    version: int
    digest: str
    root_fingerprint: str
    sites: tuple[str, ...]
    witness_quorum: int
    out: Path


@dataclass(frozen=True, slots=True)
class Renewed:
    """A new root."""

    root_version: int
    expires: datetime


@dataclass(frozen=True, slots=True)
class SiteLine:
    """One site as `show` lists it."""

    site: str
    roles: tuple[str, ...]
    signing_key: str
    not_after: datetime


@dataclass(frozen=True, slots=True)
class Shown:
    """The roster as it would be published now."""

    root_fingerprint: str
    coordinator: str
    address: str
    witness_quorum: int
    sites: tuple[SiteLine, ...]
    revoked: tuple[str, ...]


@app.command()
def init(
    directory: _Directory,
    coordinator: Annotated[
        Path, typer.Option("--coordinator", help="The coordinator's coordinator.enrol.json.")
    ],
    keys: Annotated[int, typer.Option(min=1, max=9, help="Root keys to make.")] = 3,
    threshold: Annotated[int, typer.Option(min=1, max=9, help="Root keys a root needs.")] = 2,
    fingerprint: Annotated[
        str, typer.Option(help="The coordinator's fingerprint, as its operator told it.")
    ] = "",
    format: FormatOption = Format.text,
) -> None:
    """Begin a roster: make its keys and sign the first root."""
    if threshold > keys:
        raise typer.BadParameter(f"{keys} root keys cannot reach a --threshold of {threshold}")
    request = _read_request(coordinator)
    record = enrolment.verify_coordinator_request(request)
    if fingerprint:
        enrolment.check_fingerprint(request, fingerprint)
    keeper = Keeper.create(directory, record, _now(), root_keys=keys, threshold=threshold)
    result = Founded(
        directory=directory,
        coordinator=record.coordinator_id,
        coordinator_fingerprint=enrolment.fingerprint(request),
        root_fingerprint=keeper.fingerprint,
        root_keys=keys,
        threshold=threshold,
    )
    emit(result, format, _render_founded)


@app.command()
def enrol(
    directory: _Directory,
    request: _Request,
    fingerprint: Annotated[
        str, typer.Option(help="The request's fingerprint, as the site told it by telephone.")
    ] = "",
    yes: Annotated[bool, typer.Option("--yes", help="Enrol without comparing; for tests.")] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Give a site that is enrolled already new keys.")
    ] = False,
    format: FormatOption = Format.text,
) -> None:
    """Enrol a site after its proofs were checked and its fingerprint compared."""
    content = _read_request(request)
    record = enrolment.verify_site_request(content)
    keeper = Keeper(directory)
    if fingerprint:
        enrolment.check_fingerprint(content, fingerprint)
    elif not yes:
        _ask(record.site_id, enrolment.fingerprint(content), format)
    keeper.enrol(record, replace=replace)
    result = Enrolled(record.site_id, enrolment.fingerprint(content), record.not_after)
    emit(result, format, lambda made: f"{made.site} is enrolled; publish to make it count")


@app.command()
def revoke(
    directory: _Directory,
    site: Annotated[str, typer.Argument(help="The site to take out, for good.")],
    reason: Annotated[str, typer.Option(help="Why, in a few words that everyone may read.")],
    format: FormatOption = Format.text,
) -> None:
    """Take a site out; nothing of it is accepted once this is published."""
    Keeper(directory).revoke(site, reason, _now())
    result = Revoked(site, reason)
    emit(result, format, lambda made: f"{made.site} is revoked; publish to make it count")


@app.command()
def publish(
    directory: _Directory,
    out: Annotated[Path, typer.Option(help="Where roster.json and invitation.json go.")],
    quorum: Annotated[
        int, typer.Option(min=0, help="Fix the witness quorum; 0 keeps a majority of sites.")
    ] = 0,
    format: FormatOption = Format.text,
) -> None:
    """Sign the roster as it stands, and write what coordinator and sites need."""
    keeper = Keeper(directory)
    if quorum:
        keeper.fix_quorum(quorum)
    published = keeper.publish(_now(), out)
    result = Publication(
        version=published.version,
        digest=published.digest,
        root_fingerprint=published.root_fingerprint,
        sites=tuple(sorted(keeper.sites)),
        witness_quorum=keeper.quorum,
        out=out,
    )
    emit(result, format, _render_publication)


@app.command()
def renew(
    directory: _Directory,
    coordinator: Annotated[
        Path | None,
        typer.Option("--coordinator", help="A new coordinator.enrol.json, to replace the old."),
    ] = None,
    format: FormatOption = Format.text,
) -> None:
    """Sign the next root, before the present one expires or to replace the coordinator."""
    record = None
    if coordinator is not None:
        record = enrolment.verify_coordinator_request(_read_request(coordinator))
    version, expires = Keeper(directory).renew_root(_now(), record)
    result = Renewed(version, expires)
    emit(
        result,
        format,
        lambda made: f"root {made.root_version}, valid until {made.expires:%Y-%m-%d}",
    )


@app.command()
def show(directory: _Directory, format: FormatOption = Format.text) -> None:
    """Show the roster as it would be published now."""
    keeper = Keeper(directory)
    sites = tuple(
        SiteLine(name, site.roles, site.signing_keys[0].key_id, site.not_after)
        for name, site in sorted(keeper.sites.items())
    )
    result = Shown(
        root_fingerprint=keeper.fingerprint,
        coordinator=keeper.coordinator.coordinator_id,
        address=keeper.coordinator.address,
        witness_quorum=keeper.quorum,
        sites=sites,
        revoked=tuple(sorted(keeper.revoked)),
    )
    emit(result, format, _render_shown)


def _ask(site: str, fingerprint: str, format: Format) -> None:
    if format is Format.json or sys.stdin is None or not sys.stdin.isatty():
        # A script cannot telephone; it has to hand in what a person compared.
        raise RejectedError("AG-ROS-011", f"{site} has fingerprint {fingerprint}; not compared")
    typer.echo(f"{site} has the fingerprint\n\n    {fingerprint}\n")
    if not typer.confirm("Did the site tell you the same by telephone?"):
        raise RejectedError("AG-ROS-011", f"the fingerprint of {site} was not confirmed")


def _read_request(path: Path) -> bytes:
    if not path.is_file():
        raise UnavailableError("AG-STO-005", f"there is no file {path}")
    if path.stat().st_size > LIMITS.roster_file_bytes:
        raise RejectedError("AG-ROS-005", f"{path.name} is too large to be a request")
    return path.read_bytes()


def _now() -> datetime:
    # TUF and our documents carry whole seconds.
    return datetime.now(UTC).replace(microsecond=0)


def _render_founded(made: Founded) -> str:
    return "\n".join(
        [
            f"Roster of {made.coordinator}, root {made.threshold} of {made.root_keys}.",
            f"  root fingerprint         {made.root_fingerprint}",
            f"  coordinator fingerprint  {made.coordinator_fingerprint}",
            "Move the root keys (keys/root-*.key) to separate media now; only `renew` needs them.",
        ]
    )


def _render_publication(made: Publication) -> str:
    return "\n".join(
        [
            f"Version {made.version} with {len(made.sites)} sites, {made.witness_quorum} witnesses "
            "needed.",
            f"  root fingerprint  {made.root_fingerprint}",
            f"  {made.out / 'roster.json'}      for the coordinator",
            f"  {made.out / 'invitation.json'}  for sites that join, within a week",
        ]
    )


def _render_shown(made: Shown) -> str:
    lines = [
        f"Coordinator {made.coordinator} at {made.address}; "
        f"{made.witness_quorum} witnesses needed.",
        f"Root fingerprint {made.root_fingerprint}",
    ]
    lines += [
        f"  {site.site:<24} until {site.not_after:%Y-%m-%d}  {', '.join(site.roles)}  "
        f"key {site.signing_key[:16]}"
        for site in made.sites
    ]
    lines += [f"  {site:<24} revoked" for site in made.revoked]
    return "\n".join(lines)
