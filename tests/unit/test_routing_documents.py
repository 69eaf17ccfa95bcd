# SPDX-License-Identifier: Apache-2.0
"""Cards, offers, routes, receipts and withdrawals verify only as their author signed them."""

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from allograft.crypto import canonical, dsse
from allograft.crypto.keys import SigningKey, VerifyKey
from allograft.errors import RejectedError
from allograft.routing import card, document, offer, receipt, route, withdrawal

NOW = datetime(2026, 11, 23, 8, 0, tzinfo=UTC)
KEYS = {name: SigningKey.generate() for name in ("a", "b", "hub")}
SHAPE = card.Architecture("llama", 64, 5, 512)


class Roster:
    """Three parties; `gone` are revoked."""

    def __init__(self, *gone: str) -> None:
        self.gone = gone

    def signing_keys(self, name: str, role: document.Role, now: datetime) -> tuple[VerifyKey, ...]:
        is_right_role = (name == "hub") == (role == "coordinator")
        if name not in KEYS or name in self.gone or not is_right_role:
            raise RejectedError("AG-SIG-003", f"{name} has no keys here")
        return (KEYS[name].public,)


CARD = card.Card(
    "a",
    (card.ModelFacts("ward", "1" * 64, SHAPE, "2" * 64),),
    card.Accepts(("organ",), ("*",), ("open",)),
    3,
    NOW,
)
OFFER = offer.Offer(
    packet_id="ab" * 16,
    statement_digest="3" * 64,
    donor="a",
    kind="organ",
    mode="open",
    base=offer.Base("1" * 64, SHAPE, "2" * 64),
    payload_bytes=1000,
    domain="ward notes",
    language="en",
    licence=offer.Licence(merge=True, distil=False, redonate=False),
    not_after=NOW + timedelta(days=1),
)
ROUTE = route.Route(
    "ab" * 16, "4" * 64, "hub", (route.Proposal("b", "exact", "the same base"),), NOW
)
RECEIPT = receipt.Receipt(
    "ab" * 16, "cd" * 16, "5" * 64, "b", "kept", "", NOW, receipt.Figures(0.25, -0.01, 0.5)
)
WITHDRAWAL = withdrawal.Withdrawal("ab" * 16, "3" * 64, "a", NOW)


@dataclass(frozen=True)
class Case:
    author: str
    value: Any
    sign: Callable[[Any, SigningKey], bytes]
    verify: Callable[[bytes, document.Signers, datetime], Any]


