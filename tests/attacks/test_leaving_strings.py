# SPDX-License-Identifier: Apache-2.0
"""Every document that leaves a site is scanned, or holds nothing but fixed forms.

The list of documents is complete by test: a kind of item or of evidence that is added without an
entry here fails.
"""

import dataclasses
import json
import typing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from allograft.crypto import canonical, dsse
from allograft.crypto.keys import SigningKey
from allograft.errors import CODES, AllograftError, RejectedError, UnavailableError
from allograft.log.event import EVENT_TYPE, Event, EventName, sign_event
from allograft.packet import kinds
from allograft.packet.header import Header
from allograft.privacy import dossier, gates, scan
from allograft.privacy.identifiers import IdentifierMatcher, parse_identifiers
from allograft.privacy.overlap import Document, index_corpus
from allograft.provenance import dispatch, statement, training
from allograft.relay.frame import Header as FrameHeader
from allograft.relay.item import FROM_SITE
from allograft.relay.poll import PollAnswer, Refusal
from allograft.routing import card, offer, receipt, withdrawal
from allograft_client import dispatcher, receipts, site as site_module

PLANT = "seen by Dr Okafor 078-05-1120"
KEY = SigningKey.generate()
NOW = datetime(2026, 11, 27, tzinfo=UTC)
HEX, SHA = "5" * 32, "a" * 64

OFFER = offer.Offer(
    packet_id=HEX, statement_digest=SHA, donor="a", kind="organ", mode="open",
    base=offer.Base(SHA, card.Architecture("llama", 8, 2, 16), SHA), payload_bytes=1,
    domain="kidney", language="en", licence=offer.Licence(False, False, False), not_after=NOW,
)  # fmt: skip
CARD = card.Card("a", (card.ModelFacts("m", SHA, OFFER.base.architecture, SHA),),
                 card.Accepts(("organ",), ("*",), ("open",)), 1, NOW)  # fmt: skip
RECEIPT = receipt.Receipt(HEX, HEX, SHA, "a", "kept", "", NOW)
WITHDRAWAL = withdrawal.Withdrawal(HEX, SHA, "a", NOW)

#: Kind of item → a document of it, and how its bytes are made. A dispatch is made of a header
#: whose strings are ids, digests, site names and base64; see `test_a_dispatch…`.
ITEMS = {
    "card": (CARD, card.sign_card),
    "offer": (OFFER, offer.sign_offer),
    "receipt": (RECEIPT, receipt.sign_receipt),
    "withdrawal": (WITHDRAWAL, withdrawal.sign_withdrawal),
}
#: Evidence that is sealed with the payload: all of it passes `check_envelope` at the donor.
EVIDENCE = {
    statement.PACKET_TYPE, training.PROVENANCE_TYPE, training.TEST_RESULT_TYPE,
    dossier.DOSSIER_TYPE, dossier.APPROVAL_TYPE,
}  # fmt: skip


def planted(document: object) -> typing.Iterator[tuple[str, object]]:
    """The document with the plant in one string after the other, nested ones too."""
    for field in dataclasses.fields(document):
        value = getattr(document, field.name)
        if isinstance(value, str):
            yield field.name, dataclasses.replace(document, **{field.name: PLANT})
        elif isinstance(value, tuple) and value and isinstance(value[0], str):
            yield field.name, dataclasses.replace(document, **{field.name: (PLANT,)})
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            for name, inner in planted(value[0]):
                yield (
                    f"{field.name}.{name}",
                    dataclasses.replace(document, **{field.name: (inner,)}),
                )
        elif dataclasses.is_dataclass(value):
            for name, inner in planted(value):
                yield f"{field.name}.{name}", dataclasses.replace(document, **{field.name: inner})


CASES = [
    (kind, name, changed, sign)
    for kind, (document, sign) in ITEMS.items()
    for name, changed in planted(document)
]


