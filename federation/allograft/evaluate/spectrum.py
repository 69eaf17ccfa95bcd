# SPDX-License-Identifier: Apache-2.0
"""How much and in which shape a packet changes each kind of matrix of its base.

For an adapter the change is scale x B A; its singular values come from the small factors, and the
product is never formed (DoRA's change is no such product and is weighed whole). A delta's
directions are unpacked to such factors. For an organ it is each tensor less what training began
from: the source block, silenced (see recipes.md). Against the unsilenced block the two output
projections would show the base's own weights, not what was learnt. Seeded; runs on the model's
device.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from allograft.evaluate.screen import ModuleFigures
from allograft.recipes.base import Attachment
from allograft.recipes.controls import starting_point
from allograft.recipes.delta import delta_places, packed_directions
from allograft.recipes.factors import unpack
from allograft.recipes.facts import (
    DeltaFacts,
    ExpertFacts,
    LoraFacts,
    ModuleGraftFacts,
    OrganFacts,
)
from allograft.recipes.lora import changes_of
from allograft.recipes.patch import LowRank, make_dense, original_value

_LEADING = 16  # singular values that are computed; the rest is known by its sum only
_OVERSAMPLE = 8
_POWER_PASSES = 2
_ROWS = 256  # rows of a dense change that are squared at a time
_ENTRIES = 1 << 16  # entries of B A that its kurtosis is estimated from
_PRODUCTS = 1 << 22  # products of factors that are held at a time, 32 MiB in double precision

_LORA_STEM = re.compile(r"^.+?\.\d+\.")
_EXPERT = re.compile(r"^expert\.(?:.*\.\d+\.)?(?P<name>.+)$")  # outside the blocks, the full name
_ORGAN = re.compile(r"^blocks\.\d+\.(?P<name>.+)$")
_VECTOR = re.compile(r"^blocks\.\d+\.(?P<name>.+)\.change$")


def weigh_attachment(
    attachment: Attachment, model: PreTrainedModel, seed: int = 0
) -> dict[str, ModuleFigures]:
    """Figures of an attachment at full dose, by class of module, the largest over its blocks.

    Args:
        attachment: Read strictly by its recipe, so its shapes are the base's and its values finite.
        model: The recipient's model, whose blocks an organ began as copies of.
        seed: Of the random projections and the sampled entries.

    Returns:
        Nothing for other kinds, and for experts whose base is not here.
    """
    found: dict[str, ModuleFigures] = {}
    generator = torch.Generator().manual_seed(seed)
    for name, figures in _modules(attachment, model, generator):
        found[name] = _largest(found[name], figures) if name in found else figures
    return found


def _modules(
    attachment: Attachment, model: PreTrainedModel, generator: torch.Generator
) -> Iterator[tuple[str, ModuleFigures]]:
    facts = attachment.facts
    if isinstance(facts, LoraFacts):
        full = replace(attachment, dose=1.0)
        for name, module, change in sorted(changes_of(full, model), key=lambda found: found[0]):
            linear = _LORA_STEM.sub("", name)
            if isinstance(change, LowRank):
                yield linear, _weigh_factors(change.right, change.left, change.scale, generator)
            else:
                yield linear, _weigh_matrix(make_dense(change, original_value(module)), generator)
    elif isinstance(facts, DeltaFacts):
        places = delta_places(model)
        for target, packed in sorted(packed_directions(attachment).items()):
            module, name = places[target]
            left, right = unpack(packed, *module.get_parameter(name).shape)
            yield _module_name(target), _weigh_factors(right, left.T, 1.0, generator)
        for name, value in sorted(attachment.tensors.items()):
            if match := _VECTOR.match(name):
                yield match["name"], _weigh_matrix(value.float()[:, None], generator)
    elif isinstance(facts, ExpertFacts):
        # Without its base, what was learnt cannot be told from what was there before.
        start = starting_point(attachment, model)
        for name, value in sorted(attachment.tensors.items()):
            match = _EXPERT.match(name)
            if match and name in start:
                learnt = value.float() - start[name].float()
                yield match["name"], _weigh_matrix(learnt.reshape(len(learnt), -1), generator)
    elif isinstance(facts, ModuleGraftFacts):
        for name, value in sorted(attachment.tensors.items()):
            learnt = value.to(model.device, torch.float32)
            yield _module_name(name), _weigh_matrix(learnt.reshape(len(learnt), -1), generator)
    elif isinstance(facts, OrganFacts):
        start = starting_point(attachment, model)
        for name, value in sorted(attachment.tensors.items()):
            if match := _ORGAN.match(name):
                learnt = value.to(model.device, torch.float32)
                if name in start:  # an organ that replaces blocks is a change already
                    learnt = learnt - start[name].to(model.device, torch.float32)
                yield match["name"], _weigh_matrix(learnt.reshape(len(learnt), -1), generator)


def _module_name(target: str) -> str:
    match = _ORGAN.match(target)
    return match["name"] if match else target


def _weigh_factors(
    a: torch.Tensor, b: torch.Tensor, scale: float, generator: torch.Generator
) -> ModuleFigures:
    """Figures of scale x B A from A [rank, inputs] and B [outputs, rank].

    With B = Q R and A^T = P S, the singular values of B A are those of R S^T, rank x rank.
    """
    a, b = a.to(torch.float64), b.to(torch.float64)
    # Factors of size one: fourth powers of products of large finite numbers would overflow.
    size = float(a.abs().max()) * float(b.abs().max())
    if size == 0.0:
        return ModuleFigures(0.0, 0.0, 0.0, 0.0, 1.0)
    a, b, scale = a / a.abs().max(), b / b.abs().max(), scale * size
    small = torch.linalg.qr(b, mode="r").R @ torch.linalg.qr(a.T, mode="r").R.T
    values = torch.linalg.svdvals(small)
    rows = torch.randint(len(b), (_ENTRIES,), generator=generator)
    columns = torch.randint(a.shape[1], (_ENTRIES,), generator=generator)
    step = max(1, _PRODUCTS // len(a))
    pairs = zip(torch.split(rows, step), torch.split(columns, step), strict=True)
    entries = torch.cat([(b[row] * a.T[column]).sum(dim=1) for row, column in pairs])
    figures = _figures(
        values, float((values**2).sum()), len(values), _moments(entries, len(entries))
    )
    return _scaled(figures, scale)


def _weigh_matrix(change: torch.Tensor, generator: torch.Generator) -> ModuleFigures:
    """Figures of a dense change [outputs, inputs]."""
    largest = float(change.abs().max())
    if largest == 0.0 or not math.isfinite(largest):
        # A difference of two finite numbers can overflow; it is then as large as can be told.
        size = 0.0 if largest == 0.0 else torch.finfo(torch.float32).max
        return ModuleFigures(size, size, 0.0, 0.0, 1.0)
    # Divided by its largest entry first: squares of large finite numbers would overflow.
    scaled = change / largest
    values = leading_singular_values(scaled, _LEADING, generator).to(torch.float64)
    moments = _moments(scaled, _ROWS)
    figures = _figures(values, moments[0] * scaled.numel(), min(scaled.shape), moments)
    return _scaled(figures, largest)


def leading_singular_values(
    matrix: torch.Tensor, count: int, generator: torch.Generator
) -> torch.Tensor:
    """The largest singular values of a matrix, by random projection.

    Halko, Martinsson and Tropp, SIAM Review 53 (2011), algorithms 4.4 and 5.1: a random range with
    power passes, then the exact values inside it. Exact where count + 8 reaches the rank.

    Args:
        matrix: [m, n], finite.
        count: How many; fewer if the matrix has fewer.
        generator: On the CPU, so that every device gets the same projection.
    """
    width = min(count + _OVERSAMPLE, *matrix.shape)
    probe = torch.randn(matrix.shape[1], width, generator=generator).to(matrix)
    basis = torch.linalg.qr(matrix @ probe).Q
    for _ in range(_POWER_PASSES):
        basis = torch.linalg.qr(matrix.T @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    values: torch.Tensor = torch.linalg.svdvals(basis.T @ matrix)
    return values[:count].cpu()


def _moments(entries: torch.Tensor, rows: int) -> tuple[float, float]:
    """Mean second and fourth power of entries, summed in double precision a few rows at a time."""
    second = fourth = 0.0
    for part in torch.split(entries, rows):
        squares = part.double() ** 2
        second += float(squares.sum())
        fourth += float((squares**2).sum())
    return second / entries.numel(), fourth / entries.numel()


def _figures(
    values: torch.Tensor, total: float, rank: int, moments: tuple[float, float]
) -> ModuleFigures:
    """Figures from leading singular values, the sum of all squares, the rank and the moments."""
    if total <= 0.0:
        return ModuleFigures(0.0, 0.0, 0.0, 0.0, 1.0)
    shares = [min(float(value) ** 2 / total, 1.0) for value in values]
    rest, others = max(1.0 - sum(shares), 0.0), rank - len(shares)
    # What was not computed counts as evenly spread, which overstates the entropy a little.
    spread = shares + [rest / others] * others if others else shares
    entropy = -sum(share * math.log(share) for share in spread if share > 0.0)
    focus = 1.0 - entropy / math.log(rank) if rank > 1 else 0.0
    second, fourth = moments
    kurtosis = fourth / second**2 if second**2 > 0.0 else 1.0
    share = shares[0] if rank > 1 else 0.0
    return ModuleFigures(
        float(values[0]), math.sqrt(total), share, min(max(focus, 0.0), 1.0), kurtosis
    )


def _scaled(figures: ModuleFigures, factor: float) -> ModuleFigures:
    return replace(figures, sigma=figures.sigma * factor, frobenius=figures.frobenius * factor)


def _largest(one: ModuleFigures, other: ModuleFigures) -> ModuleFigures:
    return ModuleFigures(
        max(one.sigma, other.sigma),
        max(one.frobenius, other.frobenius),
        max(one.share, other.share),
        max(one.focus, other.focus),
        max(one.kurtosis, other.kurtosis),
    )
