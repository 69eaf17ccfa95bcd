# SPDX-License-Identifier: Apache-2.0
"""Whether a packet may be used at this site now: asked at take-in, before a trial, and at keep.

Roster fresh → dispatch (signature, audience, time) → enrolled donor → log proof with witnesses →
sealed digests → manifest → attestations, validity and retention → policy → lineage. Invariant:
every answer comes from the sealed bytes, the roster and the policy as they stand at this moment;
nothing found earlier counts, so a revocation or a stricter policy holds at once.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from allograft.errors import RejectedError
from allograft.limits import LIMITS
from allograft.packet import container
from allograft.packet.container import Opener
from allograft.packet.header import Header
from allograft.privacy.accountant import epsilon_of
from allograft.privacy.dossier import Dossier, read_dossier
from allograft.privacy.plan import read_plan
from allograft.privacy.policy import Policy, Reception
from allograft.provenance.lineage import compare_bases
from allograft.provenance.statement import PacketStatement
from allograft.provenance.verify import (
    VerifiedDispatch,
    VerifiedManifest,
    check_logged,
    verify_dispatch,
    verify_manifest,
)
from allograft.recipes.base import Declaration, ModelCard, ModelShape, Verdict
from allograft.recipes.facts import check_statement
from allograft_client.rows import ModelRow, PacketRow
from allograft_client.site import Site, model_base, model_paths


@dataclass(frozen=True, slots=True)
class Sealed:
    """A dispatch directory as it was read; nothing in it is verified."""

    directory: Path
    header: Header
    header_bytes: bytes
    dispatch: bytes

    @property
    def dispatch_sha256(self) -> str:
        """SHA-256 (hex) of the dispatch's envelope; receipts name it."""
        return hashlib.sha256(self.dispatch).hexdigest()


def read_sealed(directory: Path) -> Sealed:
    """Read header and dispatch of a dispatch directory.

    Raises:
        RejectedError: AG-PKT-* or AG-IN-002 if they cannot be read.
    """
    header, header_bytes = container.read_sealed_header(directory)
    dispatch = container.read_document(directory / "dispatch.json", LIMITS.json_document_bytes)
    return Sealed(directory, header, header_bytes, dispatch)


def verify_sealed(
    site: Site, sealed: Sealed, is_seen: Callable[[str], bool] = lambda dispatch_id: False
) -> VerifiedManifest:
    """Everything up to the attestations; the payload stays sealed.

    Args:
        site: The site.
        sealed: What to verify.
        is_seen: Tells whether a dispatch was taken in before.

    Raises:
        RejectedError: AG-ROS-* for roster or donor, AG-SIG-*, AG-PRO-*, AG-LOG-*, AG-PKT-* or
            AG-SEA-* for the packet, AG-KEY-* for our own sealing key.
    """
    now = site.now()
    roster = site.trust.roster()
    verified = verify_dispatch(
        sealed.dispatch, sealed.header_bytes, roster, site.name, now, is_seen
    )
    donor = roster.site(verified.dispatch.donor, now)
    if "donor" not in donor.roles:
        raise RejectedError("AG-ROS-002", f"{donor.site_id} is not enrolled as a donor")
    _check_log(site, sealed, verified)
    container.check_sealed_files(sealed.directory, verified.header)
    opener = Opener(site.name, site.sealing_key())
    attestations = container.open_manifest(sealed.directory, verified.header, opener)
    return verify_manifest(attestations, verified, roster, now)


def _check_log(site: Site, sealed: Sealed, verified: VerifiedDispatch) -> None:
    entry = container.read_document(sealed.directory / "dispatch.event.json", LIMITS.entry_bytes)
    proof = container.read_document(sealed.directory / "dispatch.proof", LIMITS.proof_bytes)
    check_logged(verified, site.trust.verify_logged(entry, proof, site.now()))


