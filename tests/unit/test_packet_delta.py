# SPDX-License-Identifier: Apache-2.0
"""What a delta's payload may hold: names and shapes from ranks, numbers within their bits."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from allograft.errors import RejectedError
from allograft.packet.delta import DeltaLayout, Integers, read_delta_layout

TARGETS = {
    "embedding": (61, 32),
    "blocks.0.norm.weight": (32,),
    "blocks.0.up.weight": (48, 33),
    "blocks.1.norm.weight": (32,),
    "blocks.1.up.weight": (48, 33),
}


def test_names_and_shapes_follow_from_the_ranks() -> None:
    layout = DeltaLayout({"up.weight": ((2, 0), (1, 3)), "embedding": ((0, 4),)}, vectors=True)
    found = {name: each.shape for name, each in layout.tensors(TARGETS).items()}
    assert found == {
        "blocks.0.up.weight.int8": (2, 81),
        "blocks.0.up.weight.scale": (2,),
        "blocks.1.up.weight.int8": (1, 81),
        "blocks.1.up.weight.int4": (3, 41),
        "blocks.1.up.weight.scale": (4,),
        "embedding.int4": (4, 47),
        "embedding.scale": (4,),
        "blocks.0.norm.weight.change": (32,),
        "blocks.1.norm.weight.change": (32,),
    }
    assert read_delta_layout(layout.to_json()) == layout


@pytest.mark.parametrize(
    "ranks",
    [
        {},
        {"up.weight": ((0, 0), (0, 0))},
        {"up.weight": ((1, 0),)},
        {"up.weight": ((1, 0), (1, 0), (1, 0))},
        {"up.weight": ((1, 0), (30, 4))},
        {"norm.weight": ((1, 0), (1, 0))},
        {"down.weight": ((1, 0), (1, 0))},
        {"head": ((1, 0),)},
        {"embedding": ((1, 0), (1, 0))},
    ],
)
def test_refuses_ranks_that_do_not_fit_the_base(ranks: dict[str, object]) -> None:
    with pytest.raises(RejectedError, match="AG-PKT-028"):
        DeltaLayout(ranks, vectors=False).tensors(TARGETS)


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"ranks": {}},
        {"ranks": [], "vectors": False},
        {"ranks": {"up.weight": [[1]]}, "vectors": False},
        {"ranks": {"up.weight": [[1, -1]]}, "vectors": False},
        {"ranks": {"up.weight": [[1, 0.5]]}, "vectors": False},
        {"ranks": {"up.weight": [[1, 0]]}, "vectors": 1},
    ],
)
def test_refuses_malformed_ranks(facts: dict[str, object]) -> None:
    with pytest.raises(RejectedError, match="AG-PKT-028"):
        read_delta_layout(facts)


@settings(deadline=None, max_examples=50)
@given(st.binary(min_size=1, max_size=40), st.sampled_from([4, 8]), st.booleans())
def test_no_number_has_two_spellings(content: bytes, bits: int, odd: bool) -> None:
    """What passes the check is what its own numbers would be written as."""
    width = len(content) * 8 // bits - (1 if odd and bits == 4 else 0)
    form = Integers(bits, width)
    largest = 2 ** (bits - 1) - 1
    if bits == 8:
        numbers = np.frombuffer(content, dtype=np.int8).tolist()
    else:
        halves = [half for byte in content for half in (byte & 15, byte >> 4)]
        numbers = [half - 16 if half > 7 else half for half in halves]
    fair = all(abs(number) <= largest for number in numbers) and not any(numbers[width:])
    if fair:
        form.check(content)
    else:
        with pytest.raises(RejectedError, match="AG-PKT-027"):
            form.check(content)
