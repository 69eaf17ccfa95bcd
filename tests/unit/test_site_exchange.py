# SPDX-License-Identifier: Apache-2.0
"""The site answers only fresh calls of its coordinator, each test breaking one rule."""

import hashlib
from dataclasses import replace
from datetime import timedelta

import pytest

from allograft.crypto.keys import SigningKey
from allograft.errors import RejectedError
from allograft.relay.frame import SignedFrame, sign_frame, verify_frame
from allograft.relay.poll import PollCall
from kit.coordinator import HOUR, NOW, SiteKit, forged

POLL = PollCall().to_bytes()


@pytest.fixture
def site(tmp_path):
    kit = SiteKit(tmp_path)
    kit.outbox.add("receipt", {"receipt.json": b"{}"})
    yield kit
    kit.store.close()


def refused(site, frame: SignedFrame) -> str:
    with pytest.raises(RejectedError) as error:
        site.exchange.answer(frame)
    return error.value.code


def test_signs_an_answer_that_is_bound_to_its_call(site):
    header, _ = site.call("poll", POLL)
    assert (header.status, header.method) == ("ok", "poll")


def test_refuses_a_call_signed_by_a_stranger(site):
    assert refused(site, sign_frame(site.header(), POLL, SigningKey.generate())) == "AG-RLY-002"


def test_refuses_a_call_by_another_enrolled_site(site):
    other = SigningKey.generate()
    site.roster.keys["hospital-b"] = other.public
    frame = sign_frame(site.header(sender="hospital-b"), POLL, other)
    assert refused(site, frame) == "AG-RLY-002"


def test_refuses_a_coordinator_that_left_the_roster(site):
    del site.roster.keys["consortium"]
    assert refused(site, sign_frame(site.header(), POLL, site.coordinator)) == "AG-SIG-003"


def test_refuses_a_call_for_another_site(site):
    frame = sign_frame(site.header(recipient="hospital-b"), POLL, site.coordinator)
    assert refused(site, frame) == "AG-RLY-003"


@pytest.mark.parametrize("shift", [-2 * HOUR, 2 * HOUR])
def test_refuses_a_call_from_the_past_or_the_future(site, shift):
    frame = sign_frame(site.header(time=NOW + shift), POLL, site.coordinator)
    assert refused(site, frame) == "AG-RLY-004"


def test_refuses_a_body_that_was_exchanged(site):
    frame = sign_frame(site.header(), POLL, site.coordinator)
    other = PollCall(stored=("0" * 64,)).to_bytes()
    assert refused(site, forged(frame, [("body", other)])) == "AG-RLY-005"


def test_refuses_its_own_answer_played_back(site):
    header = site.header(status="ok")
    assert refused(site, sign_frame(header, POLL, site.coordinator)) == "AG-RLY-003"


def test_refuses_what_is_no_frame(site):
    assert refused(site, SignedFrame(b"\xff\x00", POLL)) == "AG-SIG-001"


def test_answers_a_repeated_call_alike(site):
    frame = sign_frame(site.header(), POLL, site.coordinator)
    assert site.exchange.answer(frame).body == site.exchange.answer(frame).body


def test_refuses_a_malformed_poll_with_a_signed_code(site):
    header, body = site.call("poll", b"[]")
    assert (header.status, header.code, body) == ("refused", "AG-RLY-001", b"")
    assert site.alarms[0][0] == "AG-RLY-001"


def test_refuses_to_hand_out_what_is_not_in_the_outbox(site):
    header, body = site.call("take", item=hashlib.sha256(b"x").hexdigest())
    assert (header.status, header.code, body) == ("refused", "AG-SIT-003", b"")
    header, _ = site.call("take", item="../../keys/signing.pem")
    assert (header.status, header.code) == ("refused", "AG-SIT-003")


def test_refuses_a_part_of_an_item_that_was_never_announced(site):
    header, _ = site.call("put", b"bytes", item=hashlib.sha256(b"x").hexdigest())
    assert (header.status, header.code) == ("refused", "AG-SIT-003")


def test_reports_the_roster_it_trusts(site):
    site.roster = replace(site.roster, version=9)
    assert site.poll().roster_version == 9


class Witness:
    def __init__(self, error=None):
        self.size, self.error, self.seen = 4, error, []

    def cosign(self, checkpoint, consistency, now):
        if self.error:
            raise self.error
        self.seen.append((checkpoint, consistency, now))
        self.size = 7
        return "— witness signature"


def test_cosigns_the_checkpoint_and_reports_the_size_it_then_knows(tmp_path):
    witness = Witness()
    site = SiteKit(tmp_path, witness=witness)
    answer = site.poll(checkpoint="note", consistency=(b"h" * 32,))
    assert (answer.cosignature, answer.witnessed_size) == ("— witness signature", 7)
    assert witness.seen == [("note", (b"h" * 32,), NOW)]
    site.store.close()


def test_a_forked_log_is_not_cosigned_and_the_alarm_is_raised(tmp_path):
    site = SiteKit(tmp_path, witness=Witness(RejectedError("AG-SIG-003", "the log forked")))
    item = site.outbox.add("receipt", {"receipt.json": b"{}"})
    answer = site.poll(checkpoint="note")
    assert (answer.cosignature, answer.witnessed_size) == ("", 4)
    assert [entry.item for entry in answer.outbox] == [item]
    assert site.alarms == [("AG-SIG-003", "the log forked")]
    site.store.close()


def test_the_answer_cannot_pass_for_another_recipients(site):
    frame = site.exchange.answer(sign_frame(site.header(), POLL, site.coordinator))
    with pytest.raises(RejectedError, match="AG-RLY-003"):
        verify_frame(frame, (site.key.public,), "another-coordinator", NOW + timedelta(seconds=1))
