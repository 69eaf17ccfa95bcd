# SPDX-License-Identifier: Apache-2.0
"""The packets inside a model's weights, as the file `allograft.json` beside them.

A merged snapshot is an ordinary model; nothing in its weights says whose packets it holds. So the
export writes this file, `model add` reads it, and a donation from that model names the packets as
its parents. The parents count whatever the weights beside the file are by now: a model trained on
further still holds them. Sans-IO. See protos/spec/screens.md, "Parents".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from allograft.crypto import canonical
from allograft.errors import RejectedError
from allograft.provenance.statement import (
    Licence,
    Parent,
    read_licence,
    read_parent,
    write_licence,
    write_parent,
)

FILE_NAME = "allograft.json"

_PARENTS = 64  # as in a packet statement


@dataclass(frozen=True, slots=True)
class Ancestor:
    """A packet inside a model, with what its donor permits."""

    parent: Parent
    licence: Licence


@dataclass(frozen=True, slots=True)
class Ancestry:
    """What a merged snapshot was made of.

    Attributes:
        base: Weights digest (hex) of the model that the packets were attached to.
        ancestors: The packets, those already inside that model included.
    """

    base: str
    ancestors: tuple[Ancestor, ...]

    def to_bytes(self) -> bytes:
        """The file's content, as canonical JSON."""
        return canonical.dumps(
            {"v": 1, "base": self.base, "parents": write_ancestors(self.ancestors)}
        )

    @classmethod
    def from_bytes(cls, content: bytes) -> Ancestry:
        """Read the file.

        Raises:
            RejectedError: AG-PRO-012 if malformed: a record that cannot be read is no licence.
        """
        try:
            fields = canonical.as_object(canonical.loads(content), {"v", "base", "parents"})
            if fields["v"] != 1:
                raise RejectedError("AG-PRO-012", "unknown version")
            return cls(canonical.as_sha256(fields["base"]), read_ancestors(fields["parents"]))
        except RejectedError as error:
            raise RejectedError("AG-PRO-012", f"{FILE_NAME}: {error.cause}") from error


def write_ancestors(ancestors: Iterable[Ancestor]) -> list[canonical.Json]:
    """Packets inside a model as JSON."""
    return [
        {**write_parent(entry.parent), "licence": write_licence(entry.licence)}
        for entry in ancestors
    ]


def read_ancestors(value: canonical.Json) -> tuple[Ancestor, ...]:
    """Read the packets inside a model.

    Raises:
        RejectedError: AG-IN-003 or AG-PRO-012 if malformed.
    """
    entries = canonical.as_list(value)
    if len(entries) > _PARENTS:
        raise RejectedError("AG-PRO-012", f"{len(entries)} packets, at most {_PARENTS}")
    found = []
    for entry in entries:
        fields = canonical.as_object(entry, {"packet_id", "statement_sha256", "licence"})
        parent = {name: value for name, value in fields.items() if name != "licence"}
        found.append(Ancestor(read_parent(parent), read_licence(fields["licence"])))
    return tuple(found)
