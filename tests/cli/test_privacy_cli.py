# SPDX-License-Identifier: Apache-2.0
"""Planning a private run and reading the ledger, as a site's operator types it."""

import json
import shutil
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from allograft.crypto import keystore
from allograft.crypto.keys import SigningKey
from allograft.errors import RejectedError
from allograft.privacy.accountant import ORDERS, DpEvent, epsilon_by_rdp
from allograft.privacy.ledger import (
    Committed,
    DomainOpened,
    NonprivateRelease,
    Outcome,
    Reserved,
    charge_for,
    reserve_for,
)
from allograft.privacy.report import Exposed, FullReport
from allograft.provenance.statement import Architecture, BaseModel, write_base
from allograft.recipes.plan import LoraPlan, OrganPlan
from allograft_client import main_privacy
from allograft_client.budget import Budget
from allograft_client.membership import create_site, join_consortium, read_invitation
from allograft_client.options import open_state
from allograft_client.plan import DonationPlan
from allograft_client.plan_files import find_plan
from allograft_client.rows import ModelRow, PacketRow
from allograft_client.settings import Home
from allograft_client.site import Site
from kit.founding import Founded, run_site, run_site_json

POLICY = """version = 1
[donate]
modes = ["strict"]
kinds = ["lora"]
recipients = ["*"]
approvals = ["data-owner"]
"""


@pytest.fixture(scope="module")
def joined(tmp_path_factory):
    root = tmp_path_factory.mktemp("joined")
    founded, home = Founded(root), Home(root / "site")
    create_site(home, "hospital-a", 365)
    founded.enrol(home.root)
    join_consortium(home, read_invitation(founded.publish()), founded.keeper.fingerprint)
    home.policy_file.write_text(POLICY)
    add_model(home.root)
    return home.root


@pytest.fixture
def state(joined, tmp_path):
    return shutil.copytree(joined, tmp_path / "site")


def add_model(path):
    site = open_state(path)
    architecture = Architecture("llama", 32, 3, 64)
    base = BaseModel("ab" * 32, architecture, "cd" * 32, "ef" * 32)
    row = ModelRow("notes", path, path, path, {"base": write_base(base)}, "2026-11-23T08:00:00Z")
    site.store.put_model(row)


def refusal(capsys, *arguments) -> tuple[int, str]:
    status, _, err = run_site(capsys, *arguments, "--format", "json")
    return status, json.loads(err)["error"]["code"]


def draft(capsys, state, *more):
    return run_site_json(
        capsys, "plan", "new", "--model", "notes", "--domain", "cardiology", "--target-epsilon", 3,
        "--steps", 200, *more, "--state", state,
    )  # fmt: skip


def open_cardiology(capsys, state, *more):
    return run_site_json(
        capsys, "ledger", "open-domain", "cardiology", "--declared-by", "data-owner", *more,
        "--state", state,
    )  # fmt: skip


def test_a_plan_is_proposed_shown_and_signed(state, capsys) -> None:
    made = draft(capsys, state)
    assert made["state"] == "draft"
    cost, constants = made["cost"], made["constants"]
    event = DpEvent(0.01, constants["noise_multiplier"], 200)
    assert cost["epsilon_by_rdp"] == epsilon_by_rdp([event], 1e-6) <= 3
    assert cost["epsilon_by_pld"] < cost["epsilon_by_rdp"]
    assert cost["epsilon_by_pld_label"] == "non-adaptive"
    assert constants["divisor"] == cost["expected_people_per_step"] == 10
    plan_id = made["plan_id"]
    signed = run_site_json(capsys, "plan", "sign", plan_id[:8], "--state", state)
    assert signed["state"] == "signed"
    assert run_site_json(capsys, "plan", "sign", plan_id, "--state", state) == signed
    assert run_site_json(capsys, "plan", "show", plan_id[:8], "--state", state) == signed
    assert signed["digest"] == made["digest"]
    filed = find_plan(open_state(state), plan_id)
    assert filed.plan.epsilon() <= 3


