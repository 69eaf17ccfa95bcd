# SPDX-License-Identifier: Apache-2.0
"""Keys, one purpose each, and how they are written.

- `SigningKey` / `VerifyKey`: ECDSA P-256 with SHA-256, for everything a site signs (DSSE).
  Not Ed25519: libraries disagree on low-order points, so a site could enrol a key under which one
  signature fits two packets and later repudiate both. P-256 has cofactor 1.
- `SealingKey` / `SealingPublicKey`: X-Wing (ML-KEM-768 + X25519), to receive sealed packets.
- `NodeKey`: ECDSA P-384, used by Flower alone to tell nodes apart.

Ed25519 keys of the log and its witnesses are in `notekey`.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from functools import cached_property

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, mlkem, x25519
from cryptography.hazmat.primitives.hpke import MLKEM768X25519PrivateKey, MLKEM768X25519PublicKey

from allograft.errors import RejectedError

_SEALING_PUBLIC_BYTES = 1184 + 32
_ECDSA = ec.ECDSA(hashes.SHA256())


@dataclass(frozen=True)
class VerifyKey:
    """A P-256 public key.

    Attributes:
        pem: SubjectPublicKeyInfo in PEM, as roster files carry it.
    """

    pem: str

    @cached_property
    def _key(self) -> ec.EllipticCurvePublicKey:
        try:
            key = serialization.load_pem_public_key(self.pem.encode("ascii"))
        except (ValueError, UnsupportedAlgorithm) as error:
            raise RejectedError("AG-KEY-001", "a signing key is not a public key in PEM") from error
        if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
            raise RejectedError("AG-KEY-001", "a signing key is not ECDSA P-256")
        return key

    @cached_property
    def key_id(self) -> str:
        """SHA-256 (hex) of the DER SubjectPublicKeyInfo; what people compare out of band."""
        der = self._key.public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        return hashlib.sha256(der).hexdigest()

    def check(self) -> VerifyKey:
        """Return itself if the PEM holds a P-256 key.

        Raises:
            RejectedError: AG-KEY-001.
        """
        _ = self._key
        return self

    def verify(self, signature: bytes, message: bytes) -> None:
        """Verify a DER-encoded ECDSA signature.

        Raises:
            RejectedError: AG-KEY-002 if the signature does not fit.
        """
        try:
            self._key.verify(signature, message, _ECDSA)
        except InvalidSignature as error:
            raise RejectedError("AG-KEY-002", f"no signature by {self.key_id[:16]}") from error


class SigningKey:
    """A P-256 private key; `public` is its other half."""

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        self._key = key
        pem = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        self.public = VerifyKey(pem.decode("ascii"))

    @classmethod
    def generate(cls) -> SigningKey:
        """Make a fresh key."""
        return cls(ec.generate_private_key(ec.SECP256R1()))

    @classmethod
    def from_pem(cls, pem: bytes) -> SigningKey:
        """Read an unencrypted PKCS#8 PEM.

        Raises:
            RejectedError: AG-KEY-001.
        """
        key = _load_private_pem(pem)
        if key.curve.name != "secp256r1":
            raise RejectedError("AG-KEY-001", "the signing key is not ECDSA P-256")
        return cls(key)

    def to_pem(self) -> bytes:
        """Unencrypted PKCS#8 PEM; the caller protects the file."""
        return _private_pem(self._key, serialization.PrivateFormat.PKCS8)

    def sign(self, message: bytes) -> bytes:
        """Sign with ECDSA P-256 and SHA-256; DER-encoded."""
        return self._key.sign(message, _ECDSA)


@dataclass(frozen=True)
class SealingPublicKey:
    """An X-Wing public key: 1184 bytes of ML-KEM-768, then 32 bytes of X25519."""

    raw: bytes

    @cached_property
    def hpke(self) -> MLKEM768X25519PublicKey:
        """The key as the HPKE suite takes it.

        Raises:
            RejectedError: AG-KEY-001 if the bytes are no such key.
        """
        if len(self.raw) != _SEALING_PUBLIC_BYTES:
            raise RejectedError("AG-KEY-001", f"a sealing key has {len(self.raw)} bytes, not 1216")
        try:
            return MLKEM768X25519PublicKey(
                mlkem.MLKEM768PublicKey.from_public_bytes(self.raw[:1184]),
                x25519.X25519PublicKey.from_public_bytes(self.raw[1184:]),
            )
        except ValueError as error:
            raise RejectedError("AG-KEY-001", "a sealing key is not an X-Wing key") from error

    @cached_property
    def key_id(self) -> str:
        """SHA-256 (hex) of the raw key."""
        return hashlib.sha256(self.raw).hexdigest()


