# SPDX-License-Identifier: Apache-2.0
"""The demo's story, told with the real commands and daemons that a consortium uses.

Every step is a command that a person could type. The one exception is `hostile`, which plays an
attacker who holds the coordinator's key.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from allograft.cli.demo.base import OwnFiles, World, WorldOptions, make_world
from allograft.cli.demo.consortium import Consortium, SiteHome
from allograft.cli.demo.hostile import HostileCoordinator, tamper
from allograft.cli.demo.processes import (
    Daemons,
    at_once,
    read_error,
    run_command,
    run_json,
)
from allograft.cli.demo.report import (
    Audit,
    Foreign,
    PacketFigures,
    Report,
    Revert,
    SiteOutcome,
    Tampered,
)
from allograft.cli.demo.stages import Stages
from allograft.cli.demo.watch import await_receipts, await_state, await_that
from allograft.crypto.keystore import read_signing_key
from allograft.errors import RejectedError

DONOR, SAME, RELATIVE, STRANGER = "oakfield", "rivermead", "hillcrest", "farshore"
ROLES = {
    DONOR: "donor",
    SAME: "same base",
    RELATIVE: "further-trained descendant",
    STRANGER: "independent model of the same shape",
}
_COMMAND_S = 2.5  # where each look is a command of its own, and the machine has work to do
_FINAL = {"kept", "reverted", "refused", "quarantined"}


@dataclass(frozen=True, slots=True)
class PlayOptions:
    """A person's own files, what the donor trains, and the seed."""

    base: Path | None = None
    data: Path | None = None
    general: Path | None = None
    declare: str = "public"
    recipe: str = "organ"
    steps: int = 140
    seed: int = 0


def play(directory: Path, options: PlayOptions, console: Console) -> Report:
    """Run the whole story in an empty directory.

    Raises:
        RejectedError: A command refused what it should have accepted (AG-DEM-001), or accepted
            what it should have refused (AG-DEM-004).
        UnavailableError: Something did not start or end in time (AG-DEM-002, -003).
    """
    started_s = time.monotonic()
    stages = Stages(console)
    (directory / "logs").mkdir()
    with Daemons(directory / "logs") as daemons:
        consortium = _found(directory, stages, daemons)
        # Ten processes start meanwhile; that is most of a minute of one processor.
        world = _make_world(directory, options, stages)
        _settle_in(consortium, world, stages)
        packet_id = _donate(consortium, world, options, stages)
        _send(consortium, packet_id, stages)
        outcomes = _await_outcomes(consortium, packet_id, stages)
        tampered = _attack(directory, consortium, packet_id, stages)
        foreign = _open_with_foreign_key(directory, consortium, packet_id, stages)
        revert = _revert(consortium, packet_id, outcomes, stages)
        audit = verify_log(directory, consortium, stages)
        packet = _packet_figures(consortium.sites[DONOR], packet_id)
    seconds = round(time.monotonic() - started_s, 1)
    return Report(seconds, packet, outcomes, tampered, foreign, revert, audit)


def _make_world(directory: Path, options: PlayOptions, stages: Stages) -> World:
    chosen = WorldOptions(
        base=options.base, data=options.data, general=options.general, seed=options.seed
    )
    title = "Training the models that the sites start with"
    if options.base is not None:
        title = "Preparing a relative of your model and your text"
    with stages.stage(title) as stage:
        world = make_world(directory / "world", chosen, stage.note)
    return world if world.nature else replace(world, nature=options.declare)


def _found(directory: Path, stages: Stages, daemons: Daemons) -> Consortium:
    with stages.stage("Founding a consortium: keys, roster, coordinator, four sites") as stage:
        consortium = Consortium(directory, daemons, tuple(ROLES))
        consortium.found(stage.note)
    stages.say("Keys were made where they stay. The roster is signed by 2 of 3 offline root keys.")
    return consortium


def _settle_in(consortium: Consortium, world: World, stages: Stages) -> None:
    files = {
        DONOR: (world.base, OwnFiles(world.donor_data, world.donor_retention)),
        SAME: (world.base, world.same_files),
        RELATIVE: (world.descendant, world.descendant_files),
        STRANGER: (world.stranger, world.stranger_files),
    }
    with stages.stage("Each site adds its own model, text and policy"):
        at_once(
            partial(consortium.sites[name].settle_in, model, own)
            for name, (model, own) in files.items()
        )
    for name, role in ROLES.items():
        stages.say(f"{name}: {role}")


def _donate(consortium: Consortium, world: World, options: PlayOptions, stages: Stages) -> str:
    donor = consortium.sites[DONOR]
    with stages.stage(f"{DONOR} trains an {options.recipe} on its own text and gates it") as stage:
        packet_id = donor.donate(world, options.recipe, options.steps, options.seed)
        row = await_state(consortium, donor, packet_id, {"awaiting-approval"}, stage.note)
    gates = ", ".join(str(gate["name"]) for gate in row["facts"].get("gates", ()))
    stages.say(f"Packet {packet_id[:12]}… built. Gates passed: {gates}.")
    with stages.stage(f"{DONOR} approves; the coordinator looks for recipients") as stage:
        donor.command("approve", packet_id, "--role", "operator")
        row = await_state(consortium, donor, packet_id, {"routed", "dispatched"}, stage.note)
    for proposal in row["facts"].get("proposals", ()):
        stages.say(f"{proposal['site']}: {proposal['verdict']}, {proposal['reason']}")
    return packet_id


def _send(consortium: Consortium, packet_id: str, stages: Stages) -> None:
    donor = consortium.sites[DONOR]
    with stages.stage(f"{DONOR} seals the packet for three sites and dispatches it"):
        recipients = [flag for name in (SAME, RELATIVE, STRANGER) for flag in ("--to", name)]
        donor.command("dispatch", packet_id, *recipients)
    stages.say("Encrypted once; its key wrapped for each recipient. The coordinator holds no key.")


