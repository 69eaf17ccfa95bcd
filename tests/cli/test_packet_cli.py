# SPDX-License-Identifier: Apache-2.0
"""Claims about `allograft packet`: a real roster, a real witnessed log, no daemon."""

import json
import os
import shutil
from datetime import timedelta

import numpy as np
import pytest

from allograft.cli import shell
from allograft.cli.main import app
from allograft.crypto import keystore
from allograft.crypto.keys import NodeKey, SealingKey, SigningKey
from allograft.crypto.notekey import NoteKey
from allograft.log.event import sign_event
from allograft.log.store import LogStore
from allograft.log.witness import WitnessState
from allograft.packet import tensors
from allograft.roster.client import RosterClient
from allograft.roster.records import SiteRecord, log_origin
from kit.founding import COORDINATOR, Founded
from kit.packets import AUDITOR, DONOR, RECIPIENT, STRANGER, Donor, edit_json

ADAPTER = {
    f"base_model.model.model.layers.0.self_attn.{module}.lora_{side}.weight": np.ones(
        (4, 64) if side == "A" else (64, 4), np.float32
    )
    for module in ("q_proj", "v_proj")
    for side in ("A", "B")
}


class World:
    """A consortium of four sites, and one dispatch of a lora that the coordinator logged."""

    def __init__(self, root):
        self.founded = Founded(root)
        self.now = self.founded.now
        self.donor = Donor(root / "donor", kind="lora", now=self.now)
        self.witnesses = {}
        for name in (DONOR, RECIPIENT, AUDITOR, STRANGER):
            self.enrol(name)
        self.roster = root / "trusted"
        self.publish()
        packet = self.donor.statement(self.donor.write_payload(ADAPTER))
        self.donor.seal(packet, self.donor.attest(packet))
        self.log()
        self.key = root / "sealing.key"
        keystore.write_sealing_key(self.key, self.donor.sealing[RECIPIENT])

    def enrol(self, name):
        witness = WitnessState(self.founded.root / f"{name}.witness", NoteKey.generate(), name)
        self.witnesses[name] = witness
        signing = self.donor.key if name == DONOR else SigningKey.generate()
        sealing = self.donor.sealing.get(name) or SealingKey.generate()
        record = SiteRecord(
            site_id=name,
            signing_keys=(signing.public,),
            sealing_key=sealing.public,
            witness_vkey=witness.vkey,
            node_key=NodeKey.generate().public_openssh,
            roles=("donor", "recipient", "witness"),
            not_before=self.now - timedelta(days=1),
            not_after=self.now + timedelta(days=90),
        )
        self.founded.keeper.enrol(record)

    def publish(self):
        files = self.founded.keeper.publish(self.now).files
        client = RosterClient(self.roster)
        client.trust(files["1.root.json"])
        self.current = client.refresh(files, self.now)

    def log(self):
        """Log the dispatch, let every witness cosign, and keep the proof beside it."""
        key = self.founded.log_key
        store = LogStore(self.founded.root / "log.db", log_origin(COORDINATOR), key)
        verified = self.donor.verify_dispatch()
        entry = sign_event(self.donor.event(verified), self.donor.key)
        (index,) = store.append([entry])
        policy = self.current.witness_policy()
        for witness in self.witnesses.values():
            note, consistency = store.offer(witness.vkey, 0, policy)
            line = witness.cosign(note, consistency, policy.log_vkey, self.now)
            store.collect(line, witness.vkey)
        (self.donor.out / "dispatch.event.json").write_bytes(entry)
        (self.donor.out / "dispatch.proof").write_bytes(store.proof(index, policy))
        store.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def out(made, tmp_path):
    """A copy of the dispatch that a test may damage."""
    return shutil.copytree(made.donor.out, tmp_path / "packet")


