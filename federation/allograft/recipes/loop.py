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
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch.nn import functional

from allograft.crypto import canonical
from allograft.durable import durable_write
from allograft.errors import RejectedError
from allograft.recipes.text import Windows

#: Name of the resumable state in a job's work directory.
SNAPSHOT = "training.safetensors"

#: (window numbers [b], tokens [b, t]) to logits [b, t, vocabulary].
Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class LoopPlan:
    """How long and how fast to train. One step updates the weights once."""

    steps: int = 200
    batch_windows: int = 16  # windows per forward pass
    accumulation: int = 1  # forward passes per step
    learning_rate: float = 1e-3  # 1e-3 for toys; 1e-4 to 5e-5 from 100 M parameters
    warmup_steps: int = 10
    final_rate: float = 0.1  # the cosine ends at this fraction of the learning rate
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    seed: int = 0
    checkpointing: bool = False  # recompute activations: less memory, a third more time
    snapshot_s: float = 60.0  # at most this much work is lost when the process dies

    def rate(self, step: int) -> float:
        """The learning rate of a step: linear warm-up, then a cosine."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        floor = self.final_rate
        return self.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))


@dataclass(frozen=True, slots=True)
class Step:
    """What the progress callback is told after each step."""

    number: int  # counts from 1
    steps: int
    loss: float  # nats per token
    tokens: int


@dataclass(frozen=True, slots=True)
class Training:
    """What came of it."""

    losses: tuple[float, ...]
    resumed_at: int
    seconds: float  # of this process; a resumed run's earlier seconds are not in it


def train(
    forward: Forward,
    parameters: Mapping[str, torch.nn.Parameter],
    windows: Windows,
    plan: LoopPlan,
    *,
    snapshot: Path | None = None,
    progress: Callable[[Step], None] | None = None,
) -> Training:
    """Train `parameters` in place on next-token loss.

    Args:
        forward: The model; window numbers let it look up what it has cached.
        parameters: All that may change; nothing else receives an update.
        windows: The training text.
        plan: Steps, rates, seed.
        snapshot: Where to keep resumable state; loaded first if it exists.
        progress: Called after every step.

    Raises:
        RejectedError: AG-RCP-030 without data, AG-RCP-033 if the run diverges, AG-RCP-034 if the
            snapshot belongs to another run, AG-RCP-035 for a plan out of range.
    """
    _check(plan, windows)
    values = list(parameters.values())
    device = values[0].device
    optimizer = torch.optim.AdamW(values, betas=(0.9, 0.99), weight_decay=plan.weight_decay)
    run = canonical.dumps({"plan": asdict(plan), "data": windows.digest(), "names": [*parameters]})
    digest = hashlib.sha256(run).hexdigest()
    losses: list[float] = []
    if snapshot is not None and snapshot.exists():
        losses = _restore(snapshot, digest, parameters, optimizer)
    first, began, saved = len(losses), time.monotonic(), time.monotonic()
    for step in range(first, plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = plan.rate(step)
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
        norm = torch.nn.utils.clip_grad_norm_(values, plan.clip_norm)
        if not math.isfinite(total) or not math.isfinite(float(norm)):
            raise RejectedError("AG-RCP-033", f"loss or gradient not finite at step {step + 1}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total)
        due = time.monotonic() - saved >= plan.snapshot_s or step + 1 == plan.steps
        if snapshot is not None and due:
            durable_write(snapshot, _freeze(digest, parameters, optimizer, losses))
            saved = time.monotonic()
        if progress is not None:
            progress(Step(step + 1, plan.steps, total, targets))
    return Training(tuple(losses), first, time.monotonic() - began)


def token_losses(logits: torch.Tensor, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each next token in nats, [b, t - 1]; 0 on padding."""
    positions = torch.arange(1, tokens.shape[1], device=tokens.device)
    padding = positions[None, :] >= lengths.to(tokens.device)[:, None]
    labels = tokens[:, 1:].masked_fill(padding, -100)
    shifted = logits[:, :-1].float().transpose(1, 2)
    return functional.cross_entropy(shifted, labels, reduction="none", ignore_index=-100)


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


def _check(plan: LoopPlan, windows: Windows) -> None:
    counts = (plan.steps, plan.batch_windows, plan.accumulation)
    rates = (plan.learning_rate, plan.clip_norm)
    # Written so that NaN refuses.
    if min(counts) < 1 or not all(0 < rate < math.inf for rate in rates) or plan.seed < 0:
        raise RejectedError("AG-RCP-035", "steps, batch, learning rate and clip must be positive")
    if len(windows) == 0:
        raise RejectedError("AG-RCP-030", "there is nothing to train on")


def _freeze(
    digest: str,
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    losses: list[float],
) -> bytes:
    tensors = {"losses": torch.tensor(losses, dtype=torch.float64)}
    for name, value in parameters.items():
        tensors[f"weight:{name}"] = value.detach().contiguous()
        for key in ("exp_avg", "exp_avg_sq", "step"):
            tensors[f"{key}:{name}"] = optimizer.state[value][key].contiguous()
    return save(tensors, {"run": digest})


def _restore(
    path: Path,
    digest: str,
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> list[float]:
    with safe_open(path, framework="pt") as file:
        if (file.metadata() or {}).get("run") != digest:
            raise RejectedError("AG-RCP-034", "the plan or the data changed since it was written")
        for name, value in parameters.items():
            with torch.no_grad():
                value.copy_(file.get_tensor(f"weight:{name}"))
            moments = {key: file.get_tensor(f"{key}:{name}") for key in ("exp_avg", "exp_avg_sq")}
            state = {key: moment.to(value.device) for key, moment in moments.items()}
            optimizer.state[value] = state | {"step": file.get_tensor(f"step:{name}")}
        return [float(loss) for loss in file.get_tensor("losses")]
