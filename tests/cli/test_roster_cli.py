# SPDX-License-Identifier: Apache-2.0
"""Claims about `allograft roster` and the shell that all our command lines share."""

import errno
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import typer

from allograft.cli import shell
from allograft.cli.main import app
from allograft.durable import durable_file
from allograft.errors import RejectedError, UnavailableError
from allograft.roster.client import RosterClient
from allograft.roster.enrolment import fingerprint, request_coordinator, request_site
from kit.logbook import Hub, Party


@pytest.fixture
def run(capsys):
    def call(*arguments):
        status = shell.invoke(app, "allograft", [str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture
def run_json(run):
    def call(*arguments):
        status, out, err = run(*arguments, "--format", "json")
        assert status == 0, err
        return json.loads(out)

    return call


class Files:
    """Requests of a coordinator and of sites, as files."""

    def __init__(self, root):
        self.root = root
        self.now = datetime.now(UTC).replace(microsecond=0)
        self.hub = Hub()
        self.keeper = root / "keeper"
        self.coordinator = root / "coordinator.enrol.json"
        self.coordinator.write_bytes(request_coordinator(self.hub.record, self.hub.keys))

    def request(self, name):
        party = Party(name, self.now)
        path = self.root / f"{name}.enrol.json"
        path.write_bytes(request_site(party.record, party.keys))
        return path

    def init(self):
        return ("roster", "init", self.keeper, "--coordinator", self.coordinator)


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path)


def test_a_roster_from_nothing_to_a_trusted_site(files, run_json, tmp_path):
    founded = run_json(*files.init(), "--keys", 3, "--threshold", 2)
    assert (founded["root_keys"], founded["threshold"], founded["coordinator"]) == (3, 2, "hub")
    for name in ("a", "b", "c"):
        request = files.request(name)
        told = fingerprint(request.read_bytes())
        made = run_json("roster", "enrol", files.keeper, request, "--fingerprint", told)
        assert (made["site"], made["fingerprint"]) == (name, told)
    run_json("roster", "revoke", files.keeper, "c", "--reason", "left")
    published = run_json("roster", "publish", files.keeper, "--out", tmp_path / "out")
    assert published["sites"] == ["a", "b"]
    assert published["root_fingerprint"] == founded["root_fingerprint"]
    roster = RosterClient(tmp_path / "out").current(files.now)
    assert (set(roster.sites), set(roster.revoked)) == ({"a", "b"}, {"c"})
    assert roster.digest == published["digest"]
    shown = run_json("roster", "show", files.keeper)
    assert [site["site"] for site in shown["sites"]] == ["a", "b"]
    assert (shown["revoked"], shown["witness_quorum"]) == (["c"], 2)
    renewed = run_json("roster", "renew", files.keeper)
    assert renewed["root_version"] == 2


def test_every_command_also_speaks_to_people(files, run, tmp_path):
    request = files.request("a")
    outputs = [
        run(*files.init()),
        run("roster", "enrol", files.keeper, request, "--yes"),
        run("roster", "publish", files.keeper, "--out", tmp_path / "out", "--quorum", 1),
        run("roster", "show", files.keeper),
        run("roster", "renew", files.keeper),
        run("roster", "revoke", files.keeper, "a", "--reason", "left"),
    ]
    assert [status for status, _, _ in outputs] == [0] * 6
    assert all(out.strip() and not err for _, out, err in outputs)


def test_a_wrong_fingerprint_is_refused_with_a_hint(files, run):
    run(*files.init())
    status, out, err = run(
        "roster", "enrol", files.keeper, files.request("a"), "--fingerprint", "0" * 40
    )
    assert (status, out) == (1, "")
    first, second = err.splitlines()
    assert first.startswith("allograft: error: AG-ROS-011: ")
    assert second.startswith("allograft: hint: ")


def test_without_a_terminal_nobody_is_asked(files, run):
    run(*files.init())
    status, out, err = run("roster", "enrol", files.keeper, files.request("a"))
    assert (status, out) == (1, "")
    assert ("AG-ROS-011" in err, "--fingerprint" in err) == (True, True)


def test_a_script_cannot_skip_the_comparison(files, run):
    run(*files.init())
    status, _, err = run("roster", "enrol", files.keeper, files.request("a"), "--format", "json")
    assert status == 1
    error = json.loads(err)["error"]
    assert (error["code"], set(error)) == ("AG-ROS-011", {"code", "cause", "hint"})


def test_a_person_is_asked(files, run, monkeypatch):
    run(*files.init())
    answers = iter([False, True])
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("allograft.cli.roster.typer.confirm", lambda question: next(answers))
    request = files.request("a")
    assert run("roster", "enrol", files.keeper, request)[0] == 1
    status, out, _ = run("roster", "enrol", files.keeper, request)
    assert status == 0
    assert fingerprint(request.read_bytes()) in out


def test_the_coordinators_fingerprint_can_be_compared_too(files, run):
    status, _, err = run(*files.init(), "--fingerprint", "0" * 40)
    assert (status, "AG-ROS-011" in err) == (1, True)
    assert not files.keeper.exists()


def test_a_threshold_that_no_root_could_reach_is_misuse(files, run):
    status, _, err = run(*files.init(), "--keys", 2, "--threshold", 3)
    assert (status, "--threshold of 3" in err, "--help" in err) == (2, True, True)
    assert not files.keeper.exists()


class FullDisk:
    """Lets some files be written, then none."""

    def __init__(self, monkeypatch, written):
        real, left = durable_file, iter(range(written))

        def full(path, mode=0o600):
            if next(left, None) is None:
                raise UnavailableError("AG-STO-001", f"cannot write {path.name}: no space")
            return real(path, mode)

        monkeypatch.setattr("allograft.durable.durable_file", full)


@pytest.mark.parametrize("written", range(6))  # three root keys, targets key, coordinator, root
def test_an_init_on_a_full_disk_leaves_nothing_in_the_way(files, run, monkeypatch, written):
    with monkeypatch.context() as patch:
        FullDisk(patch, written)
        status, _, err = run(*files.init())
    assert (status, "AG-STO-001" in err) == (3, True)
    assert not files.keeper.exists()
    assert run(*files.init())[0] == 0


def test_an_init_on_a_full_disk_keeps_the_directory_it_was_given(files, run, monkeypatch):
    files.keeper.mkdir()
    FullDisk(monkeypatch, 3)
    assert run(*files.init())[0] == 3
    assert list(files.keeper.iterdir()) == []


# Invitation, root, roster; targets, snapshot, timestamp; the anchor and the newest of the client.
@pytest.mark.parametrize("written", range(8))
def test_a_publication_on_a_full_disk_is_no_version(files, run, run_json, monkeypatch, written):
    out = files.root / "out"
    run(*files.init())
    run("roster", "enrol", files.keeper, files.request("a"), "--yes")
    assert run_json("roster", "publish", files.keeper, "--out", out)["version"] == 1
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with monkeypatch.context() as patch:
        FullDisk(patch, written)
        status, _, err = run("roster", "publish", files.keeper, "--out", out)
    assert (status, "AG-STO-001" in err) == (3, True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    run("roster", "enrol", files.keeper, files.request("b"), "--yes")
    assert run_json("roster", "publish", files.keeper, "--out", out)["version"] == 2
    assert set(RosterClient(out).current(files.now).sites) == {"a", "b"}


def test_a_missing_file_is_unavailable(files, run):
    status, _, err = run("roster", "init", files.keeper, "--coordinator", "absent.json")
    assert (status, "AG-STO-005" in err) == (3, True)


def test_a_path_of_the_wrong_sort_is_unavailable_and_named(files, run, tmp_path):
    taken = tmp_path / "taken"
    taken.write_bytes(b"x")
    status, _, err = run("roster", "init", taken, "--coordinator", files.coordinator)
    assert (status, f"AG-STO-005: {taken}: " in err) == (3, True)
    run(*files.init())
    for out in (taken, "/proc/nothing/here"):
        status, _, err = run("roster", "publish", files.keeper, "--out", out)
        assert (status, "AG-STO-005" in err) == (3, True)


def test_a_directory_without_roster_is_rejected(run, tmp_path):
    status, _, err = run("roster", "show", tmp_path)
    assert (status, "AG-ROS-016" in err) == (1, True)


def test_a_huge_request_is_not_read(files, run, tmp_path):
    run(*files.init())
    huge = tmp_path / "huge.enrol.json"
    with huge.open("wb") as handle:
        handle.truncate(3 << 20)
    status, _, err = run("roster", "enrol", files.keeper, huge, "--yes")
    assert (status, "AG-ROS-005" in err) == (1, True)


# --- the shell ---


@dataclass(frozen=True)
class Outcome:
    name: str
    when: datetime
    raw: bytes
    where: Path
    many: tuple[int, ...]


def make_app(action):
    made = typer.Typer()

    @made.command()
    def one(format: shell.FormatOption = shell.Format.text) -> None:
        action(format)

    @made.command()
    def two() -> None:
        """Only so that there are two."""

    return made


def raising(error):
    def action(format):
        raise error

    return make_app(action)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RejectedError("AG-IN-001", "bad"), 1),
        (UnavailableError("AG-STO-001", "full"), 3),
        (OSError(errno.ENOSPC, "No space left on device"), 3),
        (PermissionError(errno.EACCES, "Permission denied", "state"), 3),
        (ValueError("a secret"), 70),
        (KeyboardInterrupt(), 130),
        (typer.Exit(5), 5),
    ],
)
def test_errors_become_exit_codes(capsys, error, status):
    assert shell.invoke(raising(error), "prog", ["one"]) == status
    captured = capsys.readouterr()
    assert "secret" not in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("error", "code", "cause"),
    [
        (OSError(errno.ENOSPC, "full"), "AG-STO-001", "full"),
        (IsADirectoryError(errno.EISDIR, "is one", "a/b"), "AG-STO-005", "a/b: is one"),
        (OSError(errno.EXDEV, "no", ".b.tmp", None, "b"), "AG-STO-005", "b: no"),
        (TimeoutError(), "AG-STO-005", "TimeoutError"),
        (ValueError("a secret"), "", "unexpected ValueError"),
        (typer.Abort(), "", "interrupted"),
    ],
)
def test_every_failure_is_one_json_object_if_asked_for(capsys, error, code, cause):
    shell.invoke(raising(error), "prog", ["one", "--format", "json"])
    found = json.loads(capsys.readouterr().err)["error"]
    assert (found["code"], found["cause"], set(found)) == (code, cause, {"code", "cause", "hint"})


