# SPDX-License-Identifier: Apache-2.0
"""The one door through which a payload may leave: mode, policy, dossier and approvals together.

`check_release` is the only maker of `Release`, and the sealing step asks for one. A Release names
the exact payload digests and the exact recipients, so it cannot be carried over to other bytes or
to another audience. Everything is judged afresh at the moment of release: an approval given under
a policy that has since become stricter does not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import InitVar, dataclass

from allograft.errors import RejectedError
from allograft.privacy.dossier import (
    Approval,
    Dossier,
    GateVerdict,
    PayloadPart,
    check_evidence,
)
from allograft.privacy.identifiers import LIST_FIGURE
from allograft.privacy.modes import AdmittedMode, Mode, admit_mode
from allograft.privacy.policy import Policy

#: Gates whose PASS each mode needs. A mode that is not listed cannot be released.
REQUIRED_GATES = {
    Mode.OPEN: ("G0", "G2", "G6"),
    Mode.MEASURED: ("G0", "G2", "G3", "G4", "G5", "G6", "G7"),
    Mode.STRICT: ("G0", "G1", "G2", "G3", "G4", "G5", "G6", "G7"),
}

_MADE_HERE = object()


@dataclass(frozen=True, slots=True)
class Release:
    """Permission to seal one payload for named recipients; made by `check_release` only.

    Attributes:
        packet_id: The packet.
        kind: Its kind.
        parts: The approved payload files with their digests.
        recipients: The sites it may be sealed to.
        mode: The privacy mode it was made under.
        policy_digest: The policy that allowed it.
        dossier_digest: The evidence it rests on.
    """

    packet_id: str
    kind: str
    parts: tuple[PayloadPart, ...]
    recipients: tuple[str, ...]
    mode: Mode
    policy_digest: str
    dossier_digest: str
    # An InitVar, so that neither a caller nor dataclasses.replace() can carry it over.
    made_by: InitVar[object]

    def __post_init__(self, made_by: object) -> None:
        if made_by is not _MADE_HERE:
            raise TypeError("a Release is made by check_release only")


def check_release(
    mode: AdmittedMode,
    policy: Policy,
    dossier: Dossier,
    approvals: Sequence[Approval],
    recipients: Sequence[str],
) -> Release:
    """Decide whether a payload may be sealed for some recipients.

    Args:
        mode: The admitted mode of the donation.
        policy: The site's policy as it is now.
        dossier: The packet's dossier (its signature verified, or made by this site).
        approvals: Approvals whose signatures were verified.
        recipients: The sites to seal for.

    Raises:
        RejectedError: AG-PRV-003 or -004 the policy forbids it, AG-PRV-010 to -012 the mode does,
            AG-PRV-016 the text gate ran without the identifier list that the policy demands,
            AG-PRV-020 a gate is missing or did not pass, AG-PRV-030 the dossier belongs to
            something else, AG-PRV-031 an approval is missing.
    """
    admitted = admit_mode(str(mode.mode), mode.declaration)
    if dossier.mode != admitted:
        raise RejectedError("AG-PRV-030", "the dossier was made under another mode or declaration")
    size = sum(part.size_bytes for part in dossier.parts)
    policy.check_donation(str(admitted.mode), dossier.kind, size)
    if dossier.conditions_digest != policy.conditions_digest:
        raise RejectedError("AG-PRV-030", "the policy's conditions changed since the dossier")
    _check_gates(admitted.mode, dossier)
    listed = any(LIST_FIGURE in dict(g.figures) for g in dossier.gates if g.name == "G2")
    policy.check_identifier_list(str(admitted.mode), listed)
    _check_approvals(policy, dossier, approvals)
    audience = tuple(sorted(set(recipients)))
    if not audience:
        raise RejectedError("AG-PRV-004", "a release names no recipient")
    policy.check_recipients(audience)
    check_evidence(dossier)
    return Release(
        packet_id=dossier.packet_id,
        kind=dossier.kind,
        parts=dossier.parts,
        recipients=audience,
        mode=admitted.mode,
        policy_digest=policy.digest,
        dossier_digest=dossier.digest,
        made_by=_MADE_HERE,
    )


def _check_gates(mode: Mode, dossier: Dossier) -> None:
    names = [gate.name for gate in dossier.gates]
    if len(set(names)) != len(names):
        raise RejectedError("AG-PRV-020", "a gate is reported twice")
    missing = [name for name in REQUIRED_GATES[mode] if name not in names]
    if missing:
        raise RejectedError("AG-PRV-020", f"gate {missing[0]} did not run")
    for gate in dossier.gates:
        if gate.verdict is not GateVerdict.PASS:
            raise RejectedError("AG-PRV-020", f"gate {gate.name}: {gate.verdict}: {gate.reason}")


def _check_approvals(policy: Policy, dossier: Dossier, approvals: Sequence[Approval]) -> None:
    if set(dossier.approvals_required) != set(policy.donate.approvals):
        raise RejectedError("AG-PRV-030", "the dossier asks for other approvals than the policy")
    agreed = {
        approval.role
        for approval in approvals
        if approval.packet_id == dossier.packet_id
        and approval.dossier_digest == dossier.digest
        and approval.parts == dossier.parts
    }
    missing = sorted(set(policy.donate.approvals) - agreed)
    if missing:
        raise RejectedError("AG-PRV-031", f"no valid approval by role {', '.join(missing)}")
