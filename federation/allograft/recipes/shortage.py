# SPDX-License-Identifier: Apache-2.0
"""Running out of memory, as an error with a code.

Python, a CPU's allocator and an accelerator each say it in another way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from allograft.errors import UnavailableError

# The CPU's allocator raises a plain RuntimeError; these words are all that tells it from others.
_CPU_WORDS = ("can't allocate memory", "not enough memory")


@contextlib.contextmanager
def memory_errors(what: str) -> Iterator[None]:
    """Turn a failed allocation into AG-RCP-027; other errors pass through.

    Args:
        what: What was being done, in words for the operator.

    Raises:
        UnavailableError: AG-RCP-027.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        is_shortage = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if is_shortage or any(words in str(error) for words in _CPU_WORDS):
            raise UnavailableError("AG-RCP-027", f"while {what}") from error
        raise
