# SPDX-License-Identifier: Apache-2.0
"""A donation, from a plan to signed evidence that waits for approval.

Train (worker) → rebuild the payload from an allow-list → evaluate the rebuilt bytes (worker) →
statements → gates → dossier. Each step leaves its result as a file in the packet's directory, so
a killed daemon goes on where it was. Nothing here talks to anyone; see `dispatcher` for what
leaves.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from allograft.crypto import canonical, dsse
from allograft.durable import durable_write
from allograft.errors import UnavailableError
from allograft.packet import container, oms
from allograft.packet.kinds import find_kind
from allograft.packet.tensors import check_file
from allograft.privacy.dossier import Dossier, PayloadPart, Software, warnings_of
from allograft.privacy.egress import WIRE_DTYPES, rebuild_file, with_wire_dtype
from allograft.privacy.gates import Submission, check_results, run_gates
from allograft.privacy.policy import Policy
from allograft.privacy.scan import Matcher, check_envelope
from allograft.privacy.shapes import allow_list, read_base
from allograft.provenance.ancestry import Ancestor
from allograft.provenance.intoto import Statement
from allograft.provenance.statement import (
    Dose,
    DosePoint,
    Licence,
    PacketStatement,
    Parent,
    read_packet_statement,
    sign_packet_statement,
    write_base,
)
from allograft.provenance.training import (
    Evaluation,
    TrainingRun,
    commit_data,
    sign_evaluation,
    sign_training,
)
from allograft.provenance.verify import check_attestations
from allograft_client.fixed_data import FixedData
from allograft_client.plan import DonationPlan
from allograft_client.protected import (
    AUDIT_NAME,
    Findings,
    ProtectedRun,
    check_unused,
    find_signed_plan,
    thresholds_of,
)
from allograft_client.rows import PacketRow
from allograft_client.runner import Progress
from allograft_client.site import Site, model_ancestors, model_base
from allograft_client.store import now_text

#: The evaluation of a packet from private data: what it found would be a statistic of the data.
_WITHHELD = Evaluation(result="WARNED", configuration=("figures stay at the donor's site",))

_PROGRAMS = ("allograft", "torch", "transformers", "peft", "safetensors", "cryptography")


def plan_donation(site: Site, plan: DonationPlan) -> tuple[str, int]:
    """Check a plan against the site's policy and queue it; returns packet id and job number.

    Raises:
        RejectedError: AG-PRV-001 no policy, AG-PRV-003 the policy forbids it, AG-PRV-015 the
            model holds packets that may not be passed on, AG-SIT-003 unknown model, AG-IN-003 or
            AG-RCP-035 a bad plan, AG-PRV-01x the mode, AG-PRV-056 or -057 the privacy plan.
        UnavailableError: AG-STO-005 if there is no such data or no identifier list where the site
            names one.
    """
    plan.check()
    policy = site.policy()
    policy.check_donation(plan.mode, plan.kind)
    site.check_signed_policy(plan.mode, policy)
    _check_list(site, policy, plan)
    _check_parents(site, policy, plan)
    if not plan.data.is_file():
        raise UnavailableError("AG-STO-005", f"--data: there is no file {plan.data}")
    packet_id = secrets.token_hex(16)
    with site.store.transaction():
        if plan.is_protected:
            check_unused(site, plan.privacy_plan)
        site.store.add_packet(
            PacketRow(
                packet_id=packet_id,
                role="donor",
                donor=site.name,
                kind=plan.kind,
                model=plan.model,
                dispatch_id="",
                state="training",
                code="",
                reason="planned; its training is queued",
                facts={
                    "domain": plan.domain,
                    "mode": plan.mode,
                    "privacy_plan": plan.privacy_plan,
                },
                time=now_text(),
            )
        )
        number = site.store.add_job("heavy", "donate", packet_id, plan.to_json())
    return packet_id, number


def _check_list(site: Site, policy: Policy, plan: DonationPlan) -> None:
    """Refuse before anything is trained what the text gate would refuse afterwards."""
    path = site.home.identifier_list(site.settings)
    policy.check_identifier_list(plan.mode, path is not None)
    if path is not None and not path.is_file():
        raise UnavailableError("AG-STO-005", f"site.toml: identifiers: there is no file {path}")


def _check_parents(site: Site, policy: Policy, plan: DonationPlan) -> None:
    """Refuse to pass on what others' packets taught a model, unless licence and ε allow it."""
    epsilon = find_signed_plan(site, plan).epsilon() if plan.is_protected else None
    policy.check_redonation(_ancestors(site, plan), plan.mode, epsilon)