def test_a_plan_is_told_in_words(state, capsys) -> None:
    plan_id = draft(capsys, state)["plan_id"]
    status, out, _ = run_site(capsys, "plan", "show", plan_id, "--state", state)
    assert status == 0
    for words in ("not open yet", "non-adaptive", "of 1,000", "noise to signal", "plan sign"):
        assert words in out


def test_the_plan_fixes_how_the_donation_will_train(state, capsys) -> None:
    made = draft(capsys, state, "--window", 64, "--learning-rate", 0.003, "--set", "rank=4")
    training = made["training"]
    assert (training["window_tokens"], training["recipe"]["rank"]) == (64, 4)
    assert training["loop"]["learning_rate"] == 0.003
    assert training["loop"]["steps"] == made["constants"]["steps"]


def test_the_plan_fixes_what_kind_of_adapter_it_will_be(state, capsys) -> None:
    choices = ("target_modules=q_proj+up_proj", "rslora=true", "frozen_a=wards.2026")
    made = draft(capsys, state, *(word for choice in choices for word in ("--set", choice)))
    recipe = LoraPlan.from_json(made["training"]["recipe"])
    assert recipe == LoraPlan(8, 16.0, ("q_proj", "up_proj"), True, False, "wards.2026")
    assert LoraPlan.from_json(draft(capsys, state, "--set", "dora=true")["training"]["recipe"]).dora


def test_the_plan_fixes_how_many_modules_are_grafted(state, capsys) -> None:
    made = draft(capsys, state, "--kind", "module_graft", "--set", "modules=8")
    assert made["training"]["recipe"] == {"modules": 8, "ranking": "activation"}


def test_the_plan_fixes_how_many_vectors_a_prompt_has(state, capsys) -> None:
    made = draft(capsys, state, "--kind", "prompt", "--set", "virtual_tokens=8")
    assert made["training"]["recipe"] == {"virtual_tokens": 8}


def test_loop_parameters_tell_nothing_of_the_data(state, capsys) -> None:
    assert refusal(
        capsys, "plan", "new", "--model", "notes", "--domain", "d", "--target-epsilon", 3,
        "--window", 1371, "--state", state,
    ) == (1, "AG-PRV-051")  # fmt: skip


def test_the_plan_fixes_who_is_a_person_and_donate_cannot(state, capsys) -> None:
    made = draft(capsys, state, "--person-field", "patient")
    assert made["training"]["person_field"] == "patient"
    assert draft(capsys, state)["training"]["person_field"] == "person"
    asked = DonationPlan("notes", "lora", state, "strict", "", "", "letters", LoraPlan())
    plan = find_plan(open_state(state), made["plan_id"]).plan
    assert asked.under(plan).person_field == "patient"
    command = ("donate", "--model", "notes", "--data", state, "--domain", "letters")
    status, _, err = run_site(capsys, *command, "--person-field", "note")
    assert status == 2
    assert "--person-field" in err


