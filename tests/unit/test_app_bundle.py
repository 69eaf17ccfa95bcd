# SPDX-License-Identifier: Apache-2.0
"""The Flower app is code-free, and its bundle is the one that sites accept."""

import hashlib
import io
import zipfile

from allograft.relay.app import COURIER_APP_SHA256
from allograft_server.app_bundle import app_directory, build_bundle


def test_the_bundle_is_the_one_that_sites_accept() -> None:
    bundle = build_bundle(app_directory())
    assert hashlib.sha256(bundle).hexdigest() == COURIER_APP_SHA256


def test_the_app_ships_no_code() -> None:
    assert [path.name for path in app_directory().iterdir()] == ["pyproject.toml"]
    with zipfile.ZipFile(io.BytesIO(build_bundle(app_directory()))) as bundle:
        assert bundle.namelist() == ["pyproject.toml", ".info/CONTENT"]
