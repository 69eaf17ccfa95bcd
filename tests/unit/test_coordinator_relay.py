# SPDX-License-Identifier: Apache-2.0
"""The coordinator's half of the relay against a simulated site that breaks one rule at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from allograft.crypto.keys import SigningKey, VerifyKey
from allograft.errors import RejectedError, UnavailableError
from allograft.limits import LIMITS
from allograft.relay.frame import Header, SignedFrame
from allograft.relay.item import Item, describe_item
from allograft.relay.poll import Announcement, PollAnswer
from allograft_server import mailbox as mailbox_module
from allograft_server.mailbox import Mailbox
from allograft_server.relay import OnlineNode, OutgoingCall, Relay
from allograft_server.store import ItemRow, Store
from kit.simulated_site import SimulatedSite

NOW = datetime(2026, 11, 23, 8, 0, tzinfo=UTC)
PART = 1024


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = replace(LIMITS, part_bytes=PART, inline_bytes=64)
    for module in ("allograft.relay.item", "allograft_server.relay", "kit.simulated_site"):
        monkeypatch.setattr(f"{module}.LIMITS", limits)


class World:
    """One coordinator and its sites, with a clock that only the test moves."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.key = SigningKey.generate()
        self.sites: dict[str, SimulatedSite] = {}
        self.gone: set[str] = set()
        self.now_s = 1000.0
        self.delivered: list[ItemRow] = []
        self.untaken: list[tuple[str, str]] = []
        self.cosignatures: list[tuple[str, str]] = []
        self.checkpoint = ""
        self.is_urgent = False
        self.session = "first"
        (directory / "mailbox").mkdir()
        self.restart()

    def restart(self) -> None:
        """A new coordinator process over the same state."""
        self.store = Store.create(self.directory / "coordinator.db")
        self.mailbox = Mailbox(self.directory / "mailbox", 0)
        self.relay = Relay(
            "hub", self.key, self.store, self.mailbox, self, self, self.utc_now, lambda: self.now_s
        )

    def add_site(self, name: str) -> SimulatedSite:
        site = SimulatedSite(
            name, self.directory / name, "hub", self.key.public, utc_now=self.utc_now
        )
        self.sites[name] = site
        return site

    def utc_now(self) -> datetime:
        return NOW + timedelta(seconds=self.now_s)

    # the roster and the desk, as the relay sees them

    def site_of_node(self, public_key: bytes) -> str | None:
        name = public_key.decode()
        return name if name in self.sites and name not in self.gone else None

    def site_keys(self, site: str, now: datetime) -> tuple[VerifyKey, ...]:
        if site in self.gone or site not in self.sites:
            raise RejectedError("AG-SIG-003", f"{site} is not enrolled")
        return (self.sites[site].key.public,)

    def check_item(self, item: Item) -> None:
        if item.kind == "roster":
            raise RejectedError("AG-RLY-006", "sites send no rosters")

    def item_delivered(self, row: ItemRow) -> None:
        self.delivered.append(row)
        self.store.move_item(row.item_id, ("waiting",), "delivered")

    def item_untaken(self, row: ItemRow, code: str) -> None:
        self.untaken.append((row.item_id, code))
        self.store.move_item(row.item_id, ("waiting",), "refused", code)

    def awaits_witnesses(self) -> bool:
        return self.is_urgent

    def checkpoint_for(self, site: str, witnessed_size: int) -> tuple[str, tuple[bytes, ...]]:
        return self.checkpoint, ()

    def cosigned(self, site: str, cosignature: str) -> None:
        self.cosignatures.append((site, cosignature))

    # the transport

    def next_calls(self) -> list[OutgoingCall]:
        nodes = [OnlineNode(number, name.encode()) for number, name in enumerate(self.sites)]
        return self.relay.next_calls(nodes, self.session)

    def carry(self, call: OutgoingCall) -> SignedFrame:
        return self.sites[call.header.recipient].exchange(call.frame)

    def round(self) -> int:
        """Carry every call that is due; returns how many there were."""
        calls = self.next_calls()
        for call in calls:
            self.relay.settle(call.header.call, self.carry(call))
        self.now_s += 0.5
        return len(calls)

    def lose_calls(self) -> None:
        """Calls under way are never answered: the courier was restarted."""
        self.session += "'"

    def run(self, done: Callable[[], bool], rounds: int = 400) -> None:
        for _ in range(rounds):
            if done():
                return
            self.round()
        raise AssertionError("the relay came to no end")

    def state_of(self, item: Item) -> str:
        row = self.store.find_item(item.item_id)
        return row.state if row else "unknown"

    def waiting_item(self, site: str, sizes: dict[str, int]) -> Item:
        """An item of ours that waits for a site."""
        source = make_files(self.directory / f"source-{len(os.listdir(self.directory))}", sizes)
        item = describe_item("packet", "hub", site, sorted(source.iterdir()))
        for file in item.files:
            self.mailbox.add_file(file, (source / file.name).read_bytes())
        self.store.add_item(item, site, "waiting", "subject")
        return item