def test_every_kind_of_item_that_leaves_is_on_the_list() -> None:
    assert {*ITEMS, "dispatch"} == FROM_SITE
    assert len(CASES) > 25


@pytest.mark.parametrize(
    ("kind", "name", "changed", "sign"), CASES, ids=[f"{kind}-{name}" for kind, name, *_ in CASES]
)
def test_an_identifier_in_any_field_of_an_item_is_refused(kind, name, changed, sign) -> None:
    with pytest.raises(AllograftError) as error:
        scan.check_envelope(sign(changed, KEY), kind)
    assert "Okafor" not in str(error.value)
    assert "1120" not in str(error.value)


def test_the_same_items_pass_without_it() -> None:
    for document, sign in ITEMS.values():
        scan.check_envelope(sign(document, KEY), "item")


def test_logged_documents_pass_the_scan_before_they_are_logged() -> None:
    """`Site.logged` is the one maker of log events and of the items that carry them."""
    for module in (dispatcher, receipts):
        source = Path(module.__file__).read_text("utf-8")
        assert source.count("sign_event") == 0
        assert source.count("site.logged(") == source.count("outbox.add(") + source.count(
            "outbox.place("
        )

    class Named:
        name, key, matchers = "a", KEY, ()

        def now(self) -> datetime:
            return NOW

    bad = offer.sign_offer(dataclasses.replace(OFFER, domain=PLANT), KEY)
    with pytest.raises(RejectedError) as error:
        site_module.Site.logged(Named(), "offer", "offer", bad, {"packet_id": HEX})
    assert error.value.code == "AG-PRV-021"
    good = offer.sign_offer(OFFER, KEY)
    files = site_module.Site.logged(Named(), "offer", "offer", good, {"packet_id": HEX})
    assert set(files) == {"offer.json", "offer.event.json"}
    Named.matchers = (IdentifierMatcher(parse_identifiers(b"Kidney\n")),)
    titled = offer.sign_offer(dataclasses.replace(OFFER, domain="Mr Kidney"), KEY)
    with pytest.raises(RejectedError, match="listed-name"):
        site_module.Site.logged(Named(), "offer", "offer", titled, {"packet_id": HEX})


@pytest.mark.parametrize("name", ["actor", "packet_id", "dispatch_id", "outcome", "document_name",
                                  "document_sha256", "event"])  # fmt: skip
def test_a_log_event_has_no_room_for_text(name: str) -> None:
    event = Event("receipt", "a", HEX, HEX, "kept", NOW, "receipt.json", SHA)
    sign_event(event, KEY)
    with pytest.raises(RejectedError):
        sign_event(dataclasses.replace(event, **{name: PLANT}), KEY)


def test_every_event_is_about_a_document_on_the_list() -> None:
    of_sites = set(typing.get_args(EventName)) - {"route", "roster"}
    assert of_sites == FROM_SITE - {"card"}
    assert EVENT_TYPE.startswith("urn:allograft:")


@pytest.mark.parametrize("kind", sorted(EVIDENCE))
def test_evidence_with_an_identifier_is_refused(kind: str) -> None:
    fields = {"_type": dossier.STATEMENT_TYPE, "subject": [], "predicateType": kind}
    for predicate in ({"role": PLANT}, {"gates": [{"reason": PLANT}]}, {"facts": {PLANT: 1}}):
        payload = canonical.dumps({**fields, "predicate": predicate})
        envelope = dsse.sign(payload, dsse.IN_TOTO, [KEY]).to_bytes()
        with pytest.raises(RejectedError) as error:
            scan.check_envelope(envelope, "evidence")
        assert error.value.code == "AG-PRV-021"


def test_a_dispatch_and_its_header_have_no_field_for_text() -> None:
    """Site names and fixed forms only; a new field must be judged here first."""
    names = {field.name for field in dataclasses.fields(dispatch.Dispatch)}
    assert names == {
        "packet_id", "dispatch_id", "donor", "kind", "audience", "created", "not_after",
        "statement_digest",
    }  # fmt: skip
    texts = [f.name for f in dataclasses.fields(Header) if f.type == "str"]
    assert set(texts) <= {"packet_id", "dispatch_id", "donor", "statement_digest"}


