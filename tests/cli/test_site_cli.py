# SPDX-License-Identifier: Apache-2.0
"""`allograft-site` as its operator types it."""

import json
import os
import stat
import subprocess
import sys
import tomllib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from allograft.crypto.canonical import format_time
from allograft.durable import durable_file, lock_directory
from allograft.errors import RejectedError, UnavailableError
from allograft.privacy.policy import parse_policy
from allograft.provenance.lineage import describe_base
from allograft.provenance.statement import write_base
from allograft_client import site as site_module
from allograft_client.contact import Contact
from allograft_client.daemon import Daemon
from allograft_client.rows import PacketRow
from allograft_client.settings import Home
from allograft_client.store import Store
from kit.consortium import POLICY, SHAPE, ScriptedRunner, write_model
from kit.founding import Founded, run_site, run_site_json
from kit.waiting import Clock, wait_by

PACKET = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def founded(tmp_path):
    return Founded(tmp_path)


@pytest.fixture
def state(tmp_path, capsys):
    path = tmp_path / "site"
    run_site_json(capsys, "init", "--site", "hospital-a", "--state", path)
    return path


@pytest.fixture
def joined(founded, state, capsys):
    founded.enrol(state)
    join(founded, state, capsys)
    return state


def join(founded, state, capsys):
    return run_site_json(
        capsys, "join", founded.publish(), "--root-fingerprint", founded.keeper.fingerprint,
        "--state", state,
    )  # fmt: skip


def add_received(store, state="received", reason="arrived", role="recipient"):
    store.add_packet(
        PacketRow(PACKET, role, "hospital-b", "organ", "", "d" * 32, state, "", reason, {}, "t")
    )


def refusal(capsys, *arguments) -> tuple[int, str]:
    status, _, err = run_site(capsys, *arguments, "--format", "json")
    return status, json.loads(err)["error"]["code"]


def test_init_makes_private_keys_and_no_policy(state):
    for key in (state / "keys").iterdir():
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE((state / "keys").stat().st_mode) == 0o700
    assert not (state / "policy.toml").exists()
    policy = parse_policy((state / "policy.toml.example").read_bytes())
    assert policy.receive.automatic_keep is False


def test_init_never_replaces_keys(state, capsys):
    before = (state / "keys" / "signing.pem").read_bytes()
    assert refusal(capsys, "init", "--site", "other", "--state", state) == (1, "AG-SIT-013")
    assert (state / "keys" / "signing.pem").read_bytes() == before


@pytest.mark.parametrize("written", range(7))  # four keys, request, example policy, settings
def test_an_interrupted_init_goes_on_with_the_keys_it_made(
    tmp_path, founded, capsys, monkeypatch, written
):
    state, arguments = tmp_path / "site", ("init", "--site", "hospital-a")
    real, left = durable_file, iter(range(written))

    def full(path, mode=0o600):
        if next(left, None) is None:
            raise UnavailableError("AG-STO-001", f"cannot write {path.name}: no space")
        return real(path, mode)

    monkeypatch.setattr("allograft.durable.durable_file", full)
    assert refusal(capsys, *arguments, "--state", state) == (3, "AG-STO-001")
    monkeypatch.undo()
    before = {path.name: path.read_bytes() for path in (state / "keys").glob("*")}
    assert len(before) == min(written, 4)
    run_site_json(capsys, *arguments, "--state", state)
    after = {path.name: path.read_bytes() for path in (state / "keys").glob("*")}
    assert len(after) == 4
    assert before.items() <= after.items()
    founded.enrol(state)
    assert join(founded, state, capsys)["sites"] == ["hospital-a"]


def test_init_tells_the_fingerprint_that_the_keeper_computes(state, founded):
    from allograft.roster.enrolment import fingerprint

    content = (state / "hospital-a.enrol.json").read_bytes()
    assert len(fingerprint(content)) == 49


