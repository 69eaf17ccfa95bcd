# SPDX-License-Identifier: Apache-2.0
"""Jobs: what the command line asked for and what arrivals cause, done one at a time per lane.

The light lane answers mail (routes, receipts, approvals, dispatches); the heavy lane runs workers.
Invariant: a job can be repeated after a kill without doing anything twice; a refusal ends it with
a code that stays visible; what is merely unavailable puts it back in the queue.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import structlog

from allograft.crypto import canonical
from allograft.errors import AllograftError, RejectedError, UnavailableError
from allograft.limits import LIMITS
from allograft.packet.container import read_document
from allograft.provenance.ancestry import Ancestor, write_ancestors
from allograft.provenance.statement import Parent, read_licence
from allograft.routing.withdrawal import verify_withdrawal
from allograft_client import dispatcher, donor, recipient, screens, trial
from allograft_client.plan import DonationPlan
from allograft_client.protected import end_protected
from allograft_client.rows import AttachmentRow, ItemRow, JobRow, ModelRow
from allograft_client.runner import Progress
from allograft_client.site import Site, model_ancestors, model_base
from allograft_client.store import Lane, now_text

_IDLE_S = 0.3
_RETRY_S = 5.0
_ATTEMPTS = 5  # of a job whose worker dies; a full disk is waited for without end

Handler = Callable[[Site, JobRow, Progress], Mapping[str, Any] | None]


def run_lane(site: Site, lane: Lane, stopped: threading.Event) -> None:
    """Do the jobs of a lane until told to stop; while the store fails, wait for it."""
    log = structlog.get_logger("jobs").bind(name=lane)
    job: JobRow | None = None
    failure: AllograftError | None = None
    while not stopped.is_set():
        try:
            if job is not None and failure is not None:
                _settle(site, job, failure)
            job = site.store.next_job(lane)
            if job is None:
                stopped.wait(_IDLE_S)
            elif not run_job(site, job):
                stopped.wait(_RETRY_S)
            job, failure = None, None
        except AllograftError as error:
            if failure is None:  # told once, however long the disk stays full
                log.error("lane-waits", code=error.code, cause=error.cause)
            failure = error
            stopped.wait(_RETRY_S)
    site.store.close()


def _settle(site: Site, job: JobRow, failure: AllograftError) -> None:
    """End a job whose own end could not be recorded."""
    if isinstance(failure, RejectedError):
        site.store.fail_job(job.number, failure.code, failure.cause)
    else:
        # Every job can be repeated, so it is.
        site.store.requeue_job(job.number, failure.code, failure.cause)


def run_job(site: Site, job: JobRow) -> bool:
    """Do one job; False if it was put back because something is unavailable."""
    log = structlog.get_logger("jobs").bind(job=job.number, kind=job.kind, packet=job.subject)
    log.info("job-started")

    def tell(progress: Mapping[str, Any]) -> None:
        site.store.set_progress(job.number, progress)

    try:
        result = HANDLERS[job.kind](site, job, tell)
    except UnavailableError as error:
        if error.code == "AG-SIT-007" and job.attempts >= _ATTEMPTS:
            log.error("job-given-up", code=error.code, cause=error.cause)
            _fail(site, job, error)
            return True
        log.warning("job-postponed", code=error.code, cause=error.cause)
        site.store.requeue_job(job.number, error.code, error.cause)
        return False
    except RejectedError as error:
        log.warning("job-refused", code=error.code, cause=error.cause)
        _fail(site, job, error)
    except Exception as error:  # noqa: BLE001  (the daemon's main loop: one bad job must not end it)
        log.error("job-crashed", code="AG-SIT-007", cause=type(error).__name__)
        _fail(site, job, RejectedError("AG-SIT-007", f"stopped by {type(error).__name__}"))
    else:
        site.store.finish_job(job.number, result)
        log.info("job-done")
    return True


def _fail(site: Site, job: JobRow, error: AllograftError) -> None:
    item = site.store.find_item(job.subject, "in") if job.kind == "take-in" else None
    if item is not None:
        # Before the job ends: a kill in between repeats the job, which then finds no files.
        recipient.drop_item(site, item, error)
    if job.kind == "donate":
        _end_plan(site, job, error)
    with site.store.transaction():
        site.store.fail_job(job.number, error.code, error.cause)
        if job.kind == "donate":
            # A gate or the policy refused, or the run cannot be repeated as planned.
            refused = error.code.startswith("AG-PRV-")
            state = "refused" if refused else "failed"
            site.store.move_packet(job.subject, ["training"], state, error.cause, error.code)
        elif job.kind == "take-in":
            site.store.move_item(job.subject, "done", "refused", error.code)
        elif job.kind == "trial" and site.store.packet(job.subject).state == "verified":
            # It stays where it was, and says why.
            site.store.move_packet(job.subject, ["verified"], "verified", error.cause, error.code)


def _end_plan(site: Site, job: JobRow, error: AllograftError) -> None:
    try:
        end_protected(site, job.subject, DonationPlan.from_json(dict(job.arguments)), error)
    except AllograftError as failure:
        # Nothing is lost: what a plan reserved stays spent, whether or not its end is recorded.
        log = structlog.get_logger("jobs").bind(job=job.number)
        log.error("plan-not-ended", code=failure.code, cause=failure.cause)


def _take_in(site: Site, job: JobRow, tell: Progress) -> None:
    """Look at an item that arrived whole."""
    row = site.store.find_item(job.subject, "in")
    if row is None:
        raise RejectedError("AG-SIT-003", "no such item")
    if row.item.kind == "packet":
        recipient.take_packet(site, row, tell)
        return
    _SMALL[row.item.kind](site, row)
    site.inbox.remove(row)


def _document(site: Site, row: ItemRow, name: str, most: int = LIMITS.json_document_bytes) -> bytes:
    return read_document(site.inbox.check_files(row) / name, most)


def _take_roster(site: Site, row: ItemRow) -> None:
    site.trust.take_roster(_document(site, row, "roster.json", LIMITS.roster_bundle_bytes))


def _take_route(site: Site, row: ItemRow) -> None:
    dispatcher.take_route(site, _document(site, row, "route.json"))


def _take_receipt(site: Site, row: ItemRow) -> None:
    dispatcher.take_receipt(site, _document(site, row, "receipt.json"))


def _take_withdrawal(site: Site, row: ItemRow) -> None:
    envelope = _document(site, row, "withdrawal.json")
    withdrawal = verify_withdrawal(envelope, site.trust.roster(), site.now())
    packet = site.store.packet(withdrawal.packet_id)
    if packet.role != "recipient" or packet.donor != withdrawal.donor:
        raise RejectedError("AG-SIT-012", "a withdrawal of a packet that its signer did not give")
    trial.recall_packet(site, packet.packet_id)


_SMALL: Mapping[str, Callable[[Site, ItemRow], None]] = {
    "roster": _take_roster,
    "route": _take_route,
    "receipt": _take_receipt,
    "withdrawal": _take_withdrawal,
}


def _add_model(site: Site, job: JobRow, tell: Progress) -> Mapping[str, Any]:
    arguments = job.arguments
    task = {
        "task": "describe",
        "model": arguments["path"],
        "device": site.settings.device,
        "data": arguments["data"],
        "retention": arguments["retention"],
    }
    facts = dict(site.runner.run(f"describe-{job.number}", task, tell))
    facts["parents"] = _known_parents(site, facts)
    site.store.put_model(
        ModelRow(
            job.subject,
            site.home.root / arguments["path"],
            site.home.root / arguments["data"],
            site.home.root / arguments["retention"],
            facts,
            now_text(),
        )
    )
    return {"model": job.subject, "weights_digest": facts["base"]["weights_digest"]}


def _known_parents(site: Site, facts: Mapping[str, Any]) -> list[canonical.Json]:
    """What the record beside a model says is in it, and what this site remembers of its weights."""
    beside = list(facts.get("parents", []))
    remembered = site.store.ancestry(facts["base"]["weights_digest"])
    return beside + [entry for entry in remembered if entry not in beside]


def _donate(site: Site, job: JobRow, tell: Progress) -> Mapping[str, Any]:
    state = site.store.packet(job.subject).state
    if state == "training":
        donor.donate(site, job.subject, DonationPlan.from_json(dict(job.arguments)), tell)
        dispatcher.offer_packet(site, job.subject)
    return {"packet_id": job.subject, "state": site.store.packet(job.subject).state}


def _check_list(site: Site) -> None:
    """Refuse at once where the identifier list is missing: a person asked, and can ask again.

    Put back into the queue, the job would stand before the mail that recalls a packet.
    """
    try:
        _ = site.identifier_list
    except UnavailableError as error:
        raise RejectedError(error.code, error.cause) from error


def _approve(site: Site, job: JobRow, _tell: Progress) -> Mapping[str, Any]:
    _check_list(site)
    arguments = job.arguments
    despite = bool(arguments.get("despite_warnings", False))
    warnings = dispatcher.approve_packet(site, job.subject, arguments["role"], despite)
    row = site.store.packet(job.subject)
    return {"packet_id": job.subject, "state": row.state, "warnings": list(warnings)}


def _dispatch(site: Site, job: JobRow, tell: Progress) -> Mapping[str, Any]:
    _check_list(site)
    tell({"stage": "sealing"})
    arguments = job.arguments
    return dispatcher.dispatch_packet(
        site, job.subject, arguments["dispatch_id"], arguments["sites"]
    )


def _withdraw(site: Site, job: JobRow, _tell: Progress) -> Mapping[str, Any]:
    dispatcher.withdraw_packet(site, job.subject)
    return {"packet_id": job.subject, "state": "withdrawn"}


def _trial(site: Site, job: JobRow, tell: Progress) -> Mapping[str, Any]:
    # A retrial that the site queues by itself never carries an earlier decision along.
    despite = bool(job.arguments.get("despite_alarm", False))
    figures = trial.try_packet(site, job.subject, tell, despite)
    return {"packet_id": job.subject, "state": site.store.packet(job.subject).state, **figures}


def _keep(site: Site, job: JobRow, _tell: Progress) -> Mapping[str, Any]:
    trial.keep_packet(site, job.subject)
    return {"packet_id": job.subject, "state": "kept"}


def _revert(site: Site, job: JobRow, tell: Progress) -> Mapping[str, Any]:
    result = trial.revert_packet(site, job.subject, tell)
    return {"packet_id": job.subject, "state": "reverted", **result}


def _export(site: Site, job: JobRow, tell: Progress) -> Mapping[str, Any]:
    model = site.store.model(job.subject)
    stack = site.store.attachments(model.name)
    merging = job.arguments["format"] == "merged"
    for entry in stack:
        if merging and not site.store.packet(entry.packet_id).facts.get("merge"):
            raise RejectedError(
                "AG-SIT-018", f"packet {entry.packet_id[:12]} does not permit merging"
            )
    task = {
        "task": "export",
        "model": str(model.path),
        "device": "cpu",
        "stack": [str(entry.path) for entry in stack],
        "format": job.arguments["format"],
        "out": job.arguments["out"],
        "model_digest": model_base(model).weights_digest,
        "donors": {e.packet_id: site.store.packet(e.packet_id).donor for e in stack},
        "parents": _ancestors(site, model, stack) if merging else [],
    }
    result = site.runner.run(f"export-{job.number}", task, tell)
    if merging and task["parents"]:
        # So that the snapshot is known even if it comes back without the record beside it.
        site.store.put_ancestry(result["weights_digest"], task["parents"])
    return {**result, "attachments": len(stack)}


def _ancestors(site: Site, model: ModelRow, stack: Sequence[AttachmentRow]) -> list[canonical.Json]:
    """The packets that a merged snapshot will hold, with their licences."""
    added = []
    for entry in stack:
        facts = site.store.packet(entry.packet_id).facts
        try:
            licence = read_licence(facts["licence"])
            digest = str(facts["statement_sha256"])
        except KeyError as error:
            # Kept by an older version: a new take-in records what it lacks.
            raise RejectedError(
                "AG-SIT-004", f"packet {entry.packet_id[:12]} lacks its licence; take it in again"
            ) from error
        added.append(Ancestor(Parent(entry.packet_id, digest), licence))
    return write_ancestors((*model_ancestors(model), *added))


def _screen(site: Site, job: JobRow, tell: Progress) -> Mapping[str, Any]:
    return {"model": job.subject, **screens.screen_model(site, job.subject, tell)}


def _scale(site: Site, job: JobRow, tell: Progress) -> Mapping[str, Any]:
    """Learn the doses of a model's attachments together; the files say which ones hold."""
    result = site.runner.run(f"scale-{job.number}", _compose(site, job), tell)
    with site.store.transaction():
        for packet_id, dose in result["doses"].items():
            site.store.set_attachment_dose(packet_id, dose)
        screens.queue_screen(site, job.subject)
    return {"model": job.subject, **result}


