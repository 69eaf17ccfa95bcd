# SPDX-License-Identifier: Apache-2.0
"""The coordinator's own certificate authority, for TLS alone.

Sites pin the CA certificate through their invitation and the roster, so no public authority is
involved. TLS only hides who talks to whom: every content that crosses it is signed and sealed
besides. P-256, because the X.509 verifier of `cryptography` forbids Ed25519.
"""

from __future__ import annotations

import ipaddress
import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from allograft.errors import RejectedError

_CA_DAYS = 3650
# Longer than browsers like, but no browser is a client here and renewal needs the offline CA key.
_SERVER_DAYS = 825
_CLOCK_SKEW = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Authority:
    """A certificate authority: its certificate is public, its key stays offline or 0600."""

    certificate_pem: bytes
    key_pem: bytes


@dataclass(frozen=True, slots=True)
class ServerCertificate:
    """A server's certificate and key."""

    certificate_pem: bytes
    key_pem: bytes


def make_authority(coordinator: str, now: datetime) -> Authority:
    """Make the private CA of a coordinator.

    Args:
        coordinator: The coordinator's id, for the subject name.
        now: The current time (UTC).
    """
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name(f"allograft CA of {coordinator}")
    builder = _builder(name, name, key.public_key(), now, _CA_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_key_usage(authority=True), critical=True)
    certificate = builder.sign(key, hashes.SHA256())
    return Authority(_certificate_pem(certificate), _key_pem(key))


def make_server_certificate(
    authority: Authority, hosts: tuple[str, ...], now: datetime
) -> ServerCertificate:
    """Issue a server certificate.

    Args:
        authority: The CA that signs.
        hosts: DNS names and IP addresses by which clients reach the server; at least one.
        now: The current time (UTC).

    Raises:
        RejectedError: AG-KEY-001 if the CA is malformed, AG-IN-003 if a host is no name.
    """
    issuer, issuer_key = _load_authority(authority)
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(_name(hosts[0]), issuer.subject, key.public_key(), now, _SERVER_DAYS)
    builder = builder.add_extension(
        x509.SubjectAlternativeName([_alternative_name(host) for host in hosts]), critical=False
    )
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
    builder = builder.add_extension(_key_usage(authority=False), critical=True)
    builder = builder.add_extension(
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False
    )
    builder = builder.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False
    )
    return ServerCertificate(
        _certificate_pem(builder.sign(issuer_key, hashes.SHA256())), _key_pem(key)
    )


def _load_authority(
    authority: Authority,
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    try:
        certificate = x509.load_pem_x509_certificate(authority.certificate_pem)
        key = serialization.load_pem_private_key(authority.key_pem, password=None)
    except (ValueError, TypeError) as error:
        raise RejectedError("AG-KEY-001", "the CA files are not PEM") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise RejectedError("AG-KEY-001", "the CA key is not an elliptic-curve key")
    if key.public_key() != certificate.public_key():
        raise RejectedError("AG-KEY-001", "the CA key does not belong to the CA certificate")
    return certificate, key


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    now: datetime,
    days: int,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(int.from_bytes(secrets.token_bytes(19), "big") | 1)
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common_name: str) -> x509.Name:
    # A common name has at most 64 characters; clients match the alternative names anyway.
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])])


def _alternative_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError as error:
        raise RejectedError(
            "AG-IN-003", "a host is neither a DNS name nor an IP address"
        ) from error


def _certificate_pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
