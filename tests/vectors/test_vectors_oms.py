# SPDX-License-Identifier: Apache-2.0
"""OMS v1.0: our bundles fit its schemas and its reference tool; its bad examples are refused."""

import json
import subprocess
import sys

import jsonschema
import pytest
import referencing

from allograft.crypto import dsse
from allograft.crypto.keys import SigningKey
from allograft.errors import RejectedError
from allograft.packet import container, oms
from kit.packets import Donor
from kit.shared import shared_path


@pytest.fixture
def donor(tmp_path):
    return Donor(tmp_path / "donor")


def bundle_of(donor):
    parts = donor.write_payload()
    return oms.sign_bundle([oms.Resource(p.name, p.sha256) for p in parts], donor.key)


def validate(value, name):
    folder = shared_path("vectors/oms-spec/schemas/v1.0")
    documents = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    registry = referencing.Registry().with_resources(
        (d["$id"], referencing.Resource.from_contents(d)) for d in documents
    )
    schema = json.loads((folder / f"{name}.schema.json").read_text())
    jsonschema.Draft202012Validator(schema, registry=registry).validate(value)


def test_bundle_fits_the_schemas(donor):
    bundle = bundle_of(donor)
    validate(json.loads(bundle), "bundle")
    validate(json.loads(oms.read_envelope(bundle).payload), "statement")


def test_schema_check_notices_what_is_missing(donor):
    value = json.loads(bundle_of(donor))
    del value["dsseEnvelope"]["payloadType"]
    with pytest.raises(jsonschema.ValidationError):
        validate(value, "bundle")


def run_model_signing(payload, bundle, key):
    command = [sys.executable, "-W", "ignore", "-m", "model_signing", "verify", "key", str(payload),
               "--signature", str(bundle), "--public_key", str(key)]  # fmt: skip
    return subprocess.run(command, capture_output=True, timeout=120, check=False)


def test_the_reference_tool_accepts_our_bundle_and_notices_a_changed_payload(tmp_path, donor):
    pytest.importorskip("model_signing")
    (tmp_path / "bundle").write_bytes(bundle_of(donor))
    (tmp_path / "key.pem").write_text(donor.key.public.pem)
    good = run_model_signing(donor.payload, tmp_path / "bundle", tmp_path / "key.pem")
    assert good.returncode == 0, good.stderr
    path = donor.payload / "organ.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    bad = run_model_signing(donor.payload, tmp_path / "bundle", tmp_path / "key.pem")
    assert bad.returncode != 0


def test_our_bundle_verifies_and_lists_the_payload(donor):
    bundle = bundle_of(donor)
    resources = oms.verify_bundle(bundle, [donor.key.public])
    parts = container.list_payload(donor.payload, "organ")
    assert resources == tuple(oms.Resource(p.name, p.sha256) for p in parts)
    with pytest.raises(RejectedError) as caught:
        oms.verify_bundle(bundle, [SigningKey.generate().public])
    assert caught.value.code == "AG-SIG-003"


@pytest.mark.parametrize(
    "name", ["invalid/empty", "invalid/missing-envelope", "invalid/missing-verification-material"]
)
def test_invalid_examples_are_refused(name):
    path = shared_path(f"vectors/oms-spec/test-vectors/v1.0/{name}.bundle.json")
    with pytest.raises(RejectedError) as caught:
        oms.read_envelope(path.read_bytes())
    assert caught.value.code == "AG-PKT-007"


def _set(*path):
    *where, last, new = path

    def change(value):
        for step in where:
            value = value[step]
        value[last] = new

    return change


CHANGES = {
    "wrong predicate": _set("predicateType", "https://example.org/other"),
    "hash named as blake3": _set("predicate", "resources", 0, "algorithm", "blake3"),
    "shards": _set("predicate", "serialization", "method", "shards"),
    "symlinks followed": _set("predicate", "serialization", "allow_symlinks", True),
    "files ignored": _set("predicate", "serialization", "ignore_paths", ["x"]),
    "no files": _set("predicate", "resources", []),
    "a digest changed": _set("predicate", "resources", 0, "digest", "0" * 64),
    "a root digest changed": _set("subject", 0, "digest", "sha256", "0" * 64),
    "another subject": _set("subject", 0, "name", "other"),
    "a file twice": lambda v: v["predicate"]["resources"].append(v["predicate"]["resources"][0]),
    "an extra field": _set("predicate", "note", "x"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_signed_but_wrong_statements_are_refused(donor, name):
    value = json.loads(bundle_of(donor))
    statement = json.loads(oms.read_envelope(json.dumps(value).encode()).payload)
    CHANGES[name](statement)
    envelope = dsse.sign(json.dumps(statement).encode(), dsse.IN_TOTO, [donor.key])
    value["dsseEnvelope"] = envelope.to_json()
    with pytest.raises(RejectedError) as caught:
        oms.verify_bundle(json.dumps(value).encode(), [donor.key.public])
    assert caught.value.code == "AG-PKT-007"
