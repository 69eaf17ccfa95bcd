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
from pathlib import Path

from allograft.crypto import canonical
from allograft.errors import RejectedError
from allograft.plainfile import read_plain

_FORMAT = "allograft-report-v1"
_FIELDS = {"format", "packet_id", "salt", "figures", "exposure", "roc", "budget", "people"}
_POINTS = 2000
_REPORT_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Point:
    """A point of a curve."""

    x: float
    y: float


@dataclass(frozen=True, slots=True)
class Exposed:
    """A person whom the packet knows best, by the site's own id.

    Attributes:
        person: The id in the data.
        saved: Nats per token that the packet saves on the person's text.
        extractable: Passages of this person alone that come back within few tries.
        recognised: Whether the membership attack finds the person.
    """

    person: str
    saved: float
    extractable: int
    recognised: bool

    def to_json(self) -> canonical.Json:
        """The person as a JSON array."""
        return [self.person, self.saved, self.extractable, self.recognised]

    @classmethod
    def from_json(cls, value: canonical.Json) -> Exposed:
        """Read a person.

        Raises:
            RejectedError: AG-IN-003 or AG-PRV-030 if malformed.
        """
        entry = canonical.as_list(value)
        if len(entry) != 4:
            raise RejectedError("AG-PRV-030", "a person has not four fields")
        return cls(
            person=canonical.as_text(entry[0]),
            saved=canonical.as_number(entry[1]),
            extractable=canonical.as_int(entry[2]),
            recognised=canonical.as_bool(entry[3]),
        )


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
        people: Whom the packet knows best, worst first.
    """

    packet_id: str
    salt: str
    figures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    exposure: tuple[Point, ...] = ()
    roc: tuple[Point, ...] = ()
    budget: tuple[Point, ...] = ()
    people: tuple[Exposed, ...] = ()

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
                "people": [who.to_json() for who in self.people],
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
                people=tuple(map(Exposed.from_json, canonical.as_list(fields["people"]))),
            )
        except RejectedError as error:
            raise RejectedError("AG-PRV-030", f"report: {error.cause}") from error


def read_report(path: Path) -> FullReport:
    """Read a report from its file.

    Raises:
        OSError: It cannot be opened.
        RejectedError: AG-PRV-030 if malformed, AG-IN-002 if too large.
    """
    return FullReport.from_bytes(read_plain(path, _REPORT_BYTES))


def _points(value: canonical.Json) -> tuple[Point, ...]:
    entries = canonical.as_list(value)
    if len(entries) > _POINTS:
        raise RejectedError("AG-PRV-030", "a curve has too many points")
    pairs = [canonical.as_list(entry) for entry in entries]
    if any(len(pair) != 2 for pair in pairs):
        raise RejectedError("AG-PRV-030", "a point has not two numbers")
    return tuple(Point(canonical.as_number(x), canonical.as_number(y)) for x, y in pairs)
