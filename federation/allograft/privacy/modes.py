# SPDX-License-Identifier: Apache-2.0
"""Privacy modes: what is promised about the data that a packet learnt from.

`open` promises nothing about privacy: it is for data that somebody, by role, declares to be public
or synthetic, and that declaration travels in the signed dossier. `measured` promises that audits
of leakage ran and found no more than the policy allows, which bounds nothing. `strict` promises
differential privacy for every person. A mode whose needs are not met refuses; none falls back to
something weaker.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from allograft.errors import RejectedError

_ROLE = re.compile(r"[a-z][a-z0-9-]{0,62}")


class Mode(StrEnum):
    """The three modes of the design."""

    OPEN = "open"
    MEASURED = "measured"
    STRICT = "strict"


class Nature(StrEnum):
    """What data under the open mode may be."""

    PUBLIC = "public"
    SYNTHETIC = "synthetic"


@dataclass(frozen=True, slots=True)
class Declaration:
    """Who says that the data needs no protection, and why.

    Attributes:
        nature: Public or synthetic.
        declared_by: The role that says so (never a person's name).
    """

    nature: Nature
    declared_by: str


@dataclass(frozen=True, slots=True)
class AdmittedMode:
    """A mode that was checked together with what it needs; made by `admit_mode`.

    Only `open` has a declaration: nothing that a person declares could stand for a measurement.
    """

    mode: Mode
    declaration: Declaration | None


def declare(nature: str, declared_by: str) -> Declaration:
    """Make a declaration from what a person or a file states.

    Raises:
        RejectedError: AG-PRV-012.
    """
    if nature not in tuple(Nature):
        raise RejectedError("AG-PRV-012", "the data is declared neither public nor synthetic")
    if not _ROLE.fullmatch(declared_by):
        raise RejectedError("AG-PRV-012", "the declaring role is missing or not a role name")
    return Declaration(Nature(nature), declared_by)


def admit_mode(name: str, declaration: Declaration | None) -> AdmittedMode:
    """Check that a packet can be made under a mode.

    Raises:
        RejectedError: AG-PRV-010 unknown mode, AG-PRV-012 a declaration is missing where `open`
            needs it, or given for another mode.
    """
    if name not in tuple(Mode):
        raise RejectedError("AG-PRV-010", "the mode is none of open, measured, strict")
    mode = Mode(name)
    if mode is not Mode.OPEN:
        if declaration is not None:
            raise RejectedError("AG-PRV-012", f"mode {mode} is for data that needs protection")
        return AdmittedMode(mode, None)
    if declaration is None:
        raise RejectedError("AG-PRV-012", "nobody declared the data public or synthetic")
    return AdmittedMode(mode, declare(declaration.nature, declaration.declared_by))
