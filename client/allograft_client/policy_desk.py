# SPDX-License-Identifier: Apache-2.0
"""Where a site's policy is read, signed and compared with what was signed last.

Invariants: signing reads the file once; the bytes that are shown, judged and signed are the same.
What was signed last is remembered in the site's database as well, so that a weaker policy is called
weaker when `policy.toml.sig` was removed, damaged or replaced by an older one.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from datetime import UTC, datetime

from allograft.crypto import canonical, keystore
from allograft.crypto.keys import VerifyKey
from allograft.durable import durable_write
from allograft.errors import RejectedError
from allograft.limits import LIMITS
from allograft.plainfile import read_plain
from allograft.privacy.policy import Policy, parse_policy, read_policy, read_policy_bytes
from allograft.privacy.signed_policy import SignedPolicy, sign_policy, verify_policy, weaker_fields
from allograft_client.settings import Home
from allograft_client.store import Store

_LAST = "policy-signed-last"


@dataclass(frozen=True, slots=True)
class PolicyState:
    """The policy beside its last signature.

    Attributes:
        policy: As it stands in its file.
        signed: As it was signed last; None if it never was.
        weaker: Fields in which the file protects less than what was signed.
    """

    policy: Policy
    signed: SignedPolicy | None
    weaker: tuple[str, ...]

    @property
    def is_signed(self) -> bool:
        """Whether the file is byte for byte the one that was signed."""
        return self.signed is not None and self.signed.policy.digest == self.policy.digest


@dataclass(frozen=True, slots=True)
class Signing:
    """A policy that was just signed.

    Attributes:
        signed: What stands in `policy.toml.sig` now.
        before: What it was compared with: the policy that was signed last; None if none is known.
        note: What a person must know of that comparison; empty if the old signature stood there.
    """

    signed: SignedPolicy
    before: SignedPolicy | None
    note: str


def read_state(home: Home) -> PolicyState:
    """Compare the policy with what was signed last.

    Raises:
        RejectedError: AG-PRV-001 or -002 for the policy, AG-PRV-008 for its signature, AG-KEY-*.
        UnavailableError: AG-STO-003 if `init` has not run here.
    """
    policy, signed = read_policy(home.policy_file), _read_signed(home, _own_key(home))
    return PolicyState(policy, signed, weaker_fields(signed.policy, policy) if signed else ())


def sign(home: Home, role: str) -> Signing:
    """Sign the policy as it stands and keep it as the last signed one.

    Raises:
        RejectedError: AG-PRV-001 or -002 for the policy, AG-PRV-008 or -021 for the role.
        UnavailableError: AG-STO-001 when the disk is full, AG-STO-003 if `init` has not run here,
            AG-STO-004 if the database is damaged.
    """
    content = read_policy_bytes(home.policy_file)
    parse_policy(content)
    key = keystore.read_signing_key(home.path("keys", "signing.pem"))
    with contextlib.closing(Store(home.database)) as store:
        before, note = _find_last(home, key.public, store)
        now = canonical.format_time(datetime.now(UTC).replace(microsecond=0))
        envelope = sign_policy(content, role, now, key, before)
        durable_write(home.policy_signature, envelope)
        # After the file: a kill between the two leaves the newer one there, and it is found.
        _remember(store, content, role, now)
    return Signing(verify_policy(envelope, (key.public,)), before, note)


def _find_last(home: Home, key: VerifyKey, store: Store) -> tuple[SignedPolicy | None, str]:
    """The policy that was signed last, from its file or from memory, and where it is not as usual.

    A damaged signature must not stand in the way of a new one.
    """
    try:
        filed = _read_signed(home, key)
        state = "missing" if filed is None else "older than what was signed last"
    except RejectedError:
        filed, state = None, "damaged or by another key"
    remembered = _recall(store)
    if remembered is None:
        if filed is not None:
            return filed, ""
        if state == "missing":
            return None, "No signed policy is known here: there was nothing to compare with."
        return (
            None,
            f"policy.toml.sig was {state}, and none is remembered: nothing to compare with.",
        )
    if filed is not None and filed.time >= remembered.time:
        return filed, ""
    return remembered, f"policy.toml.sig was {state}; compared with what site.db remembers of it."


def _remember(store: Store, content: bytes, role: str, time: str) -> None:
    value = {"policy": content.decode("utf-8"), "role": role, "time": time}
    store.set_setting(_LAST, canonical.dumps(value).decode("utf-8"))


def _recall(store: Store) -> SignedPolicy | None:
    """What the database remembers; None if that is nothing or no policy of this version."""
    try:
        value = canonical.loads(store.setting(_LAST).encode("utf-8"))
        fields = canonical.as_object(value, {"policy", "role", "time"})
        text, role, time = (canonical.as_text(fields[name]) for name in ("policy", "role", "time"))
        return SignedPolicy(parse_policy(text.encode("utf-8")), role, time, ())
    except RejectedError:
        return None


def read_signature(home: Home) -> bytes | None:
    """The signature file; None if the policy was never signed.

    Raises:
        RejectedError: AG-PRV-008 if it cannot be read.
    """
    try:
        return read_plain(home.policy_signature, LIMITS.json_document_bytes)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RejectedError("AG-PRV-008", f"policy.toml.sig: {error.strerror}") from error
    except RejectedError as error:
        raise RejectedError("AG-PRV-008", error.cause) from error


def _own_key(home: Home) -> VerifyKey:
    return keystore.read_signing_key(home.path("keys", "signing.pem")).public


def _read_signed(home: Home, key: VerifyKey) -> SignedPolicy | None:
    envelope = read_signature(home)
    return None if envelope is None else verify_policy(envelope, (key,))
