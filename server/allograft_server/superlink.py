# SPDX-License-Identifier: Apache-2.0
"""The SuperLink behind a guard: one process, two TLS listeners.

Flower serves nodes, operators and the runtime on one port, and its open-source build lets anyone
who reaches that port start a run, which is code execution at every site. So the public listener
serves `/v1/fleet/` alone and answers 404 to all else; the private listener is on loopback and asks
operators for a token. Every call is audited. Run by the supervisor as a child process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import threading
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import uvicorn

from allograft_server.flower_private import (
    AsgiApp,
    AuditEntry,
    Receive,
    Scope,
    Send,
    SuperLinkPlan,
    make_superlink,
)

LOOPBACK = "127.0.0.1"
_FLEET = "/v1/fleet/"
_AUDIT_BYTES = 32 << 20
# Nodes push objects of at most 5 MiB; anything far larger is an attack on our memory.
_REQUEST_BYTES = 16 << 20


class AuditFile:
    """One JSON line per call; the file before the current one is kept as `.1`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()  # Flower audits from a thread pool
        self._handle = path.open("a", encoding="utf-8")

    def write(self, entry: AuditEntry) -> None:
        """Append an entry."""
        with self._lock:
            if self._handle.tell() > _AUDIT_BYTES:
                self._handle.close()
                os.replace(self._path, self._path.with_suffix(".1"))
                self._handle = self._path.open("a", encoding="utf-8")
            self._handle.write(json.dumps(asdict(entry)) + "\n")
            self._handle.flush()


class FleetOnly:
    """Pass fleet calls of bounded size on; answer 404 to everything else."""

    def __init__(self, app: AsgiApp, audit: AuditFile) -> None:
        self._app = app
        self._audit = audit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] != "http":
            return  # no websocket is ever opened; uvicorn closes it
        if not scope["path"].startswith(_FLEET):
            await self._refuse(scope, send, 404)
        elif _declared_bytes(scope) > _REQUEST_BYTES:
            await self._refuse(scope, send, 413)
        else:
            await self._app(scope, receive, send)

    async def _refuse(self, scope: Scope, send: Send, status: int) -> None:
        client = scope.get("client")
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        # The path is a stranger's text: its length is bounded and JSON escapes the rest.
        entry = AuditEntry(
            now,
            "stranger",
            client[0] if client else "",
            scope["path"][:100],
            0,
            f"refused {status}",
        )
        self._audit.write(entry)
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"{}"})


def _declared_bytes(scope: Scope) -> int:
    """The announced size of a request; a request that announces none counts as too large."""
    headers = dict(scope["headers"])
    if scope["method"] == "GET":
        return 0
    text = headers.get(b"content-length", b"")
    if b"transfer-encoding" in headers or not text.isdigit() or len(text) > 12:
        return _REQUEST_BYTES + 1
    return int(text)


async def serve(options: argparse.Namespace) -> None:
    """Serve both listeners until a signal arrives or the supervisor is gone."""
    keys: Path = options.state / "keys"
    flower: Path = options.state / "flower"
    audit = AuditFile(options.state / "run" / "superlink-audit.jsonl")
    plan = SuperLinkPlan(
        host=LOOPBACK,
        port=options.private_port,
        database=flower / "superlink.db",
        ca_file=keys / "tls" / "ca.pem",
        certificate_file=keys / "tls" / "server.pem",
        key_file=keys / "tls" / "server.key",
        executor_secret=(flower / "executor.secret").read_bytes(),
        operator_token=(flower / "operator.token").read_text(encoding="ascii").strip(),
        audit=audit.write,
    )
    app = make_superlink(plan)
    private = _server(app, plan, plan.host, plan.port)
    public = _server(
        FleetOnly(app, audit), plan, options.public_host, options.public_port, lifespan="off"
    )
    serving = [asyncio.create_task(private.serve())]
    while not private.started and not serving[0].done():
        await asyncio.sleep(0.05)
    serving.append(asyncio.create_task(public.serve()))
    watching = asyncio.create_task(_leave_with_parent(options.parent_pid, [private, public]))
    try:
        await asyncio.wait(serving, return_when=asyncio.FIRST_COMPLETED)
        private.should_exit = public.should_exit = True
        await asyncio.gather(*serving)
    finally:
        watching.cancel()


def _server(
    app: AsgiApp, plan: SuperLinkPlan, host: str, port: int, lifespan: str = "on"
) -> uvicorn.Server:
    return uvicorn.Server(
        uvicorn.Config(
            app,
            host=host,
            port=port,
            lifespan=lifespan,
            ws="none",
            log_level="warning",
            access_log=False,
            server_header=False,
            ssl_certfile=str(plan.certificate_file),
            ssl_keyfile=str(plan.key_file),
            timeout_graceful_shutdown=2,
        )
    )


async def _leave_with_parent(parent_pid: int, servers: list[uvicorn.Server]) -> None:
    """End when the supervisor died, so that its successor finds the ports free."""
    while os.getppid() == parent_pid:
        await asyncio.sleep(0.5)
    for server in servers:
        server.should_exit = True


def main() -> None:
    """Run the guarded SuperLink."""
    parser = argparse.ArgumentParser(description="SuperLink behind a guard (internal)")
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--public-host", required=True)
    parser.add_argument("--public-port", type=int, required=True)
    parser.add_argument("--private-port", type=int, required=True)
    parser.add_argument("--parent-pid", type=int, required=True)
    # The loop that uvicorn itself would choose: uvloop where it is installed, which flwr sees to.
    factory = uvicorn.Config(app="").get_loop_factory()
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