CASES = {
    "card": Case("a", CARD, card.sign_card, card.verify_card),
    "offer": Case("a", OFFER, offer.sign_offer, offer.verify_offer),
    "route": Case("hub", ROUTE, route.sign_route, route.verify_route),
    "receipt": Case("b", RECEIPT, receipt.sign_receipt, receipt.verify_receipt),
    "withdrawal": Case("a", WITHDRAWAL, withdrawal.sign_withdrawal, withdrawal.verify_withdrawal),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def resign(case: Case, change: Callable[[dict[str, Any]], None]) -> bytes:
    """The case's statement with a change, signed again by its true author."""
    envelope = dsse.Envelope.from_bytes(case.sign(case.value, KEYS[case.author]))
    statement = json.loads(envelope.payload)
    change(statement)
    payload = canonical.dumps(statement)
    return dsse.sign(payload, dsse.IN_TOTO, [KEYS[case.author]]).to_bytes()


def test_round_trips_what_the_author_signed(case: Case) -> None:
    envelope = case.sign(case.value, KEYS[case.author])
    assert case.verify(envelope, Roster(), NOW) == case.value


def test_refuses_another_signer(case: Case) -> None:
    other = "b" if case.author != "b" else "a"
    with pytest.raises(RejectedError, match="AG-SIG-003"):
        case.verify(case.sign(case.value, KEYS[other]), Roster(), NOW)


def test_refuses_a_revoked_author(case: Case) -> None:
    envelope = case.sign(case.value, KEYS[case.author])
    with pytest.raises(RejectedError, match="has no keys here"):
        case.verify(envelope, Roster(case.author), NOW)


def test_refuses_a_changed_payload(case: Case) -> None:
    fields = json.loads(case.sign(case.value, KEYS[case.author]))
    payload = base64.b64decode(fields["payload"]).replace(b"2026", b"2027")
    fields["payload"] = base64.b64encode(payload).decode()
    with pytest.raises(RejectedError, match="AG-SIG-003"):
        case.verify(canonical.dumps(fields), Roster(), NOW)


def test_refuses_an_unknown_field(case: Case) -> None:
    envelope = resign(case, lambda statement: statement["predicate"].update(extra=1))
    with pytest.raises(RejectedError, match="AG-RTE-001"):
        case.verify(envelope, Roster(), NOW)


def test_refuses_two_subjects(case: Case) -> None:
    envelope = resign(case, lambda statement: statement["subject"].append(statement["subject"][0]))
    with pytest.raises(RejectedError, match="one subject"):
        case.verify(envelope, Roster(), NOW)


def test_refuses_a_document_of_another_type(case: Case) -> None:
    envelope = resign(case, lambda statement: statement.update(predicateType="urn:other"))
    with pytest.raises(RejectedError, match="expected a document of type"):
        case.verify(envelope, Roster(), NOW)


def test_refuses_a_document_without_its_author(case: Case) -> None:
    def drop(statement: dict[str, Any]) -> None:
        for name in ("site", "donor", "coordinator"):
            statement["predicate"].pop(name, None)

    with pytest.raises(RejectedError, match="does not name"):
        case.verify(resign(case, drop), Roster(), NOW)


def test_a_site_cannot_sign_a_route() -> None:
    envelope = route.sign_route(replace(ROUTE, coordinator="a"), KEYS["a"])
    with pytest.raises(RejectedError, match="has no keys here"):
        route.verify_route(envelope, Roster(), NOW)


def test_refuses_an_offer_past_its_end() -> None:
    envelope = offer.sign_offer(OFFER, KEYS["a"])
    with pytest.raises(RejectedError, match="AG-RTE-002"):
        offer.verify_offer(envelope, Roster(), OFFER.not_after)


def test_refuses_an_offer_whose_subject_is_another_packet() -> None:
    case = CASES["offer"]
    envelope = resign(case, lambda statement: statement["subject"][0].update(name="ef" * 16))
    with pytest.raises(RejectedError, match="the subject is not the packet"):
        case.verify(envelope, Roster(), NOW)


@pytest.mark.parametrize("state", ["installed", "", None])
def test_refuses_a_receipt_in_no_known_state(state: Any) -> None:
    case = CASES["receipt"]
    envelope = resign(case, lambda statement: statement["predicate"].update(state=state))
    with pytest.raises(RejectedError, match="AG-RTE-001"):
        case.verify(envelope, Roster(), NOW)


def test_refuses_control_characters_in_human_text() -> None:
    case = CASES["offer"]
    envelope = resign(case, lambda s: s["predicate"].update(domain="notes\x1b[31m"))
    with pytest.raises(RejectedError, match="control characters"):
        case.verify(envelope, Roster(), NOW)


def test_a_receipt_may_keep_its_figures_to_itself() -> None:
    plain = replace(RECEIPT, figures=None)
    envelope = receipt.sign_receipt(plain, KEYS["b"])
    assert b"figures" not in dsse.Envelope.from_bytes(envelope).payload
    assert receipt.verify_receipt(envelope, Roster(), NOW) == plain


def test_only_sites_that_are_not_refused_are_recipients() -> None:
    proposals = (
        route.Proposal("b", "exact", "x"),
        route.Proposal("c", "refuse", "x"),
        route.Proposal("d", "lineage", "x"),
        route.Proposal("e", "behavioural", "x"),
    )
    assert replace(ROUTE, proposals=proposals).recipients == ("b", "d", "e")
