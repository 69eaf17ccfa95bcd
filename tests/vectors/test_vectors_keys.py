# SPDX-License-Identifier: Apache-2.0
"""Public vectors of signatures and keys: CCTV Ed25519 points, Wycheproof ECDSA P-256, DSSE."""

import json
import re

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, utils
from nacl import bindings

from allograft.crypto import canonical, dsse
from allograft.crypto.keys import SigningKey, VerifyKey
from allograft.crypto.notekey import NoteKey, NotePublicKey, check_point
from allograft.errors import RejectedError
from kit.shared import shared_path


def cctv():
    return json.loads(shared_path("vectors/cctv/ed25519/ed25519vectors.json").read_text())


def is_usable(raw: bytes) -> bool:
    try:
        check_point(raw)
    except RejectedError:
        return False
    return True


def test_low_order_and_non_canonical_keys_are_refused():
    bad = {"low_order_A", "non_canonical_A"}
    judged = {vector["key"]: bool(bad & set(vector["flags"] or [])) for vector in cctv()}
    assert sum(judged.values()) >= 14
    for key, is_bad in judged.items():
        assert is_usable(bytes.fromhex(key)) != is_bad, key


def test_point_check_agrees_with_libsodium_where_it_must():
    """libsodium also asks for the prime-order subgroup; whatever it accepts we accept."""
    keys = {bytes.fromhex(vector["key"]) for vector in cctv()}
    for raw in keys:
        if bindings.crypto_core_ed25519_is_valid_point(raw):
            assert is_usable(raw)


@pytest.mark.parametrize("raw", [b"", bytes(31), bytes(33), b"\xff" * 32, b"\x02" + bytes(31)])
def test_bytes_that_are_no_point_are_refused(raw):
    with pytest.raises(RejectedError) as caught:
        NotePublicKey(raw)
    assert caught.value.code == "AG-KEY-003"


def test_generated_keys_pass_the_check_and_their_signatures_verify():
    for _ in range(20):
        key = NoteKey.generate()
        key.public.verify(key.sign(b"note"), b"note")
        with pytest.raises(RejectedError) as caught:
            key.public.verify(key.sign(b"note"), b"other")
        assert caught.value.code == "AG-KEY-002"


def test_wycheproof_ecdsa_p256():
    path = "vectors/wycheproof/testvectors_v1/ecdsa_secp256r1_sha256_test.json"
    groups = json.loads(shared_path(path).read_text())["testGroups"]
    count = 0
    for group in groups:
        key = VerifyKey(group["publicKeyPem"])
        for test in group["tests"]:
            try:
                key.verify(bytes.fromhex(test["sig"]), bytes.fromhex(test["msg"]))
            except RejectedError:
                assert test["result"] == "invalid", test["comment"]
            else:
                assert test["result"] == "valid", test["comment"]
            count += 1
    assert count > 400


def dsse_document():
    text = shared_path("vectors/dsse-protocol.md").read_text()
    x, y, secret = (int(re.search(rf"^{n}: (\d+)$", text, re.M)[1]) for n in "XYd")
    envelope = re.search(r'^\{"payload": .*?\]\}$', text, re.M | re.S)[0]
    return ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()), secret, envelope.encode()


def test_dsse_pre_authentication_encoding():
    text = shared_path("vectors/dsse-protocol.md").read_text()
    expected = re.search(r"^DSSEv1 29 .*$", text, re.M)[0].encode()
    assert dsse.pae("http://example.com/HelloWorld", b"hello world") == expected
    assert dsse.pae("é", "é".encode()) == b"DSSEv1 2 \xc3\xa9 2 \xc3\xa9"


def test_dsse_vector_verifies_once_its_raw_signature_is_in_der():
    numbers, secret, content = dsse_document()
    key = SigningKey(ec.EllipticCurvePrivateNumbers(secret, numbers).private_key())
    envelope = dsse.Envelope.from_bytes(content)
    raw = envelope.signatures[0]
    der = utils.encode_dss_signature(int.from_bytes(raw[:32]), int.from_bytes(raw[32:]))
    whole = dsse.Envelope(envelope.payload, envelope.payload_type, (der,))
    verified = dsse.verify(whole, "http://example.com/HelloWorld", [key.public])
    assert verified.payload == b"hello world"
    assert canonical.loads(content)["payloadType"] == envelope.payload_type
