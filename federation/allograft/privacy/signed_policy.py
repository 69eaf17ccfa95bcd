# SPDX-License-Identifier: Apache-2.0
"""A policy that somebody signed, and what became weaker since.

The signature is an in-toto statement in DSSE over the file's own bytes, with the role that decided
and the time, by the site's signing key. It carries the text it is about, so the last signed policy
is never lost. It shows that the file is the one that was read and signed; it does not show who held
the key, and someone who can use the site's key can sign anything. See protos/spec/privacy.md.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from allograft.crypto import canonical, dsse
from allograft.crypto.keys import SigningKey, VerifyKey
from allograft.errors import RejectedError
from allograft.privacy.policy import ANY_SITE, AUDITED_MODES, Policy, parse_policy
from allograft.privacy.scan import check_strings

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
SIGNATURE_TYPE = "urn:allograft:policy-signature:v1"
POLICY_NAME = "policy.toml"

_ROLE = re.compile(r"[a-z][a-z0-9-]{0,62}")


@dataclass(frozen=True, slots=True)
class SignedPolicy:
    """A policy as it was signed; made by `verify_policy`.

    Attributes:
        policy: What was signed, read.
        role: Who decided (never a person's name).
        time: When (UTC, whole seconds).
        weaker: What was weaker than in the policy that was signed before.
    """

    policy: Policy
    role: str
    time: str
    weaker: tuple[str, ...]


def sign_policy(
    content: bytes, role: str, time: str, key: SigningKey, before: SignedPolicy | None
) -> bytes:
    """Sign the bytes of a policy file; the envelope as canonical JSON.

    Args:
        content: The file.
        role: The role that read it and decides so.
        time: Now (UTC, whole seconds).
        key: The site's signing key.
        before: The policy that was signed last.

    Raises:
        RejectedError: AG-PRV-002 if the bytes are no policy, AG-PRV-008 if the role is none,
            AG-PRV-021 if it looks like a person's.
    """
    policy = parse_policy(content)
    if not _ROLE.fullmatch(role):
        raise RejectedError("AG-PRV-008", "the signing role is missing or not a role name")
    check_strings(role, "the signing role")
    weaker = weaker_fields(before.policy, policy) if before else ()
    payload = canonical.dumps(
        {
            "_type": STATEMENT_TYPE,
            "subject": [{"name": POLICY_NAME, "digest": {"sha256": policy.digest}}],
            "predicateType": SIGNATURE_TYPE,
            "predicate": {
                "policy": content.decode("utf-8"),
                "role": role,
                "time": time,
                "weaker": list(weaker),
            },
        }
    )
    return dsse.sign(payload, dsse.IN_TOTO, [key]).to_bytes()


def verify_policy(envelope: bytes, keys: Sequence[VerifyKey]) -> SignedPolicy:
    """Verify a policy's signature and return what was signed.

    Raises:
        RejectedError: AG-PRV-008.
    """
    try:
        payload = dsse.verify(envelope, dsse.IN_TOTO, keys).payload
        document = canonical.as_object(
            canonical.loads(payload), {"_type", "subject", "predicateType", "predicate"}
        )
        if (document["_type"], document["predicateType"]) != (STATEMENT_TYPE, SIGNATURE_TYPE):
            raise RejectedError("AG-PRV-008", "not a policy's signature")
        fields = canonical.as_object(document["predicate"], {"policy", "role", "time", "weaker"})
        content = canonical.as_text(fields["policy"]).encode("utf-8")
        digest = hashlib.sha256(content).hexdigest()
        if document["subject"] != [{"name": POLICY_NAME, "digest": {"sha256": digest}}]:
            raise RejectedError("AG-PRV-008", "the signed digest is not that of the signed policy")
        role = canonical.as_text(fields["role"])
        if not _ROLE.fullmatch(role):
            raise RejectedError("AG-PRV-008", "the signing role is not a role name")
        return SignedPolicy(
            policy=parse_policy(content),
            role=role,
            time=canonical.format_time(canonical.parse_time(canonical.as_text(fields["time"]))),
            weaker=tuple(canonical.as_line(line) for line in canonical.as_list(fields["weaker"])),
        )
    except RejectedError as error:
        raise RejectedError("AG-PRV-008", error.cause) from error


def check_signed(
    mode: str, policy: Policy, envelope: bytes | None, keys: Sequence[VerifyKey]
) -> None:
    """Refuse a mode whose policy is not the one that was signed.

    Args:
        mode: The privacy mode; `open` needs no signature.
        policy: The policy as it stands in its file now.
        envelope: Its signature file; None if there is none.
        keys: The site's own keys.

    Raises:
        RejectedError: AG-PRV-006 no signature, AG-PRV-007 other bytes, AG-PRV-008 no valid one.
    """
    if mode not in AUDITED_MODES:
        return
    check_unchanged(policy, None if envelope is None else verify_policy(envelope, keys))


def check_unchanged(policy: Policy, signed: SignedPolicy | None) -> None:
    """Refuse a policy that is not the one that was signed, naming what became weaker.

    Args:
        policy: As it stands in its file now.
        signed: As it was signed last; None if it never was.

    Raises:
        RejectedError: AG-PRV-006 or -007.
    """
    if signed is None:
        raise RejectedError("AG-PRV-006", "there is no policy.toml.sig")
    if signed.policy.digest != policy.digest:
        weaker = ", ".join(weaker_fields(signed.policy, policy)) or "no field"
        raise RejectedError("AG-PRV-007", f"weaker than what was signed: {weaker}")


def weaker_fields(old: Policy, new: Policy) -> tuple[str, ...]:
    """The fields, such as `donate.recipients`, in which a policy protects less than another.

    Every field has one direction in which it protects less. A field without one, which a later
    version may add, counts as weaker whenever it changed.
    """
    weaker = []
    for section in ("donate", "receive", "receipt", "audit"):
        before, after = _values(getattr(old, section)), _values(getattr(new, section))
        for name, value in after.items():
            field = f"{section}.{name}"
            if value != before[name] and _WEAKER.get(field, _changed)(before[name], value):
                weaker.append(field)
    return tuple(weaker)


def _values(section: BaseModel) -> dict[str, Any]:
    return {name: getattr(section, name) for name in type(section).model_fields}


def _changed(_old: object, _new: object) -> bool:
    return True


def _allows_more(old: Sequence[str], new: Sequence[str]) -> bool:
    return ANY_SITE not in old and not set(new) <= set(old)


def _asks_for_less(old: Sequence[str], new: Sequence[str]) -> bool:
    return not set(old) <= set(new)


def _is_higher(old: float, new: float) -> bool:
    return new > old


def _is_lower(old: float, new: float) -> bool:
    return new < old


def _turned_on(old: bool, new: bool) -> bool:
    return new and not old


#: Field → whether a change from one value to another protects less.
_WEAKER: Mapping[str, Callable[[Any, Any], bool]] = {
    "donate.modes": _allows_more,
    "donate.kinds": _allows_more,
    "donate.recipients": _allows_more,
    "donate.approvals": _asks_for_less,
    "donate.dispatch": lambda _, new: new == "automatic",
    "donate.max_payload_bytes": _is_higher,
    "donate.wire_dtype": lambda _, new: new == "f32",
    "donate.redonate_epsilon": _is_higher,
    "receive.donors": _allows_more,
    "receive.kinds": _allows_more,
    "receive.modes": _allows_more,
    "receive.automatic_trial": _turned_on,
    "receive.automatic_keep": _turned_on,
    "receive.min_gain": _is_lower,
    "receive.max_retention_loss": _is_higher,
    "receive.licence": _asks_for_less,
    "receive.purposes": lambda old, new: bool(old) and not (new and set(new) <= set(old)),
    "receive.parents": lambda _, new: new == "accept",
    "receipt.share_figures": _turned_on,
    "audit.thresholds_version": _is_lower,
    "audit.min_population_dp": _is_lower,
    "audit.min_population": _is_lower,
    "audit.donation_epsilon": _is_higher,
    "audit.domain_epsilon": _is_higher,
    "audit.max_delta": _is_higher,
    "audit.canaries": _is_lower,
    "audit.measured_approvals": _is_lower,
    "audit.identifier_list": _asks_for_less,
}
