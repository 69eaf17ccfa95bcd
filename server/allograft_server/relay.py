# SPDX-License-Identifier: Apache-2.0
"""The coordinator's half of the relay: which calls to make, and what their answers mean.

Knows no Flower and no network: calls go out through `next_calls`, answers come back through
`settle`, in any order, late, twice or never. What must survive a restart is in the store and the
mailbox before anything is announced; what is in memory here (calls under way, what a site last
said it lacks) is made again from the next poll. See protos/spec/relay.md.
"""

from __future__ import annotations

import re
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

from allograft.crypto.keys import SigningKey, VerifyKey
from allograft.errors import AllograftError, RejectedError, UnavailableError
from allograft.limits import LIMITS
from allograft.relay.frame import (
    Header,
    Method,
    SignedFrame,
    check_answer,
    sign_frame,
    verify_frame,
)
from allograft.relay.item import Item
from allograft.relay.poll import Announcement, PollAnswer, PollCall, Refusal
from allograft_server.mailbox import Mailbox, missing_parts
from allograft_server.store import ItemRow, Store

# Flower moves each poll in about twenty requests to the SuperLink, so a site where nothing happens
# is asked less and less often: every fifth part of the time it has been still, within bounds.
_ACTIVE_S = 5.0
_IDLE_POLL_S = 2.0
_LONGEST_IDLE_POLL_S = 10.0
_LONGEST_PAUSE_S = 60.0
_RECEIVING_ITEMS = 64  # per site; more wait in the site's outbox
_POLL_BUDGET_BYTES = LIMITS.poll_bytes // 2
_CODE = re.compile(r"AG-[A-Z]{2,4}-\d{3}")


class Directory(Protocol):
    """Who is enrolled now, as the roster says."""

    def site_of_node(self, public_key: bytes) -> str | None:
        """The enrolled site that owns a node key, or nothing."""

    def site_keys(self, site: str, now: datetime) -> tuple[VerifyKey, ...]:
        """The signing keys of a site; raises RejectedError if it is not enrolled now."""


class Desk(Protocol):
    """What happens to items and to what sites report; see `post` and `witnessing`."""

    def check_item(self, item: Item) -> None:
        """Refuse an announced item by its description alone (RejectedError)."""

    def item_delivered(self, row: ItemRow) -> None:
        """A site holds an item of ours durably."""

    def item_untaken(self, row: ItemRow, code: str) -> None:
        """A site will never take an item of ours."""

    def awaits_witnesses(self) -> bool:
        """Whether a dispatch is held back until sites have cosigned the log."""

    def checkpoint_for(self, site: str, witnessed_size: int) -> tuple[str, tuple[bytes, ...]]:
        """The checkpoint to witness and its consistency proof; empty when nothing is new."""

    def cosigned(self, site: str, cosignature: str) -> None:
        """A site witnessed a checkpoint (RejectedError if the line is wrong)."""


@dataclass(frozen=True, slots=True)
class OnlineNode:
    """A node that the SuperLink reports as online."""

    node_id: int
    public_key: bytes


@dataclass(frozen=True, slots=True)
class OutgoingCall:
    """A call for one node."""

    node_id: int
    header: Header
    frame: SignedFrame


@dataclass(slots=True)
class _Lane:
    """What is under way with one site; rebuilt from nothing after a restart."""

    calls: dict[str, Header] = field(default_factory=dict)
    wanted: deque[tuple[str, int]] = field(default_factory=deque)
    taken: set[tuple[str, int]] = field(default_factory=set)  # put since the last poll was called
    outbox: tuple[str, ...] = ()
    announced: frozenset[str] = frozenset()
    moved_s: float = 0.0
    polled_s: float = -_LONGEST_PAUSE_S
    failures: int = 0
    resume_s: float = 0.0

    def has(self, method: Method) -> bool:
        return any(header.method == method for header in self.calls.values())

    def carries(self, item_id: str, part: int) -> bool:
        return any((h.item, h.part) == (item_id, part) for h in self.calls.values())

    @property
    def free_slots(self) -> int:
        parts = sum(header.method != "poll" for header in self.calls.values())
        return LIMITS.parts_in_flight - parts


