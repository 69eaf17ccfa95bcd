# SPDX-License-Identifier: Apache-2.0
"""Attach and revert of packets with the shapes of an 8-billion-parameter model, beside PEFT.

Random weights of the right shapes (Llama 3.1 8B, bfloat16) in as many of its 32 blocks as memory
allows: an organ that inserts one block, one that replaces one, and a LoRA of rank 16 on all linear
modules. A packet is put on from its file, strict checks included, as PEFT's `load_adapter` puts an
adapter on from its file; the base has an adapter already, so that PEFT need not wrap it first.
Arms run in turns, several times; times are medians. The ratio over PEFT is of packets on the same
blocks; an organ's is also given for the whole depth, against PEFT's time for one block times 32.
Memory is what the process holds of its own, above before, over the size of the payload. Revert must
be bit-exact, which is checked over every tensor. Figures are printed whatever they are.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from allograft.packet.adapter import AdapterSettings
from allograft.recipes import blocks
from allograft.recipes.base import Handle, Payload, Recipient, load_recipe
from allograft.recipes.export import export_peft
from allograft.recipes.facts import LoraFacts, OrganFacts
from allograft.recipes.lora import target_linears
from allograft.recipes.snapshot import state_digest
from benchmarks.report import Figure, Options, publish

_DEPTH = 32  # of the model whose shapes these are
_RANK = 16
_POLL_S = 0.002


@dataclass(slots=True)
class Arm:
    """What was measured of one packet: seconds of each turn, memory and whether the undo held."""

    payload_bytes: int
    on: list[float] = field(default_factory=list)
    off: list[float] = field(default_factory=list)
    memory: int = 0
    exact: bool = True


def make_base(layers: int, hidden: int) -> PreTrainedModel:
    """A base of the right shapes and random weights; its vocabulary is small to save memory."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model: PreTrainedModel = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=1024,
                hidden_size=hidden,
                intermediate_size=hidden * 7 // 2,
                num_hidden_layers=layers,
                num_attention_heads=hidden // 128,
                num_key_value_heads=hidden // 512,
                head_dim=128,
            )
        )
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False).eval()


def write_packets(model: PreTrainedModel, folder: Path) -> dict[str, Payload]:
    """An organ of each mode and a LoRA, of random values, as the release pipeline leaves them."""
    shape = blocks.base_shape(model)
    last = shape.layers - 1
    made: dict[str, Payload] = {}
    names = dict(blocks.base_blocks(model)[last].named_parameters())
    organ = {f"blocks.0.{name}": _noise(value.shape) for name, value in names.items()}
    for mode in ("insert", "replace"):
        facts = OrganFacts(shape, 1, last, last, (), "bfloat16", mode)
        made[mode] = _write(folder / mode, "organ", "organ.safetensors", organ, facts.to_json())
    linears = target_linears("llama", ())
    modules = tuple(sorted(name.rpartition(".")[2] for name in linears))
    lora = {}
    for number, block in enumerate(blocks.base_blocks(model)):
        own = dict(block.named_parameters())
        for name in linears:
            outputs, inputs = own[f"{name}.weight"].shape
            stem = f"base_model.model.model.layers.{number}.{name}"
            lora[f"{stem}.lora_A.weight"] = _noise((_RANK, inputs))
            lora[f"{stem}.lora_B.weight"] = _noise((outputs, _RANK))
    facts_of_lora = LoraFacts(
        shape, AdapterSettings(_RANK, 32.0, modules), "bfloat16", "0"
    ).to_json()
    made["lora"] = _write(folder / "lora", "lora", "adapter_model.safetensors", lora, facts_of_lora)
    return made


def _noise(shape: tuple[int, ...]) -> torch.Tensor:
    return (0.01 * torch.randn(*shape)).to(torch.bfloat16)


def _write(
    folder: Path,
    kind: str,
    name: str,
    tensors: Mapping[str, torch.Tensor],
    facts: dict[str, Any],
) -> Payload:
    folder.mkdir()
    save_file(dict(tensors), folder / name)
    return Payload(kind, folder.name.ljust(32, "0"), folder, facts)


