# SPDX-License-Identifier: Apache-2.0
"""The training loop: resumes to the same bits, counts each token once, and fails with a code."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from allograft.errors import RejectedError
from allograft.recipes.base import Donor, Plan, load_recipe
from allograft.recipes.loop import SNAPSHOT, Training, train
from allograft.recipes.losses import token_losses
from allograft.recipes.plan import LoopPlan, LoraPlan, OrganPlan, Step
from allograft.recipes.windows import Windows
from kit.tiny import tiny_model, tiny_windows

PLAN = LoopPlan(steps=6, batch_windows=5, learning_rate=5e-3, warmup_steps=2, snapshot_s=0.0)

_CHILD = """
import os, signal, sys
from pathlib import Path
import torch
from kit.tiny import tiny_model, tiny_windows
from allograft.recipes.base import Donor, Plan, load_recipe
from allograft.recipes.plan import LoopPlan, OrganPlan

torch.set_num_threads(1)
workdir, fatal = Path(sys.argv[1]), int(sys.argv[2])

def progress(step):
    if step.number == fatal:
        os.kill(os.getpid(), signal.SIGKILL)

plan = Plan(OrganPlan(1, 2, 3), LoopPlan(steps=6, batch_windows=5, learning_rate=5e-3,
                                         warmup_steps=2, snapshot_s=0.0))
