# SPDX-License-Identifier: Apache-2.0
"""What becomes of a packet that arrives, in the one order that is safe.

Roster fresh → dispatch (signature, audience, time, not seen) → log proof with witnesses → sealed
digests → manifest → attestations → policy and lineage, *before the payload is opened* → payload to
a private directory → tensors. Then trial, gate, keep or revert. Invariant: whatever fails, the
packet ends in a named state with a code, and a signed receipt says so.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from allograft.crypto import canonical
from allograft.durable import storage_errors, sync_directory
from allograft.errors import RejectedError
from allograft.limits import LIMITS
from allograft.packet import container
from allograft.packet.container import Opener
from allograft.packet.header import Header
from allograft.privacy.dossier import read_dossier
from allograft.privacy.policy import Reception
from allograft.provenance.lineage import compare_bases
from allograft.provenance.statement import PacketStatement
from allograft.provenance.verify import (
    VerifiedDispatch,
    VerifiedManifest,
    check_logged,
    verify_dispatch,
    verify_manifest,
)
from allograft.recipes.base import Declaration, Facts, ModelCard, ModelShape, Verdict, check_base
from allograft.recipes.facts import LoraFacts, OrganFacts
from allograft_client.receipts import turn_away
from allograft_client.rows import ItemRow, ModelRow, PacketRow
from allograft_client.runner import Progress
from allograft_client.site import Site, model_base
from allograft_client.store import now_text

#: Facts of each kind, to judge a statement without loading a tensor library.
_FACTS: Mapping[str, Callable[[canonical.Json], Facts]] = {
    "organ": OrganFacts.from_json,
    "lora": LoraFacts.from_json,
}

#: Codes that mean "not for us", as opposed to "not what it claims to be".
_REFUSALS = ("AG-RCP-", "AG-PRV-", "AG-PRO-010", "AG-EVA-", "AG-SIT-")

_ARRIVED = ("received", "quarantined", "refused")


@dataclass(frozen=True, slots=True)
class _Arrival:
    """What a packet claims to be before anything is verified; enough to answer it."""

    item: ItemRow
    directory: Path
    header: Header
    header_bytes: bytes
    dispatch: bytes

    @property
    def dispatch_sha256(self) -> str:
        return hashlib.sha256(self.dispatch).hexdigest()


@dataclass(frozen=True, slots=True)
class Choice:
    """The model a packet is for, and how related it is to the packet's base."""

    model: ModelRow
    verdict: Verdict


def take_packet(site: Site, item: ItemRow, tell: Progress) -> None:
    """Verify a packet that lies whole in the inbox, and queue its trial if the policy says so.

    Raises:
        RejectedError: AG-PKT-* if it cannot even be named; it is dropped without a receipt.
        UnavailableError: The disk is full; the job goes on later.
    """
    directory = site.inbox.path(item)
    if item.packet_id and not directory.exists():
        # Killed between moving the files and recording it.
        directory = site.packet_path(item.packet_id, "sealed")
    header, header_bytes = container.read_sealed_header(directory)
    dispatch = container.read_document(directory / "dispatch.json", LIMITS.json_document_bytes)
    arrival = _Arrival(item, directory, header, header_bytes, dispatch)
    if not _register(site, arrival):
        return
    try:
        tell({"stage": "verifying signatures, proof and digests"})
        manifest = _verify(site, arrival, site.store.is_dispatch_seen)
        choice = _choose_model(site, manifest)
        _open(site, arrival, manifest.statement)
    except RejectedError as error:
        _turn_away(site, arrival, error)
        return
    _settle_verified(site, arrival, manifest.statement, choice)


