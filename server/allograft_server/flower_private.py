# SPDX-License-Identifier: Apache-2.0
"""Everything on the coordinator's side that touches what Flower 1.41 does not promise to keep.

Flower changes such interfaces between minor versions, so no other module of this package imports
them, flwr is pinned to one minor version, and tests/unit/test_flower_contract.py fails when the
parts used here move.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from flwr.common.constant import ISOLATION_MODE_PROCESS, TRANSPORT_TYPE_GRPC_RERE
from flwr.common.event_log_plugin import EventLogWriterPlugin
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.fab_pb2 import Fab
from flwr.supercore import constant, sql_mixin
from flwr.supercore.auth.typing import AccountInfo
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.superlink.auth_plugin import ControlAuthnPlugin
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.main import create_app

from allograft.errors import RejectedError, UnavailableError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]

ACCESS_TOKEN = "flwr-oidc-access-token"  # noqa: S105  (the name of a field)
_REFUSED = {400, 403, 404, 409, 412, 422}
# The owner that Flower's own open-source build writes for every node and run.
_ACCOUNT = AccountInfo(flwr_aid="<id:none>", account_name="none")


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One call to the SuperLink, as its audit file records it."""

    time: str
    caller: str
    address: str
    method: str
    run: int
    outcome: str


@dataclass(frozen=True, slots=True)
class SuperLinkPlan:
    """What the SuperLink needs to start."""

    host: str
    port: int
    database: Path
    ca_file: Path
    certificate_file: Path
    key_file: Path
    executor_secret: bytes
    operator_token: str
    audit: Callable[[AuditEntry], None]


@dataclass(frozen=True, slots=True)
class RegisteredNode:
    """A node that the SuperLink knows."""

    node_id: int
    public_key: bytes
    status: str


class _TokenAuthn(ControlAuthnPlugin):  # type: ignore[misc]  # flwr is untyped here
    """Accept control calls that carry the operator's token; there is no login."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()

    def get_login_details(self) -> None:
        return None

    def validate_tokens_in_metadata(
        self, metadata: Sequence[tuple[str, str | bytes]]
    ) -> tuple[bool, AccountInfo | None]:
        found = dict(metadata).get(ACCESS_TOKEN, "")
        given = found.encode() if isinstance(found, str) else found
        if hmac.compare_digest(given, self._token):
            return True, _ACCOUNT
        return False, None

    def get_auth_tokens(self, device_code: str) -> None:
        return None

    def refresh_tokens(self, metadata: Sequence[tuple[str, str | bytes]]) -> tuple[None, None]:
        return None, None


class _Audit(EventLogWriterPlugin):  # type: ignore[misc]  # flwr is untyped here
    """Hand every finished call to the audit function."""

    def __init__(self, write: Callable[[AuditEntry], None]) -> None:
        self._write = write

    def compose_log_before_event(
        self, request: Any, context: Any, account_info: Any, method_name: str
    ) -> None:
        return None

    def compose_log_after_event(
        self, request: Any, context: Any, account_info: Any, method_name: str, response: Any
    ) -> AuditEntry:
        node = getattr(getattr(request, "node", None), "node_id", 0)
        node = node or getattr(request, "node_id", 0)
        return AuditEntry(
            time=datetime.now(UTC).isoformat(timespec="milliseconds"),
            caller="operator" if account_info is not None else f"node {node}",
            address=context.client.host if context.client else "",
            method=method_name,
            run=getattr(request, "run_id", 0),
            outcome="failed" if isinstance(response, BaseException) else "completed",
        )

    def write_log(self, log_entry: AuditEntry | None) -> None:
        if log_entry is not None:
            self._write(log_entry)


def make_superlink(plan: SuperLinkPlan) -> AsgiApp:
    """Flower's own SuperLink application, with operator authentication and audit."""
    _keep_database_out_of_memory()
    audit = _Audit(plan.audit)
    config = SuperLinkLifespanConfig(
        control_address="",
        health_server_address=None,
        host=plan.host,
        port=plan.port,
        insecure=False,
        certificates=(
            plan.ca_file.read_bytes(),
            plan.certificate_file.read_bytes(),
            plan.key_file.read_bytes(),
        ),
        superexec_auth_secret=plan.executor_secret,
        authn_plugin=_TokenAuthn(plan.operator_token),
        event_log_plugin=audit,
        fleet_event_log_plugin=audit,
        enable_event_log=True,
        artifact_provider=None,
        enable_supernode_auth=True,
        fleet_api_type=TRANSPORT_TYPE_GRPC_RERE,
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=str(plan.ca_file),
        ssl_certfile=str(plan.certificate_file),
        ssl_keyfile=str(plan.key_file),
        database=str(plan.database),
        isolation=ISOLATION_MODE_PROCESS,
        runtime_dependency_install=False,
    )
    app: AsgiApp = create_app(config, SuperLinkLifespan)
    return app