def make_files(directory: Path, sizes: dict[str, int]) -> Path:
    directory.mkdir()
    for name, size in sizes.items():
        (directory / name).write_bytes(os.urandom(size))
    return directory


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.store.close()


@pytest.fixture
def site(world: World) -> SimulatedSite:
    return world.add_site("ward")


def outgoing(world: World, site: SimulatedSite, sizes: dict[str, int] | None = None) -> Item:
    sizes = {"a.sealed": 5 * PART + 7, "b.json": 100} if sizes is None else sizes
    source = make_files(world.directory / f"out-{len(os.listdir(world.directory))}", sizes)
    return site.send("dispatch", source)


def test_takes_a_large_item_part_by_part(world: World, site: SimulatedSite) -> None:
    item = outgoing(world, site)
    world.run(lambda: world.state_of(item) == "complete")
    world.mailbox.finish_file(item.item_id, item.files[0])
    directory = site.outbox[item.item_id][1]
    assert world.mailbox.path(item.files[0]).read_bytes() == (directory / "a.sealed").read_bytes()
    taken = [header.part for header in site.calls if header.method == "take"]
    assert sorted(taken) == list(range(item.part_count))


def test_takes_a_small_item_inside_the_poll(world: World, site: SimulatedSite) -> None:
    item = outgoing(world, site, {"card.json": 40})
    world.run(lambda: world.state_of(item) == "complete")
    assert {header.method for header in site.calls} == {"poll"}
    assert world.mailbox.read(item, "card.json", 100)


def test_tells_the_site_what_is_stored_only_after_it_was_judged(
    world: World, site: SimulatedSite
) -> None:
    item = outgoing(world, site, {"card.json": 40})
    world.run(lambda: world.state_of(item) == "complete")
    for _ in range(10):
        world.round()
    assert item.item_id not in site.stored
    world.store.move_item(item.item_id, ("complete",), "stored")
    world.run(lambda: item.item_id in site.stored)
    assert not site.outbox


def test_tells_the_site_why_an_item_is_refused(world: World, site: SimulatedSite) -> None:
    source = make_files(world.directory / "roster", {"roster.json": 40})
    item = site.send("roster", source)
    world.run(lambda: item.item_id in site.refused)
    assert site.refused[item.item_id] == "AG-RLY-006"


def test_delivers_a_large_item(world: World, site: SimulatedSite) -> None:
    item = world.waiting_item("ward", {"part-000.sealed": 9 * PART + 1, "header.json": 10})
    world.run(lambda: world.state_of(item) == "delivered")
    for file in item.files:
        content = (site.received(item.item_id) / file.name).read_bytes()
        assert content == world.mailbox.path(file).read_bytes()
    assert [row.item_id for row in world.delivered] == [item.item_id]


