# SPDX-License-Identifier: Apache-2.0
"""A privacy plan is read as strictly as it is promised, and claims what its constants give."""

import json
from dataclasses import replace

import pytest

from allograft.crypto import canonical, dsse
from allograft.crypto.keys import SigningKey
from allograft.errors import RejectedError
from allograft.privacy.dp import DpConstants
from allograft.privacy.modes import Mode
from allograft.privacy.plan import PrivacyPlan, read_plan, sign_plan, verify_plan

KEY = SigningKey.generate()
CONSTANTS = DpConstants(0.01, 0.8, 1000, 0.5, 10.0, 1e-6, 4)
PLAN = PrivacyPlan(
    plan_id="1" * 32,
    donor="hospital-a",
    mode=Mode.STRICT,
    domain="cardiology",
    kind="lora",
    base_digest="ab" * 32,
    constants=CONSTANTS,
    training={"method": "lora", "loop": {"learning_rate": 1e-3, "window": 4096, "warm": True}},
    purpose="evaluation and local use",
    created="2026-11-23T08:00:00Z",
)


def changed(path: str, value) -> bytes:
    document = json.loads(PLAN.to_statement())
    level = document
    *parents, last = path.split(".")
    for name in parents:
        level = level[int(name)] if isinstance(level, list) else level[name]
    level[last] = value
    return canonical.dumps(document)


def test_a_signed_plan_comes_back_as_it_was() -> None:
    assert verify_plan(sign_plan(PLAN, KEY), [KEY.public], "hospital-a") == PLAN
    measured = replace(PLAN, mode=Mode.MEASURED, constants=None)
    assert verify_plan(sign_plan(measured, KEY), [KEY.public], "hospital-a") == measured


def test_refuses_a_plan_of_another_site_or_key() -> None:
    envelope = sign_plan(PLAN, KEY)
    with pytest.raises(RejectedError, match="AG-PRV-052"):
        verify_plan(envelope, [KEY.public], "hospital-b")
    with pytest.raises(RejectedError, match="AG-SIG-003"):
        verify_plan(envelope, [SigningKey.generate().public], "hospital-a")


@pytest.mark.parametrize(
    ("path", "value", "code"),
    [
        ("_type", "https://in-toto.io/Statement/v0.1", "052"),
        ("predicateType", "urn:allograft:privacy-plan:v2", "052"),
        ("subject", [], "052"),
        ("subject.0.name", "payload", "052"),
        ("subject.0.digest", {"sha1": "0" * 40}, "052"),
        ("predicate.unit", "record", "052"),
        ("predicate.relation", "replace_one", "052"),
        ("predicate.sampler", "shuffle", "052"),
        ("predicate.mode", "open", "053"),
        ("predicate.constants", None, "053"),
        ("predicate.constants.sampling_rate", 0.9, "050"),
        ("predicate.constants.sampling_rate", 0.01234, "051"),
        ("predicate.constants.steps", 1.5, "052"),
        ("predicate.plan_id", "x", "052"),
        ("predicate.donor", "Hospital", "052"),
        ("predicate.domain", "../x", "052"),
        ("predicate.kind", "LoRA", "052"),
        ("predicate.purpose", "two\nlines", "052"),
        ("predicate.created", "today", "052"),
        ("predicate.training", [], "052"),
        ("predicate.training", {"files": ["a"]}, "052"),
        ("predicate.training", {"a": {"b": {"c": {"d": 1}}}}, "052"),
        ("predicate.training", {f"n{number}": 1 for number in range(65)}, "052"),
        ("predicate.training", {"path": "/data/patients.jsonl"}, "052"),
        ("predicate.training", {"steps_per_epoch": 1371}, "051"),
        ("predicate.training", {"rate": 0.01234}, "051"),
    ],
)
def test_refuses_a_malformed_plan(path, value, code) -> None:
    with pytest.raises(RejectedError) as refused:
        read_plan(changed(path, value))
    assert refused.value.code == f"AG-PRV-{code}"


@pytest.mark.parametrize("name", ["plan_id", "constants", "sampler", "training", "created"])
def test_refuses_a_plan_that_lacks_or_repeats_a_field(name) -> None:
    document = json.loads(PLAN.to_statement())
    del document["predicate"][name]
    with pytest.raises(RejectedError, match="AG-PRV-052"):
        read_plan(canonical.dumps(document))
    with pytest.raises(RejectedError, match="AG-PRV-052"):
        read_plan(changed(f"predicate.{name}2", 1))


def test_refuses_a_plan_over_its_size() -> None:
    with pytest.raises(RejectedError, match="AG-PRV-052"):
        read_plan(changed("predicate.purpose", "x" * (64 << 10)))


def test_does_not_sign_what_nobody_would_read() -> None:
    with pytest.raises(RejectedError, match="AG-PRV-053"):
        sign_plan(replace(PLAN, constants=None), KEY)
    with pytest.raises(RejectedError, match="AG-PRV-051"):
        sign_plan(replace(PLAN, training={"documents": 1371}), KEY)


def test_a_plan_is_not_taken_for_another_document() -> None:
    envelope = dsse.sign(PLAN.to_statement(), "application/json", [KEY])
    with pytest.raises(RejectedError, match="AG-SIG-002"):
        verify_plan(envelope, [KEY.public], "hospital-a")


def test_measured_claims_no_bound_and_plans_none() -> None:
    with pytest.raises(RejectedError, match="AG-PRV-053"):
        sign_plan(replace(PLAN, mode=Mode.MEASURED), KEY)
    assert replace(PLAN, mode=Mode.MEASURED, constants=None).epsilon() is None
