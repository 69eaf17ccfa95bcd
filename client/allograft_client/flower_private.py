# SPDX-License-Identifier: Apache-2.0
"""The one module on the site's side that touches Flower's private interfaces (flwr 1.41).

It speaks the SuperNode's runtime API as `flower-superexec` and `flwr-clientapp` do together:
acquire a task, pull its message, push the reply. What it leaves out is the point: the app that
came with the task is handed to the caller as bytes to be hashed, and is never installed, written
or imported. tests/unit/test_site_flower_contract.py holds the pinned version to this.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import httpx
from flwr.app import Context, Message
from flwr.app.error import Error
from flwr.common.constant import ErrorCode, SubStatus
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.auth import load_superexec_auth_secret
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from allograft.errors import UnavailableError

_ACQUIRE = frozenset({"/flwr.proto.Runtime/AcquireTask"})


@dataclass(frozen=True, slots=True)
class Task:
    """One message to be handled.

    Attributes:
        app_sha256: Digest of the app that the submitter shipped.
    """

    message: Message
    context: Context
    app_sha256: str


class Claim:
    """A claimed task; use as a context manager, then `reply` or `refuse` once.

    A claim that ends without either is reported as failed, so that the SuperNode, which handles
    one message at a time, never waits for a reply that does not come.
    """

    def __init__(self, address: str, token: str) -> None:
        self._client = RuntimeHttpClient.from_server_address(
            address,
            True,
            None,
            [
                RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"),
                RuntimeTokenHttpInterceptor(token),
            ],
        )
        self._heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(self._client))
        self._task: Task | None = None
        self._outcome = (SubStatus.FAILED, "no reply was made")

    def __enter__(self) -> Claim:
        self._heartbeat.start()
        return self

    def __exit__(self, *_: object) -> None:
        context = self._task.context if self._task else None
        push_task_output(self._client, context, *self._outcome)
        self._heartbeat.stop()
        self._client.close()

    def pull(self) -> Task:
        """Fetch the task's message.

        Raises:
            UnavailableError: AG-RLY-007 if the SuperNode does not hand it out.
        """
        try:
            message, context, _, app = pull_task_input(self._client)
        except (httpx.HTTPError, RuntimeError, ValueError) as error:
            raise UnavailableError("AG-RLY-007", f"SuperNode: {type(error).__name__}") from error
        self._task = Task(message, context, hashlib.sha256(app.content).hexdigest())
        return self._task

    def reply(self, task: Task, answer: Message) -> None:
        """Hand over the answer.

        Raises:
            UnavailableError: AG-RLY-007 if the SuperNode does not take it.
        """
        self._push(task, answer)
        self._outcome = (SubStatus.COMPLETED, "")

    def refuse(self, task: Task, reason: str) -> None:
        """Answer with an error; the reason goes to the coordinator's host.

        Raises:
            UnavailableError: AG-RLY-007 if the SuperNode does not take it.
        """
        error = Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=reason)
        self._push(task, Message(error, reply_to=task.message))
        self._outcome = (SubStatus.FAILED, reason)

    def _push(self, task: Task, message: Message) -> None:
        try:
            push_message(self._client, message, task.context)
        except (httpx.HTTPError, RuntimeError, ValueError) as error:
            raise UnavailableError("AG-RLY-007", f"SuperNode: {type(error).__name__}") from error


class RuntimeApi:
    """The SuperNode's runtime API on loopback.

    Args:
        address: HOST:PORT of the SuperNode's runtime API.
        secret_file: The secret shared with `--superexec-auth-secret-file`.
    """

    def __init__(self, address: str, secret_file: Path) -> None:
        self._address = address
        secret = load_superexec_auth_secret(str(secret_file))
        self._client = RuntimeHttpClient.from_server_address(
            address,
            True,
            None,
            [
                RuntimeVersionHttpInterceptor(component_name="SuperExec"),
                SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=_ACQUIRE),
            ],
        )

    def claim(self) -> Claim | None:
        """Claim the next waiting task, if there is one.

        Raises:
            UnavailableError: AG-RLY-007 if the SuperNode does not answer.
        """
        request = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
        try:
            response = self._client.AcquireTask(request)
        except (httpx.HTTPError, ValueError) as error:
            raise UnavailableError("AG-RLY-007", f"SuperNode: {type(error).__name__}") from error
        return Claim(self._address, response.token) if response.token else None

    def close(self) -> None:
        """Close the connection."""
        self._client.close()
