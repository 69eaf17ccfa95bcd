# SPDX-License-Identifier: Apache-2.0
"""What happens to an item once all of it is here: judged, recorded, logged, passed on.

Every document is verified against the roster of this moment, and with it the event that its author
signed for the log. Then one transaction records the outcome, queues the log entries and queues what
others must be told, so a killed process repeats the whole step or none of it. Contents stay sealed:
nothing here holds a key that opens anything. See protos/spec/relay.md.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime

from allograft.crypto import canonical
from allograft.crypto.keys import SigningKey
from allograft.errors import RejectedError
from allograft.limits import LIMITS
from allograft.log.event import Event, sign_event, verify_event
from allograft.packet.header import HEADER_NAME
from allograft.provenance.dispatch import DISPATCH_NAME
from allograft.provenance.verify import verify_dispatch
from allograft.relay.item import Item
from allograft.routing.card import Card, verify_card
from allograft.routing.document import Signers
from allograft.routing.match import match_offer
from allograft.routing.offer import Offer, verify_offer
from allograft.routing.receipt import verify_receipt
from allograft.routing.route import Route, sign_route, verify_route
from allograft.routing.withdrawal import verify_withdrawal
from allograft_server import intake
from allograft_server.mailbox import Mailbox
from allograft_server.store import DispatchRow, ItemRow, PacketRow, QueuedEntry, Store

PROOF_NAME = "dispatch.proof"

#: Deliveries that may still change by a receipt.
_RECEIVED = ("waiting", "delivered", "untaken", "kept", "reverted", "refused", "quarantined")


class Post:
    """Judges what sites send and tells sites what concerns them.

    Args:
        me: The coordinator's id.
        key: The coordinator's signing key, for routes and their events.
        roster: The roster that is in force now; raises RejectedError if there is none.
        utc_now: The clock.
    """

    def __init__(
        self,
        me: str,
        key: SigningKey,
        store: Store,
        mailbox: Mailbox,
        roster: Callable[[], Signers],
        utc_now: Callable[[], datetime],
    ) -> None:
        self._me = me
        self._key = key
        self._store = store
        self._mailbox = mailbox
        self._roster = roster
        self._utc_now = utc_now
        # A file is written before the row that keeps it is committed; no sweep may run between.
        self._lock = threading.RLock()

    # --- what the relay asks ---

    def check_item(self, item: Item) -> None:
        """Refuse an item by its description, before any of it is taken.

        Raises:
            RejectedError: AG-RLY-006.
        """
        intake.check_item(item)

    def item_delivered(self, row: ItemRow) -> None:
        """A site holds an item of ours durably."""
        with self._lock, self._store.transaction():
            self._store.move_item(row.item_id, ("waiting",), "delivered")
            if row.item.kind == "packet":
                self._store.move_delivery(row.subject, row.site, ("waiting",), "delivered")
                self._close_dispatch(row.subject)
        self._sweep([row.item])

    def item_untaken(self, row: ItemRow, code: str) -> None:
        """A site will never take an item of ours."""
        with self._lock, self._store.transaction():
            self._store.move_item(row.item_id, ("waiting",), "refused", code)
            if row.item.kind == "packet":
                self._store.move_delivery(row.subject, row.site, ("waiting",), "untaken", code)
                self._close_dispatch(row.subject)
        self._sweep([row.item])

    # --- judging ---

    def judge(self, row: ItemRow) -> None:
        """Accept or refuse an item whose parts are all here.

        Raises:
            UnavailableError: Something is missing now; the item stays and is judged again.
        """
        try:
            # Without the lock: hashing a large file takes long, and the relay needs the lock.
            for file in row.item.files:
                self._mailbox.finish_file(row.item_id, file)
            with self._lock:
                self._accept(row)
        except RejectedError as error:
            self._store.move_item(row.item_id, ("complete",), "refused", error.code)
            self._sweep([row.item])
        self._mailbox.drop_partial(row.item_id)

    def _accept(self, row: ItemRow) -> None:
        handlers = {
            "card": self._accept_card,
            "offer": self._accept_offer,
            "dispatch": self._accept_dispatch,
            "receipt": self._accept_receipt,
            "withdrawal": self._accept_withdrawal,
        }
        handlers[row.item.kind](row)

    def _accept_card(self, row: ItemRow) -> None:
        envelope = self._read(row, "card.json")
        card = verify_card(envelope, self._roster(), self._utc_now())
        intake.check_author(card.site, row)
        with self._store.transaction():
            if self._store.put_card(card.site, card.version, envelope):
                self._route_again()
            self._store_document(row)
        self._sweep([row.item])

    def _accept_offer(self, row: ItemRow) -> None:
        envelope = self._read(row, "offer.json")
        offer = verify_offer(envelope, self._roster(), self._utc_now())
        intake.check_author(offer.donor, row)
        entry = self._verify_entry(
            row, intake.ExpectedEvent("offer", row.site, envelope, offer.packet_id)
        )
        known = self._store.find_packet(offer.packet_id)
        if known is not None and known.offer != envelope:
            raise RejectedError("AG-CRD-008", "another packet was offered under this id")
        with self._store.transaction():
            if known is None:
                self._queue_entry(entry, envelope)
                route = self._route(offer, envelope)
                self._store.add_packet(
                    PacketRow(
                        offer.packet_id, offer.donor, offer.kind, offer.statement_digest, envelope,
                        route, "routed",
                    )
                )  # fmt: skip
                self._announce_route(offer, route)
            self._store_document(row)
        self._sweep([row.item])

    def _accept_dispatch(self, row: ItemRow) -> None:
        envelope, header = self._read(row, DISPATCH_NAME), self._read(row, HEADER_NAME)
        verified = verify_dispatch(envelope, header, self._roster(), "", self._utc_now())
        dispatch = verified.dispatch
        intake.check_author(dispatch.donor, row)
        entry = self._verify_entry(
            row,
            intake.ExpectedEvent(
                "dispatch", row.site, envelope, dispatch.packet_id, dispatch.dispatch_id
            ),
        )
        intake.check_offered(self._store.find_packet(dispatch.packet_id), dispatch)
        intake.check_sealed_files(row.item, verified.header)
        known = self._store.find_dispatch(dispatch.dispatch_id)
        if known is not None and known.digest != verified.envelope_sha256:
            raise RejectedError("AG-CRD-008", "another dispatch was made under this id")
        with self._store.transaction():
            if known is None:
                self._queue_entry(entry, envelope, dispatch.dispatch_id)
                self._store.move_packet(dispatch.packet_id, ("routed",), "dispatched")
                self._store.add_dispatch(
                    DispatchRow(
                        dispatch.dispatch_id, dispatch.packet_id, row.item_id,
                        verified.envelope_sha256, "logged",
                        canonical.format_time(dispatch.not_after),
                    ),
                    dispatch.audience,
                )  # fmt: skip
            # The sealed files stay in the mailbox until every delivery is over.
            self._store.move_item(row.item_id, ("complete",), "stored")

    def _accept_receipt(self, row: ItemRow) -> None:
        envelope = self._read(row, "receipt.json")
        receipt = verify_receipt(envelope, self._roster(), self._utc_now())
        intake.check_author(receipt.site, row)
        entry = self._verify_entry(
            row,
            intake.ExpectedEvent(
                "receipt",
                row.site,
                envelope,
                receipt.packet_id,
                receipt.dispatch_id,
                receipt.state,
            ),
        )
        dispatch = intake.check_received(
            self._store.find_dispatch(receipt.dispatch_id),
            self._store.find_delivery(receipt.dispatch_id, receipt.site),
            receipt,
        )
        packet = self._store.find_packet(receipt.packet_id)
        assert packet is not None  # a dispatch is recorded only for a packet that is
        digest = hashlib.sha256(envelope).hexdigest()
        with self._store.transaction():
            self._queue_entry(entry, envelope)
            self._store.add_receipt(
                digest, receipt.dispatch_id, receipt.site, receipt.state, receipt.code, envelope
            )
            self._store.move_delivery(
                dispatch.dispatch_id, receipt.site, _RECEIVED, receipt.state, receipt.code
            )
            self._forward(row.item, packet.donor, receipt.dispatch_id)
            self._close_dispatch(receipt.dispatch_id)
            self._store_document(row)
        self._sweep([row.item])

    def _accept_withdrawal(self, row: ItemRow) -> None:
        envelope = self._read(row, "withdrawal.json")
        withdrawal = verify_withdrawal(envelope, self._roster(), self._utc_now())
        intake.check_author(withdrawal.donor, row)
        entry = self._verify_entry(
            row, intake.ExpectedEvent("withdrawal", row.site, envelope, withdrawal.packet_id)
        )
        intake.check_withdrawable(self._store.find_packet(withdrawal.packet_id), withdrawal)
        over: list[Item] = [row.item]
        with self._store.transaction():
            self._queue_entry(entry, envelope)
            self._store.move_packet(withdrawal.packet_id, ("routed", "dispatched"), "withdrawn")
            told: set[str] = set()
            for dispatch in self._store.dispatches_of(withdrawal.packet_id):
                told |= {d.site for d in self._store.deliveries(dispatch.dispatch_id)}
                over += self._end_dispatch(dispatch, "withdrawn")
            for site in sorted(told):
                self._forward(row.item, site, withdrawal.packet_id)
            self._store_document(row)
        self._sweep(over)

    # --- routing ---

    def _route(self, offer: Offer, envelope: bytes) -> bytes:
        """Match an offer with the cards of sites that are enrolled now, and sign the result."""
        route = Route(
            packet_id=offer.packet_id,
            offer_digest=hashlib.sha256(envelope).hexdigest(),
            coordinator=self._me,
            proposals=match_offer(offer, self._cards()),
            time=self._utc_now(),
        )
        return sign_route(route, self._key)

    def _cards(self) -> list[Card]:
        cards = []
        for envelope in self._store.cards():
            try:
                cards.append(verify_card(envelope, self._roster(), self._utc_now()))
            except RejectedError:
                continue  # its site was revoked or changed its keys since
        return cards

    def _route_again(self) -> None:
        """Tell donors of offers that a new card could use."""
        for packet in self._store.packets():
            if packet.state == "withdrawn":
                continue
            try:
                offer = verify_offer(packet.offer, self._roster(), self._utc_now())
                before = verify_route(packet.route, self._roster(), self._utc_now())
            except RejectedError:
                continue  # past its end, or its donor is no longer enrolled
            if match_offer(offer, self._cards()) != before.proposals:
                route = self._route(offer, packet.offer)
                self._store.set_route(packet.packet_id, route)
                self._announce_route(offer, route)

    def _announce_route(self, offer: Offer, route: bytes) -> None:
        """Log a route and send it to the donor; one that still waits there is overtaken."""
        event = Event(
            event="route",
            actor=self._me,
            packet_id=offer.packet_id,
            dispatch_id="",
            outcome="",
            time=self._utc_now(),
            document_name="route.json",
            document_sha256=hashlib.sha256(route).hexdigest(),
        )
        self._queue_entry(sign_event(event, self._key), route)
        for row in self._store.items_of(offer.packet_id, "route"):
            self._store.move_item(row.item_id, ("waiting",), "void")
        self.send("route", offer.donor, offer.packet_id, {"route.json": route})

    # --- sending ---

    def send(self, kind: str, site: str, subject: str, files: Mapping[str, bytes]) -> None:
        """Queue an item of small files for a site."""
        described = tuple(intake.describe_bytes(name, files[name]) for name in sorted(files))
        with self._lock:
            for file in described:
                self._mailbox.add_file(file, files[file.name])
            self._store.add_item(Item(kind, self._me, site, described), site, "waiting", subject)

    def release(self, dispatch: DispatchRow, proof: bytes) -> None:
        """Send a logged dispatch, with its proof, to every recipient that is enrolled now."""
        source = self._store.find_item(dispatch.item_id)
        assert source is not None  # recorded in the transaction that recorded the dispatch
        proof_file = intake.describe_bytes(PROOF_NAME, proof)
        files = tuple(sorted((*source.item.files, proof_file), key=lambda file: file.name))
        with self._lock, self._store.transaction():
            self._mailbox.add_file(proof_file, proof)
            for delivery in self._store.deliveries(dispatch.dispatch_id):
                if refusal := self._refusal_of(delivery.site):
                    self._store.move_delivery(
                        dispatch.dispatch_id, delivery.site, ("held",), "untaken", refusal
                    )
                    continue
                item = Item("packet", self._me, delivery.site, files)
                self._store.add_item(item, delivery.site, "waiting", dispatch.dispatch_id)
                self._store.move_delivery(dispatch.dispatch_id, delivery.site, ("held",), "waiting")
            self._store.move_dispatch(dispatch.dispatch_id, ("logged",), "released")
            self._close_dispatch(dispatch.dispatch_id)

    def _refusal_of(self, site: str) -> str:
        """The roster's code for a site that is not enrolled now; empty for one that is."""
        try:
            self._roster().signing_keys(site, "site", self._utc_now())
        except RejectedError as error:
            return error.code
        return ""

    def _forward(self, item: Item, site: str, subject: str) -> None:
        """Pass an item's files on to another site, in our name."""
        forwarded = Item(item.kind, self._me, site, item.files)
        self._store.add_item(forwarded, site, "waiting", subject)

    # --- ending ---

    def expire(self) -> None:
        """End dispatches that are past their end."""
        now = canonical.format_time(self._utc_now())
        for dispatch in self._store.dispatches("logged", "released"):
            if dispatch.not_after <= now:
                with self._lock, self._store.transaction():
                    over = self._end_dispatch(dispatch, "expired")
                self._sweep(over)

    def _end_dispatch(self, dispatch: DispatchRow, state: str) -> list[Item]:
        """Stop all deliveries that are not done; returns the items that are over."""
        over: list[Item] = []
        self._store.move_dispatch(dispatch.dispatch_id, ("logged", "released"), state)
        for row in self._store.items_of(dispatch.dispatch_id, "packet"):
            if self._store.move_item(row.item_id, ("waiting",), "void"):
                over.append(row.item)
        for delivery in self._store.deliveries(dispatch.dispatch_id):
            self._store.move_delivery(
                dispatch.dispatch_id, delivery.site, ("held", "waiting"), state
            )
        if source := self._store.find_item(dispatch.item_id):
            self._store.release_files(source.item_id)
            over.append(source.item)
        return over

    def _close_dispatch(self, dispatch_id: str) -> None:
        """Let go of the sealed files once nobody waits for them."""
        deliveries = self._store.deliveries(dispatch_id)
        dispatch = self._store.find_dispatch(dispatch_id)
        if dispatch and not any(d.state in {"held", "waiting"} for d in deliveries):
            self._store.release_files(dispatch.item_id)

    def _store_document(self, row: ItemRow) -> None:
        """Accept an item whose content now stands in the database."""
        self._store.move_item(row.item_id, ("complete",), "stored")
        self._store.release_files(row.item_id)

    def _sweep(self, items: Iterable[Item]) -> None:
        """Delete the files of these items that no other item keeps."""
        with self._lock:
            for item in items:
                self._mailbox.drop(
                    file for file in item.files if not self._store.is_file_kept(file.sha256)
                )

    def sweep_all(self) -> None:
        """Delete files of the mailbox that no item keeps: what a killed process left behind."""
        with self._lock:
            receiving = {row.item_id for row in self._store.items_in("receiving")}
            complete = {row.item_id for row in self._store.items_in("complete")}
            self._mailbox.drop_others(self._store.is_file_kept, receiving | complete)

    # --- reading ---

    def _read(self, row: ItemRow, name: str) -> bytes:
        return self._mailbox.read(row.item, name, LIMITS.json_document_bytes)

    def _verify_entry(self, row: ItemRow, expected: intake.ExpectedEvent) -> bytes:
        """The log entry that came with a document, verified to be about that document."""
        name = f"{expected.event}.event.json"
        entry = self._mailbox.read(row.item, name, LIMITS.entry_bytes)
        intake.check_event(verify_event(entry, self._roster(), self._utc_now()), expected)
        return entry

    def _queue_entry(self, entry: bytes, document: bytes, subject: str = "") -> None:
        digest = hashlib.sha256(document).hexdigest()
        self._store.queue_entry(QueuedEntry(entry, digest, document), subject)