def run(capsys, *arguments):
    status = shell.invoke(app, "allograft", ["packet", *(str(a) for a in arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def run_json(capsys, *arguments):
    status, stdout, stderr = run(capsys, *arguments, "--format", "json")
    assert status == 0, stderr
    return json.loads(stdout)


def refused(capsys, *arguments):
    status, stdout, stderr = run(capsys, *arguments, "--format", "json")
    assert (status, stdout) == (1, "")
    return json.loads(stderr)["error"]["code"]


def test_inspect_says_that_it_checked_nothing(capsys, made, out):
    found = run_json(capsys, "inspect", out)
    assert found["verified"] is False
    assert (found["donor"], found["audience"], found["auditors"]) == (DONOR, [RECIPIENT], [AUDITOR])
    assert "not verified" in run(capsys, "inspect", out)[1]


def test_verify_needs_no_key_and_tells_the_witnesses(capsys, made, out):
    found = run_json(capsys, "verify", out, "--roster", made.roster)
    assert found["dispatch"]["verified"] is True
    assert found["contents"] is None
    assert sorted(found["log"]["witnesses"]) == sorted([DONOR, RECIPIENT, AUDITOR, STRANGER])


def test_verify_with_a_key_checks_the_attestations(capsys, made, out):
    arguments = ("verify", out, "--roster", made.roster, "--key", made.key)
    found = run_json(capsys, *arguments)
    assert found["contents"]["kind"] == "lora"
    assert "discharge letters" in run(capsys, *arguments)[1]


def test_auditors_verify_attestations_and_cannot_open(capsys, made, out, tmp_path):
    keystore.write_sealing_key(tmp_path / "key", made.donor.sealing[AUDITOR])
    options = (out, "--roster", made.roster, "--key", tmp_path / "key")
    assert run_json(capsys, "verify", *options)["contents"]["approvals"] == 1
    assert refused(capsys, "open", *options, "--out", tmp_path / "x") == "AG-PKT-008"
    assert not (tmp_path / "x").exists()


def test_open_writes_a_peft_directory(capsys, made, out, tmp_path):
    target = tmp_path / "adapter"
    found = run_json(
        capsys, "open", out, "--roster", made.roster, "--key", made.key, "--out", target
    )
    assert found["files"] == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((target / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8.0)
    assert config["target_modules"] == ["q_proj", "v_proj"]
    with (target / "adapter_model.safetensors").open("rb") as handle:
        assert len(tensors.check_file(handle).table.entries) == 4


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("header.json", "AG-PKT-002"),
        ("dispatch.json", "AG-PKT-002"),
        ("dispatch.proof", "AG-PKT-002"),
        ("dispatch.event.json", "AG-PKT-002"),
        ("part-000.sealed", "AG-PKT-002"),
    ],
)
def test_verify_refuses_what_is_incomplete(capsys, made, out, name, code):
    (out / name).unlink()
    assert refused(capsys, "verify", out, "--roster", made.roster) == code


@pytest.mark.parametrize("name", ["note.txt", "part-001.sealed", ".hidden", "folder"])
def test_verify_refuses_a_file_too_many(capsys, made, out, name, tmp_path):
    (out / name).mkdir() if name == "folder" else (out / name).write_bytes(b"x")
    assert refused(capsys, "verify", out, "--roster", made.roster) == "AG-PKT-002"
    options = ("--roster", made.roster, "--key", made.key, "--out", tmp_path / "opened")
    assert refused(capsys, "open", out, *options) == "AG-PKT-002"
    assert not (tmp_path / "opened").exists()


def test_verify_refuses_damage(capsys, made, out):
    path = out / "part-000.sealed"
    path.write_bytes(path.read_bytes()[:-1] + b"")
    assert refused(capsys, "verify", out, "--roster", made.roster) == "AG-PKT-004"
    edit_json(out / "header.json", lambda value: value["parts"][0].update(sealed_sha256="0" * 64))
    assert refused(capsys, "verify", out, "--roster", made.roster) == "AG-PRO-006"


def test_verify_refuses_a_proof_with_too_few_witnesses(capsys, made, out):
    path = out / "dispatch.proof"
    lines = path.read_text().splitlines(keepends=True)
    signatures = [line for line in lines if line.startswith("— ")]
    kept = [line for line in lines if line not in signatures[2:]]
    path.write_text("".join(kept))
    assert refused(capsys, "verify", out, "--roster", made.roster) == "AG-LOG-007"


def test_verify_refuses_without_a_roster(capsys, out, tmp_path):
    (tmp_path / "empty").mkdir()
    assert refused(capsys, "verify", out, "--roster", tmp_path / "empty") == "AG-ROS-009"


def test_open_refuses_the_key_of_a_stranger(capsys, made, out, tmp_path):
    keystore.write_sealing_key(tmp_path / "key", made.donor.sealing[STRANGER])
    arguments = ("--roster", made.roster, "--key", tmp_path / "key", "--out", tmp_path / "x")
    assert refused(capsys, "open", out, *arguments) == "AG-PKT-008"


def test_open_refuses_an_exposed_key(capsys, made, out, tmp_path):
    shutil.copy(made.key, tmp_path / "key")
    (tmp_path / "key").chmod(0o644)
    arguments = ("--roster", made.roster, "--key", tmp_path / "key", "--out", tmp_path / "x")
    assert refused(capsys, "open", out, *arguments) == "AG-KEY-004"


def test_lint_describes_a_clean_file(capsys, made):
    path = made.donor.payload / "adapter_model.safetensors"
    found = run_json(capsys, "lint", path)
    assert (found["tensors"], found["dtypes"]) == (4, {"F32": 4})
    assert "4 tensors (4 F32)" in run(capsys, "lint", path)[1]


def test_lint_refuses_with_the_code_of_the_defect(capsys, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"\x80\x04")
    assert refused(capsys, "lint", path) == "AG-PKT-010"
    status, _, stderr = run(capsys, "lint", path)
    assert status == 1
    assert stderr.startswith("allograft: error: AG-PKT-010: ")
    assert "\nallograft: hint: " in stderr


def test_lint_does_not_wait_for_a_pipe(capsys, tmp_path):
    os.mkfifo(tmp_path / "x.safetensors")
    status, _, stderr = run(capsys, "lint", tmp_path / "x.safetensors")
    assert (status, "AG-STO-005" in stderr) == (3, True)


def test_usage_errors_leave_with_two(capsys, tmp_path):
    assert run(capsys, "lint", tmp_path / "absent")[0] == 2
    assert run(capsys, "verify", tmp_path)[0] == 2