def test_puts_no_part_twice_while_answers_come_late(world: World, site: SimulatedSite) -> None:
    item = world.waiting_item("ward", {"part-000.sealed": 30 * PART})
    late: list[tuple[str, SignedFrame]] = []
    for _ in range(200):
        calls = [(call.header.call, world.carry(call)) for call in world.next_calls()]
        for call_id, answer in late[:2]:
            world.relay.settle(call_id, answer)
        late = late[2:] + calls
        world.now_s += 0.5
    assert world.state_of(item) == "delivered"
    put = [header.part for header in site.calls if header.method == "put"]
    assert sorted(put) == list(range(30))


def test_delivers_one_upload_to_several_sites(world: World) -> None:
    sites = [world.add_site(name) for name in ("a", "b", "c")]
    source = make_files(world.directory / "source", {"part-000.sealed": 3 * PART})
    items = []
    for site in sites:
        item = describe_item("packet", "hub", site.name, sorted(source.iterdir()))
        world.store.add_item(item, site.name, "waiting", "subject")
        items.append(item)
    world.mailbox.add_file(items[0].files[0], (source / "part-000.sealed").read_bytes())
    world.run(lambda: all(world.state_of(item) == "delivered" for item in items))
    assert len(list((world.directory / "mailbox" / "files").iterdir())) == 1


def test_at_most_one_poll_and_the_allowed_parts_are_under_way(
    world: World, site: SimulatedSite
) -> None:
    outgoing(world, site, {"a.sealed": 40 * PART})
    world.waiting_item("ward", {"part-000.sealed": 40 * PART})
    world.round()
    calls = [call for _ in range(20) for call in world.next_calls()]
    assert sum(call.header.method == "poll" for call in calls) == 1
    assert sum(call.header.method != "poll" for call in calls) == LIMITS.parts_in_flight


def test_one_round_carries_at_most_one_part(world: World) -> None:
    for name in ("a", "b", "c"):
        world.add_site(name)
        world.waiting_item(name, {"part-000.sealed": 8 * PART})
    for _ in range(30):
        calls = world.next_calls()
        assert sum(len(call.frame.body) >= PART for call in calls) <= 1
        for call in calls:
            world.relay.settle(call.header.call, world.carry(call))


def test_a_still_site_is_polled_less_and_less_but_never_forgotten(
    world: World, site: SimulatedSite
) -> None:
    counts = []
    for _ in range(6):
        site.calls.clear()
        for _ in range(80):  # forty seconds
            world.round()
        counts.append(len(site.calls))
    assert counts[0] > counts[2] >= counts[5]
    assert 3 <= counts[5] <= 5


def test_a_dispatch_that_waits_for_witnesses_hurries_the_polls_of_still_sites(
    world: World, site: SimulatedSite
) -> None:
    for _ in range(240):  # two minutes
        world.round()
    counts = []
    for world.is_urgent in (False, True):
        site.calls.clear()
        for _ in range(40):  # twenty seconds
            world.round()
        counts.append(len(site.calls))
    assert counts[0] <= 3
    assert counts[1] >= 8


def test_new_work_for_an_idle_site_is_announced_at_once(world: World, site: SimulatedSite) -> None:
    while world.round():
        pass
    item = world.waiting_item("ward", {"roster.json": 10})
    world.round()
    assert world.state_of(item) == "delivered"


def test_unknown_and_revoked_nodes_are_not_called(world: World, site: SimulatedSite) -> None:
    world.gone.add("ward")
    assert world.next_calls() == []
    world.gone.clear()
    stranger = OnlineNode(9, b"stranger")
    assert world.relay.next_calls([stranger], world.session) == []


def test_an_answer_of_a_site_revoked_meanwhile_is_dropped(
    world: World, site: SimulatedSite
) -> None:
    item = outgoing(world, site, {"card.json": 40})
    (call,) = world.next_calls()
    answer = world.carry(call)
    world.gone.add("ward")
    world.relay.settle(call.header.call, answer)
    assert world.state_of(item) == "unknown"


# --- a site, or whoever carries its frames, breaks a rule ---

Break = Callable[[SimulatedSite, Header, bytes], SignedFrame]


