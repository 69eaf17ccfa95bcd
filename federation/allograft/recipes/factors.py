# SPDX-License-Identifier: Apache-2.0
"""A change of a matrix as a sum of quantised directions: how many, how fine, and back again.

A direction is scale · left right, with whole numbers in left and right. Directions are the singular
ones of the change, in the order of their singular values. Which matrix gets how many follows from
one rule over all of them: the next byte goes where it buys the most energy (squared Frobenius norm
of the change). With 4 bits the same rule decides which leading directions are worth 8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from allograft.packet.delta import Integers

_SCALE_BYTES = 4

#: Share of a direction's energy that 4 bits lose: .022 to .028 on Gaussian vectors of 64 to 14,336
#: entries, against less than .0002 that 8 bits lose (measured).
_NARROW_LOSS = 0.025

#: Parts of the largest entry that 4 bits may span; what lies beyond is clipped. At 4,096 entries
#: spanning all of it would lose .047 of the energy (measured).
_SPANS = (1.0, 0.9, 0.8, 0.7, 0.6)


@dataclass(frozen=True, slots=True, eq=False)
class Directions:
    """The leading part of a singular value decomposition, in float32.

    Attributes:
        left: [rank, rows], of length one.
        values: [rank], not negative, in descending order.
        right: [rank, columns], of length one.
        energy: Squared norm of the matrix, of the directions left out too.
    """

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor
    energy: float


def decompose(change: torch.Tensor) -> Directions:
    """The directions of a matrix [rows, columns], as many as could be worth their bytes.

    More would take more numbers than the matrix itself has. Computed where the matrix is; the
    result is on the CPU.
    """
    left, values, right = torch.linalg.svd(change.to(torch.float32), full_matrices=False)
    rows, columns = change.shape
    most = min(len(values), -(-rows * columns // (rows + columns)))
    energy = float((values.double() ** 2).sum())
    # Copies, so that the rest of the decomposition can be freed.
    left, values, right = (
        part[:most].contiguous().to("cpu", copy=True) for part in (left.T, values, right)
    )
    return Directions(left, values, right, energy)


def allocate(
    directions: Mapping[str, Directions], bits: int, budget_bytes: int, energy: float
) -> dict[str, tuple[int, int]]:
    """How many directions of each matrix to keep in 8 and in 4 bits.

    No other choice of at most the bytes that were spent when the first step did not fit has more
    energy: within a matrix each step buys less per byte than the one before.

    Args:
        directions: Of each matrix.
        bits: 8, or 4 with 8 for those leading directions that are worth it.
        budget_bytes: Most bytes of all directions; 0 lets `energy` decide.
        energy: Share of the matrices' energy at which to stop, without a budget.
    """
    names = sorted(directions)
    steps = [_steps(directions[name], bits) for name in names]
    gains, costs = (np.concatenate([step[part] for step in steps]) for part in (0, 1))
    owners = np.repeat(np.arange(len(names)), [len(step[0]) for step in steps])
    widens = np.concatenate([step[2] for step in steps])
    taken = np.zeros((len(names), 2), dtype=int)  # directions; of them widened to 8 bits
    left = float(budget_bytes) if budget_bytes else np.inf
    missing = np.inf if budget_bytes else energy * sum(d.energy for d in directions.values())
    # Stable, so that equal steps of one matrix stay in their order.
    for step in np.argsort(-gains / costs, kind="stable"):
        if missing <= 0.0 or gains[step] <= 0.0:
            break
        owner = owners[step]
        whole, wide = taken[owner]
        # One that did not fit leaves no room for a later one of its kind, but maybe for others.
        if costs[step] > left or (widens[step] and wide == whole):
            continue
        taken[owner, int(widens[step])] += 1
        left -= costs[step]
        missing -= gains[step]
    wides = taken[:, 0] if bits == 8 else taken[:, 1]
    return {
        name: (int(wide), int(whole - wide))
        for name, whole, wide in zip(names, taken[:, 0], wides, strict=True)
    }


def direction_bytes(rows: int, columns: int, bits: int) -> int:
    """What a direction takes in the payload."""
    return Integers(bits, rows + columns).row_bytes + _SCALE_BYTES


def pack(directions: Directions, ranks: tuple[int, int]) -> dict[str, torch.Tensor]:
    """The leading directions as the tensors of a payload, by the endings of their names.

    Values are rounded to the nearest; a scale is the one of least squared error.

    Args:
        directions: Of one matrix.
        ranks: How many to keep in 8 and, after them, in 4 bits.
    """
    wide, count = ranks[0], sum(ranks)
    packed: dict[str, torch.Tensor] = {}
    scales = []
    for bits, part in ((8, slice(0, wide)), (4, slice(wide, count))):
        if part.start == part.stop:
            continue
        left, left_fit = _round(directions.left[part], bits)
        right, right_fit = _round(directions.right[part], bits)
        scales.append(directions.values[part] * left_fit * right_fit)
        numbers = torch.cat([left, right], dim=1)
        packed[f"int{bits}"] = numbers if bits == 8 else _join_halves(numbers)
    if scales:
        packed["scale"] = torch.cat(scales)
    return packed


def unpack(
    packed: Mapping[str, torch.Tensor], rows: int, columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 factors [rank, rows], scaled, and [rank, columns], from what `pack` returned."""
    return unpack_left(packed, 0, rows), unpack_right(packed, rows, columns)


