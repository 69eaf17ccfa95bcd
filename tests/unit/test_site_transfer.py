# SPDX-License-Identifier: Apache-2.0
"""A packet from plan to receipt between two sites, and everything that must stop it."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from allograft.errors import RejectedError, UnavailableError
from allograft.evaluate.gate import Outcome
from allograft_client import dispatcher, donor, jobs, trial
from kit.consortium import POLICY, Consortium, write_model

A, B, C = "hospital-a", "hospital-b", "bank-c"


@pytest.fixture
def two(tmp_path):
    consortium = Consortium(tmp_path)
    yield consortium
    consortium.close()


def donate(consortium, **changes) -> str:
    site = consortium[A].site
    packet_id, _ = donor.plan_donation(site, consortium[A].plan(**changes))
    consortium.step()
    return packet_id


def send(consortium, packet_id, to=(B,), tamper=None) -> None:
    dispatcher.queue_dispatch(consortium[A].site, packet_id, list(to))
    consortium.step(tamper)


def state(consortium, name, packet_id):
    row = consortium[name].site.store.packet(packet_id)
    return row.state, row.code


def receipts(consortium, packet_id):
    rows = consortium[A].site.store.receipts(packet_id)
    return [(row.site, row.state, row.code) for row in rows]


def test_a_packet_travels_from_plan_to_kept_with_a_receipt(two):
    packet_id = donate(two)
    assert state(two, A, packet_id) == ("routed", "")
    send(two, packet_id)
    assert state(two, A, packet_id) == ("dispatched", "")
    assert state(two, B, packet_id) == ("kept", "")
    assert receipts(two, packet_id) == [(B, "kept", "")]
    (attachment,) = two[B].site.store.attachments("base")
    assert (attachment.packet_id, attachment.dose) == (packet_id, 0.5)


def test_every_change_of_state_of_a_packet_is_remembered(two):
    packet_id = donate(two)
    send(two, packet_id)
    donor_states = [c.state for c in two[A].site.store.history(packet_id)]
    assert donor_states == ["training", "offered", "routed", "dispatched"]
    states = [c.state for c in two[B].site.store.history(packet_id)]
    assert states == ["received", "verified", "trialled", "kept"]


def test_nothing_that_leaves_holds_text_or_paths_of_the_donor(two, tmp_path):
    packet_id = donate(two)
    send(two, packet_id)
    for _, _, files in two.sent:
        for content in files.values():
            assert b"private text" not in content
            assert str(tmp_path).encode() not in content


def test_without_a_policy_nothing_is_made(tmp_path):
    two = Consortium(tmp_path, hospital_a=None)
    with pytest.raises(RejectedError, match="AG-PRV-001"):
        donor.plan_donation(two[A].site, two[A].plan())
    assert two[A].site.store.packets() == ()
    two.close()


def test_a_policy_that_vanished_stops_the_dispatch(two):
    packet_id = donate(two)
    two[A].home.policy_file.unlink()
    send(two, packet_id)
    assert state(two, A, packet_id)[0] == "routed"
    (failed,) = [job for job in two[A].site.store.jobs() if job.state == "failed"]
    assert failed.code == "AG-PRV-001"
    assert not [kind for _, kind, _ in two.sent if kind == "dispatch"]


def test_without_a_policy_nothing_attaches(tmp_path):
    two = Consortium(tmp_path, hospital_b=None)
    packet_id = donate(two)
    send(two, packet_id)
    assert state(two, B, packet_id) == ("refused", "AG-PRV-001")
    assert two[B].runner.tasks == []
    assert not two[B].site.packet_path(packet_id, "opened").exists()
    assert receipts(two, packet_id) == [(B, "refused", "AG-PRV-001")]
    two.close()


def test_protected_modes_are_refused_without_a_plan_before_anything_runs(two):
    for mode in ("strict", "measured"):
        plan = two[A].plan(mode=mode, nature="", declared_by="")
        with pytest.raises(RejectedError, match="AG-PRV-053"):
            donor.plan_donation(two[A].site, plan)
    assert two[A].runner.tasks == []


def test_waits_for_every_approval_that_the_policy_asks_for(tmp_path):
    policy = POLICY.replace("approvals = []", 'approvals = ["steward", "officer"]')
    two = Consortium(tmp_path, hospital_a=policy)
    packet_id = donate(two)
    assert state(two, A, packet_id)[0] == "awaiting-approval"
    dispatcher.approve_packet(two[A].site, packet_id, "steward")
    two.step()
    assert "officer" in two[A].site.store.packet(packet_id).reason
    assert not [kind for _, kind, _ in two.sent if kind == "offer"]
    dispatcher.approve_packet(two[A].site, packet_id, "officer")
    two.step()
    assert state(two, A, packet_id)[0] == "routed"
    send(two, packet_id)
    assert state(two, B, packet_id)[0] == "kept"
    two.close()


def test_refuses_an_approval_by_a_role_nobody_asked_for(tmp_path):
    policy = POLICY.replace("approvals = []", 'approvals = ["steward"]')
    two = Consortium(tmp_path, hospital_a=policy)
    packet_id = donate(two)
    with pytest.raises(RejectedError, match=r"AG-PRV-033.*asks for steward"):
        dispatcher.approve_packet(two[A].site, packet_id, "intern")
    two.close()


def test_a_gate_that_finds_an_identifier_refuses_the_packet(two):
    packet_id = donate(two, domain="letters to jane.doe@example.org")
    assert state(two, A, packet_id) == ("refused", "AG-PRV-020")
    assert not [kind for _, kind, _ in two.sent if kind == "offer"]


def test_automatic_dispatch_sends_to_whom_route_and_policy_allow(tmp_path):
    policy = POLICY.replace('recipients = ["*"]', f'recipients = ["{B}"]\ndispatch = "automatic"')
    three = Consortium(tmp_path, (A, B, C), hospital_a=policy)
    packet_id = donate(three)
    assert state(three, B, packet_id)[0] == "kept"
    assert not three[C].site.store.has_packet(packet_id)
    three.close()


def test_refuses_recipients_outside_the_policy_or_the_route(tmp_path):
    policy = POLICY.replace('recipients = ["*"]', f'recipients = ["{B}"]')
    three = Consortium(tmp_path, (A, B, C), hospital_a=policy)
    packet_id = donate(three)
    for recipient, code in ((C, "AG-PRV-004"), ("nobody", "AG-SIT-014")):
        with pytest.raises(RejectedError, match=code):
            dispatcher.dispatch_packet(three[A].site, packet_id, "d" * 32, [recipient])
    three.close()


def test_refuses_to_seal_for_a_revoked_recipient(two):
    packet_id = donate(two)
    two.revoke(B)
    with pytest.raises(RejectedError, match="AG-ROS-003"):
        dispatcher.dispatch_packet(two[A].site, packet_id, "d" * 32, [B])


def test_an_expired_roster_seals_and_opens_nothing(two):
    packet_id = donate(two)
    two.change(expires=datetime.now(UTC) - timedelta(seconds=1))
    with pytest.raises(RejectedError, match="AG-ROS-007"):
        dispatcher.dispatch_packet(two[A].site, packet_id, "d" * 32, [B])


def test_repeating_a_dispatch_job_sends_nothing_twice(two):
    packet_id = donate(two)
    for _ in range(2):
        dispatcher.dispatch_packet(two[A].site, packet_id, "d" * 32, [B])
    two.step()
    assert len([kind for _, kind, _ in two.sent if kind == "dispatch"]) == 1


# --- what the recipient must notice ---


def flip(name):
    def tamper(files):
        content = bytearray(files[name])
        content[len(content) // 2] ^= 1
        return {**files, name: bytes(content)}

    return tamper


def edited(name, change):
    def tamper(files):
        value = json.loads(files[name])
        change(value)
        return {**files, name: json.dumps(value).encode()}

    return tamper


def without(name):
    return lambda files: {n: c for n, c in files.items() if n != name}


@pytest.mark.parametrize(
    ("tamper", "code"),
    [
        (flip("part-000.sealed"), "AG-PKT-004"),
        (flip("manifest.sealed"), "AG-PKT-004"),
        (lambda files: {**files, "dispatch.proof": b"another"}, "AG-LOG-002"),
        (without("dispatch.proof"), "AG-PKT-002"),
        (without("part-000.sealed"), "AG-PKT-002"),
        (edited("dispatch.json", lambda v: v["signatures"][0].update(sig="AAAA")), "AG-SIG-003"),
        (lambda files: {**files, "part-000.sealed": files["part-000.sealed"][:-1]}, "AG-PKT-004"),
    ],
)
def test_a_packet_changed_on_its_way_is_quarantined_with_a_receipt(two, tamper, code):
    packet_id = donate(two)
    send(two, packet_id, tamper=tamper)
    assert state(two, B, packet_id) == ("quarantined", code)
    assert receipts(two, packet_id) == [(B, "quarantined", code)]
    assert two[B].runner.tasks == []
    assert not two[B].site.packet_path(packet_id, "opened").exists()


def test_a_true_copy_is_taken_after_a_tampered_one(two):
    packet_id = donate(two)
    send(two, packet_id, tamper=flip("part-000.sealed"))
    (files,) = [files for _, kind, files in two.sent if kind == "dispatch"]
    two.deliver(B, "packet", {**files, "dispatch.proof": b"a log proof"})
    two.step()
    assert state(two, B, packet_id) == ("kept", "")


def test_a_tampered_copy_of_a_kept_packet_changes_nothing_and_is_shown(two):
    packet_id = donate(two)
    send(two, packet_id)
    (files,) = [files for _, kind, files in two.sent if kind == "dispatch"]
    two.deliver(B, "packet", flip("part-000.sealed")({**files, "dispatch.proof": b"a log proof"}))
    two.step()
    assert state(two, B, packet_id) == ("kept", "")
    (extra,) = two[B].site.store.extras()
    assert (extra.packet_id, extra.code) == (packet_id, "AG-PKT-004")


def test_a_replayed_dispatch_changes_nothing(two):
    packet_id = donate(two)
    send(two, packet_id)
    (files,) = [files for _, kind, files in two.sent if kind == "dispatch"]
    again = {**files, "dispatch.proof": b"a log proof", "extra.json": b"{}"}
    two.deliver(B, "packet", again)
    two.step()
    assert state(two, B, packet_id) == ("kept", "")
    assert [extra.code for extra in two[B].site.store.extras()] == ["AG-SIT-010"]
    assert len(two[B].runner.done("try")) == 1


def test_a_packet_for_another_site_is_not_opened(tmp_path):
    three = Consortium(tmp_path, (A, B, C))
    packet_id = donate(three)
    send(three, packet_id, to=[B])
    (files,) = [files for _, kind, files in three.sent if kind == "dispatch"]
    three.deliver(C, "packet", {**files, "dispatch.proof": b"a log proof"})
    three.step()
    assert state(three, C, packet_id) == ("quarantined", "AG-PRO-003")
    three.close()


def test_a_packet_of_a_revoked_donor_is_quarantined(two):
    packet_id = donate(two)
    two.members[B].site.trust.roster_now = two.roster
    dispatcher.queue_dispatch(two[A].site, packet_id, [B])
    two[A].work()
    sites = {B: two.roster.sites[B]}
    two[B].site.trust.roster_now = two.roster.__class__(
        **{
            **{f: getattr(two.roster, f) for f in two.roster.__dataclass_fields__},
            "sites": sites,
        }
    )
    two.relay()
    two[B].work()
    assert state(two, B, packet_id) == ("quarantined", "AG-ROS-002")


def test_a_packet_past_its_end_is_not_opened(two, monkeypatch):
    packet_id = donate(two, valid_days=1)
    dispatcher.queue_dispatch(two[A].site, packet_id, [B])
    two[A].work()
    two.relay()
    later = datetime.now(UTC) + timedelta(days=2)
    monkeypatch.setattr(type(two[B].site), "now", lambda self: later.replace(microsecond=0))
    two.change(expires=later + timedelta(days=1))
    two[B].work()
    assert state(two, B, packet_id) == ("quarantined", "AG-PRO-004")


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ('donors = ["*"]', "AG-PRV-005"),
        ('kinds = ["organ"]\nmodes = ["open"]\nautomatic_trial', "AG-PRV-005"),
    ],
)
def test_the_recipients_policy_is_asked_before_the_payload_is_opened(tmp_path, line, code):
    closed = {'donors = ["*"]': "donors = []"}.get(
        line, 'kinds = ["lora"]\nmodes = ["open"]\nautomatic_trial'
    )
    two = Consortium(tmp_path, hospital_b=POLICY.replace(line, closed))
    packet_id = donate(two)
    send(two, packet_id)
    assert state(two, B, packet_id) == ("refused", code)
    assert two[B].runner.tasks == []
    two.close()


def test_refuses_another_seed_of_the_same_shape_before_the_payload_is_opened(two, tmp_path):
    two[B].add_model("base", write_model(tmp_path / "stranger", seed=2))
    packet_id = donate(two)
    send(two, packet_id)
    assert state(two, B, packet_id) == ("refused", "AG-RCP-013")
    assert "cosine" in two[B].site.store.packet(packet_id).reason
    assert two[B].runner.tasks == []
    assert receipts(two, packet_id) == [(B, "refused", "AG-RCP-013")]


def test_accepts_a_descendant_of_the_base_as_lineage(two, tmp_path):
    two[B].add_model("base", write_model(tmp_path / "descendant", drift=0.05))
    packet_id = donate(two)
    send(two, packet_id)
    facts = two[B].site.store.packet(packet_id).facts
    assert state(two, B, packet_id) == ("kept", "")
    assert facts["verdict"] == "lineage"


def test_a_site_without_a_model_refuses(two):
    two[B].site.store._run("DELETE FROM model")
    packet_id = donate(two)
    send(two, packet_id)
    assert state(two, B, packet_id) == ("refused", "AG-SIT-003")


def test_takes_the_closest_of_several_models(two, tmp_path):
    for name, drift in (("base", 0.05), ("a-far", 0.2), ("b-near", 0.02)):
        two[B].add_model(name, write_model(tmp_path / f"{name}-model", drift=drift))
    packet_id = donate(two)
    send(two, packet_id)
    assert two[B].site.store.packet(packet_id).model == "b-near"


def test_names_the_models_that_would_do_as_well(two):
    two[B].add_model("copy", two.base)
    packet_id = donate(two)
    send(two, packet_id)
    assert two[B].site.store.packet(packet_id).model == "base"
    history = two[B].site.store.history(packet_id)
    assert "copy would do as well" in next(c.reason for c in history if c.state == "verified")


def test_what_cannot_even_be_read_is_dropped_and_shown(two):
    item_id = two.deliver(B, "packet", {"header.json": b"[]", "dispatch.json": b"{}"})
    two.step()
    assert list(two[B].home.path("inbox").iterdir()) == []
    assert two[B].site.store.packets() == ()
    assert two[B].site.store.find_item(item_id, "in").state == "refused"


# --- trial, keep, revert, withdraw ---


def test_the_gates_no_is_a_revert_with_a_receipt(two):
    two[B].runner.outcome = Outcome.REVERT
    packet_id = donate(two)
    send(two, packet_id)
    row = two[B].site.store.packet(packet_id)
    assert (row.state, row.reason) == ("reverted", "the gate said no: no-gain")
    assert two[B].site.store.attachments("base") == ()
    assert receipts(two, packet_id) == [(B, "reverted", "")]


def test_waits_for_a_person_where_the_policy_says_so(tmp_path):
    policy = POLICY.replace("automatic_keep = true", "automatic_keep = false")
    two = Consortium(tmp_path, hospital_b=policy)
    packet_id = donate(two)
    send(two, packet_id)
    assert state(two, B, packet_id) == ("trialled", "")
    assert receipts(two, packet_id) == []
    two[B].site.store.add_job("light", "keep", packet_id)
    two.step()
    assert state(two, B, packet_id) == ("kept", "")
    assert receipts(two, packet_id) == [(B, "kept", "")]
    two.close()


def test_a_dispatch_before_the_route_is_told_to_wait_for_it(two):
    packet_id = donate(two)
    site = two[A].site
    site.store.move_packet(packet_id, ["routed"], "offered", "waits for a route")
    jobs_before = len(site.store.jobs())
    with pytest.raises(UnavailableError, match="AG-SIT-017") as caught:
        dispatcher.queue_dispatch(site, packet_id, [B])
    assert "packet follow" in caught.value.fix
    assert len(site.store.jobs()) == jobs_before
    with pytest.raises(RejectedError, match="AG-SIT-017"):
        dispatcher.dispatch_packet(site, packet_id, "d" * 32, [B])
    site.store.move_packet(packet_id, ["offered"], "withdrawn", "withdrawn by an operator")
    with pytest.raises(RejectedError, match="AG-SIT-004"):
        dispatcher.dispatch_packet(site, packet_id, "d" * 32, [B])


def test_a_merged_export_needs_the_licence_of_its_donor(two, tmp_path):
    packet_id = donate(two)
    send(two, packet_id)
    arguments = {"out": str(tmp_path / "merged"), "format": "merged"}
    number = two[B].site.store.add_job("heavy", "export", "base", arguments)
    two.step()
    assert two[B].site.store.job(number).code == "AG-SIT-018"
    assert not two[B].runner.done("export")


def test_a_tried_packet_that_is_declined_was_never_attached(tmp_path):
    two = Consortium(tmp_path, hospital_b=POLICY.replace("keep = true", "keep = false"))
    packet_id = donate(two)
    send(two, packet_id)
    assert state(two, B, packet_id)[0] == "trialled"
    number = two[B].site.store.add_job("heavy", "revert", packet_id)
    two.step()
    row = two[B].site.store.packet(packet_id)
    assert (row.state, row.reason) == ("reverted", "declined after its trial; nothing was attached")
    assert "bit_exact" not in row.facts | two[B].site.store.job(number).result
    assert not two[B].runner.done("revert")
    assert not two[B].site.packet_path(packet_id, "attachment").exists()
    assert receipts(two, packet_id)[-1] == (B, "reverted", "")
    two.close()


def test_takes_a_kept_packet_out_again(two):
    packet_id = donate(two)
    send(two, packet_id)
    two[B].site.store.add_job("heavy", "revert", packet_id)
    two.step()
    assert state(two, B, packet_id) == ("reverted", "")
    assert two[B].site.store.packet(packet_id).facts["bit_exact"] is True
    assert two[B].site.store.attachments("base") == ()
    assert {r[1] for r in receipts(two, packet_id)} >= {"reverted"}


def test_a_model_that_is_not_restored_keeps_the_packet_and_raises_the_alarm(two):
    packet_id = donate(two)
    send(two, packet_id)
    two[B].runner.errors["revert"] = RejectedError("AG-EVA-003", "the model's state differs")
    number = two[B].site.store.add_job("heavy", "revert", packet_id)
    two.step()
    assert state(two, B, packet_id)[0] == "kept"
    assert two[B].site.store.job(number).code == "AG-EVA-003"


def test_keeping_needs_a_trial_first(tmp_path):
    policy = POLICY.replace("automatic_trial = true", "automatic_trial = false")
    two = Consortium(tmp_path, hospital_b=policy)
    packet_id = donate(two)
    send(two, packet_id)
    assert state(two, B, packet_id)[0] == "verified"
    number = two[B].site.store.add_job("light", "keep", packet_id)
    two.step()
    assert two[B].site.store.job(number).code == "AG-SIT-004"
    two.close()


def test_figures_leave_only_where_the_policy_shares_them(tmp_path):
    shared = POLICY + "\n[receipt]\nshare_figures = true\n"
    for name, policy, expected in (("no", POLICY, False), ("yes", shared, True)):
        two = Consortium(tmp_path / name, hospital_b=policy)
        packet_id = donate(two)
        send(two, packet_id)
        (files,) = [files for _, kind, files in two.sent if kind == "receipt"]
        payload = json.loads(files["receipt.json"])["payload"]
        import base64

        assert (b"figures" in base64.b64decode(payload)) is expected
        two.close()


def test_a_packet_is_taken_out_when_its_retention_ends(two, monkeypatch):
    packet_id = donate(two, retention_days=40)
    send(two, packet_id)
    site = two[B].site
    assert trial.queue_ended(site) == 0
    later = (datetime.now(UTC) + timedelta(days=41)).replace(microsecond=0)
    with monkeypatch.context() as patch:
        patch.setattr(type(site), "now", lambda self: later)
        assert trial.queue_ended(site) == 1
        assert trial.queue_ended(site) == 0
    two.step()
    assert state(two, B, packet_id) == ("reverted", "")


def test_no_plain_payload_waits_for_a_trial_that_nobody_asked_for(tmp_path):
    policy = POLICY.replace("automatic_trial = true", "automatic_trial = false")
    two = Consortium(tmp_path, hospital_b=policy)
    packet_id = donate(two)
    send(two, packet_id)
    assert state(two, B, packet_id)[0] == "verified"
    assert not two[B].site.packet_path(packet_id, "opened").exists()
    two[B].site.store.add_job("heavy", "trial", packet_id)
    two.step()
    assert state(two, B, packet_id)[0] == "kept"
    two.close()


def test_a_withdrawal_detaches_and_deletes(two):
    packet_id = donate(two)
    send(two, packet_id)
    dispatcher.withdraw_packet(two[A].site, packet_id)
    two.step()
    assert state(two, A, packet_id)[0] == "withdrawn"
    assert state(two, B, packet_id)[0] == "recalled"
    assert two[B].site.store.attachments("base") == ()
    assert not two[B].site.packet_path(packet_id).exists()


# --- what held at take-in must hold at trial and at keep ---

NO_TRIAL = POLICY.replace("automatic_trial = true", "automatic_trial = false")
NO_KEEP = POLICY.replace("automatic_keep = true", "automatic_keep = false")


@pytest.fixture
def clock(monkeypatch):
    """Sets the sites' clocks ahead by so many days, with a roster that is fresh then."""

    def turn(consortium, days):
        later = (datetime.now(UTC) + timedelta(days=days)).replace(microsecond=0)
        monkeypatch.setattr(type(consortium[B].site), "now", lambda self: later)
        consortium.change(expires=later + timedelta(days=1))

    return turn


