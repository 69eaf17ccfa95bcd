# SPDX-License-Identifier: Apache-2.0
"""Organ against PEFT LoRA r8: same base, same text, same loss to reach; time and peak memory.

LoRA is trained twice: by the loop that trains organs (`lora`), and as most people train it, by PEFT
under the transformers Trainer (`trainer`). All see windows of the same text in batches of the same
size, with growing numbers of steps; the target is the best held-out loss of the worst of them. Each
arm is a process of its own, so that its peak memory is its own. Ratios are organ over LoRA: below 1
the organ is cheaper. They are printed whatever they are. `--device cuda` measures the accelerator's
memory instead.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
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
_RATES = {"organ": 2e-2, "lora": 1e-2, "trainer": 1e-2}
_ARMS = ("organ", "lora", "trainer")
_BATCH_WINDOWS = 16
_WARMUP_STEPS = 5
_RANK = 8
_ALPHA = 16.0


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

    A run's held-out loss is measured after it, on what would be shipped: while an organ trains, the
    blocks below it are replayed and the model can score no other text.
    """
    import peft  # noqa: F401  (all arms carry the same modules in memory before the base line)
    from transformers import Trainer  # noqa: F401

    model = make_base(setting)
    text, held_out = make_text(setting)
    before = held_out_loss(model, held_out)
    cuda = setting.device == "cuda"
    # Processor time of one thread does not depend on what else the machine is doing.
    torch.set_num_threads(1)
    resident = torch.cuda.memory_allocated() if cuda else _resident_bytes()
    points, peak = [(0, 0.0, before)], 0
    size = trainable = 0
    for steps in setting.budgets:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        with tempfile.TemporaryDirectory() as folder:
            one = _run_trainer if kind == "trainer" else _run_recipe
            seconds, score, size, trainable = one(kind, model, text, steps, Path(folder))
            # Before scoring, which would count as training.
            peak = max(peak, torch.cuda.max_memory_allocated() if cuda else _peak_bytes())
            points.append((steps, seconds, score(held_out)))
    return Arm(tuple(points), peak - resident, size, trainable)


#: Seconds, held-out loss of what was made, bytes of it, parameters trained.
_Run = tuple[float, Callable[[Windows], float], int, int]


def _clock(model: PreTrainedModel) -> float:
    return time.perf_counter() if model.device.type == "cuda" else time.process_time()


def _run_recipe(kind: str, model: PreTrainedModel, text: Windows, steps: int, folder: Path) -> _Run:
    began = _clock(model)
    made = load_recipe(kind).extract(Donor(model, text, folder), _plan(kind, steps))
    seconds = _clock(model) - began
    trainable = int(str(made.report["trainable_parameters"]))

    def score(held_out: Windows) -> float:
        return _attached_loss(kind, made, model, held_out)

    return seconds, score, made.files[0].stat().st_size, trainable


def _run_trainer(
    kind: str, model: PreTrainedModel, text: Windows, steps: int, folder: Path
) -> _Run:
    """PEFT's adapter under the transformers Trainer, with its defaults but for size and rate."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import Trainer, TrainingArguments

    settings = LoraConfig(
        r=_RANK, lora_alpha=_ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    rows = [
        {
            "input_ids": tokens,
            "attention_mask": (torch.arange(len(tokens)) < length).long(),
            "labels": torch.where(torch.arange(len(tokens)) < length, tokens, -100),
        }
        for tokens, length in zip(text.tokens, text.lengths.tolist(), strict=True)
    ]
    torch.manual_seed(0)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=_BATCH_WINDOWS,
        learning_rate=_RATES[kind],
        lr_scheduler_type="cosine",
        warmup_steps=_WARMUP_STEPS,
        bf16=model.device.type == "cuda",
        use_cpu=model.device.type == "cpu",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    began = _clock(model)
    adapted = get_peft_model(model, settings)
    assert isinstance(adapted, PeftModel)
    Trainer(model=adapted, args=arguments, train_dataset=rows).train()
    seconds = _clock(model) - began
    trainable = sum(value.numel() for value in adapted.parameters() if value.requires_grad)
    adapted.save_pretrained(str(folder))
    size = (folder / "adapter_model.safetensors").stat().st_size

    def score(held_out: Windows) -> float:
        adapted.eval()
        loss = held_out_loss(adapted.base_model.model, held_out)
        adapted.unload()
        return loss

    return seconds, score, size, trainable


def _plan(kind: str, steps: int) -> Plan:
    recipe = OrganPlan(blocks=1) if kind == "organ" else LoraPlan(_RANK, _ALPHA)
    loop = LoopPlan(
        steps=steps,
        batch_windows=_BATCH_WINDOWS,
        learning_rate=_RATES[kind],
        warmup_steps=_WARMUP_STEPS,
    )
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


def compare(arms: Mapping[str, Arm]) -> list[Figure]:
    """The figures; ratios below 1 mean that the organ was cheaper."""
    target = max(min(loss for _, _, loss in arm.points) for arm in arms.values())
    times = {name: seconds_to(target, arm.points) for name, arm in arms.items()}
    organ = arms["organ"]
    figures = [
        Figure("loss_before", organ.points[0][2], "nats/token"),
        Figure("loss_target", target, "nats/token"),
    ]
    for name, arm in arms.items():
        figures += [
            Figure(f"{name}_best_loss", min(loss for _, _, loss in arm.points), "nats/token"),
            Figure(f"{name}_time_to_target", times[name], "s"),
            Figure(f"{name}_peak_memory", arm.peak_bytes / 2**20, "MiB"),
            Figure(f"{name}_payload", arm.payload_bytes / 2**10, "KiB"),
            Figure(f"{name}_trainable", arm.trainable, ""),
        ]
    for name in ("lora", "trainer"):
        time_ratio = times["organ"] / times[name]
        memory_ratio = organ.peak_bytes / max(1, arms[name].peak_bytes)
        figures += [
            Figure(f"organ_time_over_{name}", time_ratio, "x", "<= 0.5"),
            Figure(f"organ_memory_over_{name}", memory_ratio, "x", "<= 0.6"),
        ]
    return figures


def main() -> None:
    """Run all arms, each in a fresh process, and publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a minute instead of several")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--layers", type=int, default=0, help="make a base of this depth instead")
    parser.add_argument("--hidden", type=int, default=384, help="width of a base that is made")
    parser.add_argument("--window", type=int, default=128, help="tokens per window")
    parser.add_argument("--arm", choices=_ARMS, help=argparse.SUPPRESS)
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
        sys.stdout.write(f"{json.dumps(asdict(run_arm(chosen.arm, setting)))}\n")
        return
    arms = {}
    for kind in _ARMS:
        command = [sys.executable, "-m", "benchmarks.organ_vs_lora", "--arm", kind, *sys.argv[1:]]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        # The Trainer prints its own figures before ours.
        fields: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        arms[kind] = Arm(tuple(tuple(point) for point in fields.pop("points")), **fields)
    options = Options(chosen.quick, chosen.json)
    publish("organ_vs_lora", compare(arms), options)


if __name__ == "__main__":
    main()
