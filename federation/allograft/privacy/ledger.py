# SPDX-License-Identifier: Apache-2.0
"""The privacy ledger: what has been spent on people, entry by signed entry, and what may still be.

Sans-IO: bytes and values in, verdicts out. `ledger_file` keeps the bytes on disk. A domain is a set
of people, not a file. The rules, as load order:

- an entry is read only if a key of the site signed it, and it names this site, its own number, the
  hash of the entry before it, and a time that is not before that entry's;
- a domain's limits are fixed once, by its first entry, and give a cap on RDP at one order;
- a reservation is admitted only while everything ever reserved in its domain stays within the cap,
  whatever became of it (RDP filter at a fixed order: arXiv 2008.11193). Nothing is ever given back;
- a plan is reserved once and ended once; saying the same again changes nothing;
- a release without privacy makes its domain's ε infinite, for ever. Later reservations still need
  budget, and everybody sees the infinity.

See protos/spec/ledger.md.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from functools import lru_cache
from typing import TypeAlias

from allograft.crypto import canonical, dsse
from allograft.crypto.keys import SigningKey, VerifyKey
from allograft.errors import RejectedError
from allograft.limits import LIMITS
from allograft.privacy.accountant import ORDERS, DpEvent, epsilon_at, rdp_cap, rdp_of
from allograft.privacy.plan import PrivacyPlan

ENTRY_TYPE = "application/vnd.allograft.ledger-entry.v1+json"
DEFAULT_ORDER = 4  # admits as much as the best order for usual runs at (8, 1e-6), as measured

_DOMAIN = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_ROLE = re.compile(r"[a-z][a-z0-9-]{0,62}")
_CODE = re.compile(r"AG-[A-Z]{2,3}-\d{3}")


class ChargeKind(StrEnum):
    """What of the people's data somebody saw."""

    TRAINING = "training"
    TUNING = "tuning"  # a run whose only trace is the choice of another run's parameters
    STATISTIC = "statistic"
    SNAPSHOT = "snapshot"  # weights or a choice between them released before the end of a run
    AUDIT = "audit"  # a released report on canaries


class Outcome(StrEnum):
    """How a charge ended; both stay spent."""

    RELEASED = "released"
    ABORTED = "aborted"


@dataclass(frozen=True, slots=True)
class Head:
    """How far a ledger has grown; kept outside its file, it shows what was cut off.

    Attributes:
        count: Number of entries.
        hash: SHA-256 (hex) of the last entry's payload; of nothing, for an empty ledger.
    """

    count: int
    hash: str

    def to_text(self) -> str:
        """One line, for files, databases and dossiers."""
        return f"{self.count} {self.hash}"

    @classmethod
    def from_text(cls, text: str) -> Head:
        """Read what `to_text` wrote.

        Raises:
            RejectedError: AG-PRV-060.
        """
        if not re.fullmatch(r"(0|[1-9][0-9]{0,8}) [0-9a-f]{64}", text):
            raise RejectedError("AG-PRV-060", "a head of the ledger is malformed")
        count, digest = text.split(" ")
        return cls(int(count), digest)


EMPTY = Head(0, hashlib.sha256(b"").hexdigest())


@dataclass(frozen=True, slots=True)
class DomainOpened:
    """A domain's limits, fixed for ever.

    Attributes:
        domain: Its name.
        epsilon_max: The ε that all releases together keep.
        delta_max: At which δ.
        order: The one order at which RDP is counted; one of `ORDERS`.
        declared_by: The role that states who the people are (never a person's name).
    """

    domain: str
    epsilon_max: float
    delta_max: float
    order: int
    declared_by: str

    def check(self) -> None:
        """Refuse what no ledger records, before one is started for it.

        Raises:
            RejectedError: AG-PRV-059 for a name or role of the wrong form, AG-PRV-061 for limits
                out of range.
        """
        if not _DOMAIN.fullmatch(self.domain):
            raise RejectedError("AG-PRV-059", "the domain's name is not of a-z, 0-9 and dashes")
        if not _ROLE.fullmatch(self.declared_by):
            raise RejectedError("AG-PRV-059", "who declares it is not a role of a-z, 0-9, dashes")
        _cap(self)


@dataclass(frozen=True, slots=True)
class Charge:
    """Budget asked for before the first step.

    Attributes:
        plan_id: The plan it pays for (32 hex); a statistic draws an id of its own.
        domain: Whose budget.
        kind: What somebody will see.
        event: The accounted run.
        plan_digest: SHA-256 (hex) of the plan's statement, or of what describes the statistic.
        purpose: One line.
    """

    plan_id: str
    domain: str
    kind: ChargeKind
    event: DpEvent
    plan_digest: str
    purpose: str


