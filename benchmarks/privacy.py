# SPDX-License-Identifier: Apache-2.0
"""What differential privacy costs: the private step against the plain one, in time and memory.

Both train the same recipe on the same model by the same loop, with eight windows of 128 tokens in a
step: the plain step takes a batch of eight, the private one draws eight of sixteen persons on
average. Every arm is a process of its own, on one thread of a processor, so that neither neighbours
nor thread pools are measured; steps are timed in the middle of a run. `--device cuda` measures wall
time and the accelerator's memory instead.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from allograft.privacy.dp import DpConstants
from allograft.recipes.base import Donor, LoraPlan, OrganPlan, Plan, load_recipe
from allograft.recipes.plan import LoopPlan, Step
from allograft.recipes.windows import Windows
from benchmarks.report import Figure, Options, publish

_TOKENS = 128
_WINDOWS = 8
_PERSONS = 16
_WARM_STEPS = 5


@dataclass(frozen=True, slots=True)
class Arm:
    """What one run measured: seconds per step, and peak memory above the loaded model."""

    step_s: float
    peak_bytes: int


def run_arm(kind: str, private: bool, steps: int, device: str) -> Arm:
    """Train one recipe and time its steps."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1024, hidden_size=256, intermediate_size=688, num_hidden_layers=6,
            num_attention_heads=4, max_position_embeddings=512, tie_word_embeddings=True,
        )
    ).to(device)  # fmt: skip
    windows = Windows(
        tokens=torch.randint(0, 1024, (_PERSONS, _TOKENS)),
        lengths=torch.full((_PERSONS,), _TOKENS),
        documents=torch.arange(_PERSONS),
        text_bytes=4 * _PERSONS * _TOKENS,
    )
    constants = DpConstants(
        sampling_rate=_WINDOWS / _PERSONS, noise_multiplier=1.0, steps=steps, clip_norm=1.0,
        divisor=float(_WINDOWS), delta=1e-5, windows_per_person=1,
    )  # fmt: skip
    plan = Plan(
        OrganPlan(blocks=2) if kind == "organ" else LoraPlan(rank=8),
        LoopPlan(steps=steps, batch_windows=_WINDOWS),
        constants if private else None,
    )
    if kind == "lora":
        import peft  # noqa: F401  (its modules are not what is measured)
    cuda = device == "cuda"
    clock = time.perf_counter if cuda else time.process_time
    resident = torch.cuda.memory_allocated() if cuda else _resident_bytes()
    marks: list[float] = []

    def mark(_step: Step) -> None:
        if cuda:
            torch.cuda.synchronize()
        marks.append(clock())

    with tempfile.TemporaryDirectory() as folder:
        # Without cached lower blocks: the cache would be most of the memory of so small a text.
        donor = Donor(model, windows, Path(folder), mark, ram_bytes=0, disk_bytes=0)
        load_recipe(kind).extract(donor, plan)
    timed = marks[_WARM_STEPS:]
    peak = torch.cuda.max_memory_allocated() if cuda else _peak_bytes()
    return Arm((timed[-1] - timed[0]) / (len(timed) - 1), peak - resident)


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * resource.getpagesize()


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _run(kind: str, private: bool, steps: int, device: str) -> Arm:
    name = "private" if private else "plain"
    command = [
        sys.executable, "-m", "benchmarks.privacy", "--arm", kind, name, str(steps),
        "--device", device,
    ]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=3600)
    return Arm(**json.loads(done.stdout))


def compare(options: Options, device: str) -> list[Figure]:
    """Run every arm, in turns, and take the median of the runs."""
    steps, rounds = (25, 1) if options.quick else (100, 3)
    figures = []
    for kind in ("organ", "lora"):
        found: dict[bool, list[Arm]] = {False: [], True: []}
        for _ in range(rounds):
            for private in (False, True):
                found[private].append(_run(kind, private, steps, device))
        plain, private_ = (
            (
                statistics.median(arm.step_s for arm in arms),
                statistics.median(arm.peak_bytes for arm in arms),
            )
            for arms in (found[False], found[True])
        )
        target = "<= 2" if device == "cuda" else "<= 1.5"
        figures += [
            Figure(f"{kind}_plain_step", 1000 * plain[0], "ms"),
            Figure(f"{kind}_private_step", 1000 * private_[0], "ms"),
            Figure(f"{kind}_step_ratio", private_[0] / plain[0], "x", target),
            Figure(f"{kind}_memory_ratio", private_[1] / plain[1], "x", "<= 1.5"),
        ]
    return figures


def main() -> None:
    """Measure and tell; with `--arm`, be the process that is measured."""
    parser = argparse.ArgumentParser(description="time and memory of private training")
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--arm", nargs=3, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.arm:
        kind, name, steps = chosen.arm
        arm = run_arm(kind, name == "private", int(steps), chosen.device)
        sys.stdout.write(json.dumps(asdict(arm)))
        return
    options = Options(chosen.quick, chosen.json)
    publish("privacy", compare(options, chosen.device), options)


if __name__ == "__main__":
    main()