class SealingKey:
    """An X-Wing private key, which is a 32-byte seed (draft-connolly-cfrg-xwing-kem)."""

    def __init__(self, seed: bytes) -> None:
        if len(seed) != 32:
            raise RejectedError("AG-KEY-001", f"a sealing key seed has {len(seed)} bytes, not 32")
        # The draft expands the seed with SHAKE-256 to d || z (ML-KEM) and the X25519 scalar.
        expanded = hashlib.shake_256(seed).digest(96)
        lattice = mlkem.MLKEM768PrivateKey.from_seed_bytes(expanded[:64])
        curve = x25519.X25519PrivateKey.from_private_bytes(expanded[64:])
        self.seed = seed
        self.hpke = MLKEM768X25519PrivateKey(lattice, curve)
        self.public = SealingPublicKey(
            lattice.public_key().public_bytes_raw() + curve.public_key().public_bytes_raw()
        )

    @classmethod
    def generate(cls) -> SealingKey:
        """Make a fresh key."""
        return cls(secrets.token_bytes(32))


class NodeKey:
    """The key by which the SuperLink recognises a site's SuperNode. It protects no content."""

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        self._key = key

    @classmethod
    def generate(cls) -> NodeKey:
        """Make a fresh key."""
        return cls(ec.generate_private_key(ec.SECP384R1()))

    @classmethod
    def from_openssh(cls, content: bytes) -> NodeKey:
        """Read the OpenSSH private key file that `flower-supernode` takes.

        Raises:
            RejectedError: AG-KEY-001.
        """
        try:
            key = serialization.load_ssh_private_key(content, password=None)
        except (ValueError, UnsupportedAlgorithm) as error:
            raise RejectedError("AG-KEY-001", "the node key is not an OpenSSH key") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise RejectedError("AG-KEY-001", "the node key is not an elliptic-curve key")
        return cls(key)

    def to_openssh(self) -> bytes:
        """The private key file for `flower-supernode` (it supports no passphrase)."""
        return _private_pem(self._key, serialization.PrivateFormat.OpenSSH)

    @property
    def public_openssh(self) -> str:
        """The one-line public key that the SuperLink registers."""
        public = self._key.public_key().public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
        return public.decode("ascii")

    @property
    def public_pem(self) -> str:
        """The public key in PEM, as the SuperLink reports it."""
        return node_key_pem(self.public_openssh)

    def sign(self, message: bytes) -> bytes:
        """Prove possession of the key in an enrolment request."""
        return self._key.sign(message, _ECDSA)


def node_key_pem(public_openssh: str) -> str:
    """A node's public key line as PEM.

    Raises:
        RejectedError: AG-KEY-001.
    """
    return (
        _load_node_public(public_openssh)
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        .decode("ascii")
    )


def verify_node_signature(public_openssh: str, signature: bytes, message: bytes) -> None:
    """Check the proof of possession of a node key.

    Raises:
        RejectedError: AG-KEY-001 malformed key, AG-KEY-002 wrong signature.
    """
    try:
        _load_node_public(public_openssh).verify(signature, message, _ECDSA)
    except InvalidSignature as error:
        raise RejectedError("AG-KEY-002", "the node key did not sign this request") from error


def _load_node_public(public_openssh: str) -> ec.EllipticCurvePublicKey:
    try:
        key = serialization.load_ssh_public_key(public_openssh.encode("ascii"))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise RejectedError("AG-KEY-001", "a node key is not an OpenSSH public key") from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise RejectedError("AG-KEY-001", "a node key is not an elliptic-curve key")
    return key


def _load_private_pem(pem: bytes) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise RejectedError("AG-KEY-001", "a key file is not an unencrypted PEM key") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise RejectedError("AG-KEY-001", "a key file holds no elliptic-curve key")
    return key


def _private_pem(
    key: ec.EllipticCurvePrivateKey, private_format: serialization.PrivateFormat
) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, private_format, serialization.NoEncryption()
    )
