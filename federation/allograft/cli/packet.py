# SPDX-License-Identifier: Apache-2.0
"""`allograft packet`: look at packets without a daemon, without network, without a model.

`inspect` shows what a dispatch says about itself and believes none of it. `verify` checks it as a
recipient would, up to where a key is needed; with `--key` also its attestations. `open` does all
of that and then writes the payload. `lint` holds one tensor file against the strict reader.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from allograft.cli.shell import Format, FormatOption, emit
from allograft.crypto import canonical
from allograft.crypto.keystore import read_sealing_key
from allograft.durable import durable_write
from allograft.errors import RejectedError
from allograft.limits import LIMITS
from allograft.log.event import verify_event
from allograft.log.proof import verify_proof
from allograft.packet import adapter, container, tensors
from allograft.packet.header import Header
from allograft.plainfile import open_plain
from allograft.provenance import verify
from allograft.provenance.dispatch import DISPATCH_NAME
from allograft.provenance.statement import PacketStatement
from allograft.roster.client import RosterClient
from allograft.roster.records import Roster

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Inspect, verify, open and lint packets."
)

_EVENT_NAME = "dispatch.event.json"
_PROOF_NAME = "dispatch.proof"

_Directory = Annotated[
    Path, typer.Argument(exists=True, file_okay=False, help="A sealed dispatch directory.")
]
_RosterOption = Annotated[
    Path,
    typer.Option("--roster", exists=True, file_okay=False, help="A directory with a roster."),
]
_KEY_HELP = "Our sealing key; it says which of the recipients we are."


@dataclass(frozen=True, slots=True)
class Description:
    """What a dispatch says about itself; `verified` tells whether that was checked."""

    verified: bool
    packet_id: str
    dispatch_id: str
    donor: str
    audience: tuple[str, ...]
    auditors: tuple[str, ...]
    not_after: datetime
    parts: int
    plain_bytes: int
    sealed_bytes: int


@dataclass(frozen=True, slots=True)
class LogPlace:
    """Where a dispatch stands in the witnessed log."""

    index: int
    size: int
    witnesses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Contents:
    """The verified statement of a packet, in short."""

    kind: str
    recipe: str
    domain: str
    language: str
    purpose: str
    family: str
    base_weights: str
    dose: float
    retention_until: datetime
    evaluation: str
    approvals: int


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify` found; `contents` needs a key."""

    dispatch: Description
    log: LogPlace
    contents: Contents | None = None


@dataclass(frozen=True, slots=True)
class OpenedPacket:
    """What `open` wrote."""

    verification: Verification
    out: Path
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Lint:
    """What the strict reader found in a tensor file."""

    file: Path
    file_bytes: int
    tensors: int
    dtypes: dict[str, int]
    frobenius_norm: float


@dataclass(frozen=True, slots=True)
class CheckedDispatch:
    """A dispatch that was verified, and with a key its attestations."""

    verification: Verification
    header: Header
    opener: container.Opener | None = None
    manifest: verify.VerifiedManifest | None = None


@app.command()
def inspect(directory: _Directory, format: FormatOption = Format.text) -> None:
    """Show what a dispatch says about itself. Nothing of it is checked."""
    header, _ = container.read_sealed_header(directory)
    emit(_describe(header, verified=False), format, _render_description)


@app.command("verify")
def verify_command(
    directory: _Directory,
    roster: _RosterOption,
    key: Annotated[Path | None, typer.Option("--key", help=_KEY_HELP)] = None,
    format: FormatOption = Format.text,
) -> None:
    """Check signature, audience, time, log proof and files; with a key the attestations too."""
    checked = check_dispatch(directory, roster, key, datetime.now(UTC))
    emit(checked.verification, format, _render_verification)


@app.command("open")
def open_command(
    directory: _Directory,
    roster: _RosterOption,
    key: Annotated[Path, typer.Option("--key", help=_KEY_HELP)],
    out: Annotated[Path, typer.Option("--out", help="A directory to create.")],
    format: FormatOption = Format.text,
) -> None:
    """Verify everything, then write the payload; a lora becomes a PEFT adapter directory."""
    checked = check_dispatch(directory, roster, key, datetime.now(UTC))
    manifest, opener = checked.manifest, checked.opener
    assert manifest is not None  # a key was given
    assert opener is not None
    statement = manifest.statement
    config = _render_config(statement)
    container.open_payload(directory, checked.header, statement.kind, statement.parts, opener, out)
    if config:
        durable_write(out / adapter.CONFIG_NAME, config)
    files = tuple(sorted(path.name for path in out.iterdir()))
    emit(OpenedPacket(checked.verification, out, files), format, _render_opened)


@app.command()
def lint(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A .safetensors file.")],
    format: FormatOption = Format.text,
) -> None:
    """Hold one tensor file against the rules that packets obey."""
    with open_plain(file) as handle:
        checked = tensors.check_file(handle, tensors.QUANTISED_RULES)
    table = checked.table
    dtypes = dict(Counter(entry.dtype for entry in table.entries))
    found = Lint(file, table.file_bytes, len(table.entries), dtypes, checked.frobenius_norm)
    emit(found, format, _render_lint)


