# SPDX-License-Identifier: Apache-2.0
"""`allograft-site policy` as the operator types it."""

import contextlib
import json
import stat
from datetime import datetime, timedelta

import pytest

from allograft_client import policy_desk
from allograft_client.store import Store
from kit.founding import run_site, run_site_json

POLICY = """version = 1
[donate]
modes = ["strict", "open"]
kinds = ["organ"]
recipients = ["riverside"]
approvals = ["data-owner", "privacy-officer"]
"""


class Yesterday(datetime):
    """A clock of the day before."""

    @classmethod
    def now(cls, tz=None):
        return datetime.now(tz) - timedelta(days=1)


@pytest.fixture
def state(tmp_path, capsys):
    path = tmp_path / "site"
    run_site_json(capsys, "init", "--site", "hospital-a", "--state", path)
    (path / "policy.toml").write_text(POLICY)
    return path


def policy(capsys, state, *arguments):
    return run_site_json(capsys, "policy", *arguments, "--state", state)


def refusal(capsys, state, *arguments):
    status, _, err = run_site(capsys, "policy", *arguments, "--state", state, "--format", "json")
    return status, json.loads(err)["error"]


def test_sign_check_and_show(state, capsys):
    assert policy(capsys, state, "show")["last_signature"] is None
    assert refusal(capsys, state, "check")[1]["code"] == "AG-PRV-006"
    signed = policy(capsys, state, "sign", "--role", "privacy-officer")
    assert (signed["role"], signed["weaker"]) == ("privacy-officer", [])
    assert stat.S_IMODE((state / "policy.toml.sig").stat().st_mode) == 0o600
    shown = policy(capsys, state, "check")
    assert shown["signed"] is True
    assert shown["audit"]["min_population"] == 2000
    assert policy(capsys, state, "check", "--mode", "strict")["signed"] is True


def test_a_weakened_policy_names_its_fields_until_it_is_signed_again(state, capsys):
    policy(capsys, state, "sign", "--role", "privacy-officer")
    weaker = POLICY.replace('["riverside"]', '["*"]') + "[audit]\nmin_population_dp = 20\n"
    (state / "policy.toml").write_text(weaker)
    status, error = refusal(capsys, state, "check")
    assert (status, error["code"]) == (1, "AG-PRV-007")
    assert "donate.recipients, audit.min_population_dp" in error["cause"]
    shown = policy(capsys, state, "show")
    assert shown["signed"] is False
    assert shown["weaker"] == ["donate.recipients", "audit.min_population_dp"]
    signed = policy(capsys, state, "sign", "--role", "privacy-officer")
    assert signed["weaker"] == ["donate.recipients", "audit.min_population_dp"]
    assert policy(capsys, state, "check")["weaker"] == []


def test_a_first_signature_says_that_there_is_nothing_to_compare_with(state, capsys):
    _, out, _ = run_site(capsys, "policy", "sign", "--role", "privacy-officer", "--state", state)
    assert "nothing to compare with" in out
    again = policy(capsys, state, "sign", "--role", "privacy-officer")
    assert again["note"] == ""
    assert again["compared_with"]["digest"] == again["digest"]


def remove(path, _first):
    path.unlink()


def damage(path, _first):
    path.write_bytes(path.read_bytes().replace(b'"sig":"', b'"sig":"AAAA'))


def truncate(path, _first):
    path.write_bytes(b"")


def roll_back(path, first):
    path.write_bytes(first)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [(remove, "was missing"), (damage, "was damaged"), (truncate, "was damaged"),
     (roll_back, "was older")],
)  # fmt: skip
def test_a_weaker_policy_is_called_weaker_without_its_signature(
    state, capsys, monkeypatch, spoil, words
):
    """What was signed last is remembered beside the file."""
    (state / "policy.toml").write_text(POLICY.replace('["riverside"]', '["*"]'))
    with monkeypatch.context() as patch:
        patch.setattr(policy_desk, "datetime", Yesterday)
        policy(capsys, state, "sign", "--role", "privacy-officer")
    first = (state / "policy.toml.sig").read_bytes()
    (state / "policy.toml").write_text(POLICY)
    last = policy(capsys, state, "sign", "--role", "privacy-officer")
    (state / "policy.toml").write_text(POLICY.replace('["riverside"]', '["*"]'))
    spoil(state / "policy.toml.sig", first)
    signed = policy(capsys, state, "sign", "--role", "privacy-officer")
    assert signed["weaker"] == ["donate.recipients"]
    assert signed["compared_with"]["digest"] == last["digest"]
    assert words in signed["note"]