@pytest.mark.parametrize(
    ("more", "refused"),
    [(("--mode", "open"), (1, "AG-PRV-053")), (("--target-epsilon", "1e-9"), (1, "AG-PRV-055")),
     (("--sampling-rate", "0.9"), (1, "AG-PRV-050")), (("--clip", "1.2345"), (1, "AG-PRV-051")),
     (("--delta", "1e-3"), (2, "")), (("--model", "unknown"), (1, "AG-SIT-003")),
     (("--clip", "1e39"), (1, "AG-PRV-050")), (("--clip", "1e-7"), (1, "AG-PRV-050")),
     (("--clip", "nan"), (1, "AG-PRV-050")), (("--holdout", "1.5"), (1, "AG-IN-003")),
     (("--holdout", "nan"), (1, "AG-PRV-052")), (("--kind", "foo"), (1, "AG-RCP-001")),
     (("--learning-rate", "nan"), (1, "AG-PRV-052")), (("--learning-rate", "0"), (1, "AG-RCP-035")),
     (("--set", "alpha=inf"), (1, "AG-IN-003")), (("--set", f"rank={10**30}"), (1, "AG-PKT-009")),
     (("--kind", "prompt", "--set", "virtual_tokens=600"), (1, "AG-RCP-035")),
     (("--kind", "module_graft", "--set", "ranking=best"), (1, "AG-RCP-035")),
     (("--set", "dora=true", "--set", "frozen_a=wards"), (1, "AG-PKT-009")),
     (("--set", "target_modules=lm_head"), (1, "AG-PKT-009")),
     (("--set", "frozen_a=Mrs Smith"), (1, "AG-PKT-009")),
     (("--set", "rank=many"), (1, "AG-IN-003")), (("--set", "size=3"), (1, "AG-IN-003")),
     (("--set", "rank=4", "--set", "rank=8"), (1, "AG-IN-003")),
     (("--set", "rank=600"), (1, "AG-PKT-009")),
     (("--people-at-least", str(10**18), "--delta", "1e-20"), (1, "AG-PRV-050"))],
)  # fmt: skip
def test_refuses_a_plan_that_promises_nothing(state, capsys, more, refused) -> None:
    command = ("plan", "new", "--model", "notes", "--domain", "d", "--target-epsilon", 3)
    assert refusal(capsys, *command, *more, "--state", state) == refused


def test_a_plan_above_the_policy_is_warned_of_and_not_signed(state, capsys) -> None:
    (state / "policy.toml").write_text(POLICY + "[audit]\ndonation_epsilon = 2.9\n")
    made = draft(capsys, state)
    assert [words.split(":")[0] for words in made["warnings"]] == ["AG-PRV-014"]
    _, out, _ = run_site(capsys, "plan", "show", made["plan_id"], "--state", state)
    assert "Warning: AG-PRV-014" in out
    sign = ("plan", "sign", made["plan_id"], "--state", state)
    assert refusal(capsys, *sign) == (1, "AG-PRV-014")
    (state / "policy.toml").write_text(POLICY + "[audit]\nmax_delta = 1e-7\n")
    assert refusal(capsys, *sign) == (1, "AG-PRV-014")
    (state / "policy.toml").write_text(POLICY)
    assert run_site_json(capsys, *sign)["warnings"] == []


@pytest.mark.parametrize(
    ("path", "value", "code"),
    [(("kind",), "foo", "AG-RCP-001"), (("training", "holdout"), 1.5, "AG-IN-003"),
     (("training", "loop", "steps"), "many", "AG-IN-003"),
     (("training", "loop", "learning_rate"), 0, "AG-RCP-035"),
     (("training", "loop", "warmup_steps"), 20, "AG-PRV-052")],
)  # fmt: skip
def test_refuses_to_sign_an_edited_draft_that_could_never_run(
    state, capsys, path, value, code
) -> None:
    made = draft(capsys, state)
    file = Path(made["path"])
    document = json.loads(file.read_bytes())
    level = document["predicate"]
    for name in path[:-1]:
        level = level[name]
    level[path[-1]] = value
    file.write_text(json.dumps(document))
    assert refusal(capsys, "plan", "sign", made["plan_id"], "--state", state) == (1, code)
    assert not (file.parent / f"{made['plan_id']}.json").exists()


def test_mode_measured_may_go_without_constants_and_strict_may_not(state, capsys) -> None:
    command = ("plan", "new", "--model", "notes", "--domain", "d", "--state", state)
    assert refusal(capsys, *command) == (2, "")
    made = run_site_json(capsys, *command, "--mode", "measured")
    noisy = (*command, "--mode", "measured", "--target-epsilon", 3)
    assert refusal(capsys, *noisy) == (1, "AG-PRV-053")
    assert made["constants"] is None
    assert "cost" not in made