def _ancestors(site: Site, plan: DonationPlan) -> tuple[Ancestor, ...]:
    """The packets inside the weights that a donation starts from, and inside a tuned model's."""
    models = [site.store.model(name) for name in (plan.model, plan.tuned) if name]
    return tuple(dict.fromkeys(entry for model in models for entry in model_ancestors(model)))


def donate(site: Site, packet_id: str, plan: DonationPlan, tell: Progress) -> None:
    """Make a packet and its evidence; ends in `awaiting-approval`, or straight in an offer.

    Raises:
        RejectedError: What the policy, the recipe or a gate refuses.
        UnavailableError: The disk or a worker; the job goes on later.
    """
    policy = site.policy()
    policy.check_donation(plan.mode, plan.kind)
    site.check_signed_policy(plan.mode, policy)
    _check_list(site, policy, plan)
    _ = site.matchers  # read now: afterwards the run is trained and paid for
    _check_parents(site, policy, plan)
    directory = site.packet_path(packet_id)
    directory.mkdir(mode=0o700, exist_ok=True)
    donation = _Donation(site, packet_id, plan, directory, tell)
    donation.prepare()
    extract = donation.step("extract.json", donation.train)
    facts = donation.rebuild(extract)
    evaluation = donation.step("evaluation.json", lambda: donation.evaluate(facts))
    if not (directory / "attestations.jsonl").exists():
        # As signed now: training took hours. Audits and dossier are of one policy.
        policy = site.policy()
        site.check_signed_policy(plan.mode, policy)
        findings = donation.examine(facts, policy)
        tell({"stage": "signing the evidence and running the gates"})
        donation.build(facts, extract, evaluation, findings, policy)
    shutil.rmtree(directory / "work", ignore_errors=True)


