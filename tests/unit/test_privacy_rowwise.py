# SPDX-License-Identifier: Apache-2.0
"""Several persons at once: the same clipped sum as one at a time, or not used at all."""

from __future__ import annotations

import contextlib
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from allograft.errors import RejectedError
from allograft.privacy import rowwise
from allograft.privacy.dp import DpConstants
from allograft.privacy.rowwise import RowLosses, RowwiseSum, fits
from allograft.privacy.train import (
    ClippedSum,
    PersonLoop,
    PrivateGradient,
    check_agreement,
    check_step,
)
from allograft.recipes import lora, organ
from allograft.recipes.loop import train
from allograft.recipes.losses import PersonLosses
from allograft.recipes.plan import LoopPlan, LoraPlan, OrganPlan
from allograft.recipes.windows import Windows
from kit.tiny import FAMILIES, tiny_model

PERSONS = 10
SMALL = {"blocks": 1, "num_hidden_layers": 2}
CPU = torch.device("cpu")
CONSTANTS = DpConstants(
    sampling_rate=0.5, noise_multiplier=1.0, steps=4, clip_norm=0.05, divisor=4.0, delta=1e-5,
    windows_per_person=3,
)  # fmt: skip


def person_windows(length: int = 24, most: int = 3) -> Windows:
    """One to so many windows per person, of four to all tokens."""
    generator = torch.Generator().manual_seed(5)
    owners = torch.tensor([n for n in range(PERSONS) for _ in range(1 + n % most)])
    tokens = torch.randint(3, 60, (len(owners), length), generator=generator)
    lengths = torch.randint(4, length + 1, (len(owners),), generator=generator)
    return Windows(tokens, lengths, owners, 1000)


@dataclass
class Site:
    """A model in training, and its persons."""

    model: nn.Module
    parameters: list[nn.Parameter]
    losses: PersonLosses

    def loop(self) -> PersonLoop:
        return PersonLoop(self.parameters, self.losses.loss_of)

    def rows(self) -> RowwiseSum:
        return RowwiseSum(self.model, self.parameters, self.losses)

    def sum(
        self, way: ClippedSum, persons: Sequence[int] = range(PERSONS), clip: float = 0.05
    ) -> list[torch.Tensor]:
        constants = replace(CONSTANTS, clip_norm=clip)
        return PrivateGradient(self.parameters, constants, PERSONS, way).sum_clipped(persons)


