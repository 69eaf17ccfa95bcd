# SPDX-License-Identifier: Apache-2.0
"""Claims about private key files and the coordinator's certificates."""

import os
import ssl
import stat
from datetime import UTC, datetime

import pytest
from cryptography import x509
from cryptography.x509 import verification

from allograft.crypto import keystore, tls
from allograft.crypto.keys import NodeKey, SealingKey, SigningKey
from allograft.crypto.notekey import NoteKey
from allograft.errors import RejectedError, UnavailableError

NOW = datetime(2026, 11, 23, 8, 0, 0, tzinfo=UTC)


def test_every_kind_of_key_survives_its_file(tmp_path):
    signing, sealing, note, node = (
        k.generate() for k in (SigningKey, SealingKey, NoteKey, NodeKey)
    )
    keystore.write_signing_key(tmp_path / "a", signing)
    keystore.write_sealing_key(tmp_path / "b", sealing)
    keystore.write_note_key(tmp_path / "c", note)
    keystore.write_node_key(tmp_path / "d", node)
    assert keystore.read_signing_key(tmp_path / "a").public == signing.public
    assert keystore.read_sealing_key(tmp_path / "b").public == sealing.public
    assert keystore.read_note_key(tmp_path / "c").public.raw == note.public.raw
    assert keystore.read_node_key(tmp_path / "d").public_openssh == node.public_openssh
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_refuses_key_files_that_others_can_read(tmp_path, mode):
    path = tmp_path / "key"
    keystore.write_signing_key(path, SigningKey.generate())
    path.chmod(mode)
    with pytest.raises(RejectedError) as caught:
        keystore.read_signing_key(path)
    assert caught.value.code == "AG-KEY-004"


def test_refuses_links_and_special_files(tmp_path):
    keystore.write_signing_key(tmp_path / "key", SigningKey.generate())
    (tmp_path / "link").symlink_to(tmp_path / "key")
    os.mkfifo(tmp_path / "pipe", 0o600)
    (tmp_path / "folder").mkdir(mode=0o700)
    for name in ("link", "pipe", "folder"):
        with pytest.raises(RejectedError) as caught:
            keystore.read_signing_key(tmp_path / name)
        assert caught.value.code == "AG-KEY-004"


def test_never_overwrites_a_key(tmp_path):
    keystore.write_private(tmp_path / "key", b"first")
    with pytest.raises(RejectedError) as caught:
        keystore.write_private(tmp_path / "key", b"second")
    assert caught.value.code == "AG-KEY-004"
    assert (tmp_path / "key").read_bytes() == b"first"


def test_a_missing_key_is_an_incomplete_state_directory(tmp_path):
    with pytest.raises(UnavailableError) as caught:
        keystore.read_signing_key(tmp_path / "none")
    assert caught.value.code == "AG-STO-003"


def test_one_seed_never_serves_two_purposes(tmp_path):
    keystore.write_note_key(tmp_path / "witness.key", NoteKey.generate())
    with pytest.raises(RejectedError) as caught:
        keystore.read_sealing_key(tmp_path / "witness.key")
    assert caught.value.code == "AG-KEY-001"


@pytest.mark.parametrize("content", [b"", b"allograft-sealing-key-v1 " + b"zz" * 32, bytes(20_000)])
def test_refuses_malformed_seed_files(tmp_path, content):
    keystore.write_private(tmp_path / "key", content)
    with pytest.raises(RejectedError) as caught:
        keystore.read_sealing_key(tmp_path / "key")
    assert caught.value.code == "AG-KEY-001"


def test_certificate_is_accepted_for_its_hosts_only():
    authority = tls.make_authority("consortium", NOW)
    server = tls.make_server_certificate(authority, ("relay.example", "192.0.2.7"), NOW)
    root = x509.load_pem_x509_certificate(authority.certificate_pem)
    leaf = x509.load_pem_x509_certificate(server.certificate_pem)
    builder = verification.PolicyBuilder().store(verification.Store([root])).time(NOW)
    builder.build_server_verifier(x509.DNSName("relay.example")).verify(leaf, [])
    with pytest.raises(verification.VerificationError):
        builder.build_server_verifier(x509.DNSName("other.example")).verify(leaf, [])
    other = x509.load_pem_x509_certificate(tls.make_authority("x", NOW).certificate_pem)
    strange = verification.PolicyBuilder().store(verification.Store([other])).time(NOW)
    with pytest.raises(verification.VerificationError):
        strange.build_server_verifier(x509.DNSName("relay.example")).verify(leaf, [])


def test_certificate_loads_into_a_tls_server(tmp_path):
    authority = tls.make_authority("consortium", NOW)
    server = tls.make_server_certificate(authority, ("127.0.0.1",), NOW)
    (tmp_path / "cert").write_bytes(server.certificate_pem)
    (tmp_path / "key").write_bytes(server.key_pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    client = ssl.create_default_context(cadata=authority.certificate_pem.decode())
    assert client.cert_store_stats()["x509_ca"] == 1


def test_refuses_a_ca_key_of_another_ca():
    first, second = tls.make_authority("a", NOW), tls.make_authority("b", NOW)
    mixed = tls.Authority(first.certificate_pem, second.key_pem)
    with pytest.raises(RejectedError) as caught:
        tls.make_server_certificate(mixed, ("a",), NOW)
    assert caught.value.code == "AG-KEY-001"


def test_public_keys_are_added_once_and_in_order(tmp_path):
    path, keys = tmp_path / "known", [SigningKey.generate().public for _ in range(3)]
    assert keystore.read_verify_keys(path) == ()
    for key in (*keys, keys[0]):
        keystore.add_verify_key(path, key)
    assert [key.key_id for key in keystore.read_verify_keys(path)] == [key.key_id for key in keys]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("damage", [b"x", b"-----END PUBLIC KEY-----\n", b"\xff"])
def test_refuses_a_damaged_file_of_public_keys(tmp_path, damage):
    path = tmp_path / "known"
    keystore.add_verify_key(path, SigningKey.generate().public)
    path.write_bytes(path.read_bytes() + damage)
    with pytest.raises(RejectedError, match="AG-KEY-001"):
        keystore.read_verify_keys(path)
    path.chmod(0o644)
    with pytest.raises(RejectedError, match="AG-KEY-004"):
        keystore.read_verify_keys(path)
