# SPDX-License-Identifier: Apache-2.0
"""The parts of Flower that the coordinator's adapter touches are as they were in 1.41."""

from __future__ import annotations

import dataclasses
import inspect
import io
import zipfile

import flwr
import flwr.common.constant
import pytest
from flwr.cli.build import build_fab_from_disk
from flwr.cli.config_utils import get_fab_metadata, load_and_validate
from flwr.common.event_log_plugin import EventLogWriterPlugin
from flwr.serverapp import Grid
from flwr.supercore import constant, sql_mixin
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.superlink.auth_plugin import ControlAuthnPlugin
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.main import create_app

from allograft.relay.memory import ENVIRONMENT
from allograft_server import flower_private
from allograft_server.app_bundle import app_directory, build_bundle


def test_flower_is_the_pinned_minor_version() -> None:
    assert flwr.__version__.startswith("1.41.")


def test_superlink_configuration_has_the_fields_we_fill() -> None:
    assert {field.name for field in dataclasses.fields(SuperLinkLifespanConfig)} == {
        "control_address", "health_server_address", "host", "port", "insecure", "certificates",
        "superexec_auth_secret", "authn_plugin", "event_log_plugin", "fleet_event_log_plugin",
        "enable_event_log", "artifact_provider", "enable_supernode_auth", "fleet_api_type",
        "fleet_api_address", "simulation", "ssl_ca_certfile", "ssl_certfile", "ssl_keyfile",
        "database", "isolation", "runtime_dependency_install",
    }  # fmt: skip
    assert list(inspect.signature(create_app).parameters) == ["config", "superlink_lifespan_class"]


@pytest.mark.parametrize(
    ("plugin", "ours"),
    [
        (ControlAuthnPlugin, flower_private._TokenAuthn),
        (EventLogWriterPlugin, flower_private._Audit),
    ],
)
def test_plugins_ask_for_the_methods_we_have(plugin: type, ours: type) -> None:
    abstract: frozenset[str] = plugin.__abstractmethods__
    for name in abstract - {"__init__"}:
        theirs = list(inspect.signature(getattr(plugin, name)).parameters)
        assert list(inspect.signature(getattr(ours, name)).parameters) == theirs


@pytest.mark.parametrize(
    "method",
    ["ListNodes", "RegisterNode", "UnregisterNode", "StartRun", "ListRuns", "StopRun", "close"],
)
def test_control_client_has_the_calls_we_make(method: str) -> None:
    assert callable(getattr(ControlHttpClient, method))


def test_database_settings_are_taken_from_where_we_change_them() -> None:
    names = [name for name, _ in constant.SQLITE_PRAGMAS]
    assert {"mmap_size", "cache_size"} <= set(names)
    source = inspect.getsource(sql_mixin)
    assert "in SQLITE_PRAGMAS" in source


def test_flower_reads_the_variables_that_bound_its_memory() -> None:
    source = inspect.getsource(flwr.common.constant) + inspect.getsource(constant)
    names = [name for name in ENVIRONMENT if name.startswith("FLWR_")]
    assert len(names) == 3
    assert all(f'"{name}"' in source for name in names)


def test_grid_has_the_public_methods_of_our_courier() -> None:
    assert {"get_nodes", "push_messages", "pull_messages"} <= set(dir(Grid))


# Flower's own build leans on a deprecated name of one of its libraries.
@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
def test_our_bundle_holds_what_flowers_own_build_holds() -> None:
    assert load_and_validate(app_directory() / "pyproject.toml", check_module=False)[1] == []
    assert get_fab_metadata(build_bundle(app_directory())) == ("allograft/courier", "1.0.0")
    with (
        zipfile.ZipFile(io.BytesIO(build_fab_from_disk(app_directory()))) as theirs,
        zipfile.ZipFile(io.BytesIO(build_bundle(app_directory()))) as ours,
    ):
        assert theirs.namelist() == ours.namelist()
        assert theirs.read(".info/CONTENT").count(b",") == ours.read(".info/CONTENT").count(b",")
