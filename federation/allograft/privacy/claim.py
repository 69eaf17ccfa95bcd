# SPDX-License-Identifier: Apache-2.0
"""What a dossier claims about the privacy of the people whose data a packet learnt from.

Every number in a claim can be recomputed from its constants. That the training followed them, no
recipient can verify: a claim is a signed promise, with arithmetic that must be right.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from allograft.crypto import canonical
from allograft.errors import RejectedError
from allograft.privacy.dp import DpConstants

_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._@+-]{0,63}")

#: Claimed and recomputed ε may differ by so much: accountants round.
TOLERANCE = 0.01

_FIELDS = {
    "plan_digest", "constants", "epsilon", "epsilon_domain", "filter_order", "noise",
    "accountant", "ledger_head", "ledger_entries",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PrivacyClaim:
    """What was planned and spent.

    Attributes:
        plan_digest: SHA-256 (hex) of the signed plan's statement.
        constants: Of the private run; None for a run without differential privacy.
        epsilon: ε of this packet at the constants' δ; None where nothing bounds it.
        epsilon_domain: ε of everything ever spent on the same people, this packet included; None
            where something was released without a bound.
        filter_order: The Rényi order at which the ledger adds up and caps.
        noise: The generator of the noise, empty without differential privacy.
        accountant: What computed ε, with its version.
        ledger_head: SHA-256 (hex) of the ledger's newest entry.
        ledger_entries: How many entries it had.
    """

    plan_digest: str
    constants: DpConstants | None
    epsilon: float | None
    epsilon_domain: float | None
    filter_order: float
    noise: str
    accountant: str
    ledger_head: str
    ledger_entries: int

    def to_json(self) -> dict[str, canonical.Json]:
        """The claim as a JSON object."""
        return {
            "plan_digest": self.plan_digest,
            "constants": None if self.constants is None else self.constants.to_json(),
            "epsilon": self.epsilon,
            "epsilon_domain": self.epsilon_domain,
            "filter_order": self.filter_order,
            "noise": self.noise,
            "accountant": self.accountant,
            "ledger_head": self.ledger_head,
            "ledger_entries": self.ledger_entries,
        }

    @classmethod
    def from_json(cls, value: canonical.Json) -> PrivacyClaim:
        """Read a claim.

        Raises:
            RejectedError: AG-IN-003 if malformed, AG-PRV-050 or -051 for unusable constants,
                AG-PRV-030 if it contradicts itself.
        """
        fields = canonical.as_object(value, _FIELDS)
        given = fields["constants"]
        claim = cls(
            plan_digest=_text(fields["plan_digest"], _SHA256),
            constants=None if given is None else DpConstants.from_json(given),
            epsilon=_bound(fields["epsilon"]),
            epsilon_domain=_bound(fields["epsilon_domain"]),
            filter_order=canonical.as_number(fields["filter_order"]),
            noise="" if fields["noise"] == "" else _text(fields["noise"], _NAME),
            accountant=_text(fields["accountant"], _NAME),
            ledger_head=_text(fields["ledger_head"], _SHA256),
            ledger_entries=canonical.as_int(fields["ledger_entries"]),
        )
        is_private = claim.constants is not None
        if (claim.epsilon is not None) != is_private or bool(claim.noise) != is_private:
            raise RejectedError("AG-PRV-030", "a privacy claim contradicts itself")
        if not is_private and claim.epsilon_domain is not None:
            raise RejectedError("AG-PRV-030", "an unbounded release leaves its domain no bound")
        return claim

    def check(self, epsilon_of: Callable[[DpConstants], float]) -> None:
        """Refuse a claim whose ε is smaller than its constants give.

        Args:
            epsilon_of: An accountant: constants to ε at their δ.

        Raises:
            RejectedError: AG-PRV-013.
        """
        if self.constants is None or self.epsilon is None:
            return
        found = epsilon_of(self.constants)
        # Written so that NaN refuses.
        if not found <= self.epsilon * (1 + TOLERANCE):
            raise RejectedError(
                "AG-PRV-013", f"epsilon {self.epsilon:.3f} claimed, {found:.3f} by its constants"
            )
        if self.epsilon_domain is not None and not self.epsilon <= self.epsilon_domain * (
            1 + TOLERANCE
        ):
            raise RejectedError("AG-PRV-013", "the domain has spent less than this packet alone")


def _bound(value: canonical.Json) -> float | None:
    if value is None:
        return None
    number = canonical.as_number(value)
    if not 0 <= number < 1e6:
        raise RejectedError("AG-PRV-030", "an epsilon is out of range")
    return number


def _text(value: canonical.Json, pattern: re.Pattern[str]) -> str:
    text = canonical.as_text(value)
    if not pattern.fullmatch(text):
        raise RejectedError("AG-PRV-030", "a name or digest of a claim has the wrong form")
    return text
