# SPDX-License-Identifier: Apache-2.0
"""Privacy plans in the state directory: `plans/ID.draft.json`, and `plans/ID.json` once signed.

A draft is the bare statement, for people to read and discuss; only the signed file counts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from allograft.crypto.keys import VerifyKey
from allograft.durable import durable_write
from allograft.errors import RejectedError
from allograft.limits import LIMITS
from allograft.plainfile import read_plain
from allograft.privacy.plan import PrivacyPlan, read_plan, sign_plan, verify_plan
from allograft.privacy.scan import check_envelope
from allograft_client.plan import DonationPlan
from allograft_client.site import Site

_DRAFT = ".draft.json"
_SIGNED = ".json"
_PREFIX = re.compile(r"[0-9a-f]{4,32}")


@dataclass(frozen=True, slots=True)
class FiledPlan:
    """A plan and where it stands."""

    plan: PrivacyPlan
    path: Path
    is_signed: bool


def file_draft(site: Site, plan: PrivacyPlan) -> FiledPlan:
    """Write a draft.

    Raises:
        RejectedError: AG-PRV-050 to -053 if it could not be signed; as `DonationPlan.planned_by`
            if no donation could be made under it.
        UnavailableError: AG-STO-001 if the disk is full.
    """
    plan.check()
    DonationPlan.planned_by(plan)
    path = _directory(site) / f"{plan.plan_id}{_DRAFT}"
    durable_write(path, plan.to_statement() + b"\n")
    return FiledPlan(plan, path, False)


def find_plan(site: Site, prefix: str) -> FiledPlan:
    """A plan by its id or the beginning of it; the signed one if there are both.

    Raises:
        RejectedError: AG-PRV-056 if there is none or the beginning fits several, AG-PRV-050 to
            -053 or AG-SIG-* if its file was changed.
    """
    if not _PREFIX.fullmatch(prefix):
        raise RejectedError("AG-PRV-056", "a plan id is 4 to 32 hex digits")
    paths = sorted(_directory(site).glob(f"{prefix}*{_SIGNED}"))
    ids = {path.name.split(".")[0] for path in paths}
    if len(ids) != 1:
        raise RejectedError("AG-PRV-056", f"{len(ids)} plans begin with {prefix}")
    (plan_id,) = ids
    found = read_signed(site, plan_id)
    if found is not None:
        return FiledPlan(found, _directory(site) / f"{plan_id}{_SIGNED}", True)
    draft = _directory(site) / f"{plan_id}{_DRAFT}"
    plan = read_plan(read_plain(draft, LIMITS.privacy_plan_bytes))
    return _named(FiledPlan(plan, draft, False), plan_id)


def read_signed(
    site: Site, plan_id: str, former_keys: Sequence[VerifyKey] = ()
) -> PrivacyPlan | None:
    """The signed plan of exactly this id; None if there is none here.

    Args:
        site: Whose.
        plan_id: Its id.
        former_keys: Keys the site had before. Only for looking back: a packet needs a plan that its
            recipients can verify with the roster of today.

    Raises:
        RejectedError: AG-PRV-050 to -053 or AG-SIG-* if its file was changed.
    """
    path = _directory(site) / f"{plan_id}{_SIGNED}"
    if not path.exists():
        return None
    content = read_plain(path, 2 * LIMITS.privacy_plan_bytes)
    plan = verify_plan(content, [site.key.public, *former_keys], site.name)
    return _named(FiledPlan(plan, path, True), plan_id).plan


def sign_draft(site: Site, prefix: str) -> FiledPlan:
    """Sign a draft; one that is signed already is returned as it is.

    Raises:
        RejectedError: As `find_plan` and `file_draft`, for a draft that was edited; AG-PRV-052 for
            another site's draft, AG-PRV-014 if it costs more than the policy allows, AG-PRV-021 if
            its text looks like an identifier; as `Site.matchers` for the identifier list.
        UnavailableError: AG-STO-001 if the disk is full, AG-STO-005 as `Site.matchers`.
    """
    found = find_plan(site, prefix)
    if found.is_signed:
        return found
    if found.plan.donor != site.name:
        raise RejectedError("AG-PRV-052", "the plan is another site's")
    DonationPlan.planned_by(found.plan)
    check_cost(site, found.plan)
    path = _directory(site) / f"{found.plan.plan_id}{_SIGNED}"
    signed = sign_plan(found.plan, site.key)
    # It travels with the packet. Later would be too late: the plan's run is paid for by then.
    check_envelope(signed, "the privacy plan", site.matchers)
    durable_write(path, signed)
    return FiledPlan(found.plan, path, True)


def check_cost(site: Site, plan: PrivacyPlan) -> None:
    """Refuse a plan that costs more than the policy allows one donation, if there is a policy.

    Raises:
        RejectedError: AG-PRV-014, AG-PRV-002 for a policy that cannot be read.
    """
    epsilon = plan.epsilon()
    if plan.constants is None or epsilon is None or not site.home.policy_file.exists():
        return
    site.policy().check_cost(epsilon, plan.constants.delta)


def _named(found: FiledPlan, plan_id: str) -> FiledPlan:
    if found.plan.plan_id != plan_id:
        raise RejectedError("AG-PRV-052", "a plan's file is named after another plan")
    return found


def _directory(site: Site) -> Path:
    path = site.home.path("plans")
    path.mkdir(mode=0o700, exist_ok=True)
    return path
