# SPDX-License-Identifier: Apache-2.0
"""The executor runs the installed courier for one bundle digest and refuses every other app."""

import hashlib
import io
import json
import os
import subprocess
import sys
import threading

import structlog
from flwr.app import Context, RecordDict

from allograft.errors import UnavailableError
from allograft.relay.app import COURIER_APP_SHA256
from allograft_client.executor import Executor
from allograft_client.flower_private import Task
from allograft_client.journal import configure_journal


class FakeClaim:
    def __init__(self, app_sha256):
        self.task = Task("message", Context(7, 1, {}, RecordDict(), {}), app_sha256)
        self.outcome = None
        self.closed = False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closed = True

    def pull(self):
        return self.task

    def reply(self, task, answer):
        self.outcome = ("reply", answer)

    def refuse(self, task, reason):
        self.outcome = ("refused", reason)


class FakeRuntime:
    def __init__(self, *claims):
        self.claims = list(claims)

    def claim(self):
        if not self.claims:
            return None
        if isinstance(self.claims[0], Exception):
            raise self.claims.pop(0)
        return self.claims.pop(0)


def handle(claim, client_app):
    assert Executor(FakeRuntime(claim), client_app).step()
    assert claim.closed
    return claim.outcome


def test_runs_the_installed_app_for_the_courier_bundle():
    assert handle(FakeClaim(COURIER_APP_SHA256), lambda message, context: "answer") == (
        "reply",
        "answer",
    )


def test_refuses_a_foreign_app_without_calling_anything():
    called = []
    foreign = hashlib.sha256(b"another app").hexdigest()
    outcome = handle(FakeClaim(foreign), lambda **call: called.append(call))
    assert outcome == ("refused", "AG-SIT-006")
    assert called == []


def test_tells_the_coordinators_host_a_code_and_no_cause():
    def fail(message, context):
        raise UnavailableError("AG-RLY-007", "site daemon: UNAVAILABLE")

    assert handle(FakeClaim(COURIER_APP_SHA256), fail) == ("refused", "AG-RLY-007")

    def crash(message, context):
        raise ValueError("patient 4711")

    assert handle(FakeClaim(COURIER_APP_SHA256), crash) == ("refused", "AG-RLY-001")


def test_goes_on_after_the_supernode_was_away():
    stopped = threading.Event()
    claim = FakeClaim(COURIER_APP_SHA256)

    def answer(message, context):
        stopped.set()
        return "answer"

    away = UnavailableError("AG-RLY-007", "SuperNode: ConnectError")
    Executor(FakeRuntime(away, claim), answer).run(stopped)
    assert claim.outcome == ("reply", "answer")


def test_the_journal_writes_allowed_fields_only():
    stream = io.StringIO()
    configure_journal(stream)
    structlog.get_logger().info("kept", packet="ab12", text="private", key="secret")
    structlog.reset_defaults()
    line = json.loads(stream.getvalue())
    assert line["packet"] == "ab12"
    assert line["event"] == "kept"
    assert "private" not in stream.getvalue()
    assert "secret" not in stream.getvalue()


def test_a_confined_program_ends_with_its_parent(tmp_path):
    script = (
        "import os, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-m', 'allograft_client.confine',"
        " str(os.getpid()), 'sleep', '60'])\n"
        "print(child.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        child = int(parent.stdout.readline())
        deadline = 200
        while _command(child) != "sleep" and deadline:
            threading.Event().wait(0.05)
            deadline -= 1
        assert _command(child) == "sleep"
        parent.kill()
    deadline = 200
    while _command(child) == "sleep" and deadline:
        threading.Event().wait(0.05)
        deadline -= 1
    assert _command(child) != "sleep"


def _command(pid):
    try:
        with open(f"/proc/{pid}/stat") as handle:
            fields = handle.read()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    name, _, rest = fields.partition("(")[2].partition(")")
    return "" if rest.split()[0] == "Z" else name


def test_a_worker_that_leaves_the_network_sees_no_interface():
    script = (
        "import os, socket\n"
        "from allograft_client.confine import leave_network\n"
        "left = leave_network()\n"
        "names = [name for _, name in socket.if_nameindex()]\n"
        "print(left, names, os.geteuid())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    left, rest = done.stdout.split(" ", 1)
    # Where the system forbids namespaces the function must say so.
    assert rest.strip() == f"['lo'] {os.geteuid()}" or left == "False"