def test_frames_and_polls_carry_codes_and_never_causes() -> None:
    for shape in (FrameHeader, Refusal, PollAnswer):
        assert not {f.name for f in dataclasses.fields(shape)} & {"cause", "reason", "message"}


def test_an_error_code_is_one_of_a_fixed_list() -> None:
    for family in (RejectedError, UnavailableError):
        with pytest.raises(KeyError):
            family(PLANT, "")
    assert all(scan.scan_text(code) == {} for code in CODES)


@pytest.fixture
def text_kind(monkeypatch: pytest.MonkeyPatch) -> str:
    """A kind whose payload is text, as later kinds have."""
    kind = kinds.Kind("notes", ("records.jsonl",))
    monkeypatch.setattr(gates, "find_kind", lambda name: kind)
    return kind.name


def judge(tmp_path: Path, lines: list[bytes], matchers: tuple = ()) -> dossier.GateResult:
    (tmp_path / "records.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    documents = (("statement", {"domain": "kidney"}),)
    submission = gates.Submission("notes", tmp_path, {}, "bf16", documents, matchers)
    (gate,) = (gate for gate in gates.GATES if gate.name == "G2")
    return gates.run_gate(gate, submission)


@pytest.mark.parametrize(
    "record",
    [
        {"q": "Who saw him?", "a": PLANT},
        {PLANT: 1},
        {"mrn": 4321987},
        {"born": "1962-04-17"},
        {"deep": [[{"x": "jane@clinic.example"}]]},
        {"hex": "0" * 20 + "415555267199"},  # of the form of a packet id
        {"title": "Dr", "name": "Okafor"},  # spread over fields
    ],
)
def test_a_record_of_a_text_part_is_scanned_whole(tmp_path, text_kind, record) -> None:
    result = judge(tmp_path, [b'{"q":"clean"}', json.dumps(record).encode()])
    assert result.verdict is dossier.GateVerdict.FAIL
    assert result.reason.startswith("AG-PRV-021")
    assert "line 2" in result.reason
    assert "Okafor" not in result.reason


@pytest.mark.parametrize(
    "line", [b'{"a":1,"a":2}', b"not json", b"\xff\xfe", b'"' + b"x" * (1 << 20) + b'"', b""]
)
def test_a_text_part_that_cannot_be_read_is_refused(tmp_path, text_kind, line) -> None:
    result = judge(tmp_path, [b'{"q":"clean"}', line, b"1"])
    assert result.verdict is dossier.GateVerdict.FAIL
    assert result.reason.startswith("AG-PRV-073")


def test_what_the_site_knows_blocks_and_is_named_in_the_figures(tmp_path, text_kind) -> None:
    passage = "he fell from the red barn roof while mending a kite"
    listed = IdentifierMatcher(parse_identifiers(b"Zoltan Bergmann\n"))
    overlap = index_corpus([Document("p", passage)], [], bytes(32), tmp_path)
    clean = judge(tmp_path, [b'{"q":"clean"}'], (listed, overlap))
    assert clean.verdict is dossier.GateVerdict.PASS
    assert dict(clean.figures) == {"identifier-list": 1, "corpus-overlap": 1, "strings": 3}
    for text, code, figure in (
        ("zoltan came", "AG-PRV-021", "listed-name"),
        (f"note: {passage}", "AG-PRV-074", "private-passage"),
    ):
        line = json.dumps({"q": text}).encode()
        assert judge(tmp_path, [line]).verdict is dossier.GateVerdict.PASS
        found = judge(tmp_path, [line], (listed, overlap))
        assert found.verdict is dossier.GateVerdict.FAIL
        assert found.reason.startswith(code)
        assert figure in dict(found.figures)
