# SPDX-License-Identifier: Apache-2.0
"""A donation from private data: its signed plan, its people, its budget and its audits.

Order, and why: the plan is signed before the data is opened; people and coins are checked before
anybody is enrolled, which is for ever; people are enrolled before anything is spent on them; the
coins of split and canaries are on disk and the whole budget is reserved before the first gradient;
how it ended is committed whether or not anything leaves.
Every step may be repeated after a kill and then changes nothing. What was reserved stays spent.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allograft.durable import durable_write
from allograft.errors import AllograftError, RejectedError
from allograft.limits import LIMITS
from allograft.plainfile import read_plain
from allograft.privacy.accountant import describe_accountant, epsilon_of
from allograft.privacy.canaries import CanaryPlan, PersonSplit
from allograft.privacy.claim import PrivacyClaim
from allograft.privacy.dossier import GateResult, PayloadPart, read_gate
from allograft.privacy.gates import holds_text
from allograft.privacy.ledger import (
    Account,
    Committed,
    NonprivateRelease,
    Outcome,
    charge_for,
    reserve_for,
)
from allograft.privacy.modes import Mode
from allograft.privacy.overlap import Document as Passage, index_corpus
from allograft.privacy.people import draw_people
from allograft.privacy.plan import PrivacyPlan
from allograft.privacy.policy import Policy
from allograft.privacy.report import Exposed, FullReport, Point, read_report
from allograft.privacy.scan import Matcher
from allograft.privacy.thresholds import AuditThresholds
from allograft.recipes.documents import group_persons, read_documents
from allograft_client.budget import Budget
from allograft_client.fixed_data import FixedData
from allograft_client.plan import DonationPlan
from allograft_client.plan_files import find_plan
from allograft_client.runner import Progress
from allograft_client.site import Site, model_base

if TYPE_CHECKING:
    from allograft.privacy.memorisation import DpClaim

PEOPLE_NAME, REPORT_NAME, PLAN_NAME = "people.json", "report.json", "plan.json"
AUDIT_NAME = "audit.json"


@dataclass(frozen=True, slots=True)
class Findings:
    """What the audits of a rebuilt payload found.

    Attributes:
        gates: G1 (with differential privacy), G3, G4, G5 and G7, as they may be published.
        report: What stays at the site.
    """

    gates: tuple[GateResult, ...]
    report: FullReport


def find_signed_plan(site: Site, donation: DonationPlan) -> PrivacyPlan:
    """The signed plan of a donation, which must be of this very donation.

    Raises:
        RejectedError: AG-PRV-056 if there is none or it is not signed, AG-PRV-057 if the donation
            is another one, AG-PRV-050 to -053 or AG-SIG-* if its file was changed.
    """
    filed = find_plan(site, donation.privacy_plan)
    if not filed.is_signed:
        raise RejectedError("AG-PRV-056", "the plan is a draft; sign it before the data is opened")
    plan = filed.plan
    base = model_base(site.store.model(donation.model)).weights_digest
    asked = (donation.mode, donation.kind, base)
    if donation.privacy_plan != plan.plan_id:
        raise RejectedError("AG-PRV-057", "the donation does not name its plan in full")
    if (str(plan.mode), plan.kind, plan.base_digest) != asked:
        raise RejectedError("AG-PRV-057", "mode, kind or base of the donation are not the plan's")
    if dict(plan.training) != donation.planned_json():
        raise RejectedError("AG-PRV-057", "the donation would train otherwise than the plan says")
    return plan


def check_unused(site: Site, plan_id: str, packet_id: str = "") -> None:
    """Refuse a plan that another donation of this site names, whatever became of that.

    One plan is one run in mode `measured` too, where no reservation says so: who may run again
    until the audits pass shows the best of many.

    Args:
        site: The donor.
        plan_id: Id of the signed plan.
        packet_id: The packet that may name it; empty for one that is not recorded yet.

    Raises:
        RejectedError: AG-PRV-057.
    """
    if any(plan == plan_id and other != packet_id for other, plan in _plans_by_packet(site)):
        raise RejectedError("AG-PRV-057", "another donation was made under the plan")


def thresholds_of(policy: Policy) -> AuditThresholds:
    """The numbers that the audits judge by, as the signed policy sets them."""
    return replace(
        AuditThresholds(),
        max_epsilon=policy.audit.donation_epsilon,
        population_dp=policy.audit.min_population_dp,
        population_measured=policy.audit.min_population,
        canaries_min=policy.audit.canaries,
    )


class ProtectedRun:
    """What surrounds the training of one packet in mode `strict` or `measured`."""

    def __init__(
        self, site: Site, packet_id: str, donation: DonationPlan, directory: Path, tell: Progress
    ) -> None:
        self._site = site
        self._packet_id = packet_id
        self._donation = donation
        self._directory = directory
        self._tell = tell
        self.plan = find_signed_plan(site, donation)
        self._budget = Budget(site)
        self.data = FixedData(donation.data, directory)

    @property
    def people_file(self) -> Path:
        """The private file of split and canaries."""
        return self._directory / PEOPLE_NAME

    @property
    def plan_envelope(self) -> bytes:
        """The signed plan as it was when the run began."""
        return read_plain(self._directory / PLAN_NAME, LIMITS.json_document_bytes)

    def prepare(self) -> None:
        """Everything that must be on disk before the first gradient.

        Raises:
            RejectedError: AG-PRV-056 or -057 if the plan was used, or earlier plans of the domain
                are not here or count others as persons, AG-PRV-062 or -063 for the ledger,
                AG-PRV-066 for people of another domain, AG-PRV-078 for too few of them, AG-PRV-079
                for too little public text, AG-PRV-081 for records without a person, AG-RCP-034 if
                the data changes meanwhile, AG-PRV-014 for limits of the policy.
            UnavailableError: AG-STO-001 for the disk, AG-PRV-068 while another process is at it.
        """
        self._tell({"stage": "checking people and budget"})
        check_unused(self._site, self.plan.plan_id, self._packet_id)
        policy = self._site.policy()
        ledger = self._budget.ledger()
        account = ledger.account(self.plan.domain)
        self._check_limits(policy, account)
        self._check_person_field(account)
        if not self.people_file.exists():
            if ledger.reservation(self.plan.plan_id) is not None:
                # A second run on one reservation would be free.
                raise RejectedError("AG-PRV-057", "the plan has paid for another run already")
            # First whatever can refuse: nobody is ever taken out of a domain again.
            if self.plan.constants is not None:
                ledger.next_entry(reserve_for(charge_for(self.plan)), self._site.now())
            self.data.fix()
            ids = self._read_ids(policy)
            self.data.check()
            register = self._budget.population()
            register.check_people(self.plan.domain, ids)
            canaries = CanaryPlan(coins=policy.audit.canaries)
            people = draw_people(ids, self._public_texts(), self._donation.holdout, canaries)
            self._check_sides(policy, people.split)
            # Then people, plan, coins, budget. A kill before the coins tosses new ones, which
            # nobody has seen; after them the run is this one.
            register.enrol_people(self.plan.domain, ids)
            signed = find_plan(self._site, self.plan.plan_id).path
            durable_write(self._directory / PLAN_NAME, signed.read_bytes())
            people.save(self.people_file)
        elif not self.data.is_fixed:
            raise RejectedError("AG-RCP-034", "the run began without noting which data it has")
        ended = ledger.outcome(self.plan.plan_id)
        # A run that a kill interrupted may have come as far as its end.
        is_released = ended is not None and ended.outcome is Outcome.RELEASED
        if is_released and not (self._directory / AUDIT_NAME).exists():
            raise RejectedError("AG-PRV-057", "the plan's run has ended, and its files are gone")
        if self.plan.constants is not None and not is_released:
            self._budget.reserve(charge_for(self.plan))

    def drop_findings(self) -> None:
        """Forget an audit that judged by other thresholds; its report with it, and that first."""
        (self._directory / REPORT_NAME).unlink(missing_ok=True)
        (self._directory / AUDIT_NAME).unlink(missing_ok=True)

    def judge(self, result: Mapping[str, Any], thresholds: AuditThresholds) -> Findings:
        """Turn what the audit worker found into gates and a report."""
        from allograft.privacy.memorisation import judge_plan  # scipy: a second of every start

        gates = [read_gate(gate) for gate in result["gates"]]
        figures = {gate: dict(named) for gate, named in result["figures"].items()}
        claim = self.claim_for_audit()
        if self.plan.constants is not None and claim is not None:
            first, _ = judge_plan(
                self.plan.constants,
                claim,
                epsilon_of,
                thresholds,
            )
            gates.insert(0, first)
        path = self._directory / REPORT_NAME
        if not path.exists():
            report = FullReport(
                packet_id=self._packet_id,
                salt=secrets.token_hex(32),
                figures=figures,
                exposure=_points(result["exposure"]),
                roc=_points(result["roc"]),
                budget=self._spending(),
                people=tuple(map(Exposed.from_json, result["exposed"])),
            )
            durable_write(path, report.to_bytes(), mode=0o600)
        # How long a gate took depends on how much there was to read.
        return Findings(
            tuple(replace(gate, cost_ms=0) for gate in gates),
            read_report(path),
        )

    def corpus_matchers(self) -> tuple[Matcher, ...]:
        """What finds passages of these people's records in a text part of the payload.

        No kind of packet has text parts yet, so nothing is indexed for the present ones. The
        index is made under a key of its own and is never written.
        """
        if not holds_text(self._donation.kind):
            return ()
        records = read_documents(self._donation.data, self._donation.person_field)
        documents = (Passage(record.person, record.text) for record in records)
        key = secrets.token_bytes(32)
        return (index_corpus(documents, self._public_texts(), key, self._directory),)

    def claim_for_audit(self) -> DpClaim | None:
        """What the run promises about each person; None without differential privacy."""
        from allograft.privacy.memorisation import DpClaim

        epsilon = self.plan.epsilon()
        if epsilon is None or self.plan.constants is None:
            return None
        return DpClaim(epsilon, self.plan.constants.delta)

    def conclude(self, parts: Sequence[PayloadPart], noise: str) -> PrivacyClaim:
        """Record that these bytes may leave, and state what was spent on whom.

        Raises:
            RejectedError: AG-PRV-060 to -069 if the ledger does not hold.
        """
        if self.plan.constants is not None:
            digests = tuple(part.sha256 for part in parts)
            self._budget.commit(Committed(self.plan.plan_id, Outcome.RELEASED, digests))
        ledger = self._budget.ledger()
        account = ledger.account(self.plan.domain)
        is_private = self.plan.constants is not None
        bounded = is_private and not account.is_nonprivate
        return PrivacyClaim(
            plan_digest=self.plan.digest,
            constants=self.plan.constants,
            epsilon=self.plan.epsilon(),
            epsilon_domain=account.epsilon if bounded else None,
            filter_order=float(account.limits.order),
            noise=noise if is_private else "",
            accountant=describe_accountant(),
            ledger_head=ledger.head.hash,
            ledger_entries=ledger.head.count,
        )

    def _check_limits(self, policy: Policy, account: Account) -> None:
        constants, limits = self.plan.constants, account.limits
        policy.check_domain(limits.epsilon_max, limits.delta_max)
        if constants is None:
            return
        if not constants.delta >= limits.delta_max:
            # ε falls as δ grows: told at a smaller δ than the domain's, this run alone could cost
            # more than all of its domain, and recipients refuse such a claim after it was paid for.
            raise RejectedError("AG-PRV-014", "the plan's delta is below the domain's")
        policy.check_cost(epsilon_of(constants), constants.delta)

    def _check_person_field(self, account: Account) -> None:
        """Refuse to count as a person what earlier runs on these people did not.

        One note a person, and nobody would be known again: neither ε nor the register would hold.
        """
        field = self._donation.person_field
        ran = {entry.charge.plan_id for entry in account.reserved}
        for plan_id in sorted(ran | self._measured_plans()):
            earlier = self._budget.signed_plan(plan_id)
            if earlier is None and plan_id in ran:
                raise RejectedError(
                    "AG-PRV-056", f"plan {plan_id[:12]}, which the domain paid for, is not here"
                )
            if earlier is None or earlier.domain != self.plan.domain:
                continue
            if earlier.training.get("person_field") != field:
                raise RejectedError(
                    "AG-PRV-057", "earlier plans of the domain name another field for a person"
                )

    def _measured_plans(self) -> set[str]:
        """Plans of the donations that enrolled people; mode `measured` leaves no reservation."""
        return {
            plan_id
            for packet_id, plan_id in _plans_by_packet(self._site)
            if self._site.packet_path(packet_id, PEOPLE_NAME).exists()
        }

    def _read_ids(self, policy: Policy) -> list[str]:
        documents = read_documents(self._donation.data, self._donation.person_field)
        ids = list(group_persons(documents))
        least = thresholds_of(policy).least_persons(self.plan.mode is Mode.STRICT)
        # Before anything is spent: so few people would be refused afterwards as well.
        if len(ids) < least:
            raise RejectedError("AG-PRV-078", f"fewer than {least} persons")
        return ids

    def _check_sides(self, policy: Policy, split: PersonSplit) -> None:
        """Refuse before anything is spent what gates G5 and G7 would refuse afterwards."""
        rules = thresholds_of(policy)
        least = rules.least_persons(self.plan.mode is Mode.STRICT)
        if len(split.train) < least:
            raise RejectedError("AG-PRV-078", f"fewer than {least} persons to train on")
        if min(len(split.train), len(split.holdout)) < rules.membership_min_persons:
            raise RejectedError(
                "AG-PRV-078",
                f"fewer than {rules.membership_min_persons} persons on a side of the audit",
            )

    def _public_texts(self) -> list[str]:
        model = self._site.store.model(self._donation.model)
        return [document.text for document in read_documents(model.retention)]

    def _spending(self) -> tuple[Point, ...]:
        """The domain's ε after each of its charges."""
        account = self._budget.ledger().account(self.plan.domain)
        spent = [
            replace(account, reserved=account.reserved[:count], nonprivate=()).epsilon
            for count in range(1, len(account.reserved) + 1)
        ]
        return tuple(Point(float(number), epsilon) for number, epsilon in enumerate(spent, 1))


