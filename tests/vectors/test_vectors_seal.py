# SPDX-License-Identifier: Apache-2.0
"""Public vectors of the sealing suite: Wycheproof streams, RFC 9180, X-Wing."""

import hashlib
import io
import json
import zlib

import pytest
from cryptography.hazmat.bindings._rust import openssl
from cryptography.hazmat.primitives.asymmetric import ec, x25519
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from allograft.crypto import seal
from allograft.crypto.keys import SealingKey
from allograft.errors import RejectedError
from kit.shared import shared_path

KEMS = {16: KEM.P256, 18: KEM.P521, 32: KEM.X25519, 25722: KEM.MLKEM768_X25519}
KDFS = {1: KDF.HKDF_SHA256, 3: KDF.HKDF_SHA512, 17: KDF.SHAKE256}
AEADS = {1: AEAD.AES_128_GCM, 2: AEAD.AES_256_GCM, 3: AEAD.CHACHA20_POLY1305}
CURVES = {16: ec.SECP256R1(), 18: ec.SECP521R1()}


def wycheproof():
    path = "vectors/wycheproof/testvectors_v1/c2sp_chunked_encryption_aes_256_gcm_test.json"
    document = json.loads(shared_path(path).read_text())
    return [test for group in document["testGroups"] for test in group["tests"]]


def open_all(ciphertext, key, context):
    sink = io.BytesIO()
    seal.open_stream(io.BytesIO(ciphertext), sink, key, context, max_plain_bytes=len(ciphertext))
    return sink.getvalue()


def test_wycheproof_streams():
    results = []
    for test in wycheproof():
        ciphertext = zlib.decompress(bytes.fromhex(test["ct"]))
        key, context = bytes.fromhex(test["key"]), bytes.fromhex(test["ctx"])
        if test["result"] == "invalid":
            with pytest.raises(RejectedError, match="AG-SEA-001"):
                open_all(ciphertext, key, context)
        else:
            plain = open_all(ciphertext, key, context)
            assert hashlib.sha512(plain).hexdigest() == test["msgSha512"]
            assert seal.sealed_size(len(plain)) == len(ciphertext)
        results.append(test["result"])
    assert (results.count("valid"), results.count("invalid")) == (10, 25)


def private_key(vector):
    raw = bytes.fromhex(vector["skRm"])
    if vector["kem_id"] == 32:
        return x25519.X25519PrivateKey.from_private_bytes(raw)
    if vector["kem_id"] == 25722:
        return SealingKey(raw).hpke
    return ec.derive_private_key(int.from_bytes(raw, "big"), CURVES[vector["kem_id"]])


def run_hpke(name, is_wanted):
    vectors = json.loads(shared_path(f"vectors/pyca/HPKE/{name}").read_text())
    count = 0
    for vector in filter(is_wanted, vectors):
        suite = Suite(KEMS[vector["kem_id"]], KDFS[vector["kdf_id"]], AEADS[vector["aead_id"]])
        first = vector["encryptions"][0]
        # Our wraps have no associated data, the vectors do; pyca keeps that call private.
        plain = openssl.hpke._decrypt_with_aad(
            suite,
            bytes.fromhex(vector["enc"] + first["ct"]),
            private_key(vector),
            info=bytes.fromhex(vector["info"]),
            aad=bytes.fromhex(first["aad"]),
        )
        assert plain.hex() == first["pt"]
        count += 1
    return count


def test_rfc_9180_base_mode():
    def is_wanted(v):
        return v["mode"] == 0 and v["kem_id"] in KEMS and v["aead_id"] in AEADS

    assert run_hpke("test-vectors.json", is_wanted) == 18


def test_x_wing_key_is_the_drafts_seed():
    vectors = json.loads(shared_path("vectors/pyca/HPKE/hpke-pq-test-vectors.json").read_text())
    ours = [vector for vector in vectors if vector["kem_id"] == 25722]
    assert len(ours) == 2
    for vector in ours:
        assert SealingKey(bytes.fromhex(vector["skRm"])).public.raw.hex() == vector["pkRm"]


def test_x_wing_opens_the_drafts_messages():
    assert run_hpke("hpke-pq-test-vectors.json", lambda v: v["kem_id"] == 25722) == 2
