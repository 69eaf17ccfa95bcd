# SPDX-License-Identifier: Apache-2.0
"""Killed at any write and reopened, a ledger never holds less than what it acknowledged."""

import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest import mock

from hypothesis import given, settings, strategies as st

from allograft.crypto.keys import SigningKey
from allograft.errors import RejectedError
from allograft.privacy import ledger_file
from allograft.privacy.accountant import DpEvent
from allograft.privacy.ledger import (
    EMPTY,
    Charge,
    ChargeKind,
    Committed,
    DomainOpened,
    NonprivateRelease,
    Outcome,
)
from allograft.privacy.ledger_file import LedgerFile

KEY = SigningKey.generate()
START = datetime(2026, 11, 23, 8, tzinfo=UTC)
DOMAINS = ("cardiology", "oncology")
EVENTS = (DpEvent(0.01, 0.8, 1000), DpEvent(0.02, 1.1, 500), DpEvent(1.0, 10.0, 1))


class Killed(BaseException):
    """Not an Exception: as with SIGKILL, no handler of ours gets to tidy up."""


class Deadly:
    """The writes of an append, of which one kills the process, before, amid or after it."""

    def __init__(self, left: int, share: float) -> None:
        self._left = left
        self._share = share
        self._write_all = ledger_file._write_all
        self._sync = ledger_file._sync
        self._durable_write = ledger_file.durable_write

    def patches(self):
        return mock.patch.multiple(
            ledger_file, _write_all=self.write, _sync=self.sync, durable_write=self.replace
        )

    def write(self, descriptor, content):
        if self._dies():
            self._write_all(descriptor, content[: round(self._share * len(content))])
            raise Killed
        self._write_all(descriptor, content)

    def sync(self, path):
        self._sync(path)
        if self._dies():
            raise Killed

    def replace(self, path, content):
        dies = self._dies()
        if dies and self._share < 0.5:
            raise Killed
        self._durable_write(path, content)
        if dies:
            raise Killed

    def _dies(self) -> bool:
        self._left -= 1
        return self._left == 0


plans = st.integers(0, 5)
domains = st.sampled_from(DOMAINS)
acts = st.one_of(
    st.tuples(st.just("open"), domains),
    st.tuples(st.just("reserve"), domains, plans, st.sampled_from(EVENTS)),
    st.tuples(st.just("release"), plans),
    st.tuples(st.just("abort"), plans),
    st.tuples(st.just("nonprivate"), domains),
)
deaths = st.one_of(st.none(), st.tuples(st.integers(1, 4), st.floats(0, 1)))


def perform(book, act, now, known):
    name, *values = act
    if name == "open":
        book.open_domain(DomainOpened(values[0], 8.0, 1e-6, 4, "data-owner"), now, known)
    elif name == "reserve":
        domain, plan, event = values
        charge = Charge(f"{plan:032x}", domain, ChargeKind.TRAINING, event, "ab" * 32, "use")
        book.reserve(charge, now, known)
    elif name == "release":
        book.commit(Committed(f"{values[0]:032x}", Outcome.RELEASED, ("cd" * 32,)), now, known)
    elif name == "abort":
        book.commit(Committed(f"{values[0]:032x}", Outcome.ABORTED, (), "AG-PRV-040"), now, known)
    else:
        book.record_nonprivate(NonprivateRelease(values[0], "ef" * 32, "data-owner"), now, known)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(acts, deaths, st.integers(-1, 5)), max_size=14))
def test_spend_never_decreases_whatever_is_killed(steps) -> None:
    with tempfile.TemporaryDirectory() as directory:
        book = LedgerFile(Path(directory), "hospital-a", KEY)
        book.create()
        known, spent, infinite, now = EMPTY, dict.fromkeys(DOMAINS, 0.0), set(), START
        for act, death, seconds in steps:
            now += timedelta(seconds=seconds)
            acknowledged = False
            try:
                if death is None:
                    perform(book, act, now, known)
                else:
                    with Deadly(*death).patches():
                        perform(book, act, now, known)
                acknowledged = True
            except (RejectedError, Killed):
                pass
            # The process that comes after must read what the other left, whatever it was.
            ledger = book.read(known)
            assert ledger.head.count >= known.count
            known = ledger.head
            for domain in DOMAINS:
                account = ledger.accounts.get(domain)
                if account is None:
                    assert spent[domain] == 0.0
                    continue
                assert spent[domain] <= account.spent <= account.cap
                assert account.epsilon >= 0
                spent[domain] = account.spent
                assert account.is_nonprivate or domain not in infinite
                if account.is_nonprivate:
                    infinite.add(domain)
            if acknowledged and act[0] == "reserve":
                found = ledger.reservation(f"{act[2]:032x}")
                assert found is not None
                assert found.charge.event == act[3]