def test_a_damaged_signature_of_which_nothing_is_remembered_is_told(state, capsys):
    policy(capsys, state, "sign", "--role", "privacy-officer")
    with contextlib.closing(Store(state / "site.db")) as store:
        store.set_setting(policy_desk._LAST, "")
    truncate(state / "policy.toml.sig", b"")
    signed = policy(capsys, state, "sign", "--role", "privacy-officer")
    assert signed["compared_with"] is None
    assert "damaged" in signed["note"]


def test_a_signature_whose_signing_was_killed_halfway_counts(state, capsys, monkeypatch):
    """The file is written before the memory, so it is the newer of the two."""
    with monkeypatch.context() as patch:
        patch.setattr(policy_desk, "datetime", Yesterday)
        (state / "policy.toml").write_text(POLICY.replace('["riverside"]', '["*"]'))
        policy(capsys, state, "sign", "--role", "privacy-officer")
    (state / "policy.toml").write_text(POLICY)
    with monkeypatch.context() as patch:
        patch.setattr(policy_desk, "_remember", lambda *_: None)
        policy(capsys, state, "sign", "--role", "privacy-officer")
    (state / "policy.toml").write_text(POLICY.replace('["riverside"]', '["*"]'))
    assert policy(capsys, state, "sign", "--role", "privacy-officer")["weaker"] == [
        "donate.recipients"
    ]


def test_open_mode_needs_no_signature(state, capsys):
    assert policy(capsys, state, "check", "--mode", "open")["signed"] is False


def test_a_mode_that_the_policy_does_not_meet_is_refused(state, capsys):
    assert refusal(capsys, state, "check", "--mode", "measured")[1]["code"] == "AG-PRV-003"
    (state / "policy.toml").write_text(
        POLICY.replace("strict", "measured").replace("riverside", "*")
    )
    assert refusal(capsys, state, "check", "--mode", "measured")[1]["code"] == "AG-PRV-009"


def test_a_signature_that_was_changed_is_refused_and_can_be_made_anew(state, capsys):
    policy(capsys, state, "sign", "--role", "privacy-officer")
    path = state / "policy.toml.sig"
    path.write_bytes(path.read_bytes().replace(b'"sig":"', b'"sig":"AAAA'))
    for command in ("check", "show"):
        assert refusal(capsys, state, command)[1]["code"] == "AG-PRV-008"
    policy(capsys, state, "sign", "--role", "privacy-officer")
    assert policy(capsys, state, "check")["signed"] is True


def test_a_file_that_is_no_policy_is_not_signed(state, capsys):
    (state / "policy.toml").write_text("version = 1\nunknown = 1\n")
    assert refusal(capsys, state, "sign", "--role", "officer")[1]["code"] == "AG-PRV-002"
    assert not (state / "policy.toml.sig").exists()
    (state / "policy.toml").unlink()
    assert refusal(capsys, state, "sign", "--role", "officer")[1]["code"] == "AG-PRV-001"


def test_a_role_is_never_a_person(state, capsys):
    assert refusal(capsys, state, "sign", "--role", "Jane Doe")[1]["code"] == "AG-PRV-008"


def test_people_read_what_became_weaker(state, capsys):
    policy(capsys, state, "sign", "--role", "privacy-officer")
    (state / "policy.toml").write_text(POLICY.replace('["riverside"]', '["*"]'))
    status, out, _ = run_site(capsys, "policy", "show", "--state", state)
    assert status == 0
    assert "weaker: donate.recipients" in out
    assert "recipients = *" in out
