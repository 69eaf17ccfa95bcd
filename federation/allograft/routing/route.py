# SPDX-License-Identifier: Apache-2.0
"""Routes: the coordinator's proposals for one offer, signed and logged.

A route is advice. The donor decides whom to dispatch to, and each recipient decides whether to
open what arrives.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal, get_args

from allograft.crypto import canonical
from allograft.crypto.keys import SigningKey
from allograft.errors import RejectedError
from allograft.limits import LIMITS
from allograft.routing import document

ROUTE_TYPE = "urn:allograft:route:v1"

#: exact: the same base weights. lineage: the same shape and tokenizer; the recipient must test
#: descent itself, because same shape is not compatibility. behavioural: the same tokenizer, for
#: kinds that need no more. refuse: no use for this site.
Verdict = Literal["exact", "lineage", "behavioural", "refuse"]


@dataclass(frozen=True, slots=True)
class Proposal:
    """The verdict for one site, with its reason in words."""

    site: str
    verdict: Verdict
    reason: str


@dataclass(frozen=True, slots=True)
class Route:
    """Verdicts for every site with a card, for one offer.

    Attributes:
        offer_digest: SHA-256 (hex) of the offer's envelope.
    """

    packet_id: str
    offer_digest: str
    coordinator: str
    proposals: tuple[Proposal, ...]
    time: datetime

    @property
    def recipients(self) -> tuple[str, ...]:
        """The sites that are not refused."""
        return tuple(p.site for p in self.proposals if p.verdict != "refuse")

    def to_json(self) -> dict[str, canonical.Json]:
        """The route as a predicate."""
        return {
            "packet_id": self.packet_id,
            "coordinator": self.coordinator,
            "proposals": [
                {"site": p.site, "verdict": p.verdict, "reason": p.reason} for p in self.proposals
            ],
            "time": canonical.format_time(self.time),
        }


def sign_route(route: Route, key: SigningKey) -> bytes:
    """Sign a route; its subject is the offer it answers."""
    statement = document.Statement(ROUTE_TYPE, "offer.json", route.offer_digest, route.to_json())
    return document.sign_statement(statement, key)


def verify_route(envelope: bytes, roster: document.Signers, now: datetime) -> Route:
    """Verify a route against the keys of the coordinator it names.

    Raises:
        RejectedError: AG-RTE-001 malformed, AG-SIG-* signature, or the roster's refusal.
    """
    author: tuple[str, document.Role] = ("coordinator", "coordinator")
    statement = document.verify_statement(envelope, ROUTE_TYPE, author, roster, now)
    try:
        return _read_route(statement)
    except RejectedError as error:
        raise RejectedError("AG-RTE-001", f"route: {error.cause}") from error


def _read_route(statement: document.Statement) -> Route:
    fields = canonical.as_object(
        statement.predicate, {"packet_id", "coordinator", "proposals", "time"}
    )
    proposals = canonical.as_list(fields["proposals"])
    if len(proposals) > LIMITS.roster_sites:
        raise RejectedError("AG-RTE-001", f"{len(proposals)} proposals")
    return Route(
        packet_id=document.read_random_id(fields["packet_id"]),
        offer_digest=statement.subject_sha256,
        coordinator=document.read_site(fields["coordinator"]),
        proposals=tuple(_read_proposal(proposal) for proposal in proposals),
        time=document.read_time(fields["time"]),
    )


def _read_proposal(value: canonical.Json) -> Proposal:
    fields = canonical.as_object(value, {"site", "verdict", "reason"})
    verdict = canonical.as_text(fields["verdict"])
    if verdict not in get_args(Verdict):
        raise RejectedError("AG-RTE-001", "unknown verdict")
    return Proposal(
        site=document.read_site(fields["site"]),
        verdict=verdict,  # type: ignore[arg-type]  # checked against the literals above
        reason=document.read_line(fields["reason"]),
    )
