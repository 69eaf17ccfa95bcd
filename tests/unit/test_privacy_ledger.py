# SPDX-License-Identifier: Apache-2.0
"""Nothing spent is ever given back: not by editing, cutting, crashing, or asking twice."""

import errno
import json
import math
import os
import threading
from base64 import b64decode
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from allograft.crypto import dsse
from allograft.crypto.keys import SigningKey
from allograft.durable import lock_directory
from allograft.errors import RejectedError, UnavailableError
from allograft.privacy import ledger_file
from allograft.privacy.accountant import ORDERS, DpEvent
from allograft.privacy.ledger import (
    EMPTY,
    ENTRY_TYPE,
    Charge,
    ChargeKind,
    Committed,
    DomainOpened,
    Head,
    NonprivateRelease,
    Outcome,
    Reserved,
    check_costs,
)
from allograft.privacy.ledger_file import LedgerFile

KEY = SigningKey.generate()
NOW = datetime(2026, 11, 23, 8, tzinfo=UTC)
LIMITS = DomainOpened("cardiology", 8.0, 1e-6, 4, "data-owner")
EVENT = DpEvent(0.01, 0.8, 1000)  # ε 4.3 alone; four of them fit into 8 (notes, measured)


def charge(number: int, **changes) -> Charge:
    base = Charge(f"{number:032x}", "cardiology", ChargeKind.TRAINING, EVENT, "ab" * 32, "use")
    return replace(base, **changes)


@pytest.fixture
def book(tmp_path):
    book = LedgerFile(tmp_path / "privacy", "hospital-a", KEY)
    book.create()
    book.open_domain(LIMITS, NOW)
    return book


def lines(book) -> list[bytes]:
    return (book.directory / "ledger.jsonl").read_bytes().splitlines(keepends=True)


def write(book, content: list[bytes]) -> None:
    (book.directory / "ledger.jsonl").write_bytes(b"".join(content))


def refusal(call, *arguments, **named) -> str:
    with pytest.raises(RejectedError) as refused:
        call(*arguments, **named)
    return refused.value.code


def test_admits_what_the_cap_admits_and_refuses_the_next(book) -> None:
    for number in range(4):
        book.reserve(charge(number), NOW)
    before = lines(book)
    assert refusal(book.reserve, charge(4), NOW) == "AG-PRV-063"
    assert lines(book) == before
    account = book.read().account("cardiology")
    assert account.spent <= account.cap
    assert 7 < account.epsilon <= 8
    assert account.left == pytest.approx(account.cap - account.spent)


def test_a_domain_is_the_people_not_the_plan(book) -> None:
    assert refusal(book.reserve, charge(1, domain="fresh"), NOW) == "AG-PRV-062"
    book.open_domain(replace(LIMITS, domain="oncology"), NOW)
    for number in range(4):
        book.reserve(charge(number), NOW)
    book.reserve(charge(9, domain="oncology"), NOW)
    assert len(book.read().account("oncology").reserved) == 1


def test_limits_are_fixed_once(book) -> None:
    before = book.head()
    book.open_domain(LIMITS, NOW)
    assert book.head() == before
    assert refusal(book.open_domain, replace(LIMITS, epsilon_max=9.0), NOW) == "AG-PRV-061"
    for bad in ({"order": 7}, {"epsilon_max": 1.0}, {"delta_max": 0.1}):
        other = replace(LIMITS, domain="other", **bad)
        assert refusal(book.open_domain, other, NOW) == "AG-PRV-061"


def test_a_reservation_is_taken_up_again_by_its_plan_alone(book) -> None:
    first = book.reserve(charge(1), NOW)
    assert book.reserve(charge(1), NOW + timedelta(hours=1)) == first
    assert len(book.read().account("cardiology").reserved) == 1
    other = charge(1, event=DpEvent(0.001, 0.8, 10))
    assert refusal(book.reserve, other, NOW) == "AG-PRV-065"


@pytest.mark.parametrize(
    "ended",
    [Committed(f"{1:032x}", Outcome.RELEASED, ("cd" * 32,)),
     Committed(f"{1:032x}", Outcome.ABORTED, (), "AG-PRV-040")],
)  # fmt: skip
def test_what_ended_stays_spent_and_pays_for_no_second_run(book, ended) -> None:
    book.reserve(charge(1), NOW)
    spent = book.read().account("cardiology").spent
    book.commit(ended, NOW)
    head = book.head()
    book.commit(ended, NOW)
    assert book.head() == head
    assert book.read().account("cardiology").spent == spent > 0
    assert book.read().outcome(ended.plan_id) == ended
    assert refusal(book.reserve, charge(1), NOW) == "AG-PRV-065"
    other = Committed(ended.plan_id, Outcome.ABORTED, (), "AG-PRV-063")
    assert refusal(book.commit, other, NOW) == "AG-PRV-065"