@pytest.mark.parametrize("arguments", [["nope"], ["one", "--nope"]])
def test_misuse_is_json_too(capsys, arguments):
    made = make_app(lambda format: None)
    assert shell.invoke(made, "prog", [*arguments, "--format=json"]) == 2
    found = json.loads(capsys.readouterr().err)["error"]
    assert (found["code"], "--help" in found["hint"]) == ("", True)


def test_a_full_stdout_is_unavailable():
    program = (
        "import typer; from allograft.cli import shell; app = typer.Typer();"
        "app.command()(lambda: shell.emit({}, shell.Format.json, str)); shell.run(app, 'prog')"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, text=True,
            timeout=120, check=False, env=environment,
        )  # fmt: skip
    assert (done.returncode, "AG-STO-001" in done.stderr) == (3, True)
    assert "Exception" not in done.stderr


@pytest.mark.parametrize("arguments", [["nope"], ["one", "--nope"], ["one", "--format", "xml"], []])
def test_misuse_is_exit_code_two(capsys, arguments):
    assert shell.invoke(make_app(lambda format: None), "prog", arguments) == 2
    assert capsys.readouterr().err


def test_values_become_json(capsys):
    when = datetime(2026, 11, 23, 9, 0, tzinfo=UTC) + timedelta(microseconds=5)
    value = Outcome("é", when, b"\x01", Path("a/b"), (1, 2))
    shell.emit(value, shell.Format.json, str)
    assert json.loads(capsys.readouterr().out) == {
        "name": "é", "when": "2026-11-23T09:00:00Z", "raw": "01", "where": "a/b", "many": [1, 2],
    }  # fmt: skip
    shell.emit(value, shell.Format.text, lambda outcome: outcome.name)
    assert capsys.readouterr().out == "é\n"
    assert shell.to_json({"b": {2, 1}, "a": shell.Format.json}) == {"b": [1, 2], "a": "json"}


def test_help_and_version_load_neither_torch_nor_flower():
    program = (
        "import sys; from allograft.cli import shell; from allograft.cli.main import app;"
        "assert shell.invoke(app, 'allograft', ['--help']) == 0;"
        "assert shell.invoke(app, 'allograft', ['--version']) == 0;"
        "assert shell.invoke(app, 'allograft', ['roster', '--help']) == 0;"
        "assert shell.invoke(app, 'allograft', ['audit', '--help']) == 0;"
        "heavy = {'torch', 'flwr', 'transformers', 'peft'} & sys.modules.keys();"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert all(group in done.stdout for group in ("packet", "roster", "audit", "demo"))
