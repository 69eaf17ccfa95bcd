# SPDX-License-Identifier: Apache-2.0
"""MedQuAD at one site helps stories260K at another: real daemons, Flower, log, training, trial.

The recipient's daemon is killed as soon as it knows of the packet, and goes on after a restart.
"""

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest

from allograft.roster.enrolment import verify_coordinator_request, verify_site_request
from allograft.roster.keeper import Keeper, write_published
from allograft_client.store import now_text
from kit.consortium import POLICY
from kit.flower import free_ports, wait_until
from kit.shared import shared_path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

BIN = Path(sys.executable).parent
DONOR, RECIPIENT = "alpha", "beta"


class World:
    """A coordinator and two sites, each a real daemon."""

    def __init__(self, root: Path, stack: ExitStack):
        self.root = root
        self.stack = stack
        self.coordinator = root / "hub"
        self.states = {name: root / name for name in (DONOR, RECIPIENT)}
        self.daemons = {}

    def run(self, program, *arguments, timeout_s=600):
        command = [str(BIN / program), *map(str, arguments), "--format", "json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
        assert done.returncode == 0, f"{program} {arguments[0]}: {done.stderr[-500:]}"
        return json.loads(done.stdout)

    def site(self, name, *arguments, **options):
        return self.run("allograft-site", *arguments, "--state", self.states[name], **options)

    def start(self, name, program, state):
        log = self.stack.enter_context((self.root / f"{name}.log").open("ab"))
        process = subprocess.Popen(
            [str(BIN / program), "serve", "--state", str(state)], stdout=log, stderr=log
        )
        self.daemons[name] = process
        self.stack.callback(stop, process)

    def packet(self, name, packet_id):
        rows = self.site(name, "packets")["packets"]
        return next((row for row in rows if row["packet_id"] == packet_id), None)

    def found(self):
        from datetime import UTC, datetime

        (port,) = free_ports(1)
        address = f"127.0.0.1:{port}"
        self.run(
            "allograft-coordinator", "init", "--name", "hub", "--address", address,
            "--state", self.coordinator,
        )  # fmt: skip
        now = datetime.now(UTC).replace(microsecond=0)
        request = (self.coordinator / "coordinator.enrol.json").read_bytes()
        keeper = Keeper.create(self.root / "roster", verify_coordinator_request(request), now)
        for name, state in self.states.items():
            self.site(name, "init", "--site", name)
            keeper.enrol(verify_site_request((state / f"{name}.enrol.json").read_bytes()))
        published = keeper.publish(now)
        write_published(published, self.root / "published")
        self.run(
            "allograft-coordinator", "import-roster", self.root / "published",
            "--state", self.coordinator,
        )  # fmt: skip
        self.start("hub", "allograft-coordinator", self.coordinator)
        invitation = self.root / "published" / "invitation.json"
        fingerprint = published.root_fingerprint
        for name, state in self.states.items():
            self.site(name, "join", invitation, "--root-fingerprint", fingerprint)
            policy = POLICY + "max_retention_loss = 1.0\n"
            (state / "policy.toml").write_text(policy)
            settings = (state / "site.toml").read_text()
            (state / "site.toml").write_text(settings + "trial_documents = 120\n")
            self.start(name, "allograft-site", state)
            # A command that comes before the daemon does its job itself, and the daemon then finds
            # its directory locked.
            wait_until(f"{name} runs", lambda n=name: self.site(n, "status")["daemon"] == "running")


def stop(process):
    if process.poll() is None:
        process.terminate()
        process.wait(timeout=60)


@pytest.fixture
def world():
    # Socket paths are limited to about 100 bytes; pytest's own directories can be longer.
    root = Path(tempfile.mkdtemp(prefix="ag-"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, root, ignore_errors=True)
        made = World(root, stack)
        made.found()
        yield made


def write_texts(root: Path):
    """Medical answers, each site its own, and stories for retention."""
    with gzip.open(shared_path("data/medical/medquad.jsonl.gz"), "rt") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(800), strict=False)]
    answers = [json.dumps({"text": row["answer"][:400]}) for row in rows if row["answer"]]
    stories = shared_path("data/general/tinystories_sample.txt").read_text()
    kept = [s.strip()[:400] for s in re.split(r"\n\s*\n", stories) if len(s.strip()) > 100][:200]
    for name, content in (
        ("alpha.jsonl", answers[::2]),
        ("beta.jsonl", answers[1::2]),
        ("stories.jsonl", [json.dumps({"text": text}) for text in kept]),
    ):
        (root / name).write_text("\n".join(content) + "\n")


