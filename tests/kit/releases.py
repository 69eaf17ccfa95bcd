# SPDX-License-Identifier: Apache-2.0
"""A donor at the point of release: policy, dossier and approvals that belong together."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from allograft.privacy.claim import PrivacyClaim
from allograft.privacy.dossier import (
    Approval,
    Dossier,
    GateResult,
    GateVerdict,
    PayloadPart,
    Software,
    approve,
)
from allograft.privacy.dp import DpConstants
from allograft.privacy.egress import AllowedTensor, hash_file
from allograft.privacy.modes import AdmittedMode, Mode, admit_mode, declare
from allograft.privacy.policy import Policy, parse_policy
from allograft.privacy.release import REQUIRED_GATES, Release, check_release

PACKET = "5" * 32
TIME = "2026-11-23T08:00:00Z"
POLICY = b"""
version = 1
[donate]
modes = ["open"]
kinds = ["organ"]
recipients = ["hospital-b", "hospital-d"]
approvals = ["data-owner", "privacy-officer"]
"""
ALLOWED = {
    "blocks.0.a.weight": AllowedTensor((64, 32), 1.0),
    "blocks.0.norm.weight": AllowedTensor((32,), 10.0),
}


STRICT = PrivacyClaim(
    plan_digest="b" * 64,
    constants=DpConstants(0.01, 1.0, 500, 0.5, 10.0, 1e-6, 4),
    epsilon=2.5,
    epsilon_domain=5.0,
    filter_order=4.0,
    noise="chacha20",
    accountant="dp-accounting 0.6.0 rdp",
    ledger_head="c" * 64,
    ledger_entries=4,
)
MEASURED = replace(STRICT, constants=None, epsilon=None, epsilon_domain=None, noise="")


def passed(name: str) -> GateResult:
    figure = "identifier-list" if name == "G2" else "files"
    return GateResult(name, "1", GateVerdict.PASS, ((figure, 1.0),), 3)


@dataclass
class Desk:
    """Everything that `check_release` looks at; fields may be replaced before `release`."""

    policy: Policy = field(default_factory=lambda: parse_policy(POLICY))
    mode: AdmittedMode = field(
        default_factory=lambda: admit_mode("open", declare("synthetic", "data-owner"))
    )
    parts: tuple[PayloadPart, ...] = (PayloadPart("organ.safetensors", 10, "a" * 64),)
    recipients: tuple[str, ...] = ("hospital-b",)

    def __post_init__(self) -> None:
        self.dossier = Dossier(
            packet_id=PACKET,
            kind="organ",
            mode=self.mode,
            parts=self.parts,
            gates=(passed("G0"), passed("G2"), passed("G6")),
            policy_digest=self.policy.digest,
            conditions_digest=self.policy.conditions_digest,
            approvals_required=("data-owner", "privacy-officer"),
            software=(Software("allograft", "0.1.0"),),
            created=TIME,
        )
        self.approvals = self.approve_all()

    @classmethod
    def under(cls, mode: str, **fields: object) -> Desk:
        """A desk for a packet of mode `strict` or `measured`."""
        policy = parse_policy(POLICY.replace(b'["open"]', b'["strict", "measured"]'))
        desk = cls(policy=policy, mode=admit_mode(mode, None), **fields)
        desk.change_dossier(
            gates=tuple(passed(name) for name in REQUIRED_GATES[Mode(mode)]),
            privacy=STRICT if mode == "strict" else MEASURED,
            report_digest="d" * 64,
        )
        return desk

    def change_dossier(self, **changes: object) -> None:
        """Change the dossier and have it approved again, as a careless donor would."""
        self.dossier = replace(self.dossier, **changes)
        self.approvals = self.approve_all()

    def approve_all(self) -> list[Approval]:
        return [approve(self.dossier, role, TIME) for role in self.dossier.approvals_required]

    def release(self) -> Release:
        return check_release(self.mode, self.policy, self.dossier, self.approvals, self.recipients)


def write_extract(path: Path, seed: int = 1, **extra: np.ndarray) -> dict[str, np.ndarray]:
    """What a recipe would leave: float32 tensors written by the ordinary library."""
    generator = np.random.default_rng(seed)
    tensors = {
        name: generator.normal(0, 0.05, allowed.shape).astype(np.float32)
        for name, allowed in ALLOWED.items()
    } | extra
    save_file(tensors, path)
    return tensors


def part_of(path: Path) -> PayloadPart:
    return PayloadPart(path.name, path.stat().st_size, hash_file(path))
