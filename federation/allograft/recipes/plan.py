# SPDX-License-Identifier: Apache-2.0
"""How to train, and what a run says about itself. Free of tensor libraries.

Every number here is public: it goes into the signed provenance statement as it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from allograft.errors import RejectedError


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

    def check(self) -> None:
        """Refuse a plan that cannot be run.

        Raises:
            RejectedError: AG-RCP-035.
        """
        counts = (self.steps, self.batch_windows, self.accumulation)
        rates = (self.learning_rate, self.clip_norm)
        # Written so that NaN refuses.
        if min(counts) < 1 or not all(0 < rate < math.inf for rate in rates) or self.seed < 0:
            raise RejectedError("AG-RCP-035", "steps, batch, rate and clip must be positive")

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
