# SPDX-License-Identifier: Apache-2.0
"""Screens at a site: quarantine, override, combinations, the bank, and parents of what it makes."""

import json
from datetime import UTC, datetime, timedelta

import pytest

from allograft.errors import RejectedError
from allograft.privacy.policy import parse_policy
from allograft.provenance.ancestry import FILE_NAME, Ancestor, Ancestry
from allograft.provenance.statement import Licence, Parent
from allograft.recipes.plan import DeltaPlan
from allograft_client import donor, jobs, screens
from allograft_client.main_model import describe_model
from allograft_client.main_packet import describe_packet
from allograft_client.site import model_base
from kit.consortium import POLICY, Consortium, write_model

A, B = "hospital-a", "hospital-b"
NO_KEEP = POLICY.replace("automatic_keep = true", "automatic_keep = false")
BY_HAND = NO_KEEP.replace("automatic_trial = true", "automatic_trial = false")
PARENTS = POLICY + 'parents = "accept"\n'


def arrive(two, **changes) -> str:
    packet_id, _ = donor.plan_donation(two[A].site, two[A].plan(**changes))
    two.step()
    from allograft_client import dispatcher

    dispatcher.queue_dispatch(two[A].site, packet_id, [B])
    two.step()
    return packet_id


def ask(two, kind, subject, **arguments):
    """Queue a job at the recipient and do it; the job as it ended."""
    store = two[B].site.store
    number = store.add_job("light" if kind == "keep" else "heavy", kind, subject, arguments)
    two.step()
    return store.job(number)


def state(two, packet_id):
    row = two[B].site.store.packet(packet_id)
    return row.state, row.code


@pytest.fixture
def site_pair(tmp_path):
    made = []

    def make(policy=POLICY, **policies):
        two = Consortium(tmp_path, hospital_b=policy, **policies)
        made.append(two)
        return two

    yield make
    for two in made:
        two.close()


# --- alarm and override ---


@pytest.mark.parametrize("screen", ["spectrum", "templates", "triggers"])
def test_an_alarm_quarantines_the_packet_before_its_trial(site_pair, screen):
    two = site_pair()
    two[B].runner.alarms = (screen,)
    packet_id = arrive(two)
    assert state(two, packet_id) == ("quarantined", "AG-SIT-020")
    row = two[B].site.store.packet(packet_id)
    assert row.reason == f"{screen}: as scripted"
    assert "trial" not in row.facts
    assert two[B].site.store.attachments("base") == ()
    assert not two[B].site.packet_path(packet_id, "attachment").exists()
    (receipt,) = two[A].site.store.receipts(packet_id)
    assert (receipt.state, receipt.code) == ("quarantined", "AG-SIT-020")


def test_a_receipt_of_an_alarm_tells_the_donor_nothing_but_the_code(site_pair):
    two = site_pair()
    two[B].runner.alarms = ("triggers",)
    arrive(two)
    import base64

    (files,) = [files for _, kind, files in two.sent if kind == "receipt"]
    told = base64.b64decode(json.loads(files["receipt.json"])["payload"])
    assert b"triggers" not in told
    assert b"as scripted" not in told


def test_going_on_despite_an_alarm_is_recorded_and_never_kept_automatically(site_pair):
    two = site_pair()
    two[B].runner.alarms = ("spectrum",)
    packet_id = arrive(two)
    assert ask(two, "trial", packet_id, despite_alarm=True).state == "done"
    assert state(two, packet_id) == ("trialled", "")
    told = [change.reason for change in two[B].site.store.history(packet_id)]
    assert any("an operator decided to try it despite" in reason for reason in told)
    assert "tried despite an alarm: spectrum: as scripted" in told[-1]
    assert ask(two, "keep", packet_id).state == "done"
    assert state(two, packet_id) == ("kept", "")
    found = describe_model(two[B].site, two[B].site.store.model("base"))["screened"]
    assert (found["verdict"], found["overridden"]) == ("ALARM", True)
    assert two[B].site.store.spectra(*bank_key(two)) == ()


def test_a_decision_to_go_on_counts_for_one_trial(site_pair):
    two = site_pair(BY_HAND)
    packet_id = arrive(two)
    two[B].runner.alarms = ("triggers",)
    ask(two, "trial", packet_id, despite_alarm=True)
    assert state(two, packet_id) == ("trialled", "")
    assert ask(two, "trial", packet_id).code == "AG-SIT-020"
    assert state(two, packet_id) == ("quarantined", "AG-SIT-020")