def _keep_database_out_of_memory() -> None:
    """Turn off the memory map (256 MB) and most of the page cache (64 MB) of Flower's SQLite.

    Parts pass through that database once; mapping it would count every part as our memory.
    """
    kept = [entry for entry in constant.SQLITE_PRAGMAS if entry[0] not in {"mmap_size"}]
    pragmas = tuple((name, "-4000" if name == "cache_size" else value) for name, value in kept)
    sql_mixin.SQLITE_PRAGMAS = pragmas


class _Bearer:
    """Add the operator's token to control calls."""

    def __init__(self, token: str) -> None:
        self._token = token

    def intercept(self, context: Any, call_next: Callable[[Any], httpx.Response]) -> httpx.Response:
        context.request.headers["Authorization"] = f"Bearer {self._token}"
        return call_next(context)


class ControlClient:
    """Control calls to our own SuperLink over its private listener.

    Every method raises AG-CRD-011: RejectedError when the SuperLink refuses this very request,
    UnavailableError when it does not know us or is not there.
    """

    def __init__(self, address: str, ca_file: Path, token: str) -> None:
        self._client = ControlHttpClient.from_server_address(
            address, False, ca_file.read_bytes(), [_Bearer(token)]
        )

    def nodes(self) -> tuple[RegisteredNode, ...]:
        """All nodes that are registered now."""
        reply = self._call("ListNodes", ListNodesRequest())
        return tuple(
            RegisteredNode(info.node_id, bytes(info.public_key), info.status)
            for info in reply.nodes_info
            if info.status != "unregistered"
        )

    def register_node(self, public_key_pem: str, name: str) -> None:
        """Let a SuperNode with this key connect."""
        self._call(
            "RegisterNode", RegisterNodeRequest(public_key=public_key_pem.encode(), name=name)
        )

    def unregister_node(self, node_id: int) -> None:
        """Take a node's access away."""
        self._call("UnregisterNode", UnregisterNodeRequest(node_id=node_id))

    def start_run(self, bundle: bytes) -> int:
        """Submit the app; returns the run's id."""
        reply = self._call("StartRun", StartRunRequest(fab=Fab(content=bundle)))
        if not reply.run_id:
            raise UnavailableError("AG-CRD-011", "the SuperLink started no run")
        return int(reply.run_id)

    def active_runs(self) -> tuple[int, ...]:
        """Runs that are not finished, newest first.

        Flower deletes what finished runs left in its store when it lists them.
        """
        runs = self._call("ListRuns", ListRunsRequest()).run_dict
        return tuple(
            run_id for run_id in sorted(runs, reverse=True)
            if runs[run_id].status.status != "finished"
        )  # fmt: skip

    def stop_run(self, run_id: int) -> None:
        """End a run."""
        self._call("StopRun", StopRunRequest(run_id=run_id))

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def _call(self, method: str, request: Any) -> Any:
        try:
            return getattr(self._client, method)(request)
        except httpx.HTTPStatusError as error:
            status = error.response.status_code
            family = RejectedError if status in _REFUSED else UnavailableError
            raise family("AG-CRD-011", f"{method} answered {status}") from error
        except httpx.HTTPError as error:
            raise UnavailableError("AG-CRD-011", f"{method}: {type(error).__name__}") from error
