# SPDX-License-Identifier: Apache-2.0
"""Figures of a run from measurements whose outcome is known beforehand."""

import math
from dataclasses import replace

import numpy as np
import pytest

from allograft.evaluate.bootstrap import Losses, paired_bits, paired_recovery
from allograft.evaluate.transfer.arms import Task
from allograft.evaluate.transfer.cell import Cell, Measured, Point, Role
from allograft.evaluate.transfer.figures import Figures, check_sanity, make_figures
from allograft.evaluate.transfer.plan import ARMS, SIZES, Arm, MatrixPlan
from allograft.evaluate.transfer.plot import plot_bytes, plot_doses
from allograft.evaluate.transfer.report import RunReport
from allograft.evaluate.transfer.schedule import ORACLE, choose_rates, plan_cells, rate_tasks
from allograft.evaluate.transfer.text import make_texts
from allograft.recipes.plan import LoraPlan
from benchmarks import transfer
from kit.transfer import AMOUNTS, SOURCES

DOCUMENTS = 40


def losses(nats: float, noise: float = 0.0) -> Losses:
    spread = np.random.default_rng(0).normal(0.0, 1.0, DOCUMENTS)
    whole = np.full(DOCUMENTS, nats) + noise * spread
    return Losses(whole, np.full(DOCUMENTS, 10), np.full(DOCUMENTS, 20))


def measured(domain: float, general: float, validation: float | None = None) -> Measured:
    chosen = domain if validation is None else validation
    return Measured(losses(chosen), losses(domain), losses(general), losses(general))


def cell(arm: str, role: Role, *points: tuple[float, Measured], **fields: object) -> Cell:
    made = tuple(Point(dose, f"dose {dose:g}", each) for dose, each in points)
    return replace(Cell(arm, role, "base", 0, made), **fields)


ZERO = cell("zero-shot", Role.ZERO_SHOT, (0.0, measured(30.0, 20.0)))
FULL = cell(ORACLE, Role.ORACLE, (1.0, measured(20.0, 24.0)), payload_bytes=4096)
LORA = cell(
    "lora r8", Role.RECIPE, (0.5, measured(25.0, 20.1)), (1.0, measured(22.0, 23.0)),
    verdict="exact", payload_bytes=512,
)  # fmt: skip


def figures(*more: Cell) -> Figures:
    return make_figures([ZERO, FULL, LORA, *more], "lora r8")


def test_gain_is_bits_per_byte_and_recovery_a_share_of_the_oracles() -> None:
    before, after, oracle = losses(30.0), losses(25.0), losses(20.0)
    gain = paired_bits(before, after)
    assert gain.value == pytest.approx(5.0 / math.log(2) / 20)
    assert gain.value == pytest.approx(before.bits_per_byte - after.bits_per_byte)
    assert paired_recovery(before, after, oracle).value == pytest.approx(0.5)
    assert paired_recovery(before, losses(32.0), oracle).value == pytest.approx(-0.2)


def test_an_interval_is_wide_where_documents_disagree() -> None:
    calm, wild = (paired_bits(losses(30.0), losses(29.0, noise)) for noise in (0.1, 8.0))
    assert calm.low > 0
    assert wild.low < 0 < wild.high


@pytest.mark.parametrize(
    ("full", "lora", "holds"),
    [(20, 22, True), (20, 20, True), (23, 22, False), (20, 30, False), (20, 31, False),
     (math.nan, 22, False)],
)  # fmt: skip
def test_sanity_wants_full_fine_tuning_then_lora_then_zero_shot(
    full: float, lora: float, holds: bool
) -> None:
    assert check_sanity(losses(30.0), losses(lora), losses(full)).holds is holds


def test_a_broken_baseline_shows_its_reason_and_no_row() -> None:
    broken = replace(FULL, points=(Point(1.0, "fine-tuned", measured(31.0, 20.0)),))
    found = make_figures([ZERO, broken, LORA], "lora r8")
    assert not found.sanity.holds
    report = RunReport(found, make_texts(SOURCES, AMOUNTS), MatrixPlan(SIZES["quick"]), 1.0)
    page = report.to_markdown()
    assert "no comparison is shown" in page
    assert "full fine-tuning 2.236, LoRA 1.587, zero-shot 2.164" in page
    assert "| lora r8" not in page
    assert "rows" not in report.to_json()