def end_protected(
    site: Site, packet_id: str, donation: DonationPlan, error: AllograftError
) -> None:
    """Record that a packet's run ended without a packet. What it was to cost stays spent."""
    if donation.mode == Mode.OPEN or not donation.privacy_plan:
        return
    if not site.packet_path(packet_id, PEOPLE_NAME).exists():
        # Coins are tossed before anything is reserved: the reservation is another packet's.
        return
    plan = find_plan(site, donation.privacy_plan).plan
    budget = Budget(site)
    ledger = budget.ledger()
    if ledger.reservation(plan.plan_id) is None or ledger.outcome(plan.plan_id) is not None:
        return
    budget.commit(Committed(plan.plan_id, Outcome.ABORTED, (), error.code))


def record_release(site: Site, packet_id: str, mode: Mode, roles: Sequence[str]) -> None:
    """Before a packet without a formal bound is sealed: its people's ε is infinite from now on.

    Args:
        site: The donor.
        packet_id: The packet.
        mode: Its mode; only `measured` has no bound.
        roles: Who approved it; the ledger names the first.
    """
    if mode is not Mode.MEASURED:
        return
    plan = find_plan(site, site.store.packet(packet_id).facts["privacy_plan"]).plan
    dossier = read_plain(site.packet_path(packet_id, "dossier.json"), LIMITS.json_document_bytes)
    digest = hashlib.sha256(dossier).hexdigest()
    Budget(site).record_nonprivate(NonprivateRelease(plan.domain, digest, sorted(roles)[0]))


def _plans_by_packet(site: Site) -> list[tuple[str, str]]:
    """Every donation from private data that this site ever recorded: packet id and plan id."""
    return [
        (row.packet_id, row.facts["privacy_plan"])
        for row in site.store.packets()
        if row.role == "donor" and row.facts.get("privacy_plan")
    ]


def _points(pairs: Sequence[Sequence[float]]) -> tuple[Point, ...]:
    return tuple(Point(float(x), float(y)) for x, y in pairs)