def _by_another_key(site: SimulatedSite, call: Header, body: bytes) -> SignedFrame:
    site.key, key = SigningKey.generate(), site.key
    try:
        return site.sign(call, body)
    finally:
        site.key = key


BREACHES: dict[str, Break] = {
    "signed by another key": _by_another_key,
    "for another call": lambda site, call, body: site.sign(call, body, call="0" * 32),
    "for another method": lambda site, call, body: site.sign(call, body, method="put"),
    "for another part": lambda site, call, body: site.sign(call, body, part=call.part + 1),
    "for another item": lambda site, call, body: site.sign(call, body, item="0" * 64),
    "to another recipient": lambda site, call, body: site.sign(call, body, recipient="other"),
    "from another sender": lambda site, call, body: site.sign(call, body, sender="other"),
    "the call itself": lambda site, call, body: site.sign(call, body, status="call"),
    "too old": lambda site, call, body: site.sign(call, body, time=NOW - timedelta(days=1)),
    "another body than signed": lambda site, call, body: replace(
        site.sign(call, body), body=body + b" "
    ),
    "no envelope": lambda site, call, body: SignedFrame(b"{}", body),
}


@pytest.mark.parametrize("breach", BREACHES)
def test_drops_a_poll_answer_that_is(world: World, site: SimulatedSite, breach: str) -> None:
    item = outgoing(world, site, {"card.json": 40})
    (call,) = world.next_calls()
    good = world.carry(call)
    world.relay.settle(call.header.call, BREACHES[breach](site, call.header, good.body))
    assert world.state_of(item) == "unknown"
    world.run(lambda: world.state_of(item) == "complete")  # the next call succeeds


@pytest.mark.parametrize("breach", BREACHES)
def test_drops_a_part_that_is(world: World, site: SimulatedSite, breach: str) -> None:
    item = outgoing(world, site, {"a.sealed": 2 * PART})
    world.run(lambda: world.state_of(item) == "receiving")
    call = next(c for c in world.next_calls() if c.header.method == "take")
    good = world.carry(call)
    world.relay.settle(call.header.call, BREACHES[breach](site, call.header, good.body))
    assert world.store.parts(item.item_id) == frozenset()


def test_drops_a_part_whose_bytes_were_not_announced(world: World, site: SimulatedSite) -> None:
    item = outgoing(world, site, {"a.sealed": 2 * PART})
    world.run(lambda: world.state_of(item) == "receiving")
    call = next(c for c in world.next_calls() if c.header.method == "take")
    world.relay.settle(call.header.call, site.sign(call.header, b"x" * PART))
    assert world.store.parts(item.item_id) == frozenset()
    world.lose_calls()
    world.run(lambda: world.state_of(item) == "complete")


def test_an_answer_counts_once(world: World, site: SimulatedSite) -> None:
    item = outgoing(world, site, {"a.sealed": 2 * PART})
    (call,) = world.next_calls()
    answer = world.carry(call)
    world.relay.settle(call.header.call, answer)
    assert world.state_of(item) == "receiving"
    world.store.move_item(item.item_id, ("receiving",), "refused", "AG-RLY-006")
    seen = world.store.sites()["ward"]
    world.relay.settle(call.header.call, answer)
    assert world.store.sites()["ward"] == seen


def test_an_answer_to_a_call_from_before_a_restart_is_dropped(
    world: World, site: SimulatedSite
) -> None:
    item = outgoing(world, site, {"card.json": 40})
    (call,) = world.next_calls()
    answer = world.carry(call)
    world.restart()
    world.relay.settle(call.header.call, answer)
    assert world.state_of(item) == "unknown"


def test_an_item_in_another_senders_name_is_not_even_recorded(
    world: World, site: SimulatedSite
) -> None:
    other = world.add_site("other")
    item = outgoing(world, other, {"card.json": 40})
    forged = PollAnswer(outbox=(Announcement(item, {"card.json": b"x" * 40}),))
    site.answer = lambda call, body: site.sign(call, forged.to_bytes())  # type: ignore[method-assign]
    call = next(c for c in world.next_calls() if c.header.recipient == "ward")
    world.relay.settle(call.header.call, world.carry(call))
    assert world.state_of(item) == "unknown"
    world.lose_calls()
    world.run(lambda: world.state_of(item) == "complete")  # the true owner still can


