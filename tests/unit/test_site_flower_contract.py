# SPDX-License-Identifier: Apache-2.0
"""The private parts of flwr that the site's side uses are as they were in the pinned version."""

import inspect
from importlib.metadata import version

import pytest
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from flwr.common.constant import ErrorCode, SubStatus
from flwr.proto.runtime_pb2 import AcquireTaskRequest, AcquireTaskResponse
from flwr.supercore.auth import load_superexec_auth_secret
from flwr.supercore.constant import TaskType
from flwr.supercore.inflatable.inflatable_object import InflatableObject
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime import run_clientapp
from flwr.supernode.start_client_internal import _push_messages

from allograft.wire.v1 import relay_pb2
from allograft_client import courier


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_the_pinned_minor_version_is_installed():
    assert version("flwr").split(".")[:2] == ["1", "41"]


def test_tasks_are_pulled_and_answered_by_the_same_functions():
    assert parameters(run_clientapp.pull_task_input) == ["client"]
    assert parameters(run_clientapp.push_message) == ["client", "message", "context"]
    assert parameters(run_clientapp.push_task_output) == [
        "client", "context", "sub_status", "details",
    ]  # fmt: skip


def test_the_runtime_client_is_made_as_before():
    assert parameters(RuntimeHttpClient.from_server_address)[:4] == [
        "server_address", "insecure", "root_certificates", "interceptors",
    ]  # fmt: skip
    assert "component_name" in parameters(RuntimeVersionHttpInterceptor)
    assert len(parameters(RuntimeTokenHttpInterceptor)) == 1
    assert {"master_secret", "protected_methods"} <= set(parameters(SuperExecAuthHttpInterceptor))


def test_the_secret_is_read_as_raw_bytes(tmp_path):
    (tmp_path / "secret").write_bytes(b"\x00\xffsecret\n")
    assert load_superexec_auth_secret(str(tmp_path / "secret")) == b"\x00\xffsecret\n"


def test_task_types_and_statuses_have_their_names():
    assert TaskType.CLIENT_APP == "flwr-clientapp"
    assert SubStatus.COMPLETED
    assert SubStatus.FAILED
    assert ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert "supported_task_types" in AcquireTaskRequest.DESCRIPTOR.fields_by_name
    assert "token" in AcquireTaskResponse.DESCRIPTOR.fields_by_name


def test_a_node_still_waits_for_its_one_reply():
    """Why a claim that fails must always be reported: the SuperNode waits without end."""
    assert "while not (reply_messages" in inspect.getsource(_push_messages)


@pytest.mark.parametrize(("size", "kind"), [(70_000, ConfigRecord), (700_000, ArrayRecord)])
def test_a_frame_survives_flowers_own_serialisation(size, kind):
    frame = relay_pb2.Frame(envelope=b"{}", body=b"\x00" * size)
    record = courier.to_record(frame)
    assert isinstance(record["frame"], kind)
    moved = {name: inflated(child) for name, child in record.items()}
    assert courier.from_record(RecordDict(moved)) == frame


def inflated(record: InflatableObject) -> InflatableObject:
    """A record as the next process sees it: taken apart into objects and put together again."""
    children = {name: inflated(child) for name, child in (record.children or {}).items()}
    return type(record).inflate(record.deflate(), children)


def test_an_empty_body_is_a_frame_too():
    frame = relay_pb2.Frame(envelope=b"{}", body=b"")
    assert courier.from_record(courier.to_record(frame)) == frame
