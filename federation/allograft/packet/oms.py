# SPDX-License-Identifier: Apache-2.0
"""The OMS v1.0 model signature over a payload directory (ossf/model-signing-spec).

A Sigstore bundle around a DSSE envelope around an in-toto statement whose predicate lists every
file. Any OMS verifier can check it with the site's public key, knowing nothing about Allograft.
The root digest covers the files' digests and not their names, so names are compared here as well.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from allograft.crypto import canonical, dsse
from allograft.crypto.keys import SigningKey, VerifyKey
from allograft.errors import RejectedError
from allograft.limits import LIMITS

PREDICATE_TYPE = "https://model_signing/signature/v1.0"

_BUNDLE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
_MODEL_NAME = "payload"
_SERIALIZATION: dict[str, canonical.Json] = {
    "method": "files",
    "hash_type": "sha256",
    "allow_symlinks": False,
    "ignore_paths": [],
}


@dataclass(frozen=True, slots=True)
class Resource:
    """A signed file: its name relative to the payload directory, and its SHA-256 (hex)."""

    name: str
    sha256: str


def sign_bundle(resources: Sequence[Resource], key: SigningKey) -> bytes:
    """Sign the files of a payload; the bundle as canonical JSON."""
    ordered = sorted(resources, key=lambda resource: resource.name)
    statement = canonical.dumps(
        {
            "_type": _STATEMENT_TYPE,
            "subject": [{"name": _MODEL_NAME, "digest": {"sha256": _root_digest(ordered)}}],
            "predicateType": PREDICATE_TYPE,
            "predicate": {
                "resources": [
                    {"name": r.name, "algorithm": "sha256", "digest": r.sha256} for r in ordered
                ],
                "serialization": _SERIALIZATION,
            },
        }
    )
    envelope = dsse.sign(statement, dsse.IN_TOTO, [key])
    # The model_signing tool compares the hint with a digest of the PEM file it was given.
    hint = hashlib.sha256(key.public.pem.encode("ascii")).hexdigest()
    return canonical.dumps(
        {
            "mediaType": _BUNDLE_TYPE,
            "verificationMaterial": {"publicKey": {"hint": hint}, "tlogEntries": []},
            "dsseEnvelope": envelope.to_json(),
        }
    )


def read_envelope(bundle: bytes) -> dsse.Envelope:
    """The envelope of a bundle, not yet verified.

    Raises:
        RejectedError: AG-PKT-007 if the bundle is malformed, AG-SIG-001 if the envelope is.
    """
    try:
        fields = canonical.as_object(
            canonical.loads(bundle), {"mediaType", "verificationMaterial", "dsseEnvelope"}
        )
    except RejectedError as error:
        raise RejectedError("AG-PKT-007", f"model signature: {error.cause}") from error
    if fields["mediaType"] != _BUNDLE_TYPE:
        raise RejectedError("AG-PKT-007", "the model signature is no Sigstore bundle v0.3")
    # The verification material is a hint; keys come from the roster.
    return dsse.Envelope.from_json(fields["dsseEnvelope"])


def verify_bundle(bundle: bytes, keys: Sequence[VerifyKey]) -> tuple[Resource, ...]:
    """Verify a bundle and return the files it signs, in the order of their names.

    Raises:
        RejectedError: AG-PKT-007 if malformed, AG-SIG-* if the signature does not fit.
    """
    verified = dsse.verify(read_envelope(bundle), dsse.IN_TOTO, keys)
    try:
        return _read_statement(verified.payload)
    except RejectedError as error:
        raise RejectedError("AG-PKT-007", f"model signature: {error.cause}") from error


def _read_statement(payload: bytes) -> tuple[Resource, ...]:
    fields = canonical.as_object(
        canonical.loads(payload), {"_type", "subject", "predicateType", "predicate"}
    )
    predicate = canonical.as_object(fields["predicate"], {"resources", "serialization"})
    if fields["_type"] != _STATEMENT_TYPE or fields["predicateType"] != PREDICATE_TYPE:
        raise RejectedError("AG-PKT-007", "the statement is not of type OMS v1.0")
    if predicate["serialization"] != _SERIALIZATION:
        raise RejectedError("AG-PKT-007", "files were not hashed whole with SHA-256")
    entries = canonical.as_list(predicate["resources"])
    if not 1 <= len(entries) <= LIMITS.packet_parts:
        raise RejectedError("AG-PKT-007", f"{len(entries)} files are signed")
    resources = tuple(_read_resource(entry) for entry in entries)
    names = [resource.name for resource in resources]
    if names != sorted(set(names)):
        raise RejectedError("AG-PKT-007", "signed files are not in the order of their names")
    subject = [{"name": _MODEL_NAME, "digest": {"sha256": _root_digest(resources)}}]
    if fields["subject"] != subject:
        raise RejectedError("AG-PKT-007", "the subject is not the digest of the listed files")
    return resources


def _read_resource(value: canonical.Json) -> Resource:
    fields = canonical.as_object(value, {"name", "algorithm", "digest"})
    if fields["algorithm"] != "sha256":
        raise RejectedError("AG-PKT-007", "a file was not hashed with SHA-256")
    return Resource(canonical.as_text(fields["name"]), canonical.as_sha256(fields["digest"]))


def _root_digest(resources: Sequence[Resource]) -> str:
    digests = b"".join(bytes.fromhex(resource.sha256) for resource in resources)
    return hashlib.sha256(digests).hexdigest()
