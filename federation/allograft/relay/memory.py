# SPDX-License-Identifier: Apache-2.0
"""How processes that pass parts on keep their memory flat.

glibc raises its threshold for returning memory with the largest block it ever freed, so after one
part a process keeps tens of megabytes for good, once per thread pool. Fixed thresholds give each
part's memory back when the part is gone. benchmarks/relay.py measures what this is worth.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

_THRESHOLD_BYTES = 128 << 10
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8

#: For Flower's processes, which are started with an environment of our making. Other allocators
#: than glibc's ignore the first three.
ENVIRONMENT: Mapping[str, str] = {
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": str(_THRESHOLD_BYTES),
    "MALLOC_TRIM_THRESHOLD_": str(_THRESHOLD_BYTES),
    # Flower holds each chunk of a message several times over while it passes it on.
    "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE": str(1 << 20),
    "FLWR_PRIVATE_MAX_CONCURRENT_OBJ_PUSHES": "1",
    "FLWR_PRIVATE_MAX_CONCURRENT_OBJ_PULLS": "1",
}


def return_memory_early() -> None:
    """Do the same for the running process; call it first thing in a daemon.

    Where the C library has no `mallopt` (macOS, musl) this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 2)
        mallopt(_M_MMAP_THRESHOLD, _THRESHOLD_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _THRESHOLD_BYTES)
