# SPDX-License-Identifier: Apache-2.0
"""Log entries: one signed event each, about one document, without free text.

An entry is the canonical DSSE envelope of an in-toto statement of type `urn:allograft:event:v1`.
Its subject is the document that the event announces, by SHA-256 of the document's envelope bytes
(a roster: of its file set). Entries have one spelling only: anything that is not byte for byte
what `sign_event` writes is refused, so nothing can hide in one. See protos/spec/log.md.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, Protocol, get_args

from allograft.crypto import canonical, dsse
from allograft.crypto.keys import SigningKey, VerifyKey
from allograft.errors import RejectedError
from allograft.limits import LIMITS

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
EVENT_TYPE = "urn:allograft:event:v1"

EventName = Literal["offer", "route", "dispatch", "receipt", "roster", "withdrawal"]
Role = Literal["site", "coordinator"]

_NAMES: dict[str, EventName] = {name: name for name in get_args(EventName)}
_BY_COORDINATOR = frozenset({"route", "roster"})
_WITH_DISPATCH = frozenset({"dispatch", "receipt"})
_OUTCOME = re.compile(r"[a-z]{1,16}")
_DOCUMENT = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")
_KEY_ID = re.compile(r"[0-9a-f]{64}")


class Signers(Protocol):
    """Who may sign: the part of a roster that entries need."""

    def signing_keys(self, name: str, role: Role, now: datetime) -> tuple[VerifyKey, ...]:
        """The keys of a party that is enrolled in this role now.

        Raises:
            RejectedError: The party is unknown, revoked, expired or of another role.
        """


@dataclass(frozen=True, slots=True)
class Event:
    """What an entry says.

    Attributes:
        actor: The site or coordinator that says so.
        packet_id: The packet; empty for a roster.
        dispatch_id: The dispatch; empty except for dispatch and receipt.
        outcome: The state that a receipt reports; empty for other events.
        time: When, by the actor's clock (UTC).
        document_name: File name of the announced document, such as ``dispatch.json``.
        document_sha256: SHA-256 (hex) of that document's envelope bytes.
    """

    event: EventName
    actor: str
    packet_id: str
    dispatch_id: str
    outcome: str
    time: datetime
    document_name: str
    document_sha256: str

    @property
    def role(self) -> Role:
        """The role the actor must be enrolled in for this kind of event."""
        return "coordinator" if self.event in _BY_COORDINATOR else "site"

    def to_bytes(self) -> bytes:
        """The statement as canonical JSON."""
        return canonical.dumps(
            {
                "_type": STATEMENT_TYPE,
                "subject": [
                    {"name": self.document_name, "digest": {"sha256": self.document_sha256}}
                ],
                "predicateType": EVENT_TYPE,
                "predicate": {
                    "event": self.event,
                    "actor": self.actor,
                    "packet_id": self.packet_id,
                    "dispatch_id": self.dispatch_id,
                    "outcome": self.outcome,
                    "time": canonical.format_time(self.time),
                },
            }
        )


def sign_event(event: Event, key: SigningKey) -> bytes:
    """The entry that announces an event.

    Raises:
        RejectedError: AG-LOG-001 if the event would not be accepted by `read_event`.
    """
    payload = event.to_bytes()
    _read_payload(payload)
    return dsse.sign(payload, dsse.IN_TOTO, [key]).to_bytes()


def verify_event(entry: bytes, signers: Signers, now: datetime) -> Event:
    """Verify that an entry is signed by the actor it names.

    Args:
        entry: The entry as received.
        signers: Where keys come from.
        now: The time (UTC) at which the actor must be enrolled; auditors give the event's own.

    Raises:
        RejectedError: AG-LOG-001 malformed, AG-SIG-* signature, or the roster's refusal.
    """
    envelope = _read_envelope(entry)
    event = _read_payload(envelope.payload)
    keys = signers.signing_keys(event.actor, event.role, now)
    verified = dsse.verify(envelope, dsse.IN_TOTO, keys)
    return _read_payload(verified.payload)


def read_event(entry: bytes) -> Event:
    """What an entry says, without checking who signed it.

    Raises:
        RejectedError: AG-LOG-001 if malformed.
    """
    return _read_payload(_read_envelope(entry).payload)


def _read_envelope(entry: bytes) -> dsse.Envelope:
    if len(entry) > LIMITS.entry_bytes:
        raise RejectedError("AG-LOG-001", f"an entry of {len(entry)} bytes")
    try:
        envelope = dsse.Envelope.from_bytes(entry)
    except RejectedError as error:
        raise RejectedError("AG-LOG-001", f"entry: {error.cause}") from error
    key_ids = envelope.key_ids
    if len(key_ids) != 1 or not _KEY_ID.fullmatch(key_ids[0]) or envelope.to_bytes() != entry:
        raise RejectedError("AG-LOG-001", "an entry is not in its one canonical form")
    return envelope


def _read_payload(payload: bytes) -> Event:
    try:
        fields = canonical.as_object(
            canonical.loads(payload, LIMITS.entry_bytes),
            {"_type", "subject", "predicateType", "predicate"},
        )
        if fields["_type"] != STATEMENT_TYPE or fields["predicateType"] != EVENT_TYPE:
            raise RejectedError("AG-LOG-001", "an entry is not an event statement")
        subjects = canonical.as_list(fields["subject"])
        if len(subjects) != 1:
            raise RejectedError("AG-LOG-001", f"an event about {len(subjects)} documents")
        event = _read_event(subjects[0], fields["predicate"])
    except RejectedError as error:
        if error.code == "AG-LOG-001":
            raise
        raise RejectedError("AG-LOG-001", f"entry: {error.cause}") from error
    if event.to_bytes() != payload:
        raise RejectedError("AG-LOG-001", "an event is not in its one canonical form")
    return event


def _read_event(subject: canonical.Json, predicate: canonical.Json) -> Event:
    about = canonical.as_object(subject, {"name", "digest"})
    digest = canonical.as_object(about["digest"], {"sha256"})
    fields = canonical.as_object(
        predicate, {"event", "actor", "packet_id", "dispatch_id", "outcome", "time"}
    )
    name = _read_name(fields["event"])
    return Event(
        event=name,
        actor=canonical.as_site(fields["actor"]),
        packet_id=_read_id(fields["packet_id"], name != "roster"),
        dispatch_id=_read_id(fields["dispatch_id"], name in _WITH_DISPATCH),
        outcome=_read_outcome(fields["outcome"], name),
        time=canonical.parse_time(canonical.as_text(fields["time"])),
        document_name=_matching(about["name"], _DOCUMENT, "a document name"),
        document_sha256=canonical.as_sha256(digest["sha256"]),
    )


def _read_name(value: canonical.Json) -> EventName:
    name = _NAMES.get(canonical.as_text(value))
    if name is None:
        raise RejectedError("AG-LOG-001", "an entry is about an unknown kind of event")
    return name


def _read_id(value: canonical.Json, present: bool) -> str:
    if present:
        return canonical.as_random_id(value)
    if value != "":
        raise RejectedError("AG-LOG-001", "an event carries an id that its kind does not have")
    return ""


def _read_outcome(value: canonical.Json, name: EventName) -> str:
    if name == "receipt":
        return _matching(value, _OUTCOME, "an outcome")
    if value != "":
        raise RejectedError("AG-LOG-001", "only receipts have an outcome")
    return ""


def _matching(value: canonical.Json, pattern: re.Pattern[str], what: str) -> str:
    text = canonical.as_text(value)
    if not pattern.fullmatch(text):
        raise RejectedError("AG-LOG-001", f"{what} is not of the required form")
    return text
