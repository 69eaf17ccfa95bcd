# SPDX-License-Identifier: Apache-2.0
"""Cards, offers, routes, dispatches, proofs, deliveries and receipts through a real coordinator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import pytest

from allograft.crypto import dsse
from allograft.errors import RejectedError
from allograft.log.event import read_event
from allograft.log.proof import verify_proof
from allograft.provenance.verify import verify_dispatch
from allograft.relay.item import Item
from allograft.routing.offer import Offer
from allograft.routing.route import verify_route
from allograft_server import daemon
from allograft_server.roster_front import import_roster
from kit.coordination import ME, Coordination

REACHABLE = ("donor", "near", "other")  # while `far` is offline


@pytest.fixture
def world(tmp_path: Path) -> Iterator[Coordination]:
    world = Coordination(tmp_path, "donor", "near", "far", "other")
    yield world
    world.coordinator.close()


@dataclass
class Sent:
    """A dispatch that the coordinator accepted."""

    offer: Offer
    dispatch_id: str
    files: dict[str, bytes]


def offered(world: Coordination) -> Offer:
    """An offer that the coordinator routed."""
    for name in ("near", "far", "other"):
        assert world.judged(world.card(name))[0] == "stored"
    offer = world.make_offer("donor")
    assert world.judged(world.offer(offer)) == ("stored", "")
    return offer


def dispatched(world: Coordination, *audience: str) -> Sent:
    """A dispatch that the coordinator holds and logged."""
    offer = offered(world)
    dispatch_id, files = world.make_dispatch(offer, *(audience or ("near", "far")))
    assert world.judged(world.send("donor", "dispatch", files)) == ("stored", "")
    return Sent(offer, dispatch_id, files)


def delivered(world: Coordination, *audience: str) -> Sent:
    """A dispatch that all its recipients hold."""
    sent = dispatched(world, *audience)
    world.run(lambda: set(world.deliveries(sent.dispatch_id).values()) == {"delivered"})
    return sent


def kept(world: Coordination, sent: Sent) -> Item:
    """The first recipient's receipt."""
    dispatch = sent.files["dispatch.json"]
    return world.receipt("near", sent.offer.packet_id, sent.dispatch_id, dispatch)


# --- the whole way ---


def test_an_offer_is_answered_with_a_signed_route(world: Coordination) -> None:
    world.members["far"].weights = "9" * 64
    offer = offered(world)
    world.run(lambda: bool(world.arrived("donor", "route")))
    (directory,) = world.arrived("donor", "route")
    route = verify_route((directory / "route.json").read_bytes(), world.roster, world.now)
    assert route.packet_id == offer.packet_id
    assert {p.site: p.verdict for p in route.proposals} == {
        "near": "exact", "far": "lineage", "other": "exact",
    }  # fmt: skip


def test_a_dispatch_arrives_with_a_proof_that_recipients_can_verify(world: Coordination) -> None:
    sent = delivered(world)
    for name in ("near", "far"):
        (directory,) = world.arrived(name, "packet")
        content = {path.name: path.read_bytes() for path in directory.iterdir()}
        assert content.keys() == sent.files.keys() | {"dispatch.proof"}
        assert all(content[file] == sent.files[file] for file in sent.files)
        verified = verify_dispatch(
            content["dispatch.json"], content["header.json"], world.roster, name, world.now
        )
        policy = world.roster.witness_policy()
        logged = verify_proof(content["dispatch.proof"], content["dispatch.event.json"], policy)
        assert read_event(logged.entry).document_sha256 == verified.envelope_sha256
        assert len(logged.cosignatures) >= policy.quorum == 3
    assert world.arrived("other", "packet") == []


def test_a_donor_uploads_once_and_nothing_stays_behind(world: Coordination) -> None:
    sent = delivered(world)
    takes = [c for c in world.members["donor"].site.calls if c.method == "take"]
    assert len(takes) == len({(c.item, c.part) for c in takes})
    world.settle()
    assert world.coordinator.store.find_dispatch(sent.dispatch_id) is not None
    assert world.mailbox_files() == set()


