# SPDX-License-Identifier: Apache-2.0
"""`allograft dossier`: the privacy evidence of a packet, for the person who must say yes or no.

`show` takes either a donor's own packet directory, with the full report beside the dossier, or a
sealed dispatch with the key of one of its recipients or auditors. Signatures are checked against
the roster before a word is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from allograft.cli.packet import check_dispatch
from allograft.cli.shell import Format, FormatOption, emit
from allograft.crypto import canonical, dsse
from allograft.durable import durable_write
from allograft.errors import RejectedError
from allograft.limits import LIMITS
from allograft.packet import container
from allograft.plainfile import read_plain
from allograft.privacy.accountant import true_positive_bound
from allograft.privacy.dossier import Approval, Dossier, read_approval, read_dossier
from allograft.privacy.page import Evidence, Terms, describe, render_page, to_json
from allograft.privacy.report import FullReport, read_report
from allograft.provenance.statement import PacketStatement
from allograft.provenance.verify import VerifiedManifest, check_attestations
from allograft.roster.client import RosterClient

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Read the privacy evidence of a packet."
)

#: Names of what a donor keeps in a packet's directory.
ATTESTATIONS_NAME, REPORT_NAME, APPROVALS_NAME = "attestations.jsonl", "report.json", "approvals"


@app.callback()
def _start() -> None:
    """A group of its own, so that `show` keeps its name."""


@app.command()
def show(
    packet: Annotated[
        Path,
        typer.Argument(
            exists=True, file_okay=False, help="A donor's packet directory or a sealed dispatch."
        ),
    ],
    roster: Annotated[
        Path,
        typer.Option("--roster", exists=True, file_okay=False, help="A directory with a roster."),
    ],
    key: Annotated[
        Path | None,
        typer.Option("--key", help="For a sealed dispatch: a recipient's or auditor's key."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Also write the page; it prints to PDF.")
    ] = None,
    format: FormatOption = Format.text,
) -> None:
    """Show what was promised, spent, examined and agreed, in plain sentences."""
    now = datetime.now(UTC)
    if (packet / ATTESTATIONS_NAME).is_file():
        evidence = _read_own(packet, roster, now)
    else:
        if key is None:
            raise RejectedError("AG-PKT-008", "a sealed dispatch needs --key")
        checked = check_dispatch(packet, roster, key, now)
        assert checked.manifest is not None  # a key was given
        evidence = _evidence(checked.manifest, checked.header.audience, (), None)
    if html is not None:
        durable_write(html, render_page(evidence).encode())
    if format is Format.json:
        emit(to_json(evidence), format, str)
    else:
        emit(describe(evidence), format, "\n".join)


def _read_own(directory: Path, roster_path: Path, now: datetime) -> Evidence:
    """The evidence of a packet in its donor's own directory."""
    roster = RosterClient(roster_path).current(now)
    attestations = read_plain(directory / ATTESTATIONS_NAME, LIMITS.json_document_bytes)
    donor = _claimed_donor(attestations)
    keys = roster.signing_keys(donor, "site", now)
    manifest = check_attestations(attestations, keys)
    given = sorted((directory / APPROVALS_NAME).glob("*.json"))
    agreed = [
        read_approval(
            dsse.verify(read_plain(path, LIMITS.json_document_bytes), dsse.IN_TOTO, keys).payload
        )
        for path in given
    ]
    report_path = directory / REPORT_NAME
    report = read_report(report_path) if report_path.is_file() else None
    return _evidence(manifest, (), agreed, report)


def _claimed_donor(attestations: bytes) -> str:
    """Who says to have made these attestations; believed only once the signature holds."""
    for line in container.split_attestations(attestations):
        # The payload's bundle is no bare envelope; it holds one.
        if "payload" not in canonical.as_mapping(canonical.loads(line)):
            continue
        statement = canonical.loads(dsse.Envelope.from_bytes(line).payload)
        predicate = canonical.as_mapping(canonical.as_mapping(statement)["predicate"])
        if "donor" in predicate:
            return canonical.as_site(predicate["donor"])
    raise RejectedError("AG-PKT-006", "no attestation names a donor")


def _evidence(
    manifest: VerifiedManifest,
    recipients: Sequence[str],
    agreed: Sequence[Approval],
    report: FullReport | None,
) -> Evidence:
    dossier = read_dossier(manifest.dossier)
    if report is not None and report.digest != dossier.report_digest:
        raise RejectedError("AG-PRV-030", "the report beside the dossier is another one")
    approvals = [*agreed, *(read_approval(payload) for payload in manifest.approvals)]
    return Evidence(
        dossier=dossier,
        approvals=_roles(dossier, approvals),
        terms=_terms(manifest.statement, recipients),
        report=report,
        signer=f"signed by {manifest.statement.donor}",
        tpr_bound=true_positive_bound,
    )


def _roles(dossier: Dossier, approvals: Sequence[Approval]) -> tuple[str, ...]:
    """Roles whose approvals name exactly this dossier."""
    return tuple(sorted({a.role for a in approvals if a.dossier_digest == dossier.digest}))


def _terms(statement: PacketStatement, recipients: Sequence[str]) -> Terms:
    granted = ("merge", "distil", "redonate")
    return Terms(
        donor=statement.donor,
        purpose=statement.purpose,
        not_after=canonical.format_time(statement.not_after),
        retention_until=canonical.format_time(statement.retention_until),
        licence=tuple(name for name in granted if getattr(statement.licence, name)),
        recipients=tuple(recipients),
    )
