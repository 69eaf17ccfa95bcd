# SPDX-License-Identifier: Apache-2.0
"""A donor that builds and seals small packets, and can be told to break one rule."""

import hashlib
import secrets
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

from allograft.crypto import canonical
from allograft.crypto.keys import SealingKey, SigningKey
from allograft.errors import RejectedError
from allograft.log.event import Event
from allograft.packet import container, oms, tensors
from allograft.packet.header import HEADER_NAME
from allograft.provenance import dispatch, intoto, statement, training, verify

NOW = datetime(2026, 11, 23, 8, 0, 0, tzinfo=UTC)
DONOR, RECIPIENT, AUDITOR, STRANGER = "hospital-a", "hospital-b", "auditor", "bank-c"


@dataclass
class Keyring:
    """A roster reduced to signing keys by name."""

    keys: dict

    def signing_keys(self, name, role, now):
        if name not in self.keys or role != "site":
            raise RejectedError("AG-SIG-003", f"{name} is not enrolled")
        return (self.keys[name],)


@dataclass
class Donor:
    """Builds packets under `root`; fields may be replaced before `build` and `seal`."""

    root: Path
    kind: str = "organ"
    packet_id: str = field(default_factory=lambda: secrets.token_hex(16))
    dispatch_id: str = field(default_factory=lambda: secrets.token_hex(16))
    now: datetime = NOW

    def __post_init__(self):
        self.key = SigningKey.generate()
        self.sealing = {name: SealingKey.generate() for name in (RECIPIENT, AUDITOR, STRANGER)}
        self.roster = Keyring({DONOR: self.key.public})
        self.payload = self.root / "payload"
        self.payload.mkdir(parents=True)
        self.out = self.root / "dispatch"
        self.out.mkdir()
        self.audience = (RECIPIENT,)
        self.auditors = (AUDITOR,)

    def write_payload(self, values=None):
        """Write the kind's files and return them as parts."""
        values = values if values is not None else {"blocks.0.w": np.ones((4, 8), np.float32)}
        raw = {n: tensors.RawTensor("F32", v.shape, v.tobytes()) for n, v in values.items()}
        name = {"organ": "organ.safetensors", "lora": "adapter_model.safetensors"}[self.kind]
        with (self.payload / name).open("wb") as sink:
            tensors.write_tensors(sink, raw)
        return container.list_payload(self.payload, self.kind)

    def statement(self, parts, **changes):
        """A complete packet statement."""
        facts = {"rank": 4, "alpha": 8.0, "target_modules": ["q_proj", "v_proj"]}
        packet = statement.PacketStatement(
            packet_id=self.packet_id,
            donor=DONOR,
            kind=self.kind,
            recipe="organ 1",
            created=self.now - timedelta(hours=1),
            not_after=self.now + timedelta(days=7),
            base=statement.BaseModel(
                weights_digest="a" * 64,
                architecture=statement.Architecture("llama", 64, 3, 512),
                config_digest="b" * 64,
                tokenizer_digest="c" * 64,
                sketch=(statement.SketchedTensor("w", (8, 8), b"\0\0\x80?" * 64),),
            ),
            parts=parts,
            facts=facts,
            dose=statement.Dose(0.5, (statement.DosePoint(0.5, 0.3, -0.01),)),
            wire_dtype="F32",
            domain="discharge letters",
            language="de",
            licence=statement.Licence(),
            purpose="care",
            retention_until=self.now + timedelta(days=365),
            norms={part.name: 1.0 for part in parts},
        )
        return replace(packet, **changes)

    def attest(self, packet, key=None):
        """All attestations of a packet, as a list of lines that a test may change."""
        key = key or self.key
        subjects = packet.subjects
        run = training.TrainingRun(
            packet_id=packet.packet_id,
            donor=packet.donor,
            parameters={"steps": 10},
            base_digest=packet.base.weights_digest,
            data_commitment=training.commit_data("d" * 64, b"s" * 16),
            started=self.now - timedelta(hours=3),
            finished=self.now - timedelta(hours=2),
        )
        evaluation = training.Evaluation("PASSED", ("base against base with packet",), ("gain",))
        dossier = intoto.Statement(
            subjects, verify.DOSSIER_TYPE, {"packet_id": packet.packet_id, "mode": "open"}
        )
        approval = intoto.Statement(
            subjects, verify.APPROVAL_TYPE, {"packet_id": packet.packet_id, "role": "privacy"}
        )
        return [
            oms.sign_bundle([oms.Resource(p.name, p.sha256) for p in packet.parts], key),
            statement.sign_packet_statement(packet, key),
            training.sign_training(run, subjects, key),
            training.sign_evaluation(evaluation, subjects, key),
            intoto.sign_statement(dossier, [key]),
            intoto.sign_statement(approval, [key]),
        ]

    def seal(self, packet, lines, **changes):
        """Seal and sign a dispatch of attested parts; returns the dispatch envelope."""
        plan = container.SealPlan(
            packet_id=packet.packet_id,
            dispatch_id=self.dispatch_id,
            donor=DONOR,
            kind=self.kind,
            not_after=self.now + timedelta(days=1),
            statement_digest=hashlib.sha256(lines[1]).hexdigest(),
            parts=packet.parts,
            recipients=tuple(self.recipient(name) for name in self.audience),
            auditors=tuple(self.recipient(name) for name in self.auditors),
        )
        header = container.seal_packet(
            self.payload, container.join_attestations(lines), replace(plan, **changes), self.out
        )
        content = (self.out / HEADER_NAME).read_bytes()
        envelope = dispatch.sign_dispatch(header, content, self.kind, self.now, self.key)
        (self.out / dispatch.DISPATCH_NAME).write_bytes(envelope)
        return envelope

    def recipient(self, name):
        return container.Recipient(name, self.sealing[name].public)

    def opener(self, name=RECIPIENT):
        return container.Opener(name, self.sealing[name])

    def make(self):
        """A whole valid dispatch on disk; returns its statement."""
        packet = self.statement(self.write_payload())
        self.seal(packet, self.attest(packet))
        return packet

    def verify_dispatch(self, me=RECIPIENT, now=None, **options):
        """The recipient's first step on what lies on disk."""
        envelope = (self.out / dispatch.DISPATCH_NAME).read_bytes()
        content = (self.out / HEADER_NAME).read_bytes()
        return verify.verify_dispatch(
            envelope, content, self.roster, me, now or self.now, **options
        )

    def event(self, verified, **changes):
        """The log event that fits a verified dispatch."""
        d = verified.dispatch
        event = Event(
            "dispatch", d.donor, d.packet_id, d.dispatch_id, "", self.now, dispatch.DISPATCH_NAME,
            verified.envelope_sha256,
        )  # fmt: skip
        return replace(event, **changes)

    def verify_manifest(self, verified, now=None, me=RECIPIENT):
        """The recipient's second step."""
        opened = container.open_manifest(self.out, verified.header, self.opener(me))
        return verify.verify_manifest(opened, verified, self.roster, now or self.now)

    def receive(self, target: Path):
        """Every step of the recipient."""
        verified = self.verify_dispatch()
        verify.check_logged(verified, self.event(verified))
        container.check_sealed_files(self.out, verified.header)
        packet = self.verify_manifest(verified).statement
        return container.open_payload(
            self.out, verified.header, packet.kind, packet.parts, self.opener(), target
        )


def edit_json(path: Path, change):
    """Change a JSON file in place through a function of its value."""
    value = canonical.loads(path.read_bytes())
    change(value)
    path.write_bytes(canonical.dumps(value))


def code_of(error) -> str:
    """The code of a caught refusal."""
    return error.value.code