def test_a_receipt_reaches_the_donor_and_the_log(world: Coordination) -> None:
    sent = delivered(world)
    item = world.receipt(
        "near", sent.offer.packet_id, sent.dispatch_id, sent.files["dispatch.json"]
    )
    assert world.judged(item) == ("stored", "")
    world.run(lambda: bool(world.arrived("donor", "receipt")))
    assert world.deliveries(sent.dispatch_id) == {"near": "kept", "far": "delivered"}
    log = world.coordinator.log
    events = [read_event(log.entry(index)) for index in range(log.size)]
    assert [e.event for e in events if e.event != "roster"] == [
        "offer", "route", "dispatch", "receipt",
    ]  # fmt: skip
    assert events[-1].outcome == "kept"


def test_the_log_keeps_the_documents_that_its_entries_announce(world: Coordination) -> None:
    sent = delivered(world)
    log = world.coordinator.log
    for index in range(log.size):
        event = read_event(log.entry(index))
        assert log.document(event.document_sha256) is not None
    assert any(
        log.document(read_event(log.entry(i)).document_sha256) == sent.files["dispatch.json"]
        for i in range(log.size)
    )


@pytest.mark.parametrize("every", [1, 3])
def test_the_whole_way_survives_restarts(world: Coordination, every: int) -> None:
    rounds = 0

    def restart() -> None:
        nonlocal rounds
        rounds += 1
        if rounds % every == 0:
            world.restart()

    sent = dispatched(world, "near")
    waits = lambda: set(world.deliveries(sent.dispatch_id).values()) == {"delivered"}  # noqa: E731
    world.run(waits, after_round=restart)
    item = world.receipt(
        "near", sent.offer.packet_id, sent.dispatch_id, sent.files["dispatch.json"]
    )
    world.run(lambda: bool(world.arrived("donor", "receipt")), after_round=restart)
    assert world.fate(item) == ("stored", "")
    assert len(world.arrived("near", "packet")) == 1
    log = world.coordinator.log
    names = [read_event(log.entry(i)).event for i in range(log.size)]
    assert [n for n in names if n != "roster"] == ["offer", "route", "dispatch", "receipt"]


