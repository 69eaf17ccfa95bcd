# SPDX-License-Identifier: Apache-2.0
"""A donor of private data and one recipient: signed policy, open domain, list, plans, people."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from allograft.crypto import canonical
from allograft.errors import CODES, RejectedError
from allograft.privacy.dossier import verify_dossier
from allograft.privacy.dp import DpConstants
from allograft.privacy.ledger import DomainOpened
from allograft.privacy.modes import Mode
from allograft.privacy.plan import PrivacyPlan
from allograft.privacy.signed_policy import sign_policy
from allograft_client import dispatcher, donor
from allograft_client.budget import Budget
from allograft_client.plan_files import file_draft, sign_draft
from allograft_client.site import model_base
from kit.consortium import POLICY, Consortium

A, B = "hospital-a", "hospital-b"
CONSTANTS = DpConstants(0.01, 2.0, 300, 1.0, 10.0, 1e-6, 4)
STRICT = (
    POLICY.replace('modes = ["open"]', 'modes = ["open", "strict", "measured"]').replace(
        "approvals = []", 'approvals = ["officer", "steward"]'
    )
    + "\n[audit]\nmin_population = 20\nmin_population_dp = 20\n"
)
NAMED = STRICT.replace('recipients = ["*"]', 'recipients = ["hospital-b"]')
PEOPLE = 900  # about 270 are held out; audits want 200 on each side


def open_private(root) -> Consortium:
    """Hospital A may donate under every mode; hospital B receives."""
    two = Consortium(root, hospital_a=NAMED, hospital_b=STRICT)
    sign(two[A])
    retention = two[A].site.store.model("base").retention
    retention.write_text("\n\n".join(public_text(number) for number in range(40)), "utf-8")
    Budget(two[A].site).open_domain(DomainOpened("wards", 8.0, 1e-6, 4, "officer"))
    write_list(two[A], "Zoltan Bergmann\n")
    return two


def write_list(member, text: str):
    """Give a member a list of identifiers; returns its file."""
    path = member.home.path("identifiers.csv")
    path.write_text(text, "utf-8")
    path.chmod(0o600)
    name_list(member, path.name)
    return path


def name_list(member, name: str) -> None:
    """Write a path into a member's settings, as an operator does in site.toml."""
    member.identifiers = name
    settings = member.site.settings.model_copy(update={"identifiers": name})
    member.site = replace(member.site, settings=settings)


def public_text(number: int) -> str:
    words = [f"word{(number * 31 + place * 7) % 211}" for place in range(40)]
    return ". ".join(" ".join(words[start : start + 8]) for start in range(0, 40, 8)) + "."


def sign(member) -> None:
    content = member.home.policy_file.read_bytes()
    now = canonical.format_time(datetime.now(UTC).replace(microsecond=0))
    signed = sign_policy(content, "officer", now, member.keys["signing"], None)
    member.home.policy_signature.write_bytes(signed)


def write_records(member, ids, name="records.jsonl"):
    path = member.home.path(name)
    lines = [json.dumps({"person": who, "text": f"a note about {who}"}) for who in ids]
    path.write_text("\n".join(lines), "utf-8")
    return path


def people(count=PEOPLE, prefix="p"):
    return [f"{prefix}{number}" for number in range(count)]


def training_of(member, **changes):
    """What a plan says about the training of the default donation."""
    return replace(member.plan(), steps=CONSTANTS.steps, **changes).planned_json()


def planned(member, mode="strict", signed=True, **changes) -> PrivacyPlan:
    """A plan for the default donation of a member."""
    site = member.site
    constants = changes.get("constants", CONSTANTS) if mode == "strict" else None
    fields = {
        "plan_id": hashlib.sha256(str(changes).encode() + mode.encode()).hexdigest()[:32],
        "donor": site.name,
        "mode": Mode(mode),
        "domain": "wards",
        "kind": "organ",
        "base_digest": model_base(site.store.model("base")).weights_digest,
        "constants": constants,
        "training": training_of(member),
        "purpose": "evaluation",
        "created": "2026-11-27T08:00:00Z",
    }
    plan = PrivacyPlan(**(fields | changes))
    file_draft(site, plan)
    if signed:
        sign_draft(site, plan.plan_id)
    return plan


def donation_of(member, plan, ids=None, **changes):
    data = write_records(member, people() if ids is None else ids)
    asked = replace(member.plan(), nature="", declared_by="", data=data).under(plan)
    return replace(asked, **changes)


def donate(two, plan, ids=None, **changes) -> str:
    packet_id, _ = donor.plan_donation(two[A].site, donation_of(two[A], plan, ids, **changes))
    two.step()
    return packet_id


def state(two, name, packet_id):
    row = two[name].site.store.packet(packet_id)
    return row.state, row.code


def account(two):
    return Budget(two[A].site).ledger().account("wards")


def dossier_of(two, packet_id):
    envelope = two[A].site.packet_path(packet_id, "dossier.json").read_bytes()
    return verify_dossier(envelope, [two[A].keys["signing"].public])


def refusal(call, *arguments) -> str:
    with pytest.raises(RejectedError) as refused:
        call(*arguments)
    assert refused.value.code in CODES
    return refused.value.code


def send(two, packet_id) -> None:
    for role in ("officer", "steward"):
        dispatcher.approve_packet(two[A].site, packet_id, role)
        two.step()
    dispatcher.queue_dispatch(two[A].site, packet_id, [B])
    two.step()
