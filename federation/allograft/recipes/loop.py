# SPDX-License-Identifier: Apache-2.0
"""The one training loop: organs, LoRA and the demo's own bases all go through `train`.

Invariant: a run that is interrupted and started again with the same arguments gives the same
weights as one that was not. The batches follow from the seed and the step alone, dropout is off,
and all other state (weights, moments, losses) is in one snapshot that is replaced atomically.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from allograft.crypto import canonical
from allograft.errors import RejectedError
from allograft.privacy.dp import DpConstants
from allograft.privacy.rowwise import RowwiseSum, fits
from allograft.privacy.train import (
    ClippedSum,
    PersonLoop,
    PrivateGradient,
    check_agreement,
    check_step,
)
from allograft.recipes.base import PrivateWay
from allograft.recipes.losses import Forward, PersonLosses, token_losses
from allograft.recipes.plan import LoopPlan, Step
from allograft.recipes.resume import load_training, save_training
from allograft.recipes.windows import Windows

#: Name of the resumable state in a job's work directory.
SNAPSHOT = "training.safetensors"


@dataclass(frozen=True, slots=True)
class Training:
    """What came of it."""

    losses: tuple[float, ...]
    resumed_at: int
    seconds: float  # of this process; a resumed run's earlier seconds are not in it
    noise: str = ""  # generator of a private run's noise
    joint: bool = False  # whether a private run took several persons at once


def train(
    forward: Forward,
    parameters: Mapping[str, torch.nn.Parameter],
    windows: Windows,
    plan: LoopPlan,
    *,
    private: DpConstants | None = None,
    model: torch.nn.Module | None = None,
    private_way: PrivateWay = "auto",
    hasten: Mapping[str, float] | None = None,
    snapshot: Path | None = None,
    progress: Callable[[Step], None] | None = None,
) -> Training:
    """Train `parameters` in place on next-token loss.

    Args:
        forward: The model; window numbers let it look up what it has cached.
        parameters: All that may change; nothing else receives an update.
        windows: The training text.
        plan: Steps, rates, seed.
        private: Constants of differentially private training; `windows.documents` then tells
            persons apart. Batches, clipping and noise follow them, and a resumed run draws anew.
        model: Holds the parameters; without it a private run takes persons one at a time.
        private_way: Whether a private run takes them so, or several at once.
        hasten: Factors on the learning rate of some parameters.
        snapshot: Where to keep resumable state; loaded first if it exists.
        progress: Called after every step.

    Raises:
        RejectedError: AG-RCP-030 without data, AG-RCP-033 if the run diverges, AG-RCP-034 if the
            snapshot belongs to another run, AG-RCP-035 for a plan out of range, AG-PRV-080 if the
            private step fails its self-test or cannot take several persons when told to.
    """
    plan.check()
    if len(windows) == 0:
        raise RejectedError("AG-RCP-030", "there is nothing to train on")
    values = list(parameters.values())
    optimizer = torch.optim.AdamW(_groups(parameters, plan, hasten or {}), betas=(0.9, 0.99))
    names = {name: (hasten or {}).get(name, 1.0) for name in parameters}
    identity = {"plan": asdict(plan), "data": windows.digest(), "names": names}
    if private is not None:
        identity["private"] = private.to_json()
    run = hashlib.sha256(canonical.dumps(identity)).hexdigest()
    losses: list[float] = []
    if snapshot is not None and snapshot.exists():
        losses = load_training(snapshot, run, parameters, optimizer)
    fill, noise, joint = _plain_steps(forward, values, windows, plan), "", False
    if private is not None:
        if plan.steps != private.steps:
            raise RejectedError("AG-RCP-035", "the loop has other steps than the privacy plan")
        most = private.windows_per_person
        persons = PersonLosses(forward, windows, most, plan.batch_windows, values[0].device)
        way = _choose_way(persons, values, plan, private, model, private_way)
        joint = isinstance(way, RowwiseSum)
        fill, noise = _private_steps(way, values, len(persons), private)
    first, began, saved = len(losses), time.monotonic(), time.monotonic()
    for step in range(first, plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = plan.rate(step) * group["factor"]
        loss, tokens = fill(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss)
        due = time.monotonic() - saved >= plan.snapshot_s or step + 1 == plan.steps
        if snapshot is not None and due:
            save_training(snapshot, run, parameters, optimizer, losses)
            saved = time.monotonic()
        if progress is not None:
            progress(Step(step + 1, plan.steps, loss, tokens))
    return Training(tuple(losses), first, time.monotonic() - began, noise, joint)


#: Sets the gradients of a step; returns the loss in nats per token, and how many tokens it saw.
_Fill = Callable[[int], tuple[float, int]]


def _plain_steps(
    forward: Forward, parameters: Sequence[torch.nn.Parameter], windows: Windows, plan: LoopPlan
) -> _Fill:
    """Steps on batches that follow from the seed."""
    device = parameters[0].device

    def fill(step: int) -> tuple[float, int]:
        numbers = _draw(step, plan, len(windows))
        targets = int((windows.lengths[numbers] - 1).sum())
        total = 0.0
        for batch in torch.split(numbers, plan.batch_windows):
            tokens = windows.tokens[batch].to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = forward(batch, tokens)
            # Summed over the whole step, so that accumulation changes memory and nothing else.
            loss = token_losses(logits, tokens, windows.lengths[batch]).sum() / targets
            torch.autograd.backward(loss)
            total += float(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(parameters, plan.clip_norm)
        if not math.isfinite(total) or not math.isfinite(float(norm)):
            raise RejectedError("AG-RCP-033", f"loss or gradient not finite at step {step + 1}")
        return total, targets

    return fill


def _choose_way(
    persons: PersonLosses,
    parameters: Sequence[torch.nn.Parameter],
    plan: LoopPlan,
    constants: DpConstants,
    model: torch.nn.Module | None,
    private_way: PrivateWay,
) -> ClippedSum:
    """One person at a time, or several at once where that is faster and finds the same sums."""
    loop = PersonLoop(parameters, persons.loss_of)
    # Measured on a CPU: several at once are faster at every length, most for short windows. But
    # recomputation is asked for to hold few activations, and several persons' are many.
    if private_way == "single" or (private_way == "auto" and plan.checkpointing):
        return loop
    try:
        if model is None or not fits(model, parameters):
            raise RejectedError("AG-PRV-080", "this model cannot take several persons at once")
        rowwise = RowwiseSum(model, parameters, persons)
        ways = (rowwise, loop)
        check_agreement(parameters, constants, len(persons), ways, also=[persons.widest()])
    except RejectedError:
        if private_way == "joint":
            raise
        return loop
    return rowwise


def _private_steps(
    way: ClippedSum,
    parameters: Sequence[torch.nn.Parameter],
    persons: int,
    constants: DpConstants,
) -> tuple[_Fill, str]:
    """Steps on persons drawn by chance, after a self-test, and their noise's generator."""
    check_step(parameters, constants, persons, way)
    gradient = PrivateGradient(parameters, constants, persons, way)
    told = 0.0

    def fill(_step: int) -> tuple[float, int]:
        nonlocal told
        loss = gradient.fill()
        told = loss if math.isfinite(loss) else told  # nobody was drawn
        return told, 0

    return fill, gradient.noise.name


def _groups(
    parameters: Mapping[str, torch.nn.Parameter], plan: LoopPlan, hasten: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Parameters by rate and decay.

    Only matrices decay: pulling a norm's gain towards zero is no regularisation, and on Gemma it
    would open a silenced block by itself.
    """
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, value in parameters.items():
        decay = plan.weight_decay if value.ndim > 1 else 0.0
        groups.setdefault((decay, hasten.get(name, 1.0)), []).append(value)
    return [
        {"params": values, "weight_decay": decay, "factor": factor}
        for (decay, factor), values in groups.items()
    ]


def _draw(step: int, plan: LoopPlan, count: int) -> torch.Tensor:
    """The windows of a step: epochs of seeded permutations, laid end to end."""
    size = plan.batch_windows * plan.accumulation
    picked: list[torch.Tensor] = []
    for place in range(step * size, (step + 1) * size):
        epoch, index = divmod(place, count)
        if not picked or index == 0:
            generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + epoch)
            order = torch.randperm(count, generator=generator)
        picked.append(order[index])
    return torch.stack(picked)
