# SPDX-License-Identifier: Apache-2.0
"""Receipts: what became of a dispatch at one recipient, signed by that recipient.

A recipient writes a receipt for every dispatch, also for those it refused or put into quarantine.
Figures travel only where the recipient's policy allows it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from allograft.crypto import canonical
from allograft.crypto.keys import SigningKey
from allograft.errors import RejectedError
from allograft.routing import document

RECEIPT_TYPE = "urn:allograft:receipt:v1"

#: kept: attached for good. reverted: tried and undone. refused: not tried, by check, policy or
#: gate. quarantined: it did not verify.
State = Literal["kept", "reverted", "refused", "quarantined"]

_CODE = re.compile(r"(AG-[A-Z]{2,4}-\d{3})?")


@dataclass(frozen=True, slots=True)
class Figures:
    """What a trial measured.

    Attributes:
        gain: Held-out loss without minus with the packet, on the recipient's own data of the
            packet's domain; positive is better.
        retention_change: The same difference on the recipient's retention data.
        dose: The dose that was chosen.
    """

    gain: float
    retention_change: float
    dose: float


@dataclass(frozen=True, slots=True)
class Receipt:
    """One recipient's outcome for one dispatch.

    Attributes:
        dispatch_digest: SHA-256 (hex) of the envelope `dispatch.json` as it arrived.
        code: The error code that explains a refusal or quarantine; empty otherwise.
    """

    packet_id: str
    dispatch_id: str
    dispatch_digest: str
    site: str
    state: State
    code: str
    time: datetime
    figures: Figures | None = None

    def to_json(self) -> dict[str, canonical.Json]:
        """The receipt as a predicate."""
        fields: dict[str, canonical.Json] = {
            "packet_id": self.packet_id,
            "dispatch_id": self.dispatch_id,
            "site": self.site,
            "state": self.state,
            "code": self.code,
            "time": canonical.format_time(self.time),
        }
        if self.figures is not None:
            fields["figures"] = {
                "gain": self.figures.gain,
                "retention_change": self.figures.retention_change,
                "dose": self.figures.dose,
            }
        return fields


def sign_receipt(receipt: Receipt, key: SigningKey) -> bytes:
    """Sign a receipt; its subject is the dispatch it answers."""
    statement = document.Statement(
        RECEIPT_TYPE, "dispatch.json", receipt.dispatch_digest, receipt.to_json()
    )
    return document.sign_statement(statement, key)


def verify_receipt(envelope: bytes, roster: document.Signers, now: datetime) -> Receipt:
    """Verify a receipt against the keys of the site it names.

    Raises:
        RejectedError: AG-RTE-001 malformed, AG-SIG-* signature, or the roster's refusal.
    """
    statement = document.verify_statement(envelope, RECEIPT_TYPE, ("site", "site"), roster, now)
    try:
        return _read_receipt(statement)
    except RejectedError as error:
        raise RejectedError("AG-RTE-001", f"receipt: {error.cause}") from error


def _read_receipt(statement: document.Statement) -> Receipt:
    fields = canonical.as_object(
        statement.predicate,
        {"packet_id", "dispatch_id", "site", "state", "code", "time"},
        {"figures"},
    )
    state, code = canonical.as_text(fields["state"]), canonical.as_text(fields["code"])
    if state not in {"kept", "reverted", "refused", "quarantined"} or not _CODE.fullmatch(code):
        raise RejectedError("AG-RTE-001", "unknown state or malformed code")
    return Receipt(
        packet_id=document.read_random_id(fields["packet_id"]),
        dispatch_id=document.read_random_id(fields["dispatch_id"]),
        dispatch_digest=statement.subject_sha256,
        site=document.read_site(fields["site"]),
        state=state,  # type: ignore[arg-type]  # checked against the literals above
        code=code,
        time=document.read_time(fields["time"]),
        figures=_read_figures(fields["figures"]) if "figures" in fields else None,
    )


def _read_figures(value: canonical.Json) -> Figures:
    fields = canonical.as_object(value, {"gain", "retention_change", "dose"})
    return Figures(
        gain=canonical.as_number(fields["gain"]),
        retention_change=canonical.as_number(fields["retention_change"]),
        dose=canonical.as_number(fields["dose"]),
    )
