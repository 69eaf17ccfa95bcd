# SPDX-License-Identifier: Apache-2.0
"""Organ against PEFT LoRA r8: same base, same text, same loss to reach; time and peak memory.

Both are trained by the same loop on the same batches, with growing numbers of steps; the target is
the best held-out loss of the worse of the two. Each arm is a process of its own, so that its peak
memory is its own. Ratios are LoRA over organ: above 1 the organ is cheaper. They are printed
whatever they are. `--device cuda` measures the accelerator's memory instead.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from allograft.recipes.base import (
    Donor,
    Extract,
    Payload,
    Plan,
    Recipient,
    load_recipe,
)
from allograft.recipes.documents import read_documents, split_documents
from allograft.recipes.loop import train
from allograft.recipes.losses import token_losses
from allograft.recipes.plan import LoopPlan, LoraPlan, OrganPlan
from allograft.recipes.snapshot import load_model, load_tokenizer
from allograft.recipes.windows import Windows, make_windows
from benchmarks.report import Figure, Options, publish

_SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
_MODEL = _SHARED / "models/stories260K/hf"
_TEXT = _SHARED / "medical/medquad.jsonl.gz"
_BATCH = 4  # small, so that scoring never sets the peak
# The best of 1e-3, 3e-3, 1e-2 and 2e-2 after 150 steps on the default base and text.
_RATES = {"organ": 2e-2, "lora": 1e-2}


@dataclass(frozen=True, slots=True)
class Setting:
    """One size of the comparison."""

    device: str
    budgets: tuple[int, ...]  # steps of each run
    documents: int
    window: int
    layers: int  # of a base that is made here; 0 takes the real one where it is present
    hidden: int


@dataclass(frozen=True, slots=True)
class Arm:
    """What the runs of one kind measured."""

    points: tuple[tuple[int, float, float], ...]  # steps, seconds, held-out loss
    peak_bytes: int  # above what the loaded base takes
    payload_bytes: int
    trainable: int


def make_text(setting: Setting) -> tuple[Windows, Windows]:
    """Training and held-out windows: medical text where present, else made up."""
    if _TEXT.exists() and _MODEL.exists():
        documents = read_documents(_TEXT)[: setting.documents]
        train_part, held_out = split_documents(documents, 0.1)
        tokenizer = load_tokenizer(_MODEL)
        return (
            make_windows(train_part, tokenizer, setting.window),
            _head(make_windows(held_out, tokenizer, setting.window), 128),
        )
    return _grammar(2048, setting.window, 1), _head(_grammar(128, setting.window, 2), 128)


def _grammar(rows: int, length: int, seed: int) -> Windows:
    """Sentences of a small random grammar, for machines without the real text."""
    rules = torch.randint(0, 512, (512, 4), generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 512, (rows, length), generator=generator)
    for place in range(1, length):
        choice = torch.randint(0, 4, (rows,), generator=generator)
        tokens[:, place] = rules[tokens[:, place - 1], choice]
    return Windows(tokens, torch.full((rows,), length), torch.arange(rows), rows * length)


def _head(windows: Windows, count: int) -> Windows:
    return replace(
        windows,
        tokens=windows.tokens[:count],
        lengths=windows.lengths[:count],
        documents=windows.documents[:count],
    )


def make_base(setting: Setting) -> PreTrainedModel:
    """The real base, or one made here and trained briefly on text of another kind."""
    if _MODEL.exists() and setting.layers == 0:
        return load_model(_MODEL, setting.device)
    torch.manual_seed(0)
    layers = setting.layers or 6
    base: PreTrainedModel = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=setting.hidden,
            intermediate_size=3 * setting.hidden,
            num_hidden_layers=layers,
            num_attention_heads=max(1, setting.hidden // 64),
            max_position_embeddings=max(512, setting.window),
            tie_word_embeddings=True,
        )
    )
    base = base.to(setting.device).eval()

    def forward(_numbers: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = base(input_ids=tokens, use_cache=False).logits
        return logits

    plan = LoopPlan(steps=200, batch_windows=16, learning_rate=1e-3)
    general = _grammar(1024, setting.window, 7)
    shuffled = replace(general, tokens=(general.tokens * 7 + 3) % 512)
    train(forward, dict(base.named_parameters()), shuffled, plan)
    base.zero_grad(set_to_none=True)
    return base


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, windows: Windows) -> float:
    """Nats per token."""
    total = 0.0
    for numbers in torch.split(torch.arange(len(windows)), _BATCH):
        tokens = windows.tokens[numbers].to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16, model.device.type == "cuda"):
            logits = model(input_ids=tokens, use_cache=False).logits
        total += float(token_losses(logits, tokens, windows.lengths[numbers]).sum())
    return total / int((windows.lengths - 1).sum())


def run_arm(kind: str, setting: Setting) -> Arm:
    """Train one kind with growing numbers of steps, each run with a schedule of its own.

    A run's held-out loss is measured after it, on the attached payload: while an organ trains, the
    blocks below it are replayed and the model can score no other text.
    """
    import peft  # noqa: F401  (both arms carry its modules in memory before the base line)

    model = make_base(setting)
    text, held_out = make_text(setting)
    before = held_out_loss(model, held_out)
    cuda = setting.device == "cuda"
    # Processor time of one thread does not depend on what else the machine is doing.
    torch.set_num_threads(1)
    clock = time.perf_counter if cuda else time.process_time
    resident = torch.cuda.memory_allocated() if cuda else _resident_bytes()
    points, made, peak = [(0, 0.0, before)], None, 0
    for steps in setting.budgets:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        with tempfile.TemporaryDirectory() as folder:
            donor = Donor(model, text, Path(folder))
            began = clock()
            made = load_recipe(kind).extract(donor, _plan(kind, steps))
            seconds = clock() - began
            peak = max(peak, torch.cuda.max_memory_allocated() if cuda else _peak_bytes())
            points.append((steps, seconds, _attached_loss(kind, made, model, held_out)))
            size = made.files[0].stat().st_size
    assert made is not None
    report = made.report
    return Arm(tuple(points), peak - resident, size, int(str(report["trainable_parameters"])))


def _plan(kind: str, steps: int) -> Plan:
    recipe = OrganPlan(blocks=1) if kind == "organ" else LoraPlan(rank=8, alpha=16.0)
    loop = LoopPlan(steps=steps, batch_windows=16, learning_rate=_RATES[kind], warmup_steps=5)
    return Plan(recipe, loop)


def _attached_loss(kind: str, made: Extract, model: PreTrainedModel, text: Windows) -> float:
    recipe = load_recipe(kind)
    payload = Payload(kind, "ab" * 16, made.files[0].parent, made.facts.to_json())
    handle = recipe.attach(recipe.fit(payload, Recipient(model)), model)
    loss = held_out_loss(model, text)
    recipe.detach(handle)
    return loss


def seconds_to(target: float, points: Sequence[tuple[int, float, float]]) -> float:
    """When a curve first reaches a loss, between its points in a straight line."""
    for (_, began, high), (_, ended, low) in pairwise(points):
        if low <= target:
            return began + (ended - began) * (high - target) / (high - low)
    raise ValueError("the target lies below the curve")


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def compare(organ: Arm, lora: Arm) -> list[Figure]:
    """The figures; ratios above 1 mean that the organ was cheaper."""
    target = max(min(loss for _, _, loss in arm.points) for arm in (organ, lora))
    times = {name: seconds_to(target, arm.points) for name, arm in _named(organ, lora)}
    figures = [
        Figure("loss_before", organ.points[0][2], "nats/token"),
        Figure("loss_target", target, "nats/token"),
    ]
    for name, arm in _named(organ, lora):
        figures += [
            Figure(f"{name}_best_loss", min(loss for _, _, loss in arm.points), "nats/token"),
            Figure(f"{name}_time_to_target", times[name], "s"),
            Figure(f"{name}_peak_memory", arm.peak_bytes / 2**20, "MiB"),
            Figure(f"{name}_payload", arm.payload_bytes / 2**10, "KiB"),
            Figure(f"{name}_trainable", arm.trainable, ""),
        ]
    figures += [
        Figure("lora_time_over_organ", times["lora"] / times["organ"], "x"),
        Figure("lora_memory_over_organ", lora.peak_bytes / max(1, organ.peak_bytes), "x"),
    ]
    return figures


def _named(organ: Arm, lora: Arm) -> tuple[tuple[str, Arm], ...]:
    return (("organ", organ), ("lora", lora))


def main() -> None:
    """Run both arms, each in a fresh process, and publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a minute instead of several")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--layers", type=int, default=0, help="make a base of this depth instead")
    parser.add_argument("--hidden", type=int, default=384, help="width of a base that is made")
    parser.add_argument("--window", type=int, default=128, help="tokens per window")
    parser.add_argument("--arm", choices=("organ", "lora"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    setting = Setting(
        device=chosen.device,
        budgets=(10, 20) if chosen.quick else (25, 50, 100, 200),
        documents=120 if chosen.quick else 600,
        window=chosen.window,
        layers=chosen.layers,
        hidden=chosen.hidden,
    )
    if chosen.arm:
        sys.stdout.write(json.dumps(asdict(run_arm(chosen.arm, setting))))
        return
    arms = {}
    for kind in ("organ", "lora"):
        command = [sys.executable, "-m", "benchmarks.organ_vs_lora", "--arm", kind, *sys.argv[1:]]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        fields: dict[str, Any] = json.loads(done.stdout)
        arms[kind] = Arm(tuple(tuple(point) for point in fields.pop("points")), **fields)
    options = Options(chosen.quick, chosen.json)
    publish("organ_vs_lora", compare(arms["organ"], arms["lora"]), options)


if __name__ == "__main__":
    main()
