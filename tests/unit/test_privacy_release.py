# SPDX-License-Identifier: Apache-2.0
"""Dossier, approvals and the decision to release."""

import ast
import dataclasses
from dataclasses import replace
from pathlib import Path

import pytest

from allograft.crypto import canonical, dsse
from allograft.crypto.keys import SigningKey
from allograft.errors import RejectedError
from allograft.privacy import dossier as dossiers
from allograft.privacy.claim import PrivacyClaim
from allograft.privacy.dossier import GateResult, GateVerdict, approve
from allograft.privacy.modes import AdmittedMode, Mode, admit_mode, declare
from allograft.privacy.policy import parse_policy
from allograft.privacy.release import REQUIRED_GATES, Release
from kit.releases import MEASURED, POLICY, STRICT, TIME, Desk, passed

MODES = POLICY.replace(b'["open"]', b'["strict", "measured"]')
ROOT = Path(__file__).resolve().parents[2]


def refusal(desk: Desk) -> str:
    with pytest.raises(RejectedError) as error:
        desk.release()
    return error.value.code


def test_releases_when_mode_policy_dossier_and_approvals_agree() -> None:
    desk = Desk(recipients=("hospital-d", "hospital-b", "hospital-b"))
    release = desk.release()
    assert release.recipients == ("hospital-b", "hospital-d")
    assert release.parts == desk.parts
    assert release.dossier_digest == desk.dossier.digest
    assert release.policy_digest == desk.policy.digest
    assert release.mode is Mode.OPEN


def test_a_release_cannot_be_made_or_copied_elsewhere() -> None:
    release = Desk().release()
    fields = {f.name: getattr(release, f.name) for f in dataclasses.fields(release)}
    with pytest.raises(TypeError):
        Release(**fields, made_by=None)
    with pytest.raises((TypeError, ValueError)):
        replace(release, recipients=("bank-c",))
    with pytest.raises(dataclasses.FrozenInstanceError):
        release.recipients = ("bank-c",)


@pytest.mark.parametrize("role", ["data-owner", "privacy-officer"])
def test_refuses_without_one_of_the_approvals(role: str) -> None:
    desk = Desk()
    desk.approvals = [a for a in desk.approvals if a.role != role]
    assert refusal(desk) == "AG-PRV-031"


def test_refuses_one_role_approving_twice() -> None:
    desk = Desk()
    desk.approvals = [desk.approvals[0], desk.approvals[0]]
    assert refusal(desk) == "AG-PRV-031"


def test_refuses_approvals_of_another_dossier() -> None:
    desk = Desk()
    old = desk.approvals
    desk.change_dossier(created="2026-11-24T08:00:00Z")
    desk.approvals = old
    assert refusal(desk) == "AG-PRV-031"


def test_refuses_approvals_of_other_bytes() -> None:
    desk = Desk()
    other = replace(desk.parts[0], sha256="b" * 64)
    desk.approvals = [replace(a, parts=(other,)) for a in desk.approvals]
    assert refusal(desk) == "AG-PRV-031"


@pytest.mark.parametrize("missing", ["G0", "G2", "G6"])
def test_refuses_a_missing_gate(missing: str) -> None:
    desk = Desk()
    desk.change_dossier(gates=tuple(g for g in desk.dossier.gates if g.name != missing))
    assert refusal(desk) == "AG-PRV-020"


@pytest.mark.parametrize("verdict", [GateVerdict.FAIL, GateVerdict.INVALID])
@pytest.mark.parametrize("gate", ["G2", "G9"])
def test_refuses_any_gate_that_did_not_pass(verdict: GateVerdict, gate: str) -> None:
    desk = Desk()
    others = tuple(g for g in desk.dossier.gates if g.name != gate)
    desk.change_dossier(gates=(*others, GateResult(gate, "1", verdict, reason="found one")))
    assert refusal(desk) == "AG-PRV-020"


def test_refuses_a_gate_reported_twice() -> None:
    desk = Desk()
    desk.change_dossier(gates=(*desk.dossier.gates, passed("G2")))
    assert refusal(desk) == "AG-PRV-020"


