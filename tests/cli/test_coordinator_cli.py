# SPDX-License-Identifier: Apache-2.0
"""`allograft-coordinator` answers with results, coded errors and exit codes."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

import allograft
from allograft.cli import shell
from allograft.durable import lock_directory
from allograft.errors import UnavailableError
from allograft.roster.enrolment import fingerprint, verify_coordinator_request
from allograft_server.daemon import Daemon
from allograft_server.main import app
from allograft_server.settings import State
from kit.coordination import Coordination
from kit.waiting import Clock, wait_by

ADDRESS = "127.0.0.1:19091"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()  # what the test itself said before
        status = shell.invoke(app, "allograft-coordinator", [str(entry) for entry in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    yield run
    structlog.reset_defaults()  # `serve` sends its log to the captured stream, which ends here


@pytest.fixture
def state(tmp_path: Path, run: Any) -> Path:
    state = tmp_path / "hub"
    assert run("init", "--name", "hub", "--address", ADDRESS, "--state", state)[0] == 0
    return state


def test_shows_its_version(run: Any) -> None:
    assert run("--version")[:2] == (0, f"allograft-coordinator {allograft.__version__}\n")


def test_init_makes_private_keys_and_a_request(tmp_path: Path, run: Any) -> None:
    state = tmp_path / "hub"
    status, out, _ = run(
        "init", "--name", "hub", "--address", ADDRESS, "--state", state, "--format", "json"
    )
    assert status == 0
    made = json.loads(out)
    request = (state / "coordinator.enrol.json").read_bytes()
    record = verify_coordinator_request(request)
    assert (record.coordinator_id, record.address) == ("hub", ADDRESS)
    assert made["fingerprint"] == fingerprint(request)
    for path in (state / "keys").rglob("*"):
        if path.is_file() and path.suffix in {".key"} | (
            {".pem"} if "sign" in path.name else set()
        ):
            assert path.stat().st_mode & 0o077 == 0, path.name
    assert state.stat().st_mode & 0o077 == 0


def test_init_never_overwrites(state: Path, run: Any) -> None:
    before = (state / "keys" / "signing.pem").read_bytes()
    status, _, err = run("init", "--name", "hub", "--address", ADDRESS, "--state", state)
    assert status == 1
    assert "AG-CRD-013" in err
    assert (state / "keys" / "signing.pem").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("Hub", ADDRESS), ("", ADDRESS), ("a" * 64, ADDRESS), ("hub", "127.0.0.1"),
        ("hub", ":19091"), ("hub", "host:0"), ("hub", "host:65536"), ("hub", "host:x"),
        ("hub", "ho st:1"), ("hub", 'a"b:1'),
    ],
)  # fmt: skip
def test_init_refuses_bad_names_and_addresses_and_leaves_nothing(
    tmp_path: Path, run: Any, name: str, address: str
) -> None:
    state = tmp_path / "hub"
    status, _, err = run("init", "--name", name, "--address", address, "--state", state)
    assert status == 1, err
    assert not state.exists()


def empty_directory(path: Path, ignore_errors: bool) -> None:
    assert ignore_errors
    for entry in path.iterdir():
        if entry.is_dir():
            empty_directory(entry, ignore_errors)
            entry.rmdir()
        else:
            entry.unlink()


@pytest.mark.parametrize("command", ["status", "sites", "serve"])
def test_commands_on_an_empty_directory_say_what_to_do(
    tmp_path: Path, run: Any, command: str
) -> None:
    status, _, err = run(command, "--state", tmp_path)
    assert status == 3
    assert "AG-STO-003" in err
    assert "hint:" in err


@pytest.mark.parametrize(
    "content",
    [
        b"name = ",
        b"\xff",
        b'name = "hub"\n',
        b'name = "hub"\nsecret = 1\n',
        b"[a]\n[a]\n",
        b"a = " + b"[" * 20_000,
    ],
)
def test_a_malformed_configuration_is_refused(state: Path, run: Any, content: bytes) -> None:
    (state / "coordinator.toml").write_bytes(content)
    status, _, err = run("status", "--state", state)
    assert status == 1
    assert "AG-CRD-001" in err


def test_a_huge_configuration_is_not_read(state: Path, run: Any) -> None:
    (state / "coordinator.toml").write_bytes(b"#" * 70_000)
    status, _, err = run("status", "--state", state)
    assert (status, "AG-IN-002" in err) == (1, True)


def test_a_key_that_others_can_read_is_refused(state: Path, run: Any) -> None:
    (state / "keys" / "signing.pem").chmod(0o644)
    status, _, err = run("serve", "--state", state)
    assert status == 1
    assert "AG-KEY-004" in err


def test_a_daemon_waits_for_a_command_on_the_same_state(state: Path, monkeypatch: Any) -> None:
    began = []
    wait_by(Clock(at_s=5.0, then=lock_directory(state)), monkeypatch)
    monkeypatch.setattr(Daemon, "_run", lambda _daemon, coordinator: began.append(coordinator))
    Daemon(State(state)).run()
    assert len(began) == 1


def test_a_second_daemon_on_the_same_state_is_refused(
    state: Path, run: Any, monkeypatch: Any
) -> None:
    wait_by(Clock(), monkeypatch)
    release = lock_directory(state)
    try:
        status, _, err = run("serve", "--state", state)
    finally:
        release()
    assert status == 3
    assert "AG-STO-002" in err


def test_a_database_of_a_newer_version_is_refused(state: Path, run: Any) -> None:
    with sqlite3.connect(state / "coordinator.db") as database:
        database.execute("PRAGMA user_version = 999")
    database.close()
    status, _, err = run("status", "--state", state)
    assert status == 1
    assert "AG-CRD-012" in err


@pytest.mark.parametrize("command", ["status", "serve"])
@pytest.mark.parametrize(("content", "code"), [(None, "AG-STO-003"), (b"#" * 8192, "AG-STO-004")])
def test_a_lost_or_damaged_database_is_named(
    state: Path, run: Any, command: str, content: bytes | None, code: str
) -> None:
    (state / "coordinator.db").unlink()
    if content is not None:
        (state / "coordinator.db").write_bytes(content)
    status, _, err = run(command, "--state", state)
    assert (status, code in err) == (3, True), err
    assert (state / "coordinator.db").exists() == (content is not None)


def test_init_on_a_full_disk_leaves_the_directory_that_was_there(
    tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_arguments: object) -> None:
        raise UnavailableError("AG-STO-001", "cannot write coordinator.toml: no space")

    monkeypatch.setattr("allograft_server.founding.write_settings", full)
    # What cannot be removed, as a mount point cannot: its content goes, it stays.
    monkeypatch.setattr("allograft_server.founding.shutil.rmtree", empty_directory)
    arguments = ("init", "--name", "hub", "--address", ADDRESS, "--state", tmp_path)
    status, _, err = run(*arguments)
    assert (status, "AG-STO-001" in err) == (3, True), err
    monkeypatch.undo()
    assert run(*arguments)[0] == 0


def test_import_roster_names_the_sites_and_the_root(tmp_path: Path, run: Any) -> None:
    world = Coordination(tmp_path, "donor", "near")
    world.coordinator.close()
    status, out, err = run(
        "import-roster", tmp_path / "published", "--state", world.state.root, "--format", "json"
    )
    assert status == 0, err
    taken = json.loads(out)
    assert taken["sites"] == ["donor", "near"]
    assert taken["root_fingerprint"] == world.keeper.fingerprint


def test_import_roster_without_an_invitation_says_so(state: Path, tmp_path: Path, run: Any) -> None:
    status, _, err = run("import-roster", tmp_path / "nothing", "--state", state)
    assert status == 3
    assert "AG-STO-003" in err


def test_import_roster_refuses_a_malformed_invitation(
    state: Path, tmp_path: Path, run: Any
) -> None:
    (tmp_path / "invitation.json").write_bytes(b"{}")
    status, _, err = run("import-roster", tmp_path, "--state", state)
    assert status == 1
    assert "AG-ROS-014" in err


def test_import_roster_refuses_another_root_than_the_trusted_one(tmp_path: Path, run: Any) -> None:
    world = Coordination(tmp_path / "one", "donor")
    world.coordinator.close()
    other = Coordination(tmp_path / "two", "donor")
    other.coordinator.close()
    published = tmp_path / "two" / "published"
    status, _, err = run("import-roster", published, "--state", world.state.root)
    assert status == 1
    assert "AG-" in err


def test_status_and_sites_show_what_is_there(tmp_path: Path, run: Any) -> None:
    world = Coordination(tmp_path, "donor", "near")
    world.judged(world.card("near"))
    offer = world.make_offer("donor")
    world.judged(world.offer(offer))
    world.coordinator.close()
    root = world.state.root
    status, out, _ = run("status", "--state", root, "--format", "json")
    assert status == 0
    seen = json.loads(out)
    assert (seen["sites"], seen["running"]) == (2, False)
    assert [p["packet_id"] for p in seen["packets"]] == [offer.packet_id]
    text = run("status", "--state", root)[1]
    assert offer.packet_id in text
    lines = json.loads(run("sites", "--state", root, "--format", "json")[1])
    assert {line["site"]: line["has_card"] for line in lines} == {"donor": False, "near": True}
    assert "near  enrolled  seen" in run("sites", "--state", root)[1]


def test_the_coordinator_starts_without_torch() -> None:
    modules = [
        "main", "daemon", "courier", "superlink", "supervisor", "overview", "founding", "post",
    ]  # fmt: skip
    code = (
        "import sys, importlib\n"
        f"for name in {modules!r}: importlib.import_module('allograft_server.' + name)\n"
        "heavy = {'torch', 'transformers', 'peft'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_loads_neither_flower_nor_grpc() -> None:
    code = (
        "import sys\n"
        "from allograft.cli import shell\n"
        "from allograft_server.main import app\n"
        "status = shell.invoke(app, 'allograft-coordinator', ['--help'])\n"
        "heavy = {'flwr', 'grpc', 'tuf', 'torch'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else status)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "import-roster" in done.stdout
