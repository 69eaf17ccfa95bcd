# SPDX-License-Identifier: Apache-2.0
"""Quantised directions: close to what they stand for, and spent where they buy most."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings, strategies as st

from allograft.recipes.factors import (
    Directions,
    allocate,
    decompose,
    direction_bytes,
    draw_noise,
    pack,
    squared_norm,
    unpack,
    unpack_left,
    unpack_right,
)


def matrix(rows: int, columns: int, seed: int) -> torch.Tensor:
    """A random matrix whose singular values fall by a quarter from one to the next."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(rows, columns)
    left = torch.randn(rows, rank, generator=generator)
    right = torch.randn(rank, columns, generator=generator)
    return left @ torch.diag(0.75 ** torch.arange(rank)) @ right


@settings(deadline=None, max_examples=50)
@given(
    rows=st.integers(2, 40),
    columns=st.integers(2, 40),
    seed=st.integers(0, 1000),
    bits=st.sampled_from([4, 8]),
)
def test_packing_loses_no_more_than_its_bits(rows: int, columns: int, seed: int, bits: int) -> None:
    """Half a step for each entry of each side, as rounding to the nearest promises."""
    found = decompose(matrix(rows, columns, seed))
    left, right = unpack(pack(found, (1, 0) if bits == 8 else (0, 1)), rows, columns)
    largest = 127 if bits == 8 else 7
    kept = 1.0
    for side in (found.left[0], found.right[0]):
        step = float(side.abs().max()) / largest / 2
        kept *= 1.0 - min(len(side) * step**2, 1.0)
    whole = float(found.values[0]) * torch.outer(found.left[0], found.right[0])
    error = (left.T @ right - whole).norm() ** 2 / whole.norm() ** 2
    assert error <= 1.0 - kept + 1e-5


def test_eight_bits_keep_all_but_a_thousandth_and_four_a_thirtieth() -> None:
    change = matrix(300, 200, 1)
    found = decompose(change)
    for ranks, most in (((100, 0), 1e-3), ((0, 100), 1 / 30), ((2, 98), 1 / 30)):
        left, right = unpack(pack(found, ranks), 300, 200)
        assert (left.T @ right - change).norm() ** 2 / change.norm() ** 2 < most


@pytest.mark.parametrize("ranks", [(3, 0), (0, 3), (1, 2)])
def test_numbers_that_need_no_rounding_come_back_exactly(ranks: tuple[int, int]) -> None:
    left = torch.tensor([[127, -127, 0, 127.0], [7, 0, -7, 7], [0, 0, 7, -7]])
    right = torch.tensor([[-127.0, 127, 0], [7, 7, 0], [0, -7, 7]])
    found = Directions(left, torch.tensor([1.0, 0.5, 0.25]), right, 1.0)
    a, b = unpack(pack(found, ranks), 4, 3)
    torch.testing.assert_close(a.T @ b, left.T @ torch.diag(found.values) @ right)


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_no_other_choice_of_the_same_bytes_keeps_more(data: st.DataObject) -> None:
    """Against every choice of directions and bits of three small matrices."""
    bits = data.draw(st.sampled_from([4, 8]))
    shapes = data.draw(
        st.lists(st.tuples(st.integers(3, 9), st.integers(3, 9)), min_size=3, max_size=3)
    )
    values = st.lists(st.floats(0.01, 10), min_size=2, max_size=2)
    directions = {}
    for number, (rows, columns) in enumerate(shapes):
        spectrum = torch.tensor(sorted(data.draw(values), reverse=True))
        sides = torch.zeros(2, rows), torch.zeros(2, columns)
        energy = float((spectrum.double() ** 2).sum())
        directions[str(number)] = Directions(sides[0], spectrum, sides[1], energy)

    def weigh(choice: dict[str, tuple[int, int]]) -> tuple[float, int]:
        energy, size = 0.0, 0
        for name, (wide, narrow) in choice.items():
            squares = (directions[name].values.double() ** 2).tolist()
            sides = directions[name].left.shape[1], directions[name].right.shape[1]
            energy += sum(squares[:wide]) + 0.975 * sum(squares[wide : wide + narrow])
            size += wide * direction_bytes(*sides, 8) + narrow * direction_bytes(*sides, 4)
        return energy, size

    budget = data.draw(st.integers(1, 150))
    chosen = allocate(directions, bits, budget, 1.0)
    kept, spent = weigh(chosen)
    assert spent <= budget
    each = [(w, n) for w in range(3) for n in range(3 - w) if bits == 4 or n == 0]
    others = [weigh(dict(zip(directions, some, strict=True))) for some in product(each, repeat=3)]
    # Whole steps leave a remainder: it can be worth at most what the dearest step would have been.
    dearest = max(direction_bytes(*shape, 8) for shape in shapes)
    assert kept >= max((e for e, size in others if size <= budget - dearest), default=0.0) - 1e-9


def test_without_a_budget_the_share_of_energy_decides() -> None:
    directions = {"a": decompose(matrix(20, 30, 1)), "b": decompose(0.1 * matrix(30, 20, 2))}
    whole = sum(each.energy for each in directions.values())
    ranks = allocate(directions, 8, 0, 0.8)
    squares = [directions[n].values.double()[:w] ** 2 for n, (w, _) in ranks.items()]
    kept = sum(float(each.sum()) for each in squares)
    assert kept >= 0.8 * whole > kept - min(float(each[-1]) for each in squares if len(each))
    # The weak matrix gets less, though it is as large.
    assert ranks["a"][0] > ranks["b"][0]


def test_a_change_of_nothing_gets_no_direction() -> None:
    nothing = {"a": decompose(torch.zeros(4, 5))}
    assert allocate(nothing, 8, 10_000, 1.0) == {"a": (0, 0)}


def test_noise_has_the_norm_and_the_form_of_the_change() -> None:
    packed = pack(decompose(matrix(41, 30, 1)), (2, 5))
    noise = draw_noise(packed, torch.Generator().manual_seed(1), 41, 30)
    sizes = [squared_norm(*unpack(each, 41, 30)) for each in (packed, noise)]
    assert sizes[1] == pytest.approx(sizes[0], rel=1e-5)
    assert {n: (v.shape, v.dtype) for n, v in packed.items()} == {
        n: (v.shape, v.dtype) for n, v in noise.items()
    }
    assert not torch.equal(noise["int8"], packed["int8"])


@pytest.mark.parametrize("ranks", [(3, 0), (0, 3), (1, 2)])
def test_parts_of_a_factor_are_those_of_the_whole(ranks: tuple[int, int]) -> None:
    packed = pack(decompose(matrix(13, 10, 2)), ranks)
    left, right = unpack(packed, 13, 10)
    assert torch.equal(unpack_right(packed, 13, 10), right)
    for first, last in ((0, 13), (0, 5), (5, 10), (10, 13), (12, 13)):
        assert torch.equal(unpack_left(packed, first, last), left[:, first:last])