@pytest.mark.parametrize("name", ["Hospital", "../up", "a" * 64, ""])
def test_refuses_names_that_cannot_stand_in_a_roster(tmp_path, capsys, name):
    arguments = ("init", "--site", name, "--state", tmp_path / "site")
    assert refusal(capsys, *arguments) == (1, "AG-SIT-001")
    assert not (tmp_path / "site" / "site.toml").exists()


def test_three_commands_join(founded, state, capsys):
    founded.enrol(state)
    membership = join(founded, state, capsys)
    assert membership["coordinator"] == "consortium"
    assert membership["sites"] == ["hospital-a"]
    status = run_site_json(capsys, "status", "--state", state)
    assert (status["site"], status["daemon"]) == ("hospital-a", "stopped")


def test_refuses_an_invitation_with_another_root(founded, state, capsys):
    founded.enrol(state)
    arguments = ("join", founded.publish(), "--root-fingerprint", "0" * 64, "--state", state)
    assert refusal(capsys, *arguments) == (1, "AG-ROS-010")
    assert not (state / "invitation.json").exists()


def test_refuses_to_join_without_a_comparison(founded, state, capsys):
    founded.enrol(state)
    assert refusal(capsys, "join", founded.publish(), "--state", state) == (1, "AG-ROS-010")


def test_refuses_a_roster_that_does_not_list_this_site(founded, state, tmp_path, capsys):
    other = tmp_path / "other"
    run_site_json(capsys, "init", "--site", "hospital-a", "--state", other)
    founded.enrol(other)
    fingerprint = founded.keeper.fingerprint
    arguments = ("join", founded.publish(), "--root-fingerprint", fingerprint, "--state", state)
    assert refusal(capsys, *arguments) == (1, "AG-ROS-002")
    assert list((state / "roster").iterdir()) == []


def test_a_refused_consortium_does_not_stand_in_the_way_of_the_right_one(
    founded, state, tmp_path, capsys
):
    stranger = Founded(tmp_path / "stranger")
    arguments = ("--root-fingerprint", stranger.keeper.fingerprint, "--state", state)
    assert refusal(capsys, "join", stranger.publish(), *arguments) == (1, "AG-ROS-002")
    founded.enrol(state)
    assert join(founded, state, capsys)["sites"] == ["hospital-a"]


def test_a_site_that_joined_never_moves_to_another_consortium(joined, tmp_path, capsys):
    stranger = Founded(tmp_path / "stranger")
    stranger.enrol(joined)
    arguments = ("--root-fingerprint", stranger.keeper.fingerprint, "--state", joined)
    assert refusal(capsys, "join", stranger.publish(), *arguments) == (1, "AG-ROS-010")


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe", b'{"v":1}'])
def test_refuses_files_that_are_no_invitation(state, tmp_path, capsys, content):
    path = tmp_path / "invitation.json"
    path.write_bytes(content)
    arguments = ("join", path, "--root-fingerprint", "0" * 64, "--state", state)
    assert refusal(capsys, *arguments) == (1, "AG-ROS-014")


@pytest.mark.parametrize("name", ["absent.json", "."])
def test_joining_with_what_is_no_file_names_the_path(state, tmp_path, capsys, name):
    arguments = ("join", tmp_path / name, "--root-fingerprint", "0" * 64, "--state", state)
    assert refusal(capsys, *arguments) == (3, "AG-STO-005")


