# SPDX-License-Identifier: Apache-2.0
"""What becomes of a packet that arrives, in the one order that is safe.

Everything of `admission`, and a dispatch not seen before, *before the payload is opened* → payload
to a private directory → tensors → nothing opened stays. Then trial, gate, keep or revert.
Invariant: whatever fails, the packet ends in a named state with a code, and a signed receipt says
so.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from typing import Any, Literal

from allograft.crypto import canonical
from allograft.durable import storage_errors, sync_directory
from allograft.errors import AllograftError, RejectedError
from allograft.provenance.statement import PacketStatement, write_licence
from allograft.recipes.base import Verdict
from allograft_client.admission import (
    Sealed,
    check_policy,
    close_opened,
    judge_base,
    open_sealed,
    read_sealed,
    verify_sealed,
)
from allograft_client.receipts import turn_away
from allograft_client.rows import ItemRow, ModelRow, PacketRow
from allograft_client.runner import Progress
from allograft_client.screens import is_screened_out
from allograft_client.site import Site
from allograft_client.store import now_text

#: Codes that mean "not for us", as opposed to "not what it claims to be".
_REFUSALS = ("AG-RCP-", "AG-PRV-", "AG-PRO-010", "AG-EVA-", "AG-SIT-003")

_ARRIVED = ("received", "quarantined", "refused")

_RANKS = {"exact": 0, "lineage": 1, "behavioural": 2, "refuse": 3}


@dataclass(frozen=True, slots=True)
class _Arrival:
    """What a packet claims to be before anything is verified; enough to answer it."""

    item: ItemRow
    sealed: Sealed

    @property
    def packet_id(self) -> str:
        return self.sealed.header.packet_id


@dataclass(frozen=True, slots=True)
class Choice:
    """The model a packet is for, and how related it is to the packet's base.

    Attributes:
        equals: Other models that it would fit as well.
    """

    model: ModelRow
    verdict: Verdict
    equals: tuple[str, ...] = ()

    @property
    def remoteness(self) -> tuple[int, float]:
        """Less is closer: the base itself, then relatives by their likeness to it.

        What speaks beside a model has least to say beside the one that it came from.
        """
        numbers = self.verdict.numbers
        likeness = numbers.get("lineage_cosine", 0.0) - numbers.get("own_base", 0.0)
        return _RANKS[self.verdict.level], -likeness


def take_packet(site: Site, item: ItemRow, tell: Progress) -> None:
    """Verify a packet that lies whole in the inbox, and queue its trial if the policy says so.

    Raises:
        RejectedError: AG-PKT-* if it cannot even be named; it is dropped without a receipt.
        UnavailableError: The disk is full; the job goes on later.
    """
    arrival = _read_arrival(site, item)
    if not _register(site, arrival):
        return
    try:
        tell({"stage": "verifying signatures, proof and digests"})
        manifest = verify_sealed(site, arrival.sealed, site.store.is_dispatch_seen)
        policy = site.policy()
        check_policy(policy, manifest)
        choice = _choose_model(site, manifest.statement)
        open_sealed(site, arrival.sealed, manifest.statement)
    except RejectedError as error:
        _turn_away(site, arrival, error)
        return
    finally:
        # A trial opens it again; until then no plain payload lies around.
        close_opened(site, arrival.packet_id)
    _settle_verified(site, arrival, manifest.statement, choice, policy.receive.automatic_trial)


def drop_item(site: Site, item: ItemRow, error: AllograftError) -> None:
    """What could not be taken in, for whatever reason: nothing of it stays without a word.

    A packet that was still being looked at is quarantined with a receipt; the files go.
    """
    packet_id = item.packet_id
    if packet_id and site.store.packet(packet_id).state == "received":
        try:
            _turn_away(site, _read_arrival(site, item), error)
        except RejectedError:
            # Its files are gone, so there is no dispatch to answer.
            reason = error.cause
            site.store.move_packet(packet_id, ["received"], "quarantined", reason, error.code)
    site.inbox.remove(item)


def _read_arrival(site: Site, item: ItemRow) -> _Arrival:
    directory = site.inbox.path(item)
    if item.packet_id and not directory.exists():
        # Killed between moving the files and recording it.
        directory = site.packet_path(item.packet_id, "sealed")
    return _Arrival(item, read_sealed(directory))


def _register(site: Site, arrival: _Arrival) -> bool:
    """Give the packet its first state; False if this copy is a mere extra of a known packet."""
    packet_id = arrival.packet_id
    item_id = arrival.item.item_id
    site.store.set_item_packet(item_id, packet_id)
    if not site.store.has_packet(packet_id):
        site.store.add_packet(
            PacketRow(
                packet_id=packet_id,
                role="recipient",
                donor=arrival.sealed.header.donor,
                kind="",
                model="",
                dispatch_id=arrival.sealed.header.dispatch_id,
                state="received",
                code="",
                reason="arrived; nothing is verified yet",
                facts={"sealed_bytes": arrival.item.item.size_bytes},
                time=now_text(),
            )
        )
        return True
    row = site.store.packet(packet_id)
    if row.facts.get("item_id") == item_id:
        site.inbox.remove(arrival.item)  # this very copy was settled before a restart
        return False
    # One that a screen quarantined is past arrival: a copy must not undo the alarm.
    if row.role == "recipient" and row.state in _ARRIVED and not is_screened_out(row):
        site.store.move_packet(packet_id, _ARRIVED, "received", "arrived; being verified")
        return True
    _set_aside(site, arrival)
    return False


def _set_aside(site: Site, arrival: _Arrival) -> None:
    """Check a further copy of a packet that is past arrival, for the record; it changes nothing.

    No receipt: it would bear the ids of the true copy and contradict what became of that one.
    """
    try:
        verify_sealed(site, arrival.sealed)
        error = RejectedError("AG-SIT-010", "a second copy of a packet that is already here")
    except RejectedError as found:
        error = found
    site.store.add_extra(arrival.item.item_id, arrival.packet_id, error.code, error.cause)
    site.inbox.remove(arrival.item)


def _choose_model(site: Site, statement: PacketStatement) -> Choice:
    """Judge the statement against our models; the closest wins, of equals the first by name.

    Raises:
        RejectedError: AG-RCP-* or AG-SIT-003 if no model fits.
    """
    choices = [Choice(model, judge_base(site, statement, model)) for model in site.store.models()]
    if not choices:
        raise RejectedError("AG-SIT-003", "this site has no model to try it on")
    best = min(choices, key=lambda choice: choice.remoteness)
    if best.verdict.level == "refuse":
        raise RejectedError(best.verdict.code, best.verdict.reason)
    equals = tuple(
        choice.model.name
        for choice in choices
        if choice is not best and choice.remoteness == best.remoteness
    )
    return replace(best, equals=equals)


def _settle_verified(
    site: Site, arrival: _Arrival, statement: PacketStatement, choice: Choice, automatic: bool
) -> None:
    """Keep the sealed packet, remember the dispatch, move on."""
    packet_id = statement.packet_id
    _store_sealed(site, arrival, packet_id)
    facts: dict[str, Any] = {
        "domain": statement.domain,
        "language": statement.language,
        "payload_bytes": statement.payload_bytes,
        "verdict": choice.verdict.level,
        "verdict_reason": choice.verdict.reason,
        "numbers": dict(choice.verdict.numbers),
        "statement_facts": dict(statement.facts),
        "donor_dose": statement.dose.default,
        "merge": statement.licence.merge,
        "licence": write_licence(statement.licence),
        "statement_sha256": arrival.sealed.header.statement_digest,
        "parents": [parent.packet_id for parent in statement.parents],
        "purpose": statement.purpose,
        "not_after": canonical.format_time(statement.not_after),
        "retention_until": canonical.format_time(statement.retention_until),
        "dispatch_sha256": arrival.sealed.dispatch_sha256,
        "item_id": arrival.item.item_id,
    }
    waits = "the trial is queued" if automatic else "waits for a trial"
    equals = f"{', '.join(choice.equals)} would do as well; " if choice.equals else ""
    reason = f"verified; {choice.verdict.reason}; {equals}{waits}"
    with site.store.transaction():
        site.store.claim_dispatch(arrival.sealed.header.dispatch_id, packet_id)
        site.store.move_packet(packet_id, ["received"], "verified", reason)
        site.store.describe_packet(
            packet_id, statement.kind, choice.model.name, arrival.sealed.header.dispatch_id
        )
        site.store.add_packet_facts(packet_id, **facts)
        if automatic:
            site.store.add_job("heavy", "trial", packet_id)


def _store_sealed(site: Site, arrival: _Arrival, packet_id: str) -> None:
    target = site.packet_path(packet_id, "sealed")
    if arrival.sealed.directory == target:
        return
    with storage_errors("packets"):
        shutil.rmtree(target, ignore_errors=True)
        shutil.move(arrival.sealed.directory, target)
        sync_directory(target.parent)


def _turn_away(site: Site, arrival: _Arrival, error: AllograftError) -> None:
    """Refuse or quarantine, with a receipt; no file stays."""
    packet_id = arrival.packet_id
    refused = error.code.startswith(_REFUSALS)
    state: Literal["refused", "quarantined"] = "refused" if refused else "quarantined"
    with site.store.transaction():
        site.store.move_packet(packet_id, ["received"], state, error.cause, error.code)
        site.store.add_packet_facts(
            packet_id,
            verdict="refuse" if refused else "unverified",
            item_id=arrival.item.item_id,
        )
        header, digest = arrival.sealed.header, arrival.sealed.dispatch_sha256
        turn_away(site, header, digest, state, error.code)
    site.inbox.remove(arrival.item)
