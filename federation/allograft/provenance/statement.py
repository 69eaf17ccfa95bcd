# SPDX-License-Identifier: Apache-2.0
"""The packet statement: every fact about a packet that a recipient decides by.

Its subjects are the plain payload files. Seals, wraps, offer and dispatch are all bound to the
digest of its envelope, so none of them can be moved to another packet. Facts of a kind stay JSON
here and are given types by the kind's recipe. See protos/spec/packet.md, "Statement".
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from allograft.crypto import canonical
from allograft.crypto.keys import SigningKey
from allograft.errors import RejectedError
from allograft.packet.container import PlainPart
from allograft.packet.kinds import find_kind
from allograft.packet.tensors import PACKET_DTYPES
from allograft.provenance.intoto import Statement, Subject, sign_statement

PACKET_TYPE = "urn:allograft:packet:v1"

_SKETCH_TENSORS = 32
_SKETCH_VALUES = 1024
_CURVE_POINTS = 64
_PARENTS = 64


@dataclass(frozen=True, slots=True)
class Architecture:
    """What two models must share before their weights can be compared at all."""

    family: str
    hidden: int
    layers: int
    vocab: int


@dataclass(frozen=True, slots=True)
class SketchedTensor:
    """A random projection of one base tensor, see `lineage`."""

    name: str
    shape: tuple[int, ...]
    values: bytes  # float32, little-endian


@dataclass(frozen=True, slots=True)
class BaseModel:
    """The model that a packet was made on.

    Attributes:
        weights_digest: SHA-256 (hex) over all tensors, whatever their files.
        config_digest: SHA-256 (hex) of the configuration's architecture fields.
        tokenizer_digest: SHA-256 (hex) of what the tokenizer does.
        sketch: For the recipient's own lineage test; travels sealed only.
    """

    weights_digest: str
    architecture: Architecture
    config_digest: str
    tokenizer_digest: str
    sketch: tuple[SketchedTensor, ...] = ()


@dataclass(frozen=True, slots=True)
class DosePoint:
    """What the donor measured at one dose, as differences in held-out loss.

    Attributes:
        gain: Loss without minus loss with, on the packet's domain; positive is better.
        retention_change: The same difference on general text.
    """

    dose: float
    gain: float
    retention_change: float


@dataclass(frozen=True, slots=True)
class Dose:
    """How strongly a packet should act."""

    default: float
    curve: tuple[DosePoint, ...] = ()


@dataclass(frozen=True, slots=True)
class Licence:
    """What a recipient may do beyond attaching; each of these outlives a withdrawal."""

    merge: bool = False
    distil: bool = False
    redonate: bool = False


@dataclass(frozen=True, slots=True)
class Parent:
    """A packet that was in the model another one was trained on.

    Attributes:
        statement_sha256: SHA-256 (hex) of its statement's envelope, which names its content, terms
            and donor beyond doubt.
    """

    packet_id: str
    statement_sha256: str


@dataclass(frozen=True, slots=True)
class PacketStatement:
    """Everything a donor says about a packet.

    Attributes:
        recipe: Name and version of the program that made it, for people.
        not_after: Last moment at which it may be dispatched or opened.
        parts: The payload files in the order of their names.
        facts: Facts of the kind; the recipe gives them types and bounds.
        wire_dtype: The one element type of the payload.
        parents: Packets that were in the model this one was trained on.
        domain: What it is about, in a few words.
        retention_until: Last moment at which a recipient may keep it attached.
        norms: Frobenius norm of each payload file's tensors together, by file name.
    """

    packet_id: str
    donor: str
    kind: str
    recipe: str
    created: datetime
    not_after: datetime
    base: BaseModel
    parts: tuple[PlainPart, ...]
    facts: Mapping[str, canonical.Json]
    dose: Dose
    wire_dtype: str
    domain: str
    language: str
    licence: Licence
    purpose: str
    retention_until: datetime
    norms: Mapping[str, float]
    parents: tuple[Parent, ...] = ()

    @property
    def subjects(self) -> tuple[Subject, ...]:
        """The payload files as subjects; every attestation of the packet has exactly these."""
        return tuple(Subject(part.name, part.sha256) for part in self.parts)

    @property
    def payload_bytes(self) -> int:
        """Size of the plain payload."""
        return sum(part.size_bytes for part in self.parts)


def sign_packet_statement(packet: PacketStatement, key: SigningKey) -> bytes:
    """Sign a packet statement; its envelope as canonical JSON.

    Raises:
        RejectedError: AG-PRO-001 if it says what no reader would accept.
    """
    statement = Statement(packet.subjects, PACKET_TYPE, _write(packet))
    read_packet_statement(statement)
    return sign_statement(statement, [key])


def read_packet_statement(statement: Statement) -> PacketStatement:
    """Read a packet statement whose signature was verified.

    Raises:
        RejectedError: AG-PRO-001 if malformed, AG-PRO-002 if its subjects are not its parts,
            AG-PKT-001 for an unknown kind.
    """
    try:
        packet = _read(statement.predicate)
    except RejectedError as error:
        if error.code == "AG-PKT-001":
            raise
        raise RejectedError("AG-PRO-001", f"packet statement: {error.cause}") from error
    if statement.subjects != packet.subjects:
        raise RejectedError("AG-PRO-002", "the subjects of the packet statement are not its parts")
    return packet


def _write(packet: PacketStatement) -> dict[str, canonical.Json]:
    return {
        "packet_id": packet.packet_id,
        "donor": packet.donor,
        "kind": packet.kind,
        "recipe": packet.recipe,
        "created": canonical.format_time(packet.created),
        "not_after": canonical.format_time(packet.not_after),
        "base": write_base(packet.base),
        "parts": [
            {"name": p.name, "bytes": p.size_bytes, "sha256": p.sha256} for p in packet.parts
        ],
        "facts": dict(packet.facts),
        "dose": {
            "default": packet.dose.default,
            "curve": [
                {"dose": p.dose, "gain": p.gain, "retention_change": p.retention_change}
                for p in packet.dose.curve
            ],
        },
        "wire_dtype": packet.wire_dtype,
        "parents": [write_parent(parent) for parent in packet.parents],
        "domain": packet.domain,
        "language": packet.language,
        "licence": write_licence(packet.licence),
        "purpose": packet.purpose,
        "retention_until": canonical.format_time(packet.retention_until),
        "norms": dict(packet.norms),
    }


def write_base(base: BaseModel) -> dict[str, canonical.Json]:
    """A base model as a JSON object."""
    return {
        "weights_digest": base.weights_digest,
        "architecture": {
            "family": base.architecture.family,
            "hidden": base.architecture.hidden,
            "layers": base.architecture.layers,
            "vocab": base.architecture.vocab,
        },
        "config_digest": base.config_digest,
        "tokenizer_digest": base.tokenizer_digest,
        "sketch": [
            {
                "name": tensor.name,
                "shape": list(tensor.shape),
                "values": base64.b64encode(tensor.values).decode("ascii"),
            }
            for tensor in base.sketch
        ],
    }


def read_base(value: canonical.Json) -> BaseModel:
    """Read a base model.

    Raises:
        RejectedError: AG-IN-003 if malformed.
    """
    fields = canonical.as_object(
        value, {"weights_digest", "architecture", "config_digest", "tokenizer_digest", "sketch"}
    )
    architecture = canonical.as_object(
        fields["architecture"], {"family", "hidden", "layers", "vocab"}
    )
    return BaseModel(
        weights_digest=canonical.as_sha256(fields["weights_digest"]),
        architecture=Architecture(
            family=canonical.as_line(architecture["family"]),
            hidden=canonical.as_int(architecture["hidden"]),
            layers=canonical.as_int(architecture["layers"]),
            vocab=canonical.as_int(architecture["vocab"]),
        ),
        config_digest=canonical.as_sha256(fields["config_digest"]),
        tokenizer_digest=canonical.as_sha256(fields["tokenizer_digest"]),
        sketch=tuple(_read_sketch(e) for e in _bounded(fields["sketch"], _SKETCH_TENSORS)),
    )


def write_parent(parent: Parent) -> dict[str, canonical.Json]:
    """A parent as a JSON object."""
    return {"packet_id": parent.packet_id, "statement_sha256": parent.statement_sha256}


def read_parent(value: canonical.Json) -> Parent:
    """Read a parent.

    Raises:
        RejectedError: AG-IN-003 if malformed.
    """
    fields = canonical.as_object(value, {"packet_id", "statement_sha256"})
    return Parent(
        canonical.as_random_id(fields["packet_id"]),
        canonical.as_sha256(fields["statement_sha256"]),
    )


def write_licence(licence: Licence) -> dict[str, canonical.Json]:
    """A licence as a JSON object."""
    return {"merge": licence.merge, "distil": licence.distil, "redonate": licence.redonate}


def _read(predicate: Mapping[str, canonical.Json]) -> PacketStatement:
    fields = canonical.as_object(
        dict(predicate),
        {
            "packet_id", "donor", "kind", "recipe", "created", "not_after", "base", "parts",
            "facts", "dose", "wire_dtype", "parents", "domain", "language", "licence", "purpose",
            "retention_until", "norms",
        },
    )  # fmt: skip
    kind = find_kind(canonical.as_text(fields["kind"]))
    parts = tuple(_read_part(entry) for entry in canonical.as_list(fields["parts"]))
    # Payload names become file names at the recipient, so only the kind's own are accepted.
    if [part.name for part in parts] != sorted(kind.parts):
        raise RejectedError("AG-PRO-001", f"the parts are not those of a {kind.name}")
    norms = {
        name: canonical.as_number(norm)
        for name, norm in canonical.as_mapping(fields["norms"]).items()
    }
    wire_dtype = canonical.as_text(fields["wire_dtype"])
    if norms.keys() != set(kind.parts) or wire_dtype not in PACKET_DTYPES:
        raise RejectedError("AG-PRO-001", "the norms or the dtype are not those of the parts")
    parents = _bounded(fields["parents"], _PARENTS)
    return PacketStatement(
        packet_id=canonical.as_random_id(fields["packet_id"]),
        donor=canonical.as_site(fields["donor"]),
        kind=kind.name,
        recipe=canonical.as_line(fields["recipe"]),
        created=canonical.parse_time(canonical.as_text(fields["created"])),
        not_after=canonical.parse_time(canonical.as_text(fields["not_after"])),
        base=read_base(fields["base"]),
        parts=parts,
        facts=canonical.as_mapping(fields["facts"]),
        dose=_read_dose(fields["dose"]),
        wire_dtype=wire_dtype,
        domain=canonical.as_line(fields["domain"]),
        language=canonical.as_line(fields["language"]),
        licence=read_licence(fields["licence"]),
        purpose=canonical.as_line(fields["purpose"]),
        retention_until=canonical.parse_time(canonical.as_text(fields["retention_until"])),
        norms=norms,
        parents=tuple(read_parent(parent) for parent in parents),
    )


def _read_part(value: canonical.Json) -> PlainPart:
    fields = canonical.as_object(value, {"name", "bytes", "sha256"})
    return PlainPart(
        canonical.as_text(fields["name"]),
        canonical.as_int(fields["bytes"]),
        canonical.as_sha256(fields["sha256"]),
    )


def _read_sketch(value: canonical.Json) -> SketchedTensor:
    fields = canonical.as_object(value, {"name", "shape", "values"})
    shape = tuple(canonical.as_int(size) for size in _bounded(fields["shape"], 8))
    try:
        values = base64.b64decode(canonical.as_text(fields["values"]), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RejectedError("AG-PRO-001", "a sketch is not base64") from error
    if not values or len(values) % 4 or len(values) > 4 * _SKETCH_VALUES:
        raise RejectedError("AG-PRO-001", f"a sketch of {len(values)} bytes")
    return SketchedTensor(canonical.as_line(fields["name"]), shape, values)


def _read_dose(value: canonical.Json) -> Dose:
    fields = canonical.as_object(value, {"default", "curve"})
    curve = []
    for entry in _bounded(fields["curve"], _CURVE_POINTS):
        point = canonical.as_object(entry, {"dose", "gain", "retention_change"})
        curve.append(
            DosePoint(
                _read_fraction(point["dose"]),
                canonical.as_number(point["gain"]),
                canonical.as_number(point["retention_change"]),
            )
        )
    return Dose(_read_fraction(fields["default"]), tuple(curve))


def _read_fraction(value: canonical.Json) -> float:
    number = canonical.as_number(value)
    if not 0 <= number <= 1:
        raise RejectedError("AG-PRO-001", "a dose is not between 0 and 1")
    return number


def read_licence(value: canonical.Json) -> Licence:
    """Read a licence.

    Raises:
        RejectedError: AG-IN-003 if malformed.
    """
    fields = canonical.as_object(value, {"merge", "distil", "redonate"})
    return Licence(
        merge=canonical.as_bool(fields["merge"]),
        distil=canonical.as_bool(fields["distil"]),
        redonate=canonical.as_bool(fields["redonate"]),
    )


def _bounded(value: canonical.Json, most: int) -> list[canonical.Json]:
    entries = canonical.as_list(value)
    if len(entries) > most:
        raise RejectedError("AG-PRO-001", f"a list of {len(entries)} entries, at most {most}")
    return entries