def test_a_model_is_added_from_paths_that_exist(joined, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("one line\n")
    good = {"--path": tmp_path, "--data": text, "--retention": text}
    for option in good:
        paths = [part for pair in {**good, option: "absent"}.items() for part in pair]
        arguments = ("model", "add", "m", *paths, "--state", joined)
        assert refusal(capsys, *arguments) == (3, "AG-STO-005")


def test_commands_before_joining_say_what_is_missing(state, capsys):
    assert refusal(capsys, "status", "--state", state) == (1, "AG-SIT-008")
    assert refusal(capsys, "packets", "--state", state) == (1, "AG-SIT-008")


def test_commands_without_a_state_say_what_is_missing(tmp_path, capsys):
    assert refusal(capsys, "status", "--state", tmp_path / "none") == (3, "AG-STO-003")


def test_a_lost_database_is_not_begun_anew(joined, capsys):
    for path in joined.glob("site.db*"):
        path.unlink()
    for command in ("status", "packets", "serve"):
        status, _, err = run_site(capsys, command, "--state", joined)
        assert (status, "AG-STO-003" in err, "backup" in err) == (3, True, True)
    assert not (joined / "site.db").exists()


def test_a_damaged_database_is_named(joined, capsys):
    (joined / "site.db").write_bytes(b"garbage!" * 1024)
    assert refusal(capsys, "status", "--state", joined) == (3, "AG-STO-004")
    status, out, _ = run_site(capsys, "doctor", "--state", joined, "--format", "json")
    findings = {finding["check"]: finding for finding in json.loads(out)["findings"]}
    assert (status, findings["database"]["code"]) == (3, "AG-STO-004")


@pytest.mark.parametrize(
    "text", [b"site = 3", b"\xff", b"site = [", b'site = "a"\nodd = 1', b"a = " + b"[" * 20_000]
)
def test_refuses_malformed_settings(joined, capsys, text):
    (joined / "site.toml").write_bytes(text)
    assert refusal(capsys, "status", "--state", joined) == (1, "AG-SIT-001")


def test_huge_settings_are_not_read(joined, capsys):
    (joined / "site.toml").write_bytes(b"#" * 70_000)
    assert refusal(capsys, "status", "--state", joined) == (1, "AG-IN-002")


def test_settings_that_are_no_file_are_unavailable(joined, capsys):
    (joined / "site.toml").unlink()
    (joined / "site.toml").mkdir()
    assert refusal(capsys, "status", "--state", joined) == (3, "AG-STO-005")


def test_an_exposed_key_is_refused(joined, capsys):
    (joined / "keys" / "signing.pem").chmod(0o644)
    assert refusal(capsys, "status", "--state", joined) == (1, "AG-KEY-004")


def test_usage_errors_leave_with_two(capsys):
    status, _, err = run_site(capsys, "donate")
    assert status == 2
    assert "hint:" in err


def test_doctor_names_each_finding_with_its_fix(joined, capsys):
    status, out, _ = run_site(capsys, "doctor", "--state", joined, "--format", "json")
    findings = {finding["check"]: finding for finding in json.loads(out)["findings"]}
    assert status == 3
    assert findings["keys"]["level"] == "ok"
    assert findings["roster"]["level"] == "ok"
    assert findings["policy"]["code"] == "AG-PRV-001"
    # Nobody listens where the roster says the coordinator is.
    assert findings["coordinator"]["code"] == "AG-SIT-015"
    assert all(finding["fix"] for finding in findings.values() if finding["level"] != "ok")


def test_doctor_says_whether_a_list_of_identifiers_is_set(joined, capsys):
    def found():
        _, out, _ = run_site(capsys, "doctor", "--state", joined, "--format", "json")
        (one,) = [f for f in json.loads(out)["findings"] if f["check"] == "identifiers"]
        return one["level"], one["code"], one["detail"]

    assert found() == ("ok", "", "no list is set; text that leaves is scanned for patterns alone")
    measured = POLICY.replace('modes = ["open"]', 'modes = ["open", "measured"]', 1)
    (joined / "policy.toml").write_text(measured)
    assert found()[:2] == ("error", "AG-PRV-016")
    settings, path = joined / "site.toml", joined / "patients.csv"
    settings.write_text(f'identifiers = "patients.csv"\n{settings.read_text()}')
    assert found()[:2] == ("error", "AG-STO-005")
    path.write_text("name,birth date\nZoltan Bergmann,1962-04-17\n")
    path.chmod(0o600)
    assert found() == ("ok", "", "a list is set; 1 cells of it cannot be matched")
    path.chmod(0o644)
    assert found()[0] == "warning"
    path.write_bytes(b"\xff")
    assert found()[:2] == ("error", "AG-PRV-070")


def test_progress_is_told_as_the_present_only_while_somebody_works(joined, capsys):
    store = Store(joined / "site.db")
    add_received(store, "training", "planned; its training is queued", role="donor")
    number = store.add_job("heavy", "donate", PACKET)
    assert "its training is queued" in run_site(capsys, "packets", "--state", joined)[1]
    store.next_job("heavy")
    store.set_progress(number, {"stage": "training", "done": 120, "of": 400})

    def told():
        (job,) = run_site_json(capsys, "status", "--state", joined)["jobs"]
        _, listed, _ = run_site(capsys, "packets", "--state", joined)
        _, shown, _ = run_site(capsys, "packet", "show", PACKET, "--state", joined)
        assert job["progress"] in listed
        assert job["progress"] in shown
        return job["state"], job["progress"]

    interrupted = ("queued", "interrupted at training 120/400; the daemon is stopped")
    assert told() == interrupted
    release = lock_directory(joined)
    assert told() == ("running", "training 120/400")
    store.requeue_jobs()
    assert told() == ("queued", "waits to go on at training 120/400")
    release()
    assert told() == interrupted
    store.close()


def test_an_edited_row_is_damage_and_doctor_goes_on(joined, capsys):
    store = Store(joined / "site.db")
    add_received(store)
    store._run("UPDATE packet SET facts = '{{{'")
    store.close()
    assert refusal(capsys, "packets", "--state", joined) == (3, "AG-STO-004")
    assert refusal(capsys, "packet", "show", PACKET, "--state", joined) == (3, "AG-STO-004")
    status, out, _ = run_site(capsys, "doctor", "--state", joined, "--format", "json")
    findings = {finding["check"]: finding for finding in json.loads(out)["findings"]}
    assert (status, findings["database"]["code"]) == (3, "AG-STO-004")
    assert findings["disk"]["level"] == "ok"


def test_status_says_when_the_coordinator_was_heard(joined, capsys):
    def lines():
        status, out, _ = run_site(capsys, "status", "--state", joined)
        assert status == 0
        return [line for line in out.splitlines() if line.startswith("coordinator:")]

    assert lines() == ["coordinator: never heard [AG-SIT-015]; `allograft-site doctor` tells why"]
    store = Store(Home(joined).database)
    now = datetime.now(UTC)
    Contact(store).hear(now - timedelta(hours=1))
    (line,) = lines()
    assert line.startswith("coordinator: not heard since ")
    Contact(store).hear(now)
    (line,) = lines()
    assert line == f"coordinator: heard at {format_time(now)}"
    store.close()


def test_a_donation_without_a_policy_is_refused_before_anything_runs(joined, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("text")
    code = refusal(
        capsys, "donate", "--model", "ward", "--data", tmp_path / "notes.txt", "--domain", "notes",
        "--declare", "synthetic", "--declared-by", "steward", "--state", joined,
    )  # fmt: skip
    assert code == (1, "AG-PRV-001")
    assert run_site_json(capsys, "packets", "--state", joined)["packets"] == []


@pytest.fixture
def scripted(monkeypatch):
    """Workers that answer at once; the rest of the command is real."""
    runner = ScriptedRunner()

    def describe(task):
        from pathlib import Path

        return {
            "base": write_base(describe_base(Path(task["model"]))),
            "shape": SHAPE.to_json(),
            "parameters": 1,
            "documents": 60,
            "retention_documents": 60,
        }

    runner._describe = describe
    monkeypatch.setattr(site_module, "Runner", lambda _: runner)
    return runner


def add_model(joined, tmp_path, capsys):
    model = write_model(tmp_path / "base")
    for name in ("own.txt", "general.txt"):
        (tmp_path / name).write_text("text")
    return run_site_json(
        capsys, "model", "add", "ward", "--path", model, "--data", tmp_path / "own.txt",
        "--retention", tmp_path / "general.txt", "--state", joined,
    )  # fmt: skip


def test_commands_do_their_work_when_no_daemon_runs(joined, tmp_path, capsys, scripted):
    added = add_model(joined, tmp_path, capsys)
    assert len(added["weights_digest"]) == 64
    (joined / "policy.toml").write_text(POLICY)
    (tmp_path / "notes.txt").write_text("text")
    donated = run_site_json(
        capsys, "donate", "--model", "ward", "--data", tmp_path / "notes.txt", "--domain", "notes",
        "--declare", "synthetic", "--declared-by", "steward", "--state", joined,
    )  # fmt: skip
    assert donated["state"] == "offered"
    shown = run_site_json(capsys, "packet", "show", donated["packet_id"][:10], "--state", joined)
    assert [change["state"] for change in shown["history"]] == ["training", "offered"]
    models = run_site_json(capsys, "model", "list", "--state", joined)["models"]
    assert [model["name"] for model in models] == ["ward"]


def test_text_output_says_what_leaves_and_what_does_not(joined, tmp_path, capsys, scripted):
    add_model(joined, tmp_path, capsys)
    _, out, _ = run_site(capsys, "model", "list", "--state", joined)
    assert "ward: llama, 3 layers of 32" in out
    (joined / "policy.toml").write_text(POLICY)
    (tmp_path / "notes.txt").write_text("text")
    _, out, _ = run_site(
        capsys, "donate", "--model", "ward", "--data", tmp_path / "notes.txt", "--domain", "notes",
        "--declare", "synthetic", "--declared-by", "steward", "--state", joined,
    )  # fmt: skip
    assert "Does not leave: the text" in out


def test_a_request_waits_for_a_daemon_that_holds_the_state(joined, tmp_path, capsys, scripted):
    release = lock_directory(joined)
    model = write_model(tmp_path / "base")
    (tmp_path / "own.txt").write_text("text")
    arguments = (
        "model", "add", "ward", "--path", model, "--data", tmp_path / "own.txt",
        "--retention", tmp_path / "own.txt", "--timeout", "1", "--state", joined,
    )  # fmt: skip
    assert refusal(capsys, *arguments) == (3, "AG-SIT-009")
    release()
    status = run_site_json(capsys, "status", "--state", joined)
    assert [job["state"] for job in status["jobs"]] == ["queued"]
    assert scripted.tasks == []


def test_a_daemon_waits_for_a_command_on_the_same_state(joined, monkeypatch):
    began = []
    wait_by(Clock(at_s=5.0, then=lock_directory(joined)), monkeypatch)
    monkeypatch.setattr(Daemon, "_run_locked", lambda _daemon: began.append(True))
    Daemon(Home(joined)).run()
    assert len(began) == 1


def test_a_second_daemon_on_the_same_state_is_refused(joined, monkeypatch):
    wait_by(Clock(), monkeypatch)
    release = lock_directory(joined)
    with pytest.raises(UnavailableError, match="AG-STO-002"):
        Daemon(Home(joined)).run()
    release()


def test_every_request_names_its_packet_even_if_only_queued(joined, capsys):
    site = site_module.open_site(Home(joined))
    packet_id = "ab" * 16
    row = PacketRow(
        packet_id=packet_id, role="donor", donor="hospital-a", kind="organ", model="", code="",
        dispatch_id="", state="routed", reason="proposals are here", facts={},
        time="2026-11-23T08:00:00Z",
    )  # fmt: skip
    site.store.add_packet(row)
    (joined / "policy.toml").write_text(POLICY)
    for command in (
        ("approve", packet_id, "--role", "steward"),
        ("dispatch", packet_id, "--to", "hospital-a"),
        ("withdraw", packet_id),
        ("trial", packet_id),
    ):
        queued = run_site_json(capsys, *command, "--no-wait", "--state", joined)
        assert (queued["packet_id"], queued["state"]) == (packet_id, "queued"), command


def test_a_daemon_without_its_sealing_key_does_not_start(joined):
    key = joined / "keys" / "sealing.key"
    key.unlink()
    with pytest.raises(UnavailableError, match="AG-STO-003"):
        Daemon(Home(joined)).run()
    key.mkdir()
    with pytest.raises(RejectedError, match="AG-KEY-004"):
        Daemon(Home(joined)).run()


def test_doctor_warns_of_a_state_directory_that_others_may_write(joined, capsys):
    for mode, level in ((0o700, "ok"), (0o755, "ok"), (0o777, "warning")):
        joined.chmod(mode)
        _, out, _ = run_site(capsys, "doctor", "--state", joined, "--format", "json")
        (found,) = [f for f in json.loads(out)["findings"] if f["check"] == "directory"]
        assert found["level"] == level
    assert ("0777" in found["detail"], "chmod 700" in found["fix"]) == (True, True)


def test_unknown_packets_and_models_are_named(joined, capsys):
    assert refusal(capsys, "keep", "abcd", "--state", joined) == (1, "AG-SIT-003")
    assert refusal(capsys, "model", "export", "none", "--out", "x", "--state", joined) == (
        1,
        "AG-SIT-003",
    )


def test_help_loads_neither_tensors_nor_flower():
    script = (
        "import sys\nfrom allograft_client.main import app\n"
        "from allograft.cli import shell\nshell.invoke(app, 'allograft-site', ['--help'])\n"
        "heavy = {'torch', 'transformers', 'peft', 'flwr'} & set(sys.modules)\n"
        "sys.exit(1 if heavy else 0)\n"
    )
    environment = {**os.environ, "COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, env=environment, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert b"donate" in done.stdout


def test_settings_written_by_init_can_be_read(state):
    assert tomllib.loads((state / "site.toml").read_text())["site"] == "hospital-a"


class TestFollow:
    """`packet follow`."""

    PACKET = "ab" * 16

    def arrive(self, state) -> site_module.Site:
        site = site_module.open_site(Home(state))
        row = PacketRow(
            packet_id=self.PACKET, role="recipient", donor="hospital-b", kind="", model="",
            dispatch_id="", state="received", code="", reason="all parts are here", facts={},
            time="2026-11-23T08:00:00Z",
        )  # fmt: skip
        site.store.add_packet(row)
        return site

    def test_tells_every_change_until_the_wanted_state(self, joined):
        site = self.arrive(joined)
        program = Path(sys.executable).with_name("allograft-site")
        command = [str(program), "packet", "follow"]
        options = ["--until", "refused", "--state", str(joined), "--format", "json"]
        with subprocess.Popen(
            [*command, self.PACKET[:8], *options], stdout=subprocess.PIPE, text=True
        ) as follower:
            first = json.loads(follower.stdout.readline())
            site.store.move_packet(self.PACKET, ["received"], "refused", "not here", "AG-RCP-013")
            second = json.loads(follower.stdout.readline())
            assert follower.wait(30) == 0
        assert (first["packet_id"], first["state"]) == (self.PACKET, "received")
        assert (second["state"], second["code"]) == ("refused", "AG-RCP-013")

    def test_waits_for_a_packet_that_is_not_here_yet_and_says_so_at_the_end(self, joined, capsys):
        arguments = ("packet", "follow", self.PACKET, "--timeout", "1", "--state", joined)
        assert refusal(capsys, *arguments) == (3, "AG-SIT-009")

    def test_refuses_a_state_that_no_packet_can_have(self, joined, capsys):
        arguments = ("packet", "follow", self.PACKET, "--until", "done", "--state", joined)
        assert refusal(capsys, *arguments) == (1, "AG-IN-003")
