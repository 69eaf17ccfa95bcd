# SPDX-License-Identifier: Apache-2.0
"""Memory of every process while a large item crosses Flower on loopback.

A donor site sends an opaque item; the coordinator stores it and delivers it to a recipient site.
Every Flower process is real, and so are the coordinator's relay and mailbox; the two site daemons
are simulated, each in a process of its own. Figures are peak minus idle resident memory.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil

from allograft.limits import LIMITS
from allograft.relay.item import Item
from allograft.relay.memory import ENVIRONMENT, return_memory_early
from benchmarks.report import Figure, parse_options, publish

_TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path.insert(0, str(_TESTS))  # the simulated site and the Flower processes of the tests

from kit.flower import FlowerRelay, wait_until  # type: ignore[import-not-found]  # noqa: E402

_MIB = 1 << 20
_TARGET_MIB = 64 + LIMITS.part_bytes // _MIB
_SAMPLE_S = 0.05
_IDLE_S = 15.0


class Sampler(threading.Thread):
    """Watches the resident memory of processes by role."""

    def __init__(self, pids: dict[str, int]) -> None:
        super().__init__(daemon=True)
        self._processes = {role: psutil.Process(pid) for role, pid in pids.items()}
        self.peaks = dict.fromkeys(pids, 0)
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(_SAMPLE_S):
            for role, process in self._processes.items():
                self.peaks[role] = max(self.peaks[role], process.memory_info().rss)

    def end(self) -> dict[str, int]:
        self._ended.set()
        self.join()
        return self.peaks


def find_pids(link: FlowerRelay, doors: dict[str, subprocess.Popen[bytes]]) -> dict[str, int]:
    """Every process of the chain by what it is."""
    children = link.supervisor.children()
    (serverapp,) = psutil.Process(children["executor"]).children(recursive=True)
    pids = {
        "coordinator": os.getpid(),
        "superlink": children["superlink"],
        "superexec": children["executor"],
        "serverapp": serverapp.pid,
    }
    for name, node in link.nodes.items():
        for role, process in node.processes.items():
            pids[f"{name}_{role}"] = process.pid
        pids[f"{name}_daemon"] = doors[name].pid
    return pids


@contextmanager
def running_doors(link: FlowerRelay) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """The simulated site daemons as processes."""
    coordinator_key = link.root / "coordinator.pem"
    coordinator_key.write_text(link.key.public.pem)
    doors: dict[str, subprocess.Popen[bytes]] = {}
    with ExitStack() as stack:
        for name, site in link.sites.items():
            key = link.root / f"{name}.pem"
            key.write_bytes(site.key.to_pem())
            outbox = link.root / f"{name}-outbox"
            outbox.mkdir()
            command = [
                sys.executable, "-m", "kit.simulated_site", "--name", name,
                "--directory", str(link.root / f"{name}-daemon"), "--coordinator", "hub",
                "--coordinator-key", str(coordinator_key), "--key", str(key),
                "--socket", str(link.root / f"{name}.sock"), "--outbox", str(outbox),
            ]  # fmt: skip
            doors[name] = subprocess.Popen(
                command, env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(_TESTS)}
            )
            stack.callback(doors[name].wait, 10)
            stack.callback(doors[name].kill)
        yield doors


def write_item(link: FlowerRelay, size_mib: int) -> None:
    """Put an item of random bytes into the donor's outbox."""
    outbox = link.root / "donor-outbox"
    making = outbox / ".making"
    making.mkdir()
    with (making / "part-000.sealed").open("wb") as handle:
        for _ in range(size_mib):
            handle.write(os.urandom(_MIB))
    making.rename(outbox / "item")


def wait_for_item(link: FlowerRelay, size_mib: int) -> Item:
    """Wait until the donor's item is stored."""
    deadline_s = 120 + 4.0 * size_mib
    link.wait_until(
        "the item is stored", lambda: bool(link.store.items("donor", "stored")), deadline_s
    )
    item: Item = link.store.items("donor", "stored")[0].item
    return item


def measure(size_mib: int, root: Path) -> list[Figure]:
    """Move one item and report."""
    link = FlowerRelay(root, "donor", "recipient", serves_doors=False)
    with running_doors(link) as doors, link.running():
        link.wait_until("both sites answer", lambda: len(link.store.sites()) == 2)
        end_s = time.monotonic() + _IDLE_S
        wait_until("idle", lambda: time.monotonic() > end_s)
        pids = find_pids(link, doors)
        idle = {role: psutil.Process(pid).memory_info().rss for role, pid in pids.items()}
        sampler = Sampler(pids)
        sampler.start()
        started_s = time.monotonic()
        write_item(link, size_mib)
        item = wait_for_item(link, size_mib)
        stored_s = time.monotonic()
        delivered = link.queue("recipient", item)
        link.wait_until(
            "the item is delivered",
            lambda: link.state_of(delivered) == "delivered",
            120 + 4.0 * size_mib,
        )
        delivered_s = time.monotonic()
        peaks = sampler.end()
    grown = {role: (peaks[role] - idle[role]) / _MIB for role in peaks}
    return [
        Figure("item", size_mib, "MiB"),
        Figure("upload", stored_s - started_s, "s"),
        Figure("delivery", delivered_s - stored_s, "s"),
        *(
            Figure(f"{role}_peak_minus_idle", mib, "MiB", f"<= {_TARGET_MIB}")
            for role, mib in grown.items()
        ),
        Figure("worst_peak_minus_idle", max(grown.values()), "MiB", f"<= {_TARGET_MIB}"),
    ]


def main() -> None:
    """Run the benchmark."""
    options = parse_options(__doc__ or "")
    return_memory_early()  # as the coordinator daemon does
    with tempfile.TemporaryDirectory(prefix="allograft-relay-") as scratch:
        figures = measure(32 if options.quick else 500, Path(scratch))
    publish("relay", figures, options)


if __name__ == "__main__":
    main()
