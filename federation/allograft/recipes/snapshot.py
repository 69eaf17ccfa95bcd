# SPDX-License-Identifier: Apache-2.0
"""Model snapshots on disk and in memory: load them, and name their exact state.

Invariant: loading runs no code from the directory. Only safetensors weights are read, remote code
is never trusted, and nothing is fetched from anywhere.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from allograft.crypto import canonical
from allograft.errors import RejectedError
from allograft.recipes.attachment import is_finite
from allograft.recipes.blocks import find_family, model_blocks, sides_of
from allograft.recipes.patch import changes_beside


def load_model(directory: Path, device: str = "cpu") -> PreTrainedModel:
    """Load a causal language model from a local directory, ready to evaluate.

    On a CPU the weights are float32, because half precision is slow and imprecise there; on an
    accelerator they keep the type they were stored in.

    Raises:
        RejectedError: AG-RCP-032 if the directory is unusable, AG-RCP-020 for its family.
    """
    if not (directory / "config.json").is_file():
        raise RejectedError("AG-RCP-032", "there is no config.json in the model directory")
    if not any(directory.glob("*.safetensors")):
        raise RejectedError("AG-RCP-032", "there are no safetensors weights in the model directory")
    try:
        loaded: tuple[PreTrainedModel, dict[str, Any]] = AutoModelForCausalLM.from_pretrained(
            directory,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32 if device == "cpu" else "auto",
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise RejectedError("AG-RCP-032", f"cannot load it: {type(error).__name__}") from error
    model, loading = loaded
    # transformers fills gaps with random numbers and only logs that it did.
    gaps = len(loading["missing_keys"]) + len(loading["mismatched_keys"])
    if gaps:
        raise RejectedError("AG-RCP-032", f"{gaps} of its tensors are missing or do not fit")
    find_family(model.config)
    if not all(is_finite(value) for value in model.parameters()):
        raise RejectedError("AG-RCP-032", "its weights hold values that are not finite")
    return model.to(device).eval()


def load_tokenizer(directory: Path) -> Any:
    """Load a tokenizer from a local directory.

    Raises:
        RejectedError: AG-RCP-032.
    """
    try:
        return AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        cause = f"cannot load its tokenizer: {type(error).__name__}"
        raise RejectedError("AG-RCP-032", cause) from error


def state_digest(model: PreTrainedModel) -> str:
    """SHA-256 over everything that decides what a model computes.

    Covers each tensor's name, type, shape and bytes, what stands beside a weight or a block, each
    block's cache slot, and the configuration. Two models with one digest give bit-equal logits on
    one machine.
    """
    whole = hashlib.sha256()

    def add(name: str, value: torch.Tensor) -> None:
        whole.update(f"{name}:{value.dtype}:{tuple(value.shape)}\n".encode())
        flat = value.detach().contiguous().cpu().reshape(-1)
        whole.update(flat.view(torch.uint8).numpy().tobytes())

    def add_slots(index: int, block: nn.Module) -> None:
        slots = [getattr(module, "layer_idx", None) for module in block.modules()]
        whole.update(f"{index}:{slots}\n".encode())

    for name, value in sorted(model.state_dict(keep_vars=True).items()):
        add(name, value)
    for name, module in model.named_modules():
        for owner, change in changes_beside(module).items():
            whole.update(f"{owner}:{change.scale}\n".encode())
            add(f"{name}.left", change.left)
            add(f"{name}.right", change.right)
    for index, block in enumerate(model_blocks(model)):
        add_slots(index, block)
        for owner, side in sorted(sides_of(block).items()):
            whole.update(f"{owner}:{side.dose}\n".encode())
            for name in ("into", "shift", "back"):
                add(name, getattr(side, name))
            for number, beside in enumerate(side.blocks):
                add_slots(number, beside)
                for name, value in sorted(beside.state_dict().items()):
                    add(name, value)
    whole.update(canonical.dumps(_describable(model.config.to_dict())))
    return whole.hexdigest()


def _describable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _describable(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_describable(entry) for entry in value]
    return value if isinstance(value, str | int | float | bool | type(None)) else str(value)
