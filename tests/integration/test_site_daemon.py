# SPDX-License-Identifier: Apache-2.0
"""The real daemon with its real Flower children, called through its socket as the courier would."""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import grpc
import psutil
import pytest

from allograft.crypto import keystore
from allograft.relay.frame import Header, SignedFrame, check_answer, sign_frame, verify_frame
from allograft.relay.poll import PollAnswer, PollCall
from allograft.routing.card import verify_card
from allograft.wire.v1 import relay_pb2, relay_pb2_grpc
from kit.flower import wait_until
from kit.founding import COORDINATOR, Founded, run_site_json

SITE = "hospital-a"
PROGRAM = str(Path(sys.executable).with_name("allograft-site"))


@pytest.fixture
def directory():
    # Socket paths are limited to about 100 bytes; pytest's own directories can be longer.
    path = Path(tempfile.mkdtemp(prefix="ag-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def founded(directory):
    return Founded(directory)


@pytest.fixture
def state(founded, directory, capsys):
    path = directory / "site"
    run_site_json(capsys, "init", "--site", SITE, "--state", path)
    founded.enrol(path)
    run_site_json(
        capsys, "join", founded.publish(), "--root-fingerprint", founded.keeper.fingerprint,
        "--state", path,
    )  # fmt: skip
    return path


@contextmanager
def serving(state):
    log = (state / "daemon.log").open("ab")
    process = subprocess.Popen(
        [PROGRAM, "serve", "--state", str(state)], stdout=log, stderr=log, env=os.environ
    )
    try:
        socket_path = state / "run" / "courier.sock"
        wait_until("the daemon opens its socket", lambda: answers(socket_path, process))
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(timeout=60)
        log.close()


def answers(socket_path, process):
    assert process.poll() is None, "the daemon ended"
    if not socket_path.exists():
        return False
    try:
        with grpc.insecure_channel(f"unix:{socket_path}") as channel:
            grpc.channel_ready_future(channel).result(timeout=2)
    except grpc.FutureTimeoutError:
        return False
    return True


def poll(founded, state, **fields) -> PollAnswer:
    key = keystore.read_signing_key(founded.state.signing_key)
    now = datetime.now(UTC).replace(microsecond=0)
    header = Header(secrets.token_hex(16), "poll", COORDINATOR, SITE, "call", now)
    frame = sign_frame(header, PollCall(**fields).to_bytes(), key)
    with grpc.insecure_channel(f"unix:{state / 'run' / 'courier.sock'}") as channel:
        stub = relay_pb2_grpc.SiteCourierStub(channel)
        request = relay_pb2.Frame(envelope=frame.envelope, body=frame.body)
        reply = stub.Exchange(request, timeout=30)
    site_key = keystore.read_signing_key(state / "keys" / "signing.pem").public
    found = SignedFrame(reply.envelope, reply.body)
    check_answer(header, verify_frame(found, (site_key,), COORDINATOR, now))
    return PollAnswer.from_bytes(reply.body)


def children(process) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def test_serves_its_card_and_takes_its_children_with_it(founded, state):
    with serving(state) as daemon:
        wait_until("the card waits in the outbox", lambda: poll(founded, state).outbox)
        (announced,) = poll(founded, state).outbox
        card = verify_card(
            announced.inline["card.json"],
            _roster(state),
            datetime.now(UTC),
        )
        assert card.site == SITE
        # No policy file: the site says that it accepts nothing.
        assert card.accepts.kinds == ()
        wait_until("both Flower processes run", lambda: len(children(daemon)) >= 2)
        started = children(daemon)
        daemon.terminate()
        assert daemon.wait(timeout=60) == 0
        _, alive = psutil.wait_procs(started, timeout=20)
        assert alive == []
    assert not (state / "run" / "courier.sock").exists()


def _roster(state):
    from allograft_client.settings import Home
    from allograft_client.trust import Trust

    return Trust.open(Home(state), SITE).roster()


def test_a_killed_daemon_leaves_no_process_and_starts_again(founded, state):
    with serving(state) as daemon:
        wait_until("both Flower processes run", lambda: len(children(daemon)) >= 2)
        started = children(daemon)
        os.kill(daemon.pid, signal.SIGKILL)
        daemon.wait(timeout=20)
        _, alive = psutil.wait_procs(started, timeout=30)
        assert [process.cmdline() for process in alive] == []
    with serving(state):
        assert poll(founded, state).roster_version >= 1


def test_a_second_daemon_is_refused_with_its_code(founded, state):
    with serving(state):
        done = subprocess.run(
            [PROGRAM, "serve", "--state", str(state)], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 3
        assert "AG-STO-002" in done.stderr


def test_a_killed_child_is_started_again(founded, state):
    with serving(state) as daemon:
        wait_until("both Flower processes run", lambda: len(children(daemon)) >= 2)
        executor = _find(daemon, "allograft_client.executor")
        executor.kill()
        wait_until(
            "the executor is back", lambda: _find(daemon, "allograft_client.executor", executor.pid)
        )


def _find(daemon, words, other_than=0):
    for process in children(daemon):
        try:
            found = words in " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        if found and process.pid != other_than:
            return process
    return None


def test_the_log_is_json_and_names_no_path(founded, state):
    import json

    with serving(state):
        time.sleep(1)
    lines = (state / "daemon.log").read_text().splitlines()
    events = [json.loads(line)["event"] for line in lines if line.startswith("{")]
    assert events[0] == "daemon-started" or "daemon-started" in events
    assert "daemon-stopped" in events
    assert str(state) not in "\n".join(lines)