def revoke(two, clock):
    two.revoke(A)


def forbid_donor(two, clock):
    policy = two[B].home.policy_file
    policy.write_text(policy.read_text().replace('donors = ["*"]', "donors = []"))


def forbid_kind(two, clock):
    policy = two[B].home.policy_file
    received, _, rest = policy.read_text().rpartition('kinds = ["organ"]')
    policy.write_text(f'{received}kinds = ["lora"]{rest}')


def take_role(two, clock):
    record = replace(two.roster.sites[A], roles=("witness",))
    two.change(sites={**two.roster.sites, A: record})


def pass_validity(two, clock):
    clock(two, 31)


def pass_retention(two, clock):
    clock(two, 11)


def replace_model(two, clock):
    two[B].add_model("base", write_model(two.root / "stranger", seed=2))


def damage(name):
    def change(two, clock):
        (path,) = two[B].home.path("packets").glob(f"*/sealed/{name}")
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(bytes(content))

    return change


CHANGES = [
    (revoke, "AG-ROS-003"),
    (take_role, "AG-ROS-002"),
    (forbid_donor, "AG-PRV-005"),
    (forbid_kind, "AG-PRV-005"),
    (pass_validity, "AG-PRO-004"),
    (pass_retention, "AG-PRO-010"),
    (replace_model, "AG-RCP-013"),
    (damage("dispatch.proof"), "AG-LOG-002"),
    (damage("part-000.sealed"), "AG-PKT-004"),
]


