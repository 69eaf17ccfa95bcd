# SPDX-License-Identifier: Apache-2.0
"""In-toto statements v1 in DSSE envelopes: subjects by SHA-256, a predicate type, a predicate.

Written as canonical JSON. What is read is parsed from the bytes whose signature was verified.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from allograft.crypto import canonical, dsse
from allograft.crypto.keys import SigningKey, VerifyKey
from allograft.errors import RejectedError
from allograft.limits import LIMITS

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"


@dataclass(frozen=True, slots=True)
class Subject:
    """A file that a statement is about."""

    name: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Statement:
    """What a statement is about, and what it says."""

    subjects: tuple[Subject, ...]
    predicate_type: str
    predicate: dict[str, canonical.Json]

    def to_bytes(self) -> bytes:
        """The statement as canonical JSON."""
        return canonical.dumps(
            {
                "_type": STATEMENT_TYPE,
                "subject": [
                    {"name": subject.name, "digest": {"sha256": subject.sha256}}
                    for subject in self.subjects
                ],
                "predicateType": self.predicate_type,
                "predicate": self.predicate,
            }
        )

    @classmethod
    def from_bytes(cls, payload: bytes) -> Statement:
        """Read a statement.

        Raises:
            RejectedError: AG-PRO-001 if malformed.
        """
        try:
            fields = canonical.as_object(
                canonical.loads(payload), {"_type", "subject", "predicateType", "predicate"}
            )
            if fields["_type"] != STATEMENT_TYPE:
                raise RejectedError("AG-PRO-001", "not an in-toto statement v1")
            subjects = canonical.as_list(fields["subject"])
            if not 1 <= len(subjects) <= LIMITS.packet_parts + 2:
                raise RejectedError("AG-PRO-001", f"a statement about {len(subjects)} files")
            return cls(
                subjects=tuple(_read_subject(entry) for entry in subjects),
                predicate_type=canonical.as_text(fields["predicateType"]),
                predicate=canonical.as_mapping(fields["predicate"]),
            )
        except RejectedError as error:
            raise RejectedError("AG-PRO-001", f"statement: {error.cause}") from error


def sign_statement(statement: Statement, keys: Sequence[SigningKey]) -> bytes:
    """The statement in an envelope signed with every key, as canonical JSON."""
    return dsse.sign(statement.to_bytes(), dsse.IN_TOTO, keys).to_bytes()


def verify_statement(
    envelope: bytes | dsse.Envelope, keys: Sequence[VerifyKey], predicate_type: str | None = None
) -> Statement:
    """Verify an envelope and read its statement.

    Args:
        envelope: The envelope as received.
        keys: The signer's keys from the roster.
        predicate_type: The only accepted type; None accepts any, for callers that sort by type.

    Raises:
        RejectedError: AG-SIG-* for the envelope, AG-PRO-001 if malformed, AG-PRO-002 if of another
            type.
    """
    verified = dsse.verify(envelope, dsse.IN_TOTO, keys)
    statement = Statement.from_bytes(verified.payload)
    if predicate_type is not None and statement.predicate_type != predicate_type:
        raise RejectedError("AG-PRO-002", f"expected a statement of type {predicate_type}")
    return statement


def _read_subject(value: canonical.Json) -> Subject:
    fields = canonical.as_object(value, {"name", "digest"})
    digest = canonical.as_object(fields["digest"], {"sha256"})
    return Subject(canonical.as_line(fields["name"]), canonical.as_sha256(digest["sha256"]))