def test_inline_bytes_that_were_not_announced_refuse_the_item(
    world: World, site: SimulatedSite
) -> None:
    item = outgoing(world, site, {"card.json": 40})
    forged = PollAnswer(outbox=(Announcement(item, {"card.json": b"x" * 40}),))
    site.answer = lambda call, body: site.sign(call, forged.to_bytes())  # type: ignore[method-assign]
    world.round()
    row = world.store.find_item(item.item_id)
    assert row is not None
    assert (row.state, row.code) == ("refused", "AG-RLY-005")


def test_a_site_speaks_for_its_own_deliveries_only(world: World, site: SimulatedSite) -> None:
    other = world.add_site("other")
    item = world.waiting_item("other", {"part-000.sealed": 2 * PART})
    forged = PollAnswer(done=(item.item_id,))
    site.answer = lambda call, body: site.sign(call, forged.to_bytes())  # type: ignore[method-assign]
    call = next(c for c in world.next_calls() if c.header.recipient == "ward")
    world.relay.settle(call.header.call, world.carry(call))
    assert world.state_of(item) == "waiting"
    assert not other.done


def test_a_refusal_by_the_site_ends_the_delivery_with_its_code(
    world: World, site: SimulatedSite
) -> None:
    item = world.waiting_item("ward", {"part-000.sealed": 2 * PART})
    site.declined[item.item_id] = "AG-RLY-006"
    world.run(lambda: world.state_of(item) == "refused")
    assert world.untaken == [(item.item_id, "AG-RLY-006")]


def test_a_part_the_site_no_longer_has_refuses_the_item(world: World, site: SimulatedSite) -> None:
    item = outgoing(world, site, {"a.sealed": 2 * PART})
    world.run(lambda: world.state_of(item) == "receiving")
    call = next(c for c in world.next_calls() if c.header.method == "take")
    refusal = site.sign(call.header, b"", status="refused", code="AG-SIT-003")
    world.relay.settle(call.header.call, refusal)
    assert world.state_of(item) == "refused"


def test_a_site_with_a_full_disk_is_asked_again(world: World, site: SimulatedSite) -> None:
    item = outgoing(world, site, {"a.sealed": 2 * PART})
    world.run(lambda: world.state_of(item) == "receiving")
    call = next(c for c in world.next_calls() if c.header.method == "take")
    refusal = site.sign(call.header, b"", status="refused", code="AG-STO-001")
    world.relay.settle(call.header.call, refusal)
    world.lose_calls()
    world.run(lambda: world.state_of(item) == "complete")