def is_gone(consortium, packet_id) -> bool:
    """Neither the opened payload nor an attachment of a packet lies at the recipient."""
    site = consortium[B].site
    return not any(site.packet_path(packet_id, name).exists() for name in ("opened", "attachment"))


def arrive(tmp_path, policy, **changes):
    two = Consortium(tmp_path, hospital_b=policy)
    packet_id = donate(two, **changes)
    send(two, packet_id)
    return two, packet_id


def ask(two, kind, packet_id):
    """Ask the recipient for a trial or a keep; the job as it ended."""
    site = two[B].site
    number = site.store.add_job("light" if kind == "keep" else "heavy", kind, packet_id)
    two[B].work()
    return site.store.job(number)


@pytest.mark.parametrize(("kind", "policy"), [("trial", NO_TRIAL), ("keep", NO_KEEP)])
@pytest.mark.parametrize(("change", "code"), CHANGES)
def test_refuses_what_no_longer_holds(tmp_path, clock, kind, policy, change, code):
    days = {"retention_days": 10} if change is pass_retention else {}
    two, packet_id = arrive(tmp_path, policy, **days)
    tried = len(two[B].runner.tasks)
    change(two, clock)
    assert ask(two, kind, packet_id).code == code
    assert state(two, B, packet_id) == ("refused", code)
    assert len(two[B].runner.tasks) == tried
    assert two[B].site.store.attachments("base") == ()
    assert is_gone(two, packet_id)
    two.step()
    assert receipts(two, packet_id) == [(B, "refused", code)]
    two.close()


