# SPDX-License-Identifier: Apache-2.0
"""Withdrawals: a donor takes a packet back.

The coordinator stops delivering the packet and tells everyone it was dispatched to.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from allograft.crypto import canonical
from allograft.crypto.keys import SigningKey
from allograft.errors import RejectedError
from allograft.routing import document

WITHDRAWAL_TYPE = "urn:allograft:withdrawal:v1"


@dataclass(frozen=True, slots=True)
class Withdrawal:
    """A donor's decision to take a packet back.

    Attributes:
        statement_digest: SHA-256 (hex) of the packet statement's envelope, as in the offer.
    """

    packet_id: str
    statement_digest: str
    donor: str
    time: datetime

    def to_json(self) -> dict[str, canonical.Json]:
        """The withdrawal as a predicate."""
        return {
            "packet_id": self.packet_id,
            "donor": self.donor,
            "time": canonical.format_time(self.time),
        }


def sign_withdrawal(withdrawal: Withdrawal, key: SigningKey) -> bytes:
    """Sign a withdrawal; its subject is the packet's statement."""
    statement = document.Statement(
        WITHDRAWAL_TYPE, withdrawal.packet_id, withdrawal.statement_digest, withdrawal.to_json()
    )
    return document.sign_statement(statement, key)


def verify_withdrawal(envelope: bytes, roster: document.Signers, now: datetime) -> Withdrawal:
    """Verify a withdrawal against the keys of the donor it names.

    Raises:
        RejectedError: AG-RTE-001 malformed, AG-SIG-* signature, or the roster's refusal.
    """
    statement = document.verify_statement(envelope, WITHDRAWAL_TYPE, ("donor", "site"), roster, now)
    try:
        fields = canonical.as_object(statement.predicate, {"packet_id", "donor", "time"})
        packet_id = document.read_random_id(fields["packet_id"])
        if statement.subject_name != packet_id:
            raise RejectedError("AG-RTE-001", "the subject is not the packet")
        return Withdrawal(
            packet_id=packet_id,
            statement_digest=statement.subject_sha256,
            donor=document.read_site(fields["donor"]),
            time=document.read_time(fields["time"]),
        )
    except RejectedError as error:
        raise RejectedError("AG-RTE-001", f"withdrawal: {error.cause}") from error
