# SPDX-License-Identifier: Apache-2.0
"""The private step: one person moves the sum by at most C, and only noise hides the rest."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import stats
from torch import nn

from allograft.crypto.stream import SecureStream
from allograft.errors import RejectedError
from allograft.privacy import train
from allograft.privacy.dp import DpConstants
from allograft.privacy.noise import draw_normals, draw_persons
from allograft.privacy.rowwise import RowLosses, RowwiseSum
from allograft.privacy.train import (
    ClippedSum,
    PersonLoop,
    PrivateGradient,
    SecureNoise,
    SeededNoise,
    check_step,
    measure_sensitivity,
)
from allograft.recipes.base import Donor, Plan, load_recipe
from allograft.recipes.documents import Document
from allograft.recipes.plan import LoopPlan, LoraPlan, OrganPlan
from allograft.recipes.windows import Windows
from kit.tiny import FAMILIES, tiny_model

CONSTANTS = DpConstants(
    sampling_rate=0.5, noise_multiplier=1.0, steps=4, clip_norm=0.5, divisor=4.0, delta=1e-5,
    windows_per_person=2,
)  # fmt: skip


def seeded(seed: int = 0):
    return random.Random(seed).randbytes


@pytest.fixture(params=["loop", "rows"])
def way(request) -> str:
    return request.param


class Regression:
    """Persons with several records each, and a linear model with a nonlinearity."""

    def __init__(
        self, way: str = "loop", persons: int = 12, seed: int = 0, scale: float = 3.0
    ) -> None:
        torch.manual_seed(seed)
        self.way = way
        self.model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))
        self.parameters = list(self.model.parameters())
        self.records = [torch.randn(1 + n % 3, 5) * scale for n in range(persons)]
        self.answers = [torch.randn(1 + n % 3, 1) for n in range(persons)]

    def loss_of(self, person: int) -> torch.Tensor:
        found = self.model(self.records[person]) - self.answers[person]
        return found.square().mean()

    def split(self, persons) -> list[list[int]]:
        return [list(persons[first : first + 5]) for first in range(0, len(persons), 5)]

    def losses(self, persons) -> RowLosses:
        counts = tuple(len(self.records[person]) for person in persons)
        found = self.model(torch.cat([self.records[person] for person in persons]))
        answers = torch.cat([self.answers[person] for person in persons])
        share = torch.repeat_interleave(torch.tensor(counts), torch.tensor(counts))
        return RowLosses((found - answers).square().sum(1) / share, counts)

    def sum(self) -> ClippedSum:
        if self.way == "rows":
            return RowwiseSum(self.model, self.parameters, self)
        return PersonLoop(self.parameters, self.loss_of)

    def gradient(self, constants: DpConstants = CONSTANTS, **options) -> PrivateGradient:
        persons = len(self.records)
        return PrivateGradient(self.parameters, constants, persons, self.sum(), **options)


def norm_of(tensors) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


@pytest.mark.parametrize(("scale", "tells"), [(1e-9, False), (1e-6, True), (1e9, True)])
def test_the_self_test_clips_within_the_range_of_a_clip_norm(scale, tells) -> None:
    """The tenth of a gradient may lie outside; then the range's end clips it, or nothing does."""
    weight = nn.Parameter(torch.zeros(5))
    way = PersonLoop([weight], lambda person: (weight * (person + 1)).sum() * scale)
    if tells:
        check_step([weight], CONSTANTS, 9, way)
        return
    with pytest.raises(RejectedError, match="AG-PRV-080"):
        check_step([weight], CONSTANTS, 9, way)


class TestCoinsAndNoise:
    def test_every_person_has_a_coin_of_its_own(self) -> None:
        stream = SecureStream().read
        counts = np.zeros(50)
        sizes = []
        for _ in range(4000):
            drawn = draw_persons(50, 0.1, stream)
            counts[drawn] += 1
            sizes.append(len(drawn))
        # Binomial, not fixed: a fixed batch is another mechanism than the one that is accounted.
        assert stats.chisquare(counts).pvalue > 1e-6
        expected = stats.binom(50, 0.1).pmf(range(51)) * 4000
        assert abs(np.mean(sizes) - 5) < 6 * math.sqrt(4.5 / 4000)
        assert np.bincount(sizes, minlength=51)[0] == pytest.approx(expected[0], abs=40)

    def test_a_chance_of_one_draws_everybody(self) -> None:
        assert draw_persons(5, 1.0, SecureStream().read).tolist() == [0, 1, 2, 3, 4]

    def test_normals_are_normal(self) -> None:
        normals = draw_normals(200_001, SecureStream().read)
        assert normals.shape == (200_001,)
        assert normals.dtype == np.float32
        assert stats.kstest(normals, "norm").pvalue > 1e-6
        assert abs(np.corrcoef(normals[:-1], normals[1:])[0, 1]) < 0.02

    def test_normals_stay_finite_at_both_ends_of_the_uniform(self) -> None:
        for content in (b"\x00", b"\xff"):
            assert np.isfinite(draw_normals(8, lambda size, c=content: c * size)).all()

    def test_a_stream_never_repeats_itself_or_another(self) -> None:
        first, second = SecureStream(), SecureStream()
        seen = {s.read(32) for s in (first, first, second, second)}
        assert len(seen) == 4

    @pytest.mark.parametrize("kind", [SecureNoise, SeededNoise])
    def test_noise_is_fresh_for_every_tensor(self, kind) -> None:
        noise, like = kind(SecureStream().read), torch.empty(64, 3)
        first, second = noise.like(like), noise.like(like)
        assert first.shape == like.shape
        assert not torch.equal(first, second)

    def test_large_runs_say_that_their_noise_is_not_cryptographic(self) -> None:
        assert train.choose_noise(1_000, seeded()).name == "chacha20"
        assert train.choose_noise(10**9, seeded()).name == "os-seeded-prng"