@pytest.mark.parametrize("prefix", ["ffff", "../../x", "x"])
def test_refuses_a_plan_that_is_not_there(state, capsys, prefix) -> None:
    assert refusal(capsys, "plan", "show", prefix, "--state", state) == (1, "AG-PRV-056")


def test_refuses_a_plan_whose_file_was_changed(state, capsys) -> None:
    made = draft(capsys, state)
    plan_id = run_site_json(capsys, "plan", "sign", made["plan_id"], "--state", state)["plan_id"]
    path = state / "plans" / f"{plan_id}.json"
    path.write_bytes(path.read_bytes().replace(b'"payload":"e', b'"payload":"f'))
    assert refusal(capsys, "plan", "show", plan_id, "--state", state)[1].startswith("AG-")
    shutil.copy(state / "plans" / f"{plan_id}.draft.json", state / "plans" / "ffff.draft.json")
    assert refusal(capsys, "plan", "sign", "ffff", "--state", state) == (1, "AG-PRV-052")


def test_the_ledger_starts_with_its_first_domain(state, capsys) -> None:
    empty = run_site_json(capsys, "ledger", "show", "--state", state)
    assert empty["domains"] == []
    made = open_cardiology(capsys, state)
    assert made["rdp_cap"] == pytest.approx(4.145, abs=1e-3)
    assert open_cardiology(capsys, state) == made
    again = ("ledger", "open-domain", "cardiology", "--declared-by", "data-owner")
    assert refusal(capsys, *again, "--epsilon", 7, "--state", state) == (1, "AG-PRV-061")


@pytest.mark.parametrize(
    ("domain", "role", "more", "code"),
    [("Mueller Hans", "data-owner", (), "AG-PRV-059"), ("ward", "Dr. Jane", (), "AG-PRV-059"),
     ("record-number-12345678", "data-owner", (), "AG-PRV-021"),
     ("ward", "data-owner", ("--epsilon", 50), "AG-PRV-014"),
     ("ward", "data-owner", ("--epsilon", "nan"), "AG-PRV-061"),
     ("ward", "data-owner", ("--delta", "1e-3"), "AG-PRV-014"),
     ("ward", "data-owner", ("--order", 7), "AG-PRV-061")],
)  # fmt: skip
def test_a_domain_that_nothing_could_be_made_in_is_never_opened(
    state, capsys, domain, role, more, code
) -> None:
    command = ("ledger", "open-domain", domain, "--declared-by", role)
    assert refusal(capsys, *command, *more, "--state", state) == (1, code)
    assert not (state / "privacy").exists()


def test_no_domain_is_opened_before_there_is_a_policy(state, capsys) -> None:
    (state / "policy.toml").unlink()
    command = ("ledger", "open-domain", "ward", "--declared-by", "data-owner", "--state", state)
    assert refusal(capsys, *command) == (1, "AG-PRV-001")
    assert not (state / "privacy").exists()


def test_a_clock_that_ran_ahead_writes_no_entry(state, capsys, monkeypatch) -> None:
    """Whatever it would have dated, nothing could follow before that date."""
    site = open_state(state)
    expires = site.trust.latest_roster().expires
    ahead = ((timedelta(days=90, seconds=1), "first"), (timedelta(days=18_000), "second"))
    for distance, domain in ahead:
        with monkeypatch.context() as patch:
            patch.setattr(Site, "now", lambda _site, by=distance: expires + by)
            limits = DomainOpened(domain, 8.0, 1e-6, 4, "data-owner")
            with pytest.raises(RejectedError, match="AG-PRV-064"):
                Budget(site).open_domain(limits)
    assert open_cardiology(capsys, state)["domain"] == "cardiology"
    with monkeypatch.context() as patch:
        patch.setattr(Site, "now", lambda _site: expires + timedelta(days=90))
        assert Budget(site).open_domain(DomainOpened("late", 8.0, 1e-6, 4, "data-owner"))