def test_refuses_recipients_that_the_policy_does_not_name() -> None:
    assert refusal(Desk(recipients=("hospital-b", "bank-c"))) == "AG-PRV-004"
    assert refusal(Desk(recipients=())) == "AG-PRV-004"


def test_refuses_a_kind_that_the_policy_does_not_name() -> None:
    desk = Desk()
    desk.change_dossier(kind="lora")
    assert refusal(desk) == "AG-PRV-003"


def test_refuses_after_the_policy_became_stricter() -> None:
    desk = Desk()
    stricter = POLICY.replace(b'"privacy-officer"]', b'"privacy-officer", "ethics"]')
    desk.policy = parse_policy(stricter)
    assert refusal(desk) == "AG-PRV-030"


def test_a_policy_with_more_recipients_does_not_void_approvals() -> None:
    desk = Desk(recipients=("clinic-e",))
    assert refusal(desk) == "AG-PRV-004"
    desk.policy = parse_policy(POLICY.replace(b'"hospital-d"]', b'"clinic-e"]'))
    assert desk.release().recipients == ("clinic-e",)


def test_refuses_a_dossier_that_asks_for_fewer_approvals() -> None:
    desk = Desk()
    desk.change_dossier(approvals_required=("data-owner",))
    assert refusal(desk) == "AG-PRV-030"


def test_refuses_a_dossier_of_another_declaration() -> None:
    desk = Desk()
    desk.mode = admit_mode("open", declare("public", "data-owner"))
    assert refusal(desk) == "AG-PRV-030"


@pytest.mark.parametrize("mode", ["strict", "measured"])
def test_releases_under_a_mode_with_its_evidence(mode: str) -> None:
    assert Desk.under(mode).release().mode is Mode(mode)


@pytest.mark.parametrize("mode", [Mode.STRICT, Mode.MEASURED])
def test_refuses_a_mode_without_its_evidence(mode: Mode) -> None:
    desk = Desk.under(str(mode))
    for changes in (
        {"privacy": None, "report_digest": ""},
        {"report_digest": ""},
        {"privacy": MEASURED if mode is Mode.STRICT else STRICT},
    ):
        desk = Desk.under(str(mode))
        desk.change_dossier(**changes)
        assert refusal(desk) == "AG-PRV-011"


@pytest.mark.parametrize("mode", [Mode.STRICT, Mode.MEASURED])
def test_refuses_a_protected_mode_that_was_declared_away(mode: Mode) -> None:
    desk = Desk.under(str(mode))
    forged = AdmittedMode(mode, declare("synthetic", "data-owner"))
    desk.mode = forged
    desk.change_dossier(mode=forged)
    assert refusal(desk) == "AG-PRV-012"


@pytest.mark.parametrize("mode", [Mode.STRICT, Mode.MEASURED])
def test_every_gate_of_the_mode_must_have_run(mode: Mode) -> None:
    for name in REQUIRED_GATES[mode]:
        desk = Desk.under(str(mode))
        gates = desk.dossier.gates
        desk.change_dossier(gates=tuple(gate for gate in gates if gate.name != name))
        assert refusal(desk) == "AG-PRV-020"


def test_measured_needs_two_roles_and_named_recipients() -> None:
    desk = Desk.under("measured")
    one = MODES.replace(b', "privacy-officer"', b"")
    desk.policy = parse_policy(one)
    desk.change_dossier(
        approvals_required=("data-owner",), conditions_digest=desk.policy.conditions_digest
    )
    assert refusal(desk) == "AG-PRV-009"
    desk = Desk.under("measured")
    desk.policy = parse_policy(MODES.replace(b'["hospital-b", "hospital-d"]', b'["*"]'))
    assert refusal(desk) == "AG-PRV-009"


def test_open_data_carries_no_claim_of_privacy() -> None:
    desk = Desk()
    desk.change_dossier(privacy=STRICT, report_digest="d" * 64)
    assert refusal(desk) == "AG-PRV-011"