def check_dispatch(
    directory: Path, roster_path: Path, key_path: Path | None, now: datetime
) -> CheckedDispatch:
    """Verify a sealed dispatch in the recipient's order, as far as it goes without a model.

    Args:
        directory: The dispatch directory.
        roster_path: A directory with a roster.
        key_path: The sealing key of a recipient or auditor; without it the attestations stay
            sealed.
        now: The current time (UTC).

    Raises:
        RejectedError: AG-ROS-*, AG-SIG-*, AG-PRO-*, AG-LOG-*, AG-PKT-* or AG-SEA-*.
    """
    roster = RosterClient(roster_path).current(now)
    header, header_bytes = container.read_sealed_header(directory)
    opener = _find_opener(header, key_path) if key_path else None
    envelope = container.read_document(directory / DISPATCH_NAME, LIMITS.json_document_bytes)
    verified = verify.verify_dispatch(envelope, header_bytes, roster, "", now)
    place = _check_log(directory, verified, roster, now)
    container.check_sealed_files(directory, header)
    container.check_closed(directory, header, {DISPATCH_NAME, _EVENT_NAME, _PROOF_NAME})
    description = _describe(header, verified=True)
    if opener is None:
        return CheckedDispatch(Verification(description, place), header)
    attestations = container.open_manifest(directory, header, opener)
    manifest = verify.verify_manifest(attestations, verified, roster, now)
    verification = Verification(description, place, _summarise(manifest))
    return CheckedDispatch(verification, header, opener, manifest)


def _find_opener(header: Header, key_path: Path) -> container.Opener:
    key = read_sealing_key(key_path)
    for wrap in header.wraps:
        if wrap.key_id == key.public.key_id:
            return container.Opener(wrap.site, key)
    raise RejectedError("AG-PKT-008", "the packet is not sealed for the owner of this key")


def _check_log(
    directory: Path, verified: verify.VerifiedDispatch, roster: Roster, now: datetime
) -> LogPlace:
    entry = container.read_document(directory / _EVENT_NAME, LIMITS.entry_bytes)
    proof = container.read_document(directory / _PROOF_NAME, LIMITS.proof_bytes)
    logged = verify_proof(proof, entry, roster.witness_policy())
    verify.check_logged(verified, verify_event(entry, roster, now))
    names = tuple(cosignature.witness for cosignature in logged.cosignatures)
    return LogPlace(logged.index, logged.checkpoint.size, names)


def _render_config(statement: PacketStatement) -> bytes:
    """The adapter configuration of a lora, from signed facts; nothing for other kinds."""
    if statement.kind != "lora":
        return b""
    settings = adapter.read_adapter_settings(statement.facts)
    family = statement.base.architecture.family
    return adapter.render_adapter_config(settings, transposed=adapter.is_transposed(family))


def _describe(header: Header, *, verified: bool) -> Description:
    return Description(
        verified=verified,
        packet_id=header.packet_id,
        dispatch_id=header.dispatch_id,
        donor=header.donor,
        audience=header.audience,
        auditors=header.auditors,
        not_after=header.not_after,
        parts=len(header.parts),
        plain_bytes=sum(part.plain_bytes for part in header.parts),
        sealed_bytes=sum(part.sealed_bytes for part in header.parts),
    )


def _summarise(manifest: verify.VerifiedManifest) -> Contents:
    statement = manifest.statement
    return Contents(
        kind=statement.kind,
        recipe=statement.recipe,
        domain=statement.domain,
        language=statement.language,
        purpose=statement.purpose,
        family=statement.base.architecture.family,
        base_weights=statement.base.weights_digest,
        dose=statement.dose.default,
        retention_until=statement.retention_until,
        evaluation=manifest.evaluation.result,
        approvals=len(manifest.approvals),
    )


def _render_description(found: Description) -> str:
    state = "verified" if found.verified else "not verified: this is what it says about itself"
    lines = [
        f"packet     {found.packet_id}  ({state})",
        f"dispatch   {found.dispatch_id}",
        f"donor      {found.donor}",
        f"audience   {', '.join(found.audience)}",
        f"auditors   {', '.join(found.auditors) or 'none'}",
        f"until      {canonical.format_time(found.not_after)}",
        f"payload    {found.parts} part(s), {found.plain_bytes} bytes",
    ]
    return "\n".join(lines)


def _render_verification(found: Verification) -> str:
    place = found.log
    lines = [
        _render_description(found.dispatch),
        f"log        entry {place.index} of {place.size}, seen by {', '.join(place.witnesses)}",
    ]
    contents = found.contents
    if contents is not None:
        lines += [
            f"kind       {contents.kind} for {contents.family}, by {contents.recipe}",
            f"about      {contents.domain} ({contents.language}); purpose: {contents.purpose}",
            f"dose       {contents.dose:g}; donor's evaluation {contents.evaluation}",
            f"approvals  {contents.approvals}",
            f"keep until {canonical.format_time(contents.retention_until)}",
        ]
    return "\n".join(lines)


def _render_opened(found: OpenedPacket) -> str:
    written = ", ".join(found.files)
    return f"{_render_verification(found.verification)}\nwritten    {found.out}: {written}"


def _render_lint(found: Lint) -> str:
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in sorted(found.dtypes.items()))
    return (
        f"{found.file.name}: {found.tensors} tensors ({dtypes}), {found.file_bytes} bytes, "
        f"norm {found.frobenius_norm:.6g}"
    )
