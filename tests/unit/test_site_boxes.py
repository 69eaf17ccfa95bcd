# SPDX-License-Identifier: Apache-2.0
"""Outbox and inbox: nothing is lost or done twice, whichever step a process dies at."""

import errno
import os
from unittest import mock

import pytest

from allograft.errors import RejectedError, UnavailableError
from allograft.limits import LIMITS
from allograft_client import inbox as inbox_module
from kit.coordinator import SITE, SiteKit, incoming, part_bytes

SMALL = {"receipt.json": b"{}", "receipt.event.json": b"{1}"}


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the code under test may catch it."""


@pytest.fixture
def site(tmp_path):
    kit = SiteKit(tmp_path)
    yield kit
    kit.store.close()


def large(tmp_path, parts=3):
    content = os.urandom(LIMITS.part_bytes * (parts - 1) + 1000)
    return incoming(
        tmp_path / "source",
        "packet",
        {"header.json": b"{}", "part-000.sealed": content, "empty": b""},
    )


def test_takes_a_small_item_whole_out_of_a_poll(site, tmp_path):
    entry = incoming(tmp_path / "source", "receipt", SMALL)
    answer = site.poll(announced=(entry,))
    assert answer.done == (entry.item.item_id,)
    row = site.store.find_item(entry.item.item_id, "in")
    directory = site.inbox.check_files(row)
    assert (directory / "receipt.json").read_bytes() == b"{}"
    assert [job.kind for job in site.store.jobs()] == ["take-in"]


def test_asks_for_missing_parts_and_no_more_than_may_be_in_flight(site, tmp_path):
    content = os.urandom(LIMITS.part_bytes * 6)
    entry = incoming(tmp_path / "source", "packet", {"part-000.sealed": content})
    answer = site.poll(announced=(entry,))
    assert answer.wants[0].parts == (0, 1, 2, 3)
    assert answer.done == ()


def test_completes_an_item_whatever_the_order_of_its_parts(site, tmp_path):
    entry = large(tmp_path)
    site.poll(announced=(entry,))
    for number in reversed(range(entry.item.part_count)):
        assert (
            site.put(entry.item, number, part_bytes(tmp_path / "source", entry.item, number)).status
            == "ok"
        )
    assert site.poll(announced=(entry,)).done == (entry.item.item_id,)
    directory = site.inbox.check_files(site.store.find_item(entry.item.item_id, "in"))
    assert (directory / "part-000.sealed").read_bytes() == (
        tmp_path / "source" / "part-000.sealed"
    ).read_bytes()
    assert (directory / "empty").read_bytes() == b""
    assert len(site.store.jobs()) == 1


def test_refuses_a_part_that_differs_from_its_digest(site, tmp_path):
    entry = large(tmp_path)
    site.poll(announced=(entry,))
    wrong = bytearray(part_bytes(tmp_path / "source", entry.item, 0))
    wrong[0] ^= 1
    header = site.put(entry.item, 0, bytes(wrong))
    assert (header.status, header.code) == ("refused", "AG-RLY-005")
    assert 0 in site.poll(announced=(entry,)).wants[0].parts


def test_refuses_an_inline_file_that_differs_from_its_digest(site, tmp_path):
    entry = incoming(tmp_path / "source", "receipt", SMALL)
    entry.inline["receipt.json"] = b"[]"
    answer = site.poll(announced=(entry,))
    assert answer.done == ()
    assert answer.refused[0].code == "AG-RLY-005"


@pytest.mark.parametrize(
    "step",
    [
        "open_partial",
        "after_write",
        "after_row",
        "before_rename",
        "after_rename",
        "after_commit",
    ],
)
def test_resumes_after_a_kill_at_any_step_of_a_part(site, tmp_path, step):
    entry = large(tmp_path, parts=2)
    source = tmp_path / "source"
    site.poll(announced=(entry,))
    last = entry.item.part_count - 1
    for number in range(last):
        site.put(entry.item, number, part_bytes(source, entry.item, number))
    with _killed_at(step, site), pytest.raises(Killed):
        site.put(entry.item, last, part_bytes(source, entry.item, last))
    site.store.close()
    site.restart()
    answer = site.poll(announced=(entry,))
    for want in answer.wants:
        for number in want.parts:
            site.put(entry.item, number, part_bytes(source, entry.item, number))
    assert site.poll(announced=(entry,)).done == (entry.item.item_id,)
    site.inbox.check_files(site.store.find_item(entry.item.item_id, "in"))
    assert [job.kind for job in site.store.jobs()] == ["take-in"]


def _killed_at(step, site):
    """Patch one function so that the process seems to die before or after it."""

    def before(*_arguments, **_named):
        raise Killed

    def after(function):
        def call(*arguments, **named):
            function(*arguments, **named)
            raise Killed

        return call

    box, store = site.inbox, site.store
    return {
        "open_partial": lambda: mock.patch.object(box, "_open_partial", before),
        "after_write": lambda: mock.patch.object(
            inbox_module, "_write_at", after(inbox_module._write_at)
        ),
        "after_row": lambda: mock.patch.object(store, "add_part", after(store.add_part)),
        "before_rename": lambda: mock.patch.object(box, "_complete", before),
        "after_rename": lambda: mock.patch.object(store, "move_item", before),
        "after_commit": lambda: mock.patch.object(box, "_complete", after(box._complete)),
    }[step]()


def test_fetches_again_what_somebody_deleted_from_the_inbox(site, tmp_path):
    entry = large(tmp_path, parts=2)
    site.poll(announced=(entry,))
    site.put(entry.item, 0, part_bytes(tmp_path / "source", entry.item, 0))
    (partial,) = (tmp_path / "inbox").glob("*.partial")
    for path in partial.iterdir():
        path.unlink()
    partial.rmdir()
    assert 0 in site.poll(announced=(entry,)).wants[0].parts


def test_a_full_disk_refuses_the_part_and_keeps_the_others(site, tmp_path):
    entry = large(tmp_path, parts=3)
    source = tmp_path / "source"
    site.poll(announced=(entry,))
    site.put(entry.item, 0, part_bytes(source, entry.item, 0))
    full = OSError(errno.ENOSPC, "No space left on device")
    with mock.patch.object(inbox_module, "_write_at", side_effect=full):
        header = site.put(entry.item, 1, part_bytes(source, entry.item, 1))
    assert (header.status, header.code) == ("refused", "AG-STO-001")
    assert site.store.parts(entry.item.item_id) == {0}
    assert site.put(entry.item, 1, part_bytes(source, entry.item, 1)).status == "ok"


def test_wants_nothing_while_the_reserve_would_be_eaten(tmp_path):
    kit = SiteKit(tmp_path, reserve_bytes=1 << 62)
    entry = large(tmp_path)
    answer = kit.poll(announced=(entry,))
    assert (answer.wants, answer.done, answer.refused) == ((), (), ())
    header = kit.put(entry.item, 0, part_bytes(tmp_path / "source", entry.item, 0))
    assert header.code == "AG-STO-001"
    kit.store.close()


def test_refuses_items_for_others_and_of_kinds_that_never_come(site, tmp_path):
    foreign = incoming(tmp_path / "one", "receipt", SMALL, recipient="hospital-b")
    odd = incoming(tmp_path / "two", "card", SMALL)
    codes = [refusal.code for refusal in site.poll(announced=(foreign, odd)).refused]
    assert codes == ["AG-RLY-003", "AG-RLY-006"]
    assert site.store.items("in", "waiting") == ()


def test_sends_an_item_in_parts_and_drops_large_files_once_stored(site, tmp_path):
    content = os.urandom(LIMITS.part_bytes + 5)
    item = site.outbox.add(
        "dispatch", {"header.json": b"{}", "part-000.sealed": content}, packet_id="p"
    )
    (announced,) = site.poll().outbox
    assert announced.item == item
    assert not announced.inline
    assert site.take(item) == b"{}" + content
    assert site.poll(stored=(item.item_id,)).outbox == ()
    left = sorted(path.name for path in (tmp_path / "outbox" / item.item_id).iterdir())
    assert left == ["header.json"]


def test_sends_a_small_item_inside_the_poll(site):
    item = site.outbox.add("receipt", SMALL)
    (announced,) = site.poll().outbox
    assert announced.inline == SMALL
    assert announced.item == item


def test_announces_nothing_that_was_placed_but_not_committed(site, tmp_path):
    with site.outbox.draft() as draft:
        (draft / "offer.json").write_bytes(b"{}")
        site.outbox.place(draft, "offer")
    site.store.close()
    site.restart()
    assert site.poll().outbox == ()
    site.outbox.sweep()
    assert list((tmp_path / "outbox").iterdir()) == []


def test_an_unfinished_draft_leaves_nothing(site, tmp_path):
    def fail():
        with site.outbox.draft() as draft:
            (draft / "part-000.sealed").write_bytes(b"x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list((tmp_path / "outbox").iterdir()) == []


def test_a_full_disk_places_nothing(site, tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device")
    with (
        mock.patch("allograft_client.outbox.os.replace", side_effect=full),
        pytest.raises(UnavailableError, match="AG-STO-001"),
    ):
        site.outbox.add("receipt", SMALL)
    assert list((tmp_path / "outbox").iterdir()) == []
    assert site.store.items("out", "waiting") == ()


def test_keeps_a_poll_within_its_limit_however_much_waits(site):
    for number in range(40):
        site.outbox.add("receipt", {"receipt.json": b"%d" % number})
    assert len(site.poll().outbox) == LIMITS.items_per_poll


def test_refuses_to_send_kinds_that_only_the_coordinator_sends(site):
    with pytest.raises(RejectedError, match="AG-RLY-006"):
        site.outbox.add("roster", {"roster.json": b"{}"})


def test_remembers_why_the_coordinator_refused_an_item(site):
    item = site.outbox.add("receipt", SMALL)
    from allograft.relay.poll import Refusal

    site.poll(refused=(Refusal(item.item_id, "AG-SIG-003"),))
    row = site.store.find_item(item.item_id, "out")
    assert (row.state, row.code) == ("refused", "AG-SIG-003")
    assert [job.kind for job in site.store.jobs()] == ["item-refused"]
    assert row.item.sender == SITE