def test_a_new_trial_after_the_alarm_is_gone_needs_no_override(site_pair):
    two = site_pair(NO_KEEP)
    two[B].runner.alarms = ("triggers",)
    packet_id = arrive(two)
    two[B].runner.alarms = ()
    ask(two, "trial", packet_id)
    assert state(two, packet_id) == ("trialled", "")


def test_a_further_copy_does_not_undo_an_alarm(site_pair):
    two = site_pair()
    two[B].runner.alarms = ("triggers",)
    packet_id = arrive(two)
    (files,) = [files for _, kind, files in two.sent if kind == "dispatch"]
    two.deliver(B, "packet", {**files, "dispatch.proof": b"a log proof", "extra.json": b"{}"})
    two.step()
    assert state(two, packet_id) == ("quarantined", "AG-SIT-020")
    assert len(two[B].site.store.extras()) == 1


def test_a_packet_quarantined_for_another_reason_cannot_be_tried(site_pair):
    two = site_pair()
    packet_id = arrive(two)
    two[B].site.store.move_packet(packet_id, ["kept"], "quarantined", "x", "AG-PKT-004")
    assert ask(two, "trial", packet_id, despite_alarm=True).code == "AG-SIT-004"


def test_a_trial_without_screens_is_no_trial(site_pair, monkeypatch):
    two = site_pair()
    run = two[B].runner._try
    monkeypatch.setattr(two[B].runner, "_try", lambda task: {**run(task), "screens": []})
    packet_id = arrive(two)
    assert state(two, packet_id) == ("verified", "AG-EVA-005")


def test_what_the_screens_found_is_shown_with_the_packet(site_pair):
    two = site_pair()
    packet_id = arrive(two)
    facts = describe_packet(two[B].site, two[B].site.store.packet(packet_id))["facts"]
    assert [screen["dose"] for screen in facts["screens"]] == [1.0, 0.5]
    assert [entry["name"] for entry in facts["screens"][0]["screens"]] == [
        "spectrum", "templates", "triggers",
    ]  # fmt: skip


def test_the_seed_of_the_sweep_is_drawn_once_and_stays(site_pair):
    two = site_pair()
    arrive(two)
    arrive(two)
    seeds = {task["screen_seed"] for task in two[B].runner.done("try")}
    assert len(seeds) == 1
    two[B].home.path("templates.txt").write_text("Our own beginning of a letter\n\n")
    assert screens.screen_inputs(two[B].site)["templates"] == ["Our own beginning of a letter"]
    two[B].home.path("templates.txt").write_text("x\n" * 201)
    with pytest.raises(RejectedError, match="AG-SIT-001"):
        screens.screen_inputs(two[B].site)


# --- the bank ---


def bank_key(two):
    model = two[B].site.store.model("base")
    return model.facts["base"]["weights_digest"], "organ"


def test_kept_packets_make_the_bank_and_leave_it_with_their_attachment(site_pair):
    two = site_pair()
    first, second = arrive(two), arrive(two)
    assert [len(task["bank"]) for task in two[B].runner.done("try")] == [0, 1]
    assert len(two[B].site.store.spectra(*bank_key(two))) == 2
    ask(two, "revert", first)
    assert len(two[B].site.store.spectra(*bank_key(two))) == 1
    assert two[B].site.store.spectra(*bank_key(two), but=second) == ()


# --- combinations ---


def screened(two):
    return describe_model(two[B].site, two[B].site.store.model("base"))["screened"]["verdict"]


def test_keeping_needs_this_very_combination_screened(site_pair):
    two = site_pair(NO_KEEP.replace("automatic_trial = true", ""))
    packet_id = arrive(two)
    ask(two, "trial", packet_id)
    two[B].site.store._run("DELETE FROM screened")
    assert ask(two, "keep", packet_id).code == "AG-SIT-021"
    assert state(two, packet_id) == ("verified", "AG-SIT-021")
    ask(two, "trial", packet_id)
    assert ask(two, "keep", packet_id).state == "done"


def test_what_remains_after_a_revert_is_screened_again(site_pair):
    two = site_pair()
    assert screened(two) == "PLAIN"
    first, second = arrive(two), arrive(two)
    assert screened(two) == "PASS"
    store = two[B].site.store
    store.add_job("heavy", "revert", first)
    jobs.run_job(two[B].site, store.next_job("heavy"))
    assert screened(two) == "UNSCREENED"
    two.step()
    assert screened(two) == "PASS"
    (task,) = two[B].runner.done("screen")
    assert task["stack"] == [str(two[B].site.packet_path(second, "attachment"))]


