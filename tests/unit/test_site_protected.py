# SPDX-License-Identifier: Apache-2.0
"""Donations from private data: plan before data, budget before training, audits before leaving."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from allograft.cli import shell
from allograft.cli.main import app
from allograft.crypto import canonical, dsse
from allograft.errors import RejectedError, UnavailableError
from allograft.packet import container
from allograft.privacy.dossier import GateVerdict
from allograft.privacy.ledger import DomainOpened, Outcome
from allograft.privacy.people import People
from allograft.privacy.population import Population
from allograft.privacy.report import FullReport
from allograft.provenance.training import commit_data
from allograft.recipes.plan import OrganPlan
from allograft_client import dispatcher, donor, main_packet, protected
from allograft_client.budget import Budget
from kit.consortium import Consortium
from kit.donations import (
    CONSTANTS,
    NAMED,
    PEOPLE,
    STRICT,
    A,
    B,
    account,
    donate,
    donation_of,
    dossier_of,
    open_private,
    people,
    planned,
    public_text,
    refusal,
    send,
    sign,
    state,
    training_of,
)


@pytest.fixture
def two(tmp_path):
    consortium = open_private(tmp_path)
    yield consortium
    consortium.close()


class TestStrict:
    def test_a_packet_leaves_with_its_plan_and_is_kept(self, two) -> None:
        plan = planned(two[A])
        packet_id = donate(two, plan)
        assert state(two, A, packet_id) == ("awaiting-approval", "")
        assert account(two).outcomes[plan.plan_id].outcome is Outcome.RELEASED
        claim = dossier_of(two, packet_id).privacy
        assert claim.epsilon == pytest.approx(plan.epsilon())
        assert claim.epsilon_domain == pytest.approx(account(two).epsilon)
        send(two, packet_id)
        assert state(two, B, packet_id) == ("kept", "")

    def test_every_gate_of_the_mode_is_in_the_dossier(self, two) -> None:
        dossier = dossier_of(two, donate(two, planned(two[A])))
        assert [g.name for g in dossier.gates] == ["G0", "G1", "G2", "G3", "G4", "G5", "G6", "G7"]
        assert all(gate.cost_ms == 0 for gate in dossier.gates if gate.name in {"G3", "G5"})

    def test_what_was_measured_on_people_stays(self, two) -> None:
        packet_id = donate(two, planned(two[A]))
        send(two, packet_id)
        report = two[A].site.packet_path(packet_id, "report.json").read_bytes()
        assert FullReport.from_bytes(report).figures["G5"]["tpr"] == 0.0123456
        attestations = two[A].site.packet_path(packet_id, "attestations.jsonl").read_bytes()
        payloads = b"".join(
            dsse.Envelope.from_bytes(line).payload
            for line in container.split_attestations(attestations)
            if b'"mediaType"' not in line
        )
        for private in (
            b"0.0123",
            b"patient-7",
            b"a note about",
            b"wards",
            b"records.jsonl",
            b'"gain"',
        ):
            assert private not in payloads.replace(plan_of(payloads), b"")
        for _, _, files in two.sent:
            for content in files.values():
                assert b"patient-7" not in content
                assert b"a note about" not in content
                assert b"0.0123456" not in content

    def test_the_dossier_names_the_report(self, two) -> None:
        packet_id = donate(two, planned(two[A]))
        report = two[A].site.packet_path(packet_id, "report.json").read_bytes()
        assert dossier_of(two, packet_id).report_digest == FullReport.from_bytes(report).digest

    def test_the_dossier_is_shown_from_the_donor_s_own_directory(
        self, two, tmp_path, capsys, monkeypatch
    ) -> None:
        packet_id = donate(two, planned(two[A]))
        roster = SimpleNamespace(current=lambda now: two[A].site.trust.roster())
        monkeypatch.setattr("allograft.cli.dossier.RosterClient", lambda path: roster)
        page = tmp_path / "page.html"
        command = [
            "dossier", "show", str(two[A].site.packet_path(packet_id)),
            "--roster", str(tmp_path), "--html", str(page),
        ]  # fmt: skip
        assert shell.invoke(app, "allograft", command) == 0
        shown = capsys.readouterr().out
        # Alone, the test has log lines before it on the same stream; behind others it has none.
        assert "\nMode strict. Differential privacy is promised" in f"\n{shown}"
        # At the donor it also tells what the audits found on real people.
        assert "the best attack we ran recognises 12" in shown
        assert page.read_text("utf-8").startswith("<!doctype html>")

    def test_workers_get_people_and_constants_and_no_key(self, two) -> None:
        donate(two, planned(two[A]))
        (training,) = two[A].runner.done("train")
        assert training["plan"]["private"] == CONSTANTS.to_json()
        assert training["people"].endswith("people.json")
        assert "key" not in json.dumps(training)


def plan_of(payloads: bytes) -> bytes:
    """The plan names its domain of people; it is signed before the data is opened."""
    start = payloads.index(b'"domain":"wards"')
    return payloads[start : start + len(b'"domain":"wards"')]


class TestMeasured:
    def test_a_packet_leaves_and_the_people_have_no_bound_from_then_on(self, two) -> None:
        packet_id = donate(two, planned(two[A], "measured"))
        assert not account(two).is_nonprivate
        send(two, packet_id)
        assert state(two, B, packet_id) == ("kept", "")
        assert account(two).is_nonprivate
        claim = dossier_of(two, packet_id).privacy
        assert (claim.epsilon, claim.epsilon_domain) == (None, None)

    def test_a_later_strict_packet_shows_it(self, two) -> None:
        send(two, donate(two, planned(two[A], "measured")))
        claim = dossier_of(two, donate(two, planned(two[A]))).privacy
        assert claim.epsilon is not None
        assert claim.epsilon_domain is None

    def test_whoever_approves_is_shown_the_warnings_of_the_audits(self, two) -> None:
        two[A].runner.figures = {"G5": (("tpr", 0.05), ("warn.tpr", 0.05))}
        site, packet_id = two[A].site, donate(two, planned(two[A], "measured"))
        words = "G5: more people than usual are recognised at the false-positive rate of the audit"
        shown = main_packet._render_packet(
            main_packet.describe_packet(site, site.store.packet(packet_id))
        )
        assert f"warning: {words}" in shown
        for role in ("officer", "steward"):
            with pytest.raises(RejectedError) as refused:
                dispatcher.approve_packet(site, packet_id, role)
            assert (refused.value.code, refused.value.cause) == ("AG-PRV-034", words)
            assert not site.packet_path(packet_id, "approvals", f"{role}.json").exists()
            number = site.store.add_job(
                "light", "approve", packet_id, {"role": role, "despite_warnings": True}
            )
            two[A].work()
            assert site.store.job(number).result["warnings"] == [words]
        assert state(two, A, packet_id)[0] == "offered"

    def test_recipients_must_be_named(self, tmp_path) -> None:
        two = Consortium(tmp_path, hospital_a=STRICT)
        sign(two[A])
        code = refusal(lambda: donor.plan_donation(
            two[A].site, donation_of(two[A], planned(two[A], "measured"))
        ))  # fmt: skip
        assert code == "AG-PRV-009"
        two.close()


class TestPlan:
    @pytest.mark.parametrize("mode", ["strict", "measured"])
    def test_there_is_none_without_a_signature(self, two, mode: str) -> None:
        plan = planned(two[A], mode, signed=False)
        donation = donation_of(two[A], plan)
        assert refusal(donor.plan_donation, two[A].site, donation) == "AG-PRV-056"

    @pytest.mark.parametrize(
        "changes",
        [{"steps": 301}, {"window_tokens": 128}, {"kind": "lora"}, {"holdout": 0.5},
         {"learning_rate": 1e-2}, {"recipe": OrganPlan(blocks=1)}, {"person_field": "note"}],
    )  # fmt: skip
    def test_another_donation_than_planned_is_refused(self, two, changes) -> None:
        donation = donation_of(two[A], planned(two[A]), **changes)
        assert refusal(donor.plan_donation, two[A].site, donation) in {"AG-PRV-057", "AG-PRV-003"}

    @pytest.mark.parametrize("verdict", [GateVerdict.PASS, GateVerdict.FAIL])
    @pytest.mark.parametrize("mode", ["strict", "measured"])
    def test_it_pays_for_one_run(self, two, mode: str, verdict: GateVerdict) -> None:
        two[A].runner.verdicts = {"G4": verdict}
        plan = planned(two[A], mode)
        packet_id = donate(two, plan)
        before, outcomes = state(two, A, packet_id), dict(account(two).outcomes)
        assert refusal(donor.plan_donation, two[A].site, donation_of(two[A], plan)) == "AG-PRV-057"
        assert state(two, A, packet_id) == before
        assert account(two).outcomes == outcomes
        assert len(two[A].runner.done("train")) == 1

    def test_two_donations_of_an_older_version_under_it_are_both_refused(self, two) -> None:
        donation = donation_of(two[A], planned(two[A], "measured"))
        first, _ = donor.plan_donation(two[A].site, donation)
        store = two[A].site.store
        store.add_packet(replace(store.packet(first), packet_id="5" * 32))
        store.add_job("heavy", "donate", "5" * 32, donation.to_json())
        two.step()
        for packet_id in (first, "5" * 32):
            assert state(two, A, packet_id) == ("refused", "AG-PRV-057")
        assert two[A].runner.tasks == []

    def test_a_refused_donation_does_not_end_anothers_reservation(self, two) -> None:
        plan = planned(two[A])
        donation = donation_of(two[A], plan)
        first, _ = donor.plan_donation(two[A].site, donation)
        two[A].runner.errors = {"train": UnavailableError("AG-SIT-007", "killed")}
        with pytest.raises(UnavailableError):
            donor.donate(two[A].site, first, donation, lambda _: None)
        refused = RejectedError("AG-PRV-057", "used")
        protected.end_protected(two[A].site, "5" * 32, donation, refused)
        assert account(two).outcomes == {}
        protected.end_protected(two[A].site, first, donation, refused)
        assert account(two).outcomes[plan.plan_id].reason == "AG-PRV-057"

    def test_a_released_run_is_not_made_again_for_nothing(self, two) -> None:
        donation = donation_of(two[A], planned(two[A]))
        packet_id, _ = donor.plan_donation(two[A].site, donation)
        two.step()
        directory = two[A].site.packet_path(packet_id)
        for name in ("extract.json", "evaluation.json", "audit.json", "attestations.jsonl"):
            (directory / name).unlink()
        tell = lambda _: None  # noqa: E731
        assert refusal(donor.donate, two[A].site, packet_id, donation, tell) == "AG-PRV-057"
        assert len(two[A].runner.done("train")) == 1

    def test_it_is_named_in_full(self, two) -> None:
        plan = planned(two[A])
        donation = donation_of(two[A], plan, privacy_plan=plan.plan_id[:8])
        assert refusal(donor.plan_donation, two[A].site, donation) == "AG-PRV-057"

    def test_protected_modes_take_no_declaration_and_no_shortcut(self, two) -> None:
        donation = donation_of(two[A], planned(two[A]))
        declared = replace(donation, nature="synthetic", declared_by="steward")
        assert refusal(donor.plan_donation, two[A].site, declared) == "AG-PRV-012"
        unplanned = replace(donation, privacy_plan="")
        assert refusal(donor.plan_donation, two[A].site, unplanned) == "AG-PRV-053"

    def test_more_than_the_policy_allows_is_refused_before_anything_is_spent(self, two) -> None:
        weak = replace(CONSTANTS, noise_multiplier=0.8, sampling_rate=0.03)
        assert refusal(lambda: planned(two[A], constants=weak, purpose="other")) == "AG-PRV-014"
        two[A].home.policy_file.write_text(NAMED + "donation_epsilon = 8.0\n")
        plan = planned(two[A], constants=weak)
        two[A].home.policy_file.write_text(NAMED)
        packet_id = donate(two, plan)
        assert state(two, A, packet_id) == ("refused", "AG-PRV-014")
        assert account(two).reserved == ()
        assert two[A].runner.tasks == []


class TestData:
    @pytest.mark.parametrize(
        ("mode", "task"),
        [("open", "train"), ("open", "evaluate"), ("strict", "train"), ("strict", "evaluate"),
         ("strict", "audit"), ("measured", "audit")],
    )  # fmt: skip
    def test_a_file_that_changes_under_a_run_is_refused(self, two, mode, task) -> None:
        donation = two[A].plan() if mode == "open" else donation_of(two[A], planned(two[A], mode))
        packet_id, _ = donor.plan_donation(two[A].site, donation)
        whole = getattr(two[A].runner, f"_{task}")

        def swap(asked):
            donation.data.write_text(donation.data.read_text("utf-8") + "\n", "utf-8")
            return whole(asked)

        setattr(two[A].runner, f"_{task}", swap)
        two.step()
        assert state(two, A, packet_id) == ("failed", "AG-RCP-034")
        assert not two[A].site.packet_path(packet_id, "attestations.jsonl").exists()

    def test_the_commitment_names_the_file_that_was_trained_on(self, two) -> None:
        donation = donation_of(two[A], planned(two[A]))
        digest = hashlib.sha256(donation.data.read_bytes()).hexdigest()
        packet_id, _ = donor.plan_donation(two[A].site, donation)
        two.step()
        commitment = commit_data(digest, read(two, packet_id, "salt"))
        lines = container.split_attestations(read(two, packet_id, "attestations.jsonl"))
        payloads = b"".join(dsse.Envelope.from_bytes(line).payload for line in lines[1:])
        assert commitment.encode() in payloads

    def test_signed_times_are_whole_hours(self, two) -> None:
        packet_id = donate(two, planned(two[A]))
        assert dossier_of(two, packet_id).created.endswith(":00:00Z")
        packet = donor.read_own_statement(two[A].site, packet_id)
        assert (packet.created.minute, packet.created.second) == (0, 0)
        send(two, packet_id)
        assert state(two, B, packet_id) == ("kept", "")


class TestPolicy:
    def test_an_unsigned_policy_is_refused(self, two) -> None:
        two[A].home.policy_signature.unlink()
        donation = donation_of(two[A], planned(two[A]))
        assert refusal(donor.plan_donation, two[A].site, donation) == "AG-PRV-006"

    def test_audits_of_an_older_policy_are_made_again(self, two, monkeypatch) -> None:
        donation = donation_of(two[A], planned(two[A]))
        packet_id, _ = donor.plan_donation(two[A].site, donation)

        def killed(*_):
            raise UnavailableError("AG-STO-005", "gone for now")

        with monkeypatch.context() as patch:
            patch.setattr(donor._Donation, "build", killed)
            with pytest.raises(UnavailableError):
                donor.donate(two[A].site, packet_id, donation, lambda _: None)
        first = read(two, packet_id, "report.json")
        path = two[A].home.policy_file
        path.write_text(path.read_text() + "canaries = 500\n")
        sign(two[A])
        two[A].runner.verdicts = {"G4": GateVerdict.INVALID}
        two.step()
        audits = two[A].runner.done("audit")
        assert [task["thresholds"]["canaries_min"] for task in audits] == [1000, 500]
        assert state(two, A, packet_id) == ("refused", "AG-PRV-020")
        assert read(two, packet_id, "report.json") != first

    def test_audits_of_the_same_policy_are_kept(self, two, monkeypatch) -> None:
        donation = donation_of(two[A], planned(two[A]))
        packet_id, _ = donor.plan_donation(two[A].site, donation)

        def killed(*_):
            raise UnavailableError("AG-STO-005", "gone for now")

        with monkeypatch.context() as patch:
            patch.setattr(donor._Donation, "build", killed)
            with pytest.raises(UnavailableError):
                donor.donate(two[A].site, packet_id, donation, lambda _: None)
        two.step()
        assert state(two, A, packet_id) == ("awaiting-approval", "")
        assert len(two[A].runner.done("audit")) == 1

    def test_a_policy_weakened_without_signature_stops_the_dispatch(self, two) -> None:
        packet_id = donate(two, planned(two[A]))
        for role in ("officer", "steward"):
            dispatcher.approve_packet(two[A].site, packet_id, role)
            two.step()
        path = two[A].home.policy_file
        path.write_text(path.read_text().replace("min_population = 20", "min_population = 30"))
        dispatcher.queue_dispatch(two[A].site, packet_id, [B])
        two.step()
        assert state(two, A, packet_id)[0] == "routed"
        assert not [kind for _, kind, _ in two.sent if kind == "dispatch"]


class TestPeople:
    def test_records_without_a_person_are_refused(self, two) -> None:
        plan = planned(two[A])
        donation = donation_of(two[A], plan)
        donation.data.write_text('{"text": "nobody knows whom"}\n', "utf-8")
        packet_id, _ = donor.plan_donation(two[A].site, donation)
        two.step()
        assert state(two, A, packet_id) == ("refused", "AG-PRV-081")
        assert account(two).reserved == ()

    def test_fewer_people_than_the_minimum_are_refused_before_anything_is_spent(self, two) -> None:
        packet_id = donate(two, planned(two[A]), ids=people(19))
        assert state(two, A, packet_id) == ("refused", "AG-PRV-078")
        assert account(two).reserved == ()

    def test_too_few_held_out_people_are_refused_before_anything_is_spent(self, two) -> None:
        packet_id = donate(two, planned(two[A]), ids=people(100))
        assert state(two, A, packet_id) == ("refused", "AG-PRV-078")
        assert account(two).reserved == ()

    @pytest.mark.parametrize("mode", ["strict", "measured"])
    def test_a_domain_keeps_the_field_that_names_a_person(self, two, mode: str) -> None:
        donate(two, planned(two[A], mode))
        spent = account(two).reserved
        by_note = training_of(two[A], person_field="note")
        packet_id = donate(two, planned(two[A], training=by_note))
        assert state(two, A, packet_id) == ("refused", "AG-PRV-057")
        assert account(two).reserved == spent

    def test_nobody_runs_on_people_whose_earlier_plan_is_gone(self, two) -> None:
        plan = planned(two[A])
        donate(two, plan)
        two[A].home.path("plans", f"{plan.plan_id}.json").unlink()
        packet_id = donate(two, planned(two[A], purpose="again"))
        assert state(two, A, packet_id) == ("refused", "AG-PRV-056")

    def test_another_domain_may_name_them_otherwise(self, two) -> None:
        donate(two, planned(two[A], "measured"))
        Budget(two[A].site).open_domain(DomainOpened("fresh", 8.0, 1e-6, 4, "officer"))
        plan = planned(two[A], domain="fresh", training=training_of(two[A], person_field="who"))
        donation = donation_of(two[A], plan)
        records = [{"who": f"new{n}", "text": f"a note {n}"} for n in range(PEOPLE)]
        donation.data.write_text("\n".join(json.dumps(each) for each in records), "utf-8")
        packet_id, _ = donor.plan_donation(two[A].site, donation)
        two.step()
        assert state(two, A, packet_id) == ("awaiting-approval", "")
        assert two[A].runner.done("train")[-1]["person_field"] == "who"

    @pytest.mark.parametrize(
        ("domain_delta", "delta", "whose"), [(2e-5, 1e-5, "domain's"), (1e-6, 1e-7, "plan's")]
    )
    def test_deltas_that_recipients_would_refuse_are_refused_beforehand(
        self, two, domain_delta, delta, whose
    ) -> None:
        # Opened and signed under a looser policy, which was then tightened.
        two[A].home.policy_file.write_text(NAMED + "max_delta = 1e-4\n")
        Budget(two[A].site).open_domain(DomainOpened("loose", 8.0, domain_delta, 4, "officer"))
        constants = replace(CONSTANTS, noise_multiplier=3.0, delta=delta)
        plan = planned(two[A], domain="loose", constants=constants)
        two[A].home.policy_file.write_text(NAMED)
        packet_id = donate(two, plan)
        assert state(two, A, packet_id) == ("refused", "AG-PRV-014")
        assert two[A].site.store.packet(packet_id).reason.startswith(f"the {whose} delta")
        assert Budget(two[A].site).ledger().account("loose").reserved == ()
        assert Budget(two[A].site).population().enrolled_domains() == ()

    @pytest.mark.parametrize("cause", ["people", "sides", "public text", "budget", "policy"])
    def test_a_run_that_is_refused_beforehand_enrols_nobody(self, two, cause: str) -> None:
        changes, ids = {}, people()
        if cause == "people":
            ids = people(19)
        elif cause == "sides":
            ids = people(100)
        elif cause == "public text":
            two[A].site.store.model("base").retention.write_text("too little", "utf-8")
        elif cause == "budget":
            dear = replace(CONSTANTS, noise_multiplier=1.0, sampling_rate=0.02)
            Budget(two[A].site).open_domain(DomainOpened("poor", 0.5, 1e-6, 64, "officer"))
            changes = {"domain": "poor", "constants": dear}
        else:
            changes = {"constants": replace(CONSTANTS, noise_multiplier=0.8, sampling_rate=0.03)}
            two[A].home.policy_file.write_text(NAMED + "donation_epsilon = 8.0\n")
        plan = planned(two[A], **changes)
        two[A].home.policy_file.write_text(NAMED)
        packet_id = donate(two, plan, ids=ids)
        codes = {
            "people": "078", "sides": "078", "public text": "079", "budget": "063", "policy": "014",
        }  # fmt: skip
        assert state(two, A, packet_id) == ("refused", f"AG-PRV-{codes[cause]}")
        assert Budget(two[A].site).population().enrolled_domains() == ()
        assert not two[A].site.packet_path(packet_id, "people.json").exists()

    def test_a_data_set_renamed_into_a_fresh_domain_is_recognised(self, two) -> None:
        donate(two, planned(two[A]))
        Budget(two[A].site).open_domain(DomainOpened("fresh", 8.0, 1e-6, 4, "officer"))
        mixed = people(5) + people(PEOPLE, "new")
        packet_id = donate(two, planned(two[A], domain="fresh"), ids=mixed)
        assert state(two, A, packet_id) == ("refused", "AG-PRV-066")
        assert Budget(two[A].site).ledger().account("fresh").reserved == ()


class TestBudget:
    def test_a_failed_gate_leaves_nothing_and_stays_spent(self, two) -> None:
        two[A].runner.verdicts = {"G4": GateVerdict.FAIL}
        plan = planned(two[A])
        packet_id = donate(two, plan)
        assert state(two, A, packet_id) == ("refused", "AG-PRV-020")
        ended = account(two).outcomes[plan.plan_id]
        assert (ended.outcome, ended.reason) == (Outcome.ABORTED, "AG-PRV-020")
        assert account(two).spent > 0
        assert not two[A].site.packet_path(packet_id, "attestations.jsonl").exists()

    def test_an_audit_that_could_not_judge_is_no_pass(self, two) -> None:
        two[A].runner.verdicts = {"G5": GateVerdict.INVALID}
        assert state(two, A, donate(two, planned(two[A]))) == ("refused", "AG-PRV-020")

    def test_a_spent_domain_refuses_the_next_run(self, two) -> None:
        costly = replace(CONSTANTS, noise_multiplier=1.0, sampling_rate=0.02)
        for number in range(15):
            packet_id = donate(two, planned(two[A], purpose=f"run {number}", constants=costly))
            if state(two, A, packet_id)[0] == "refused":
                break
        assert state(two, A, packet_id)[1] == "AG-PRV-063"
        assert account(two).epsilon <= 8.0
        assert len(two[A].runner.done("train")) == number

    @pytest.mark.parametrize("task", ["train", "evaluate", "audit"])
    def test_a_refusal_at_any_step_ends_the_plan_and_refunds_nothing(self, two, task) -> None:
        two[A].runner.errors = {task: RejectedError("AG-RCP-033", "diverged")}
        plan = planned(two[A])
        donate(two, plan)
        assert account(two).outcomes[plan.plan_id].reason == "AG-RCP-033"
        assert account(two).spent > 0

    @pytest.mark.parametrize("task", ["train", "evaluate", "audit"])
    def test_a_crash_at_any_step_costs_nothing_more(self, two, task) -> None:
        plan = planned(two[A])
        two[A].runner.errors = {task: UnavailableError("AG-SIT-007", "killed")}
        donation = donation_of(two[A], plan)
        packet_id, _ = donor.plan_donation(two[A].site, donation)
        with pytest.raises(UnavailableError):
            donor.donate(two[A].site, packet_id, donation, lambda _: None)
        spent, coins = account(two).spent, read(two, packet_id, "people.json")
        assert spent > 0
        two.reopen()
        two[A].runner.errors = {}
        two.step()
        assert state(two, A, packet_id) == ("awaiting-approval", "")
        assert account(two).spent == spent
        assert read(two, packet_id, "people.json") == coins

    @pytest.mark.parametrize("place", ["reserve", "commit", "conclude", "people", "enrol", "coins"])
    def test_a_kill_between_two_writes_is_repaired(self, two, place, monkeypatch) -> None:
        donation = donation_of(two[A], planned(two[A]))
        packet_id, _ = donor.plan_donation(two[A].site, donation)
        target, name = {
            "reserve": (Budget, "reserve"),
            "commit": (Budget, "commit"),
            "conclude": (protected.ProtectedRun, "conclude"),
            "people": (protected, "draw_people"),
            "enrol": (Population, "enrol_people"),
            "coins": (People, "save"),
        }[place]
        whole = getattr(target, name)

        def killed(*arguments, **options):
            whole(*arguments, **options)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(target, name, killed)
            with pytest.raises(KeyboardInterrupt):
                donor.donate(two[A].site, packet_id, donation, lambda _: None)
        before = account(two).spent
        two.reopen()
        two.step()
        assert state(two, A, packet_id) == ("awaiting-approval", "")
        assert account(two).spent >= before
        assert len(account(two).reserved) == 1

    def test_a_ledger_that_was_rolled_back_stops_everything(self, two) -> None:
        directory = two[A].home.path("privacy")
        kept = {path: path.read_bytes() for path in directory.iterdir() if path.is_file()}
        donate(two, planned(two[A]))
        for path, content in kept.items():
            path.write_bytes(content)
        packet_id = donate(two, planned(two[A], purpose="again"))
        assert state(two, A, packet_id)[0] == "refused"
        assert state(two, A, packet_id)[1] in {"AG-PRV-060", "AG-PRV-069"}


def read(two, packet_id, name) -> bytes:
    return two[A].site.packet_path(packet_id, name).read_bytes()


class TestRecipient:
    @pytest.mark.parametrize("change", ["plan", "epsilon", "constants"])
    def test_a_false_claim_is_refused(self, two, change, monkeypatch) -> None:
        whole = protected.ProtectedRun.conclude

        def lie(run, parts, noise):
            claim = whole(run, parts, noise)
            return {
                "plan": replace(claim, plan_digest="0" * 64),
                "epsilon": replace(claim, epsilon=claim.epsilon / 2),
                "constants": replace(claim, constants=replace(CONSTANTS, steps=100)),
            }[change]

        monkeypatch.setattr(protected.ProtectedRun, "conclude", lie)
        packet_id = donate(two, planned(two[A]))
        send(two, packet_id)
        assert state(two, B, packet_id)[0] in {"refused", "quarantined"}
        assert state(two, B, packet_id)[1] in {"AG-PRV-011", "AG-PRV-013"}
        assert two[B].runner.tasks == []

    def test_a_site_that_takes_open_packets_only_refuses(self, tmp_path) -> None:
        two = Consortium(tmp_path, hospital_a=NAMED)
        sign(two[A])
        retention = two[A].site.store.model("base").retention
        retention.write_text("\n\n".join(public_text(n) for n in range(40)), "utf-8")
        Budget(two[A].site).open_domain(DomainOpened("wards", 8.0, 1e-6, 4, "officer"))
        packet_id = donate(two, planned(two[A]))
        send(two, packet_id)
        assert state(two, B, packet_id) == ("refused", "AG-PRV-005")
        two.close()


def test_the_plan_of_a_packet_is_read_strictly(two) -> None:
    packet_id = donate(two, planned(two[A]))
    lines = container.split_attestations(read(two, packet_id, "attestations.jsonl"))
    payload = dsse.Envelope.from_bytes(lines[-1]).payload
    assert canonical.loads(payload)["predicateType"] == "urn:allograft:privacy-plan:v1"
