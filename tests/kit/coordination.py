# SPDX-License-Identifier: Apache-2.0
"""A real coordinator (keys, roster, log, post, relay) and simulated sites, without Flower.

Rounds are carried by hand, so a test can restart the coordinator between any two of them, and
documents are made by the true codecs, so a test breaks one rule in one line.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

from allograft.crypto.keys import NodeKey, SealingKey, SigningKey
from allograft.crypto.notekey import NoteKey
from allograft.log.event import Event, EventName, sign_event
from allograft.log.witness import WitnessState
from allograft.packet import container, tensors
from allograft.packet.header import HEADER_NAME
from allograft.provenance.dispatch import DISPATCH_NAME, sign_dispatch
from allograft.relay.item import Item
from allograft.relay.poll import PollCall
from allograft.roster.client import RosterClient
from allograft.roster.enrolment import verify_coordinator_request
from allograft.roster.keeper import Keeper
from allograft.roster.records import DEFAULT_ROLES, Roster, SiteRecord
from allograft.routing.card import Accepts, Architecture, Card, ModelFacts, sign_card
from allograft.routing.offer import Base, Licence, Offer, sign_offer
from allograft.routing.receipt import Receipt, sign_receipt
from allograft.routing.withdrawal import Withdrawal, sign_withdrawal
from allograft_server import daemon
from allograft_server.daemon import Coordinator
from allograft_server.founding import found_coordinator
from allograft_server.relay import OnlineNode
from allograft_server.roster_front import import_roster
from allograft_server.settings import State
from kit.simulated_site import SimulatedSite

ME = "hub"
SHAPE = Architecture("llama", 64, 5, 512)


class Member:
    """A site with all its keys."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.signing = SigningKey.generate()
        self.sealing = SealingKey.generate()
        self.witness = NoteKey.generate()
        self.node = NodeKey.generate()
        self.site: SimulatedSite
        self.weights = "1" * 64
        self.is_witness = True

    def record(self, now: datetime, directory: Path) -> SiteRecord:
        state = WitnessState(directory / f"{self.name}.witness", self.witness, self.name)
        return SiteRecord(
            site_id=self.name,
            signing_keys=(self.signing.public,),
            sealing_key=self.sealing.public,
            witness_vkey=state.vkey,
            node_key=self.node.public_openssh,
            roles=DEFAULT_ROLES,
            not_before=now - timedelta(days=1),
            not_after=now + timedelta(days=300),
        )


