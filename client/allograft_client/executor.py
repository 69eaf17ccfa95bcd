# SPDX-License-Identifier: Apache-2.0
"""Runs the installed courier for the SuperNode, and nothing else.

Flower ships an app's code with every run. This executor never unpacks it: it hashes the bundle,
refuses every digest but the one of the code-free courier app, and calls the ClientApp object that
was imported from this installation before any message arrived.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import structlog
from flwr.clientapp import ClientApp

from allograft.errors import AllograftError, UnavailableError
from allograft.relay.app import COURIER_APP_SHA256
from allograft_client.confine import end_with_parent
from allograft_client.courier import app
from allograft_client.flower_private import Claim, RuntimeApi
from allograft_client.journal import configure_journal

# Each look at the SuperNode costs both processes milliseconds of processor time, so an idle site
# looks seldom; while parts come one after another, waiting would halve their speed.
_BUSY_S, _BUSY_LOOK_S, _IDLE_LOOK_S = 3.0, 0.05, 1.0
_DOWN_S = 1.0


class Executor:
    """Handles tasks one after another until told to stop.

    Args:
        runtime: The SuperNode's runtime API.
        client_app: The installed app.
        app_sha256: The only bundle digest whose messages are handled.
    """

    def __init__(
        self,
        runtime: RuntimeApi,
        client_app: ClientApp = app,
        app_sha256: str = COURIER_APP_SHA256,
    ) -> None:
        self._runtime = runtime
        self._client_app = client_app
        self._app_sha256 = app_sha256
        self._log = structlog.get_logger("executor")

    def run(self, stopped: threading.Event) -> None:
        """Work until `stopped` is set."""
        busy_until_s = 0.0
        while not stopped.is_set():
            try:
                worked = self.step()
            except UnavailableError as error:
                self._log.info("supernode-away", code=error.code, cause=error.cause)
                stopped.wait(_DOWN_S)
                continue
            now_s = time.monotonic()
            if worked:
                busy_until_s = now_s + _BUSY_S
            else:
                stopped.wait(_BUSY_LOOK_S if now_s < busy_until_s else _IDLE_LOOK_S)

    def step(self) -> bool:
        """Handle one task if there is one.

        Raises:
            UnavailableError: AG-RLY-007 if the SuperNode does not answer.
        """
        claim = self._runtime.claim()
        if claim is None:
            return False
        with claim:
            self._handle(claim)
        return True

    def _handle(self, claim: Claim) -> None:
        task = claim.pull()
        if task.app_sha256 != self._app_sha256:
            self._log.warning("app-refused", code="AG-SIT-006", app_sha256=task.app_sha256)
            claim.refuse(task, "AG-SIT-006")
            return
        try:
            answer = self._client_app(message=task.message, context=task.context)
        except AllograftError as error:
            # The code is all that the coordinator's host needs; causes stay at the site.
            self._log.warning("call-failed", code=error.code, cause=error.cause)
            claim.refuse(task, error.code)
        except Exception as error:  # noqa: BLE001  (a daemon's main loop: one bad message ends here)
            self._log.warning("call-failed", code="AG-RLY-001", kind=type(error).__name__)
            claim.refuse(task, "AG-RLY-001")
        else:
            claim.reply(task, answer)


def _stop_on_signals(stop: Callable[[], None]) -> None:
    def handle(_number: int, _frame: FrameType | None) -> None:
        stop()

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)


def main() -> None:
    """Run as a child of the site daemon."""
    parser = argparse.ArgumentParser(prog="allograft-site-executor")
    parser.add_argument("--runtime", required=True, help="HOST:PORT of the SuperNode")
    parser.add_argument("--secret-file", required=True, type=Path)
    parser.add_argument("--parent-pid", required=True, type=int)
    arguments = parser.parse_args()
    end_with_parent(arguments.parent_pid)
    configure_journal(sys.stderr)
    stopped = threading.Event()
    _stop_on_signals(stopped.set)
    runtime = RuntimeApi(arguments.runtime, arguments.secret_file)
    try:
        Executor(runtime).run(stopped)
    finally:
        runtime.close()


if __name__ == "__main__":
    main()
