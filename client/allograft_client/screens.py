# SPDX-License-Identifier: Apache-2.0
"""Which combinations of attachments this site has screened, and what follows from an alarm.

Invariant: what is kept on a model was screened together, at its doses and on its base, or everyone
who looks sees that it was not. Each part of a planted behaviour can be harmless by itself (arXiv
2408.07362 and MergeBackdoor, USENIX Security 2025), so a combination that loses a packet is another
combination.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from allograft.errors import RejectedError
from allograft.evaluate.screen import ScreenReport, Verdict, combination_digest, write_spectrum
from allograft.plainfile import read_plain
from allograft_client.rows import AttachmentRow, ModelRow, PacketRow
from allograft_client.runner import Progress
from allograft_client.site import Site, model_base

QUARANTINED = "AG-SIT-020"

_SEED = "screen-seed"
_TEMPLATES = "templates.txt"
_FILE_BYTES = 64 << 10
_LINES = 200


def is_screened_out(row: PacketRow) -> bool:
    """Whether a packet is quarantined because of a screen; its sealed files are still here."""
    return row.state == "quarantined" and row.code == QUARANTINED


def screen_inputs(site: Site) -> dict[str, Any]:
    """What a worker needs for the screens besides the model.

    The seed is drawn once and stays here: a donor that knew the sweep could train around it. The
    site's own templates are the lines of `templates.txt` in the state directory.

    Raises:
        RejectedError: AG-SIT-001 if that file is unreadable or too long.
    """
    if not site.store.setting(_SEED):
        site.store.set_setting(_SEED, str(secrets.randbelow(1 << 31)))
    return {"screen_seed": int(site.store.setting(_SEED)), "templates": _own_templates(site)}


def _own_templates(site: Site) -> list[str]:
    try:
        content = read_plain(site.home.path(_TEMPLATES), _FILE_BYTES).decode("utf-8")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        cause = f"{_TEMPLATES}: {type(error).__name__}"
        raise RejectedError("AG-SIT-001", cause) from error
    lines = [line.strip() for line in content.splitlines() if line.strip()]
    if len(lines) > _LINES:
        raise RejectedError("AG-SIT-001", f"{_TEMPLATES}: more than {_LINES} lines")
    return lines


def combination(model: ModelRow, stack: Sequence[AttachmentRow], *more: tuple[str, float]) -> str:
    """The name of a model with its stack and possibly one packet more at a dose."""
    entries = [(entry.packet_id, entry.dose) for entry in stack]
    return combination_digest(model_base(model).weights_digest, [*entries, *more])


def read_screens(value: Sequence[Any]) -> tuple[ScreenReport, ...]:
    """The screens of a trial, as the worker reported them; at least one.

    Raises:
        RejectedError: AG-EVA-005 if malformed or none.
    """
    reports = tuple(ScreenReport.from_json(entry) for entry in value)
    if not reports:
        raise RejectedError("AG-EVA-005", "a trial without screens")
    return reports


def show_screen(report: ScreenReport) -> dict[str, Any]:
    """A report in short, for the packet's facts and the command line."""
    return {
        "verdict": str(report.verdict),
        "reason": report.reason,
        "dose": report.dose,
        "rules": report.version,
        "seconds": report.seconds,
        "screens": [
            {
                "name": result.name,
                "verdict": str(result.verdict),
                "reason": result.reason,
                "figures": dict(result.figures),
                "worst": list(result.worst),
            }
            for result in report.results
        ],
    }


def remember(site: Site, name: str, report: ScreenReport, overridden: bool = False) -> None:
    """Record what was found in a combination."""
    site.store.put_screened(name, str(report.verdict), overridden, show_screen(report))


def add_to_bank(site: Site, row: PacketRow, model: ModelRow) -> None:
    """Let a kept packet's weights count as usual; call inside the transaction that keeps it.

    A packet kept despite an alarm teaches the bank nothing.
    """
    if row.facts.get("overridden") or not row.facts.get("spectrum"):
        return
    base = model_base(model).weights_digest
    site.store.put_spectrum(row.packet_id, base, row.kind, row.facts["spectrum"])


def bank_of(site: Site, row: PacketRow, model: ModelRow) -> list[Any]:
    """Figures of the packets kept earlier on the same base, of the same kind."""
    base = model_base(model).weights_digest
    return list(site.store.spectra(base, row.kind, but=row.packet_id))


def spectrum_facts(report: ScreenReport) -> dict[str, Any]:
    """A packet's own figures as they wait for its keep."""
    return write_spectrum(report.spectrum)


def describe_combination(site: Site, model: ModelRow) -> dict[str, Any]:
    """How the present combination of a model stands: its verdict, or that nobody screened it."""
    stack = site.store.attachments(model.name)
    if not stack:
        return {"verdict": "PLAIN", "reason": "nothing is attached"}
    found = site.store.screened(combination(model, stack))
    if found is None:
        return {"verdict": "UNSCREENED", "reason": "this combination was not screened"}
    return {
        "verdict": found.verdict,
        "reason": found.report["reason"],
        "overridden": found.overridden,
        "time": found.time,
    }


def queue_screen(site: Site, model_name: str) -> bool:
    """Queue the screens of what remains on a model, if it is a combination nobody screened."""
    model = site.store.model(model_name)
    if describe_combination(site, model)["verdict"] != "UNSCREENED":
        return False
    if not site.store.has_open_job("screen", model_name):
        site.store.add_job("heavy", "screen", model_name)
    return True


def screen_model(site: Site, model_name: str, tell: Progress) -> Mapping[str, Any]:
    """Screen what is kept on a model, as it is composed now.

    Raises:
        RejectedError: AG-SIT-022 if a screen alarms: the attachments stay, and the model shows it
            until a person reverts one. AG-SIT-021 if the stack changed meanwhile.
        UnavailableError: AG-SIT-007 if the worker died.
    """
    model = site.store.model(model_name)
    stack = site.store.attachments(model_name)
    if not stack:
        return describe_combination(site, model)
    name = combination(model, stack)
    task = {
        "task": "screen",
        "model": str(model.path),
        "model_digest": model_base(model).weights_digest,
        "device": site.settings.device,
        "stack": [str(entry.path) for entry in stack],
        **screen_inputs(site),
    }
    result = site.runner.run(f"screen-{model_name}", task, tell)
    report = ScreenReport.from_json(result["screen"])
    remember(site, name, report)
    if queue_screen(site, model_name):
        raise RejectedError("AG-SIT-021", f"{model_name} changed while it was screened")
    if report.verdict is Verdict.ALARM:
        raise RejectedError("AG-SIT-022", report.reason)
    return describe_combination(site, model)