def check_policy(policy: Policy, manifest: VerifiedManifest) -> None:
    """Compare a verified packet with what the policy receives.

    Raises:
        RejectedError: AG-PRV-005 if the policy says no, AG-PRV-030 for a malformed dossier,
            AG-PRV-011 or -013 if its claim of privacy is not what its plan gives.
    """
    statement = manifest.statement
    dossier = read_dossier(manifest.dossier)
    check_claim(manifest, dossier)
    permissions = {
        name for name in ("merge", "distil", "redonate") if getattr(statement.licence, name)
    }
    policy.check_reception(
        Reception(
            donor=statement.donor,
            kind=statement.kind,
            mode=str(dossier.mode.mode),
            permissions=frozenset(permissions),
            purpose=statement.purpose,
            parents=len(statement.parents),
        )
    )


def check_claim(manifest: VerifiedManifest, dossier: Dossier) -> None:
    """Hold the dossier's claim of privacy against the signed plan, and recompute its ε.

    Raises:
        RejectedError: AG-PRV-011 if there is no such plan, AG-PRV-013 for a false claim, AG-PRV-05x
            for a malformed plan.
    """
    claim = dossier.privacy
    if claim is None:
        return
    if hashlib.sha256(manifest.plan).hexdigest() != claim.plan_digest:
        raise RejectedError("AG-PRV-011", "the plan that the dossier names is not with the packet")
    plan = read_plan(manifest.plan)
    statement = manifest.statement
    planned = (plan.donor, plan.kind, plan.base_digest, plan.mode, plan.constants)
    made = (
        statement.donor, statement.kind, statement.base.weights_digest, dossier.mode.mode,
        claim.constants,
    )  # fmt: skip
    if planned != made:
        raise RejectedError("AG-PRV-011", "the packet was made otherwise than its plan says")
    claim.check(epsilon_of)


def judge_base(site: Site, statement: PacketStatement, model: ModelRow) -> Verdict:
    """Whether a packet may be opened for one of the site's models, by the statement alone."""
    base = model_base(model)
    lineage = compare_bases(base, statement.base)
    declaration = Declaration(
        kind=statement.kind,
        base_weights_digest=statement.base.weights_digest,
        tokenizer_digest=statement.base.tokenizer_digest,
        facts=statement.facts,
    )
    card = ModelCard(
        weights_digest=base.weights_digest,
        tokenizer_digest=base.tokenizer_digest,
        shape=ModelShape.from_json(model.facts["shape"]),
        lineage_cosine=lineage.cosine,
        bases=frozenset(model_paths(site)),
    )
    return check_statement(declaration, card)


def admit_stored(site: Site, row: PacketRow) -> tuple[Sealed, PacketStatement]:
    """Every check of a packet's take-in but the replay, anew, for the model it was taken in for.

    Raises:
        RejectedError: As `verify_sealed` and `check_policy`; AG-PRV-001 or -002 for the policy's
            file, AG-SIT-003 if the model is gone, AG-RCP-* if it is no relative of the base.
    """
    sealed = read_sealed(site.packet_path(row.packet_id, "sealed"))
    manifest = verify_sealed(site, sealed)
    check_policy(site.policy(), manifest)
    verdict = judge_base(site, manifest.statement, site.store.model(row.model))
    if verdict.level == "refuse":
        raise RejectedError(verdict.code, verdict.reason)
    return sealed, manifest.statement


def open_sealed(site: Site, sealed: Sealed, statement: PacketStatement) -> Path:
    """Open an admitted payload into the packet's private directory and check it strictly.

    The caller removes the directory as soon as it is done with it.

    Raises:
        RejectedError: AG-PKT-* or AG-SEA-* for the payload, AG-KEY-* for our own sealing key.
        UnavailableError: AG-STO-001 when the disk is full.
    """
    target = site.packet_path(statement.packet_id, "opened")
    target.parent.mkdir(mode=0o700, exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    opener = Opener(site.name, site.sealing_key())
    container.open_payload(
        sealed.directory, sealed.header, statement.kind, statement.parts, opener, target
    )
    return target


def close_opened(site: Site, packet_id: str) -> None:
    """Remove a packet's opened payload, if there is one."""
    shutil.rmtree(site.packet_path(packet_id, "opened"), ignore_errors=True)
