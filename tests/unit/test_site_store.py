# SPDX-License-Identifier: Apache-2.0
import sqlite3
from pathlib import Path

import pytest

from allograft.errors import RejectedError, UnavailableError
from allograft_client.store import PacketRow, Store

PACKET = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def store(tmp_path):
    with_path = Store.create(tmp_path / "site.db")
    yield with_path
    with_path.close()


def row(packet_id=PACKET, state="received") -> PacketRow:
    return PacketRow(
        packet_id, "recipient", "hospital-b", "organ", "", "d" * 32, state, "", "arrived", {}, "t"
    )


def test_keeps_a_packet_in_one_state_with_its_reason_and_history(store):
    store.add_packet(row())
    store.move_packet(PACKET, ["received"], "quarantined", "a part differs", "AG-SEA-001")
    packet = store.packet(PACKET)
    assert (packet.state, packet.code, packet.reason) == (
        "quarantined",
        "AG-SEA-001",
        "a part differs",
    )
    assert [change.state for change in store.history(PACKET)] == ["received", "quarantined"]


def test_refuses_a_transition_from_another_state(store):
    store.add_packet(row())
    with pytest.raises(RejectedError, match="AG-SIT-004"):
        store.move_packet(PACKET, ["trialled"], "kept", "operator")
    assert store.packet(PACKET).state == "received"


def test_undoes_every_change_of_a_transaction_that_fails(store):
    store.add_packet(row())

    def fail():
        with store.transaction():
            store.move_packet(PACKET, ["received"], "verified", "all checks passed")
            store.add_job("heavy", "trial", PACKET)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert store.packet(PACKET).state == "received"
    assert store.jobs() == ()


def test_finds_a_packet_by_an_unambiguous_beginning(store):
    store.add_packet(row())
    store.add_packet(row("0123ffff" + "0" * 24))
    assert store.packet("01234567").packet_id == PACKET
    with pytest.raises(RejectedError, match="more than one"):
        store.packet("0123")
    with pytest.raises(RejectedError, match="AG-SIT-003"):
        store.packet("*")


def test_claims_a_dispatch_once(store):
    assert store.claim_dispatch("d" * 32, PACKET)
    assert not store.claim_dispatch("d" * 32, PACKET)
    assert store.is_dispatch_seen("d" * 32)


def test_takes_jobs_in_order_and_each_lane_its_own(store):
    first = store.add_job("heavy", "trial", PACKET)
    second = store.add_job("heavy", "keep", PACKET)
    light = store.add_job("light", "take-in", "item")
    assert store.next_job("heavy").number == first
    assert store.next_job("light").number == light
    assert store.next_job("heavy").number == second
    assert store.next_job("heavy") is None


def test_queues_again_what_a_killed_daemon_left_running(store, tmp_path):
    number = store.add_job("heavy", "donate", PACKET)
    store.next_job("heavy")
    later = Store(tmp_path / "site.db")
    assert later.requeue_jobs() == 1
    assert later.next_job("heavy").number == number
    later.close()


def test_closes_the_gap_when_an_attachment_leaves_the_stack(store):
    for number in range(3):
        store.push_attachment(str(number) * 32, "base", Path(f"/a/{number}"), 1.0)
    store.drop_attachment("0" * 32)
    assert [(a.packet_id[0], a.position) for a in store.attachments("base")] == [
        ("1", 0),
        ("2", 1),
    ]


def test_refuses_a_database_that_a_newer_version_wrote(store, tmp_path):
    with sqlite3.connect(tmp_path / "site.db") as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(RejectedError, match="AG-SIT-002"):
        Store(tmp_path / "site.db")


def test_reports_a_full_disk_and_keeps_what_was_there(store):
    store.add_packet(row())
    connection = store._connection()
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(UnavailableError, match="AG-STO-001"):
        store.add_packet_facts(PACKET, text="x" * 100_000)
    assert store.packet(PACKET).facts == {}


def test_syncs_every_commit(store):
    connection = store._connection()
    assert connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    assert connection.execute("PRAGMA synchronous").fetchone()[0] == 2


@pytest.mark.parametrize("change", ["facts = '{{{'", "facts = '[]'", "state = 'lost'"])
def test_a_packet_row_that_nobody_here_wrote_is_damage(store, change):
    store.add_packet(row())
    store._run(f"UPDATE packet SET {change}")
    for look in (store.packets, lambda: store.packet(PACKET)):
        with pytest.raises(UnavailableError, match="AG-STO-004"):
            look()


def test_a_job_row_that_nobody_here_wrote_is_damage(store):
    number = store.add_job("heavy", "trial", PACKET)
    store._run("UPDATE job SET progress = 'x'")
    for look in (store.jobs, lambda: store.job(number), lambda: store.next_job("heavy")):
        with pytest.raises(UnavailableError, match="AG-STO-004"):
            look()