@dataclass(frozen=True, slots=True)
class Reserved:
    """A charge with its RDP at `ORDERS`, spent from now on."""

    charge: Charge
    rdp: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Committed:
    """How a reserved charge ended.

    Attributes:
        plan_id: Which.
        outcome: Released or aborted.
        packets: Digests (SHA-256, hex) of what was released.
        reason: Code of the refusal or failure that aborted it; empty if released.
    """

    plan_id: str
    outcome: Outcome
    packets: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True)
class NonprivateRelease:
    """Something without formal privacy was released; its domain's ε is infinite from now on.

    Attributes:
        domain: Whose data it learnt from.
        packet: Digest (SHA-256, hex) of what was released.
        declared_by: The role that released it.
    """

    domain: str
    packet: str
    declared_by: str


Act: TypeAlias = DomainOpened | Reserved | Committed | NonprivateRelease


@dataclass(frozen=True, slots=True)
class Entry:
    """An act in its place of the chain."""

    site: str
    number: int
    previous: str
    time: datetime
    act: Act

    def to_payload(self) -> bytes:
        """The canonical JSON that is signed and hashed."""
        return canonical.dumps(
            {
                "version": 1,
                "site": self.site,
                "number": self.number,
                "previous": self.previous,
                "time": canonical.format_time(self.time),
                "act": _write_act(self.act),
            }
        )


@dataclass(frozen=True, slots=True)
class Account:
    """One domain as it stands.

    Attributes:
        limits: As opened.
        cap: Most RDP (nats) at the fixed order.
        reserved: All reservations, in order.
        outcomes: Plan id → how it ended; a reservation without one is open.
        nonprivate: Releases without privacy.
    """

    limits: DomainOpened
    cap: float
    reserved: tuple[Reserved, ...] = ()
    outcomes: Mapping[str, Committed] = field(default_factory=dict)
    nonprivate: tuple[NonprivateRelease, ...] = ()

    @property
    def spent(self) -> float:
        """RDP (nats) at the fixed order of everything ever reserved."""
        index = ORDERS.index(self.limits.order)
        return math.fsum(entry.rdp[index] for entry in self.reserved)

    @property
    def left(self) -> float:
        """RDP (nats) at the fixed order that may still be reserved."""
        return max(0.0, self.cap - self.spent)

    @property
    def is_nonprivate(self) -> bool:
        """Whether anything was released without privacy: ε is infinite."""
        return bool(self.nonprivate)

    @property
    def epsilon(self) -> float:
        """The ε of what was spent, by RDP at the fixed order; infinite after a nonprivate release.

        Never above `limits.epsilon_max` otherwise. It stays true if every run was chosen by the
        results of those before it.
        """
        if self.is_nonprivate:
            return math.inf
        return epsilon_at(self.spent, self.limits.delta_max, self.limits.order)

    @property
    def events(self) -> tuple[DpEvent, ...]:
        """The accounted runs, for figures that are shown as information."""
        return tuple(entry.charge.event for entry in self.reserved)


