# SPDX-License-Identifier: Apache-2.0
"""The site answers only fresh calls of its coordinator, each test breaking one rule."""

import hashlib
from dataclasses import replace
from datetime import timedelta

import pytest
import structlog
from structlog.testing import capture_logs

from allograft.crypto.keys import SigningKey
from allograft.errors import RejectedError, UnavailableError
from allograft.relay.frame import SignedFrame, sign_frame, verify_frame
from allograft.relay.poll import PollCall
from allograft_client import contact
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


def test_remembers_when_the_coordinator_was_heard(site):
    assert contact.last_heard(site.store) is None
    site.call("poll", POLL)
    assert contact.last_heard(site.store) == NOW
    site.restart()
    assert contact.last_heard(site.store) == NOW


def test_a_stranger_is_not_the_coordinator_heard(site):
    refused(site, sign_frame(site.header(), POLL, SigningKey.generate()))
    assert contact.last_heard(site.store) is None


def test_remembers_a_busy_coordinator_without_a_write_for_every_call(site, monkeypatch):
    writes = []
    monkeypatch.setattr(site.store, "set_setting", lambda *setting: writes.append(setting))
    for _ in range(50):
        site.call("poll", POLL)
    assert len(writes) == 1


def test_answers_although_it_cannot_remember_the_call(site, monkeypatch):
    def full(*_):
        raise UnavailableError("AG-STO-001", "no space")

    monkeypatch.setattr(site.store, "set_setting", full)
    header, _ = site.call("poll", POLL)
    assert header.status == "ok"
    assert site.alarms == [("AG-STO-001", "no space")]


def test_tells_once_when_the_coordinator_falls_silent_and_once_when_it_is_back(site):
    with capture_logs() as told:
        watch = contact.Watch(site.store, structlog.get_logger(), NOW)
        site.call("poll", POLL)
        for minutes in range(6):
            watch.look(NOW + timedelta(minutes=minutes))
        site.now = NOW + timedelta(minutes=6)
        site.call("poll", POLL)
        for minutes in range(6, 8):
            watch.look(NOW + timedelta(minutes=minutes))
    assert [(line["event"], line.get("code")) for line in told] == [
        ("coordinator-silent", "AG-SIT-015"),
        ("coordinator-heard", None),
    ]
    assert told[0]["cause"] == "not heard since 2026-11-23T08:00:00Z"


def test_silence_from_before_the_daemon_started_is_not_told_at_once(site):
    site.call("poll", POLL)
    started = NOW + timedelta(days=3)
    with capture_logs() as told:
        watch = contact.Watch(site.store, structlog.get_logger(), started)
        watch.look(started + timedelta(minutes=1))
        assert told == []
        watch.look(started + timedelta(minutes=2))
    assert [line["event"] for line in told] == ["coordinator-silent"]


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
