# SPDX-License-Identifier: Apache-2.0
"""Resumable training state: one safetensors file, replaced atomically, bound to its run.

Invariant: weights, both moments, step counts and losses in a file belong to one step of one run;
a file of another run is refused rather than continued. It is as private as the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from allograft.durable import durable_write
from allograft.errors import RejectedError

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")

Parameters = Mapping[str, torch.nn.Parameter]


def save_training(
    path: Path,
    run: str,
    parameters: Parameters,
    optimizer: torch.optim.Optimizer,
    losses: Sequence[float],
) -> None:
    """Write the state after the step that gave the last of `losses`.

    Args:
        path: Replaced as a whole.
        run: Digest of everything that must be equal to continue.
        parameters: What is trained.
        optimizer: AdamW over the same parameters, after at least one step.
        losses: One per step so far.

    Raises:
        UnavailableError: AG-STO-001 when the disk is full.
    """
    tensors = {"losses": torch.tensor(list(losses), dtype=torch.float64)}
    for name, value in parameters.items():
        tensors[f"weight:{name}"] = value.detach().contiguous()
        for key in _MOMENTS:
            tensors[f"{key}:{name}"] = optimizer.state[value][key].contiguous()
    durable_write(path, save(tensors, {"run": run}))


def load_training(
    path: Path, run: str, parameters: Parameters, optimizer: torch.optim.Optimizer
) -> list[float]:
    """Restore parameters and optimizer in place; returns the losses so far.

    Raises:
        RejectedError: AG-RCP-034 if the file belongs to another run or is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("run") != run:
                raise RejectedError("AG-RCP-034", "the plan or the data changed since then")
            for name, value in parameters.items():
                with torch.no_grad():
                    value.copy_(file.get_tensor(f"weight:{name}"))
                state = {key: file.get_tensor(f"{key}:{name}") for key in _MOMENTS}
                # AdamW keeps its step counts on the CPU and its moments beside the weights.
                for key in ("exp_avg", "exp_avg_sq"):
                    state[key] = state[key].to(value.device)
                optimizer.state[value] = state
            return [float(loss) for loss in file.get_tensor("losses")]
    except SafetensorError as error:
        raise RejectedError("AG-RCP-034", f"cannot read it: {type(error).__name__}") from error
