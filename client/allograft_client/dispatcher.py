# SPDX-License-Identifier: Apache-2.0
"""What leaves: approvals complete a packet, an offer announces it, a dispatch seals and sends it.

Invariant: a payload is sealed only through `check_release` and `seal_release`, for recipients that
the roster, the coordinator's route and the site's policy all allow at that moment. Every change
of state and the item that tells of it are one transaction.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from allograft.crypto import canonical, dsse
from allograft.crypto.keys import SealingPublicKey
from allograft.durable import durable_write, storage_errors
from allograft.errors import RejectedError, UnavailableError
from allograft.packet.container import Recipient, SealPlan, join_attestations, split_attestations
from allograft.privacy.dossier import (
    Approval,
    Dossier,
    approve,
    verify_approval,
    verify_dossier,
    warnings_in,
)
from allograft.privacy.egress import seal_release
from allograft.privacy.release import check_release
from allograft.privacy.scan import check_envelope, check_strings
from allograft.provenance.dispatch import sign_dispatch
from allograft.provenance.statement import PacketStatement
from allograft.provenance.verify import check_attestations
from allograft.routing.card import Architecture
from allograft.routing.offer import Base, Licence, Offer, sign_offer
from allograft.routing.receipt import verify_receipt
from allograft.routing.route import Route, verify_route
from allograft.routing.withdrawal import Withdrawal, sign_withdrawal
from allograft_client.donor import read_own_statement
from allograft_client.protected import record_release
from allograft_client.rows import ReceiptRow
from allograft_client.site import Site


def approve_packet(
    site: Site, packet_id: str, role: str, despite_warnings: bool = False
) -> tuple[str, ...]:
    """Sign one role's agreement to a packet's dossier; the last one needed offers the packet.

    Args:
        site: The donor.
        packet_id: The packet.
        role: The role that agrees.
        despite_warnings: A person was shown the warnings of the audits and agrees all the same.

    Returns:
        The warnings that were agreed to.

    Raises:
        RejectedError: AG-SIT-004 for another state, AG-PRV-033 if the role is not asked for,
            AG-PRV-034 naming the warnings that nobody has been shown; as
            `Site.logged` for text.
    """
    row = site.store.packet(packet_id)
    if row.state != "awaiting-approval":
        raise RejectedError("AG-SIT-004", f"packet {packet_id} is {row.state}")
    dossier = _dossier(site, packet_id)
    warnings = warnings_in(dossier.gates)
    if warnings and not despite_warnings:
        raise RejectedError("AG-PRV-034", "; ".join(warnings))
    approval = approve(dossier, role, canonical.format_time(site.now()))
    signed = dsse.sign(approval.to_statement(), dsse.IN_TOTO, [site.key]).to_bytes()
    check_envelope(signed, "approval", site.matchers)
    directory = site.packet_path(packet_id, "approvals")
    directory.mkdir(mode=0o700, exist_ok=True)
    path = directory / f"{role}.json"
    if not path.exists():
        durable_write(path, signed)
    offer_packet(site, packet_id)
    return warnings


def offer_packet(site: Site, packet_id: str) -> None:
    """Offer a packet if every approval that its dossier asks for is there."""
    dossier = _dossier(site, packet_id)
    given = {approval.role for approval in _approvals(site, packet_id)}
    missing = sorted(set(dossier.approvals_required) - given)
    row = site.store.packet(packet_id)
    if missing:
        reason = f"built and gated; waits for approval by {', '.join(missing)}"
        site.store.move_packet(packet_id, ["training", row.state], "awaiting-approval", reason)
        return
    statement = read_own_statement(site, packet_id)
    attestations = _attestations(site, packet_id)
    check_attestations(attestations, (site.key.public,))
    signed = sign_offer(
        _offer(site, statement, str(row.facts["statement_digest"]), dossier), site.key
    )
    files = site.logged("offer", "offer", signed, {"packet_id": packet_id})
    with site.outbox.draft() as draft:
        for name, content in files.items():
            durable_write(draft / name, content)
        item = site.outbox.place(draft, "offer")
    with site.store.transaction():
        site.store.move_packet(
            packet_id, ["training", "awaiting-approval"], "offered", "waits for a route"
        )
        site.store.add_packet_facts(packet_id, offer_digest=hashlib.sha256(signed).hexdigest())
        site.outbox.announce(item, packet_id)


def take_route(site: Site, envelope: bytes) -> None:
    """Record the coordinator's proposals for one of our offers.

    Raises:
        RejectedError: AG-RTE-* or AG-SIG-* for the document, AG-SIT-012 if it answers no offer.
    """
    route = verify_route(envelope, site.trust.roster(), site.now())
    row = site.store.packet(route.packet_id)
    if row.role != "donor" or row.facts.get("offer_digest") != route.offer_digest:
        raise RejectedError("AG-SIT-012", "a route that answers none of our offers")
    proposals = [
        {"site": p.site, "verdict": p.verdict, "reason": p.reason} for p in route.proposals
    ]
    with site.store.transaction():
        site.store.add_packet_facts(route.packet_id, proposals=proposals)
        if row.state == "offered":
            found = len(route.recipients)
            reason = f"{found} possible recipients; waits for a dispatch"
            site.store.move_packet(route.packet_id, ["offered"], "routed", reason)
        _dispatch_automatically(site, route)


def _dispatch_automatically(site: Site, route: Route) -> None:
    """Queue a dispatch if the policy says so, for sites that did not get the packet yet."""
    try:
        policy = site.policy()
    except RejectedError:
        return  # without a policy nothing leaves; the route is kept all the same
    if policy.donate.dispatch != "automatic":
        return
    sent = {name for entry in _dispatches(site, route.packet_id) for name in entry["sites"]}
    chosen = []
    for recipient in route.recipients:
        try:
            policy.check_recipients([recipient])
        except RejectedError:
            continue
        if recipient not in sent:
            chosen.append(recipient)
    if chosen:
        queue_dispatch(site, route.packet_id, chosen)


def queue_dispatch(site: Site, packet_id: str, recipients: Sequence[str]) -> int:
    """Queue a dispatch under an id of its own, so that a repeated job repeats nothing.

    Raises:
        UnavailableError: AG-SIT-017 if the packet waits for its route. Nothing is queued: a job
            that is put back would stand before the one that takes the route in.
    """
    if site.store.packet(packet_id).state == "offered":
        raise UnavailableError("AG-SIT-017", _unrouted(packet_id))
    arguments = {"sites": list(recipients), "dispatch_id": secrets.token_hex(16)}
    return site.store.add_job("light", "dispatch", packet_id, arguments)


def dispatch_packet(
    site: Site, packet_id: str, dispatch_id: str, recipients: Sequence[str]
) -> Mapping[str, canonical.Json]:
    """Seal a packet for recipients and let it leave.

    Raises:
        RejectedError: AG-SIT-004 state, AG-SIT-014 not proposed, AG-SIT-017 no route yet, AG-ROS-*
            not enrolled, AG-PRV-* policy, approvals or payload.
        UnavailableError: AG-STO-001 when the disk is full; nothing was announced.
    """
    row = site.store.packet(packet_id)
    if row.state == "offered":
        # It was queued before the packet was offered.
        raise RejectedError("AG-SIT-017", _unrouted(packet_id))
    if row.state not in {"routed", "dispatched"}:
        raise RejectedError("AG-SIT-004", f"packet {packet_id} is {row.state}")
    if any(entry["dispatch_id"] == dispatch_id for entry in _dispatches(site, packet_id)):
        return {"dispatch_id": dispatch_id, "sites": list(recipients)}
    now = site.now()
    _check_proposed(row.facts.get("proposals", []), recipients)
    statement = read_own_statement(site, packet_id)
    dossier = _dossier(site, packet_id)
    policy = site.policy()
    site.check_signed_policy(str(dossier.mode.mode), policy)
    release = check_release(dossier.mode, policy, dossier, _approvals(site, packet_id), recipients)
    plan = SealPlan(
        packet_id=packet_id,
        dispatch_id=dispatch_id,
        donor=site.name,
        kind=statement.kind,
        not_after=statement.not_after,
        statement_digest=str(row.facts["statement_digest"]),
        parts=statement.parts,
        recipients=tuple(
            Recipient(name, _sealing_key(site, name, now)) for name in release.recipients
        ),
    )
    payload, attestations = site.packet_path(packet_id, "payload"), _attestations(site, packet_id)
    record_release(site, packet_id, release.mode, policy.donate.approvals)
    with site.outbox.draft() as draft, storage_errors("the outbox"):
        header = seal_release(release, payload, attestations, plan, draft)
        header_bytes = (draft / "header.json").read_bytes()
        signed = sign_dispatch(header, header_bytes, plan.kind, now, site.key)
        about = {"packet_id": packet_id, "dispatch_id": dispatch_id}
        for name, content in site.logged("dispatch", "dispatch", signed, about).items():
            durable_write(draft / name, content)
        item = site.outbox.place(draft, "dispatch")
    entry: dict[str, canonical.Json] = {
        "dispatch_id": dispatch_id,
        "sites": list(release.recipients),
        "sealed_bytes": item.size_bytes,
        "time": canonical.format_time(now),
    }
    with site.store.transaction():
        reason = f"sealed for {', '.join(release.recipients)}"
        site.store.move_packet(packet_id, ["routed", "dispatched"], "dispatched", reason)
        site.store.add_packet_facts(packet_id, dispatches=[*_dispatches(site, packet_id), entry])
        site.outbox.announce(item, packet_id)
    return entry


def withdraw_packet(site: Site, packet_id: str) -> None:
    """Take a packet back: the coordinator stops delivering it and tells its holders.

    Raises:
        RejectedError: AG-SIT-004 if it was never offered.
    """
    row = site.store.packet(packet_id)
    withdrawal = Withdrawal(
        packet_id, str(row.facts.get("statement_digest", "")), site.name, site.now()
    )
    before = ["offered", "routed", "dispatched"]
    if row.state not in before:
        raise RejectedError("AG-SIT-004", f"packet {packet_id} is {row.state}")
    signed = sign_withdrawal(withdrawal, site.key)
    files = site.logged("withdrawal", "withdrawal", signed, {"packet_id": packet_id})
    with site.store.transaction():
        site.store.move_packet(packet_id, before, "withdrawn", "withdrawn by an operator")
        site.outbox.add("withdrawal", files, packet_id)


def take_receipt(site: Site, envelope: bytes) -> None:
    """Record what a recipient reported about one of our packets.

    Raises:
        RejectedError: AG-RTE-* or AG-SIG-* for the document, AG-SIT-012 for a stranger's packet.
    """
    receipt = verify_receipt(envelope, site.trust.roster(), site.now())
    audience = {
        name
        for entry in _dispatches(site, receipt.packet_id)
        if entry["dispatch_id"] == receipt.dispatch_id
        for name in entry["sites"]
    }
    if receipt.site not in audience:
        raise RejectedError("AG-SIT-012", "a receipt for something that was not dispatched there")
    site.store.add_receipt(
        ReceiptRow(
            receipt.packet_id,
            receipt.site,
            receipt.state,
            receipt.code,
            canonical.format_time(receipt.time),
        )
    )


def _unrouted(packet_id: str) -> str:
    return f"packet {packet_id} is offered and waits for a route"


def _check_proposed(proposals: Sequence[Mapping[str, str]], recipients: Sequence[str]) -> None:
    verdicts = {p["site"]: p for p in proposals}
    for recipient in recipients:
        proposal = verdicts.get(recipient)
        if proposal is None:
            raise RejectedError("AG-SIT-014", f"{recipient[:64]} is not in the route")
        if proposal["verdict"] == "refuse":
            raise RejectedError("AG-SIT-014", f"{recipient}: {proposal['reason']}")


def _offer(
    site: Site, statement: PacketStatement, statement_digest: str, dossier: Dossier
) -> Offer:
    base = statement.base
    offer = Offer(
        packet_id=statement.packet_id,
        statement_digest=statement_digest,
        donor=statement.donor,
        kind=statement.kind,
        mode=str(dossier.mode.mode),
        base=Base(
            base.weights_digest,
            Architecture(
                base.architecture.family,
                base.architecture.hidden,
                base.architecture.layers,
                base.architecture.vocab,
            ),
            base.tokenizer_digest,
        ),
        payload_bytes=statement.payload_bytes,
        domain=statement.domain,
        language=statement.language,
        licence=Licence(
            statement.licence.merge, statement.licence.distil, statement.licence.redonate
        ),
        not_after=statement.not_after,
    )
    check_strings(offer.to_json(), "offer", site.matchers)
    return offer


def _dossier(site: Site, packet_id: str) -> Dossier:
    envelope = site.packet_path(packet_id, "dossier.json").read_bytes()
    return verify_dossier(envelope, (site.key.public,))


def _approval_envelopes(site: Site, packet_id: str) -> list[bytes]:
    directory = site.packet_path(packet_id, "approvals")
    return [path.read_bytes() for path in sorted(directory.glob("*.json"))]


def _approvals(site: Site, packet_id: str) -> list[Approval]:
    keys = (site.key.public,)
    return [verify_approval(e, keys) for e in _approval_envelopes(site, packet_id)]


def _attestations(site: Site, packet_id: str) -> bytes:
    built = split_attestations(site.packet_path(packet_id, "attestations.jsonl").read_bytes())
    return join_attestations([*built, *_approval_envelopes(site, packet_id)])


def _dispatches(site: Site, packet_id: str) -> list[dict[str, Any]]:
    return list(site.store.packet(packet_id).facts.get("dispatches", []))


def _sealing_key(site: Site, name: str, now: datetime) -> SealingPublicKey:
    record = site.trust.roster().site(name, now)
    if "recipient" not in record.roles:
        raise RejectedError("AG-SIT-014", f"{name} is not enrolled as a recipient")
    return record.sealing_key
