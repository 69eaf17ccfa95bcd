# SPDX-License-Identifier: Apache-2.0
"""How a packet came to be (SLSA provenance v1) and what its donor measured (in-toto test result).

Both use predicates that existing tools parse. Data sets are named by nothing but a salted
commitment, so that a donor can later show which data it used and nobody can guess it before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from allograft.crypto import canonical
from allograft.crypto.keys import SigningKey
from allograft.errors import RejectedError
from allograft.provenance.intoto import Statement, Subject, sign_statement
from allograft.provenance.statement import Parent

PROVENANCE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:allograft:training:v1"
TEST_RESULT_TYPE = "https://in-toto.io/attestation/test-result/v0.1"

_BUILDER = "urn:allograft:site:"
_BASE = "urn:allograft:weights"
_DATA = "urn:allograft:data-commitment"
_PARENT = "urn:allograft:packet:"

Result = Literal["PASSED", "WARNED", "FAILED"]


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """The run that made a packet.

    Attributes:
        packet_id: The packet.
        donor: The site that ran it.
        parameters: Method and hyper-parameters, by name.
        base_digest: Weights digest of the base model.
        data_commitment: As `commit_data` made it.
        parents: Packets the run started from.
        software: Versions by program name.
    """

    packet_id: str
    donor: str
    parameters: Mapping[str, canonical.Json]
    base_digest: str
    data_commitment: str
    started: datetime
    finished: datetime
    parents: tuple[Parent, ...] = ()
    software: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What the donor's own evaluation found.

    Attributes:
        result: PASSED if the packet helped on held-out data of its domain.
        configuration: What was compared with what, by name.
        passed: Names of the tests that passed.
        failed: Names of those that did not.
        figures: Measured values by name.
    """

    result: Result
    configuration: tuple[str, ...]
    passed: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    figures: Mapping[str, float] = field(default_factory=dict)


def commit_data(data_sha256: str, salt: bytes) -> str:
    """A commitment to a data set; the salt (at least 16 random bytes) stays at the site."""
    if len(salt) < 16:
        raise ValueError("a commitment without a long salt can be guessed")
    return hashlib.sha256(salt + bytes.fromhex(data_sha256)).hexdigest()


def sign_training(run: TrainingRun, subjects: tuple[Subject, ...], key: SigningKey) -> bytes:
    """Sign the provenance of a run; its envelope as canonical JSON."""
    dependencies: list[canonical.Json] = [
        {"uri": _BASE, "digest": {"sha256": run.base_digest}},
        {"uri": _DATA, "digest": {"sha256": run.data_commitment}},
    ]
    dependencies += [
        {"uri": _PARENT + parent.packet_id, "digest": {"sha256": parent.statement_sha256}}
        for parent in run.parents
    ]
    predicate: dict[str, canonical.Json] = {
        "buildDefinition": {
            "buildType": BUILD_TYPE,
            "externalParameters": dict(run.parameters),
            "resolvedDependencies": dependencies,
        },
        "runDetails": {
            "builder": {"id": _BUILDER + run.donor, "version": dict(run.software)},
            "metadata": {
                "invocationId": run.packet_id,
                "startedOn": canonical.format_time(run.started),
                "finishedOn": canonical.format_time(run.finished),
            },
        },
    }
    statement = Statement(subjects, PROVENANCE_TYPE, predicate)
    read_training(statement)
    return sign_statement(statement, [key])


def read_training(statement: Statement) -> TrainingRun:
    """Read the provenance of a run whose signature was verified.

    Raises:
        RejectedError: AG-PRO-001 if malformed or of another build type.
    """
    try:
        return _read_training(statement)
    except RejectedError as error:
        raise RejectedError("AG-PRO-001", f"provenance: {error.cause}") from error


def sign_evaluation(
    evaluation: Evaluation, subjects: tuple[Subject, ...], key: SigningKey
) -> bytes:
    """Sign an evaluation; its envelope as canonical JSON."""
    predicate: dict[str, canonical.Json] = {
        "result": evaluation.result,
        "configuration": [{"name": name} for name in evaluation.configuration],
        "passedTests": list(evaluation.passed),
        "failedTests": list(evaluation.failed),
        "annotations": dict(evaluation.figures),
    }
    statement = Statement(subjects, TEST_RESULT_TYPE, predicate)
    read_evaluation(statement)
    return sign_statement(statement, [key])