def _register(site: Site, arrival: _Arrival) -> bool:
    """Give the packet its first state; False if this copy is a mere extra of a known packet."""
    packet_id = arrival.header.packet_id
    item_id = arrival.item.item_id
    site.store.set_item_packet(item_id, packet_id)
    if not site.store.has_packet(packet_id):
        site.store.add_packet(
            PacketRow(
                packet_id=packet_id,
                role="recipient",
                donor=arrival.header.donor,
                kind="",
                model="",
                dispatch_id=arrival.header.dispatch_id,
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
    if row.role == "recipient" and row.state in _ARRIVED:
        site.store.move_packet(packet_id, _ARRIVED, "received", "arrived; being verified")
        return True
    _set_aside(site, arrival)
    return False


def _set_aside(site: Site, arrival: _Arrival) -> None:
    """Check a further copy of a packet that is past arrival, for the record; it changes nothing.

    No receipt: it would bear the ids of the true copy and contradict what became of that one.
    """
    packet_id = arrival.header.packet_id
    try:
        _verify(site, arrival, is_seen=lambda _: False)
        error = RejectedError("AG-SIT-010", "a second copy of a packet that is already here")
    except RejectedError as found:
        error = found
    site.store.add_extra(arrival.item.item_id, packet_id, error.code, error.cause)
    site.inbox.remove(arrival.item)


def _verify(site: Site, arrival: _Arrival, is_seen: Callable[[str], bool]) -> VerifiedManifest:
    """Everything up to the attestations; the payload stays sealed."""
    now = site.now()
    roster = site.trust.roster()
    verified = verify_dispatch(
        arrival.dispatch,
        arrival.header_bytes,
        roster,
        site.name,
        now,
        is_seen,
    )
    donor = roster.site(verified.dispatch.donor, now)
    if "donor" not in donor.roles:
        raise RejectedError("AG-ROS-002", f"{donor.site_id} is not enrolled as a donor")
    _check_log(site, arrival, verified)
    container.check_sealed_files(arrival.directory, verified.header)
    opener = Opener(site.name, site.sealing_key())
    attestations = container.open_manifest(arrival.directory, verified.header, opener)
    return verify_manifest(attestations, verified, roster, now)


def _check_log(site: Site, arrival: _Arrival, verified: VerifiedDispatch) -> None:
    entry = container.read_document(arrival.directory / "dispatch.event.json", LIMITS.entry_bytes)
    proof = container.read_document(arrival.directory / "dispatch.proof", LIMITS.proof_bytes)
    check_logged(verified, site.trust.verify_logged(entry, proof, site.now()))


def _choose_model(site: Site, manifest: VerifiedManifest) -> Choice:
    """Judge the statement against the policy and our models; the best related model wins.

    Raises:
        RejectedError: AG-PRV-* if the policy or the dossier says no, AG-RCP-* or AG-SIT-003 if no
            model fits.
    """
    statement = manifest.statement
    dossier = read_dossier(manifest.dossier)
    permissions = {
        name for name in ("merge", "distil", "redonate") if getattr(statement.licence, name)
    }
    site.policy().check_reception(
        Reception(
            donor=statement.donor,
            kind=statement.kind,
            mode=str(dossier.mode.mode),
            permissions=frozenset(permissions),
        )
    )
    choices = [Choice(model, check(statement, model)) for model in site.store.models()]
    if not choices:
        raise RejectedError("AG-SIT-003", "this site has no model to try it on")
    ranks = {"exact": 0, "lineage": 1, "refuse": 2}
    best = min(choices, key=lambda choice: ranks[choice.verdict.level])
    if best.verdict.level == "refuse":
        raise RejectedError(best.verdict.code, best.verdict.reason)
    return best


def check(statement: PacketStatement, model: ModelRow) -> Verdict:
    """Whether a packet may be opened for a model, by the statement alone."""
    base = model_base(model)
    lineage = compare_bases(base, statement.base)
    declaration = Declaration(
        kind=statement.kind,
        base_weights_digest=statement.base.weights_digest,
        tokenizer_digest=statement.base.tokenizer_digest,
        facts=statement.facts,
    )
    card = ModelCard(
        weights_digest=base.weights_digest,
        tokenizer_digest=base.tokenizer_digest,
        shape=ModelShape.from_json(model.facts["shape"]),
        lineage_cosine=lineage.cosine,
    )
    facts = _FACTS[statement.kind](dict(statement.facts))
    return check_base(declaration, facts, card)


def _open(site: Site, arrival: _Arrival, statement: PacketStatement) -> None:
    """Open the payload into the packet's private directory and check it strictly."""
    target = site.packet_path(statement.packet_id, "opened")
    target.parent.mkdir(mode=0o700, exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    container.open_payload(
        arrival.directory,
        arrival.header,
        statement.kind,
        statement.parts,
        Opener(site.name, site.sealing_key()),
        target,
    )


def _settle_verified(
    site: Site, arrival: _Arrival, statement: PacketStatement, choice: Choice
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
        "not_after": canonical.format_time(statement.not_after),
        "retention_until": canonical.format_time(statement.retention_until),
        "dispatch_sha256": arrival.dispatch_sha256,
        "item_id": arrival.item.item_id,
    }
    policy = site.policy()
    automatic = policy.receive.automatic_trial
    reason = f"verified; {choice.verdict.reason}; " + (
        "the trial is queued" if automatic else "waits for a trial"
    )
    with site.store.transaction():
        site.store.claim_dispatch(arrival.header.dispatch_id, packet_id)
        site.store.move_packet(packet_id, ["received"], "verified", reason)
        site.store.describe_packet(
            packet_id, statement.kind, choice.model.name, arrival.header.dispatch_id
        )
        site.store.add_packet_facts(packet_id, **facts)
        if automatic:
            site.store.add_job("heavy", "trial", packet_id)
    if not automatic:
        # A trial opens it again; until somebody asks for one, no plain payload lies around.
        shutil.rmtree(site.packet_path(packet_id, "opened"), ignore_errors=True)


def _store_sealed(site: Site, arrival: _Arrival, packet_id: str) -> None:
    target = site.packet_path(packet_id, "sealed")
    if arrival.directory == target:
        return
    with storage_errors("packets"):
        shutil.rmtree(target, ignore_errors=True)
        shutil.move(arrival.directory, target)
        sync_directory(target.parent)


def _turn_away(site: Site, arrival: _Arrival, error: RejectedError) -> None:
    """Refuse or quarantine, with a receipt; nothing opened stays."""
    packet_id = arrival.header.packet_id
    refused = error.code.startswith(_REFUSALS)
    state: Literal["refused", "quarantined"] = "refused" if refused else "quarantined"
    shutil.rmtree(site.packet_path(packet_id, "opened"), ignore_errors=True)
    with site.store.transaction():
        site.store.move_packet(packet_id, ["received"], state, error.cause, error.code)
        site.store.add_packet_facts(
            packet_id,
            verdict="refuse" if refused else "unverified",
            item_id=arrival.item.item_id,
        )
        turn_away(site, arrival.header, arrival.dispatch_sha256, state, error.code)
    site.inbox.remove(arrival.item)