def _await_outcomes(
    consortium: Consortium, packet_id: str, stages: Stages
) -> Mapping[str, SiteOutcome]:
    recipients = (SAME, RELATIVE, STRANGER)
    with stages.stage("Delivered, verified, tried and decided at each recipient") as stage:
        rows = {
            name: await_state(consortium, consortium.sites[name], packet_id, _FINAL, stage.note)
            for name in recipients
        }
        # The donor learns what became of its packet from signed receipts.
        donor = await_receipts(
            consortium, consortium.sites[DONOR], packet_id, set(recipients), stage.note
        )
    outcomes = {DONOR: SiteOutcome("own", str(donor["state"]), "made, gated and sealed it here")}
    return outcomes | {name: outcome_of(row) for name, row in rows.items()}


def outcome_of(row: Mapping[str, Any]) -> SiteOutcome:
    """How a packet ended at a recipient, from what the site's own command shows."""
    facts = row["facts"]
    trial = facts.get("trial") or {}
    reason = str(row["reason"])
    if row["code"]:
        reason = f"{row['code']}: {reason}"
    return SiteOutcome(
        verdict=str(facts.get("verdict", "unverified")),
        state=str(row["state"]),
        reason=reason,
        gain=trial.get("gain"),
        gain_low=trial.get("gain_low"),
        null_gain=trial.get("null_gain"),
        retention_change=trial.get("retention_change"),
        dose=trial.get("dose") if row["state"] == "kept" else None,
    )


def _attack(directory: Path, consortium: Consortium, packet_id: str, stages: Stages) -> Tampered:
    """Deliver a copy with one flipped bit to a site that keeps the packet's original."""
    site = consortium.sites[RELATIVE]
    with stages.stage("A hostile coordinator delivers a copy with one flipped bit") as stage:
        copy = directory / "tampered"
        tamper(site.sealed_packet(packet_id), copy)
        key = read_signing_key(consortium.coordinator_state / "keys" / "signing.pem")
        hostile = HostileCoordinator(consortium.coordinator_id, key)
        hostile.deliver(copy, site.name, site.socket)
        found = await_that(
            consortium,
            lambda: ("arriving", site.extras(packet_id) or None),
            stage.note,
            _COMMAND_S,
        )
    state, code, reason = (str(found[0][name]) for name in ("state", "code", "reason"))
    if state != "quarantined" or code == "AG-SIT-010":
        raise RejectedError("AG-DEM-004", f"the tampered copy ended {state} with {code}")
    stages.say(f"{site.name} quarantined it: {code}, {reason}")
    return Tampered(state, code)


def _open_with_foreign_key(
    directory: Path, consortium: Consortium, packet_id: str, stages: Stages
) -> Foreign:
    """Try to open a real sealed packet with the keys of a site it was not sealed to."""
    with stages.stage("An outsider tries to open the sealed packet with its own key"):
        outsider = SiteHome("outsider", directory / "outsider", consortium)
        outsider.make_keys()
        outcome = run_command(
            [
                "allograft", "packet", "open",
                str(consortium.sites[SAME].sealed_packet(packet_id)),
                "--roster", str(consortium.published),
                "--key", str(outsider.state / "keys" / "sealing.key"),
                "--out", str(directory / "stolen"),
                "--format", "json",
            ]
        )  # fmt: skip
    if outcome.returncode == 0 or (directory / "stolen").exists():
        raise RejectedError("AG-DEM-004", "a packet opened with a key it was not sealed to")
    code, cause = read_error(outcome)
    if code not in {"AG-PKT-008", "AG-SEA-002"}:
        # Refused for another reason, such as a wrong option: that would prove nothing.
        raise RejectedError("AG-DEM-001", f"packet open with a foreign key: {code}: {cause}")
    stages.say(f"Refused: {code}, {cause}")
    return Foreign(code)


def _revert(
    consortium: Consortium,
    packet_id: str,
    outcomes: Mapping[str, SiteOutcome],
    stages: Stages,
) -> Revert:
    """Take the organ out where it was kept, and compare state and logits with before."""
    if outcomes[SAME].state != "kept":
        stages.say(f"{SAME} did not keep the packet, so there is nothing to take out.")
        return Revert(bit_exact=False)
    with stages.stage(f"{SAME} takes the kept packet out again") as stage:
        stage.note("comparing every weight and logit")
        answer = consortium.sites[SAME].command("revert", packet_id, timeout_s=600.0)
    return Revert(bit_exact=answer.get("bit_exact") is True)


def verify_log(directory: Path, consortium: Consortium, stages: Stages) -> Audit:
    """Export the log and verify it without the coordinator."""
    with stages.stage("The log is exported and verified offline") as stage:
        stage.note("waiting until the last receipt is witnessed")
        export = directory / "audit"
        state = str(consortium.coordinator_state)
        run_json(
            [
                "allograft", "audit", "export", "--state", state, "--out", str(export),
                "--wait-s", "60",
            ]
        )  # fmt: skip
        outcome = run_json(["allograft", "audit", "verify", str(export)])
    entries, witnesses = outcome["entries"], outcome["witnesses"]
    assert isinstance(entries, int)
    return Audit(
        entries=entries,
        verified=True,
        witnesses=len(witnesses) if isinstance(witnesses, list) else int(str(witnesses)),
    )


def _packet_figures(donor: SiteHome, packet_id: str) -> PacketFigures:
    row = donor.packet(packet_id)
    facts = row["facts"]
    sealed = facts["dispatches"][-1]["sealed_bytes"]
    return PacketFigures(packet_id, str(row["kind"]), int(facts["payload_bytes"]), int(sealed))