def _route(site: Site, job: JobRow, tell: Progress) -> Mapping[str, Any]:
    """How requests like the site's own documents would be routed; changes nothing."""
    result = site.runner.run(f"route-{job.number}", _compose(site, job), tell)
    return {"model": job.subject, **result}


def _compose(site: Site, job: JobRow) -> dict[str, Any]:
    model, rules = site.store.model(job.subject), site.policy().receive
    stack = site.store.attachments(model.name)
    if not stack:
        raise RejectedError("AG-SIT-003", f"nothing is attached to {model.name}")
    return {
        "task": job.kind,
        "model": str(model.path),
        "model_digest": model_base(model).weights_digest,
        "device": site.settings.device,
        "stack": [str(entry.path) for entry in stack],
        "data": str(model.data),
        "retention": str(model.retention),
        "max_documents": site.settings.trial_documents,
        "min_gain": rules.min_gain,
        "max_retention_loss": rules.max_retention_loss,
        "apply": bool(job.arguments.get("apply")),
    }


def _item_refused(site: Site, job: JobRow, _tell: Progress) -> None:
    """The coordinator will never take an item of ours: say so where an operator looks."""
    row = site.store.find_item(job.subject, "out")
    if row is None or not row.packet_id or row.item.kind not in {"offer", "dispatch"}:
        return
    reason = f"the coordinator refused the {row.item.kind}"
    before = ["offered"] if row.item.kind == "offer" else ["dispatched"]
    after = "failed" if row.item.kind == "offer" else "routed"
    if site.store.packet(row.packet_id).state in before:
        site.store.move_packet(row.packet_id, before, after, reason, row.code)


HANDLERS: Mapping[str, Handler] = {
    "take-in": _take_in,
    "item-refused": _item_refused,
    "add-model": _add_model,
    "donate": _donate,
    "approve": _approve,
    "dispatch": _dispatch,
    "withdraw": _withdraw,
    "trial": _trial,
    "keep": _keep,
    "revert": _revert,
    "export": _export,
    "screen": _screen,
    "scale": _scale,
    "route": _route,
}