class TestSum:
    @pytest.mark.parametrize("seed", range(20))
    def test_one_person_moves_the_sum_by_at_most_the_clip(self, way: str, seed: int) -> None:
        task = Regression(way, seed=seed)
        moved = measure_sensitivity(task.gradient(), range(11), 11)
        assert 0 < moved <= CONSTANTS.clip_norm * (1 + 1e-5)

    def test_the_sum_is_that_of_single_clipped_gradients(self, way: str) -> None:
        task = Regression(way)
        expected = [torch.zeros_like(p) for p in task.parameters]
        for person in range(12):
            task.model.zero_grad()
            task.loss_of(person).backward()
            size = norm_of(p.grad for p in task.parameters)
            for total, p in zip(expected, task.parameters, strict=True):
                total += p.grad * min(1.0, CONSTANTS.clip_norm / size)
        for ours, theirs in zip(task.gradient().sum_clipped(range(12)), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)

    def test_per_person_norms_agree_with_opacus(self) -> None:
        grad_sample = pytest.importorskip("opacus.grad_sample")
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))
        parameters = list(model.parameters())
        records, answers = torch.randn(6, 5), torch.randn(6, 1)

        def loss_of(person: int) -> torch.Tensor:
            rows = slice(person, person + 1)
            return (model(records[rows]) - answers[rows]).square().mean()

        huge = replace(CONSTANTS, clip_norm=1e6)
        gradient = PrivateGradient(parameters, huge, 6, PersonLoop(parameters, loss_of))
        ours = [norm_of(gradient.sum_clipped([person])) for person in range(6)]
        wrapped = grad_sample.GradSampleModule(model, loss_reduction="sum")
        (wrapped(records.requires_grad_()) - answers).square().sum().backward()
        theirs = sum(p.grad_sample.flatten(1).square().sum(1) for p in parameters).sqrt()
        torch.testing.assert_close(torch.tensor(ours), theirs, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_a_record_that_is_not_finite_contributes_nothing(self, way: str, bad: float) -> None:
        task = Regression(way)
        task.records[3][0, 0] = bad
        with_bad = task.gradient().sum_clipped(range(12))
        without = task.gradient().sum_clipped([n for n in range(12) if n != 3])
        for ours, theirs in zip(with_bad, without, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)

    def test_a_parameter_that_took_no_part_counts_as_zero(self) -> None:
        task = Regression()
        idle = nn.Parameter(torch.ones(3))
        loop = PersonLoop([*task.parameters, idle], task.loss_of)
        gradient = PrivateGradient([*task.parameters, idle], CONSTANTS, 12, loop)
        gradient.fill()
        assert idle.grad is not None
        assert idle.grad.abs().sum() > 0  # noise, as for every other

    def test_nothing_is_left_of_one_sum_in_the_next(self, way: str) -> None:
        gradient = Regression(way).gradient()
        first = gradient.sum_clipped(range(12))
        for ours, theirs in zip(gradient.sum_clipped(range(12)), first, strict=True):
            assert torch.equal(ours, theirs)


class TestStep:
    def test_a_step_on_nobody_is_noise_of_the_planned_size(self) -> None:
        wide = nn.Parameter(torch.zeros(200_000))
        constants = replace(CONSTANTS, sampling_rate=1e-9, clip_norm=0.5, noise_multiplier=2.0)
        gradient = PrivateGradient([wide], constants, 10, PersonLoop([wide], lambda _: wide.sum()))
        assert math.isnan(gradient.fill())
        deviation = float(wide.grad.std())
        assert deviation == pytest.approx(2.0 * 0.5 / constants.divisor, rel=0.02)

    def test_the_divisor_is_the_planned_one_whoever_was_drawn(self, way: str) -> None:
        class Silence:
            name = "none"

            def like(self, value: torch.Tensor) -> torch.Tensor:
                return torch.zeros_like(value)

        task = Regression(way)
        sums = {}
        for rate, persons in ((0.5, 12), (0.5, 3)):
            task.records, task.answers = task.records[:persons], task.answers[:persons]
            constants = replace(CONSTANTS, sampling_rate=rate)
            gradient = task.gradient(constants, noise=Silence(), random_bytes=lambda n: bytes(n))
            gradient.fill()  # coins of zero: everybody is drawn
            expected = task.gradient().sum_clipped(range(persons))
            for parameter, total in zip(task.parameters, expected, strict=True):
                torch.testing.assert_close(parameter.grad, total / constants.divisor)
            sums[persons] = expected
        assert len(sums) == 2

    def test_two_runs_on_the_same_data_differ(self, way: str) -> None:
        results = []
        for _ in range(2):
            task = Regression(way)
            task.gradient().fill()
            results.append(task.parameters[0].grad)
        assert not torch.equal(*results)


class TestSelfTest:
    @pytest.mark.parametrize("seed", range(20))
    def test_a_correct_step_raises_no_alarm(self, way: str, seed: int) -> None:
        task = Regression(way, seed=seed)
        found = check_step(task.parameters, CONSTANTS, 12, task.sum(), seeded(seed))
        assert found.sensitivity <= 1.0001 < found.planted

    @pytest.mark.parametrize("seed", range(20))
    @pytest.mark.parametrize("defect", ["unclipped", "clipped-as-a-batch", "two-for-one"])
    def test_a_planted_defect_is_detected(
        self, way: str, seed: int, defect: str, monkeypatch
    ) -> None:
        class Broken(PrivateGradient):
            def _factor(self, norm: float) -> float:
                return {
                    "unclipped": 1.0,
                    # As if the mean of the batch were clipped: a large gradient passes whole.
                    "clipped-as-a-batch": min(1.0, 8 * self._constants.clip_norm / norm),
                    # As if each of two records of a person were clipped by itself.
                    "two-for-one": min(1.0, 2 * self._constants.clip_norm / norm),
                }[defect]

        monkeypatch.setattr(train, "PrivateGradient", Broken)
        task = Regression(way, seed=seed)
        with pytest.raises(RejectedError) as refused:
            check_step(task.parameters, CONSTANTS, 12, task.sum(), seeded(seed))
        assert refused.value.code == "AG-PRV-080"

    def test_noise_of_another_size_is_detected(self, way: str, monkeypatch) -> None:
        class Weak(SecureNoise):
            def like(self, value: torch.Tensor) -> torch.Tensor:
                return 0.9 * super().like(value)

        monkeypatch.setattr(train, "SecureNoise", Weak)
        task = Regression(way)
        with pytest.raises(RejectedError, match="deviation"):
            check_step(task.parameters, CONSTANTS, 12, task.sum())

    def test_noise_that_repeats_is_detected(self, way: str, monkeypatch) -> None:
        class Stuck(SeededNoise):
            def like(self, value: torch.Tensor) -> torch.Tensor:
                generator = torch.Generator().manual_seed(7)
                return torch.randn(value.shape, generator=generator)

        monkeypatch.setattr(train, "choose_noise", lambda _size, read: Stuck(read))
        task = Regression(way)
        with pytest.raises(RejectedError):
            check_step(task.parameters, CONSTANTS, 12, task.sum())

    def test_a_test_that_could_not_fail_refuses(self) -> None:
        task = Regression()
        still = PersonLoop(task.parameters, lambda n: 0 * task.loss_of(n))
        with pytest.raises(RejectedError, match="no gradient"):
            check_step(task.parameters, CONSTANTS, 12, still)


class TestConstants:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("sampling_rate", 64 / 1503),
            ("steps", 1503),
            ("divisor", 1503 / 16),
            ("delta", 1 / 15030),
            ("noise_multiplier", 1.2345),
            ("clip_norm", 0.12345),
        ],
    )
    def test_a_constant_that_could_tell_the_size_of_the_data_is_refused(self, field, value) -> None:
        with pytest.raises(RejectedError) as refused:
            replace(CONSTANTS, **{field: value}).check()
        assert refused.value.code == "AG-PRV-051"

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("sampling_rate", 0.0), ("sampling_rate", 0.9), ("sampling_rate", math.nan),
            ("noise_multiplier", 0.01), ("noise_multiplier", math.inf), ("steps", 0),
            ("clip_norm", 0.0), ("clip_norm", math.inf), ("divisor", 0.5), ("delta", 0.1),
            ("delta", 0.0), ("windows_per_person", 0),
        ],
    )  # fmt: skip
    def test_a_constant_out_of_range_is_refused(self, field, value) -> None:
        with pytest.raises(RejectedError) as refused:
            replace(CONSTANTS, **{field: value}).check()
        assert refused.value.code == "AG-PRV-050"

    def test_constants_survive_being_written(self) -> None:
        assert DpConstants.from_json(CONSTANTS.to_json()) == CONSTANTS