def test_a_wrong_cosignature_costs_nothing_else(
    world: World, site: SimulatedSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(site: str, cosignature: str) -> None:
        raise RejectedError("AG-KEY-002", "an Ed25519 signature does not fit")

    monkeypatch.setattr(world, "cosigned", refuse)
    site.cosignature = "forged"
    item = outgoing(world, site, {"card.json": 40})
    world.run(lambda: world.state_of(item) == "complete")


def test_failures_make_longer_and_longer_pauses(world: World, site: SimulatedSite) -> None:
    attempts = 0
    for _ in range(240):  # two minutes
        for call in world.next_calls():
            attempts += 1
            world.relay.settle(call.header.call, None)
        world.now_s += 0.5
    assert 3 <= attempts <= 12
    item = outgoing(world, site, {"card.json": 40})
    world.now_s += 60
    world.run(lambda: world.state_of(item) == "complete")


# --- restarts, lost messages, full disks ---


@pytest.mark.parametrize("every", [2, 3, 5, 7])
def test_a_restart_between_any_two_rounds_loses_nothing(
    world: World, site: SimulatedSite, every: int
) -> None:
    out = outgoing(world, site, {"a.sealed": 12 * PART + 5})
    into = world.waiting_item("ward", {"part-000.sealed": 12 * PART})
    for number in range(300):
        if world.state_of(out) == "complete" and world.state_of(into) == "delivered":
            break
        if number % every == 0:
            world.store.close()
            world.restart()
        world.round()
    assert world.state_of(out) == "complete"
    assert world.state_of(into) == "delivered"
    taken = [header.part for header in site.calls if header.method == "take"]
    assert sorted(taken) == list(range(out.part_count))  # no part was taken twice


@pytest.mark.parametrize("lose", ["calls", "answers"])
def test_lost_messages_cost_time_only(world: World, site: SimulatedSite, lose: str) -> None:
    out = outgoing(world, site, {"a.sealed": 6 * PART})
    into = world.waiting_item("ward", {"part-000.sealed": 6 * PART})
    for number in range(600):
        for index, call in enumerate(world.next_calls()):
            is_lost = (number + index) % 3 == 0
            answer = world.carry(call) if lose == "answers" or not is_lost else None
            world.relay.settle(call.header.call, None if is_lost else answer)
        world.now_s += 2
    assert world.state_of(out) == "complete"
    assert world.state_of(into) == "delivered"


def test_a_new_courier_makes_the_calls_of_the_dead_one_again(
    world: World, site: SimulatedSite
) -> None:
    (lost,) = world.next_calls()
    assert world.next_calls() == []
    world.session = "second"
    (again,) = world.next_calls()
    assert again.header.method == lost.header.method == "poll"
    assert again.header.call != lost.header.call


def test_a_full_disk_keeps_what_is_there_and_goes_on_when_there_is_room(
    world: World, site: SimulatedSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = outgoing(world, site, {"a.sealed": 6 * PART})
    world.run(lambda: len(world.store.parts(item.item_id)) >= 1)
    present = world.store.parts(item.item_id)

    def refuse(self: Mailbox, size_bytes: int) -> None:
        raise UnavailableError("AG-STO-001", "the volume of the mailbox is full")

    with monkeypatch.context() as full:
        full.setattr(mailbox_module.Mailbox, "_check_room", refuse)
        for _ in range(10):
            world.round()
        assert world.store.parts(item.item_id) == present
    world.now_s += 60
    world.run(lambda: world.state_of(item) == "complete")


def test_parts_wait_while_the_volume_has_no_room(
    world: World, site: SimulatedSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    outgoing(world, site, {"a.sealed": 6 * PART})
    monkeypatch.setattr(Mailbox, "has_room", lambda self, size_bytes: False)
    for _ in range(10):
        world.round()
    assert {header.method for header in site.calls} == {"poll"}


def test_a_description_that_contradicts_itself_is_found_out(
    world: World, site: SimulatedSite
) -> None:
    item = outgoing(world, site, {"a.sealed": 2 * PART})
    honest, directory = site.outbox.pop(item.item_id)
    lying = replace(honest, files=(replace(honest.files[0], sha256="0" * 64),))
    site.outbox[lying.item_id] = (lying, directory)
    world.run(lambda: world.state_of(lying) == "complete")
    with pytest.raises(RejectedError, match="AG-RLY-005"):
        world.mailbox.finish_file(lying.item_id, lying.files[0])


def test_another_sites_lying_description_spoils_no_upload(world: World) -> None:
    victim, attacker = world.add_site("a"), world.add_site("z")
    source = make_files(world.directory / "source", {"a.sealed": 4 * PART})
    item = victim.send("dispatch", source)
    noise = make_files(world.directory / "noise", {"a.sealed": 4 * PART})
    described = describe_item("dispatch", "z", "hub", sorted(noise.iterdir()))
    lying = replace(described, files=(replace(described.files[0], sha256=item.files[0].sha256),))
    attacker.outbox[lying.item_id] = (lying, noise)
    done = {"complete"}
    world.run(lambda: {world.state_of(item), world.state_of(lying)} == done)
    world.mailbox.finish_file(item.item_id, item.files[0])
    content = world.mailbox.path(item.files[0]).read_bytes()
    assert content == (source / "a.sealed").read_bytes()