@pytest.mark.parametrize(("change", "code"), [(revoke, "AG-ROS-003"), (forbid_donor, "AG-PRV-005")])
def test_refuses_what_changes_before_an_automatic_trial(two, clock, change, code):
    packet_id = donate(two)
    dispatcher.queue_dispatch(two[A].site, packet_id, [B])
    two[A].work()
    two.relay()
    site = two[B].site
    assert jobs.run_job(site, site.store.next_job("heavy"))
    assert state(two, B, packet_id)[0] == "verified"
    change(two, clock)
    two[B].work()
    assert state(two, B, packet_id) == ("refused", code)
    assert two[B].runner.tasks == []


def test_refuses_to_keep_automatically_a_donor_revoked_during_the_trial(two, monkeypatch):
    packet_id = donate(two)
    run = two[B].runner.run

    def revoking(name, task, progress):
        two.revoke(A)
        return run(name, task, progress)

    monkeypatch.setattr(two[B].runner, "run", revoking)
    send(two, packet_id)
    assert state(two, B, packet_id) == ("refused", "AG-ROS-003")
    assert is_gone(two, packet_id)


def test_a_policy_that_asks_for_a_person_during_the_trial_is_obeyed(two, monkeypatch):
    packet_id = donate(two)
    run = two[B].runner.run

    def changing(name, task, progress):
        two[B].home.policy_file.write_text(NO_KEEP)
        return run(name, task, progress)

    monkeypatch.setattr(two[B].runner, "run", changing)
    send(two, packet_id)
    assert state(two, B, packet_id) == ("trialled", "")


