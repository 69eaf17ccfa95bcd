# SPDX-License-Identifier: Apache-2.0
"""What cards, offers, routes, receipts and withdrawals share.

Each is an in-toto statement with one subject, in a DSSE envelope signed by the one party it names
as its author. The author's name is read from the unverified payload only to choose the keys; the
payload is parsed again after its signature was verified, and the name must still be the same.
See protos/spec/relay.md, "Documents".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, Protocol

from allograft.crypto import canonical, dsse
from allograft.crypto.keys import SigningKey, VerifyKey
from allograft.errors import RejectedError
from allograft.limits import LIMITS

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"

Role = Literal["site", "coordinator"]

_SITE = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_RANDOM_ID = re.compile(r"[0-9a-f]{32}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Signers(Protocol):
    """Who may sign: the part of a roster that documents need."""

    def signing_keys(self, name: str, role: Role, now: datetime) -> tuple[VerifyKey, ...]:
        """The keys of a party that is enrolled in this role now.

        Raises:
            RejectedError: The party is unknown, revoked, expired or of another role.
        """


@dataclass(frozen=True, slots=True)
class Statement:
    """One statement: what it is about, and what it says."""

    predicate_type: str
    subject_name: str
    subject_sha256: str
    predicate: dict[str, canonical.Json]


def sign_statement(statement: Statement, key: SigningKey) -> bytes:
    """The statement in a signed envelope, as canonical JSON."""
    subject = {
        "name": statement.subject_name,
        "digest": {"sha256": read_sha256(statement.subject_sha256)},
    }
    payload = canonical.dumps(
        {
            "_type": STATEMENT_TYPE,
            "subject": [subject],
            "predicateType": statement.predicate_type,
            "predicate": statement.predicate,
        }
    )
    return dsse.sign(payload, dsse.IN_TOTO, [key]).to_bytes()


def verify_statement(
    envelope: bytes, predicate_type: str, author: tuple[str, Role], roster: Signers, now: datetime
) -> Statement:
    """Verify that a statement of this type is signed by the party it names.

    Args:
        envelope: The envelope as received.
        predicate_type: The only type that is accepted.
        author: The predicate's field that names the author, and the role the author must have.
        roster: Where keys come from.
        now: The current time (UTC).

    Raises:
        RejectedError: AG-RTE-001 malformed, AG-SIG-* signature, or the roster's refusal.
    """
    field, role = author
    parsed = dsse.Envelope.from_bytes(envelope)
    name = _read_author(_read_statement(parsed.payload, predicate_type), field)
    verified = dsse.verify(parsed, dsse.IN_TOTO, roster.signing_keys(name, role, now))
    return _read_statement(verified.payload, predicate_type)


def _read_author(statement: Statement, field: str) -> str:
    if field not in statement.predicate:
        raise RejectedError("AG-RTE-001", f"a document does not name its {field}")
    return read_site(statement.predicate[field])


def _read_statement(payload: bytes, predicate_type: str) -> Statement:
    try:
        fields = canonical.as_object(
            canonical.loads(payload), {"_type", "subject", "predicateType", "predicate"}
        )
        subjects = canonical.as_list(fields["subject"])
        if fields["_type"] != STATEMENT_TYPE or len(subjects) != 1:
            raise RejectedError("AG-RTE-001", "not an in-toto statement with one subject")
        if fields["predicateType"] != predicate_type:
            raise RejectedError("AG-RTE-001", f"expected a document of type {predicate_type}")
        subject = canonical.as_object(subjects[0], {"name", "digest"})
        digest = canonical.as_object(subject["digest"], {"sha256"})
        return Statement(
            predicate_type,
            read_line(subject["name"]),
            read_sha256(digest["sha256"]),
            canonical.as_mapping(fields["predicate"]),
        )
    except RejectedError as error:
        if error.code == "AG-RTE-001":
            raise
        raise RejectedError("AG-RTE-001", f"statement: {error.cause}") from error


def read_site(value: canonical.Json) -> str:
    """A site or coordinator name: ``[a-z0-9][a-z0-9-]{0,62}``."""
    return _matching(value, _SITE, "a site name")


def read_random_id(value: canonical.Json) -> str:
    """A packet or dispatch id: 32 hex digits."""
    return _matching(value, _RANDOM_ID, "a packet or dispatch id")


def read_sha256(value: canonical.Json) -> str:
    """A SHA-256 in lower-case hex."""
    return _matching(value, _SHA256, "a digest")


def read_line(value: canonical.Json) -> str:
    """A short human text on one line, without control characters."""
    text = canonical.as_text(value)
    if len(text) > LIMITS.text_field_chars or any(ord(c) < 32 or ord(c) == 127 for c in text):
        raise RejectedError("AG-RTE-001", "a text is too long or holds control characters")
    return text


def read_lines(value: canonical.Json) -> tuple[str, ...]:
    """A list of short texts."""
    entries = canonical.as_list(value)
    if len(entries) > LIMITS.roster_sites:
        raise RejectedError("AG-RTE-001", f"a list of {len(entries)} texts")
    return tuple(read_line(entry) for entry in entries)


def read_time(value: canonical.Json) -> datetime:
    """A UTC time."""
    return canonical.parse_time(canonical.as_text(value))


def _matching(value: canonical.Json, pattern: re.Pattern[str], what: str) -> str:
    text = canonical.as_text(value)
    if not pattern.fullmatch(text):
        raise RejectedError("AG-RTE-001", f"{what} is not of the required form")
    return text
