# SPDX-License-Identifier: Apache-2.0
"""The Flower app as the bytes that the SuperLink hands to every node.

Flower's own build deflates the bundle, and what deflate makes depends on the zlib of the machine.
Sites accept one digest only, so the bundle is stored without compression, with fixed dates and
attributes: the same bytes on every machine.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from importlib import resources
from pathlib import Path

_CONFIG = "pyproject.toml"
_DATE = (1980, 1, 1, 0, 0, 0)
_UNIX = 3


def app_directory() -> Path:
    """Where the app's one file lies: in the wheel, or in a checkout that is installed editable."""
    packaged = Path(str(resources.files("allograft_server"))) / "flower"
    return packaged if packaged.is_dir() else packaged.parents[1] / "flower"


def build_bundle(directory: Path) -> bytes:
    """Bundle the app: its configuration and a list of digests, as Flower lays them out."""
    config = (directory / _CONFIG).read_bytes()
    # Flower's manifest counts bits.
    manifest = f"{_CONFIG},{hashlib.sha256(config).hexdigest()},{len(config) * 8}"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as bundle:
        for name, content in ((_CONFIG, config), (".info/CONTENT", manifest.encode())):
            entry = zipfile.ZipInfo(name, _DATE)
            entry.create_system = _UNIX
            entry.external_attr = 0o600 << 16
            bundle.writestr(entry, content)
    return buffer.getvalue()
