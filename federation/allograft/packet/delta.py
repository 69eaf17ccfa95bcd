# SPDX-License-Identifier: Apache-2.0
"""The tensors of a delta, worked out from its signed facts and the shapes of its base.

A delta changes matrices of a base by sums of *directions*: a direction is the product of a column
and a row of small whole numbers, times one scale. How many directions each matrix has stands in the
facts, so the donor's guard and every recipient know each name, shape and type of the payload before
they read it. Free of tensor libraries. See protos/spec/recipes.md, "Delta".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from allograft.crypto import canonical
from allograft.errors import RejectedError

#: Matrices outside the blocks that a delta may change; `head` only where it is not the embedding.
EMBEDDING, HEAD = "embedding", "head"

#: For each matrix, by its name inside a block, and each block: directions in 8 and in 4 bits.
Ranks = Mapping[str, tuple[tuple[int, int], ...]]


@dataclass(frozen=True, slots=True)
class Integers:
    """Rows of whole numbers that are symmetric about zero.

    Eight bits are two's complement from -127 to 127. Of four bits, from -7 to 7, two are in a byte,
    the earlier one in its low half; the last half of an odd row is zero. What two's complement
    could hold beyond that is refused, so that no value has a second spelling.

    Attributes:
        bits: 8 or 4.
        width: Numbers in a row.
    """

    bits: int
    width: int

    @property
    def dtype(self) -> str:
        """The element type in the file, as safetensors spells it."""
        return "I8" if self.bits == 8 else "U8"

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return -(-self.width * self.bits // 8)

    def check(self, rows: bytes | memoryview) -> None:
        """Refuse values out of range in any number of whole rows.

        Raises:
            RejectedError: AG-PKT-027.
        """
        values = np.frombuffer(rows, dtype=np.uint8).reshape(-1, self.row_bytes)
        if self.bits == 8:
            bad = bool((values == 0x80).any())
        else:
            low, high = values & 0x0F, values >> 4
            bad = bool((low == 8).any() or (high == 8).any())
            bad = bad or (self.width % 2 == 1 and bool(high[:, -1].any()))
        if bad:
            raise RejectedError("AG-PKT-027", f"a number is not one of {self.bits} bits")


@dataclass(frozen=True, slots=True)
class DeltaTensor:
    """One tensor of a payload.

    Attributes:
        target: The tensor of the base that it changes: `blocks.{n}.{name}`, `embedding`, `head`.
        integers: Absent for scales and for changes of vectors, which are floating point.
    """

    target: str
    shape: tuple[int, ...]
    integers: Integers | None = None


@dataclass(frozen=True, slots=True)
class DeltaLayout:
    """What decides the tensors of a delta, beside its base.

    Attributes:
        ranks: As `Ranks`; a matrix that is not named does not change.
        vectors: Whether every vector of every block changes too (gains and biases).
    """

    ranks: Ranks
    vectors: bool

    def tensors(self, targets: Mapping[str, tuple[int, ...]]) -> dict[str, DeltaTensor]:
        """The tensors of the payload, by name.

        Args:
            targets: Shape of everything in the base that a delta may change, by target, blocks in
                order.

        Raises:
            RejectedError: AG-PKT-028 if the ranks do not fit.
        """
        found: dict[str, DeltaTensor] = {}
        for target, (wide, narrow) in self._by_target(targets).items():
            rows, columns = targets[target]
            if wide + narrow > min(rows, columns):
                raise RejectedError("AG-PKT-028", f"{target} has more directions than it can")
            for bits, count in ((8, wide), (4, narrow)):
                form = Integers(bits, rows + columns)
                if count:
                    found[f"{target}.int{bits}"] = DeltaTensor(
                        target, (count, form.row_bytes), form
                    )
            if wide + narrow:
                found[f"{target}.scale"] = DeltaTensor(target, (wide + narrow,))
        if self.vectors:
            for target, shape in targets.items():
                if len(shape) == 1:
                    found[f"{target}.change"] = DeltaTensor(target, shape)
        if not found:
            raise RejectedError("AG-PKT-028", "a delta that changes nothing")
        return found

    def _by_target(self, targets: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
        matrices = group_matrices(targets)
        found: dict[str, tuple[int, int]] = {}
        for name, ranks in self.ranks.items():
            if len(matrices.get(name, ())) != len(ranks):
                raise RejectedError("AG-PKT-028", "a delta names matrices that its base lacks")
            found.update(zip(matrices[name], ranks, strict=True))
        return found

    def to_json(self) -> dict[str, canonical.Json]:
        """The part of the facts that `read_delta_layout` reads."""
        ranks: dict[str, canonical.Json] = {
            name: [[wide, narrow] for wide, narrow in pairs] for name, pairs in self.ranks.items()
        }
        return {"ranks": ranks, "vectors": self.vectors}


def group_matrices(targets: Mapping[str, tuple[int, ...]]) -> dict[str, list[str]]:
    """The targets that are matrices, by their name inside a block, in the order of the blocks."""
    found: dict[str, list[str]] = {}
    for target, shape in targets.items():
        if len(shape) == 2:
            name = target if target in {EMBEDDING, HEAD} else target.split(".", 2)[2]
            found.setdefault(name, []).append(target)
    return found


def read_delta_layout(facts: Mapping[str, canonical.Json]) -> DeltaLayout:
    """Read the layout in the facts of a `delta` statement; other facts are ignored.

    Raises:
        RejectedError: AG-PKT-028 if malformed.
    """
    try:
        ranks = {
            name: tuple(_read_pair(pair) for pair in canonical.as_list(pairs))
            for name, pairs in canonical.as_mapping(facts.get("ranks")).items()
        }
        return DeltaLayout(ranks, canonical.as_bool(facts.get("vectors")))
    except RejectedError as error:
        raise RejectedError("AG-PKT-028", f"ranks of a delta: {error.cause}") from error


def _read_pair(value: canonical.Json) -> tuple[int, int]:
    pair = canonical.as_list(value)
    if len(pair) != 2:
        raise RejectedError("AG-PKT-028", "a matrix has directions in 8 and in 4 bits")
    wide, narrow = (canonical.as_int(count) for count in pair)
    return wide, narrow
