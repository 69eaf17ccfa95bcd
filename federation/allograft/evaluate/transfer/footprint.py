# SPDX-License-Identifier: Apache-2.0
"""Seconds and peak memory of one training, inside a process that does many."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


@dataclass(slots=True)
class Footprint:
    """Filled in when the block ends.

    Attributes:
        seconds: Processor time on a CPU, because other work shares it; wall time on a GPU.
        peak_bytes: Most memory at any time, less what was taken at the start.
    """

    seconds: float = 0.0
    peak_bytes: int = 0


@contextlib.contextmanager
def footprint(device: str) -> Iterator[Footprint]:
    """Measure what happens inside the block."""
    found = Footprint()
    cuda = device != "cpu"
    clock = time.perf_counter if cuda else time.process_time
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        _settle()
        before = _peak_bytes()
    began = clock()
    try:
        yield found
    finally:
        found.seconds = clock() - began
        peak = torch.cuda.max_memory_allocated() if cuda else _peak_bytes()
        found.peak_bytes = max(0, peak - before)


def _settle() -> None:
    """Give freed memory back and let the high-water mark fall to what is resident (Linux).

    Else a training would reuse what an earlier one left, and seem to need nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", "ascii")


def _peak_bytes() -> int:
    """The high-water mark of resident memory."""
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text("ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10
