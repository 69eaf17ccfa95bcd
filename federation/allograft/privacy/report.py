# SPDX-License-Identifier: Apache-2.0
"""The full report of a packet's audits, which stays at the site.

It holds what a dossier must not: figures that depend on real people, such as how often an attack
recognises them. The dossier names its digest, so that the site can later show that this is the
report its people decided by. Random salt keeps the digest from confirming a guess.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from allograft.crypto import canonical
from allograft.errors import RejectedError

_FORMAT = "allograft-report-v1"
_FIELDS = {"format", "packet_id", "salt", "figures", "exposure", "roc", "budget"}
_POINTS = 2000


@dataclass(frozen=True, slots=True)
class Point:
    """A point of a curve."""

    x: float
    y: float


@dataclass(frozen=True, slots=True)
class FullReport:
    """Everything the audits found.

    Attributes:
        packet_id: The packet.
        salt: 64 random hex digits.
        figures: By gate, by name.
        exposure: Repeats of a planted text, and the median exposure in bits.
        roc: False-positive rate of the best membership attack, and its true-positive rate.
        budget: Number of the ledger's entry, and the domain's ε after it.
    """

    packet_id: str
    salt: str
    figures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    exposure: tuple[Point, ...] = ()
    roc: tuple[Point, ...] = ()
    budget: tuple[Point, ...] = ()

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        return canonical.dumps(
            {
                "format": _FORMAT,
                "packet_id": self.packet_id,
                "salt": self.salt,
                "figures": {gate: dict(named) for gate, named in self.figures.items()},
                "exposure": [[point.x, point.y] for point in self.exposure],
                "roc": [[point.x, point.y] for point in self.roc],
                "budget": [[point.x, point.y] for point in self.budget],
            }
        )

    @property
    def digest(self) -> str:
        """SHA-256 (hex); the dossier names it."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @classmethod
    def from_bytes(cls, content: bytes) -> FullReport:
        """Read a report.

        Raises:
            RejectedError: AG-PRV-030 if malformed.
        """
        try:
            fields = canonical.as_object(canonical.loads(content), _FIELDS)
            if fields["format"] != _FORMAT:
                raise RejectedError("AG-PRV-030", "the report has an unknown format")
            figures = {
                gate: {n: canonical.as_number(v) for n, v in canonical.as_mapping(named).items()}
                for gate, named in canonical.as_mapping(fields["figures"]).items()
            }
            return cls(
                packet_id=canonical.as_text(fields["packet_id"]),
                salt=canonical.as_text(fields["salt"]),
                figures=figures,
                exposure=_points(fields["exposure"]),
                roc=_points(fields["roc"]),
                budget=_points(fields["budget"]),
            )
        except RejectedError as error:
            raise RejectedError("AG-PRV-030", f"report: {error.cause}") from error


def _points(value: canonical.Json) -> tuple[Point, ...]:
    entries = canonical.as_list(value)
    if len(entries) > _POINTS:
        raise RejectedError("AG-PRV-030", "a curve has too many points")
    pairs = [canonical.as_list(entry) for entry in entries]
    if any(len(pair) != 2 for pair in pairs):
        raise RejectedError("AG-PRV-030", "a point has not two numbers")
    return tuple(Point(canonical.as_number(x), canonical.as_number(y)) for x, y in pairs)
