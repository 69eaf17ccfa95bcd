# SPDX-License-Identifier: Apache-2.0
"""DSSE v1.0.2 envelopes: a payload, its type, and signatures over both.

A signature covers PAE(type, payload) = "DSSEv1" SP len SP type SP len SP payload, lengths counted
in bytes. Verification returns the payload bytes it checked; callers parse those and never read the
envelope again. `keyid` is a hint and is ignored: keys come from the roster.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

from allograft.crypto import canonical
from allograft.crypto.keys import SigningKey, VerifyKey
from allograft.errors import RejectedError
from allograft.limits import LIMITS

IN_TOTO = "application/vnd.in-toto+json"


@dataclass(frozen=True, slots=True)
class Envelope:
    """An envelope as read or made; nothing in it is trusted before `verify`."""

    payload: bytes
    payload_type: str
    signatures: tuple[bytes, ...]
    key_ids: tuple[str, ...] = ()

    def to_json(self) -> dict[str, canonical.Json]:
        """The envelope as a JSON object (field order is canonical)."""
        key_ids = self.key_ids or ("",) * len(self.signatures)
        return {
            "payload": base64.b64encode(self.payload).decode("ascii"),
            "payloadType": self.payload_type,
            "signatures": [
                {"keyid": key_id, "sig": base64.b64encode(signature).decode("ascii")}
                for key_id, signature in zip(key_ids, self.signatures, strict=True)
            ],
        }

    def to_bytes(self) -> bytes:
        """The envelope as canonical JSON."""
        return canonical.dumps(self.to_json())

    @classmethod
    def from_json(cls, value: canonical.Json) -> Envelope:
        """Read an envelope.

        Raises:
            RejectedError: AG-SIG-001 if malformed.
        """
        try:
            fields = canonical.as_object(value, {"payload", "payloadType", "signatures"})
            entries = [
                canonical.as_object(entry, {"sig"}, {"keyid"})
                for entry in canonical.as_list(fields["signatures"])
            ]
            if not 1 <= len(entries) <= LIMITS.signatures:
                raise RejectedError("AG-SIG-001", f"an envelope has {len(entries)} signatures")
            return cls(
                payload=canonical.as_base64(fields["payload"]),
                payload_type=canonical.as_text(fields["payloadType"]),
                signatures=tuple(canonical.as_base64(entry["sig"]) for entry in entries),
                key_ids=tuple(canonical.as_text(entry.get("keyid", "")) for entry in entries),
            )
        except RejectedError as error:
            raise RejectedError("AG-SIG-001", f"envelope: {error.cause}") from error

    @classmethod
    def from_bytes(cls, content: bytes) -> Envelope:
        """Read an envelope from JSON.

        Raises:
            RejectedError: AG-SIG-001 if malformed.
        """
        try:
            value = canonical.loads(content)
        except RejectedError as error:
            raise RejectedError("AG-SIG-001", f"envelope: {error.cause}") from error
        return cls.from_json(value)


@dataclass(frozen=True, slots=True)
class Verified:
    """A payload whose signatures were checked, and who signed it."""

    payload: bytes
    signers: tuple[VerifyKey, ...]


def pae(payload_type: str, payload: bytes) -> bytes:
    """Pre-authentication encoding (DSSE protocol, "Signature definition")."""
    kind = payload_type.encode("utf-8")
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def sign(payload: bytes, payload_type: str, keys: Sequence[SigningKey]) -> Envelope:
    """Sign a payload with every key, in order."""
    message = pae(payload_type, payload)
    return Envelope(
        payload=payload,
        payload_type=payload_type,
        signatures=tuple(key.sign(message) for key in keys),
        key_ids=tuple(key.public.key_id for key in keys),
    )


def verify(
    envelope: bytes | Envelope,
    payload_type: str,
    keys: Sequence[VerifyKey],
    threshold: int = 1,
) -> Verified:
    """Verify that at least `threshold` distinct keys signed, and return the payload.

    Signatures that fit none of the keys are ignored, as DSSE asks: an envelope may carry others.

    Raises:
        RejectedError: AG-SIG-001 malformed, AG-SIG-002 wrong payload type, AG-SIG-003 too few
            valid signatures.
    """
    if isinstance(envelope, bytes):
        envelope = Envelope.from_bytes(envelope)
    if envelope.payload_type != payload_type:
        raise RejectedError("AG-SIG-002", f"expected an envelope of type {payload_type}")
    message = pae(payload_type, envelope.payload)
    distinct = {key.key_id: key for key in keys}
    signers = tuple(
        key
        for key in distinct.values()
        if any(_fits(key, signature, message) for signature in envelope.signatures)
    )
    if len(signers) < max(threshold, 1):
        raise RejectedError(
            "AG-SIG-003", f"{len(signers)} of {threshold} required signatures are valid"
        )
    return Verified(envelope.payload, signers)


def _fits(key: VerifyKey, signature: bytes, message: bytes) -> bool:
    try:
        key.verify(signature, message)
    except RejectedError:
        return False
    return True
