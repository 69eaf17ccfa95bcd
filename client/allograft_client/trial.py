# SPDX-License-Identifier: Apache-2.0
"""Trial, keep, revert, recall: a verified packet meets one of this site's models.

Invariants: nothing is tried or kept unless every check of its take-in holds at that moment; what
is kept is what the gate accepted, on the very stack it was tried on; what is reverted or recalled
leaves no bit in the model, and that is measured, not assumed. Every outcome is told by a signed
receipt in the same transaction that records it.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from allograft.crypto import canonical
from allograft.errors import RejectedError
from allograft.evaluate.gate import Outcome
from allograft.evaluate.report import TrialReport
from allograft.privacy.policy import ReceivePolicy
from allograft.routing.receipt import State
from allograft_client.admission import admit_stored, close_opened, open_sealed
from allograft_client.receipts import answer
from allograft_client.rows import AttachmentRow, ModelRow, PacketRow
from allograft_client.runner import Progress
from allograft_client.site import Site, model_base

#: Codes that speak about the packet or its donor. All others name something that this site can
#: repair (its text, its model, its policy file, a late roster), so the packet waits for that.
_ABOUT_PACKET = (
    "AG-SIG-", "AG-SEA-", "AG-PKT-", "AG-PRO-", "AG-LOG-",
    "AG-ROS-002", "AG-ROS-003", "AG-ROS-004",
    "AG-PRV-005", "AG-PRV-030",
    "AG-RCP-002", "AG-RCP-003", "AG-RCP-010", "AG-RCP-011", "AG-RCP-012", "AG-RCP-013",
    "AG-RCP-021",
    "AG-EVA-002", "AG-EVA-003",
)  # fmt: skip


def try_packet(site: Site, packet_id: str, tell: Progress) -> Mapping[str, Any]:
    """Try a verified packet on its model and let the gate decide.

    Raises:
        RejectedError: AG-SIT-004 for another state, the codes of `admission.admit_stored`,
            AG-RCP-* or AG-EVA-* if it cannot be judged. A code about the packet refuses it; after
            any other it waits in its state.
        UnavailableError: AG-SIT-007 if the worker died, AG-STO-001 for the disk.
    """
    row = site.store.packet(packet_id)
    if row.role != "recipient" or row.state not in {"verified", "trialled", "reverted"}:
        raise RejectedError("AG-SIT-004", f"packet {packet_id} is {row.state}")
    if row.state == "trialled":
        # Nobody may keep it while a trial replaces the attachment and the figures.
        site.store.move_packet(packet_id, ["trialled"], "verified", "being tried again")
        row = site.store.packet(packet_id)
    try:
        result = _run_trial(site, row, tell)
    except RejectedError as error:
        _conclude_if_about_packet(site, row, error)
        raise
    finally:
        close_opened(site, packet_id)
    report = TrialReport.from_json(result["report"])
    decision = report.decision
    figures = {
        "gain": decision.gain.value,
        "gain_low": decision.gain.low,
        "gain_high": decision.gain.high,
        "retention_change": decision.retention_change.value,
        "null_gain": decision.null_gain.value,
        "dose": decision.dose,
        "reason": str(decision.reason),
    }
    site.store.add_packet_facts(
        packet_id,
        trial=figures,
        tried_on=result["tried_on"],
        report=result["report"],
        trial_network=result["network"],
    )
    if decision.outcome is not Outcome.KEEP:
        reason = f"the gate said no: {decision.reason}"
        _conclude(site, row, "reverted", reason)
        return figures
    reason = f"gain confirmed at dose {decision.dose:g}; waits for keep or revert"
    site.store.move_packet(packet_id, [row.state], "trialled", reason)
    if site.policy().receive.automatic_keep:
        keep_packet(site, packet_id)
    return figures


def _run_trial(site: Site, row: PacketRow, tell: Progress) -> Mapping[str, Any]:
    tell({"stage": "verifying again"})
    sealed, statement = admit_stored(site, row)
    payload = open_sealed(site, sealed, statement)
    model = site.store.model(row.model)
    stack = site.store.attachments(model.name)
    rules = site.policy().receive
    task = {
        "task": "try",
        "model": str(model.path),
        "device": site.settings.device,
        "stack": [str(entry.path) for entry in stack],
        "kind": statement.kind,
        "payload": str(payload),
        "facts": dict(statement.facts),
        "packet_id": row.packet_id,
        "data": str(model.data),
        "retention": str(model.retention),
        "max_documents": site.settings.trial_documents,
        "min_gain": rules.min_gain,
        "max_retention_loss": rules.max_retention_loss,
        "attachment": str(site.packet_path(row.packet_id, "attachment")),
    }
    result = site.runner.run(f"trial-{row.packet_id}", task, tell)
    return {**result, "tried_on": _conditions_digest(model, stack, rules)}


def _conditions_digest(
    model: ModelRow, stack: Sequence[AttachmentRow], rules: ReceivePolicy
) -> str:
    """SHA-256 (hex) that names what a verdict of the gate holds for.

    That is the base, the attachments on it, whatever their order, and the gate's limits.
    """
    entries = sorted([entry.packet_id, entry.dose] for entry in stack)
    limits = [rules.min_gain, rules.max_retention_loss]
    content = canonical.dumps([model_base(model).weights_digest, entries, limits])
    return hashlib.sha256(content).hexdigest()


def keep_packet(site: Site, packet_id: str) -> None:
    """Put a tried packet's attachment on its model's stack for good.

    If the model, its stack or the gate's limits changed since the trial, the packet waits for a
    new one, so that no combination is kept that nobody tried.

    Raises:
        RejectedError: AG-SIT-004 unless it was tried with success, AG-SIT-016 if it must be tried
            again, and the codes of `admission.admit_stored`. A code about the packet refuses it;
            after any other it waits in its state.
    """
    row = site.store.packet(packet_id)
    if row.state != "trialled":
        raise RejectedError("AG-SIT-004", f"packet {packet_id} is {row.state}, not trialled")
    try:
        admit_stored(site, row)
    except RejectedError as error:
        _conclude_if_about_packet(site, row, error)
        raise
    rules = site.policy().receive
    with site.store.transaction():
        changed = _keep_if_tried(site, packet_id, rules)
        if changed:
            site.store.move_packet(packet_id, ["trialled"], "verified", changed, "AG-SIT-016")
            if rules.automatic_trial:
                site.store.add_job("heavy", "trial", packet_id)
    if changed:
        raise RejectedError("AG-SIT-016", changed)


def _keep_if_tried(site: Site, packet_id: str, rules: ReceivePolicy) -> str:
    """Attach it, or say what changed since its trial; call inside a transaction."""
    row = site.store.packet(packet_id)
    model = site.store.model(row.model)
    now = _conditions_digest(model, site.store.attachments(model.name), rules)
    if row.facts.get("tried_on") != now:
        return f"{model.name}, its attachments or the gate's limits changed since the trial"
    dose = row.facts["trial"]["dose"]
    reason = f"attached to {model.name} at dose {dose:g}"
    site.store.move_packet(packet_id, ["trialled"], "kept", reason)
    path = site.packet_path(packet_id, "attachment")
    site.store.push_attachment(packet_id, model.name, path, dose)
    answer(site, row, "kept")
    return ""


def revert_packet(site: Site, packet_id: str, tell: Progress) -> Mapping[str, Any]:
    """Take a kept or tried packet back out, and show that no bit of it is left.

    Raises:
        RejectedError: AG-SIT-004 for another state, AG-EVA-003 if the model was not restored.
        UnavailableError: AG-SIT-007 if the worker died.
    """
    row = site.store.packet(packet_id)
    if row.role != "recipient" or row.state not in {"kept", "trialled"}:
        raise RejectedError("AG-SIT-004", f"packet {packet_id} is {row.state}")
    model = site.store.model(row.model)
    others = [a for a in site.store.attachments(model.name) if a.packet_id != packet_id]
    attachment = site.packet_path(packet_id, "attachment")
    task = {
        "task": "revert",
        "model": str(model.path),
        "device": site.settings.device,
        "stack": [str(entry.path) for entry in others],
        "attachment": str(attachment),
        "data": str(model.data),
        "max_documents": site.settings.trial_documents,
    }
    result = site.runner.run(f"revert-{packet_id}", task, tell)
    with site.store.transaction():
        site.store.drop_attachment(packet_id)
        site.store.add_packet_facts(packet_id, bit_exact=result["bit_exact"])
        reason = "taken out again; state and logits are bit-equal to before"
        site.store.move_packet(packet_id, ["kept", "trialled"], "reverted", reason)
        answer(site, row, "reverted")
    shutil.rmtree(attachment, ignore_errors=True)
    return {"bit_exact": result["bit_exact"], "state_digest": result["state_digest"]}


def queue_ended(site: Site) -> int:
    """Queue the removal of kept packets whose donor's retention time is over; how many."""
    now, queued = canonical.format_time(site.now()), 0
    for row in site.store.packets():
        # Times of this form compare as text.
        is_over = row.state == "kept" and str(row.facts["retention_until"]) <= now
        if is_over and not site.store.has_open_job("revert", row.packet_id):
            site.store.add_job("heavy", "revert", row.packet_id)
            queued += 1
    return queued


def recall_packet(site: Site, packet_id: str) -> None:
    """Act on a donor's withdrawal: detach, delete, answer.

    A packet that was never attached is deleted as well. Snapshots that an operator exported from
    the stack are outside our reach; the reason says so.
    """
    row = site.store.packet(packet_id)
    was_kept = row.state == "kept"
    with site.store.transaction():
        site.store.drop_attachment(packet_id)
        site.store.move_packet(
            packet_id,
            [row.state],
            "recalled",
            "withdrawn by its donor; detached and deleted here, exported copies are not",
        )
        if was_kept:
            answer(site, row, "reverted")
    shutil.rmtree(site.packet_path(packet_id), ignore_errors=True)


def _conclude_if_about_packet(site: Site, row: PacketRow, error: RejectedError) -> None:
    if error.code.startswith(_ABOUT_PACKET):
        _conclude(site, row, "refused", error.cause, error.code)


def _conclude(site: Site, row: PacketRow, state: State, reason: str, code: str = "") -> None:
    with site.store.transaction():
        site.store.move_packet(row.packet_id, [row.state], state, reason, code)
        answer(site, row, state, code)
    # An earlier trial may have left one.
    shutil.rmtree(site.packet_path(row.packet_id, "attachment"), ignore_errors=True)
