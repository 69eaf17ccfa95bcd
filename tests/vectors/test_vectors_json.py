# SPDX-License-Identifier: Apache-2.0
"""Public vectors of RFC 8785, the canonical form of JSON."""

import json

import pytest

from allograft.crypto import canonical
from kit.shared import shared_path

NAMES = ["arrays", "french", "structures", "unicode", "values", "weird"]


@pytest.mark.parametrize("name", NAMES)
def test_canonical_form(name):
    folder = shared_path("vectors/rfc8785/testdata")
    value = json.loads((folder / "input" / f"{name}.json").read_text(encoding="utf-8"))
    expected = bytes.fromhex((folder / "outhex" / f"{name}.txt").read_text())
    assert canonical.dumps(value) == expected
    assert canonical.dumps(canonical.loads(expected)) == expected