def lose_policy(two):
    two[B].home.policy_file.unlink()


def expire_roster(two):
    two.change(expires=datetime.now(UTC) - timedelta(seconds=1))


def expose_key(two):
    two[B].home.path("keys", "sealing.key").chmod(0o644)


FAULTS = [(lose_policy, "AG-PRV-001"), (expire_roster, "AG-ROS-007"), (expose_key, "AG-KEY-004")]


@pytest.mark.parametrize(
    ("kind", "policy", "before"), [("trial", NO_TRIAL, "verified"), ("keep", NO_KEEP, "trialled")]
)
@pytest.mark.parametrize(("change", "code"), FAULTS)
def test_a_fault_of_this_site_makes_the_packet_wait(tmp_path, kind, policy, before, change, code):
    two, packet_id = arrive(tmp_path, policy)
    change(two)
    assert ask(two, kind, packet_id).code == code
    assert state(two, B, packet_id)[0] == before
    assert two[B].site.store.attachments("base") == ()
    two.close()


@pytest.mark.parametrize("code", ["AG-RCP-030", "AG-RCP-031", "AG-RCP-032", "AG-EVA-001"])
def test_a_trial_without_usable_own_text_can_be_repeated(tmp_path, code):
    two, packet_id = arrive(tmp_path, NO_TRIAL)
    two[B].runner.errors["try"] = RejectedError(code, "own text is missing")
    ask(two, "trial", packet_id)
    assert state(two, B, packet_id) == ("verified", code)
    assert two[B].site.store.packet(packet_id).reason == "own text is missing"
    assert is_gone(two, packet_id)
    two[B].runner.errors.clear()
    ask(two, "trial", packet_id)
    assert state(two, B, packet_id) == ("kept", "")
    two.close()


