# SPDX-License-Identifier: Apache-2.0
"""Workers: a fresh process for each task, loaded libraries shared, nothing left behind."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from allograft.errors import RejectedError, UnavailableError
from allograft.recipes.shape import train_tokenizer
from allograft_client.runner import Runner
from allograft_client.tasks import perform
from kit.tiny import write_model

DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def runner(directory):
    runner = Runner(directory)
    yield runner
    runner.stop()


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    write_model(path / "model")
    train_tokenizer(["a note"], 300).save(str(path / "model" / "tokenizer.json"))
    own = path / "own.txt"
    own.write_text("One note.\n\nAnother note.\n", "utf-8")
    return describe(path / "model", own)


def describe(model: Path, own: Path) -> dict[str, str]:
    files = {"data": str(own), "retention": str(own)}
    return {"task": "describe", "model": str(model), "device": "cpu", **files}


def children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii").split()
    return [int(child) for child in listed]


def wait_until(holds) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_tasks_share_the_loaded_libraries_and_no_process(runner, task):
    servers, workers = [], []

    def look(_progress):
        servers.append(runner._server.pid)
        workers.append(tuple(children(runner._server.pid)))

    for name in ("one", "two"):
        runner.run(name, task, look)
    assert len(set(servers)) == 1
    # A worker may have ended by the time that its last lines are read.
    assert len(set(workers) - {()}) == 2


def test_a_result_comes_back(runner, task):
    assert runner.run("result", task, lambda _: None)["documents"] == 2


def test_a_refusal_keeps_its_code(runner, task, tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(RejectedError) as refused:
        runner.run("refusal", task | {"data": str(tmp_path / "empty.txt")}, lambda _: None)
    assert refused.value.code == "AG-RCP-030"


def test_a_crash_fails_the_task_and_leaves_its_traceback(runner, directory, task):
    with pytest.raises(UnavailableError) as failed:
        runner.run("crash", {"task": "no such task"}, lambda _: None)
    assert failed.value.code == "AG-SIT-007"
    assert "KeyError" in (directory / "crash.log").read_text("utf-8")
    assert runner.run("after", task, lambda _: None)["documents"] == 2


def test_a_killed_worker_fails_its_task_only(runner, task):
    def kill(_progress):
        for child in children(runner._server.pid):
            os.kill(child, signal.SIGKILL)

    with pytest.raises(UnavailableError, match="status -9"):
        runner.run("killed", task, kill)
    assert runner.run("next", task, lambda _: None)["documents"] == 2


def test_a_killed_server_takes_its_worker_along_and_is_started_again(runner, task):
    workers = []

    def kill(_progress):
        workers.extend(children(runner._server.pid))
        os.kill(runner._server.pid, signal.SIGKILL)

    with pytest.raises(UnavailableError):
        runner.run("orphaned", task, kill)
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
    assert runner.run("again", task, lambda _: None)["documents"] == 2


def test_the_libraries_are_let_go_when_idle(directory, task):
    runner = Runner(directory / "idle", idle_s=0.05)
    runner.run("only", task, lambda _: None)
    wait_until(lambda: runner._server is None)
    runner.stop()


def test_stopping_ends_the_present_task_and_refuses_the_next(directory, task, tmp_path):
    runner = Runner(directory / "stopped")
    stopper = threading.Thread(target=runner.stop)
    # Text that takes the worker longer to read than it takes to stop it.
    own = tmp_path / "long.txt"
    own.write_text("\n\n".join(f"note {number}" for number in range(1_000_000)), "utf-8")

    def stop(_progress):
        if not stopper.ident:
            stopper.start()
            wait_until(lambda: runner._server.poll() is not None)

    with pytest.raises(UnavailableError) as ended:
        runner.run("stopped", describe(task["model"], own), stop)
    stopper.join(DEADLINE_S)
    assert not stopper.is_alive()
    assert ended.value.code == "AG-SIT-007"
    assert runner._server.poll() is not None
    with pytest.raises(UnavailableError, match="stopping"):
        runner.run("late", task, lambda _: None)


def test_refuses_a_base_that_was_edited_after_its_digest_was_taken(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    train_tokenizer(["a note"], 300).save(str(tmp_path / "model" / "tokenizer.json"))
    own = tmp_path / "own.txt"
    own.write_text("One note.\n\nAnother note.\n", "utf-8")
    added = perform(describe(tmp_path / "model", own), lambda _: None)
    task = {"task": "evaluate", "model": str(tmp_path / "model"), "device": "cpu"}
    task["model_digest"] = added["base"]["weights_digest"]
    with pytest.raises(KeyError):  # the base is the one that was added: on to the text
        perform(task, lambda _: None)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0].add_(0.5)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(RejectedError, match="AG-RCP-028"):
        perform(task, lambda _: None)