class _Donation:
    """One donation under way."""

    def __init__(
        self, site: Site, packet_id: str, plan: DonationPlan, directory: Path, tell: Progress
    ) -> None:
        self._site = site
        self._packet_id = packet_id
        self._plan = plan
        self._directory = directory
        self._tell = tell
        self._model = site.store.model(plan.model)
        self._data = FixedData(plan.data, directory)
        self._protected = (
            ProtectedRun(site, packet_id, plan, directory, tell) if plan.is_protected else None
        )

    def prepare(self) -> None:
        """What must be on disk before the first gradient."""
        if self._protected is not None:
            self._protected.prepare()
        elif not self._data.is_fixed:
            self._data.fix()

    def step(self, name: str, work: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """Do a step once: its result is kept as a file."""
        path = self._directory / name
        if not path.exists():
            durable_write(path, json.dumps(dict(work()), sort_keys=True).encode())
        result: dict[str, Any] = json.loads(path.read_bytes())
        return result

    def train(self) -> Mapping[str, Any]:
        """Train in a worker; an interrupted run resumes from its snapshot in `work`."""
        work = self._directory / "work"
        work.mkdir(mode=0o700, exist_ok=True)
        started = now_text()
        extra: dict[str, Any] = {"workdir": str(work), "plan": self._plan.training_json()}
        if self._plan.tuned:
            tuned = self._site.store.model(self._plan.tuned)
            extra |= {
                "tuned": str(tuned.path),
                "tuned_digest": model_base(tuned).weights_digest,
                "stage": self._plan.stage,
            }
        result = self._run("train", extra)
        return {**result, "started": started, "finished": now_text()}

    def rebuild(self, extract: Mapping[str, Any]) -> dict[str, canonical.Json]:
        """Write the payload that may leave; returns the facts that are true of it."""
        wire_dtype = self._site.policy().donate.wire_dtype
        facts = with_wire_dtype(extract["facts"], wire_dtype)
        payload = self._directory / "payload"
        if (self._directory / "evaluation.json").exists():
            return facts  # the evaluated bytes stay as they are: rounding is random
        self._tell({"stage": "rebuilding the payload from the allow-list"})
        shutil.rmtree(payload, ignore_errors=True)
        payload.mkdir(mode=0o700)
        allowed = allow_list(self._plan.kind, facts, read_base(self._model.path))
        for name in extract["files"]:
            rebuild_file(self._directory / "work" / name, payload / name, allowed, wire_dtype)
        return facts

    def evaluate(self, facts: Mapping[str, canonical.Json]) -> Mapping[str, Any]:
        """Measure the rebuilt payload on text it was not trained on."""
        return self._run(
            "evaluate",
            {
                "payload": str(self._directory / "payload"),
                "facts": dict(facts),
                "packet_id": self._packet_id,
                "retention": str(self._model.retention),
            },
        )

    def examine(self, facts: Mapping[str, canonical.Json], policy: Policy) -> Findings | None:
        """Audit the rebuilt payload of private data; again if the policy's thresholds changed."""
        if self._protected is None:
            return None
        claim = self._protected.claim_for_audit()
        thresholds = thresholds_of(policy)
        task = {
            "payload": str(self._directory / "payload"),
            "facts": dict(facts),
            "packet_id": self._packet_id,
            "claim": None if claim is None else {"epsilon": claim.epsilon, "delta": claim.delta},
            "thresholds": thresholds.to_json(),
        }
        path = self._directory / AUDIT_NAME
        if path.exists() and json.loads(path.read_bytes()).get("thresholds") != task["thresholds"]:
            self._protected.drop_findings()
        result = self.step(
            AUDIT_NAME,
            lambda: {**self._run("audit", task), "thresholds": task["thresholds"]},
        )
        return self._protected.judge(result, thresholds)

    def build(
        self,
        facts: Mapping[str, canonical.Json],
        extract: Mapping[str, Any],
        evaluation: Mapping[str, Any],
        findings: Findings | None,
        policy: Policy,
    ) -> None:
        """Sign the statements, run the gates, and record the packet as ready for approval."""
        key = self._site.key
        packet = self._statement(facts, evaluation, policy)
        run = self._training_run(extract)
        measured = _judge(evaluation, packet.dose)
        # For this site's own people, also of a packet that the gates will stop; in a protected mode
        # the only place where it stands.
        self._site.store.add_packet_facts(
            self._packet_id, evaluation={"result": measured.result, **measured.figures}
        )
        judged = _WITHHELD if self._protected else measured
        documents = _documents(packet, run, judged)
        dossier = self._dossier(packet, facts, documents, findings, extract, policy)
        resources = [oms.Resource(part.name, part.sha256) for part in packet.parts]
        statement = sign_packet_statement(packet, key)
        signed_dossier = dsse.sign(dossier.to_statement(), dsse.IN_TOTO, [key]).to_bytes()
        evidence = [
            statement,
            sign_training(run, packet.subjects, key),
            sign_evaluation(judged, packet.subjects, key),
            signed_dossier,
        ]
        if self._protected is not None:
            evidence.append(self._protected.plan_envelope)
        matchers = self._site.matchers
        for envelope in evidence:
            # The gate saw what people write; this is every string of the bytes that are signed.
            check_envelope(envelope, "the packet's evidence", matchers)
        attestations = container.join_attestations([oms.sign_bundle(resources, key), *evidence])
        check_attestations(attestations, (key.public,))
        durable_write(self._directory / "dossier.json", signed_dossier)
        self._record(packet, dossier, statement, extract)
        # Last: its presence says that everything before it is on disk.
        durable_write(self._directory / "attestations.jsonl", attestations)

    def _record(
        self,
        packet: PacketStatement,
        dossier: Dossier,
        statement: bytes,
        extract: Mapping[str, Any],
    ) -> None:
        self._site.store.add_packet_facts(
            self._packet_id,
            payload_bytes=packet.payload_bytes,
            statement_digest=hashlib.sha256(statement).hexdigest(),
            not_after=canonical.format_time(packet.not_after),
            language=packet.language,
            dose=packet.dose.default,
            approvals_required=list(dossier.approvals_required),
            training=extract["report"],
        )

    def _run(self, task: str, extra: Mapping[str, Any]) -> Mapping[str, Any]:
        common = {
            "task": task,
            "model": str(self._model.path),
            "model_digest": model_base(self._model).weights_digest,
            "device": self._site.settings.device,
            "kind": self._plan.kind,
            "base_digest": model_base(self._model).weights_digest,
            "bases": {model_base(self._model).weights_digest: str(self._model.path)},
            "data": str(self._plan.data),
            "seed": self._plan.seed,
            "window_tokens": self._plan.window_tokens,
            "max_documents": self._plan.max_documents,
            "people": str(self._protected.people_file) if self._protected else "",
            "person_field": self._plan.person_field,
            "windows_per_person": self._plan.windows_per_person,
        }
        self._data.check()
        name = f"{task}-{self._packet_id}"
        return self._site.runner.run(name, {**common, **extra}, self._tell)

    def _statement(
        self,
        facts: Mapping[str, canonical.Json],
        evaluation: Mapping[str, Any],
        policy: Policy,
    ) -> PacketStatement:
        plan, created = self._plan, self._published(self._site.now())
        payload = self._directory / "payload"
        parts = container.list_payload(payload, plan.kind)
        norms = {}
        for part in parts:
            with (payload / part.name).open("rb") as handle:
                norms[part.name] = check_file(handle, find_kind(plan.kind).rules).frobenius_norm
        return PacketStatement(
            packet_id=self._packet_id,
            donor=self._site.name,
            kind=plan.kind,
            recipe=f"allograft {version('allograft')}",
            created=created,
            not_after=created + timedelta(days=plan.valid_days),
            base=model_base(self._model),
            parts=parts,
            facts=facts,
            # A dose chosen by private text would be one more thing that it tells.
            dose=Dose(1.0) if self._protected else _choose_dose(evaluation),
            wire_dtype=WIRE_DTYPES[policy.donate.wire_dtype],
            domain=plan.domain,
            language=plan.language,
            licence=Licence(plan.merge, plan.distil, plan.redonate),
            purpose=plan.purpose,
            retention_until=created + timedelta(days=plan.retention_days),
            norms=norms,
            parents=self._parents(),
        )

    def _parents(self) -> tuple[Parent, ...]:
        return tuple(entry.parent for entry in _ancestors(self._site, self._plan))

    def _training_run(self, extract: Mapping[str, Any]) -> TrainingRun:
        self._data.check()
        salt = self._directory / "salt"
        if not salt.exists():
            durable_write(salt, secrets.token_bytes(32))
        return TrainingRun(
            packet_id=self._packet_id,
            donor=self._site.name,
            parameters=self._plan.public_json(),
            base_digest=model_base(self._model).weights_digest,
            data_commitment=commit_data(self._data.digest, salt.read_bytes()),
            started=self._published(canonical.parse_time(extract["started"])),
            finished=self._published(canonical.parse_time(extract["finished"])),
            parents=self._parents(),
            software={software.name: software.version for software in _software()},
        )

    def _corpus(self) -> tuple[Matcher, ...]:
        return self._protected.corpus_matchers() if self._protected else ()

    def _published(self, moment: datetime) -> datetime:
        """A time as it is published: how long training and audits took depends on the data."""
        return moment.replace(minute=0, second=0) if self._protected else moment

    def _dossier(
        self,
        packet: PacketStatement,
        facts: Mapping[str, canonical.Json],
        documents: tuple[tuple[str, canonical.Json], ...],
        findings: Findings | None,
        extract: Mapping[str, Any],
        policy: Policy,
    ) -> Dossier:
        # Before the gates: a list that cannot be used leaves no verdict at all.
        listed = self._site.identifier_list
        submission = Submission(
            kind=packet.kind,
            payload=self._directory / "payload",
            allowed=allow_list(packet.kind, facts, read_base(self._model.path)),
            wire_dtype=policy.donate.wire_dtype,
            documents=documents,
            matchers=(*(() if listed is None else (listed,)), *self._corpus()),
        )
        gates = run_gates(submission)
        if findings is not None:
            gates = tuple(sorted((*gates, *findings.gates), key=lambda gate: gate.name))
        self._site.store.add_packet_facts(
            self._packet_id,
            gates=[
                {
                    "name": gate.name,
                    "verdict": str(gate.verdict),
                    "reason": gate.reason,
                    "warnings": list(warnings_of(gate)),
                }
                for gate in gates
            ],
            # Here alone: how many cells cannot be matched grows with the number of patients.
            identifier_list=None if listed is None else {"skipped": listed.skipped},
        )
        check_results(gates)
        parts = tuple(PayloadPart(p.name, p.size_bytes, p.sha256) for p in packet.parts)
        claim = None
        if self._protected is not None:
            claim = self._protected.conclude(parts, str(extract["report"]["noise"]))
        return Dossier(
            packet_id=packet.packet_id,
            kind=packet.kind,
            mode=self._plan.admitted(),
            parts=parts,
            gates=gates,
            policy_digest=policy.digest,
            conditions_digest=policy.conditions_digest,
            approvals_required=policy.donate.approvals,
            software=_software(),
            created=canonical.format_time(packet.created),
            privacy=claim,
            report_digest=findings.report.digest if findings is not None else "",
        )


def read_own_statement(site: Site, packet_id: str) -> PacketStatement:
    """The statement of a packet that this site built."""
    lines = (site.packet_path(packet_id) / "attestations.jsonl").read_bytes()
    envelope = dsse.Envelope.from_bytes(container.split_attestations(lines)[1])
    verified = dsse.verify(envelope, dsse.IN_TOTO, (site.key.public,))
    return read_packet_statement(Statement.from_bytes(verified.payload))


def _choose_dose(evaluation: Mapping[str, Any]) -> Dose:
    """The donor's advice: the dose with the best balance of gain and loss on general text."""
    points = evaluation["curve"]
    best = max(points, key=lambda p: p["gain"]["value"] + p["retention_change"]["value"])
    curve = tuple(
        DosePoint(p["dose"], p["gain"]["value"], p["retention_change"]["value"]) for p in points
    )
    return Dose(best["dose"], curve)


def _judge(evaluation: Mapping[str, Any], dose: Dose) -> Evaluation:
    point = next(p for p in evaluation["curve"] if p["dose"] == dose.default)
    helps = point["gain"]["low"] > 0
    figures = {
        "dose": point["dose"],
        "gain": point["gain"]["value"],
        "gain_low": point["gain"]["low"],
        "gain_high": point["gain"]["high"],
        "retention_change": point["retention_change"]["value"],
        "documents": float(evaluation["documents"]),
        "retention_documents": float(evaluation["retention"]),
    }
    test = "held-out gain is certain"
    return Evaluation(
        result="PASSED" if helps else "WARNED",
        configuration=("held-out text of the donor", "general text of the donor"),
        passed=(test,) if helps else (),
        failed=() if helps else (test,),
        figures=figures,
    )


def _documents(
    packet: PacketStatement, run: TrainingRun, judged: Evaluation
) -> tuple[tuple[str, canonical.Json], ...]:
    """Everything a person could have written text into, for the text gate.

    The sketch is left out: it is numbers in base64, in which any short pattern turns up by chance.
    """
    base = write_base(packet.base) | {"sketch": []}
    licence = [packet.licence.merge, packet.licence.distil, packet.licence.redonate]
    return (
        (
            "statement",
            {
                "recipe": packet.recipe,
                "domain": packet.domain,
                "language": packet.language,
                "purpose": packet.purpose,
                "facts": dict(packet.facts),
                "base": base,
                "licence": list(licence),
                "donor": packet.donor,
            },
        ),
        ("provenance", {"parameters": dict(run.parameters), "software": dict(run.software)}),
        (
            "evaluation",
            {"configuration": list(judged.configuration), "passed": list(judged.passed)},
        ),
    )


def _software() -> tuple[Software, ...]:
    found = []
    for name in _PROGRAMS:
        try:
            found.append(Software(name, version(name)))
        except PackageNotFoundError:
            continue
    return tuple(found)
