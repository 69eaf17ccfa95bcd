# SPDX-License-Identifier: Apache-2.0
"""The site's half of the relay: one verified call of the coordinator in, one signed answer out.

Invariants: nothing is read or changed before the call's signature fits the coordinator's keys in
the roster; every call can be repeated without harm; an answer never reports what is not durable.
See protos/spec/relay.md.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from allograft.crypto.keys import SigningKey
from allograft.errors import AllograftError, RejectedError, UnavailableError
from allograft.relay.frame import Header, SignedFrame, peek_sender, sign_frame, verify_frame
from allograft.relay.poll import PollAnswer, PollCall
from allograft.routing.document import Signers
from allograft_client.contact import Contact
from allograft_client.inbox import Inbox
from allograft_client.outbox import Outbox
from allograft_client.store import Store


class TrustedRoster(Signers, Protocol):
    """The roster as the site trusts it now."""

    @property
    def version(self) -> int:
        """Version of the roster."""
        ...


class Witness(Protocol):
    """The site as a witness of the log: it cosigns only what extends what it saw before."""

    @property
    def size(self) -> int:
        """Tree size of the last checkpoint that was cosigned."""
        ...

    def cosign(self, checkpoint: str, consistency: tuple[bytes, ...], now: datetime) -> str:
        """Check a checkpoint against the last one, remember it durably, return the signature line.

        Raises:
            RejectedError: The log forked, shrank, or the checkpoint is not the log's.
        """
        ...


@dataclass(frozen=True, slots=True)
class Parties:
    """Who speaks with whom, and with which key."""

    site: str
    coordinator: str
    key: SigningKey


def _utc_now() -> datetime:
    return datetime.now(UTC)


class Exchange:
    """Answers calls; safe to use from several threads.

    Args:
        parties: Our name and key, and the coordinator's name.
        roster: Gives the roster that is trusted at this moment.
        store: The site's database.
        boxes: Outbox and inbox.
        witness: The site's memory of the log.
        alarm: Told about refusals that an operator should see: a code and a cause.
        clock: The current time.
    """

    def __init__(
        self,
        parties: Parties,
        roster: Callable[[], TrustedRoster],
        store: Store,
        boxes: tuple[Outbox, Inbox],
        witness: Witness,
        alarm: Callable[[str, str], None],
        clock: Callable[[], datetime] = _utc_now,
    ) -> None:
        self._parties = parties
        self._roster = roster
        self._store = store
        self._outbox, self._inbox = boxes
        self._witness = witness
        self._alarm = alarm
        self._clock = clock
        self._contact = Contact(store)
        # Flower hands a site one message at a time; the lock costs nothing and keeps the steps of
        # one call together when something else speaks to the socket as well.
        self._lock = threading.Lock()

    def answer(self, frame: SignedFrame) -> SignedFrame:
        """Answer one call.

        Raises:
            RejectedError: The frame is not a fresh call of our coordinator to us. Nothing signed
                leaves then: a stranger gets no answer to study.
        """
        now = self._clock()
        with self._lock:
            roster = self._roster()
            call = self._verify(frame, roster, now)
            self._remember_contact(now)
            try:
                body = self._perform(call, frame.body, roster, now)
            except AllograftError as error:
                self._alarm(error.code, error.cause)
                return self._sign(call, now, b"", error.code)
            return self._sign(call, now, body)

    def _verify(self, frame: SignedFrame, roster: TrustedRoster, now: datetime) -> Header:
        coordinator = self._parties.coordinator
        if peek_sender(frame) != coordinator:
            raise RejectedError("AG-RLY-002", "the frame does not come from our coordinator")
        keys = roster.signing_keys(coordinator, "coordinator", now)
        call = verify_frame(frame, keys, self._parties.site, now)
        if call.status != "call":
            raise RejectedError("AG-RLY-003", "the frame is not a call")
        return call

    def _remember_contact(self, now: datetime) -> None:
        try:
            self._contact.hear(now)
        except UnavailableError as error:
            # On a full disk the outbox can still be read.
            self._alarm(error.code, error.cause)

    def _perform(self, call: Header, body: bytes, roster: TrustedRoster, now: datetime) -> bytes:
        if call.method == "poll":
            return self._poll(PollCall.from_bytes(body), roster, now).to_bytes()
        if call.method == "take":
            return self._outbox.read_part(call.item, call.part)
        self._inbox.put_part(call.item, call.part, body)
        return b""

    def _poll(self, call: PollCall, roster: TrustedRoster, now: datetime) -> PollAnswer:
        with self._store.transaction():
            for row in self._outbox.settle(call.stored, call.refused):
                self._store.add_job("light", "item-refused", row.item_id)
        done, refused = self._inbox.take_announcements(call.announced)
        return PollAnswer(
            outbox=self._outbox.announcements(),
            wants=self._inbox.wants(),
            done=done,
            refused=refused,
            roster_version=roster.version,
            cosignature=self._cosign(call, now),
            witnessed_size=self._witnessed_size(),
        )

    def _cosign(self, call: PollCall, now: datetime) -> str:
        if not call.checkpoint:
            return ""
        try:
            return self._witness.cosign(call.checkpoint, call.consistency, now)
        except AllograftError as error:
            # A log that forks must not stop receipts and offers: they are the evidence.
            self._alarm(error.code, error.cause)
            return ""

    def _witnessed_size(self) -> int:
        try:
            return self._witness.size
        except RejectedError as error:
            self._alarm(error.code, error.cause)
            return 0

    def _sign(self, call: Header, now: datetime, body: bytes, code: str = "") -> SignedFrame:
        header = Header(
            call=call.call,
            method=call.method,
            sender=self._parties.site,
            recipient=self._parties.coordinator,
            status="refused" if code else "ok",
            time=now,
            item=call.item,
            part=call.part,
            code=code,
        )
        return sign_frame(header, body, self._parties.key)
