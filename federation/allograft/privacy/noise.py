# SPDX-License-Identifier: Apache-2.0
"""Coins and Gaussian noise for differential privacy, from random bytes.

The bytes are an argument: in a run they come from `crypto.stream.SecureStream`, because whoever can
predict the noise can take it off again. Only tests pass anything else.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

#: Gives that many random bytes.
RandomBytes = Callable[[int], bytes]

#: Normals made at once; more than this would not stay in the processor's cache.
_BLOCK = 1 << 15


def draw_persons(count: int, rate: float, random_bytes: RandomBytes) -> npt.NDArray[np.int64]:
    """Poisson sampling: the numbers of the persons whose own coin, of chance `rate`, fell heads.

    Args:
        count: How many persons there are.
        rate: The chance of each; 1 means everybody.
        random_bytes: Where the coins come from; eight bytes for each person.

    Returns:
        int64 [drawn], ascending; often empty for small populations.
    """
    if rate >= 1:
        return np.arange(count, dtype=np.int64)  # 2**64 is beyond what a coin can be held against
    coins = np.frombuffer(random_bytes(8 * count), dtype="<u8")
    return np.flatnonzero(coins < np.uint64(int(rate * 2.0**64)))


def draw_normals(count: int, random_bytes: RandomBytes) -> npt.NDArray[np.float32]:
    """Independent standard normals (Box and Muller 1958).

    Uniforms have 53 bits, so the tail ends at 8.6 standard deviations, beyond anything that a
    float32 sum of this size could show.

    Returns:
        float32 [count].
    """
    pairs = -(-count // 2)
    normals = np.empty(2 * pairs, dtype=np.float32)
    for start in range(0, pairs, _BLOCK):
        size = min(_BLOCK, pairs - start)
        words = np.frombuffer(random_bytes(16 * size), dtype="<u8") >> np.uint64(11)
        uniform = (words.astype(np.float64) + 0.5) * 2.0**-53  # never 0: its logarithm is finite
        radius = np.sqrt(-2.0 * np.log(uniform[:size]))
        angle = (2.0 * np.pi) * uniform[size:]
        normals[start : start + size] = radius * np.cos(angle)
        normals[pairs + start : pairs + start + size] = radius * np.sin(angle)
    return normals[:count]
