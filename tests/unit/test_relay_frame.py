# SPDX-License-Identifier: Apache-2.0
"""Claims about signed frames: what they bind, and what they refuse."""

import secrets
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from allograft.crypto import canonical, dsse
from allograft.crypto.keys import SigningKey
from allograft.errors import RejectedError
from allograft.relay import frame
from allograft.relay.frame import Header, SignedFrame

NOW = datetime(2026, 11, 23, 8, 0, 0, tzinfo=UTC)
KEY = SigningKey.generate()
CALL = Header(secrets.token_hex(16), "take", "consortium", "hospital-a", "call", NOW, "a" * 64, 3)
SIGNED = frame.sign_frame(CALL, b"body", KEY)


def refused(signed, me="hospital-a", now=NOW, key=KEY):
    with pytest.raises(RejectedError) as caught:
        frame.verify_frame(signed, (key.public,), me, now)
    return caught.value.code


def test_returns_the_signed_header():
    assert frame.verify_frame(SIGNED, (KEY.public,), "hospital-a", NOW) == CALL
    assert frame.peek_sender(SIGNED) == "consortium"


def test_refuses_a_frame_of_another_signer():
    assert refused(SIGNED, key=SigningKey.generate()) == "AG-RLY-002"


def test_refuses_a_signature_of_another_type():
    payload = dsse.Envelope.from_bytes(SIGNED.envelope).payload
    envelope = dsse.sign(payload, dsse.IN_TOTO, [KEY]).to_bytes()
    assert refused(SignedFrame(envelope, b"body")) == "AG-RLY-002"


def test_refuses_a_frame_for_someone_else():
    assert refused(SIGNED, me="bank-c") == "AG-RLY-003"


@pytest.mark.parametrize("age", [timedelta(hours=1, seconds=1), timedelta(hours=-1, seconds=-1)])
def test_refuses_stale_and_future_frames(age):
    assert refused(SIGNED, now=NOW + age) == "AG-RLY-004"


def test_accepts_frames_at_the_edge_of_their_hour():
    for age in (timedelta(hours=1), timedelta(hours=-1)):
        frame.verify_frame(SIGNED, (KEY.public,), "hospital-a", NOW + age)


@pytest.mark.parametrize("body", [b"", b"bodY", b"body "])
def test_refuses_another_body(body):
    assert refused(replace(SIGNED, body=body)) == "AG-RLY-005"


@pytest.mark.parametrize(
    "change",
    [{"v": 2}, {"method": "train"}, {"status": "maybe"}, {"time": "now"}, {"part": -1}, {"from": 1},
     {"extra": 1}, {"item": None}],
)  # fmt: skip
def test_refuses_signed_but_malformed_headers(change):
    value = canonical.loads(dsse.Envelope.from_bytes(SIGNED.envelope).payload)
    payload = canonical.dumps({**value, **change})
    envelope = dsse.sign(payload, frame.PAYLOAD_TYPE, [KEY]).to_bytes()
    assert refused(SignedFrame(envelope, b"body")) == "AG-RLY-001"


def test_refuses_bytes_that_are_no_envelope():
    assert refused(SignedFrame(b"\x80", b"body")) == "AG-RLY-002"


ANSWER = replace(CALL, sender="hospital-a", recipient="consortium", status="ok")


def test_accepts_the_answer_to_a_call():
    frame.check_answer(CALL, ANSWER)
    frame.check_answer(CALL, replace(ANSWER, status="refused", code="AG-RLY-006"))


@pytest.mark.parametrize(
    "change",
    [{"call": "0" * 32}, {"method": "put"}, {"sender": "bank-c"}, {"recipient": "bank-c"},
     {"item": "b" * 64}, {"part": 4}, {"status": "call"}],
)  # fmt: skip
def test_refuses_answers_to_other_calls(change):
    with pytest.raises(RejectedError) as caught:
        frame.check_answer(CALL, replace(ANSWER, **change))
    assert caught.value.code == "AG-RLY-003"


def test_a_call_echoed_back_is_no_answer():
    with pytest.raises(RejectedError) as caught:
        frame.check_answer(CALL, CALL)
    assert caught.value.code == "AG-RLY-003"