def test_refuses_to_end_what_was_not_reserved(book) -> None:
    ended = Committed(f"{7:032x}", Outcome.ABORTED, (), "AG-PRV-040")
    assert refusal(book.commit, ended, NOW) == "AG-PRV-065"


@pytest.mark.parametrize(
    "ended",
    [Committed(f"{1:032x}", Outcome.RELEASED), Committed(f"{1:032x}", Outcome.ABORTED, (), "why"),
     Committed(f"{1:032x}", Outcome.RELEASED, ("cd" * 32,), "AG-PRV-040"),
     Committed(f"{1:032x}", Outcome.RELEASED, ("cd" * 32,) * 65)],
)  # fmt: skip
def test_writes_nothing_that_it_would_not_read(book, ended) -> None:
    book.reserve(charge(1), NOW)
    before = lines(book)
    assert refusal(book.commit, ended, NOW) == "AG-PRV-060"
    assert lines(book) == before


def test_a_release_without_privacy_is_infinite_for_ever(book) -> None:
    release = NonprivateRelease("cardiology", "ef" * 32, "data-owner")
    book.record_nonprivate(release, NOW)
    head = book.head()
    book.record_nonprivate(release, NOW)
    assert book.head() == head
    book.reserve(charge(1), NOW)
    account = book.read().account("cardiology")
    assert account.is_nonprivate
    assert account.epsilon == math.inf


@pytest.mark.parametrize("kind", list(ChargeKind))
def test_everything_that_somebody_sees_is_charged(book, kind) -> None:
    book.reserve(charge(1, kind=kind, event=DpEvent(1.0, 10.0, 1)), NOW)
    account = book.read().account("cardiology")
    assert account.reserved[0].charge.kind is kind
    assert account.spent == pytest.approx(4 / (2 * 10.0**2), rel=1e-6)


def test_a_clock_that_went_back_writes_nothing(book) -> None:
    before = lines(book)
    assert refusal(book.reserve, charge(1), NOW - timedelta(seconds=1)) == "AG-PRV-064"
    assert lines(book) == before


def test_refuses_an_edited_entry(book) -> None:
    book.reserve(charge(1), NOW)
    content = lines(book)
    edited = json.loads(content[1])
    edited["payload"] = edited["payload"][:-8] + "AAAAAAA="
    write(book, [content[0], json.dumps(edited).encode() + b"\n"])
    assert refusal(book.read) == "AG-PRV-060"


def test_refuses_a_foreign_signature(book) -> None:
    book.reserve(charge(1), NOW)
    content = lines(book)
    payload = b64decode(json.loads(content[1])["payload"])
    content[1] = dsse.sign(payload, ENTRY_TYPE, [SigningKey.generate()]).to_bytes() + b"\n"
    write(book, content)
    assert refusal(book.read) == "AG-PRV-060"
    assert refusal(replace(book, key=SigningKey.generate()).read) == "AG-PRV-060"


def test_reads_on_after_a_change_of_keys(book) -> None:
    renewed = replace(book, key=SigningKey.generate(), former_keys=(KEY.public,))
    renewed.reserve(charge(1), NOW)
    assert renewed.read().head.count == 2


def test_refuses_reordered_dropped_and_repeated_entries(book) -> None:
    for number in range(3):
        book.reserve(charge(number), NOW)
    a, b, c, d = lines(book)
    for wrong in ([a, c, b, d], [a, b, d], [a, b, b, c, d], [b, c, d], [a, b, c, d, d]):
        write(book, wrong)
        assert refusal(book.read) == "AG-PRV-060"


def test_refuses_another_sites_entries(book) -> None:
    assert refusal(replace(book, site="hospital-b").read) == "AG-PRV-060"


@pytest.mark.parametrize("kept", range(3))
def test_refuses_a_file_that_was_cut(book, kept) -> None:
    for number in range(2):
        book.reserve(charge(number), NOW)
    content = lines(book)
    write(book, content[:kept])
    assert refusal(book.read) == "AG-PRV-069"
    write(book, [*content[:kept], content[kept][:-1]])
    assert refusal(book.read) == "AG-PRV-069"


def test_what_is_known_elsewhere_shows_a_rollback_of_both_files(book) -> None:
    old = [(path, path.read_bytes()) for path in book.directory.iterdir()]
    book.reserve(charge(1), NOW)
    known = book.head()
    for path, content in old:
        path.write_bytes(content)
    assert book.read().account("cardiology").spent == 0.0  # nothing here can tell
    assert refusal(book.read, known) == "AG-PRV-069"
    book.reserve(charge(2), NOW)
    assert refusal(book.read, known) == "AG-PRV-060"
    assert refusal(book.create, known) == "AG-PRV-069"


