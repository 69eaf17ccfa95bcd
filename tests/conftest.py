# SPDX-License-Identifier: Apache-2.0
"""What holds for every test."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(autouse=True)
def _same_chance_in_any_order() -> None:
    """Draws that a test does not seed are the same whichever tests ran before it."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(0)