def test_a_payload_that_does_not_fit_is_refused_by_its_trial(two):
    two[B].runner.errors["try"] = RejectedError("AG-RCP-003", "tensor b has another shape")
    packet_id = donate(two)
    send(two, packet_id)
    assert state(two, B, packet_id) == ("refused", "AG-RCP-003")
    assert is_gone(two, packet_id)


def test_no_plain_payload_lies_around_but_while_it_is_tried(two, monkeypatch):
    packet_id = donate(two)
    seen = []
    run = two[B].runner.run

    def looking(name, task, progress):
        seen.append(sorted(path.name for path in Path(task["payload"]).iterdir()))
        if len(seen) == 1:
            raise UnavailableError("AG-SIT-007", "killed")
        return run(name, task, progress)

    monkeypatch.setattr(two[B].runner, "run", looking)
    dispatcher.queue_dispatch(two[A].site, packet_id, [B])
    two[A].work()
    two.relay()
    site = two[B].site
    opened = site.packet_path(packet_id, "opened")
    for _ in range(3):  # taken in, tried in vain, tried
        assert not opened.exists()
        jobs.run_job(site, site.store.next_job("heavy"))
    assert not opened.exists()
    assert seen == [["organ.safetensors"]] * 2
    assert state(two, B, packet_id) == ("kept", "")