class TestClaim:
    def test_survives_being_written(self) -> None:
        for claim in (STRICT, MEASURED):
            assert PrivacyClaim.from_json(claim.to_json()) == claim

    @pytest.mark.parametrize(
        "changes",
        [
            {"epsilon": None}, {"noise": ""}, {"constants": None}, {"epsilon": -1.0},
            {"epsilon": 1e9}, {"plan_digest": "b"}, {"accountant": "x\n"},
            {"constants": None, "epsilon": None, "noise": ""},
        ],
    )  # fmt: skip
    def test_a_contradiction_is_refused(self, changes: dict) -> None:
        with pytest.raises(RejectedError) as error:
            PrivacyClaim.from_json(STRICT.to_json() | changes)
        assert error.value.code == "AG-PRV-030"

    def test_a_false_epsilon_is_refused(self) -> None:
        STRICT.check(lambda _: 2.5)
        for found in (2.6, float("inf"), float("nan")):
            with pytest.raises(RejectedError) as error:
                STRICT.check(lambda _, found=found: found)
            assert error.value.code == "AG-PRV-013"
        with pytest.raises(RejectedError):
            replace(STRICT, epsilon_domain=1.0).check(lambda _: 2.5)


def test_a_role_that_was_not_asked_cannot_approve() -> None:
    with pytest.raises(RejectedError) as error:
        approve(Desk().dossier, "janitor", TIME)
    assert error.value.code == "AG-PRV-033"


def test_a_dossier_and_an_approval_survive_signing() -> None:
    desk, key = Desk(), SigningKey.generate()
    signed = dsse.sign(desk.dossier.to_statement(), dsse.IN_TOTO, [key])
    assert dossiers.verify_dossier(signed.to_bytes(), [key.public]) == desk.dossier
    agreed = dsse.sign(desk.approvals[0].to_statement(), dsse.IN_TOTO, [key])
    assert dossiers.verify_approval(agreed.to_bytes(), [key.public]) == desk.approvals[0]
    with pytest.raises(RejectedError) as error:
        dossiers.verify_dossier(signed, [SigningKey.generate().public])
    assert error.value.code == "AG-SIG-003"
    with pytest.raises(RejectedError) as error:
        dossiers.verify_approval(signed, [key.public])
    assert error.value.code == "AG-PRV-030"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("predicate", "mode"), "strict"),
        (("predicate", "privacy"), {}),
        (("predicate", "report_digest"), "x"),
        (("predicate", "packet_id"), "5" * 31),
        (("predicate", "gates", 0, "verdict"), "MAYBE"),
        (("predicate", "gates", 0, "extra"), 1),
        (("predicate", "gates", 0, "reason"), "x" * 600),
        (("predicate", "declaration", "nature"), "private"),
        (("predicate", "parts"), []),
        (("predicate", "parts", 0, "name"), "other.safetensors"),
        (("predicate", "parts", 0, "bytes"), -1),
        (("subject", 0, "digest", "sha256"), "A" * 64),
        (("predicate", "created"), "yesterday"),
        (("predicate", "software", 0, "digest"), "abc"),
        (("predicateType",), "urn:allograft:dossier:v2"),
        (("_type",), "https://in-toto.io/Statement/v2"),
    ],
)
def test_refuses_a_malformed_dossier(path: tuple, value: object) -> None:
    document = canonical.loads(Desk().dossier.to_statement())
    target = document
    for step in path[:-1]:
        target = target[step]
    target[path[-1]] = value
    with pytest.raises(RejectedError) as error:
        dossiers.read_dossier(canonical.dumps(document))
    assert error.value.code in {"AG-PRV-030", "AG-PRV-011", "AG-PRV-012"}


def test_nothing_but_the_egress_guard_calls_the_sealing_step() -> None:
    callers = set()
    for root in ("federation", "client", "server"):
        for path in (ROOT / root).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                named = isinstance(node, ast.Name | ast.Attribute | ast.alias)
                name = getattr(node, "id", getattr(node, "attr", getattr(node, "name", "")))
                if named and name == "seal_packet":
                    callers.add(path.relative_to(ROOT).as_posix())
    assert callers == {"federation/allograft/privacy/egress.py"}
