# SPDX-License-Identifier: Apache-2.0
"""The SuperLink behind its guard, as a real process on loopback."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import ssl
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from allograft.crypto.keys import NodeKey
from allograft.errors import UnavailableError
from allograft_server.flower_private import ControlClient
from allograft_server.settings import Settings, State
from allograft_server.supervisor import Supervisor
from kit.flower import make_state, wait_until

PROTOBUF = {"content-type": "application/protobuf"}


class Guarded:
    """A supervised SuperLink with one registered node."""

    def __init__(self, state: State, settings: Settings, supervisor: Supervisor) -> None:
        self.state, self.settings, self.supervisor = state, settings, supervisor
        self.public = f"https://127.0.0.1:{settings.port}"
        self.private = f"https://127.0.0.1:{settings.private_port}"
        self.trust = ssl.create_default_context(cafile=str(state.tls / "ca.pem"))
        self.client = httpx.Client(verify=self.trust, timeout=20)
        self.token = (state.flower / "operator.token").read_text()

    def tick(self) -> bool:
        try:
            self.supervisor.tick()
        except UnavailableError:
            return False
        return True

    def control(self, token: str) -> ControlClient:
        return ControlClient(self.settings.private_address, self.state.tls / "ca.pem", token)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    state, settings = make_state(tmp_path_factory.mktemp("guard") / "hub")
    supervisor = Supervisor(state, settings, {"ward": NodeKey.generate().public_openssh})
    supervisor.start()
    link = Guarded(state, settings, supervisor)
    try:
        wait_until("the SuperLink answers", link.tick)
        with link.client:
            yield link
    finally:
        supervisor.stop()
    with contextlib.suppress(httpx.ConnectError):
        httpx.get(link.public, verify=link.trust)
        raise AssertionError("the SuperLink outlived its supervisor")


@pytest.mark.parametrize(
    "path",
    [
        "/", "/docs", "/openapi.json", "/health", "/v1/control/start-run",
        "/v1/control/list-nodes", "/v1/control/register-node", "/v1/runtime/acquire-task",
        "/v1/runtime/push-messages", "/v1/fleet/../control/start-run",
        "/v1/fleet/..%2fcontrol/start-run", "//v1/fleet/x", "/V1/FLEET/x",
    ],
)  # fmt: skip
def test_the_public_port_serves_nothing_but_the_fleet(guarded: Guarded, path: str) -> None:
    request = guarded.client.build_request("POST", guarded.public, content=b"", headers=PROTOBUF)
    request.url = request.url.copy_with(raw_path=path.encode())
    status = guarded.client.send(request).status_code
    assert status in {404, 405}


def test_control_calls_on_the_public_port_fail_even_with_the_token(guarded: Guarded) -> None:
    answer = guarded.client.post(
        f"{guarded.public}/v1/control/list-nodes",
        content=b"",
        headers={**PROTOBUF, "authorization": f"Bearer {guarded.token}"},
    )
    assert answer.status_code == 404


@pytest.mark.parametrize("token", ["", "wrong", "0" * 64])
def test_control_calls_on_the_private_port_need_the_token(guarded: Guarded, token: str) -> None:
    client = guarded.control(token or "x")
    with pytest.raises(UnavailableError, match="answered 401"):
        client.nodes()
    client.close()


def test_the_operator_sees_the_registered_node(guarded: Guarded) -> None:
    client = guarded.control(guarded.token)
    nodes = client.nodes()
    client.close()
    assert len(nodes) == 1


def test_a_task_cannot_be_taken_without_the_executors_secret(guarded: Guarded) -> None:
    answer = guarded.client.post(
        f"{guarded.private}/v1/runtime/acquire-task", content=b"", headers=PROTOBUF
    )
    assert answer.status_code == 401


def test_an_unregistered_node_is_turned_away(guarded: Guarded) -> None:
    for call in ("activate-node", "register-node", "pull-messages", "push-object"):
        answer = guarded.client.post(
            f"{guarded.public}/v1/fleet/{call}", content=b"", headers=PROTOBUF
        )
        assert answer.status_code in {400, 401, 422}, call


def test_an_oversized_request_is_refused_before_it_is_read(guarded: Guarded) -> None:
    answer = guarded.client.post(
        f"{guarded.public}/v1/fleet/push-object",
        content=iter([b"x" * 1024]),  # chunked: it announces no length
        headers=PROTOBUF,
    )
    assert answer.status_code == 413


def test_calls_and_refusals_are_audited(guarded: Guarded) -> None:
    guarded.client.get(f"{guarded.public}/docs")
    lines = (guarded.state.run / "superlink-audit.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    refused = [entry for entry in entries if entry["method"] == "/docs"]
    assert {(entry["caller"], entry["outcome"]) for entry in refused} == {
        ("stranger", "refused 404")
    }
    registered = [e for e in entries if e["method"] == "/v1/control/register-node"]
    outcomes = {(e["caller"], e["outcome"]) for e in registered}
    assert outcomes == {("operator", "completed"), ("stranger", "refused 404")}


def test_secrets_are_readable_by_their_owner_only(guarded: Guarded) -> None:
    for name in ("operator.token", "executor.secret"):
        assert (guarded.state.flower / name).stat().st_mode & 0o777 == 0o600


def test_a_node_that_left_the_roster_is_taken_out(guarded: Guarded) -> None:
    before = dict(guarded.supervisor.node_keys)
    client = guarded.control(guarded.token)
    guarded.supervisor.node_keys = {}
    wait_until("the node is gone", guarded.tick)
    assert client.nodes() == ()
    # Flower does not take the same key back; that must not keep everything else from working.
    guarded.supervisor.node_keys = {**before, "other": NodeKey.generate().public_openssh}
    wait_until("another node is in", guarded.tick)
    assert len(client.nodes()) == 1
    client.close()


def test_a_killed_superlink_comes_back(guarded: Guarded) -> None:
    before = guarded.supervisor.children()["superlink"]
    os.kill(before, signal.SIGKILL)
    wait_until(
        "another SuperLink answers",
        lambda: guarded.tick() and guarded.supervisor.children().get("superlink") != before,
    )


def test_stopping_twice_is_no_error(tmp_path: Path) -> None:
    state, settings = make_state(tmp_path / "hub")
    supervisor = Supervisor(state, settings, {})
    supervisor.start()
    supervisor.stop()
    supervisor.stop()
    assert supervisor.children() == {}