def size_of(payload: Payload) -> int:
    """Bytes of a payload's file."""
    return sum(path.stat().st_size for path in payload.directory.iterdir())


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Puts into the list how much more memory of its own the process held at its peak.

    Pages of the payload's file that are mapped do not count: the system can drop them.
    """
    gc.collect()
    before, peak, stop = _own_bytes(), [0], threading.Event()

    def watch() -> None:
        while not stop.wait(_POLL_S):
            peak[0] = max(peak[0], _own_bytes() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        stop.set()
        watcher.join()
        peak[0] = max(peak[0], _own_bytes() - before)


def _own_bytes() -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not tell a process its memory")


def run_ours(model: PreTrainedModel, plain: str, payload: Payload, arm: Arm) -> None:
    """One turn of a packet: read, check, attach, detach, compare with the plain state."""
    recipe = load_recipe(payload.kind)
    with peak_memory() as peak:
        began = time.perf_counter()
        handle: Handle = recipe.attach(recipe.fit(payload, Recipient(model)), model)
        arm.on.append(time.perf_counter() - began)
    arm.memory = max(arm.memory, peak[0])
    began = time.perf_counter()
    recipe.detach(handle)
    arm.off.append(time.perf_counter() - began)
    del handle
    arm.exact = arm.exact and state_digest(model) == plain


def run_peft(adapted: Any, folder: Path, arm: Arm) -> None:
    """One turn of PEFT: load an adapter beside the one that is there, and delete it again."""
    with peak_memory() as peak:
        began = time.perf_counter()
        adapted.load_adapter(folder, "another")
        adapted.set_adapter("another")
        arm.on.append(time.perf_counter() - began)
    arm.memory = max(arm.memory, peak[0])
    began = time.perf_counter()
    adapted.set_adapter("default")
    adapted.delete_adapter("another")
    arm.off.append(time.perf_counter() - began)


def measure(layers: int, hidden: int, turns: int) -> list[Figure]:
    """All arms in turns, each on a base of its own kind of state."""
    import peft

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_base(layers, hidden)
        payloads = write_packets(model, folder)
        recipe = load_recipe("lora")
        export_peft(recipe.fit(payloads["lora"], Recipient(model)), folder / "peft")
        arms = {key: Arm(size_of(payload)) for key, payload in payloads.items()}
        arms["peft"] = Arm(size_of(payloads["lora"]))
        plain = state_digest(model)
        for _ in range(turns):
            for key, payload in payloads.items():
                run_ours(model, plain, payload, arms[key])
        with warnings.catch_warnings():
            # PEFT reads a property that transformers has renamed.
            warnings.simplefilter("ignore", FutureWarning)
            adapted = peft.PeftModel.from_pretrained(model, folder / "peft")
            for _ in range(turns):
                run_peft(adapted, folder / "peft", arms["peft"])
    return _figures(arms, layers)


def _figures(arms: Mapping[str, Arm], layers: int) -> list[Figure]:
    on = {key: statistics.median(arm.on) for key, arm in arms.items()}
    off = {key: statistics.median(arm.off) for key, arm in arms.items()}
    figures = [Figure("blocks_measured", layers, f"of {_DEPTH}")]
    for key, arm in arms.items():
        figures += [
            Figure(f"{key}_payload", arm.payload_bytes / 2**20, "MiB"),
            Figure(f"{key}_attach", on[key], "s"),
            Figure(f"{key}_revert", off[key], "s"),
        ]
    whole = on["peft"] / layers * _DEPTH
    for key in ("insert", "replace", "lora"):
        arm = arms[key]
        figures += [
            Figure(f"{key}_memory_over_payload", arm.memory / arm.payload_bytes, "x", "<= 1.1"),
            Figure(f"{key}_undo_exact", float(arm.exact), "", "1"),
        ]
    figures.append(Figure("peft_memory_over_payload", _share(arms["peft"]), "x"))
    for key in ("insert", "replace"):
        figures.append(Figure(f"{key}_attach_over_peft_32", on[key] / whole, "x", "<= 1"))
        figures.append(Figure(f"{key}_revert_over_peft_32", off[key] / whole, "x", "<= 1"))
    figures.append(Figure("lora_attach_over_peft", on["lora"] / on["peft"], "x", "<= 1"))
    figures.append(Figure("lora_revert_over_peft", off["lora"] / on["peft"], "x", "<= 1"))
    return figures


def _share(arm: Arm) -> float:
    return arm.memory / arm.payload_bytes


def main() -> None:
    """Read options, measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes; seconds")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--layers", type=int, default=2, help="blocks; 0.45 GiB each, three times")
    parser.add_argument("--turns", type=int, default=2, help="how often each arm runs")
    options = parser.parse_args()
    hidden = 512 if options.quick else 4096
    publish(
        "attach",
        measure(options.layers, hidden, options.turns),
        Options(options.quick, options.json),
    )


if __name__ == "__main__":
    main()