# --- what is kept was tried as it is kept ---


def test_refuses_to_keep_a_second_packet_on_a_stack_it_was_not_tried_on(tmp_path):
    two, first = arrive(tmp_path, NO_KEEP.replace("automatic_trial = true", ""))
    second = donate(two)
    send(two, second)
    for packet_id in (first, second):
        ask(two, "trial", packet_id)
    assert ask(two, "keep", first).state == "done"
    assert ask(two, "keep", second).code == "AG-SIT-016"
    assert state(two, B, second) == ("verified", "AG-SIT-016")
    assert [a.packet_id for a in two[B].site.store.attachments("base")] == [first]
    ask(two, "trial", second)
    assert two[B].runner.done("try")[-1]["stack"] == [
        str(two[B].site.packet_path(first, "attachment"))
    ]
    assert ask(two, "keep", second).state == "done"
    assert [a.packet_id for a in two[B].site.store.attachments("base")] == [first, second]
    two.close()


def test_queues_a_new_trial_where_the_policy_tries_by_itself(tmp_path):
    two, first = arrive(tmp_path, NO_KEEP)
    second = donate(two)
    send(two, second)
    ask(two, "keep", first)
    assert ask(two, "keep", second).code == "AG-SIT-016"
    assert state(two, B, second) == ("trialled", "")
    assert len(two[B].runner.done("try")) == 3
    assert ask(two, "keep", second).state == "done"
    two.close()


def test_refuses_to_keep_on_a_model_that_was_replaced_since_the_trial(tmp_path):
    two, packet_id = arrive(tmp_path, NO_KEEP)
    two[B].add_model("base", write_model(tmp_path / "descendant", drift=0.05))
    assert ask(two, "keep", packet_id).code == "AG-SIT-016"
    two.close()