def test_shows_what_was_spent_on_whom_and_what_is_left(state, capsys) -> None:
    open_cardiology(capsys, state)
    plan_id = draft(capsys, state)["plan_id"]
    site = open_state(state)
    budget, plan = Budget(site), find_plan(site, plan_id).plan
    budget.reserve(charge_for(plan))
    budget.commit(Committed(plan_id, Outcome.ABORTED, (), "AG-PRV-040"))
    (account,) = run_site_json(capsys, "ledger", "show", "--state", state)["domains"]
    assert account["rdp_spent"] + account["rdp_left"] == pytest.approx(account["rdp_cap"])
    assert account["epsilon_by_pld"] <= account["epsilon_by_rdp"] <= 8
    assert account["charges"][0]["state"] == "aborted"
    _, out, _ = run_site(capsys, "ledger", "show", "--state", state)
    assert "non-adaptive" in out
    assert "AG-PRV-040" in out


def test_shows_a_release_without_privacy_in_red_words(state, capsys) -> None:
    open_cardiology(capsys, state)
    release = NonprivateRelease("cardiology", "ef" * 32, "data-owner")
    Budget(open_state(state)).record_nonprivate(release)
    (account,) = run_site_json(capsys, "ledger", "show", "--state", state)["domains"]
    assert account["infinite"]
    assert account["epsilon_by_rdp"] is None
    text = main_privacy._render_account(account)
    assert "\x1b[31m\x1b[1mepsilon is INFINITE (∞)" in text


def test_the_database_remembers_a_ledger_that_was_replaced(state, capsys) -> None:
    open_cardiology(capsys, state)
    shutil.copytree(state / "privacy", state / "old")
    plan_id = draft(capsys, state)["plan_id"]
    site = open_state(state)
    Budget(site).reserve(charge_for(find_plan(site, plan_id).plan))
    shutil.rmtree(state / "privacy")
    again = ("ledger", "open-domain", "other", "--declared-by", "data-owner")
    assert refusal(capsys, *again, "--state", state) == (1, "AG-PRV-069")
    assert refusal(capsys, "ledger", "show", "--state", state) == (1, "AG-PRV-069")
    (state / "privacy").mkdir()
    assert refusal(capsys, *again, "--state", state) == (1, "AG-PRV-069")
    shutil.rmtree(state / "privacy")
    shutil.copytree(state / "old", state / "privacy")
    assert refusal(capsys, *again, "--state", state) == (1, "AG-PRV-069")
    assert refusal(capsys, "ledger", "show", "--state", state) == (1, "AG-PRV-069")


def test_people_are_registered_under_a_key_that_is_not_made_twice(state, capsys) -> None:
    budget = Budget(open_state(state))
    budget.population().enrol_people("cardiology", ["a", "b"])
    with pytest.raises(RejectedError, match="AG-PRV-066"):
        budget.population().enrol_people("fresh", ["b", "c"])
    (state / "keys" / "population.key").unlink()
    with pytest.raises(RejectedError, match="AG-PRV-067"):
        budget.population()


