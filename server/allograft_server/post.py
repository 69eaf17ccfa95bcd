# SPDX-License-Identifier: Apache-2.0
"""What happens to an item once all of it is here: judged, recorded, logged, passed on.

Every document is verified against the roster of this moment, and with it the event that its author
signed for the log. Then one transaction records the outcome, queues the log entries and queues what
others must be told, so a killed process repeats the whole step or none of it. Contents stay sealed:
nothing here holds a key that opens anything. See protos/spec/relay.md.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime

from allograft.crypto import canonical
from allograft.crypto.keys import SigningKey
from allograft.errors import RejectedError
from allograft.limits import LIMITS
from allograft.log.event import Event, EventName, sign_event, verify_event
from allograft.packet.header import HEADER_NAME, MANIFEST_NAME, Header
from allograft.provenance.dispatch import DISPATCH_NAME, Dispatch
from allograft.provenance.verify import verify_dispatch
from allograft.relay.item import FROM_SITE, Item, ItemFile
from allograft.routing.card import Card, verify_card
from allograft.routing.document import Signers
from allograft.routing.match import match_offer
from allograft.routing.offer import Offer, verify_offer
from allograft.routing.receipt import Receipt, verify_receipt
from allograft.routing.route import Route, sign_route, verify_route
from allograft.routing.withdrawal import Withdrawal, verify_withdrawal
from allograft_server.mailbox import Mailbox
from allograft_server.store import DispatchRow, ItemRow, PacketRow, QueuedEntry, Store

PROOF_NAME = "dispatch.proof"
_DISPATCH_EVENT = "dispatch.event.json"

#: The files that items of each kind consist of; a dispatch has parts besides.
_FILES: Mapping[str, frozenset[str]] = {
    "card": frozenset({"card.json"}),
    "offer": frozenset({"offer.json", "offer.event.json"}),
    "dispatch": frozenset({HEADER_NAME, DISPATCH_NAME, _DISPATCH_EVENT, MANIFEST_NAME}),
    "receipt": frozenset({"receipt.json", "receipt.event.json"}),
    "withdrawal": frozenset({"withdrawal.json", "withdrawal.event.json"}),
}
_PART = re.compile(r"part-\d{3}\.sealed")
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
        if item.kind not in FROM_SITE:
            raise RejectedError("AG-RLY-006", f"sites send no items of kind {item.kind[:32]!r}")
        names = {file.name for file in item.files}
        parts = {name for name in names if _PART.fullmatch(name)}
        expected = _FILES[item.kind]
        if names - parts != expected or bool(parts) != (item.kind == "dispatch"):
            raise RejectedError("AG-RLY-006", f"not the files of a {item.kind}")
        for file in item.files:
            if file.name.endswith(".json") and file.size_bytes > LIMITS.json_document_bytes:
                raise RejectedError("AG-RLY-006", f"{file.name} has {file.size_bytes} bytes")

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
        _check_author(card.site, row)
        with self._store.transaction():
            if self._store.put_card(card.site, card.version, envelope):
                self._route_again()
            self._store_document(row)
        self._sweep([row.item])

    def _accept_offer(self, row: ItemRow) -> None:
        envelope = self._read(row, "offer.json")
        offer = verify_offer(envelope, self._roster(), self._utc_now())
        _check_author(offer.donor, row)
        entry = self._verify_entry(row, "offer", envelope, offer.packet_id)
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
        _check_author(dispatch.donor, row)
        entry = self._verify_entry(
            row, "dispatch", envelope, dispatch.packet_id, dispatch.dispatch_id
        )
        self._check_offered(dispatch)
        _check_sealed_files(row.item, verified.header)
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

    def _check_offered(self, dispatch: Dispatch) -> None:
        packet = self._store.find_packet(dispatch.packet_id)
        if packet is None or packet.donor != dispatch.donor:
            raise RejectedError("AG-CRD-005", "a dispatch without an offer by the same donor")
        if packet.state == "withdrawn":
            raise RejectedError("AG-CRD-007", "a dispatch of a withdrawn packet")
        offered = (packet.kind, packet.statement_digest)
        if offered != (dispatch.kind, dispatch.statement_digest):
            raise RejectedError("AG-CRD-005", "the dispatch is not of the packet that was offered")

    def _accept_receipt(self, row: ItemRow) -> None:
        envelope = self._read(row, "receipt.json")
        receipt = verify_receipt(envelope, self._roster(), self._utc_now())
        _check_author(receipt.site, row)
        entry = self._verify_entry(
            row, "receipt", envelope, receipt.packet_id, receipt.dispatch_id, receipt.state
        )
        dispatch = self._check_received(receipt)
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

    def _check_received(self, receipt: Receipt) -> DispatchRow:
        dispatch = self._store.find_dispatch(receipt.dispatch_id)
        if dispatch is None or dispatch.packet_id != receipt.packet_id:
            raise RejectedError("AG-CRD-006", "a receipt for an unknown dispatch")
        delivery = self._store.find_delivery(receipt.dispatch_id, receipt.site)
        if delivery is None or delivery.state == "held":
            raise RejectedError("AG-CRD-006", "a receipt for a dispatch that was not delivered")
        # What was put into quarantine may have been changed on its way; what was tried was not.
        tried = receipt.state in {"kept", "reverted"}
        if tried and dispatch.digest != receipt.dispatch_digest:
            raise RejectedError("AG-CRD-006", "a receipt for another dispatch than the logged one")
        return dispatch

    def _accept_withdrawal(self, row: ItemRow) -> None:
        envelope = self._read(row, "withdrawal.json")
        withdrawal = verify_withdrawal(envelope, self._roster(), self._utc_now())
        _check_author(withdrawal.donor, row)
        entry = self._verify_entry(row, "withdrawal", envelope, withdrawal.packet_id)
        self._check_withdrawable(withdrawal)
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

    def _check_withdrawable(self, withdrawal: Withdrawal) -> None:
        packet = self._store.find_packet(withdrawal.packet_id)
        if packet is None or packet.donor != withdrawal.donor:
            raise RejectedError("AG-CRD-006", "a withdrawal of a packet of someone else")
        if packet.statement_digest != withdrawal.statement_digest:
            raise RejectedError("AG-CRD-006", "a withdrawal of another packet than the offered one")

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
        described = tuple(describe_bytes(name, files[name]) for name in sorted(files))
        with self._lock:
            for file in described:
                self._mailbox.add_file(file, files[file.name])
            self._store.add_item(Item(kind, self._me, site, described), site, "waiting", subject)

    def release(self, dispatch: DispatchRow, proof: bytes) -> None:
        """Send a logged dispatch, with its proof, to every recipient that is enrolled now."""
        source = self._store.find_item(dispatch.item_id)
        assert source is not None  # recorded in the transaction that recorded the dispatch
        proof_file = describe_bytes(PROOF_NAME, proof)
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

    def _verify_entry(
        self,
        row: ItemRow,
        kind: EventName,
        document: bytes,
        packet_id: str,
        dispatch_id: str = "",
        outcome: str = "",
    ) -> bytes:
        """The log entry that came with a document, verified to be about that document."""
        entry = self._mailbox.read(row.item, f"{kind}.event.json", LIMITS.entry_bytes)
        event = verify_event(entry, self._roster(), self._utc_now())
        expected = (
            kind, row.site, packet_id, dispatch_id, outcome, f"{kind}.json",
            hashlib.sha256(document).hexdigest(),
        )  # fmt: skip
        found = (
            event.event, event.actor, event.packet_id, event.dispatch_id, event.outcome,
            event.document_name, event.document_sha256,
        )  # fmt: skip
        if expected != found:
            raise RejectedError("AG-CRD-004", f"the event is not about this {kind}")
        return entry

    def _queue_entry(self, entry: bytes, document: bytes, subject: str = "") -> None:
        digest = hashlib.sha256(document).hexdigest()
        self._store.queue_entry(QueuedEntry(entry, digest, document), subject)


def describe_bytes(name: str, content: bytes) -> ItemFile:
    """Describe a small file that is in memory."""
    parts = tuple(
        hashlib.sha256(content[start : start + LIMITS.part_bytes]).hexdigest()
        for start in range(0, len(content), LIMITS.part_bytes)
    )
    return ItemFile(name, len(content), hashlib.sha256(content).hexdigest(), parts)


def _check_author(author: str, row: ItemRow) -> None:
    if author != row.site:
        raise RejectedError("AG-CRD-003", f"a document of another site came from {row.site}")


def _check_sealed_files(item: Item, header: Header) -> None:
    """The item's sealed files are exactly those that the header, and so the donor, names."""
    described = {part.name: (part.sealed_bytes, part.sealed_sha256) for part in header.parts}
    described[MANIFEST_NAME] = (header.manifest.sealed_bytes, header.manifest.sealed_sha256)
    found = {
        file.name: (file.size_bytes, file.sha256)
        for file in item.files
        if file.name.endswith(".sealed")
    }
    if described != found:
        raise RejectedError("AG-CRD-005", "the sealed files are not those of the header")
