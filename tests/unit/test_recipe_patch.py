# SPDX-License-Identifier: Apache-2.0
"""Low-rank changes stand beside weights; others are written; both go without a trace."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from allograft.errors import RejectedError, UnavailableError
from allograft.recipes import blocks, patch as patches
from allograft.recipes.patch import (
    Dense,
    LowRank,
    Place,
    changes_beside,
    folded,
    has_attachments,
    patch,
    unpatch,
)
from allograft.recipes.snapshot import state_digest
from kit.tiny import FAMILIES, generate, logits_of, tiny_model


def linears(model: PreTrainedModel) -> Iterator[nn.Module]:
    family = blocks.find_family(model.config)
    for block in blocks.base_blocks(model):
        yield from (block.get_submodule(name) for name in family.linears)


def low_rank(model: PreTrainedModel, scale: float = 1.0, seed: int = 0) -> list[Place]:
    generator = torch.Generator().manual_seed(seed)
    places: list[Place] = []
    for module in linears(model):
        rows, columns = module.get_parameter("weight").shape
        left = 0.1 * torch.randn(rows, 2, generator=generator)
        right = 0.1 * torch.randn(2, columns, generator=generator)
        places.append((module, "weight", LowRank(left, right, scale)))
    return places


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_low_rank_change_leaves_weights_alone_and_does_what_writing_it_does(family: str) -> None:
    model = tiny_model(family)
    before, plain = weights(model), logits_of(model)
    patch(low_rank(model), "a")
    beside = logits_of(model)
    assert same(before, weights(model))
    assert not torch.equal(beside, plain)
    with folded(model):
        torch.testing.assert_close(logits_of(model), beside, rtol=1e-4, atol=1e-4)
        assert not any(changes_beside(module) for module in model.modules())
        changed = {n for n, value in weights(model).items() if not torch.equal(value, before[n])}
        assert len(changed) == len(list(linears(model)))
    assert same(before, weights(model))
    assert torch.equal(logits_of(model), beside)
    assert generate(model, use_cache=True) == generate(model, use_cache=False)


def test_the_state_digest_tells_a_model_with_a_change_beside_it() -> None:
    model = tiny_model("llama")
    digests = [state_digest(model)]
    for seed, scale in ((0, 1.0), (0, 0.5), (1, 1.0)):
        patch(low_rank(model, scale, seed), "a")
        digests.append(state_digest(model))
    assert len(set(digests)) == 4
    unpatch(model, "a")
    assert state_digest(model) == digests[0]
    assert not has_attachments(model)


def test_hooks_go_with_the_last_change() -> None:
    model = tiny_model("llama")
    module = next(linears(model))
    patch(low_rank(model), "a")
    patch(low_rank(model, seed=1), "b")
    assert len(module._forward_hooks) == 1
    unpatch(model, "a")
    assert list(changes_beside(module)) == ["b"]
    unpatch(model, "b")
    assert not module._forward_hooks


def test_no_copy_of_factors_that_fit_as_they_are() -> None:
    model = tiny_model("llama")
    module, name, change = low_rank(model)[0]
    patch([(module, name, change)], "a")
    held = changes_beside(module)["a"]
    assert held.left.data_ptr() == change.left.data_ptr()
    assert held.right.data_ptr() == change.right.data_ptr()


def test_a_copy_of_a_model_has_changes_of_its_own() -> None:
    model = tiny_model("llama")
    patch(low_rank(model), "a")
    with_change = logits_of(model)
    twin = copy.deepcopy(model)
    unpatch(model, "a")
    assert torch.equal(logits_of(twin), with_change)
    unpatch(twin, "a")
    assert torch.equal(logits_of(twin), logits_of(model))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_changes_follow_a_model_to_another_type(family: str) -> None:
    model = tiny_model(family)
    patch(low_rank(model), "a")
    before = logits_of(model)
    torch.testing.assert_close(logits_of(model.double()), before.double(), rtol=1e-3, atol=1e-3)
    unpatch(model, "a")
    assert not has_attachments(model)


def test_a_written_and_a_standing_change_of_one_matrix_add_up_in_any_order() -> None:
    model = tiny_model("gpt2")
    plain = state_digest(model)
    module = next(linears(model))
    dense = Dense(0.1 * torch.ones_like(module.get_parameter("weight")), 1.0)
    found = []
    for first, second in (("low", "dense"), ("dense", "low")):
        for owner in (first, second):
            places = low_rank(model) if owner == "low" else [(module, "weight", dense)]
            patch(places, owner)
        found.append(logits_of(model))
        with folded(model):
            torch.testing.assert_close(logits_of(model), found[0], rtol=1e-4, atol=1e-4)
        unpatch(model, first)
        unpatch(model, second)
        assert state_digest(model) == plain
    assert torch.equal(*found)


def test_a_change_of_another_shape_leaves_those_before_it_off() -> None:
    model = tiny_model("llama")
    plain = state_digest(model)
    places = low_rank(model)
    module, name, change = places[3]
    assert isinstance(change, LowRank)
    places[3] = (module, name, LowRank(change.left[1:], change.right, 1.0))
    with pytest.raises(RejectedError, match="AG-RCP-003"):
        patch(places, "a")
    assert state_digest(model) == plain
    assert not has_attachments(model)


def test_memory_that_runs_out_beside_a_matrix_leaves_none_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama")
    patch(low_rank(model), "a")
    before, place, calls = state_digest(model), LowRank.to, []

    def fail_once(change: LowRank, value: torch.Tensor) -> LowRank:
        calls.append(change)
        if len(calls) == 5:
            raise MemoryError
        return place(change, value)

    for owner in ("b", "a"):
        calls.clear()
        monkeypatch.setattr(LowRank, "to", fail_once)
        with pytest.raises(UnavailableError, match="AG-RCP-027"):
            patch(low_rank(model, seed=2), owner)
        assert state_digest(model) == before


def test_memory_that_runs_out_while_folding_leaves_the_changes_beside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama")
    patch(low_rank(model), "a")
    before, write, calls = state_digest(model), patches._write, []

    def fail_once(value: nn.Parameter, place: patches._Written) -> None:
        calls.append(place)
        if len(calls) == 5:
            raise MemoryError
        write(value, place)

    monkeypatch.setattr(patches, "_write", fail_once)
    with pytest.raises(UnavailableError, match="AG-RCP-027"), folded(model):
        raise AssertionError("not reached")
    assert state_digest(model) == before
