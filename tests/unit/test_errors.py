# SPDX-License-Identifier: Apache-2.0
"""The registry, the code that raises and the pages that explain say the same."""

import importlib.util
import re
from itertools import groupby
from pathlib import Path

import pytest

from allograft.errors import CODES, AllograftError, RejectedError, UnavailableError

ROOT = Path(__file__).resolve().parents[2]
_CODE = re.compile(r'"(AG-[A-Z]{2,3}-\d{3})"')


def _used_codes() -> set[str]:
    used = set()
    for folder in ("federation", "client", "server"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name != "errors.py" or path.parent.name != "allograft":
                used |= set(_CODE.findall(path.read_text(encoding="utf-8")))
    return used


def test_every_code_in_use_is_registered() -> None:
    assert _used_codes() - CODES.keys() == set()


def test_every_registered_code_is_in_use() -> None:
    assert CODES.keys() - _used_codes() == set()


def test_codes_of_an_area_stand_together_in_order() -> None:
    """A new code is easy to add in the right place, and a merge of two shows a clash."""
    areas = [code.rsplit("-", 1)[0] for code in CODES]
    assert len([area for area, _ in groupby(areas)]) == len(set(areas))
    for area in set(areas):
        own = [code for code in CODES if code.startswith(f"{area}-")]
        assert own == sorted(own)


def test_pages_match_the_registry() -> None:
    spec = importlib.util.spec_from_file_location("error_pages", ROOT / ".ci" / "error_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    expected = module.pages()
    found = {path.name: path.read_text("utf-8") for path in (ROOT / "docs/errors").glob("*.md")}
    assert found == expected, "run `make error-pages`"
    assert {code.rsplit("-", 1)[0] for code in CODES} <= set(module.AREAS)


def test_families_tell_retry_from_refusal() -> None:
    rejected = RejectedError("AG-IN-001", "cause")
    assert isinstance(rejected, AllograftError)
    assert not isinstance(rejected, UnavailableError)
    assert rejected.fix == CODES["AG-IN-001"].fix


def test_unknown_codes_cannot_be_raised() -> None:
    with pytest.raises(KeyError):
        RejectedError("AG-XXX-999", "cause")
