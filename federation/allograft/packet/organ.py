# SPDX-License-Identifier: Apache-2.0
"""The tensors of an organ, worked out from its signed facts and the shapes of its base.

With 16 bits every parameter of a block travels as it is. With 8, a matrix travels as the change of
what its training began from: one whole number from -127 to 127 for each entry, and for each row the
entry that 127 stands for. Free of tensor libraries. See protos/spec/recipes.md, "Organ".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from allograft.packet.delta import Integers

#: 16: values in the wire's floating-point format. 8: changes of matrices in whole numbers.
ORGAN_BITS = frozenset({8, 16})

INTEGERS, SCALE = ".int8", ".scale"


@dataclass(frozen=True, slots=True)
class OrganTensor:
    """One tensor of a payload; `parameter` is the one of the block that it is a part of."""

    parameter: str
    shape: tuple[int, ...]
    integers: Integers | None = None


def organ_layout(parameters: Mapping[str, tuple[int, ...]], bits: int) -> dict[str, OrganTensor]:
    """The tensors of a payload by name, from the shapes of its blocks' parameters."""
    found: dict[str, OrganTensor] = {}
    for name, shape in parameters.items():
        if bits == 16 or len(shape) != 2:
            found[name] = OrganTensor(name, shape)
        else:
            found[name + INTEGERS] = OrganTensor(name, shape, Integers(8, shape[1]))
            found[name + SCALE] = OrganTensor(name, shape[:1])
    return found
