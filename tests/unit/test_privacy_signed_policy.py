# SPDX-License-Identifier: Apache-2.0
"""A policy's signature, and which changes protect less."""

import pytest

from allograft.crypto import canonical, dsse
from allograft.crypto.keys import SigningKey
from allograft.errors import RejectedError
from allograft.privacy import signed_policy
from allograft.privacy.policy import (
    AuditPolicy,
    DonatePolicy,
    ReceiptPolicy,
    ReceivePolicy,
    parse_policy,
)
from allograft.privacy.signed_policy import check_signed, sign_policy, verify_policy, weaker_fields

KEY = SigningKey.generate()
KEYS = (KEY.public,)
TIME = "2026-11-27T08:00:00Z"
STRICT = b"""# decided on Friday
version = 1
[donate]
modes = ["strict"]
kinds = ["organ"]
recipients = ["riverside"]
approvals = ["data-owner", "privacy-officer"]
"""


def code_of(error: pytest.ExceptionInfo[RejectedError]) -> str:
    return error.value.code


def policy_with(section: str, line: str):
    return parse_policy(f"version = 1\n[{section}]\n{line}\n".encode())


#: Field → a value and one that protects less.
STEPS = {
    "donate.modes": ("['strict']", "['strict', 'open']"),
    "donate.kinds": ("['organ']", "['organ', 'lora']"),
    "donate.recipients": ("['riverside']", "['*']"),
    "donate.approvals": ("['data-owner', 'privacy-officer']", "['data-owner']"),
    "donate.dispatch": ("'manual'", "'automatic'"),
    "donate.max_payload_bytes": ("1000", "1001"),
    "donate.wire_dtype": ("'bf16'", "'f32'"),
    "receive.donors": ("['riverside']", "['riverside', 'hillcrest']"),
    "receive.kinds": ("[]", "['organ']"),
    "receive.modes": ("['strict']", "['strict', 'measured']"),
    "receive.automatic_trial": ("false", "true"),
    "receive.automatic_keep": ("false", "true"),
    "receive.min_gain": ("0.1", "0.0"),
    "receive.max_retention_loss": ("0.02", "0.03"),
    "receive.licence": ("['merge']", "[]"),
    "receipt.share_figures": ("false", "true"),
    "audit.min_population_dp": ("500", "499"),
    "audit.min_population": ("2000", "1999"),
    "audit.donation_epsilon": ("3.0", "3.5"),
    "audit.domain_epsilon": ("8.0", "9.0"),
    "donate.redonate_epsilon": ("1.0", "2.0"),
    "receive.purposes": ('["research"]', '["research", "care"]'),
    "receive.parents": ('"refuse"', '"accept"'),
    "audit.max_delta": ("1e-6", "1e-5"),
    "audit.canaries": ("1000", "200"),
    "audit.measured_approvals": ("3", "2"),
    "audit.identifier_list": ("['measured']", "[]"),
}


def test_every_field_of_every_section_has_a_direction() -> None:
    sections = {
        "donate": DonatePolicy, "receive": ReceivePolicy, "receipt": ReceiptPolicy,
        "audit": AuditPolicy,
    }  # fmt: skip
    fields = {f"{name}.{f}" for name, section in sections.items() for f in section.model_fields}
    assert fields == signed_policy._WEAKER.keys()
    # There is one version so far, so no policy can step to another.
    assert STEPS.keys() == fields - {"audit.thresholds_version"}


@pytest.mark.parametrize("field", sorted(STEPS))
def test_one_direction_is_weaker_and_the_other_is_not(field: str) -> None:
    section, name = field.split(".")
    strong, weak = (policy_with(section, f"{name} = {value}") for value in STEPS[field])
    assert weaker_fields(strong, weak) == (field,)
    assert weaker_fields(weak, strong) == ()
    assert weaker_fields(strong, strong) == ()


def test_a_field_that_nobody_gave_a_direction_is_weaker_when_it_changes(monkeypatch) -> None:
    monkeypatch.setattr(signed_policy, "_WEAKER", {})
    old, new = (policy_with("receive", f"min_gain = {gain}") for gain in (0.0, 0.1))
    assert weaker_fields(old, new) == ("receive.min_gain",)


def test_another_role_in_place_of_one_is_weaker() -> None:
    old, new = (policy_with("donate", f"approvals = ['{role}']") for role in ("a-role", "b-role"))
    assert weaker_fields(old, new) == ("donate.approvals",)


def test_leaving_a_section_out_is_compared_by_its_defaults() -> None:
    old, new = policy_with("audit", "min_population = 5000"), parse_policy(b"version = 1")
    assert weaker_fields(old, new) == ("audit.min_population",)


def test_what_is_signed_comes_back_whole() -> None:
    signed = verify_policy(sign_policy(STRICT, "privacy-officer", TIME, KEY, None), KEYS)
    assert signed.policy == parse_policy(STRICT)
    assert (signed.role, signed.time, signed.weaker) == ("privacy-officer", TIME, ())


def test_a_weaker_policy_says_so_in_its_signature() -> None:
    before = verify_policy(sign_policy(STRICT, "privacy-officer", TIME, KEY, None), KEYS)
    wider = STRICT.replace(b'["riverside"]', b'["*"]')
    signed = verify_policy(sign_policy(wider, "privacy-officer", TIME, KEY, before), KEYS)
    assert signed.weaker == ("donate.recipients",)


