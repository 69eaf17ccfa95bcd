# SPDX-License-Identifier: Apache-2.0
"""How a command asks for work: it queues a job, and waits for it if the person wants to.

The daemon does the work. Where none runs, the waiting command takes the directory's lock and does
the queued jobs of that lane itself, by the same code; so every command works either way.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from allograft.durable import is_directory_locked, lock_directory
from allograft.errors import RejectedError, UnavailableError
from allograft_client.rows import JobRow
from allograft_client.site import Site
from allograft_client.store import Lane

_POLL_S = 0.2

Show = Callable[[JobRow], None]

#: Which lane each request belongs to.
LANES: Mapping[str, Lane] = {
    "approve": "light",
    "dispatch": "light",
    "withdraw": "light",
    "keep": "light",
    "add-model": "heavy",
    "donate": "heavy",
    "trial": "heavy",
    "revert": "heavy",
    "export": "heavy",
    "screen": "heavy",
    "scale": "heavy",
    "route": "heavy",
}


def request(site: Site, kind: str, subject: str, arguments: Mapping[str, Any] | None = None) -> int:
    """Queue a job for the command line; returns its number."""
    return site.store.add_job(LANES[kind], kind, subject, arguments)


def await_job(site: Site, number: int, timeout_s: float, show: Show) -> JobRow:
    """Wait for a job, doing it here if no daemon runs.

    Raises:
        RejectedError: The job failed; with its code.
        UnavailableError: AG-SIT-009 if it did not end in time; it stays queued.
    """
    end_s = time.monotonic() + timeout_s
    while True:
        job = site.store.job(number)
        show(job)
        if job.state == "done":
            return job
        if job.state == "failed":
            raise RejectedError(job.code, job.cause)
        if time.monotonic() >= end_s:
            waiting = f"; last: {job.code}: {job.cause}" if job.code else ""
            raise UnavailableError("AG-SIT-009", f"job {number} is {job.state}{waiting}")
        if not _work_here(site, job):
            time.sleep(_POLL_S)


def _work_here(site: Site, wanted: JobRow) -> bool:
    """Do one job of the wanted job's lane if no daemon does; False if there was nothing to do."""
    if is_directory_locked(site.home.root):
        return False  # a daemon is at work
    try:
        release = lock_directory(site.home.root)
    except UnavailableError:
        return False  # one began meanwhile
    from allograft_client.jobs import run_job  # Loads what only the work itself needs.

    try:
        site.store.requeue_jobs()
        job = site.store.next_job(LANES[wanted.kind])
        if job is None:
            return False
        if not run_job(site, job):
            failed = site.store.job(job.number)
            raise UnavailableError(failed.code, failed.cause)
        return True
    finally:
        release()


@contextmanager
def progress_line(visible: bool) -> Iterator[Show]:
    """Shows a job's progress on a terminal, and nothing elsewhere."""
    console = Console(stderr=True)
    if not (visible and sys.stderr.isatty()):
        yield lambda job: None
        return
    with console.status("queued") as status:
        yield lambda job: status.update(describe_progress(job))


def find_progress(site: Site, packet_id: str) -> str:
    """What a worker does or did last about a packet, in words; empty if nothing was begun."""
    jobs = site.store.open_jobs(packet_id)
    begun = [job for job in jobs if job.state == "running" or _is_put_back(job)]
    return describe_progress(begun[0], is_directory_locked(site.home.root)) if begun else ""


def _is_put_back(job: JobRow) -> bool:
    """Whether a job was begun, put back, and goes on where it was."""
    return job.state == "queued" and "stage" in job.progress


def describe_progress(job: JobRow, is_daemon_running: bool = True) -> str:
    """A job's progress in words, such as `training 120/400, loss 3.21`.

    What a job that nobody works on said last is told as the past.
    """
    words = _describe_stage(job)
    if not is_daemon_running and (job.state == "running" or _is_put_back(job)):
        return f"interrupted at {words}; the daemon is stopped"
    return f"waits to go on at {words}" if _is_put_back(job) else words


def _describe_stage(job: JobRow) -> str:
    progress = job.progress
    words = str(progress.get("stage", job.state))
    if "of" in progress:
        words += f" {progress.get('done', 0)}/{progress['of']}"
    if isinstance(progress.get("loss"), float):
        words += f", loss {progress['loss']:.3f}"
    return words
