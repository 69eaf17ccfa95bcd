# SPDX-License-Identifier: Apache-2.0
"""Real data and public vectors that stand beside the checkout and are never committed."""

from pathlib import Path

import pytest

_SHARED = Path(__file__).resolve().parents[3] / "shared"


def shared_path(relative: str) -> Path:
    """A path under ../shared; skips the calling test where it is absent."""
    path = _SHARED / relative
    if not path.exists():
        pytest.skip(f"shared/{relative} is not beside this checkout")
    return path