@pytest.mark.parametrize("name", ["ledger.jsonl", "ledger.head"])
def test_a_lost_file_is_not_an_empty_ledger(book, name) -> None:
    (book.directory / name).unlink()
    assert refusal(book.read) == "AG-PRV-069"
    assert refusal(book.create) == "AG-PRV-069"


def test_is_never_started_twice_nor_by_reading(tmp_path, book) -> None:
    assert refusal(book.create) == "AG-PRV-069"
    with pytest.raises(UnavailableError, match="AG-STO-003"):
        LedgerFile(tmp_path / "none", "hospital-a", KEY).read()


@pytest.mark.parametrize("head", [b"", b"1", b"-1 " + b"0" * 64, b"x" * 500, b"\xff" * 70])
def test_refuses_a_malformed_head(book, head) -> None:
    (book.directory / "ledger.head").write_bytes(head)
    assert refusal(book.read) == "AG-PRV-060"


def test_a_torn_line_is_cut_and_the_next_entry_stands_in_its_place(book) -> None:
    book.reserve(charge(1), NOW)
    content = lines(book)
    for torn in (content[1][:-1], content[1][:50], b"\0" * 40, b"{\0\0\0}\n"):
        write(book, [*content, torn])
        assert book.read().head.count == 2
        assert lines(book) == content
    write(book, [*content, content[1][:50]])
    book.reserve(charge(2), NOW)
    assert book.read().head.count == 3


def test_a_whole_line_that_does_not_verify_is_not_a_torn_one(book) -> None:
    write(book, [*lines(book), b"{}\n"])
    assert refusal(book.read) == "AG-PRV-060"


def test_an_entry_that_no_head_announced_counts(book) -> None:
    old = (book.directory / "ledger.head").read_bytes()
    book.reserve(charge(1), NOW)
    (book.directory / "ledger.head").write_bytes(old)
    assert book.read().account("cardiology").spent > 0
    assert Head.from_text((book.directory / "ledger.head").read_text()).count == 2


def test_a_full_disk_applies_nothing_by_halves(book, monkeypatch) -> None:
    real = os.write

    def full(descriptor, content):
        if len(content) > 300:
            return real(descriptor, content[:100])
        raise OSError(errno.ENOSPC, "no space")

    before = lines(book)
    monkeypatch.setattr(ledger_file.os, "write", full)
    with pytest.raises(UnavailableError, match="AG-STO-001"):
        book.reserve(charge(1), NOW)
    monkeypatch.undo()
    assert lines(book) == before
    book.reserve(charge(1), NOW)
    assert book.read().head.count == 2


def test_a_disk_that_fills_before_the_head_keeps_the_spend(book, monkeypatch) -> None:
    def full(path, content):
        raise UnavailableError("AG-STO-001", "no space")

    monkeypatch.setattr(ledger_file, "durable_write", full)
    with pytest.raises(UnavailableError, match="AG-STO-001"):
        book.reserve(charge(1), NOW)
    with pytest.raises(UnavailableError, match="AG-STO-001"):
        book.reserve(charge(2), NOW)
    monkeypatch.undo()
    assert [entry.charge for entry in book.read().account("cardiology").reserved] == [charge(1)]
    book.reserve(charge(1), NOW)
    assert book.read().head.count == 2


def test_writers_take_turns_and_one_that_hangs_is_named(book, monkeypatch) -> None:
    threads = [
        threading.Thread(target=book.reserve, args=(charge(number), NOW)) for number in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(book.read().account("cardiology").reserved) == 3
    release = lock_directory(book.directory)
    with pytest.raises(UnavailableError, match="AG-PRV-068"):
        book.reserve(charge(9), NOW)
    release()


def test_nobody_states_what_their_run_costs(book) -> None:
    assert book.reserve(charge(1), NOW).rdp[ORDERS.index(4)] == pytest.approx(0.919, abs=1e-3)
    check_costs(book.read())
    cheap = Reserved(charge(2), (0.0,) * len(ORDERS))
    book._record(cheap, NOW, EMPTY)
    assert refusal(check_costs, book.read()) == "AG-PRV-060"


def test_a_cost_below_nothing_is_no_entry(book) -> None:
    negative = Reserved(charge(2), (-1.0,) * len(ORDERS))
    assert refusal(book._record, negative, NOW, EMPTY) == "AG-PRV-060"
