# SPDX-License-Identifier: Apache-2.0
"""Which cells a run has: first those that choose rates, then all that follow from the choice.

Rates are chosen with the first seed, on the base, by loss on validation documents, for every
method that trains: recipes, full fine-tuning and the papers' settings alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from allograft.evaluate.transfer.arms import Task
from allograft.evaluate.transfer.cell import Cell, Role
from allograft.evaluate.transfer.plan import Arm, MatrixPlan
from allograft.evaluate.transfer.world import BASE
from allograft.recipes.plan import LoraPlan, OrganPlan

ORACLE = "full fine-tuning"
WRAPPER = "NOT as published: wrapper, inserted, no recovery"
# Above it a LoRA of the reference models takes more bytes than their matrices.
_MOST_RANK = 128


def rate_tasks(plan: MatrixPlan) -> tuple[Task, ...]:
    """Every rate of everything that trains, with the first seed on the base."""
    full = [
        Task("full", ORACLE, Role.ORACLE, rate=plan.rate_scale * rate)
        for rate in plan.size.full_rates
    ]
    recipes = [
        Task("recipe", arm.name, Role.RECIPE, arm=arm, rate=plan.rate_scale * rate)
        for arm in plan.arms
        for rate in arm.rates or plan.size.full_rates
    ]
    wrapper = [
        Task("wrapper", WRAPPER, Role.PAPER, rate=plan.rate_scale * rate)
        for rate in plan.size.full_rates
    ]
    return (*full, *recipes, *(wrapper if plan.controls else ()))


def choose_rates(trials: Sequence[tuple[Task, Cell]]) -> dict[str, Task]:
    """The task with the best rate of each arm, by validation loss at full strength."""
    best: dict[str, tuple[float, Task]] = {}
    for task, cell in trials:
        top = max(point.dose for point in cell.points)
        loss = min(
            point.measured.validation.bits_per_byte for point in cell.points if point.dose == top
        )
        if task.name not in best or loss < best[task.name][0]:
            best[task.name] = (loss, task)
    return {name: task for name, (_, task) in best.items()}


def plan_cells(
    plan: MatrixPlan,
    recipients: Sequence[str],
    chosen: Mapping[str, Task],
    sizes: Mapping[str, int],
    wrong: bool,
) -> tuple[tuple[Task, ...], tuple[Task, ...]]:
    """All cells of the table: first those that train, then those that use what these made.

    Args:
        plan: What is run.
        recipients: Names of all models.
        chosen: From `choose_rates`.
        sizes: Payload bytes of each recipe arm.
        wrong: Whether there is text of a wrong domain.
    """
    seeds, few = range(plan.size.seeds), range(plan.size.control_seeds)
    others = [name for name in recipients if name != BASE]
    training: list[Task] = [
        replace(task, seed=seed)
        for task in chosen.values()
        for seed in seeds
        if task.role is not Role.PAPER or seed in few
    ]
    training += [
        replace(chosen[ORACLE], recipient=name, seed=seed) for name in others for seed in few
    ]
    using = [Task("zero-shot", "zero-shot", Role.ZERO_SHOT, name) for name in recipients]
    using += [
        replace(chosen[arm.name], recipient=name, seed=seed)
        for arm in plan.arms
        for name in others
        for seed in seeds
    ]
    if plan.controls:
        training += _training_controls(plan, chosen, sizes, wrong)
        using += _light_controls(plan, recipients, chosen)
    return tuple(training), tuple(using)


def _training_controls(
    plan: MatrixPlan, chosen: Mapping[str, Task], sizes: Mapping[str, int], wrong: bool
) -> list[Task]:
    """Controls that cost a training of their own: for the first arm of each kind."""
    tasks = []
    arms = {arm.kind: arm for arm in reversed(plan.arms)}.values()
    lora = next((arm for arm in plan.arms if arm.reference), None)
    for seed in range(plan.size.control_seeds):
        general = replace(chosen[ORACLE], name="general text, same steps", role=Role.CONTROL)
        tasks.append(replace(general, seed=seed, text="general"))
        for arm in arms:
            task = replace(chosen[arm.name], seed=seed)
            if wrong:
                named = f"{arm.name}, wrong domain"
                tasks.append(replace(task, name=named, role=Role.CONTROL, text="wrong"))
            if lora is not None and arm is not lora:
                trained = replace(chosen[lora.name], seed=seed)
                tasks += _equal_lora(arm, lora, trained, sizes)
    return tasks


def _equal_lora(arm: Arm, lora: Arm, task: Task, sizes: Mapping[str, int]) -> list[Task]:
    """LoRA of as many bytes as another packet, if there is one; its bytes grow with its rank."""
    assert isinstance(lora.plan, LoraPlan)
    rank = round(lora.plan.rank * sizes[arm.name] / sizes[lora.name])
    if not 1 <= rank <= _MOST_RANK:
        return []
    scale = lora.plan.alpha / lora.plan.rank
    plan = replace(lora.plan, rank=rank, alpha=scale * rank)
    name = f"lora r{rank}, bytes of {arm.name}"
    made = replace(lora, name=name, plan=plan)
    return [replace(task, name=name, role=Role.BASELINE, arm=made)]


def _light_controls(
    plan: MatrixPlan, recipients: Sequence[str], chosen: Mapping[str, Task]
) -> list[Task]:
    """Controls and baselines that train nothing, or one number per token."""
    tasks = [
        Task("ngram", "5-gram of the donor's text, mixed in", Role.BASELINE, name)
        for name in recipients
    ]
    tasks += [
        Task("bias", "unigram logit bias", Role.BASELINE, name)
        for name in recipients
        if name != "foreign"  # the bias counts in the donor's tokens
    ]
    for arm in plan.arms:
        task = replace(chosen[arm.name], role=Role.CONTROL)
        tasks += [
            replace(task, method="null", name=f"{arm.name}, noise of equal norm", seed=seed)
            for seed in range(plan.size.seeds)
        ]
        once = [("rotated", "turned at random")]
        if arm.kind == "organ" and not _replaces(arm):
            once.append(("untrained", "untrained blocks"))
        if arm.kind == "module_graft":
            once += [("first modules", "first modules"), ("random modules", "random modules")]
        tasks += [
            replace(task, method=method, name=f"{arm.name}, {words}", seed=seed)
            for method, words in once
            for seed in range(plan.size.control_seeds)
        ]
    return tasks


def _replaces(arm: Arm) -> bool:
    return isinstance(arm.plan, OrganPlan) and arm.plan.mode == "replace"