def unpack_left(packed: Mapping[str, torch.Tensor], first: int, last: int) -> torch.Tensor:
    """The part of `unpack`'s first factor for some rows, without turning the rest into floats."""
    return _unpack_part(packed, first, last) * packed["scale"].to(torch.float32)[:, None]


def unpack_right(packed: Mapping[str, torch.Tensor], rows: int, columns: int) -> torch.Tensor:
    """The second factor of `unpack`, without the first."""
    return _unpack_part(packed, rows, rows + columns)


def squared_norm(left: torch.Tensor, right: torch.Tensor) -> float:
    """Squared Frobenius norm of leftᵀ right, from [rank, rows] and [rank, columns]."""
    left, right = left.double(), right.double()
    return max(float(((left @ left.T) * (right @ right.T)).sum()), 0.0)


def draw_noise(
    packed: Mapping[str, torch.Tensor], generator: torch.Generator, rows: int, columns: int
) -> dict[str, torch.Tensor]:
    """Random directions, as many and as fine, whose sum has the norm of a packed change."""
    wide, narrow = (len(packed.get(name, ())) for name in ("int8", "int4"))
    before = squared_norm(*unpack(packed, rows, columns))
    values = packed["scale"].to(torch.float32)
    drawn = Directions(
        torch.randn(wide + narrow, rows, generator=generator),
        values,
        torch.randn(wide + narrow, columns, generator=generator),
        before,
    )
    noise = pack(drawn, (wide, narrow))
    after = squared_norm(*unpack(noise, rows, columns))
    noise["scale"] = (noise["scale"] * (before / max(after, 1e-30)) ** 0.5).to(packed["scale"])
    return noise


def turn(
    packed: Mapping[str, torch.Tensor],
    rows: int,
    columns: int,
    rotation: torch.Tensor,
    right: bool = False,
) -> dict[str, torch.Tensor]:
    """A packed change, multiplied by a rotation and rounded again.

    Args:
        packed: What `pack` returned.
        rows: Of the matrix.
        columns: Of the matrix.
        rotation: [rows, rows], or [columns, columns] if it turns what the matrix reads.
        right: Whether it does.
    """
    wide, narrow = (len(packed.get(name, ())) for name in ("int8", "int4"))
    one, other = _unpack_part(packed, 0, rows), _unpack_part(packed, rows, rows + columns)
    if right:
        other = other @ rotation
    else:
        one = one @ rotation
    values = packed["scale"].to(torch.float32)
    energy = squared_norm(one * values[:, None], other)
    turned = pack(Directions(one, values, other, energy), (wide, narrow))
    return turned | {"scale": turned["scale"].to(packed["scale"])}


def _steps(directions: Directions, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Energy, bytes and kind (widening or not) of every step that a matrix offers."""
    values = (directions.values.double() ** 2).numpy()
    sizes = (directions.left.shape[1], directions.right.shape[1])
    wide, narrow = direction_bytes(*sizes, 8), direction_bytes(*sizes, 4)
    if bits == 8:
        return values, np.full(len(values), wide), np.zeros(len(values), dtype=bool)
    gains = np.concatenate([values * (1 - _NARROW_LOSS), values * _NARROW_LOSS])
    costs = np.repeat([narrow, wide - narrow], len(values))
    return gains, costs, np.repeat([False, True], len(values))


def _round(rows: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers of each row, and the factor that brings numbers / largest closest to it."""
    largest = 127 if bits == 8 else 7
    peaks = rows.abs().amax(dim=1, keepdim=True).clamp(min=1e-30)
    best = torch.zeros_like(rows)
    kept = torch.full((len(rows), 1), -1.0)
    for span in _SPANS if bits == 4 else _SPANS[:1]:
        numbers = torch.round(rows / (peaks * span) * largest).clamp(-largest, largest)
        squares = (numbers**2).sum(1, keepdim=True).clamp(min=1e-30)
        # What a row keeps of its squared length when projected on its numbers.
        share = (rows * numbers).sum(1, keepdim=True) ** 2 / squares
        best = torch.where(share > kept, numbers, best)
        kept = torch.maximum(kept, share)
    fit = (rows * best).sum(1) / (best**2).sum(1).clamp(min=1e-30) * largest
    return best.to(torch.int8), fit


def _unpack_part(packed: Mapping[str, torch.Tensor], first: int, last: int) -> torch.Tensor:
    """Some of each direction's numbers as floats of at most one, [rank, last - first]."""
    numbers = []
    if "int8" in packed:
        numbers.append(packed["int8"][:, first:last].to(torch.float32) / 127)
    if "int4" in packed:
        # Two numbers to a byte: the part may begin in the middle of one.
        halves = _split_halves(packed["int4"][:, first // 2 : (last + 1) // 2])
        skipped = first % 2
        numbers.append(halves[:, skipped : skipped + last - first].to(torch.float32) / 7)
    return torch.cat(numbers)


def _join_halves(numbers: torch.Tensor) -> torch.Tensor:
    if numbers.shape[1] % 2:
        numbers = torch.nn.functional.pad(numbers, (0, 1))
    bits = numbers.view(torch.uint8) & 0x0F
    return bits[:, ::2] | (bits[:, 1::2] << 4)


def _split_halves(packed: torch.Tensor) -> torch.Tensor:
    halves = torch.stack([packed & 0x0F, packed >> 4], dim=2).flatten(1)
    numbers = halves.to(torch.int8)
    return torch.where(numbers > 7, numbers - 16, numbers)