def test_nothing_is_screened_where_a_revert_leads_back_to_what_was(site_pair):
    two = site_pair()
    first, second = arrive(two), arrive(two)
    ask(two, "revert", second)
    assert screened(two) == "PASS"
    ask(two, "revert", first)
    assert screened(two) == "PLAIN"
    assert two[B].runner.done("screen") == []


def test_an_alarm_about_what_remains_is_shown_and_reverts_nothing(site_pair):
    two = site_pair()
    first, _ = arrive(two), arrive(two)
    two[B].runner.alarms = ("templates",)
    ask(two, "revert", first)
    assert screened(two) == "ALARM"
    assert len(two[B].site.store.attachments("base")) == 1
    assert ask(two, "screen", "base").code == "AG-SIT-022"


def test_a_recall_also_makes_another_combination(site_pair):
    from allograft_client import dispatcher

    two = site_pair()
    first, _ = arrive(two), arrive(two)
    dispatcher.withdraw_packet(two[A].site, first)
    two.step()
    assert len(two[B].runner.done("screen")) == 1
    assert len(two[B].site.store.spectra(*bank_key(two))) == 1


# --- purpose and retention ---


def test_the_recipient_can_name_the_purposes_it_pursues(site_pair):
    two = site_pair(POLICY + 'purposes = ["Evaluation and  local use"]\n')
    assert state(two, arrive(two)) == ("kept", "")
    assert state(two, arrive(two, purpose="advertising")) == ("refused", "AG-PRV-005")


def test_a_purpose_that_is_no_longer_pursued_stops_the_keep(site_pair):
    two = site_pair(NO_KEEP)
    packet_id = arrive(two)
    policy = two[B].home.policy_file
    policy.write_text(policy.read_text() + 'purposes = ["research"]\n')
    assert ask(two, "keep", packet_id).code == "AG-PRV-005"


# --- parents ---


def merged(two, tmp_path, **licence):
    """A snapshot of the recipient's model with one kept packet in it, added as a model."""
    packet_id = arrive(two, merge=True, **licence)
    out = tmp_path / "merged"
    job = ask(two, "export", "base", out=str(out), format="merged")
    assert job.state == "done", job
    return packet_id, out


def add(two, name, path):
    texts = {"data": "data.txt", "retention": "general.txt"}
    return ask(two, "add-model", name, path=str(path), **texts)


def test_a_merged_snapshot_names_the_packets_inside(site_pair, tmp_path):
    two = site_pair()
    packet_id, out = merged(two, tmp_path, redonate=True)
    record = Ancestry.from_bytes((out / FILE_NAME).read_bytes())
    (parent,) = record.ancestors
    assert parent.parent.packet_id == packet_id
    assert parent.licence == Licence(merge=True, redonate=True)
    assert parent.parent.statement_sha256 == statement_digest(two, packet_id)
    add(two, "tuned", out)
    model = two[B].site.store.model("tuned")
    assert describe_model(two[B].site, model)["parents"] == [packet_id]


def statement_digest(two, packet_id):
    return two[A].site.store.packet(packet_id).facts["statement_digest"]


def test_a_snapshot_of_ours_is_known_without_its_record(site_pair, tmp_path):
    two = site_pair()
    packet_id, out = merged(two, tmp_path)
    (out / FILE_NAME).unlink()
    add(two, "tuned", out)
    model = two[B].site.store.model("tuned")
    assert describe_model(two[B].site, model)["parents"] == [packet_id]


@pytest.mark.parametrize("licence", [{}, {"redonate": True}])
def test_what_is_learnt_on_a_merged_model_is_not_passed_on_in_mode_open(
    site_pair, tmp_path, licence
):
    two = site_pair()
    _, out = merged(two, tmp_path, **licence)
    add(two, "tuned", out)
    with pytest.raises(RejectedError, match="AG-PRV-015") as refused:
        donor.plan_donation(two[B].site, two[B].plan(model="tuned"))
    assert "trusted base" in refused.value.fix
    donor.plan_donation(two[B].site, two[B].plan())


CLEAN, STRICT = Licence(redonate=True), parse_policy(POLICY.encode())


@pytest.mark.parametrize(
    ("licences", "mode", "epsilon", "allowed"),
    [
        ([], "open", None, True),
        ([CLEAN], "strict", 1.0, True),
        ([CLEAN], "strict", 1.01, False),
        ([CLEAN], "strict", float("nan"), False),
        ([CLEAN], "strict", 0.0, False),
        ([CLEAN], "strict", None, False),
        ([CLEAN], "measured", 0.5, False),
        ([CLEAN, Licence()], "strict", 0.5, False),
    ],
)
def test_redonation_needs_every_licence_and_a_tight_epsilon(licences, mode, epsilon, allowed):
    parents = [Ancestor(Parent(f"{n:032x}", "0" * 64), each) for n, each in enumerate(licences)]
    if allowed:
        STRICT.check_redonation(parents, mode, epsilon)
        return
    with pytest.raises(RejectedError, match="AG-PRV-015"):
        STRICT.check_redonation(parents, mode, epsilon)