def test_a_crash_between_log_and_store_does_not_log_twice(
    world: Coordination, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer = offered(world)
    size = world.coordinator.log.size
    store = world.coordinator.store
    _, files = world.make_dispatch(offer, "near")
    item = world.send("donor", "dispatch", files)
    with monkeypatch.context() as crashing:
        crashing.setattr(type(store), "place_entry", lambda *_: (_ for _ in ()).throw(KeyError))
        with pytest.raises(KeyError):
            world.run(lambda: False)
    world.restart()
    world.run(lambda: world.fate(item)[0] == "stored")
    world.settle()
    names = [read_event(world.coordinator.log.entry(i)).event for i in range(size, size + 1)]
    assert names == ["dispatch"]
    assert world.coordinator.log.size == size + 1


# --- witnesses ---


def test_without_a_quorum_nothing_is_delivered(world: Coordination) -> None:
    for name in ("near", "far"):
        world.members[name].is_witness = False
    sent = dispatched(world)
    world.settle()
    assert set(world.deliveries(sent.dispatch_id).values()) == {"held"}
    world.members["near"].is_witness = True
    world.run(lambda: set(world.deliveries(sent.dispatch_id).values()) == {"delivered"})


def test_a_false_cosignature_does_not_count(world: Coordination) -> None:
    for name in ("near", "far"):
        stranger = world.members[name].witness
        world.members[name].site.witness = lambda call: (0, "not a line\n")
        assert stranger
    sent = dispatched(world)
    world.settle()
    assert set(world.deliveries(sent.dispatch_id).values()) == {"held"}


# --- routing ---


def test_a_card_that_comes_later_makes_a_new_route(world: Coordination) -> None:
    world.judged(world.card("near"))
    offer = world.make_offer("donor")
    world.judged(world.offer(offer))
    world.run(lambda: len(world.arrived("donor", "route")) == 1)
    world.judged(world.card("far"))
    world.run(lambda: len(world.arrived("donor", "route")) == 2)
    content = (world.arrived("donor", "route")[-1] / "route.json").read_bytes()
    assert verify_route(content, world.roster, world.now).recipients == ("far", "near")


def test_a_card_that_changes_nothing_makes_no_route(world: Coordination) -> None:
    offered(world)
    world.run(lambda: len(world.arrived("donor", "route")) == 1)
    world.judged(world.card("near", version=2))
    world.settle()
    assert len(world.arrived("donor", "route")) == 1


def test_an_older_card_does_not_replace_a_newer_one(world: Coordination) -> None:
    world.judged(world.card("near", version=5, kinds=()))
    world.judged(world.card("near", version=4))
    offer = world.make_offer("donor")
    world.judged(world.offer(offer))
    world.run(lambda: bool(world.arrived("donor", "route")))
    content = (world.arrived("donor", "route")[-1] / "route.json").read_bytes()
    assert verify_route(content, world.roster, world.now).recipients == ()


# --- the roster ---


def test_every_site_gets_the_roster(world: Coordination) -> None:
    world.run(lambda: all(world.arrived(name, "roster") for name in world.members))
    world.settle()
    assert all(len(world.arrived(name, "roster")) == 1 for name in world.members)


def test_a_site_that_has_the_newest_roster_gets_none(world: Coordination) -> None:
    version = world.roster.version
    world.members["near"].site.roster_version = version
    world.coordinator.store.report_site("near", version, 0)
    world.restart()
    waiting = world.coordinator.store.items("near", "waiting")
    assert len(waiting) == 1  # queued before the site had said what it has


def test_a_revoked_recipient_gets_nothing(world: Coordination) -> None:
    sent = dispatched(world)
    world.keeper.revoke("far", "left the consortium", world.now)
    world.publish()
    world.run(
        lambda: world.deliveries(sent.dispatch_id)["near"] == "delivered",
        ["near", "other", "donor"],
    )
    row = world.coordinator.store.find_delivery(sent.dispatch_id, "far")
    assert row is not None
    assert (row.state, row.code) == ("untaken", "AG-ROS-003")
    assert world.coordinator.roster.site_of_node(
        world.members["far"].node.public_pem.encode()
    ) is None  # fmt: skip


def test_what_a_revoked_site_sent_is_refused(world: Coordination) -> None:
    world.judged(world.card("near", version=0))
    world.keeper.revoke("near", "left the consortium", world.now)
    world.publish()
    # The roster is applied after this round's calls: the item comes in and is judged by it.
    assert world.judged(world.card("near")) == ("refused", "AG-ROS-003")
    later = world.card("near", version=2)
    world.settle()
    assert world.fate(later)[0] == "unknown"  # the site is not even asked any more


def test_with_an_expired_roster_nobody_is_called_and_nobody_is_taken_out(
    world: Coordination, monkeypatch: pytest.MonkeyPatch
) -> None:
    front = world.coordinator.roster
    node = world.members["near"].node.public_pem.encode()
    keys = front.node_keys()
    assert set(keys) == set(world.members)
    assert front.site_of_node(node) == "near"
    later = world.now + timedelta(days=4000)
    monkeypatch.setattr(front, "_utc_now", lambda: later)
    assert front.site_of_node(node) is None
    with pytest.raises(RejectedError, match="AG-ROS-007"):
        front.site_keys("near", later)
    assert front.node_keys() == keys
    with pytest.raises(RejectedError, match="AG-ROS-007"):
        front.tick()


def test_a_timestamp_is_renewed_before_it_expires(
    world: Coordination, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = world.roster
    later = world.now + timedelta(hours=13)
    monkeypatch.setattr(world.coordinator.roster, "_utc_now", lambda: later)
    world.coordinator.roster.tick()
    after = world.roster
    assert after.version == before.version + 1
    assert after.expires > before.expires
    for name in world.members:
        waiting = [r for r in world.coordinator.store.items(name, "waiting")]
        assert [r.item.kind for r in waiting] == ["roster"]  # the older one was overtaken


def test_a_site_that_lies_about_its_roster_cannot_use_the_versions_up(
    world: Coordination, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = world.roster.version
    world.coordinator.store.report_site("near", 2**40, 0)
    later = world.now + timedelta(hours=13)
    monkeypatch.setattr(world.coordinator.roster, "_utc_now", lambda: later)
    world.coordinator.roster.tick()
    assert world.roster.version == before + 1


def test_a_roster_for_another_coordinator_is_refused(world: Coordination, tmp_path: Path) -> None:
    stranger = Coordination(tmp_path / "stranger", "donor")
    stranger.coordinator.close()
    published = tmp_path / "stranger" / "published"
    with pytest.raises(RejectedError, match=r"AG-ROS-015|AG-CRD-002"):
        import_roster(world.state, published, ME, daemon.read_keys(world.state), world.now)


# --- one rule broken ---


def test_refuses_a_card_of_another_site(world: Coordination) -> None:
    card = world.card("near")
    (item, directory) = world.members["near"].site.outbox.pop(card.item_id)
    stolen = world.send("far", "card", {"card.json": (directory / "card.json").read_bytes()})
    assert world.judged(stolen) == ("refused", "AG-CRD-003")
    assert item.sender == "near"


def test_refuses_an_offer_whose_event_is_about_something_else(world: Coordination) -> None:
    offer = world.make_offer("donor")
    item = world.offer(offer, document_sha256="0" * 64)
    assert world.judged(item) == ("refused", "AG-CRD-004")
    assert world.coordinator.store.find_packet(offer.packet_id) is None


def test_refuses_a_second_offer_under_the_same_id(world: Coordination) -> None:
    offer = offered(world)
    again = world.make_offer("donor", packet_id=offer.packet_id)
    assert world.judged(world.offer(again)) == ("refused", "AG-CRD-008")


def test_refuses_a_dispatch_without_an_offer(world: Coordination) -> None:
    offer = world.make_offer("donor")
    _, files = world.make_dispatch(offer, "near")
    assert world.judged(world.send("donor", "dispatch", files)) == ("refused", "AG-CRD-005")


def test_refuses_a_dispatch_of_another_packet_than_offered(world: Coordination) -> None:
    offer = offered(world)
    _, files = world.make_dispatch(replace(offer, statement_digest="7" * 64), "near")
    assert world.judged(world.send("donor", "dispatch", files)) == ("refused", "AG-CRD-005")


def test_refuses_a_dispatch_of_someone_elses_packet(world: Coordination) -> None:
    offer = offered(world)
    _, files = world.make_dispatch(replace(offer, donor="near"), "far")
    assert world.judged(world.send("near", "dispatch", files)) == ("refused", "AG-CRD-005")


def test_refuses_sealed_files_that_the_header_does_not_name(world: Coordination) -> None:
    offer = offered(world)
    _, files = world.make_dispatch(offer, "near")
    part = bytearray(files["part-000.sealed"])
    part[50] ^= 1
    files["part-000.sealed"] = bytes(part)
    assert world.judged(world.send("donor", "dispatch", files)) == ("refused", "AG-CRD-005")


def test_refuses_a_second_dispatch_under_the_same_id(world: Coordination) -> None:
    sent = dispatched(world, "near")
    _, files = world.make_dispatch(sent.offer, "far", dispatch_id=sent.dispatch_id)
    assert world.judged(world.send("donor", "dispatch", files)) == ("refused", "AG-CRD-008")


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("card", {"card.json", "extra.json"}),
        ("offer", {"offer.json"}),
        ("dispatch", {"header.json", "dispatch.json", "dispatch.event.json", "manifest.sealed"}),
        ("dispatch", {"header.json", "dispatch.json", "part-000.sealed"}),
        ("packet", {"header.json"}),
        ("roster", {"roster.json"}),
    ],
)
def test_refuses_items_with_other_files_than_their_kind(
    world: Coordination, kind: str, names: set[str]
) -> None:
    item = world.send("near", kind, {name: b"{}" for name in names})
    assert world.judged(item) == ("refused", "AG-RLY-006")


def test_refuses_garbage_in_place_of_a_document(world: Coordination) -> None:
    item = world.send("near", "card", {"card.json": b"\xff\x00"})
    assert world.judged(item) == ("refused", "AG-SIG-001")


def test_refuses_a_receipt_of_a_site_outside_the_audience(world: Coordination) -> None:
    sent = delivered(world)
    dispatch = sent.files["dispatch.json"]
    item = world.receipt("other", sent.offer.packet_id, sent.dispatch_id, dispatch)
    assert world.judged(item) == ("refused", "AG-CRD-006")


def test_refuses_a_receipt_before_the_delivery(world: Coordination) -> None:
    for name in ("near", "far", "other"):
        world.members[name].is_witness = False
    sent = dispatched(world)
    dispatch = sent.files["dispatch.json"]
    item = world.receipt("near", sent.offer.packet_id, sent.dispatch_id, dispatch)
    assert world.judged(item) == ("refused", "AG-CRD-006")


def test_refuses_a_kept_receipt_about_another_dispatch_than_the_logged(
    world: Coordination,
) -> None:
    sent = delivered(world)
    item = world.receipt("near", sent.offer.packet_id, sent.dispatch_id, b"another envelope")
    assert world.judged(item) == ("refused", "AG-CRD-006")


def test_takes_a_quarantine_receipt_about_a_changed_dispatch(world: Coordination) -> None:
    sent = delivered(world)
    item = world.receipt(
        "near", sent.offer.packet_id, sent.dispatch_id, b"changed on its way",
        state="quarantined", code="AG-PKT-004",
    )  # fmt: skip
    assert world.judged(item) == ("stored", "")
    row = world.coordinator.store.find_delivery(sent.dispatch_id, "near")
    assert row is not None
    assert (row.state, row.code) == ("quarantined", "AG-PKT-004")


def test_a_kept_packet_may_be_reverted_later(world: Coordination) -> None:
    sent = delivered(world)
    for state in ("kept", "reverted"):
        item = world.receipt(
            "near", sent.offer.packet_id, sent.dispatch_id, sent.files["dispatch.json"], state=state
        )
        assert world.judged(item) == ("stored", "")
        assert world.deliveries(sent.dispatch_id)["near"] == state


# --- ends ---


def test_a_withdrawn_packet_is_not_delivered_and_everyone_is_told(world: Coordination) -> None:
    sent = dispatched(world)
    world.run(
        lambda: world.deliveries(sent.dispatch_id)["near"] == "delivered",
        ["donor", "near", "other"],
    )
    assert world.deliveries(sent.dispatch_id)["far"] == "waiting"
    assert world.judged(world.withdrawal(sent.offer), REACHABLE) == ("stored", "")
    world.run(
        lambda: bool(world.arrived("near", "withdrawal") and world.arrived("far", "withdrawal"))
    )
    assert world.deliveries(sent.dispatch_id) == {"near": "delivered", "far": "withdrawn"}
    assert world.arrived("far", "packet") == []
    _, files = world.make_dispatch(sent.offer, "far")
    assert world.judged(world.send("donor", "dispatch", files)) == ("refused", "AG-CRD-007")


@pytest.mark.parametrize("changes", [{"by": "near"}, {"statement_digest": "0" * 64}])
def test_refuses_a_withdrawal_that_is_not_the_donors(
    world: Coordination, changes: dict[str, str]
) -> None:
    offer = offered(world)
    assert world.judged(world.withdrawal(offer, **changes)) == ("refused", "AG-CRD-006")


def test_a_dispatch_past_its_end_is_not_delivered(
    world: Coordination, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("near", "far", "other"):
        world.members[name].is_witness = False
    sent = dispatched(world)
    later = world.now + timedelta(days=1, hours=1)
    monkeypatch.setattr(world.coordinator.post, "_utc_now", lambda: later)
    world.coordinator.post.expire()
    assert set(world.deliveries(sent.dispatch_id).values()) == {"expired"}
    assert world.mailbox_files() == set()


def test_the_coordinator_holds_no_key_that_opens_anything(world: Coordination) -> None:
    names = {path.name for path in world.state.keys.rglob("*") if path.is_file()}
    assert names == {
        "signing.pem", "log.key", "timestamp.key", "ca.pem", "ca.key", "server.pem", "server.key",
    }  # fmt: skip


def test_routes_are_signed_by_the_coordinator_alone(world: Coordination) -> None:
    offered(world)
    world.run(lambda: bool(world.arrived("donor", "route")))
    content = (world.arrived("donor", "route")[0] / "route.json").read_bytes()
    key = world.coordinator.keys.signing.public
    dsse.verify(content, dsse.IN_TOTO, (key,))