@dataclass(slots=True)
class Ledger:
    """The ledger of one site as its entries say.

    It changes by `append` alone, which takes an act through the same rules when it is made and
    when it is read back.

    Attributes:
        site: Whose.
        head: Count and hash of the last entry.
        time: Of the last entry; None if there is none.
        accounts: Domains by name.
    """

    site: str
    head: Head = EMPTY
    time: datetime | None = None
    accounts: dict[str, Account] = field(default_factory=dict)
    _domain_of: dict[str, str] = field(default_factory=dict)
    _hashes: list[str] = field(default_factory=lambda: [EMPTY.hash])

    def account(self, domain: str) -> Account:
        """One domain.

        Raises:
            RejectedError: AG-PRV-062 if it was not opened.
        """
        if domain not in self.accounts:
            raise RejectedError("AG-PRV-062", f"{domain[:64]} is not in the ledger")
        return self.accounts[domain]

    def reservation(self, plan_id: str) -> Reserved | None:
        """What was reserved for a plan."""
        if plan_id not in self._domain_of:
            return None
        entries = self.accounts[self._domain_of[plan_id]].reserved
        return next(entry for entry in entries if entry.charge.plan_id == plan_id)

    def outcome(self, plan_id: str) -> Committed | None:
        """How a plan ended; None if it was not reserved or is still open."""
        if plan_id not in self._domain_of:
            return None
        return self.accounts[self._domain_of[plan_id]].outcomes.get(plan_id)

    def check_head(self, known: Head) -> None:
        """Refuse a ledger that is not a continuation of what is known of it.

        Raises:
            RejectedError: AG-PRV-069 if it is shorter, AG-PRV-060 if it is another.
        """
        if known.count > self.head.count:
            raise RejectedError(
                "AG-PRV-069", f"{known.count} entries are known, {self.head.count} are there"
            )
        if self._hashes[known.count] != known.hash:
            raise RejectedError("AG-PRV-060", f"entry {known.count} is not the one that is known")

    def is_done(self, act: Act) -> bool:
        """Whether the ledger says this already, so that nothing needs to be written.

        Raises:
            RejectedError: AG-PRV-061 or -065 if it says something else about the same thing.
        """
        if isinstance(act, DomainOpened):
            account = self.accounts.get(act.domain)
            if account is not None and account.limits != act:
                raise RejectedError("AG-PRV-061", f"domain {act.domain} has other limits")
            return account is not None
        if isinstance(act, Reserved):
            return self._is_reserved(act)
        if isinstance(act, Committed):
            outcome = self.outcome(act.plan_id)
            if outcome is not None and outcome != act:
                raise RejectedError("AG-PRV-065", "the plan has ended otherwise")
            return outcome is not None
        return act.packet in {entry.packet for entry in self.account(act.domain).nonprivate}

    def next_entry(self, act: Act, now: datetime) -> Entry:
        """The entry that would record an act, if the rules admit it.

        Raises:
            RejectedError: AG-PRV-061 to -065.
        """
        if self.time is not None and now < self.time:
            raise RejectedError(
                "AG-PRV-064", f"the last entry is of {canonical.format_time(self.time)}"
            )
        self._admit(act)
        return Entry(self.site, self.head.count + 1, self.head.hash, now, act)

    def append(self, payload: bytes) -> None:
        """Take over the next entry, whose signature was verified.

        Raises:
            RejectedError: AG-PRV-060 if it is no next entry, AG-PRV-061 to -065 if the rules do not
                admit it.
        """
        entry = read_entry(payload)
        if entry.site != self.site:
            raise RejectedError("AG-PRV-060", "an entry is another site's")
        if (entry.number, entry.previous) != (self.head.count + 1, self.head.hash):
            raise RejectedError("AG-PRV-060", f"entry {self.head.count + 1} does not follow")
        if self.time is not None and entry.time < self.time:
            raise RejectedError("AG-PRV-060", f"entry {entry.number} is older than the one before")
        self._admit(entry.act)
        self._apply(entry.act)
        self.time = entry.time
        self.head = Head(entry.number, hashlib.sha256(payload).hexdigest())
        self._hashes.append(self.head.hash)

    def _is_reserved(self, act: Reserved) -> bool:
        found = self.reservation(act.charge.plan_id)
        if found is None:
            return False
        if found.charge != act.charge:
            raise RejectedError("AG-PRV-065", "the plan was reserved with other constants")
        if self.outcome(act.charge.plan_id) is not None:
            # A second run under it would show its result too, and only one was paid for.
            raise RejectedError("AG-PRV-065", "the plan has run and ended")
        return True

    def _admit(self, act: Act) -> None:
        if self.is_done(act):
            raise RejectedError("AG-PRV-060", "an entry repeats another")
        if isinstance(act, DomainOpened):
            _cap(act)
        elif isinstance(act, Reserved):
            account = self.account(act.charge.domain)
            asked = act.rdp[ORDERS.index(account.limits.order)]
            # Written so that NaN refuses.
            if not account.spent + asked <= account.cap:
                raise RejectedError(
                    "AG-PRV-063",
                    f"domain {act.charge.domain}: {asked:.4g} nats asked at order "
                    f"{account.limits.order}, {account.left:.4g} of {account.cap:.4g} left",
                )
        elif isinstance(act, Committed):
            if self.reservation(act.plan_id) is None:
                raise RejectedError("AG-PRV-065", "the plan was never reserved")
        else:
            self.account(act.domain)

    def _apply(self, act: Act) -> None:
        if isinstance(act, DomainOpened):
            self.accounts[act.domain] = Account(act, _cap(act))
            return
        if isinstance(act, Reserved):
            self._domain_of[act.charge.plan_id] = act.charge.domain
            account = self.accounts[act.charge.domain]
            changed = _with(account, reserved=(*account.reserved, act))
        elif isinstance(act, Committed):
            account = self.accounts[self._domain_of[act.plan_id]]
            changed = _with(account, outcomes={**account.outcomes, act.plan_id: act})
        else:
            account = self.accounts[act.domain]
            changed = _with(account, nonprivate=(*account.nonprivate, act))
        self.accounts[account.limits.domain] = changed