def test_a_recipe_is_shown_at_full_dose_and_at_the_gates() -> None:
    rows = {row.chosen_by: row for row in figures().rows if row.arm == "lora r8"}
    assert rows["full"].recovery is not None
    assert rows["full"].recovery.value == pytest.approx(0.8)
    # The gate's limit on general text is .02 nats per token: dose 1 costs .3, half a dose .01.
    assert rows["gate"].dose == 0.5
    assert rows["gate"].general.value == pytest.approx(0.1 / math.log(2) / 20)


def test_a_baseline_is_chosen_on_validation_and_judged_on_test() -> None:
    flattering = (0.3, measured(21.0, 20.0, validation=29.0))
    chosen = (0.7, measured(28.0, 20.0, validation=22.0))
    (row,) = [r for r in figures(cell("n", Role.BASELINE, flattering, chosen)).rows if r.arm == "n"]
    assert (row.dose, row.chosen_by) == (0.7, "validation")
    assert row.recovery is not None
    assert row.recovery.value == pytest.approx(0.2)


def test_seeds_are_averaged_and_their_spread_is_told() -> None:
    cells = [
        cell("organ", Role.RECIPE, (1.0, measured(value, 20.0)), seed=seed)
        for seed, value in enumerate((24.0, 26.0, 31.0))
    ]
    (row,) = [row for row in figures(*cells).rows if row.arm == "organ"]
    assert row.gain.value == pytest.approx(3.0 / math.log(2) / 20)
    assert row.seed_gains[2] < 0 < row.seed_gains[1] < row.seed_gains[0]
    assert (row.harmed, row.seeds) == (1, 3)


def test_harm_counts_forced_recipients_apart() -> None:
    taken = cell("organ", Role.RECIPE, (1.0, measured(24.0, 20.0)), verdict="exact")
    forced = replace(
        cell("organ", Role.RECIPE, (1.0, measured(33.0, 20.0)), verdict="refuse"),
        recipient="stranger", code="AG-RCP-013",
    )  # fmt: skip
    zero = replace(ZERO, recipient="stranger")
    unfit = replace(forced, recipient="wide", points=(), code="AG-RCP-010")
    found = figures(taken, forced, zero, unfit)
    (harm,) = [each for each in found.harms if each.arm == "organ"]
    assert (harm.harmed, harm.of, harm.forced_harmed, harm.forced) == (0, 1, 1, 1)
    assert [(each.recipient, each.code) for each in found.refusals] == [("wide", "AG-RCP-010")]
    (row,) = [each for each in found.rows if each.recipient == "stranger"]
    assert row.forced
    assert row.verdict == "refuse AG-RCP-013"
    assert row.recovery is None  # nobody fine-tuned the stranger


def test_accuracy_is_of_the_chosen_strength_and_averaged_over_seeds() -> None:
    answers = ((1.0, 1.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0))
    cells = [
        cell("organ", Role.RECIPE, (1.0, replace(measured(24.0, 20.0), correct=each)), seed=seed)
        for seed, each in enumerate(answers)
    ]
    rows = figures(*cells).rows
    (accuracy,) = [row.accuracy for row in rows if row.arm == "organ"]
    assert accuracy is not None
    assert accuracy.value == pytest.approx(3 / 8)
    assert accuracy.low < 3 / 8 < accuracy.high
    assert {row.accuracy for row in rows if row.arm != "organ"} == {None}


def test_cells_survive_their_file() -> None:
    again = Cell.from_json(LORA.to_json())
    assert again.to_json() == LORA.to_json()
    assert again.points[1].measured.test.nats.tolist() == [22.0] * DOCUMENTS


