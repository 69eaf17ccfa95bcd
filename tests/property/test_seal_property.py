# SPDX-License-Identifier: Apache-2.0
"""For any input: seals open to what was sealed, damage is refused, JSON has one form."""

import json

import pytest
from hypothesis import given, settings, strategies as st

from allograft.crypto import canonical, dsse, seal
from allograft.crypto.keys import SigningKey
from allograft.errors import RejectedError

KEY = SigningKey.generate()
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
NUMBERS = st.integers(-(2**53) + 1, 2**53 - 1) | st.floats(
    -1e300, 1e300, allow_nan=False, allow_subnormal=False
).filter(lambda number: not 2**53 <= abs(number) < 1e21)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


@given(st.binary(max_size=40_000), st.binary(max_size=64), st.binary(min_size=32, max_size=32))
@settings(deadline=None, max_examples=60)
def test_seals_open_to_what_was_sealed(plain, context, key):
    sealed = seal.seal_bytes(plain, key, context)
    assert len(sealed) == seal.sealed_size(len(plain))
    assert seal.open_bytes(sealed, key, context) == plain


@given(st.binary(max_size=20_000), st.data())
@settings(deadline=None, max_examples=80)
def test_no_damage_goes_unnoticed(plain, data):
    sealed = bytearray(seal.seal_bytes(plain, bytes(32), b"context"))
    place = data.draw(st.integers(0, len(sealed) - 1))
    edit = data.draw(st.sampled_from(["flip", "cut", "double"]))
    if edit == "flip":
        sealed[place] ^= 1 << data.draw(st.integers(0, 7))
    elif edit == "cut":
        del sealed[place:]
    else:
        sealed[place:place] = sealed[place : place + 1]
    with pytest.raises(RejectedError):
        seal.open_bytes(bytes(sealed), bytes(32), b"context")


@given(VALUES)
@settings(deadline=None)
def test_canonical_json_is_a_fixed_point(value):
    content = canonical.dumps(value)
    assert canonical.dumps(canonical.loads(content)) == content


@given(st.binary(max_size=60) | VALUES.map(lambda value: json.dumps(value).encode()))
@settings(deadline=None)
def test_what_is_read_strictly_is_read_equally_by_others(content):
    try:
        value = canonical.loads(content)
    except RejectedError:
        return
    assert value == json.loads(content)
    json.dumps(value, allow_nan=False).encode()


@given(st.binary(max_size=200), st.integers(0, 1 << 20), st.integers(0, 7))
@settings(deadline=None, max_examples=60)
def test_no_changed_envelope_verifies(payload, place, bit):
    envelope = dsse.sign(payload, dsse.IN_TOTO, [KEY])
    content = bytearray(envelope.to_bytes())
    # Signatures differ in length from run to run, so the place is taken modulo.
    content[place % len(content)] ^= 1 << bit
    try:
        verified = dsse.verify(bytes(content), dsse.IN_TOTO, [KEY.public])
    except RejectedError:
        return
    # A change of the hint or of unused base64 bits leaves payload and signature as they were.
    assert (verified.payload, verified.signers) == (payload, (KEY.public,))