def person_windows(persons: int = 10, length: int = 12, seed: int = 5) -> Windows:
    """One to three short windows per person."""
    torch.manual_seed(seed)
    owners = torch.tensor([n for n in range(persons) for _ in range(1 + n % 3)])
    rows = len(owners)
    tokens = torch.randint(3, 61, (rows, length))
    lengths = torch.randint(4, length + 1, (rows,))
    return Windows(tokens, lengths, owners, 1000)


class TestRecipes:
    @pytest.mark.parametrize(
        ("family", "kind", "checkpointing"),
        [
            *((family, "organ", False) for family in FAMILIES),
            ("llama", "organ", True), ("gpt2", "lora", False), ("llama", "lora", True),
        ],
    )  # fmt: skip
    def test_every_recipe_trains_privately_on_every_family(
        self, family: str, kind: str, checkpointing: bool, tmp_path
    ) -> None:
        model = tiny_model(family)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        recipe = OrganPlan(blocks=1) if kind == "organ" else LoraPlan(rank=2)
        loop = LoopPlan(steps=4, warmup_steps=1, checkpointing=checkpointing)
        extract = load_recipe(kind).extract(
            Donor(model, person_windows(), tmp_path), Plan(recipe, loop, CONSTANTS)
        )
        assert extract.files[0].stat().st_size > 0
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name])

    def test_an_adapter_of_a_half_precision_base_learns_in_full_precision(self, tmp_path) -> None:
        model = tiny_model("llama").to(torch.bfloat16)
        plan = Plan(LoraPlan(rank=2), LoopPlan(steps=4, warmup_steps=1), CONSTANTS)
        extract = load_recipe("lora").extract(Donor(model, person_windows(), tmp_path), plan)
        made = load_file(extract.files[0])
        assert {value.dtype for value in made.values()} == {torch.bfloat16}
        assert {value.dtype for value in model.parameters()} == {torch.bfloat16}

    def test_a_loop_of_other_steps_than_planned_is_refused(self, tmp_path) -> None:
        plan = Plan(LoraPlan(rank=2), LoopPlan(steps=5), CONSTANTS)
        with pytest.raises(RejectedError) as refused:
            load_recipe("lora").extract(
                Donor(tiny_model("llama"), person_windows(), tmp_path), plan
            )
        assert refused.value.code == "AG-RCP-035"

    def test_cached_lower_blocks_change_no_person_s_gradient(self, tmp_path) -> None:
        torch.manual_seed(0)
        model, windows = tiny_model("llama"), person_windows()
        sums = []
        for ram in (0, 1 << 30):
            found = []

            class Spy(PrivateGradient):
                def fill(self, found=found) -> float:
                    if not found:
                        found += self.sum_clipped(range(10))
                    return super().fill()

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("allograft.recipes.loop.PrivateGradient", Spy)
                donor = Donor(model, windows, tmp_path, ram_bytes=ram, disk_bytes=0)
                loop = LoopPlan(steps=40, warmup_steps=1)
                plan = Plan(OrganPlan(blocks=1), loop, replace(CONSTANTS, steps=40))
                extract = load_recipe("organ").extract(donor, plan)
            assert extract.report["prefix"]["store"] == ("memory" if ram else "none")
            sums.append(found)
        for plain, cached in zip(*sums, strict=True):
            torch.testing.assert_close(plain, cached, rtol=1e-3, atol=1e-6)


class TestPersonWindows:
    class Letters:
        eos_token_id = 0

        def encode(self, text: str, **_: object) -> list[int]:
            return [ord(c) - 96 for c in text]

    def test_no_window_holds_text_of_two_persons(self) -> None:
        from allograft.recipes.windows import make_person_windows

        persons = [[Document("aaaa"), Document("aa")], [Document("bbbbbbbbb")], [Document("c")]]
        windows = make_person_windows(persons, self.Letters(), 4, most=2)
        assert windows.documents.tolist() == [0, 0, 1, 1, 2]
        for row, owner in zip(windows.tokens.tolist(), windows.documents.tolist(), strict=True):
            assert set(row) - {0} <= {owner + 1}

    def test_no_more_windows_than_planned_are_used(self) -> None:
        from allograft.recipes.windows import make_person_windows

        windows = make_person_windows([[Document("a" * 100)]], self.Letters(), 4, most=3)
        assert len(windows) == 3