@contextlib.contextmanager
def training(
    family: str,
    kind: str,
    checkpointing: bool = False,
    windows: Windows | None = None,
    blocks: int = 2,
    half: bool = False,
    **changes: object,
) -> Iterator[Site]:
    """A recipe's own model in the middle of its training: nothing is silent any more."""
    model = tiny_model(family, **changes).to(torch.bfloat16 if half else torch.float32)
    plan = LoopPlan(checkpointing=checkpointing)
    context = (
        organ._growing(model, organ._plan_facts(model, OrganPlan(blocks)), plan)
        if kind == "organ"
        else lora._adapted(model, lora._plan_facts(model, LoraPlan(rank=2)), plan)
    )
    with context:
        parameters = [value for value in model.parameters() if value.requires_grad]
        torch.manual_seed(2)
        with torch.no_grad():
            for value in parameters:
                value.add_(0.05 * torch.randn_like(value))

        def forward(_: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                return model(input_ids=tokens, use_cache=False).logits

        losses = PersonLosses(forward, windows or person_windows(), 3, 6, CPU)
        yield Site(model, parameters, losses)


def assert_same(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        size = float(other.abs().max())
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * size + 1e-12)


class TestRecipes:
    @pytest.mark.parametrize("kind", ["organ", "lora"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_the_sum_is_that_of_one_person_at_a_time(self, family: str, kind: str) -> None:
        with training(family, kind) as site:
            assert fits(site.model, site.parameters)
            # A clip that acts on everybody, and one that acts on nobody.
            for clip in (0.05, 1e6):
                assert_same(site.sum(site.rows(), clip=clip), site.sum(site.loop(), clip=clip))

    def test_wide_matrices_are_never_formed_and_narrow_ones_are(self, monkeypatch) -> None:
        shares: list[rowwise._Shares] = []
        norms = rowwise._Shares.norms
        monkeypatch.setattr(
            rowwise._Shares, "norms", lambda self: (shares.append(self), norms(self))[1]
        )
        with training("llama", "organ", windows=person_windows(4, most=1)) as site:
            site.sum(site.rows())
            assert all(len(share._ghosts) == 14 for share in shares)
        shares.clear()
        with training("llama", "lora") as site:
            site.sum(site.rows())
            assert not any(share._ghosts for share in shares)

    def test_recomputed_activations_are_met_once(self) -> None:
        with training("llama", "organ", checkpointing=True) as site:
            assert_same(site.sum(site.rows()), site.sum(site.loop()))

    @pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
    @pytest.mark.parametrize("kind", ["organ", "lora"])
    def test_a_person_that_is_not_finite_adds_nothing(self, kind: str, bad: float) -> None:
        windows = person_windows()
        windows.tokens[windows.documents == 4, 1] = 60  # a token that nobody else has
        with training("llama", kind, windows=windows) as site:
            with torch.no_grad():
                site.model.get_input_embeddings().weight[60] = bad
            with_bad = site.sum(site.rows())
            assert all(bool(total.isfinite().all()) for total in with_bad)
            assert_same(with_bad, site.sum(site.loop()))
            if not math.isfinite(bad):
                assert_same(with_bad, site.sum(site.rows(), [n for n in range(10) if n != 4]))

    def test_a_batch_of_which_nobody_is_finite_adds_nothing(self) -> None:
        with training("llama", "organ") as site:
            with torch.no_grad():
                site.model.get_input_embeddings().weight.fill_(math.nan)
            assert not any(total.any() for total in site.sum(site.rows()))

    def test_nobody_adds_nothing(self) -> None:
        with training("llama", "lora") as site:
            assert not any(total.any() for total in site.sum(site.rows(), []))

    @pytest.mark.parametrize("kind", ["organ", "lora"])
    @pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
    def test_half_precision_finds_nearly_the_same(self, family: str, kind: str) -> None:
        """A bfloat16 base under autocast, as on an accelerator."""
        with training(family, kind, half=True) as site:
            ours, theirs = site.sum(site.rows()), site.sum(site.loop())
            apart = sum(float((a - b).square().sum()) for a, b in zip(ours, theirs, strict=True))
            assert 0 < math.sqrt(apart) <= 0.02 * 0.05 * math.sqrt(PERSONS)


class TestBatches:
    def test_batches_hold_whole_persons_of_one_length(self) -> None:
        with training("llama", "lora") as site:
            batches = site.losses.split(range(PERSONS))
            assert sorted(itertools.chain(*batches)) == list(range(PERSONS))
            for batch in batches:
                found = site.losses.losses(batch)
                assert found.values.shape == (sum(found.windows),)
                assert sum(found.windows) <= 6
                assert len({site.losses._size(person)[0] for person in batch}) == 1

    def test_a_person_s_padding_is_its_own(self) -> None:
        seen: dict[int, set[int]] = {}
        windows = person_windows()
        model = nn.Linear(1, 1)

        def forward(numbers: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
            for number in numbers.tolist():
                owner = int(windows.documents[number])
                seen.setdefault(owner, set()).add(tokens.shape[1])
            return model(tokens[..., None].float()).expand(-1, -1, 61)

        losses = PersonLosses(forward, windows, 3, 6, CPU)
        for company in ([0, 1, 2], [0, 5, 9], range(PERSONS), [0]):
            for batch in losses.split(company):
                losses.losses(batch)
        assert all(len(lengths) == 1 for lengths in seen.values())
        assert len(set.union(*seen.values())) > 1

    def test_a_person_with_more_windows_than_a_batch_is_alone(self) -> None:
        windows = replace(person_windows(), documents=torch.tensor([0] * 9 + [1] * 5 + [2] * 5))
        losses = PersonLosses(lambda *_: None, windows, 9, 4, CPU)
        assert sorted(losses.split([0, 1, 2])) == [[0], [1], [2]]


class Toy:
    """Persons of so many rows of tokens, and any model of them."""

    def __init__(self, model: nn.Module, counts: Sequence[int], shape: tuple[int, ...]) -> None:
        torch.manual_seed(3)
        with torch.no_grad():
            # Not as they are born: behind a LayerNorm with weights of one this loss is a constant,
            # and its gradient nothing but rounding.
            for value in model.parameters():
                value.copy_(torch.randn_like(value))
        self.model, self.counts = model, counts
        self.parameters = list(model.parameters())
        self.records = [torch.randn(count, *shape) for count in counts]

    def split(self, persons: Sequence[int]) -> list[list[int]]:
        return [list(persons)] if persons else []

    def losses(self, persons: Sequence[int]) -> RowLosses:
        counts = tuple(self.counts[person] for person in persons)
        found = self.model(torch.cat([self.records[person] for person in persons]))
        return RowLosses(found.square().flatten(1).sum(1), counts)

    def loss_of(self, person: int) -> torch.Tensor:
        return self.losses([person]).values.sum()

    def sums(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        persons = len(self.counts)
        constants = replace(CONSTANTS, clip_norm=1.0)
        ways = (
            RowwiseSum(self.model, self.parameters, self),
            PersonLoop(self.parameters, self.loss_of),
        )
        first, second = (
            PrivateGradient(self.parameters, constants, persons, way).sum_clipped(range(persons))
            for way in ways
        )
        return first, second


class Twice(nn.Module):
    """One layer, used twice in a forward pass."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return self.layer(self.norm(self.layer(self.norm(value)).tanh()))


class Halved(nn.Module):
    """Two layers, of which one reads the beginning of what the other reads."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = nn.Linear(64, 40, bias=False)
        self.part = nn.Linear(32, 40, bias=False)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        # Much larger numbers where only one of them looks.
        value = value * torch.cat([torch.ones(32), 1000 * torch.ones(32)])
        return self.whole(value) + self.part(value[..., :32])


class Flat(nn.Module):
    """Lays rows end to end before its layer, as experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return self.layer(value.flatten(0, 1)).view(value.shape)


class TestLayers:
    # 3 tokens of width 4: formed; 2 of width 40: never formed.
    @pytest.mark.parametrize(("tokens", "width"), [(3, 4), (2, 40)])
    def test_uses_of_one_layer_add_up(self, tokens: int, width: int) -> None:
        assert_same(*Toy(Twice(width), [1, 3, 3, 1, 2], (tokens, width)).sums())

    def test_persons_are_taken_in_parts_where_pairs_of_tokens_are_many(self, monkeypatch) -> None:
        monkeypatch.setattr(rowwise, "_PAIR_ENTRIES", 40)
        model = nn.Sequential(nn.Linear(40, 40, bias=False), nn.Tanh(), nn.Linear(40, 40))
        assert_same(*Toy(model, [1, 1, 1, 1, 1, 2, 2], (4, 40)).sums())

    def test_a_layer_that_reads_a_part_of_another_s_input_is_not_taken_for_it(self) -> None:
        assert_same(*Toy(Halved(), [1, 2, 1], (2, 64)).sums())

    def test_frozen_parameters_of_a_layer_are_left_alone(self) -> None:
        toy = Toy(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.LayerNorm(4)), [1, 2], (3, 4))
        frozen = (toy.model[0].weight, toy.model[2].bias)
        for value in frozen:
            value.requires_grad_(False)
        toy.parameters = [value for value in toy.parameters if value.requires_grad]
        assert_same(*toy.sums())
        assert all(value.grad is None for value in frozen)

    def test_rounding_lets_nobody_past_the_clip(self) -> None:
        # Two tokens whose shares cancel but for a little: the exact norm is about 3, and the terms
        # of the ghost norm are 1e9 times its square.
        torch.manual_seed(0)
        layer = nn.Linear(64, 64, bias=False)
        base, sign = 1e4 * torch.randn(1, 1, 64), torch.tensor([1.0, -1.0])[None, :, None]
        worst = 0.0
        for seed in range(20):
            torch.manual_seed(seed)
            record = torch.cat([base, base + 0.05 * torch.randn(1, 1, 64)], 1)
            answer = torch.randn(1, 1, 64)

            class One:
                def split(self, persons):
                    return [list(persons)]

                def losses(self, persons, record=record, answer=answer):
                    return RowLosses((layer(record) * sign * answer).sum((1, 2)), (1,))

            parameters = [layer.weight]
            way = RowwiseSum(layer, parameters, One())
            constants = replace(CONSTANTS, clip_norm=1.0)
            (total,) = PrivateGradient(parameters, constants, 1, way).sum_clipped([0])
            worst = max(worst, float(torch.linalg.vector_norm(total.double())))
        assert 0 < worst <= 1.0 + 1e-4

    @pytest.mark.parametrize(
        "model",
        [
            nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4)),
            nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1)),
            nn.MultiheadAttention(4, 1),  # its output projection is a subclass of Linear
            nn.Sequential(nn.LayerNorm((3, 4))),
        ],
    )
    def test_a_layer_of_another_class_does_not_fit(self, model: nn.Module) -> None:
        assert not fits(model, list(model.parameters()))
        with pytest.raises(RejectedError) as refused:
            RowwiseSum(model, list(model.parameters()), Toy(model, [1], (3, 4)))
        assert refused.value.code == "AG-PRV-080"

    def test_tied_weights_do_not_fit(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].weight = model[0].weight
        assert not fits(model, list(model.parameters()))

    def test_a_parameter_outside_the_model_does_not_fit(self) -> None:
        model = nn.Linear(4, 4)
        assert not fits(model, [*model.parameters(), nn.Parameter(torch.ones(3))])

    def test_a_layer_that_mixes_rows_is_noticed(self) -> None:
        with pytest.raises(RejectedError, match="rows apart"):
            Toy(Flat(), [1, 2], (3, 4)).sums()


def _windows_apart(monkeypatch) -> None:
    """As if each window were a person of its own."""
    whole = rowwise._Shares.begin

    def begin(self, windows, device):
        whole(self, (1,) * sum(windows), device)

    monkeypatch.setattr(rowwise._Shares, "begin", begin)


def _ghosts_forgotten(monkeypatch) -> None:
    """As if wide matrices counted for nothing in a norm."""
    monkeypatch.setattr(rowwise._Shares, "_add_ghost_squares", lambda *_: None)


def _neighbours_confused(monkeypatch) -> None:
    """As if everybody were clipped by the next person's norm."""
    norms = rowwise._Shares.norms
    monkeypatch.setattr(rowwise._Shares, "norms", lambda self: norms(self).roll(1))


def _gains_forgotten(monkeypatch) -> None:
    """As if norms and biases were frozen."""
    monkeypatch.setattr(rowwise._Shares, "per_person", _of_losses_alone)


_per_person = rowwise._Shares.per_person


def _of_losses_alone(self, value: torch.Tensor) -> torch.Tensor:
    total = _per_person(self, value)
    return total if value.dtype == torch.float64 else torch.zeros_like(total)


DEFECTS = [_windows_apart, _ghosts_forgotten, _neighbours_confused, _gains_forgotten]


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    windows = person_windows(6)
    with training("llama", "organ", windows=windows, **SMALL) as site:
        yield site


class TestChecks:
    def check(self, site: Site, seed: int) -> None:
        read = random.Random(seed).randbytes
        also = [site.losses.widest()]
        ways = (site.rows(), site.loop())
        check_agreement(site.parameters, CONSTANTS, PERSONS, ways, also, read)
        check_step(site.parameters, CONSTANTS, PERSONS, site.rows(), read)

    @pytest.mark.parametrize("seed", range(20))
    def test_a_correct_sum_raises_no_alarm(self, site: Site, seed: int) -> None:
        self.check(site, seed)

    @pytest.mark.parametrize("seed", range(20))
    @pytest.mark.parametrize("plant", DEFECTS)
    def test_a_planted_defect_is_detected(self, site: Site, seed: int, plant, monkeypatch) -> None:
        plant(monkeypatch)
        with pytest.raises(RejectedError) as refused:
            self.check(site, seed)
        assert refused.value.code == "AG-PRV-080"

    def test_norms_that_are_too_small_are_detected_without_the_loop(
        self, site: Site, monkeypatch
    ) -> None:
        _ghosts_forgotten(monkeypatch)
        with pytest.raises(RejectedError, match="one person moves the sum"):
            check_step(site.parameters, CONSTANTS, PERSONS, site.rows())


class TestChoice:
    def run(self, site: Site, *, known: bool = True, checkpointing: bool = False, **options):
        loop = LoopPlan(steps=4, warmup_steps=1, checkpointing=checkpointing)
        return train(
            lambda _, tokens: site.model(input_ids=tokens, use_cache=False).logits,
            {str(place): value for place, value in enumerate(site.parameters)},
            person_windows(),
            loop,
            private=CONSTANTS,
            model=site.model if known else None,
            **options,
        )

    def test_several_persons_at_once_where_that_is_possible(self) -> None:
        with training("llama", "organ", **SMALL) as site:
            assert self.run(site).joint
            assert self.run(site, private_way="joint").joint
            assert not self.run(site, private_way="single").joint

    def test_one_at_a_time_where_few_activations_are_to_be_held(self) -> None:
        with training("llama", "organ", checkpointing=True, **SMALL) as site:
            assert not self.run(site, checkpointing=True).joint

    def test_one_at_a_time_where_the_model_is_not_known(self) -> None:
        with training("llama", "organ", **SMALL) as site:
            assert not self.run(site, known=False).joint
            with pytest.raises(RejectedError) as refused:
                self.run(site, known=False, private_way="joint")
            assert refused.value.code == "AG-PRV-080"

    @pytest.mark.parametrize("plant", [_windows_apart, _neighbours_confused])
    def test_one_at_a_time_where_the_sums_disagree(self, plant, monkeypatch) -> None:
        plant(monkeypatch)
        with training("llama", "organ", **SMALL) as site:
            assert not self.run(site).joint
            with pytest.raises(RejectedError) as refused:
                self.run(site, private_way="joint")
            assert refused.value.code == "AG-PRV-080"