def test_rates_are_chosen_on_validation_text() -> None:
    arm = ARMS[0]
    trials = []
    for rate, validation, test in ((1e-3, 25.0, 20.0), (1e-2, 24.0, 29.0)):
        task = Task("recipe", arm.name, Role.RECIPE, arm=arm, rate=rate)
        half = (0.5, measured(1.0, 1.0))  # only full strength counts
        full = (1.0, measured(test, 1.0, validation=validation))
        trials.append((task, cell(arm.name, Role.RECIPE, half, full)))
    assert choose_rates(trials)[arm.name].rate == 1e-2


PLAN = MatrixPlan(SIZES["quick"])
PEOPLE = ("base", "relative", "stranger", "wide", "foreign")


def plan(arms: tuple[Arm, ...] = ARMS, wrong: bool = True, **fields: object) -> list[Task]:
    matrix = replace(PLAN, arms=arms, **fields)
    chosen = {task.name: task for task in rate_tasks(matrix)}
    sizes = {arm.name: 100_000 * (number + 1) for number, arm in enumerate(arms)}
    return [t for wave in plan_cells(matrix, PEOPLE, chosen, sizes, wrong) for t in wave]


def test_every_recipe_meets_every_recipient_with_every_seed() -> None:
    another = Arm("lora r2", "lora", LoraPlan(rank=2), (1e-3,))
    tasks = plan((*ARMS, another))
    for arm in (*ARMS, another):
        met = {(t.recipient, t.seed) for t in tasks if t.name == arm.name}
        assert met == {(name, seed) for name in PEOPLE for seed in range(3)}


def test_every_recipe_has_its_controls() -> None:
    names = {task.name for task in plan()}
    for arm in ARMS:
        assert {f"{arm.name}, noise of equal norm", f"{arm.name}, turned at random"} <= names
    firsts = {arm.kind: arm for arm in reversed(ARMS)}.values()
    wrong = {f"{arm.name}, wrong domain" for arm in firsts}
    assert wrong <= names
    assert {"organ, untrained blocks", "general text, same steps", "unigram logit bias",
            "5-gram of the donor's text, mixed in"} <= names  # fmt: skip
    without = {task.name for task in plan(wrong=False)}
    assert names - without == wrong
    assert not any(task.role is Role.CONTROL for task in plan(controls=False))


def test_equal_lora_has_the_packets_bytes() -> None:
    organ, lora = ARMS[0], next(arm for arm in ARMS if arm.reference)
    (task,) = [t for t in plan((lora, organ)) if t.name.startswith("lora r16")]
    assert task.arm is not None
    assert task.arm.plan == LoraPlan(rank=16, alpha=32.0)  # twice the bytes, twice the rank


@pytest.mark.parametrize("size", [1_000, 100_000_000])
def test_no_lora_is_as_small_as_a_prompt_or_as_large_as_all_matrices(size: int) -> None:
    lora, other = next(arm for arm in ARMS if arm.reference), ARMS[0]
    chosen = {task.name: task for task in rate_tasks(PLAN)}
    sizes = {lora.name: 100_000, other.name: size}
    waves = plan_cells(replace(PLAN, arms=(lora, other)), PEOPLE, chosen, sizes, wrong=True)
    assert not [t for wave in waves for t in wave if t.name.endswith(f"bytes of {other.name}")]


def test_the_benchmark_holds_each_recipe_against_its_promise() -> None:
    relative = [replace(each, recipient="relative") for each in (ZERO, FULL, LORA)]
    found = {each.name: each for each in transfer.summarise(figures(*relative), 60.0)}
    assert found["lora_r8_recovery"].value == pytest.approx(0.8)
    assert found["lora_r8_recovery"].target == ">= 0.85"
    assert found["lora_r8_relative_over_base"].value == pytest.approx(1.0)
    assert found["lora_r8_gate_gain_share"].value == pytest.approx(5 / 8)
    assert found["lora_r8_gate_harm_share"].value == pytest.approx(0.1 / 3)


def test_plots_name_what_they_show() -> None:
    found = figures()
    assert "lora r8<" in plot_doses(found)
    assert "full fine-tuning<" in plot_bytes(found)
