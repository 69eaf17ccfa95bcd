# SPDX-License-Identifier: Apache-2.0
"""What differential privacy costs: the private step against the plain one, in time and memory.

Both train the same recipe on the same model by the same loop, with eight windows of 128 tokens in a
step: the plain step takes a batch of eight, the private one draws eight of sixteen persons on
average. It is measured both ways, one person at a time (single) and several at once (joint), unless
`--way` names one. Every arm is a process of its own, on one thread of a processor, so that neither
neighbours nor thread pools are measured; steps are timed in the middle of a run. `--device cuda`
measures wall time and the accelerator's memory instead, and wants `--windows` that fill it.
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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, cast

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from allograft.privacy.dp import DpConstants
from allograft.recipes.base import Donor, Plan, load_recipe
from allograft.recipes.plan import LoopPlan, LoraPlan, OrganPlan, Step
from allograft.recipes.windows import Windows
from benchmarks.report import Figure, Options, publish

_TOKENS = 128
_WARM_STEPS = 5

_Way = Literal["plain", "single", "joint"]


@dataclass(frozen=True, slots=True)
class Setting:
    """Where it is measured, how many windows a step has, and which private ways."""

    device: str
    windows: int
    ways: tuple[_Way, ...]


@dataclass(frozen=True, slots=True)
class Arm:
    """What one run measured: seconds per step, and peak memory above the loaded model."""

    step_s: float
    peak_bytes: int


def run_arm(kind: str, way: _Way, steps: int, device: str, size: int) -> Arm:
    """Train one recipe and time its steps, of `size` windows each."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1024, hidden_size=256, intermediate_size=688, num_hidden_layers=6,
            num_attention_heads=4, max_position_embeddings=512, tie_word_embeddings=True,
        )
    ).to(device)  # fmt: skip
    persons = 2 * size
    windows = Windows(
        tokens=torch.randint(0, 1024, (persons, _TOKENS)),
        lengths=torch.full((persons,), _TOKENS),
        documents=torch.arange(persons),
        text_bytes=4 * persons * _TOKENS,
    )
    constants = DpConstants(
        sampling_rate=size / persons, noise_multiplier=1.0, steps=steps, clip_norm=1.0,
        divisor=float(size), delta=1e-5, windows_per_person=1,
    )  # fmt: skip
    plan = Plan(
        OrganPlan(blocks=2) if kind == "organ" else LoraPlan(rank=8),
        LoopPlan(steps=steps, batch_windows=size),
        None if way == "plain" else constants,
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
        if way != "plain":
            donor = replace(donor, private_way=way)
        load_recipe(kind).extract(donor, plan)
    timed = marks[_WARM_STEPS:]
    peak = torch.cuda.max_memory_allocated() if cuda else _peak_bytes()
    return Arm((timed[-1] - timed[0]) / (len(timed) - 1), peak - resident)


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * resource.getpagesize()


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _run(kind: str, way: _Way, steps: int, setting: Setting) -> Arm:
    command = [
        sys.executable, "-m", "benchmarks.privacy", "--arm", kind, way, str(steps),
        "--device", setting.device, "--windows", str(setting.windows),
    ]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=3600)
    return Arm(**json.loads(done.stdout))


def compare(options: Options, setting: Setting) -> list[Figure]:
    """Run every arm, in turns, and take the median of the runs."""
    steps, rounds = (25, 1) if options.quick else (100, 3)
    figures = []
    target = "<= 2" if setting.device == "cuda" else "<= 1.5"
    for kind in ("organ", "lora"):
        found: dict[_Way, list[Arm]] = {way: [] for way in ("plain", *setting.ways)}
        for _ in range(rounds):
            for way, arms in found.items():
                arms.append(_run(kind, way, steps, setting))
        step_s = {way: statistics.median(a.step_s for a in arms) for way, arms in found.items()}
        peak = {way: statistics.median(a.peak_bytes for a in arms) for way, arms in found.items()}
        figures += [Figure(f"{kind}_{way}_step", 1000 * step_s[way], "ms") for way in found]
        for way in setting.ways:
            time_ratio, memory_ratio = step_s[way] / step_s["plain"], peak[way] / peak["plain"]
            figures += [
                Figure(f"{kind}_{way}_step_ratio", time_ratio, "x", target),
                Figure(f"{kind}_{way}_memory_ratio", memory_ratio, "x", "<= 1.5"),
            ]
    return figures


def main() -> None:
    """Measure and tell; with `--arm`, be the process that is measured."""
    parser = argparse.ArgumentParser(description="time and memory of private training")
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--way", choices=("single", "joint"), help="measure this way only")
    parser.add_argument("--windows", type=int, default=8, help="windows in a step")
    parser.add_argument("--arm", nargs=3, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.arm:
        kind, way, steps = chosen.arm
        arm = run_arm(kind, cast(_Way, way), int(steps), chosen.device, chosen.windows)
        sys.stdout.write(json.dumps(asdict(arm)))
        return
    options = Options(chosen.quick, chosen.json)
    ways: tuple[_Way, ...] = (chosen.way,) if chosen.way else ("single", "joint")
    setting = Setting(chosen.device, chosen.windows, ways)
    publish("privacy", compare(options, setting), options)


if __name__ == "__main__":
    main()