def test_names_the_people_whom_a_packet_knows_best(state, capsys) -> None:
    site, packet_id = open_state(state), "ab" * 16
    row = PacketRow(
        packet_id=packet_id, role="donor", donor="hospital-a", kind="organ", model="notes",
        dispatch_id="", state="failed", code="", reason="", facts={}, time="2026-11-23T08:00:00Z",
    )  # fmt: skip
    site.store.add_packet(row)
    assert refusal(capsys, "packet", "people", packet_id, "--state", state) == (1, "AG-SIT-019")
    report = FullReport(
        packet_id, "0" * 64, {"G3": {"extractable": 3.0, "possible": 2000.0}},
        people=(Exposed("patient-7", 1.25, 3, True), Exposed("patient-2", 0.5, 0, False)),
    )  # fmt: skip
    path = site.packet_path(packet_id, "report.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(report.to_bytes())
    status, shown, _ = run_site(capsys, "packet", "people", packet_id[:8], "--state", state)
    assert status == 0
    assert "3 of 2,000 passages" in shown
    assert shown.index("patient-7") < shown.index("patient-2")
    told = run_site_json(capsys, "packet", "people", packet_id, "--state", state)
    assert told["people"][0] == {
        "person": "patient-7", "saved": 1.25, "extractable": 3, "recognised": True,
    }  # fmt: skip
    path.write_bytes(report.to_bytes() + b"}")
    assert refusal(capsys, "packet", "people", packet_id, "--state", state) == (1, "AG-PRV-030")


def enrol(state, domain, ids):
    Budget(open_state(state)).population().enrol_people(domain, ids)


def open_domains(capsys, state, *names):
    for name in names:
        command = ("ledger", "open-domain", name, "--declared-by", "data-owner")
        run_site_json(capsys, *command, "--state", state)


def test_domains_that_share_people_are_refused(state, capsys) -> None:
    open_domains(capsys, state, "cardiology", "oncology", "surgery")
    enrol(state, "cardiology", ["a", "b"])
    enrol(state, "oncology", ["c"])
    check = ("ledger", "check-disjoint")
    found = run_site_json(capsys, *check, "--state", state)
    assert found == {"disjoint": ["cardiology", "oncology"], "without_people": ["surgery"]}
    chosen = run_site_json(capsys, *check, "oncology", "surgery", "--state", state)
    assert chosen == {"disjoint": ["oncology"], "without_people": ["surgery"]}
    assert refusal(capsys, *check, "oncology", "unknown", "--state", state) == (1, "AG-PRV-062")
    # Enrolment refuses it, so it is written as a damaged or older program would have.
    register = Budget(open_state(state)).population()
    shared = register._write("surgery", register._digests(["b", "z"]))
    (state / "privacy" / "population" / "surgery.people").write_bytes(shared)
    assert refusal(capsys, *check, "--state", state) == (1, "AG-PRV-066")
    assert run_site_json(capsys, *check, "cardiology", "oncology", "--state", state)["disjoint"]


def test_people_of_a_file_are_found_in_their_domains_and_not_enrolled(state, capsys) -> None:
    open_domains(capsys, state, "cardiology", "oncology")
    enrol(state, "cardiology", ["a", "b"])
    data = state / "records.jsonl"
    data.write_text('{"who": "b", "text": "x"}\n{"who": "new", "text": "y"}\n', "utf-8")
    command = ("ledger", "find-overlap", "--data", data, "--person-field", "who")
    for _ in range(2):
        assert run_site_json(capsys, *command, "--state", state) == {"domains": ["cardiology"]}
    status, out, _ = run_site(capsys, *command, "--state", state)
    assert (status, out) == (0, "Some of these people belong to: cardiology.\n")
    data.write_text('{"who": "new", "text": "y"}\n', "utf-8")
    assert run_site_json(capsys, *command, "--state", state) == {"domains": []}
    assert refusal(capsys, *command[:4], "--state", state) == (1, "AG-PRV-081")
    missing = ("ledger", "find-overlap", "--data", state / "absent.jsonl")
    assert refusal(capsys, *missing, "--state", state) == (3, "AG-STO-005")


def diagnose(capsys, state):
    _, out, _ = run_site(capsys, "doctor", "--state", state, "--format", "json")
    (found,) = [f for f in json.loads(out)["findings"] if f["check"] == "ledger"]
    return found["level"], found["code"]


def sign_plan(capsys, state):
    plan_id = draft(capsys, state)["plan_id"]
    run_site_json(capsys, "plan", "sign", plan_id, "--state", state)
    return find_plan(open_state(state), plan_id).plan


def test_doctor_recomputes_what_the_ledger_says(state, capsys) -> None:
    assert diagnose(capsys, state) == ("ok", "")
    open_cardiology(capsys, state)
    plan = sign_plan(capsys, state)
    Budget(open_state(state)).reserve(charge_for(plan))
    assert diagnose(capsys, state) == ("ok", "")
    (state / "plans" / f"{plan.plan_id}.json").unlink()
    assert diagnose(capsys, state) == ("warning", "AG-PRV-056")
    assert run_site_json(capsys, "ledger", "show", "--state", state)["without_plan"]


def write_entry(state, reserved) -> None:
    """An entry as altered software of the site would have signed it."""
    budget = Budget(open_state(state))
    budget._file._record(reserved, budget.site.now(), budget._known())


def test_a_charge_that_states_too_little_stops_the_ledger(state, capsys) -> None:
    open_cardiology(capsys, state)
    charge = charge_for(sign_plan(capsys, state))
    write_entry(state, Reserved(charge, (0.0,) * len(ORDERS)))
    assert diagnose(capsys, state) == ("error", "AG-PRV-060")
    assert refusal(capsys, "ledger", "show", "--state", state) == (1, "AG-PRV-060")
    with pytest.raises(RejectedError, match="AG-PRV-060"):
        Budget(open_state(state)).ledger()


def test_a_charge_for_less_than_its_signed_plan_is_told(state, capsys) -> None:
    open_cardiology(capsys, state)
    charge = charge_for(sign_plan(capsys, state))
    write_entry(state, reserve_for(replace(charge, event=replace(charge.event, steps=1))))
    assert diagnose(capsys, state) == ("error", "AG-PRV-060")
    assert refusal(capsys, "ledger", "show", "--state", state) == (1, "AG-PRV-060")


def rotate(state) -> None:
    """Another signing key, as the keeper enrols it with `--replace`."""
    (state / "keys" / "signing.pem").unlink()
    keystore.write_signing_key(state / "keys" / "signing.pem", SigningKey.generate())


def test_the_ledger_goes_on_after_the_site_got_another_key(state, capsys) -> None:
    open_cardiology(capsys, state)
    plan = sign_plan(capsys, state)
    Budget(open_state(state)).reserve(charge_for(plan))
    for _ in range(2):
        rotate(state)
        before = Budget(open_state(state)).ledger()
        assert before.reservation(plan.plan_id) is not None
        assert diagnose(capsys, state) == ("ok", "")
        another = sign_plan(capsys, state)
        Budget(open_state(state)).reserve(charge_for(another))
        assert Budget(open_state(state)).ledger().head.count == before.head.count + 1
    assert run_site_json(capsys, "ledger", "show", "--state", state)["without_plan"] == []
    keys = keystore.read_verify_keys(state / "keys" / "signing.public")
    assert len(keys) == 3


@pytest.mark.parametrize("damage", ["lost", "stranger"])
def test_entries_of_a_key_that_the_site_never_had_are_refused(state, capsys, damage) -> None:
    open_cardiology(capsys, state)
    rotate(state)
    known = state / "keys" / "signing.public"
    known.unlink()
    if damage == "stranger":
        keystore.add_verify_key(known, SigningKey.generate().public)
    assert refusal(capsys, "ledger", "show", "--state", state) == (1, "AG-PRV-060")


def test_a_key_is_kept_before_it_signs(state, capsys, monkeypatch) -> None:
    def killed(*_arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("allograft.privacy.ledger_file.durable_write", killed)
        with pytest.raises(KeyboardInterrupt):
            Budget(open_state(state)).open_domain(DomainOpened("x", 8.0, 1e-6, 4, "data-owner"))
    assert len(keystore.read_verify_keys(state / "keys" / "signing.public")) == 1


def test_a_position_search_on_private_data_is_refused() -> None:
    search = OrganPlan(search_steps=5)
    asked = DonationPlan("notes", "organ", Path(), "measured", "", "", "letters", search)
    with pytest.raises(RejectedError, match="AG-RCP-029"):
        replace(asked, privacy_plan="ab" * 16).check()