def test_refuses_to_keep_under_stricter_limits_than_it_was_tried_under(tmp_path):
    two, packet_id = arrive(tmp_path, NO_KEEP.replace("automatic_trial = true", ""))
    ask(two, "trial", packet_id)
    policy = two[B].home.policy_file
    policy.write_text(policy.read_text() + "min_gain = 0.5\n")
    assert ask(two, "keep", packet_id).code == "AG-SIT-016"
    two.close()


def test_packets_that_are_kept_automatically_are_tried_on_each_other(two):
    packets = [donate(two), donate(two)]
    for packet_id in packets:
        send(two, packet_id)
    assert [a.packet_id for a in two[B].site.store.attachments("base")] == packets
    assert [len(task["stack"]) for task in two[B].runner.done("try")] == [0, 1]


def test_nobody_keeps_a_packet_while_it_is_tried_again(tmp_path):
    two, packet_id = arrive(tmp_path, NO_KEEP)
    site = two[B].site
    two[B].runner.errors["try"] = UnavailableError("AG-SIT-007", "killed")
    site.store.add_job("heavy", "trial", packet_id)
    assert not jobs.run_job(site, site.store.next_job("heavy"))
    with pytest.raises(RejectedError, match="AG-SIT-004"):
        trial.keep_packet(site, packet_id)
    two.close()


# --- interruptions ---


def test_a_full_disk_puts_the_job_back_and_it_ends_later(two):
    packet_id, number = donor.plan_donation(two[A].site, two[A].plan())
    two[A].runner.errors["train"] = UnavailableError("AG-STO-001", "no space")
    job = two[A].site.store.next_job("heavy")
    assert not jobs.run_job(two[A].site, job)
    waiting = two[A].site.store.job(number)
    assert (waiting.state, waiting.code) == ("queued", "AG-STO-001")
    two[A].runner.errors.clear()
    two.step()
    assert state(two, A, packet_id)[0] == "routed"


def test_a_worker_that_dies_again_and_again_is_given_up(two):
    packet_id, _ = donor.plan_donation(two[A].site, two[A].plan())
    two[A].runner.errors["train"] = UnavailableError("AG-SIT-007", "killed")
    for _ in range(5):
        jobs.run_job(two[A].site, two[A].site.store.next_job("heavy"))
    assert state(two, A, packet_id) == ("failed", "AG-SIT-007")


def test_training_is_not_repeated_after_a_restart(two):
    packet_id, _ = donor.plan_donation(two[A].site, two[A].plan())
    two[A].runner.errors["evaluate"] = UnavailableError("AG-SIT-007", "killed")
    jobs.run_job(two[A].site, two[A].site.store.next_job("heavy"))
    two[A].runner.errors.clear()
    two.reopen()
    two.step()
    assert state(two, A, packet_id)[0] == "routed"
    assert len(two[A].runner.done("train")) == 1


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.mark.parametrize("step", ["_store_sealed", "claim_dispatch", "finish_job"])
def test_a_recipient_killed_while_it_takes_a_packet_goes_on(two, monkeypatch, step):
    from allograft_client import recipient

    packet_id = donate(two)
    dispatcher.queue_dispatch(two[A].site, packet_id, [B])
    two[A].work()
    two.relay()
    target = recipient if step == "_store_sealed" else type(two[B].site.store)
    original = getattr(target, step)

    def kill(*arguments, **named):
        if step != "finish_job" or two[B].site.store.has_packet(packet_id):
            original(*arguments, **named)
            raise Killed
        return original(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(target, step, kill)
        with pytest.raises(Killed):
            two[B].work()
    two.reopen()
    two.step()
    assert state(two, B, packet_id) == ("kept", "")
    assert receipts(two, packet_id) == [(B, "kept", "")]
    assert two[B].site.store.extras() == ()


def test_a_crash_inside_a_job_leaves_a_state_with_a_reason(two, monkeypatch):
    from allograft_client import recipient

    packet_id = donate(two)

    def crash(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(recipient, "_choose_model", crash)
    send(two, packet_id)
    assert state(two, B, packet_id) == ("quarantined", "AG-SIT-007")


def test_a_crash_while_taking_in_is_told_by_a_receipt_and_leaves_no_file(two, monkeypatch):
    from allograft_client import recipient

    packet_id = donate(two)
    monkeypatch.setattr(recipient, "_choose_model", lambda *_: {}["unforeseen"])
    send(two, packet_id)
    assert receipts(two, packet_id) == [(B, "quarantined", "AG-SIT-007")]
    assert list(two[B].home.path("inbox").iterdir()) == []