def charge_for(plan: PrivacyPlan, kind: ChargeKind = ChargeKind.TRAINING) -> Charge:
    """The charge that pays for one run of a plan.

    Raises:
        RejectedError: AG-PRV-053 if the plan has no constants: nothing formal can be accounted.
    """
    if plan.constants is None:
        raise RejectedError("AG-PRV-053", f"mode {plan.mode} without constants is not accounted")
    constants = plan.constants
    event = DpEvent(constants.sampling_rate, constants.noise_multiplier, constants.steps)
    return Charge(plan.plan_id, plan.domain, kind, event.check(), plan.digest, plan.purpose)


def reserve_for(charge: Charge) -> Reserved:
    """A charge with its RDP, computed here: no caller states what its run costs.

    Raises:
        RejectedError: AG-PRV-050.
    """
    return Reserved(charge, rdp_of(charge.event, ORDERS))


def sign_entry(entry: Entry, key: SigningKey) -> bytes:
    """An entry as a line of the ledger, with its newline."""
    return dsse.sign(entry.to_payload(), ENTRY_TYPE, [key]).to_bytes() + b"\n"


def verify_line(line: bytes, keys: Sequence[VerifyKey]) -> bytes:
    """The payload of a line of the ledger, without its newline.

    Raises:
        RejectedError: AG-PRV-060.
    """
    if len(line) > LIMITS.ledger_entry_bytes:
        raise RejectedError("AG-PRV-060", "an entry is larger than its limit")
    try:
        return dsse.verify(line, ENTRY_TYPE, keys).payload
    except RejectedError as error:
        raise RejectedError("AG-PRV-060", f"an entry: {error.cause}") from error


def read_entry(payload: bytes) -> Entry:
    """Read an entry whose signature was verified.

    Raises:
        RejectedError: AG-PRV-060 if malformed.
    """
    try:
        fields = canonical.as_object(
            canonical.loads(payload, LIMITS.ledger_entry_bytes),
            {"version", "site", "number", "previous", "time", "act"},
        )
        if canonical.as_int(fields["version"]) != 1:
            raise RejectedError("AG-PRV-060", "an entry is of another version")
        return Entry(
            site=canonical.as_site(fields["site"]),
            number=canonical.as_int(fields["number"]),
            previous=canonical.as_sha256(fields["previous"]),
            time=canonical.parse_time(canonical.as_text(fields["time"])),
            act=_read_act(fields["act"]),
        )
    except RejectedError as error:
        raise RejectedError("AG-PRV-060", f"an entry: {error.cause}") from error


def check_costs(ledger: Ledger) -> None:
    """Recompute the RDP of every reservation; loads dp-accounting (2 s, once).

    Each different run takes 3 ms, once in a process.

    Raises:
        RejectedError: AG-PRV-060 if an entry states less than its event costs.
    """
    for account in ledger.accounts.values():
        for entry in account.reserved:
            costs = _cost(entry.charge.event)
            # Another version or machine may differ in the last digits.
            if any(
                stated < cost * (1 - 1e-6) for stated, cost in zip(entry.rdp, costs, strict=True)
            ):
                raise RejectedError("AG-PRV-060", "a reservation states less than its run costs")


@lru_cache(maxsize=4096)
def _cost(event: DpEvent) -> tuple[float, ...]:
    return rdp_of(event, ORDERS)


def _cap(limits: DomainOpened) -> float:
    if limits.order not in ORDERS:
        raise RejectedError("AG-PRV-061", f"the order is none of {', '.join(map(str, ORDERS))}")
    return rdp_cap(limits.epsilon_max, limits.delta_max, limits.order)


def _with(
    account: Account,
    *,
    reserved: tuple[Reserved, ...] | None = None,
    outcomes: Mapping[str, Committed] | None = None,
    nonprivate: tuple[NonprivateRelease, ...] | None = None,
) -> Account:
    return Account(
        account.limits,
        account.cap,
        account.reserved if reserved is None else reserved,
        account.outcomes if outcomes is None else outcomes,
        account.nonprivate if nonprivate is None else nonprivate,
    )


