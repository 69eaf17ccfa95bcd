# SPDX-License-Identifier: Apache-2.0
"""Claims about signed envelopes and the keys under them."""

import base64
import json

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from allograft.crypto import canonical, dsse, keys
from allograft.crypto.keys import NodeKey, SealingKey, SealingPublicKey, SigningKey, VerifyKey
from allograft.errors import RejectedError

ALICE, BOB, CAROL = (SigningKey.generate() for _ in range(3))
TYPE = "application/vnd.example+json"


def refused(call, *args, **kwargs):
    with pytest.raises(RejectedError) as caught:
        call(*args, **kwargs)
    return caught.value.code


def test_returns_the_signed_payload_and_its_signers():
    content = dsse.sign(b"payload", TYPE, [ALICE, BOB]).to_bytes()
    verified = dsse.verify(content, TYPE, [BOB.public, ALICE.public, CAROL.public], threshold=2)
    assert verified.payload == b"payload"
    assert set(verified.signers) == {ALICE.public, BOB.public}


def test_one_key_never_counts_twice():
    content = dsse.sign(b"payload", TYPE, [ALICE, ALICE, ALICE]).to_bytes()
    keyring = [ALICE.public, VerifyKey(ALICE.public.pem), BOB.public]
    assert refused(dsse.verify, content, TYPE, keyring, threshold=2) == "AG-SIG-003"


def test_zero_signatures_are_never_enough():
    content = dsse.sign(b"payload", TYPE, [ALICE]).to_bytes()
    assert refused(dsse.verify, content, TYPE, [], threshold=0) == "AG-SIG-003"
    assert refused(dsse.verify, content, TYPE, [BOB.public], threshold=0) == "AG-SIG-003"


def test_unknown_signatures_beside_a_valid_one_are_ignored():
    envelope = dsse.sign(b"payload", TYPE, [ALICE])
    other = dsse.Envelope(b"payload", TYPE, (bytes(3309), *envelope.signatures))
    assert dsse.verify(other.to_bytes(), TYPE, [ALICE.public]).signers == (ALICE.public,)


def test_the_key_id_is_a_hint_that_nothing_rests_on():
    value = json.loads(dsse.sign(b"payload", TYPE, [ALICE]).to_bytes())
    value["signatures"][0]["keyid"] = BOB.public.key_id
    content = json.dumps(value).encode()
    assert dsse.verify(content, TYPE, [ALICE.public]).payload == b"payload"
    assert refused(dsse.verify, content, TYPE, [BOB.public]) == "AG-SIG-003"


def test_type_and_payload_cannot_be_exchanged():
    envelope = dsse.sign(b"payload", TYPE, [ALICE])
    retyped = dsse.Envelope(envelope.payload, "text/plain", envelope.signatures)
    assert refused(dsse.verify, envelope, "text/plain", [ALICE.public]) == "AG-SIG-002"
    assert refused(dsse.verify, retyped, "text/plain", [ALICE.public]) == "AG-SIG-003"
    changed = dsse.Envelope(b"payloaD", TYPE, envelope.signatures)
    assert refused(dsse.verify, changed, TYPE, [ALICE.public]) == "AG-SIG-003"


def envelope_json(**changes):
    value = json.loads(dsse.sign(b"payload", TYPE, [ALICE]).to_bytes())
    return json.dumps({**value, **changes}).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[]", b"{}", b"\x80\x04",
        envelope_json(extra=1),
        envelope_json(payload="*"),
        envelope_json(payload="cGF5bG9hZA"),
        envelope_json(payload=1),
        envelope_json(payload="cGF5\nbG9hZA=="),
        envelope_json(payload="é"),
        envelope_json(payloadType=None),
        envelope_json(signatures=[]),
        envelope_json(signatures=[{"sig": "AAAA"}] * 9),
        envelope_json(signatures=[{"sig": "AAAA", "cert": "x"}]),
        envelope_json(signatures=[{"keyid": "x"}]),
        envelope_json(signatures={"sig": "AAAA"}),
    ],
)  # fmt: skip
def test_refuses_malformed_envelopes(content):
    assert refused(dsse.verify, content, TYPE, [ALICE.public]) == "AG-SIG-001"


def test_an_envelope_survives_its_bytes():
    envelope = dsse.sign("é".encode(), TYPE, [ALICE, BOB])
    assert dsse.Envelope.from_bytes(envelope.to_bytes()) == envelope
    assert canonical.dumps(canonical.loads(envelope.to_bytes())) == envelope.to_bytes()


def test_signing_keys_survive_their_pem():
    again = SigningKey.from_pem(ALICE.to_pem())
    assert again.public == ALICE.public
    ALICE.public.check().verify(again.sign(b"x"), b"x")


def pem_of(key):
    return key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


@pytest.mark.parametrize(
    "pem",
    [
        "", "x", "é", ALICE.to_pem().decode(),
        pem_of(ec.generate_private_key(ec.SECP384R1())).decode(),
        pem_of(ed25519.Ed25519PrivateKey.generate()).decode(),
    ],
)  # fmt: skip
def test_only_p256_keys_sign(pem):
    assert refused(VerifyKey(pem).check) == "AG-KEY-001"


@pytest.mark.parametrize("pem", [b"", b"x", ALICE.public.pem.encode()])
def test_refuses_malformed_private_keys(pem):
    assert refused(SigningKey.from_pem, pem) == "AG-KEY-001"


def test_refuses_private_keys_of_another_curve():
    p384 = ec.generate_private_key(ec.SECP384R1()).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    assert refused(SigningKey.from_pem, p384) == "AG-KEY-001"
    locked = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    assert refused(SigningKey.from_pem, locked) == "AG-KEY-001"


def test_sealing_keys_are_their_seed():
    key = SealingKey(bytes(32))
    assert SealingKey(key.seed).public == key.public
    assert len(key.public.raw) == 1216
    assert SealingPublicKey(key.public.raw).key_id == key.public.key_id


@pytest.mark.parametrize("raw", [b"", bytes(1215), b"\xff" * 1216])
def test_refuses_malformed_sealing_keys(raw):
    assert refused(lambda: SealingPublicKey(raw).hpke) == "AG-KEY-001"


@pytest.mark.parametrize("seed", [b"", bytes(31), bytes(64)])
def test_refuses_seeds_of_another_length(seed):
    assert refused(SealingKey, seed) == "AG-KEY-001"


def test_node_keys_survive_openssh_and_prove_possession():
    key = NodeKey.generate()
    again = NodeKey.from_openssh(key.to_openssh())
    assert again.public_openssh == key.public_openssh
    assert key.public_openssh.startswith("ecdsa-sha2-nistp384 ")
    assert key.public_pem == keys.node_key_pem(key.public_openssh)
    keys.verify_node_signature(key.public_openssh, key.sign(b"request"), b"request")
    assert refused(
        keys.verify_node_signature, key.public_openssh, key.sign(b"request"), b"other"
    ) == "AG-KEY-002"  # fmt: skip
    for text in ("", "ssh-rsa AAAA", "é"):
        assert refused(keys.node_key_pem, text) == "AG-KEY-001"
    assert refused(NodeKey.from_openssh, base64.b64encode(b"x")) == "AG-KEY-001"
