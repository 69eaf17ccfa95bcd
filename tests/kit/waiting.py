# SPDX-License-Identifier: Apache-2.0
"""A clock for code that waits for a lock: sleeping takes no time, and something may happen."""

from __future__ import annotations

from collections.abc import Callable

import pytest


class Clock:
    """Stands for the module `time`; `then` is called once, when `at_s` seconds have passed."""

    def __init__(self, at_s: float = 0.0, then: Callable[[], None] | None = None) -> None:
        self.now_s = 0.0
        self._at_s, self._then = at_s, then

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        if self._then is not None and self.now_s >= self._at_s:
            self._then, then = None, self._then
            then()


def wait_by(clock: Clock, patch: pytest.MonkeyPatch) -> None:
    """Let the waiting for state directories run by this clock."""
    patch.setattr("allograft.durable.time", clock)