@pytest.mark.parametrize(
    ("policy", "expected"), [(POLICY, ("refused", "AG-PRV-005")), (PARENTS, ("kept", ""))]
)
def test_packets_with_parents_are_taken_where_the_policy_says_so(
    site_pair, monkeypatch, policy, expected
):
    two = site_pair(policy)
    model = two[A].site.store.model("base")
    ancestors = [
        {
            "packet_id": "7a" * 16,
            "statement_sha256": "8" * 64,
            "licence": {"merge": True, "distil": False, "redonate": True},
        }
    ]
    facts = {**model.facts, "parents": ancestors}
    two[A].site.store.put_model(type(model)(
        model.name, model.path, model.data, model.retention, facts, model.time
    ))  # fmt: skip
    # As a mode strict with a small epsilon would be allowed to.
    monkeypatch.setattr(type(two[A].site.policy()), "check_redonation", lambda *_, **__: None)
    packet_id = arrive(two)
    assert state(two, packet_id) == expected
    if expected[0] == "kept":
        assert two[B].site.store.packet(packet_id).facts["parents"] == ["7a" * 16]


@pytest.mark.parametrize(
    "content",
    [
        b"{}",
        b"no json",
        b'{"v":2,"base":"' + b"0" * 64 + b'","parents":[]}',
        b'{"v":1,"base":"' + b"0" * 64 + b'","parents":[{}]}',
        b'{"v":1,"base":"' + b"0" * 64 + b'","parents":[' + b"1," * 99 + b"1]}",
    ],
)
def test_refuses_a_malformed_record_of_parents(content):
    with pytest.raises(RejectedError, match="AG-PRO-012"):
        Ancestry.from_bytes(content)


def test_a_record_of_parents_survives_its_file():
    whole = Ancestry("0" * 64, (Ancestor(Parent("1" * 32, "2" * 64), CLEAN),))
    assert Ancestry.from_bytes(whole.to_bytes()) == whole


def test_every_task_names_the_digest_under_which_its_model_was_added(site_pair):
    """Or a worker would go on with weights that were edited since."""
    two = site_pair()
    arrive(two)
    for kind in ("scale", "route", "screen", "revert"):
        (subject,) = [entry.packet_id for entry in two[B].site.store.attachments("base")]
        ask(two, kind, subject if kind == "revert" else "base")
    for task in two[B].runner.tasks:
        added = task["task"] == "describe"
        digest = model_base(two[B].site.store.model("base")).weights_digest
        assert added or task["model_digest"] == digest
    assert {"scale", "route", "screen", "revert", "try"} <= {t["task"] for t in two[B].runner.tasks}


def test_a_donation_from_a_snapshot_names_the_digest_under_which_it_was_added(site_pair, tmp_path):
    two = site_pair(hospital_a=POLICY.replace('kinds = ["organ"]', 'kinds = ["organ", "delta"]', 1))
    path = tmp_path / "tuned"
    write_model(path, seed=4)
    texts = {"data": "data.txt", "retention": "general.txt"}
    two[A].site.store.add_job("heavy", "add-model", "tuned", {"path": str(path), **texts})
    two.step()
    two[A].runner.errors = {"train": RejectedError("AG-RCP-028", "tuned")}
    plan = two[A].plan(kind="delta", recipe=DeltaPlan(), tuned="tuned", stage="post-sft")
    donor.plan_donation(two[A].site, plan)
    two.step()
    (task,) = two[A].runner.done("train")
    assert task["tuned_digest"] == model_base(two[A].site.store.model("tuned")).weights_digest
    assert task["tuned_digest"] != task["model_digest"]


def test_purpose_is_text_and_retention_a_date_that_is_enforced(site_pair, monkeypatch):
    two = site_pair(NO_KEEP)
    packet_id = arrive(two, retention_days=10)
    later = (datetime.now(UTC) + timedelta(days=11)).replace(microsecond=0)
    monkeypatch.setattr(type(two[B].site), "now", lambda self: later)
    two.change(expires=later + timedelta(days=1))
    assert ask(two, "keep", packet_id).code == "AG-PRO-010"