@pytest.mark.parametrize("mode", ["strict", "measured"])
def test_audited_modes_need_the_very_bytes_that_were_signed(mode: str) -> None:
    envelope = sign_policy(STRICT, "privacy-officer", TIME, KEY, None)
    check_signed(mode, parse_policy(STRICT), envelope, KEYS)
    with pytest.raises(RejectedError) as error:
        check_signed(mode, parse_policy(STRICT), None, KEYS)
    assert code_of(error) == "AG-PRV-006"
    with pytest.raises(RejectedError) as error:
        check_signed(mode, parse_policy(STRICT + b"# and a comment\n"), envelope, KEYS)
    assert code_of(error) == "AG-PRV-007"
    assert "no field" in error.value.cause
    weaker = STRICT.replace(b', "privacy-officer"', b"").replace(b'["riverside"]', b'["*"]')
    with pytest.raises(RejectedError) as error:
        check_signed(mode, parse_policy(weaker), envelope, KEYS)
    assert "donate.recipients, donate.approvals" in error.value.cause


def test_open_needs_no_signature() -> None:
    check_signed("open", parse_policy(STRICT), None, KEYS)
    check_signed("open", parse_policy(STRICT), b"rubbish", KEYS)


def _envelope(**changes: object) -> bytes:
    good = dsse.Envelope.from_bytes(sign_policy(STRICT, "privacy-officer", TIME, KEY, None))
    document = canonical.loads(good.payload)
    document["predicate"] |= {k: v for k, v in changes.items() if k in document["predicate"]}
    document |= {k: v for k, v in changes.items() if k in document}
    return dsse.sign(canonical.dumps(document), dsse.IN_TOTO, [KEY]).to_bytes()


@pytest.mark.parametrize(
    "envelope",
    [
        b"", b"{}", b"\xff",
        sign_policy(STRICT, "privacy-officer", TIME, SigningKey.generate(), None),
        _envelope(policy="version = 1\n"),
        _envelope(policy="rubbish"),
        _envelope(role="Jane Doe"),
        _envelope(time="yesterday"),
        _envelope(weaker="all"),
        _envelope(predicateType="urn:allograft:approval:v1"),
        _envelope(subject=[]),
    ],
)  # fmt: skip
def test_a_signature_that_does_not_hold_is_refused(envelope: bytes) -> None:
    with pytest.raises(RejectedError) as error:
        check_signed("strict", parse_policy(STRICT), envelope, KEYS)
    assert code_of(error) == "AG-PRV-008"


@pytest.mark.parametrize(("role", "code"), [("", "AG-PRV-008"), ("Jane Doe", "AG-PRV-008"),
                                            ("patient-12345", "AG-PRV-021")])  # fmt: skip
def test_a_role_is_a_role_and_no_person(role: str, code: str) -> None:
    with pytest.raises(RejectedError) as error:
        sign_policy(STRICT, role, TIME, KEY, None)
    assert code_of(error) == code


@pytest.mark.parametrize(
    ("approvals", "recipients", "holds"),
    [
        ("['a', 'b']", "['riverside']", True),
        ("['a', 'a']", "['riverside']", False),
        ("['a']", "['riverside']", False),
        ("['a', 'b']", "['*']", False),
        ("['a', 'b']", "['riverside', '*']", False),
        ("['a', 'b']", "[]", False),
    ],
)
def test_measured_needs_two_roles_and_named_recipients(approvals, recipients, holds) -> None:
    content = (
        f"version = 1\n[donate]\nmodes = ['measured', 'open']\nkinds = ['organ']\n"
        f"approvals = {approvals}\nrecipients = {recipients}\n"
    )
    policy = parse_policy(content.encode())
    policy.check_donation("open", "organ")
    if holds:
        policy.check_donation("measured", "organ")
        return
    with pytest.raises(RejectedError) as error:
        policy.check_donation("measured", "organ")
    assert code_of(error) == "AG-PRV-009"


@pytest.mark.parametrize(
    "line",
    [
        "donation_epsilon = 0.0", "donation_epsilon = 10.5", "donation_epsilon = nan",
        "donation_epsilon = 9.0", "max_delta = 0.001", "max_delta = 0.0", "measured_approvals = 1",
        "min_population = 9", "min_population = 499", "thresholds_version = 0",
        "thresholds_version = 2", "epsilon = 1.0",
    ],
)  # fmt: skip
def test_no_policy_can_allow_what_means_nothing(line: str) -> None:
    with pytest.raises(RejectedError) as error:
        policy_with("audit", line)
    assert code_of(error) == "AG-PRV-002"


def test_the_audit_section_is_a_condition_of_the_modes_that_use_it() -> None:
    audit = b"[audit]\nmin_population = 9000\n"
    assert parse_policy(STRICT).conditions_digest != parse_policy(STRICT + audit).conditions_digest
    open_only = STRICT.replace(b'"strict"', b'"open"')
    assert (
        parse_policy(open_only).conditions_digest
        == parse_policy(open_only + audit).conditions_digest
    )