def _write_act(act: Act) -> dict[str, canonical.Json]:
    if isinstance(act, DomainOpened):
        return {
            "act": "open_domain",
            "domain": act.domain,
            "epsilon_max": act.epsilon_max,
            "delta_max": act.delta_max,
            "order": act.order,
            "declared_by": act.declared_by,
        }
    if isinstance(act, Reserved):
        return {
            "act": "reserve",
            "plan_id": act.charge.plan_id,
            "domain": act.charge.domain,
            "kind": str(act.charge.kind),
            "event": act.charge.event.to_json(),
            "plan_digest": act.charge.plan_digest,
            "purpose": act.charge.purpose,
            "rdp": {str(order): value for order, value in zip(ORDERS, act.rdp, strict=True)},
        }
    if isinstance(act, Committed):
        return {
            "act": "commit",
            "plan_id": act.plan_id,
            "outcome": str(act.outcome),
            "packets": list(act.packets),
            "reason": act.reason,
        }
    return {
        "act": "nonprivate_release",
        "domain": act.domain,
        "packet": act.packet,
        "declared_by": act.declared_by,
    }


def _read_act(value: canonical.Json) -> Act:
    name = canonical.as_text(canonical.as_mapping(value).get("act"))
    if name == "open_domain":
        fields = canonical.as_object(
            value, {"act", "domain", "epsilon_max", "delta_max", "order", "declared_by"}
        )
        return DomainOpened(
            domain=_text(fields["domain"], _DOMAIN),
            epsilon_max=canonical.as_number(fields["epsilon_max"]),
            delta_max=canonical.as_number(fields["delta_max"]),
            order=canonical.as_int(fields["order"]),
            declared_by=_text(fields["declared_by"], _ROLE),
        )
    if name == "reserve":
        return _read_reserved(value)
    if name == "commit":
        return _read_committed(value)
    if name == "nonprivate_release":
        fields = canonical.as_object(value, {"act", "domain", "packet", "declared_by"})
        return NonprivateRelease(
            domain=_text(fields["domain"], _DOMAIN),
            packet=canonical.as_sha256(fields["packet"]),
            declared_by=_text(fields["declared_by"], _ROLE),
        )
    raise RejectedError("AG-PRV-060", "an act is unknown")


def _read_reserved(value: canonical.Json) -> Reserved:
    fields = canonical.as_object(
        value, {"act", "plan_id", "domain", "kind", "event", "plan_digest", "purpose", "rdp"}
    )
    kind = canonical.as_text(fields["kind"])
    if kind not in tuple(ChargeKind):
        raise RejectedError("AG-PRV-060", "a charge is of an unknown kind")
    rdp = canonical.as_object(fields["rdp"], {str(order) for order in ORDERS})
    costs = tuple(canonical.as_number(rdp[str(order)]) for order in ORDERS)
    # A negative cost would give budget back.
    if any(cost < 0 for cost in costs):
        raise RejectedError("AG-PRV-060", "a reservation costs less than nothing")
    charge = Charge(
        plan_id=canonical.as_random_id(fields["plan_id"]),
        domain=_text(fields["domain"], _DOMAIN),
        kind=ChargeKind(kind),
        event=DpEvent.from_json(fields["event"]),
        plan_digest=canonical.as_sha256(fields["plan_digest"]),
        purpose=canonical.as_line(fields["purpose"]),
    )
    return Reserved(charge, costs)


def _read_committed(value: canonical.Json) -> Committed:
    fields = canonical.as_object(value, {"act", "plan_id", "outcome", "packets", "reason"})
    outcome = canonical.as_text(fields["outcome"])
    packets = canonical.as_list(fields["packets"])
    reason = canonical.as_text(fields["reason"])
    if outcome not in tuple(Outcome) or len(packets) > LIMITS.entry_packets:
        raise RejectedError("AG-PRV-060", "an outcome is unknown or names too many packets")
    if outcome == Outcome.ABORTED:
        _text(reason, _CODE)
    elif reason or not packets:
        raise RejectedError("AG-PRV-060", "a release names its packets and no reason")
    return Committed(
        plan_id=canonical.as_random_id(fields["plan_id"]),
        outcome=Outcome(outcome),
        packets=tuple(canonical.as_sha256(packet) for packet in packets),
        reason=reason,
    )


def _text(value: canonical.Json, pattern: re.Pattern[str]) -> str:
    text = canonical.as_text(value)
    if not pattern.fullmatch(text):
        raise RejectedError("AG-PRV-060", "a name, role or code has the wrong form")
    return text