class Coordination:
    """One consortium in a directory."""

    def __init__(self, root: Path, *names: str) -> None:
        self.root = root
        self.now = datetime.now(UTC).replace(microsecond=0)
        self.state = State(root / "hub")
        request = found_coordinator(self.state, ME, "127.0.0.1:19092", self.now)
        record = verify_coordinator_request(request)
        self.keeper = Keeper.create(root / "keeper", record, self.now)
        self.members = {name: Member(name) for name in names}
        for member in self.members.values():
            self.keeper.enrol(member.record(self.now, root))
        self.publish()
        self.open()
        for member in self.members.values():
            self._connect(member)

    # --- the coordinator ---

    def publish(self) -> None:
        """Publish the keeper's roster and import it."""
        published = self.root / "published"
        published.mkdir(exist_ok=True)
        invitation = self.keeper.publish(self.now).invitation
        (published / "invitation.json").write_bytes(invitation.to_bytes())
        import_roster(self.state, published, ME, daemon.read_keys(self.state), self.now)

    def open(self) -> None:
        """A coordinator process over the state directory."""
        self.coordinator = Coordinator(self.state)
        self.coordinator.roster.tick()
        self.session = secrets.token_hex(8)

    def restart(self) -> None:
        """End the process and begin another."""
        self.coordinator.close()
        self.open()
        self.coordinator.post.sweep_all()

    def crank(self) -> None:
        """One turn of the daemon's loop."""
        self.coordinator.roster.tick()
        self.coordinator.judge()
        self.coordinator.witnessing.tick()
        self.coordinator.post.expire()

    def round(self, names: Iterable[str] | None = None) -> None:
        """Carry every call that is due to these sites, then crank."""
        online = [
            OnlineNode(number, member.node.public_pem.encode())
            for number, member in enumerate(self.members.values())
            if names is None or member.name in names
        ]
        relay = self.coordinator.relay
        for call in relay.next_calls(online, self.session):
            answer = self.members[call.header.recipient].site.exchange(call.frame)
            relay.settle(call.header.call, answer)
        for lane in relay._lanes.values():
            lane.polled_s -= 10  # the clock of pauses, without waiting
            lane.resume_s = 0.0
        self.crank()

    def run(
        self,
        done: Callable[[], bool],
        names: Iterable[str] | None = None,
        after_round: Callable[[], None] = lambda: None,
    ) -> None:
        """Rounds until a condition holds, but not for ever."""
        for _ in range(60):
            if done():
                return
            self.round(names)
            after_round()
        raise AssertionError("the coordinator came to no end")

    def settle(self, *names: str) -> None:
        """A few rounds, for what should not happen."""
        for _ in range(8):
            self.round(names or None)

    def _connect(self, member: Member) -> None:
        directory = self.root / "sites" / member.name
        key = self.coordinator.keys.signing.public
        member.site = SimulatedSite(member.name, directory, ME, key, member.signing)
        trusted = RosterClient(directory / "roster")
        (directory / "roster").mkdir()
        trusted.trust(self.keeper.publish(self.now).invitation.root_json)
        state = WitnessState(directory / "witness", member.witness, member.name)

        def witness(call: PollCall) -> tuple[int, str]:
            if not member.is_witness:
                return state.size, ""
            vkey = self.roster.coordinator.log_vkey
            line = state.cosign(call.checkpoint, call.consistency, vkey, self.now)
            return state.size, line

        member.site.witness = witness

    @property
    def roster(self) -> Roster:
        """The roster in force."""
        return self.coordinator.roster.current()

    # --- what sites write ---

    def send(self, sender: str, kind: str, files: dict[str, bytes]) -> Item:
        """Put files into a site's outbox."""
        directory = self.root / f"out-{secrets.token_hex(6)}"
        directory.mkdir()
        for name, content in files.items():
            (directory / name).write_bytes(content)
        return self.members[sender].site.send(kind, directory)

    def card(self, site: str, version: int = 1, **accepts: tuple[str, ...]) -> Item:
        """Send a site's card."""
        wishes = {"kinds": ("organ",), "donors": ("*",), "modes": ("open",), **accepts}
        member = self.members[site]
        models = (ModelFacts("ward", member.weights, SHAPE, "2" * 64),)
        card = Card(site, models, Accepts(**wishes), version, self.now)
        return self.send(site, "card", {"card.json": sign_card(card, member.signing)})

    def make_offer(self, donor: str, **changes: object) -> Offer:
        """An offer of a new packet."""
        offer = Offer(
            packet_id=secrets.token_hex(16),
            statement_digest=hashlib.sha256(os.urandom(8)).hexdigest(),
            donor=donor,
            kind="organ",
            mode="open",
            base=Base("1" * 64, SHAPE, "2" * 64),
            payload_bytes=1000,
            domain="notes",
            language="en",
            licence=Licence(merge=True, distil=True, redonate=True),
            not_after=self.now + timedelta(days=2),
        )
        return replace(offer, **changes)  # type: ignore[arg-type]

    def logged(
        self, author: str, kind: EventName, document: bytes, packet_id: str, **changes: object
    ) -> dict[str, bytes]:
        """A document and the event that its author signs for the log."""
        event = Event(
            event=kind,
            actor=author,
            packet_id=packet_id,
            dispatch_id="",
            outcome="",
            time=self.now,
            document_name=f"{kind}.json",
            document_sha256=hashlib.sha256(document).hexdigest(),
        )
        entry = sign_event(replace(event, **changes), self.members[author].signing)  # type: ignore[arg-type]
        return {f"{kind}.json": document, f"{kind}.event.json": entry}

    def offer(self, offer: Offer, **changes: object) -> Item:
        """Send an offer."""
        document = sign_offer(offer, self.members[offer.donor].signing)
        files = self.logged(offer.donor, "offer", document, offer.packet_id, **changes)
        return self.send(offer.donor, "offer", files)

    def make_dispatch(
        self,
        offer: Offer,
        *audience: str,
        values: int = 2000,
        not_after: datetime | None = None,
        dispatch_id: str = "",
    ) -> tuple[str, dict[str, bytes]]:
        """A sealed dispatch; returns its id and its files."""
        work = self.root / f"seal-{secrets.token_hex(6)}"
        payload, out = work / "payload", work / "out"
        payload.mkdir(parents=True)
        out.mkdir()
        array = np.random.default_rng(0).standard_normal(values).astype(np.float32)
        with (payload / "organ.safetensors").open("wb") as sink:
            raw = tensors.RawTensor("F32", array.shape, array.tobytes())
            tensors.write_tensors(sink, {"blocks.0.w": raw})
        plan = container.SealPlan(
            packet_id=offer.packet_id,
            dispatch_id=dispatch_id or secrets.token_hex(16),
            donor=offer.donor,
            kind=offer.kind,
            not_after=not_after or self.now + timedelta(days=1),
            statement_digest=offer.statement_digest,
            parts=container.list_payload(payload, "organ"),
            recipients=tuple(
                container.Recipient(name, self.members[name].sealing.public) for name in audience
            ),
        )
        header = container.seal_packet(payload, b"{}\n", plan, out)
        content = (out / HEADER_NAME).read_bytes()
        key = self.members[offer.donor].signing
        envelope = sign_dispatch(header, content, offer.kind, self.now, key)
        (out / DISPATCH_NAME).write_bytes(envelope)
        files = {path.name: path.read_bytes() for path in out.iterdir()}
        event = self.logged(
            offer.donor, "dispatch", envelope, offer.packet_id, dispatch_id=plan.dispatch_id
        )
        return plan.dispatch_id, {**files, **event}

    def receipt(
        self, site: str, packet_id: str, dispatch_id: str, dispatch: bytes, **changes: object
    ) -> Item:
        """Send a site's receipt for a dispatch."""
        receipt = Receipt(
            packet_id=packet_id,
            dispatch_id=dispatch_id,
            dispatch_digest=hashlib.sha256(dispatch).hexdigest(),
            site=site,
            state="kept",
            code="",
            time=self.now,
        )
        receipt = replace(receipt, **changes)  # type: ignore[arg-type]
        document = sign_receipt(receipt, self.members[site].signing)
        files = self.logged(
            site, "receipt", document, packet_id, dispatch_id=dispatch_id, outcome=receipt.state
        )
        return self.send(site, "receipt", files)

    def withdrawal(self, offer: Offer, by: str = "", **changes: object) -> Item:
        """Send a withdrawal of a packet."""
        author = by or offer.donor
        withdrawal = Withdrawal(offer.packet_id, offer.statement_digest, author, self.now)
        withdrawal = replace(withdrawal, **changes)  # type: ignore[arg-type]
        document = sign_withdrawal(withdrawal, self.members[author].signing)
        files = self.logged(author, "withdrawal", document, offer.packet_id)
        return self.send(author, "withdrawal", files)

    # --- what tests ask ---

    def fate(self, item: Item) -> tuple[str, str]:
        """State and code of an item at the coordinator."""
        row = self.coordinator.store.find_item(item.item_id)
        return (row.state, row.code) if row else ("unknown", "")

    def judged(self, item: Item, names: Iterable[str] | None = None) -> tuple[str, str]:
        """Run until an item was judged; its state and code."""
        self.run(lambda: self.fate(item)[0] in {"stored", "refused"}, names)
        return self.fate(item)

    def arrived(self, site: str, kind: str) -> list[Path]:
        """Directories of the items of a kind that a site holds, oldest first."""
        member = self.members[site].site
        return [
            member.received(item_id)
            for item_id, item in member.announced.items()
            if item.kind == kind and item_id in member.done
        ]

    def deliveries(self, dispatch_id: str) -> dict[str, str]:
        """Recipient → state."""
        rows = self.coordinator.store.deliveries(dispatch_id)
        return {row.site: row.state for row in rows}

    def mailbox_files(self) -> set[str]:
        """Digests of the whole files that the mailbox holds."""
        return set(os.listdir(self.state.mailbox / "files"))