donor = Donor(tiny_model("qwen3"), tiny_windows(), workdir, progress=progress)
made = load_recipe("organ").extract(donor, plan)
print(made.report["resumed_at"])
"""


class StoppedError(Exception):
    """Stands for whatever ends a process between two steps."""


def run(
    plan: LoopPlan, snapshot: Path | None = None, stop: int = 0, windows: Windows | None = None
) -> tuple[Training, list[torch.Tensor], list[Step]]:
    model = tiny_model("llama")
    parameters = dict(model.named_parameters())
    seen: list[Step] = []

    def progress(step: Step) -> None:
        seen.append(step)
        if step.number == stop:
            raise StoppedError

    def forward(_numbers: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return model(input_ids=tokens, use_cache=False).logits

    data = tiny_windows() if windows is None else windows
    training = train(forward, parameters, data, plan, snapshot=snapshot, progress=progress)
    return training, [value.detach() for value in model.parameters()], seen


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_interrupted_run_ends_with_the_same_weights(stop: int, tmp_path: Path) -> None:
    whole, expected, _ = run(PLAN)
    with pytest.raises(StoppedError):
        run(PLAN, tmp_path / SNAPSHOT, stop)
    resumed, weights, seen = run(PLAN, tmp_path / SNAPSHOT)
    assert resumed.resumed_at == stop
    assert [step.number for step in seen] == list(range(stop + 1, 7))
    assert resumed.losses == whole.losses
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))


def test_finished_run_is_not_run_again(tmp_path: Path) -> None:
    whole, expected, _ = run(PLAN, tmp_path / SNAPSHOT)
    again, weights, seen = run(PLAN, tmp_path / SNAPSHOT)
    assert (again.resumed_at, seen, again.losses) == (6, [], whole.losses)
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))


def test_killed_process_resumes_to_the_same_payload(tmp_path: Path) -> None:
    tests = Path(__file__).resolve().parents[1]
    environment = os.environ | {"PYTHONPATH": str(tests), "OMP_NUM_THREADS": "1"}

    def child(name: str, fatal: int) -> subprocess.CompletedProcess[str]:
        workdir = tmp_path / name
        workdir.mkdir(exist_ok=True)
        command = [sys.executable, "-c", _CHILD, str(workdir), str(fatal)]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=120, check=False
        )

    assert child("killed", 4).returncode == -signal.SIGKILL
    # Nothing but the resumable state survives: no cached activations, no partial payload.
    assert [path.name for path in (tmp_path / "killed").iterdir()] == [SNAPSHOT]
    second = child("killed", 0)
    assert second.stdout.strip() == "4", second.stderr
    assert child("whole", 0).stdout.strip() == "0"
    payloads = [tmp_path / name / "organ.safetensors" for name in ("killed", "whole")]
    assert payloads[0].read_bytes() == payloads[1].read_bytes()
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["organ.safetensors"]


@pytest.mark.parametrize("kind", ["organ", "lora"])
def test_interrupted_recipes_resume_too(kind: str, tmp_path: Path) -> None:
    recipe = load_recipe(kind)
    plan = Plan(OrganPlan(1, 2, 3) if kind == "organ" else LoraPlan(rank=2), PLAN)
    name = "organ.safetensors" if kind == "organ" else "adapter_model.safetensors"

    def extract(folder: str, progress: Callable[[Step], None] | None = None) -> None:
        workdir = tmp_path / folder
        workdir.mkdir(exist_ok=True)
        recipe.extract(Donor(tiny_model("llama"), tiny_windows(), workdir, progress), plan)

    def stop(step: Step) -> None:
        if step.number == 3:
            raise StoppedError

    with pytest.raises(StoppedError):
        extract("broken", stop)
    extract("broken")
    extract("whole")
    resumed, whole = (load_file(tmp_path / folder / name) for folder in ("broken", "whole"))
    assert all(torch.equal(value, whole[key]) for key, value in resumed.items())


@pytest.mark.parametrize("change", [{"seed": 1}, {"learning_rate": 1e-4}, {"steps": 7}])
def test_refuses_to_continue_another_plan(change: dict[str, float], tmp_path: Path) -> None:
    run(PLAN, tmp_path / SNAPSHOT)
    with pytest.raises(RejectedError, match="AG-RCP-034"):
        run(replace(PLAN, **change), tmp_path / SNAPSHOT)


def test_refuses_to_continue_on_other_data_or_a_damaged_file(tmp_path: Path) -> None:
    run(PLAN, tmp_path / SNAPSHOT)
    with pytest.raises(RejectedError, match="AG-RCP-034"):
        run(PLAN, tmp_path / SNAPSHOT, windows=tiny_windows(seed=9))
    (tmp_path / SNAPSHOT).write_bytes(b"broken")
    with pytest.raises(RejectedError, match="AG-RCP-034"):
        run(PLAN, tmp_path / SNAPSHOT)


def test_accumulation_changes_memory_and_nothing_else() -> None:
    """Also with a padded window, whose batch holds fewer tokens than the others."""
    whole, expected, _ = run(replace(PLAN, batch_windows=24, accumulation=1))
    parts, weights, _ = run(replace(PLAN, batch_windows=6, accumulation=4))
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)
    for mine, theirs in zip(weights, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def test_every_window_is_seen_once_per_epoch() -> None:
    seen: list[int] = []
    model = tiny_model("llama")

    def forward(numbers: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        seen.extend(numbers.tolist())
        return model(input_ids=tokens, use_cache=False).logits

    plan = replace(PLAN, steps=12, batch_windows=4)
    train(forward, dict(model.named_parameters()), tiny_windows(), plan)
    assert sorted(seen[:24]) == sorted(seen[24:]) == list(range(24))
    assert seen[:24] != seen[24:]


def test_padding_is_not_trained_on() -> None:
    tokens = torch.tensor([[5, 6, 7, 0, 0]])
    logits = torch.zeros(1, 5, 11, requires_grad=True)
    losses = token_losses(logits, tokens, torch.tensor([3]))
    assert losses.shape == (1, 4)
    assert torch.count_nonzero(losses) == 2
    losses.sum().backward()
    assert torch.count_nonzero(logits.grad[0].abs().sum(-1)) == 2


def test_rate_warms_up_and_ends_at_its_floor() -> None:
    plan = LoopPlan(steps=100, warmup_steps=10, learning_rate=1.0, final_rate=0.1)
    assert plan.rate(0) == pytest.approx(0.1)
    assert plan.rate(10) == pytest.approx(1.0)
    assert plan.rate(100) == pytest.approx(0.1)
    rates = [plan.rate(step) for step in range(10, 101)]
    assert rates == sorted(rates, reverse=True)


def test_divergence_has_a_code(tmp_path: Path) -> None:
    plan = replace(PLAN, learning_rate=1e30, clip_norm=1e30, warmup_steps=0)
    with pytest.raises(RejectedError, match="AG-RCP-033"):
        run(plan, tmp_path / SNAPSHOT)


def test_refuses_empty_data() -> None:
    empty = Windows(
        torch.zeros(0, 4, dtype=torch.int64),
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(0, dtype=torch.int64),
        0,
    )
    with pytest.raises(RejectedError, match="AG-RCP-030"):
        run(PLAN, windows=empty)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"batch_windows": 0},
        {"accumulation": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"learning_rate": float("inf")},
        {"clip_norm": -1.0},
        {"seed": -1},
    ],
)
def test_refuses_plans_out_of_range(change: dict[str, float]) -> None:
    with pytest.raises(RejectedError, match="AG-RCP-035"):
        run(replace(PLAN, **change))
