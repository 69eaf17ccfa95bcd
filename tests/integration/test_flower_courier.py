# SPDX-License-Identifier: Apache-2.0
"""Frames cross real Flower processes on loopback, also when those processes are killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from allograft.limits import LIMITS
from allograft_server.courier import STALL_S
from kit.flower import DEADLINE_S, FlowerRelay


@pytest.fixture(scope="module")
def link(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FlowerRelay]:
    with FlowerRelay(tmp_path_factory.mktemp("flower"), "ward").running() as relay:
        yield relay


def make_files(directory: Path, sizes: dict[str, int]) -> Path:
    directory.mkdir()
    for name, size in sizes.items():
        (directory / name).write_bytes(os.urandom(size))
    return directory


def serverapp_pid(link: FlowerRelay) -> int | None:
    """The ServerApp that the executor started."""
    executor = link.supervisor.children().get("executor")
    if executor is None or not psutil.pid_exists(executor):
        return None
    children = psutil.Process(executor).children(recursive=True)
    return children[0].pid if children else None


def poll_again(link: FlowerRelay, deadline_s: float = DEADLINE_S) -> None:
    """Wait for a poll that is answered from now on."""
    before = len(link.sites["ward"].calls)
    link.wait_until(
        "the site is polled", lambda: len(link.sites["ward"].calls) > before, deadline_s
    )


def test_a_frame_makes_the_round_trip(link: FlowerRelay, tmp_path: Path) -> None:
    poll_again(link)
    item = link.queue_files("ward", make_files(tmp_path / "small", {"roster.json": 500}))
    link.wait_until("a small item is delivered", lambda: link.state_of(item) == "delivered")
    link.sites["ward"].received(item.item_id)


def test_parts_go_up_and_down_unchanged(link: FlowerRelay, tmp_path: Path) -> None:
    source = make_files(
        tmp_path / "large", {"part-000.sealed": LIMITS.part_bytes + 1000, "header.json": 100}
    )
    item = link.sites["ward"].send("dispatch", source)
    link.wait_until("an item is taken", lambda: link.state_of(item) == "stored")
    down = link.queue("ward", item)
    link.wait_until("an item is delivered", lambda: link.state_of(down) == "delivered")
    for file in source.iterdir():
        received = link.sites["ward"].received(down.item_id) / file.name
        assert received.read_bytes() == file.read_bytes()


@pytest.mark.slow
def test_frames_flow_again_after_the_serverapp_was_killed(link: FlowerRelay) -> None:
    poll_again(link)
    before = serverapp_pid(link)
    assert before is not None
    os.kill(before, signal.SIGKILL)
    # Flower misses the heartbeat, ends the run, and the supervisor submits the next one.
    link.wait_until(
        "another ServerApp runs", lambda: serverapp_pid(link) not in {None, before}, 150
    )
    poll_again(link)


def test_frames_flow_again_after_the_superlink_was_killed(link: FlowerRelay) -> None:
    poll_again(link)
    before = link.supervisor.children()["superlink"]
    os.kill(before, signal.SIGKILL)
    link.wait_until(
        "another SuperLink runs",
        lambda: link.supervisor.children().get("superlink") not in {None, before},
    )
    poll_again(link)


@pytest.mark.slow
def test_frames_flow_again_after_the_sites_executor_was_killed(link: FlowerRelay) -> None:
    poll_again(link)
    node = link.nodes["ward"]
    node.processes["executor"].kill()
    node.processes["executor"].wait(timeout=10)
    node.start("executor")
    # It died with the poll it had just answered. Flower delivers nothing twice, so the next poll
    # comes once the courier gives that one up.
    poll_again(link, STALL_S + DEADLINE_S)


def test_the_site_runs_no_app_but_its_courier(link: FlowerRelay) -> None:
    log = (link.root / "ward-node" / "executor.log").read_text()
    assert "app-refused" not in log
    installed = list((link.root / "ward-node" / "flower").rglob("apps/*"))
    assert installed == []  # the bundle was never unpacked
