# SPDX-License-Identifier: Apache-2.0
"""Claims about packet statements, provenance, evaluations and adapter settings."""

import json
from dataclasses import replace

import pytest

from allograft.crypto import canonical, dsse
from allograft.errors import RejectedError
from allograft.packet import adapter
from allograft.provenance import intoto, statement, training
from kit.packets import DONOR, NOW, Donor


@pytest.fixture
def donor(tmp_path):
    return Donor(tmp_path / "donor")


@pytest.fixture
def packet(donor):
    return donor.statement(donor.write_payload())


def refused(call, *arguments, **options):
    with pytest.raises(RejectedError) as caught:
        call(*arguments, **options)
    return caught.value.code


def test_a_statement_survives_its_envelope(donor, packet):
    envelope = statement.sign_packet_statement(packet, donor.key)
    read = intoto.verify_statement(envelope, [donor.key.public], statement.PACKET_TYPE)
    assert statement.read_packet_statement(read) == packet
    assert packet.payload_bytes == sum(part.size_bytes for part in packet.parts)


def _set(*path):
    *where, last, new = path

    def change(value):
        for step in where:
            value = value[step]
        value[last] = new

    return change


CHANGES = {
    "unknown field": (_set("note", "x"), "AG-PRO-001"),
    "missing field": (lambda v: v.pop("licence"), "AG-PRO-001"),
    "unknown kind": (_set("kind", "painting"), "AG-PKT-001"),
    "a kind of other files": (_set("kind", "lora"), "AG-PRO-001"),
    "a permission that is text": (_set("licence", "merge", "no"), "AG-PRO-001"),
    "a permission too many": (_set("licence", "sell", True), "AG-PRO-001"),
    "a dose of two": (_set("dose", "default", 2), "AG-PRO-001"),
    "a negative dose in the curve": (_set("dose", "curve", 0, "dose", -1), "AG-PRO-001"),
    "a domain of two lines": (_set("domain", "a\nb"), "AG-PRO-001"),
    "a domain that turns text around": (_set("domain", "\u202eabc"), "AG-PRO-001"),
    "a long purpose": (_set("purpose", "x" * 513), "AG-PRO-001"),
    "norms of other files": (_set("norms", {"x": 1}), "AG-PRO-001"),
    "an integer dtype": (_set("wire_dtype", "I8"), "AG-PRO-001"),
    "a dtype that is a list": (_set("wire_dtype", []), "AG-PRO-001"),
    "a dtype that is an object": (_set("wire_dtype", {}), "AG-PRO-001"),
    "a parent that is no id": (_set("parents", ["x"]), "AG-PRO-001"),
    "a thousand parents": (_set("parents", ["0" * 32] * 1000), "AG-PRO-001"),
    "a sketch that is not base64": (_set("base", "sketch", 0, "values", "*"), "AG-PRO-001"),
    "a sketch of three bytes": (_set("base", "sketch", 0, "values", "AAAA"), "AG-PRO-001"),
    "a digest in capitals": (_set("base", "weights_digest", "A" * 64), "AG-PRO-001"),
    "hidden size of true": (_set("base", "architecture", "hidden", True), "AG-PRO-001"),
    "facts that are a list": (_set("facts", []), "AG-PRO-001"),
    "a time with a fraction": (_set("created", "2026-11-23T08:00:00.5Z"), "AG-PRO-001"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_refuses_malformed_statements(donor, packet, name):
    change, code = CHANGES[name]
    envelope = dsse.Envelope.from_bytes(statement.sign_packet_statement(packet, donor.key))
    predicate = canonical.loads(envelope.payload)["predicate"]
    change(predicate)
    claim = intoto.Statement(packet.subjects, statement.PACKET_TYPE, predicate)
    assert refused(statement.read_packet_statement, claim) == code


def test_refuses_subjects_that_are_not_the_parts(donor, packet):
    predicate = canonical.loads(
        dsse.Envelope.from_bytes(statement.sign_packet_statement(packet, donor.key)).payload
    )["predicate"]
    other = (intoto.Subject(packet.parts[0].name, "0" * 64),)
    claim = intoto.Statement(other, statement.PACKET_TYPE, predicate)
    assert refused(statement.read_packet_statement, claim) == "AG-PRO-002"


def test_never_signs_what_no_reader_accepts(donor, packet):
    for change in ({"domain": "a\nb"}, {"donor": "No One"}, {"dose": statement.Dose(3.0)}):
        broken = replace(packet, **change)
        assert refused(statement.sign_packet_statement, broken, donor.key) == "AG-PRO-001"


@pytest.mark.parametrize(
    "payload",
    [b"", b"[]", b'{"_type":"x","subject":[],"predicateType":"","predicate":{}}',
     b'{"_type":"https://in-toto.io/Statement/v1","subject":[],"predicateType":"","predicate":{}}'],
)  # fmt: skip
def test_refuses_what_is_no_statement(payload):
    assert refused(intoto.Statement.from_bytes, payload) == "AG-PRO-001"


def run_of(packet, **changes):
    run = training.TrainingRun(
        packet_id=packet.packet_id,
        donor=DONOR,
        parameters={"steps": 10, "learning_rate": 1e-3},
        base_digest="a" * 64,
        data_commitment=training.commit_data("d" * 64, b"s" * 16),
        started=NOW,
        finished=NOW,
        parents=(statement.Parent("1" * 32, "2" * 64),),
        software={"allograft": "0.1.0"},
    )
    return replace(run, **changes)


def test_provenance_survives_its_envelope_and_other_tools_read_it(donor, packet):
    envelope = training.sign_training(run_of(packet), packet.subjects, donor.key)
    claim = intoto.verify_statement(envelope, [donor.key.public], training.PROVENANCE_TYPE)
    assert training.read_training(claim) == run_of(packet)
    provenance = pytest.importorskip("in_toto_attestation.predicates.provenance.v1.provenance_pb2")
    json_format = pytest.importorskip("google.protobuf.json_format")
    predicate = json.loads(json.dumps(claim.predicate))
    predicate["runDetails"]["metadata"] = {
        "invocationId": packet.packet_id,
        "startedOn": claim.predicate["runDetails"]["metadata"]["startedOn"],
        "finishedOn": claim.predicate["runDetails"]["metadata"]["finishedOn"],
    }
    read = json_format.ParseDict(predicate, provenance.Provenance())
    assert read.build_definition.build_type == training.BUILD_TYPE
    assert read.run_details.builder.id.endswith(DONOR)


def test_evaluation_survives_its_envelope(donor, packet):
    evaluation = training.Evaluation("WARNED", ("a",), ("b",), ("c",), {"gain": 0.25})
    envelope = training.sign_evaluation(evaluation, packet.subjects, donor.key)
    claim = intoto.verify_statement(envelope, [donor.key.public], training.TEST_RESULT_TYPE)
    assert training.read_evaluation(claim) == evaluation


@pytest.mark.parametrize(
    "change",
    [
        _set("buildDefinition", "buildType", "https://example.org"),
        _set("buildDefinition", "resolvedDependencies", []),
        _set("buildDefinition", "resolvedDependencies", 0, "uri", "urn:x"),
        _set("buildDefinition", "resolvedDependencies", 2, "uri", "urn:x"),
        _set("runDetails", "builder", "id", "urn:someone"),
        _set("runDetails", "metadata", "startedOn", "yesterday"),
        _set("runDetails", "builder", "version", {"a": "b\nc"}),
    ],
)
def test_refuses_malformed_provenance(donor, packet, change):
    envelope = training.sign_training(run_of(packet), packet.subjects, donor.key)
    payload = canonical.loads(dsse.Envelope.from_bytes(envelope).payload)
    change(payload["predicate"])
    claim = intoto.Statement.from_bytes(canonical.dumps(payload))
    assert refused(training.read_training, claim) == "AG-PRO-001"


@pytest.mark.parametrize(
    "change",
    [_set("result", "GREAT"), _set("configuration", ["x"]), _set("annotations", {"a": "x"}),
     _set("passedTests", "gain"), _set("url", "https://example.org")],
)  # fmt: skip
def test_refuses_malformed_evaluations(donor, packet, change):
    envelope = training.sign_evaluation(
        training.Evaluation("PASSED", ("a",)), packet.subjects, donor.key
    )
    payload = canonical.loads(dsse.Envelope.from_bytes(envelope).payload)
    change(payload["predicate"])
    claim = intoto.Statement.from_bytes(canonical.dumps(payload))
    assert refused(training.read_evaluation, claim) == "AG-PRO-001"


def test_a_commitment_needs_a_long_salt():
    assert training.commit_data("a" * 64, b"s" * 16) != training.commit_data("a" * 64, b"t" * 16)
    with pytest.raises(ValueError, match="salt"):
        training.commit_data("a" * 64, b"short")


GOOD = {"rank": 8, "alpha": 16.0, "target_modules": ["q_proj", "v_proj"], "shape": {}}


def test_adapter_settings_ignore_other_facts():
    found = adapter.read_adapter_settings(GOOD)
    assert found == adapter.AdapterSettings(8, 16.0, ("q_proj", "v_proj"))


@pytest.mark.parametrize(
    "change",
    [
        {"rank": 0}, {"rank": 513}, {"rank": True}, {"rank": "8"}, {"alpha": 0}, {"alpha": 1e9},
        {"alpha": None}, {"target_modules": []}, {"target_modules": "all-linear"},
        {"target_modules": [".*"]}, {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens"]}, {"target_modules": ["q_proj", "q_proj"]},
        {"target_modules": ["a/b"]}, {"target_modules": [f"m{n}" for n in range(65)]},
    ],
)  # fmt: skip
def test_refuses_adapter_settings_out_of_bounds(change):
    assert refused(adapter.read_adapter_settings, {**GOOD, **change}) == "AG-PKT-009"


def test_the_rebuilt_configuration_has_no_room_for_code():
    config = json.loads(adapter.render_adapter_config(adapter.read_adapter_settings(GOOD)))
    assert config["modules_to_save"] is None
    assert config["auto_mapping"] is None
    assert config["base_model_name_or_path"] is None
    assert (config["bias"], config["fan_in_fan_out"]) == ("none", False)
    turned = adapter.render_adapter_config(
        adapter.read_adapter_settings(GOOD), "base", transposed=adapter.is_transposed("gpt2")
    )
    assert json.loads(turned)["fan_in_fan_out"] is True