def test_what_one_site_learnt_helps_another_even_when_its_daemon_is_killed(world):
    base = shared_path("data/models/stories260K/hf")
    write_texts(world.root)
    for name in (DONOR, RECIPIENT):
        world.site(
            name, "model", "add", "ward", "--path", base, "--data", world.root / f"{name}.jsonl",
            "--retention", world.root / "stories.jsonl",
        )  # fmt: skip
    donated = world.site(
        DONOR, "donate", "--model", "ward", "--data", world.root / "alpha.jsonl", "--domain",
        "medical questions", "--declare", "public", "--declared-by", "operator", "--steps", "60",
        "--window", "128",
    )  # fmt: skip
    packet_id = donated["packet_id"]
    # Cards and offers may cross; the route is renewed when the recipient's card arrives.
    # Longer than the two minutes after which a message that Flower lost is sent again.
    wait_until(
        "the coordinator proposes the recipient",
        lambda: proposes(world, packet_id),
        deadline_s=240,
    )
    world.site(DONOR, "dispatch", packet_id, "--to", RECIPIENT)
    wait_until(
        "the recipient knows of the packet",
        lambda: knows(world, packet_id),
        deadline_s=180,
    )
    killed = world.daemons[RECIPIENT]
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait(timeout=20)
    world.start(RECIPIENT, "allograft-site", world.states[RECIPIENT])
    wait_until("the packet is decided", lambda: decided(world, packet_id), deadline_s=600)
    row = world.packet(RECIPIENT, packet_id)
    assert (row["state"], row["code"]) == ("kept", "")
    trial = row["facts"]["trial"]
    assert trial["gain_low"] > 0.1
    assert abs(trial["null_gain"]) < trial["gain_low"]
    assert row["time"] <= now_text()
    wait_until("the receipt is back", lambda: receipts(world, packet_id), deadline_s=120)
    assert receipts(world, packet_id) == [(RECIPIENT, "kept")]
    out = world.root / "merged"
    refused = subprocess.run(
        [str(BIN / "allograft-site"), "model", "export", "ward", "--out", str(out),
         "--state", str(world.states[RECIPIENT])],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    # The donor did not permit merging.
    assert refused.returncode == 1
    assert "AG-SIT-018" in refused.stderr
    assert world.site(RECIPIENT, "revert", packet_id)["bit_exact"] is True


def proposes(world, packet_id):
    facts = world.packet(DONOR, packet_id)["facts"]
    verdicts = {p["site"]: p["verdict"] for p in facts.get("proposals", [])}
    return verdicts.get(RECIPIENT) == "exact"


def knows(world, packet_id):
    status = world.site(RECIPIENT, "status")
    coming = [entry for entry in status["inbox"] if entry["kind"] == "packet"]
    return bool(coming) or world.packet(RECIPIENT, packet_id) is not None


def decided(world, packet_id):
    row = world.packet(RECIPIENT, packet_id)
    return row is not None and row["state"] in {"kept", "reverted", "refused", "quarantined"}


def receipts(world, packet_id):
    row = world.site(DONOR, "packet", "show", packet_id)
    return [(receipt["site"], receipt["state"]) for receipt in row["receipts"]]
