# SPDX-License-Identifier: Apache-2.0
"""Screens, trial, keep, revert, recall: a verified packet meets one of this site's models.

Invariants: nothing is tried or kept unless every check of its take-in holds at that moment; what
is kept is what the gate accepted, on the very stack it was screened and tried on; what is reverted
or recalled leaves no bit in the model, and that is measured, not assumed. Every outcome is told by
a signed receipt in the same transaction that records it.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from allograft.crypto import canonical
from allograft.errors import RejectedError
from allograft.evaluate.gate import Outcome
from allograft.evaluate.report import TrialReport
from allograft.evaluate.screen import Verdict
from allograft.privacy.policy import ReceivePolicy
from allograft.routing.receipt import State
from allograft_client.admission import admit_stored, close_opened, open_sealed
from allograft_client.receipts import answer
from allograft_client.rows import AttachmentRow, ModelRow, PacketRow
from allograft_client.runner import Progress
from allograft_client.screens import (
    QUARANTINED,
    add_to_bank,
    bank_of,
    combination,
    is_screened_out,
    queue_screen,
    read_screens,
    remember,
    screen_inputs,
    show_screen,
    spectrum_facts,
)
from allograft_client.site import Site, model_base, model_paths

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


@dataclass(frozen=True, slots=True)
class _Run:
    """What a worker found, and the model, stack and conditions that it was given."""

    result: Mapping[str, Any]
    model: ModelRow
    stack: tuple[AttachmentRow, ...]
    conditions: str


def try_packet(
    site: Site, packet_id: str, tell: Progress, despite_alarm: bool = False
) -> Mapping[str, Any]:
    """Screen a verified packet, try it on its model, and let the gate decide.

    Args:
        site: The site.
        packet_id: The packet.
        tell: Told about progress.
        despite_alarm: A person's decision, for this one trial, to go on if a screen alarms. It
            stays in the packet's history, and such a packet is never kept automatically.

    Raises:
        RejectedError: AG-SIT-004 for another state, AG-SIT-020 if a screen alarms, the codes of
            `admission.admit_stored`, AG-RCP-* or AG-EVA-* if it cannot be judged. A code about the
            packet refuses it; after any other it waits in its state.
        UnavailableError: AG-SIT-007 if the worker died, AG-STO-001 for the disk.
    """
    row = _begin(site, packet_id, despite_alarm)
    try:
        run = _run_trial(site, row, tell, despite_alarm)
        reports = read_screens(run.result["screens"])
    except RejectedError as error:
        _conclude_if_about_packet(site, row, error)
        raise
    finally:
        close_opened(site, packet_id)
    alarmed = next((report for report in reports if report.alarms), None)
    site.store.add_packet_facts(
        packet_id,
        screens=[show_screen(report) for report in reports],
        spectrum=spectrum_facts(reports[0]),
        overridden=alarmed is not None and despite_alarm,
    )
    if alarmed is not None and not despite_alarm:
        _conclude(site, row, "quarantined", alarmed.reason, QUARANTINED)
        raise RejectedError(QUARANTINED, alarmed.reason)
    report = TrialReport.from_json(run.result["report"])
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
        tried_on=run.conditions,
        report=run.result["report"],
        fit=run.result["fit"],
        trial_network=run.result["network"],
    )
    if decision.outcome is not Outcome.KEEP:
        reason = f"the gate said no: {decision.reason}"
        _conclude(site, row, "reverted", reason)
        return figures
    despite = f"; tried despite an alarm: {alarmed.reason}" if alarmed else ""
    reason = f"gain confirmed at dose {decision.dose:g}; waits for keep or revert{despite}"
    with site.store.transaction():
        # The last screen is the one of the dose that would be kept.
        if reports[-1].dose == decision.dose:
            name = combination(run.model, run.stack, (packet_id, decision.dose))
            remember(site, name, reports[-1], overridden=alarmed is not None)
        site.store.move_packet(packet_id, [row.state], "trialled", reason)
    if site.policy().receive.automatic_keep and alarmed is None:
        keep_packet(site, packet_id)
    return figures


def _begin(site: Site, packet_id: str, despite_alarm: bool) -> PacketRow:
    """The packet in a state that nobody can keep it from while its trial runs.

    Raises:
        RejectedError: AG-SIT-004 if it can not be tried.
    """
    row = site.store.packet(packet_id)
    can_try = row.state in {"verified", "trialled", "reverted"} or is_screened_out(row)
    if row.role != "recipient" or not can_try:
        raise RejectedError("AG-SIT-004", f"packet {packet_id} is {row.state}")
    reason = "being tried again"
    if despite_alarm:
        reason = "an operator decided to try it despite any alarm of the screens"
    # A trial replaces the attachment and the figures that a keep would rely on.
    if despite_alarm or row.state in {"trialled", "quarantined"}:
        site.store.move_packet(packet_id, [row.state], "verified", reason)
    return site.store.packet(packet_id)


def _run_trial(site: Site, row: PacketRow, tell: Progress, despite_alarm: bool) -> _Run:
    tell({"stage": "verifying again"})
    sealed, statement = admit_stored(site, row)
    payload = open_sealed(site, sealed, statement)
    model = site.store.model(row.model)
    stack = site.store.attachments(model.name)
    rules = site.policy().receive
    task = {
        "task": "try",
        "model": str(model.path),
        "model_digest": model_base(model).weights_digest,
        "device": site.settings.device,
        "stack": [str(entry.path) for entry in stack],
        "kind": statement.kind,
        "payload": str(payload),
        "facts": dict(statement.facts),
        "base_digest": statement.base.weights_digest,
        "bases": model_paths(site),
        "packet_id": row.packet_id,
        "data": str(model.data),
        "retention": str(model.retention),
        "max_documents": site.settings.trial_documents,
        "min_gain": rules.min_gain,
        "max_retention_loss": rules.max_retention_loss,
        "attachment": str(site.packet_path(row.packet_id, "attachment")),
        "despite_alarm": despite_alarm,
        "bank": bank_of(site, row, model),
        **screen_inputs(site),
    }
    result = site.runner.run(f"trial-{row.packet_id}", task, tell)
    return _Run(result, model, stack, _conditions_digest(model, stack, rules))


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
            again, AG-SIT-021 if this very combination was not screened, and the codes of
            `admission.admit_stored`. A code about the packet refuses it; after any other it waits
            in its state.
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
        code, cause = _keep_if_tried(site, packet_id, rules)
        if code:
            site.store.move_packet(packet_id, ["trialled"], "verified", cause, code)
            if rules.automatic_trial:
                site.store.add_job("heavy", "trial", packet_id)
    if code:
        raise RejectedError(code, cause)


def _keep_if_tried(site: Site, packet_id: str, rules: ReceivePolicy) -> tuple[str, str]:
    """Attach it, or tell the code and cause why not; call inside a transaction."""
    row = site.store.packet(packet_id)
    model = site.store.model(row.model)
    stack = site.store.attachments(model.name)
    if row.facts.get("tried_on") != _conditions_digest(model, stack, rules):
        return "AG-SIT-016", (
            f"{model.name}, its attachments or the gate's limits changed since the trial"
        )
    dose = row.facts["trial"]["dose"]
    found = site.store.screened(combination(model, stack, (packet_id, dose)))
    if found is None or (found.verdict == Verdict.ALARM and not found.overridden):
        return "AG-SIT-021", f"{model.name} with this packet at dose {dose:g} was not screened"
    reason = f"attached to {model.name} at dose {dose:g}"
    site.store.move_packet(packet_id, ["trialled"], "kept", reason)
    path = site.packet_path(packet_id, "attachment")
    site.store.push_attachment(packet_id, model.name, path, dose)
    add_to_bank(site, row, model)
    answer(site, row, "kept")
    return "", ""


def revert_packet(site: Site, packet_id: str, tell: Progress) -> Mapping[str, Any]:
    """Take a kept packet back out, and show that no bit of it is left; or decline a tried one.

    Raises:
        RejectedError: AG-SIT-004 for another state, AG-EVA-003 if the model was not restored.
        UnavailableError: AG-SIT-007 if the worker died.
    """
    row = site.store.packet(packet_id)
    if row.role != "recipient" or row.state not in {"kept", "trialled"}:
        raise RejectedError("AG-SIT-004", f"packet {packet_id} is {row.state}")
    if row.state == "trialled":
        _conclude(site, row, "reverted", "declined after its trial; nothing was attached")
        return {"attached": False}
    model = site.store.model(row.model)
    others = [a for a in site.store.attachments(model.name) if a.packet_id != packet_id]
    attachment = site.packet_path(packet_id, "attachment")
    task = {
        "task": "revert",
        "model": str(model.path),
        "model_digest": model_base(model).weights_digest,
        "device": site.settings.device,
        "stack": [str(entry.path) for entry in others],
        "attachment": str(attachment),
        "data": str(model.data),
        "max_documents": site.settings.trial_documents,
    }
    result = site.runner.run(f"revert-{packet_id}", task, tell)
    with site.store.transaction():
        site.store.drop_attachment(packet_id)
        site.store.drop_spectrum(packet_id)
        queue_screen(site, model.name)
        site.store.add_packet_facts(packet_id, bit_exact=result["bit_exact"])
        reason = "taken out again; state and logits are bit-equal to before"
        site.store.move_packet(packet_id, ["kept"], "reverted", reason)
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
        site.store.drop_spectrum(packet_id)
        if was_kept:
            queue_screen(site, row.model)
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
