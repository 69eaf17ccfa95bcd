# SPDX-License-Identifier: Apache-2.0
"""The A matrices that a consortium agrees on, drawn from the public name of a seed.

With one A for all, only B learns and travels: half the bytes, the mean of several sites' B is
exactly the mean of their changes, and a private step's noise enters the change once instead of as
a product (FFA-LoRA, arXiv 2403.12313). A never travels: each side draws it for itself, from
SHAKE256 and arithmetic that IEEE 754 fixes, so that any implementation finds the same bits. Not a
library's random generator: those differ between versions and devices. See protos/spec/recipes.md.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch

_DOMAIN = b"allograft lora A v1"


def draw_a(seed: str, module: str, rank: int, inputs: int) -> torch.Tensor:
    """The A of one module, [rank, inputs] in float32, uniform within 1 / sqrt(inputs) of zero.

    That is the distribution of PEFT's own initialisation. Row r does not depend on the rank.

    Args:
        seed: Name of the seed.
        module: The module's name in PEFT's files, without `.lora_A.weight`.
        rank: How many rows.
        inputs: How many columns.
    """
    message = b"\n".join((_DOMAIN, seed.encode("ascii"), module.encode("ascii")))
    drawn = np.frombuffer(hashlib.shake_256(message).digest(4 * rank * inputs), dtype="<u4")
    # The top 24 bits n as the odd number 2 n + 1 - 2^24: symmetric, and exact in either precision.
    odd = 2.0 * (drawn >> 8).astype(np.float64) + (1.0 - 2.0**24)
    values = odd * 2.0**-24 * (1.0 / math.sqrt(inputs))
    return torch.from_numpy(values.astype(np.float32).reshape(rank, inputs))
