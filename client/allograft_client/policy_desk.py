# SPDX-License-Identifier: Apache-2.0
"""Where a site's policy is read, signed and compared with what was signed last.

Invariant: signing reads the file once; the bytes that are shown, judged and signed are the same.
"""

from __future__ import annotations

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


def read_state(home: Home) -> PolicyState:
    """Compare the policy with what was signed last.

    Raises:
        RejectedError: AG-PRV-001 or -002 for the policy, AG-PRV-008 for its signature, AG-KEY-*.
        UnavailableError: AG-STO-003 if `init` has not run here.
    """
    policy, signed = read_policy(home.policy_file), _read_signed(home, _own_key(home))
    return PolicyState(policy, signed, weaker_fields(signed.policy, policy) if signed else ())


def sign(home: Home, role: str) -> SignedPolicy:
    """Sign the policy as it stands and keep it as the last signed one.

    Raises:
        RejectedError: AG-PRV-001 or -002 for the policy, AG-PRV-008 or -021 for the role.
        UnavailableError: AG-STO-001 when the disk is full, AG-STO-003 if `init` has not run here.
    """
    content = read_policy_bytes(home.policy_file)
    parse_policy(content)
    key = keystore.read_signing_key(home.path("keys", "signing.pem"))
    try:
        before = _read_signed(home, key.public)
    except RejectedError:
        # A damaged signature must not stand in the way of a new one; there is nothing to compare.
        before = None
    now = canonical.format_time(datetime.now(UTC).replace(microsecond=0))
    envelope = sign_policy(content, role, now, key, before)
    durable_write(home.policy_signature, envelope)
    return verify_policy(envelope, (key.public,))


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
