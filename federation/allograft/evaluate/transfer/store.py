# SPDX-License-Identifier: Apache-2.0
"""Finished cells as durable files, named by a digest of everything that decides them.

Invariant: a cell's file is whole or absent. A run that was killed finds what it had finished and
makes the rest; a changed size, text or plan has other names and never meets old figures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allograft.crypto import canonical
from allograft.durable import durable_write

#: Part of every key: raise it when code changes what a cell means.
_VERSION = 1


def content_key(what: Mapping[str, canonical.Json]) -> str:
    """The name of what follows from these inputs."""
    whole = canonical.dumps({"v": _VERSION, "what": dict(what)})
    return hashlib.sha256(whole).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Store:
    """JSON values by key in one directory."""

    directory: Path

    def has(self, key: str) -> bool:
        """Whether something was saved under a key."""
        return self._path(key).exists()

    def load(self, key: str) -> dict[str, Any]:
        """What was saved under a key."""
        # Our own file, larger than any document of a stranger may be.
        value: dict[str, Any] = json.loads(self._path(key).read_bytes())
        return value

    def save(self, key: str, value: Mapping[str, Any]) -> None:
        """Keep a value, whole or not at all."""
        self.directory.mkdir(parents=True, exist_ok=True)
        durable_write(self._path(key), json.dumps(value).encode(), mode=0o644)

    def _path(self, key: str) -> Path:
        return self.directory / f"{key}.json"
