# SPDX-License-Identifier: Apache-2.0
"""Ed25519 for signed notes: the log's key and the witnesses' keys.

pyca accepts low-order public keys, under which one constant signature verifies many messages. So
every imported key is checked here before it is used: its encoding must be canonical and the point
must not be of small order (multiply by the cofactor 8, refuse the identity).
"""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ed25519

from allograft.errors import RejectedError

_P = 2**255 - 19
_D = (-121665 * pow(121666, -1, _P)) % _P


class NotePublicKey:
    """A checked Ed25519 public key."""

    def __init__(self, raw: bytes) -> None:
        """Check and import a key.

        Raises:
            RejectedError: AG-KEY-003 if the encoding is not canonical or the point is unusable.
        """
        check_point(raw)
        self.raw = raw
        self._key = ed25519.Ed25519PublicKey.from_public_bytes(raw)

    def verify(self, signature: bytes, message: bytes) -> None:
        """Verify a signature.

        Raises:
            RejectedError: AG-KEY-002.
        """
        try:
            self._key.verify(signature, message)
        except InvalidSignature as error:
            raise RejectedError("AG-KEY-002", "an Ed25519 signature does not fit") from error


class NoteKey:
    """An Ed25519 private key (32-byte seed)."""

    def __init__(self, seed: bytes) -> None:
        if len(seed) != 32:
            raise RejectedError("AG-KEY-001", "an Ed25519 seed has 32 bytes")
        self._key = ed25519.Ed25519PrivateKey.from_private_bytes(seed)
        self.seed = seed
        self.public = NotePublicKey(self._key.public_key().public_bytes_raw())

    @classmethod
    def generate(cls) -> NoteKey:
        """Make a fresh key."""
        return cls(ed25519.Ed25519PrivateKey.generate().private_bytes_raw())

    def sign(self, message: bytes) -> bytes:
        """Sign a message; 64 bytes."""
        return self._key.sign(message)


def check_point(raw: bytes) -> None:
    """Refuse Ed25519 keys that are not canonical points of large order (RFC 8032, 5.1.3).

    Raises:
        RejectedError: AG-KEY-003.
    """
    if len(raw) != 32:
        raise RejectedError("AG-KEY-003", f"an Ed25519 key has {len(raw)} bytes, not 32")
    y = int.from_bytes(raw, "little") & ((1 << 255) - 1)
    sign = raw[31] >> 7
    if y >= _P:
        raise RejectedError("AG-KEY-003", "an Ed25519 key is not in canonical form")
    # Recover x from x^2 = (y^2 - 1) / (d y^2 + 1).
    square = (y * y - 1) * pow(_D * y * y + 1, -1, _P) % _P
    x = pow(square, (_P + 3) // 8, _P)
    if (x * x - square) % _P:
        x = x * pow(2, (_P - 1) // 4, _P) % _P
    if (x * x - square) % _P or (x == 0 and sign):
        raise RejectedError("AG-KEY-003", "an Ed25519 key is not a point of the curve")
    for _ in range(3):
        x, y = _double(x, y)
    if (x, y) == (0, 1):
        raise RejectedError("AG-KEY-003", "an Ed25519 key is a point of small order")


def _double(x: int, y: int) -> tuple[int, int]:
    """Twice a point of the twisted Edwards curve -x^2 + y^2 = 1 + d x^2 y^2, affine."""
    product = _D * x * x * y * y % _P
    return (
        2 * x * y * pow(1 + product, -1, _P) % _P,
        (y * y + x * x) * pow(1 - product, -1, _P) % _P,
    )