class Relay:
    """Drives polls, takes and puts for every online site.

    Args:
        me: The coordinator's id.
        key: The coordinator's signing key.
        store: The database.
        mailbox: The files.
        directory: Who is enrolled.
        desk: What to do with items, cosignatures and deliveries.
        utc_now: The clock that frames are dated with.
        monotonic_s: The clock that pauses are measured with.
    """

    def __init__(
        self,
        me: str,
        key: SigningKey,
        store: Store,
        mailbox: Mailbox,
        directory: Directory,
        desk: Desk,
        utc_now: Callable[[], datetime],
        monotonic_s: Callable[[], float],
    ) -> None:
        self._me = me
        self._key = key
        self._store = store
        self._mailbox = mailbox
        self._directory = directory
        self._desk = desk
        self._utc_now = utc_now
        self._monotonic_s = monotonic_s
        self._lock = threading.Lock()  # the courier's calls arrive on several threads
        self._session = ""
        self._lanes: dict[str, _Lane] = {}
        self.heard_s = 0.0  # when the courier last asked for calls

    # --- calls ---

    def next_calls(self, online: Iterable[OnlineNode], session: str) -> list[OutgoingCall]:
        """Calls to make now; at most one of them carries a part."""
        with self._lock:
            self.heard_s = self._monotonic_s()
            if session != self._session:
                # Another courier process: whatever the one before carried is lost.
                self._session = session
                for lane in self._lanes.values():
                    lane.calls.clear()
            calls: list[OutgoingCall] = []
            has_body = False
            is_urgent = self._desk.awaits_witnesses()
            for node in online:
                site = self._directory.site_of_node(node.public_key)
                if site is None:
                    continue
                lane = self._lanes.setdefault(site, _Lane(moved_s=self._monotonic_s()))
                if self._monotonic_s() < lane.resume_s:
                    continue
                if self._is_poll_due(site, lane, is_urgent):
                    calls.append(self._poll(site, lane, node.node_id))
                calls += self._takes(site, lane, node.node_id)
                if not has_body and (put := self._put(site, lane, node.node_id)):
                    has_body = True
                    calls.append(put)
            return calls

    def _is_poll_due(self, site: str, lane: _Lane, is_urgent: bool) -> bool:
        if lane.has("poll"):
            return False
        now_s = self._monotonic_s()
        still_s = now_s - lane.moved_s
        longest_s = _IDLE_POLL_S if is_urgent else _LONGEST_IDLE_POLL_S
        pause_s = min(max(_IDLE_POLL_S, still_s / 5), longest_s)
        if still_s < _ACTIVE_S or now_s - lane.polled_s >= pause_s:
            return True
        waiting = {row.item_id for row in self._waiting(site)}
        return not waiting <= lane.announced

    def _poll(self, site: str, lane: _Lane, node_id: int) -> OutgoingCall:
        announced = self._announcements(site)
        lane.announced = frozenset(entry.item.item_id for entry in announced)
        lane.taken.clear()
        rows = [row for item_id in lane.outbox if (row := self._store.find_item(item_id))]
        reported = self._store.sites().get(site)
        witnessed_size = reported.witnessed_size if reported else 0
        checkpoint, consistency = self._desk.checkpoint_for(site, witnessed_size)
        body = PollCall(
            announced=announced,
            stored=tuple(row.item_id for row in rows if row.state == "stored"),
            refused=tuple(Refusal(r.item_id, r.code) for r in rows if r.state == "refused"),
            checkpoint=checkpoint,
            consistency=consistency,
        ).to_bytes()
        return self._call(site, lane, node_id, "poll", body)

    def _announcements(self, site: str) -> tuple[Announcement, ...]:
        entries: list[Announcement] = []
        budget = _POLL_BUDGET_BYTES
        for row in self._waiting(site):
            item = row.item
            is_small = item.size_bytes <= LIMITS.inline_bytes
            budget -= len(item.to_bytes()) + (2 * item.size_bytes if is_small else 0)
            if entries and budget < 0:
                break
            inline = {}
            if is_small:
                inline = {file.name: self._mailbox.path(file).read_bytes() for file in item.files}
            entries.append(Announcement(item, inline))
        return tuple(entries)

    def _waiting(self, site: str) -> tuple[ItemRow, ...]:
        return self._store.items(site, "waiting")[: LIMITS.items_per_poll]

    def _takes(self, site: str, lane: _Lane, node_id: int) -> list[OutgoingCall]:
        calls: list[OutgoingCall] = []
        if not lane.free_slots:
            return calls
        for row in self._store.items(site, "receiving"):
            missing = missing_parts(row.item, self._store.parts(row.item_id), self._mailbox)
            if not self._mailbox.has_room(len(missing) * LIMITS.part_bytes):
                continue
            for part in missing:
                if lane.free_slots <= 0:
                    return calls
                if not lane.carries(row.item_id, part):
                    calls.append(self._call(site, lane, node_id, "take", b"", row.item_id, part))
        return calls

    def _put(self, site: str, lane: _Lane, node_id: int) -> OutgoingCall | None:
        while lane.wanted and lane.free_slots > 0:
            item_id, part = lane.wanted.popleft()
            row = self._store.find_item(item_id)
            if row is None or row.state != "waiting" or lane.carries(item_id, part):
                continue
            body = self._mailbox.read_part(row.item.part(part))
            return self._call(site, lane, node_id, "put", body, item_id, part)
        return None

    def _call(
        self,
        site: str,
        lane: _Lane,
        node_id: int,
        method: Method,
        body: bytes,
        item_id: str = "",
        part: int = 0,
    ) -> OutgoingCall:
        header = Header(
            call=secrets.token_hex(16),
            method=method,
            sender=self._me,
            recipient=site,
            status="call",
            time=self._utc_now(),
            item=item_id,
            part=part,
        )
        lane.calls[header.call] = header
        return OutgoingCall(node_id, header, sign_frame(header, body, self._key))

    # --- answers ---

    def settle(self, call_id: str, answer: SignedFrame | None) -> None:
        """Take an answer, or learn that a call (None) brought none.

        An answer to a call that is not under way is a replay or comes from before a restart, and is
        dropped. So is a frame that its site did not sign: the call is made again after a pause.
        """
        with self._lock:
            lane, call = self._find_call(call_id)
            if lane is None or call is None:
                return
            del lane.calls[call_id]
            try:
                if answer is None:
                    raise UnavailableError("AG-RLY-007", "the call brought no answer")
                self._apply(lane, call, answer)
            except AllograftError:
                self._pause(lane, call)
            else:
                lane.failures = 0

    def _find_call(self, call_id: str) -> tuple[_Lane | None, Header | None]:
        for lane in self._lanes.values():
            if call_id in lane.calls:
                return lane, lane.calls[call_id]
        return None, None

    def _pause(self, lane: _Lane, call: Header) -> None:
        if call.method == "put":
            lane.wanted.clear()  # the next poll tells what is still lacking
        lane.failures += 1
        lane.resume_s = self._monotonic_s() + min(2.0 ** min(lane.failures, 6), _LONGEST_PAUSE_S)

    def _apply(self, lane: _Lane, call: Header, frame: SignedFrame) -> None:
        keys = self._directory.site_keys(call.recipient, self._utc_now())
        answer = verify_frame(frame, keys, self._me, self._utc_now())
        check_answer(call, answer)
        if call.method == "poll":
            if answer.status != "ok":
                raise UnavailableError("AG-RLY-007", "the site refused a poll")
            self._apply_poll(call.recipient, lane, PollAnswer.from_bytes(frame.body))
        elif call.method == "take":
            self._apply_take(lane, call, answer, frame.body)
        else:
            self._apply_put(lane, call, answer)

    def _apply_take(self, lane: _Lane, call: Header, answer: Header, body: bytes) -> None:
        row = self._store.find_item(call.item)
        if row is None or row.state != "receiving":
            return
        if answer.status == "refused":
            self._apply_refused_take(row, answer.code)
            return
        self._mailbox.add_part(row.item_id, row.item.part(call.part), body)
        self._store.add_part(row.item_id, call.part)
        lane.moved_s = self._monotonic_s()
        self._complete(row.item)

    def _apply_refused_take(self, row: ItemRow, code: str) -> None:
        if not _CODE.fullmatch(code) or code.startswith("AG-STO"):
            raise UnavailableError("AG-RLY-007", "the site cannot give a part now")
        self._store.move_item(row.item_id, ("receiving",), "refused", code)
        self._mailbox.drop_partial(row.item_id)

    def _apply_put(self, lane: _Lane, call: Header, answer: Header) -> None:
        if answer.status == "refused":
            raise UnavailableError("AG-RLY-007", "the site cannot take a part now")
        lane.moved_s = self._monotonic_s()
        lane.taken.add((call.item, call.part))
        # Go on with the part after the last one under way, without waiting for the next poll: an
        # idle SuperNode sleeps three seconds. What it has already it takes again.
        row = self._store.find_item(call.item)
        if row is None or row.state != "waiting":
            return
        ahead = [part for item_id, part in lane.wanted if item_id == call.item]
        under_way = [h.part for h in lane.calls.values() if h.item == call.item]
        following = max([call.part, *ahead, *under_way]) + 1
        if following < row.item.part_count and len(lane.wanted) < LIMITS.parts_in_flight:
            lane.wanted.append((call.item, following))

    # --- polls ---

    def _apply_poll(self, site: str, lane: _Lane, answer: PollAnswer) -> None:
        lane.polled_s = self._monotonic_s()
        self._store.report_site(site, answer.roster_version, answer.witnessed_size)
        lane.outbox = tuple(entry.item.item_id for entry in answer.outbox)
        for entry in answer.outbox:
            if self._take_announcement(site, entry):
                lane.moved_s = self._monotonic_s()
        if self._apply_outcomes(site, answer):
            lane.moved_s = self._monotonic_s()
        lane.wanted = deque(self._read_wants(site, lane, answer))
        if answer.cosignature:
            self._desk.cosigned(site, answer.cosignature)

    def _take_announcement(self, site: str, entry: Announcement) -> bool:
        """Record an item of a site's outbox; true if that changed anything."""
        item = entry.item
        known = self._store.find_item(item.item_id)
        if known is not None and known.state != "receiving":
            return False
        try:
            if item.sender != site or item.recipient != self._me:
                raise RejectedError("AG-CRD-003", "an item of another sender was announced")
            self._desk.check_item(item)
            if known is None:
                if len(self._store.items(site, "receiving")) >= _RECEIVING_ITEMS:
                    return False
                self._store.add_item(item, site, "receiving", "")
            for file in item.files:
                if entry.inline:
                    self._mailbox.add_file(file, entry.inline[file.name])
            return self._complete(item) or known is None
        except RejectedError as error:
            # A description in someone else's name must not be recorded: it could be a true one.
            if item.sender == site:
                self._store.add_item(item, site, "refused", "", error.code)
                self._store.move_item(item.item_id, ("receiving",), "refused", error.code)
            return False

    def _complete(self, item: Item) -> bool:
        present = self._store.parts(item.item_id)
        if missing_parts(item, present, self._mailbox):
            return False
        return self._store.move_item(item.item_id, ("receiving",), "complete")

    def _apply_outcomes(self, site: str, answer: PollAnswer) -> bool:
        """Take what the site says of our items; true if any state changed."""
        changed = False
        for item_id in answer.done:
            row = self._store.find_item(item_id)
            if row is not None and row.site == site and row.state == "waiting":
                self._desk.item_delivered(row)
                changed = True
        for refusal in answer.refused:
            row = self._store.find_item(refusal.item_id)
            if row is not None and row.site == site and row.state == "waiting":
                code = refusal.code if _CODE.fullmatch(refusal.code) else "AG-RLY-001"
                self._desk.item_untaken(row, code)
                changed = True
        return changed

    def _read_wants(self, site: str, lane: _Lane, answer: PollAnswer) -> list[tuple[str, int]]:
        wanted: list[tuple[str, int]] = []
        for want in answer.wants:
            row = self._store.find_item(want.item_id)
            if row is None or row.site != site or row.state != "waiting":
                continue
            wanted += [
                (want.item_id, part)
                for part in want.parts
                # The answer was written before what is under way, or just arrived, was there.
                if part < row.item.part_count
                and not lane.carries(want.item_id, part)
                and (want.item_id, part) not in lane.taken
            ]
        return wanted[: LIMITS.parts_in_flight]
