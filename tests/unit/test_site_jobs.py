# SPDX-License-Identifier: Apache-2.0
"""The lanes of a site outlive a disk that is full for a while."""

import threading
import time

import pytest
import structlog

from allograft.errors import UnavailableError
from allograft_client import jobs
from kit.consortium import Consortium


@pytest.fixture
def site(tmp_path):
    consortium = Consortium(tmp_path, names=("hospital-a",))
    yield consortium["hospital-a"].site
    consortium.close()


@pytest.fixture
def lane(site, monkeypatch):
    """Runs the light lane of a site as its daemon does, with a job that does nothing."""
    monkeypatch.setattr(jobs, "_IDLE_S", 0.01)
    monkeypatch.setattr(jobs, "_RETRY_S", 0.01)
    monkeypatch.setitem(jobs.HANDLERS, "probe", lambda site, job, tell: {"attempt": job.attempts})

    def run(number):
        stopped = threading.Event()
        thread = threading.Thread(target=jobs.run_lane, args=(site, "light", stopped))
        with structlog.testing.capture_logs() as logs:
            thread.start()
            end_s = time.monotonic() + 30
            while site.store.job(number).state != "done" and time.monotonic() < end_s:
                time.sleep(0.01)
            stopped.set()
            thread.join()
        return site.store.job(number), [entry for entry in logs if entry["event"] == "lane-waits"]

    return run


def full(times, then):
    """A method of the store on a disk that is full for the first calls."""
    calls = iter(range(times))

    def method(*arguments):
        if next(calls, None) is not None:
            raise UnavailableError("AG-STO-001", "site.db: database or disk is full")
        return then(*arguments)

    return method


def test_a_lane_waits_while_the_disk_is_full_and_says_so_once(site, lane, monkeypatch):
    store = site.store
    number = store.add_job("light", "probe", "subject")
    monkeypatch.setattr(store, "next_job", full(3, store.next_job))
    job, told = lane(number)
    assert (job.state, job.attempts) == ("done", 1)
    assert [(entry["code"], entry["name"]) for entry in told] == [("AG-STO-001", "light")]


@pytest.mark.parametrize("repairs", [0, 2])
def test_a_job_whose_end_could_not_be_recorded_is_repeated(site, lane, monkeypatch, repairs):
    store = site.store
    before = store.add_job("light", "probe", "before")
    number = store.add_job("light", "probe", "subject")
    outcome = store.finish_job
    failing = full(1, outcome)
    monkeypatch.setattr(
        store, "finish_job", lambda n, result: (failing if n == number else outcome)(n, result)
    )
    monkeypatch.setattr(store, "requeue_job", full(repairs, store.requeue_job))
    job, told = lane(number)
    assert (job.state, job.result) == ("done", {"attempt": 2})
    assert store.job(before).attempts == 1
    assert len(told) == 1


def test_a_job_whose_failure_cannot_be_told_to_its_packet_does_not_end_the_lane(site, lane):
    stray = site.store.add_job("light", "trial", "ab" * 16)
    number = site.store.add_job("light", "probe", "subject")
    job, _ = lane(number)
    assert (job.state, job.attempts) == ("done", 1)
    assert (site.store.job(stray).state, site.store.job(stray).code) == ("failed", "AG-SIT-003")
