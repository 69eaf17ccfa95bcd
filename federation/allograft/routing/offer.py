# SPDX-License-Identifier: Apache-2.0
"""Offers: the public side of a packet, which the coordinator may see.

An offer says what kind of knowledge exists and which base it needs. Its subject is the digest of
the packet's signed statement, so that the dispatch that follows can be compared with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from allograft.crypto import canonical
from allograft.crypto.keys import SigningKey
from allograft.errors import RejectedError
from allograft.routing import document
from allograft.routing.card import Architecture

OFFER_TYPE = "urn:allograft:offer:v1"


@dataclass(frozen=True, slots=True)
class Base:
    """The model a packet was made on."""

    weights_digest: str
    architecture: Architecture
    tokenizer_digest: str


@dataclass(frozen=True, slots=True)
class Licence:
    """What a recipient may do with what it keeps."""

    merge: bool
    distil: bool
    redonate: bool


@dataclass(frozen=True, slots=True)
class Offer:
    """What a donor says in public about a packet.

    Attributes:
        statement_digest: SHA-256 (hex) of the packet statement's envelope; the dispatch repeats it.
        mode: The privacy mode the packet was made under.
        payload_bytes: Size of the plain payload.
        domain: A short human text.
        not_after: When the packet stops being deliverable.
    """

    packet_id: str
    statement_digest: str
    donor: str
    kind: str
    mode: str
    base: Base
    payload_bytes: int
    domain: str
    language: str
    licence: Licence
    not_after: datetime

    def to_json(self) -> dict[str, canonical.Json]:
        """The offer as a predicate."""
        return {
            "packet_id": self.packet_id,
            "donor": self.donor,
            "kind": self.kind,
            "mode": self.mode,
            "base": {
                "weights_digest": self.base.weights_digest,
                "architecture": self.base.architecture.to_json(),
                "tokenizer_digest": self.base.tokenizer_digest,
            },
            "payload_bytes": self.payload_bytes,
            "domain": self.domain,
            "language": self.language,
            "licence": {
                "merge": self.licence.merge,
                "distil": self.licence.distil,
                "redonate": self.licence.redonate,
            },
            "not_after": canonical.format_time(self.not_after),
        }


def sign_offer(offer: Offer, key: SigningKey) -> bytes:
    """Sign an offer; its subject is the packet's statement."""
    statement = document.Statement(
        OFFER_TYPE, offer.packet_id, offer.statement_digest, offer.to_json()
    )
    return document.sign_statement(statement, key)


def verify_offer(envelope: bytes, roster: document.Signers, now: datetime) -> Offer:
    """Verify an offer against the keys of the donor it names.

    Raises:
        RejectedError: AG-RTE-001 malformed, AG-RTE-002 expired, AG-SIG-* signature, or the
            roster's refusal.
    """
    statement = document.verify_statement(envelope, OFFER_TYPE, ("donor", "site"), roster, now)
    try:
        offer = _read_offer(statement)
    except RejectedError as error:
        raise RejectedError("AG-RTE-001", f"offer: {error.cause}") from error
    if offer.not_after <= now:
        raise RejectedError(
            "AG-RTE-002", f"the offer ended at {canonical.format_time(offer.not_after)}"
        )
    return offer


def _read_offer(statement: document.Statement) -> Offer:
    fields = canonical.as_object(
        statement.predicate,
        {
            "packet_id", "donor", "kind", "mode", "base", "payload_bytes", "domain", "language",
            "licence", "not_after",
        },
    )  # fmt: skip
    packet_id = document.read_random_id(fields["packet_id"])
    if statement.subject_name != packet_id:
        raise RejectedError("AG-RTE-001", "the subject is not the packet")
    licence = canonical.as_object(fields["licence"], {"merge", "distil", "redonate"})
    return Offer(
        packet_id=packet_id,
        statement_digest=statement.subject_sha256,
        donor=document.read_site(fields["donor"]),
        kind=document.read_line(fields["kind"]),
        mode=document.read_line(fields["mode"]),
        base=_read_base(fields["base"]),
        payload_bytes=canonical.as_int(fields["payload_bytes"]),
        domain=document.read_line(fields["domain"]),
        language=document.read_line(fields["language"]),
        licence=Licence(
            merge=canonical.as_bool(licence["merge"]),
            distil=canonical.as_bool(licence["distil"]),
            redonate=canonical.as_bool(licence["redonate"]),
        ),
        not_after=document.read_time(fields["not_after"]),
    )


def _read_base(value: canonical.Json) -> Base:
    fields = canonical.as_object(value, {"weights_digest", "architecture", "tokenizer_digest"})
    return Base(
        weights_digest=document.read_sha256(fields["weights_digest"]),
        architecture=Architecture.from_json(fields["architecture"]),
        tokenizer_digest=document.read_sha256(fields["tokenizer_digest"]),
    )
