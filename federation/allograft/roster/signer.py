# SPDX-License-Identifier: Apache-2.0
"""Our Ed25519 keys as python-tuf signs and names them.

The roster's signatures are TUF's; the keys are `NoteKey` files like all others, so they are
point-checked, mode 0600, and never in a format of their own. Suite 1 knows Ed25519 here only.
"""

from __future__ import annotations

import hashlib
from typing import NoReturn

from securesystemslib.signer import Key, SecretsHandler, Signature, Signer, SSlibKey

from allograft.crypto import canonical
from allograft.crypto.notekey import NoteKey, check_point
from allograft.errors import RejectedError


class RosterSigner(Signer):
    """Signs TUF metadata with one key."""

    def __init__(self, key: NoteKey) -> None:
        self._key = key
        self._public = tuf_key(key.public.raw)

    @property
    def public_key(self) -> SSlibKey:
        """The key as metadata lists it."""
        return self._public

    def sign(self, payload: bytes) -> Signature:
        """Sign the canonical form of some metadata."""
        return Signature(self._public.keyid, self._key.sign(payload).hex())

    @classmethod
    def from_priv_key_uri(
        cls, priv_key_uri: str, public_key: Key, secrets_handler: SecretsHandler | None = None
    ) -> NoReturn:
        """Refused: keys are read from key files, never from URIs in metadata.

        Raises:
            RejectedError: Always, AG-KEY-001.
        """
        raise RejectedError("AG-KEY-001", "roster keys are not read from URIs")


def tuf_key(raw: bytes) -> SSlibKey:
    """An Ed25519 public key as TUF metadata lists it."""
    fields: dict[str, canonical.Json] = {
        "keytype": "ed25519", "scheme": "ed25519", "keyval": {"public": raw.hex()},
    }  # fmt: skip
    key_id = hashlib.sha256(canonical.dumps(fields)).hexdigest()
    return SSlibKey(key_id, "ed25519", "ed25519", {"public": raw.hex()})


def check_tuf_key(key: Key) -> None:
    """Refuse keys of other types and unusable points.

    Raises:
        RejectedError: AG-ROS-008 for another type, AG-KEY-003 for an unusable point.
    """
    public = key.keyval.get("public")
    if (key.keytype, key.scheme) != ("ed25519", "ed25519") or not isinstance(public, str):
        raise RejectedError("AG-ROS-008", "a key of the roster is not Ed25519")
    try:
        raw = bytes.fromhex(public)
    except ValueError as error:
        raise RejectedError("AG-ROS-008", "a key of the roster is not hex") from error
    check_point(raw)
