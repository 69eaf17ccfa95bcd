# SPDX-License-Identifier: Apache-2.0
"""The dispatch: a donor's signed decision to send one sealed packet to named sites.

Its subjects are the header and every sealed file, so the coordinator, the log and any auditor can
check what was sent to whom without a single key. It says nothing that the header does not say.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime

from allograft.crypto import canonical
from allograft.crypto.keys import SigningKey
from allograft.errors import RejectedError
from allograft.packet.header import HEADER_NAME, MANIFEST_NAME, Header
from allograft.packet.kinds import find_kind
from allograft.provenance.intoto import Statement, Subject, sign_statement

DISPATCH_TYPE = "urn:allograft:dispatch:v1"
DISPATCH_NAME = "dispatch.json"


@dataclass(frozen=True, slots=True)
class Dispatch:
    """What a donor decided.

    Attributes:
        audience: Sites that may open the payload, in order.
        statement_digest: SHA-256 (hex) of the packet statement's envelope, as in the offer.
    """

    packet_id: str
    dispatch_id: str
    donor: str
    kind: str
    audience: tuple[str, ...]
    created: datetime
    not_after: datetime
    statement_digest: str


def sign_dispatch(
    header: Header, header_bytes: bytes, kind: str, created: datetime, key: SigningKey
) -> bytes:
    """Sign the dispatch of a sealed packet; its envelope as canonical JSON."""
    predicate: dict[str, canonical.Json] = {
        "packet_id": header.packet_id,
        "dispatch_id": header.dispatch_id,
        "donor": header.donor,
        "kind": kind,
        "audience": list(header.audience),
        "created": canonical.format_time(created),
        "not_after": canonical.format_time(header.not_after),
        "statement_digest": header.statement_digest,
    }
    statement = Statement(list_subjects(header, header_bytes), DISPATCH_TYPE, predicate)
    read_dispatch(statement, header, header_bytes)
    return sign_statement(statement, [key])


def list_subjects(header: Header, header_bytes: bytes) -> tuple[Subject, ...]:
    """The files that a dispatch signs: the header, the parts, the manifest."""
    return (
        Subject(HEADER_NAME, hashlib.sha256(header_bytes).hexdigest()),
        *(Subject(part.name, part.sealed_sha256) for part in header.parts),
        Subject(MANIFEST_NAME, header.manifest.sealed_sha256),
    )


def read_dispatch(statement: Statement, header: Header, header_bytes: bytes) -> Dispatch:
    """Read a dispatch whose signature was verified, and compare it with its header.

    Raises:
        RejectedError: AG-PRO-001 if malformed, AG-PRO-006 if header or files are not the signed
            ones, AG-PKT-001 for an unknown kind.
    """
    try:
        dispatch = _read(statement)
    except RejectedError as error:
        if error.code == "AG-PKT-001":
            raise
        raise RejectedError("AG-PRO-001", f"dispatch: {error.cause}") from error
    if statement.subjects != list_subjects(header, header_bytes):
        raise RejectedError("AG-PRO-006", "header or sealed files are not those of the dispatch")
    described = (
        header.packet_id, header.dispatch_id, header.donor, header.audience, header.not_after,
        header.statement_digest,
    )  # fmt: skip
    decided = (
        dispatch.packet_id, dispatch.dispatch_id, dispatch.donor, dispatch.audience,
        dispatch.not_after, dispatch.statement_digest,
    )  # fmt: skip
    if described != decided:
        raise RejectedError("AG-PRO-006", "dispatch and header contradict each other")
    return dispatch


def _read(statement: Statement) -> Dispatch:
    fields = canonical.as_object(
        statement.predicate,
        {
            "packet_id", "dispatch_id", "donor", "kind", "audience", "created", "not_after",
            "statement_digest",
        },
    )  # fmt: skip
    return Dispatch(
        packet_id=canonical.as_random_id(fields["packet_id"]),
        dispatch_id=canonical.as_random_id(fields["dispatch_id"]),
        donor=canonical.as_site(fields["donor"]),
        kind=find_kind(canonical.as_text(fields["kind"])).name,
        audience=tuple(canonical.as_site(s) for s in canonical.as_list(fields["audience"])),
        created=canonical.parse_time(canonical.as_text(fields["created"])),
        not_after=canonical.parse_time(canonical.as_text(fields["not_after"])),
        statement_digest=canonical.as_sha256(fields["statement_digest"]),
    )