def read_evaluation(statement: Statement) -> Evaluation:
    """Read an evaluation whose signature was verified.

    Raises:
        RejectedError: AG-PRO-001 if malformed.
    """
    try:
        fields = canonical.as_object(
            statement.predicate,
            {"result", "configuration", "passedTests", "failedTests", "annotations"},
        )
        result = canonical.as_text(fields["result"])
        if result not in {"PASSED", "WARNED", "FAILED"}:
            raise RejectedError("AG-PRO-001", "an unknown test result")
        names = [
            canonical.as_object(entry, {"name"})["name"]
            for entry in canonical.as_list(fields["configuration"])
        ]
        return Evaluation(
            result=result,  # type: ignore[arg-type]  # checked against the literals above
            configuration=_read_lines(names),
            passed=_read_lines(fields["passedTests"]),
            failed=_read_lines(fields["failedTests"]),
            figures={
                canonical.as_line(name): canonical.as_number(value)
                for name, value in canonical.as_mapping(fields["annotations"]).items()
            },
        )
    except RejectedError as error:
        raise RejectedError("AG-PRO-001", f"evaluation: {error.cause}") from error


def _read_training(statement: Statement) -> TrainingRun:
    fields = canonical.as_object(statement.predicate, {"buildDefinition", "runDetails"})
    definition = canonical.as_object(
        fields["buildDefinition"], {"buildType", "externalParameters", "resolvedDependencies"}
    )
    details = canonical.as_object(fields["runDetails"], {"builder", "metadata"})
    builder = canonical.as_object(details["builder"], {"id", "version"})
    metadata = canonical.as_object(details["metadata"], {"invocationId", "startedOn", "finishedOn"})
    if definition["buildType"] != BUILD_TYPE:
        raise RejectedError("AG-PRO-001", "provenance of another build type")
    dependencies = canonical.as_list(definition["resolvedDependencies"])
    if len(dependencies) < 2:
        raise RejectedError("AG-PRO-001", "provenance without base model or data commitment")
    base, data, *parents = dependencies
    return TrainingRun(
        packet_id=canonical.as_random_id(metadata["invocationId"]),
        donor=canonical.as_site(_after(_BUILDER, builder["id"])),
        parameters=canonical.as_mapping(definition["externalParameters"]),
        base_digest=_read_dependency(base, _BASE),
        data_commitment=_read_dependency(data, _DATA),
        started=canonical.parse_time(canonical.as_text(metadata["startedOn"])),
        finished=canonical.parse_time(canonical.as_text(metadata["finishedOn"])),
        parents=tuple(_read_parent(parent) for parent in parents),
        software={
            canonical.as_line(name): canonical.as_line(version)
            for name, version in canonical.as_mapping(builder["version"]).items()
        },
    )


def _read_dependency(value: canonical.Json, uri: str) -> str:
    fields = canonical.as_object(value, {"uri", "digest"})
    if fields["uri"] != uri:
        raise RejectedError("AG-PRO-001", f"expected a dependency {uri}")
    return canonical.as_sha256(canonical.as_object(fields["digest"], {"sha256"})["sha256"])


def _read_parent(value: canonical.Json) -> Parent:
    fields = canonical.as_object(value, {"uri", "digest"})
    digest = canonical.as_object(fields["digest"], {"sha256"})
    return Parent(
        canonical.as_random_id(_after(_PARENT, fields["uri"])),
        canonical.as_sha256(digest["sha256"]),
    )


def _after(prefix: str, value: canonical.Json) -> str:
    text = canonical.as_text(value)
    if not text.startswith(prefix):
        raise RejectedError("AG-PRO-001", f"expected a name that starts with {prefix}")
    return text.removeprefix(prefix)


def _read_lines(value: canonical.Json) -> tuple[str, ...]:
    return tuple(canonical.as_line(line) for line in canonical.as_list(value))
