# SPDX-License-Identifier: Apache-2.0
"""Kept attachments as ordinary files that other tools load.

A merged snapshot is exact: inserted blocks are stock blocks and low-rank changes are already in
the weights. A PEFT directory holds one LoRA, or one delta of matrices in the same form, with the
dose folded into its scale. Invariant: a
directory appears whole or not at all, and never replaces an existing one.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from transformers import PreTrainedModel

from allograft.durable import durable_write, storage_errors, sync_directory
from allograft.errors import RejectedError
from allograft.packet.adapter import CONFIG_NAME, AdapterSettings, render_adapter_config
from allograft.packet.delta import EMBEDDING, HEAD
from allograft.privacy.shapes import BaseTensors, read_base
from allograft.provenance.ancestry import FILE_NAME, Ancestry
from allograft.recipes.base import Attachment
from allograft.recipes.blocks import FAMILIES
from allograft.recipes.delta import packed_directions
from allograft.recipes.factors import unpack
from allograft.recipes.facts import DeltaFacts, LoraFacts
from allograft.recipes.lora import PAYLOAD, PREFIX, fold_dose
from allograft.recipes.patch import PROMPT_OWNER
from allograft.recipes.snapshot import load_model


def export_merged(
    model: PreTrainedModel, tokenizer: Any, directory: Path, ancestry: Ancestry | None = None
) -> None:
    """Write a model with its attachments as one snapshot for `from_pretrained`.

    A prompt is no part of any weight and cannot be in a snapshot.

    Args:
        model: With attachments at their doses.
        tokenizer: Written beside it.
        directory: Must not exist yet.
        ancestry: The packets inside, written beside it as well.

    Raises:
        RejectedError: AG-RCP-024 if the directory exists or a prompt is on the model.
        UnavailableError: AG-STO-001 when the disk is full.
    """
    if any(hasattr(module, PROMPT_OWNER) for module in model.modules()):
        raise RejectedError("AG-RCP-024", "a prompt stands before the text, not in the weights")
    with _new_directory(directory) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        if ancestry is not None:
            durable_write(temporary / FILE_NAME, ancestry.to_bytes())


def export_peft(
    attachment: Attachment, directory: Path, base_model: str = "", base: Path | None = None
) -> None:
    """Write a LoRA, or a delta of blocks' matrices, as a directory for `PeftModel.from_pretrained`.

    Args:
        attachment: Its dose is folded into the adapter.
        directory: Must not exist yet.
        base_model: What the configuration should name as its base; empty leaves it open.
        base: The directory of the base: a delta needs the shapes in its headers, and DoRA at a part
            of its dose its weights.

    Raises:
        RejectedError: AG-RCP-024 for other kinds and for deltas that change more than matrices of
            blocks, for dose 0, if the directory exists, or if the base is needed and not given.
    """
    if attachment.dose == 0.0:
        raise RejectedError("AG-RCP-024", "an attachment at dose 0 is no PEFT adapter")
    facts = attachment.facts
    ranks: dict[str, int] = {}
    tensors = dict(attachment.tensors)
    if isinstance(facts, LoraFacts):
        partial = facts.settings.dora and attachment.dose < 1.0
        model = load_model(base) if partial and base is not None else None
        settings, tensors = fold_dose(attachment, model)
    elif isinstance(facts, DeltaFacts) and base is not None:
        ranks, tensors = _as_adapter(attachment, facts, read_base(base))
        # One rank and alpha for PEFT to fall back on; each module has its own, at scale 1.
        settings = AdapterSettings(1, 1.0, tuple(ranks))
    else:
        raise RejectedError("AG-RCP-024", f"a {attachment.kind} is no PEFT adapter")
    transposed = FAMILIES[facts.shape.family].transposed
    config = render_adapter_config(settings, base_model, transposed=transposed, ranks=ranks)
    with _new_directory(directory) as temporary:
        durable_write(temporary / PAYLOAD, save(tensors, {"format": "pt"}))
        durable_write(temporary / CONFIG_NAME, config)


def _as_adapter(
    attachment: Attachment, facts: DeltaFacts, base: BaseTensors
) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
    """A delta in PEFT's names: rank by module, and its factors at the attachment's dose."""
    if facts.layout.vectors or not {EMBEDDING, HEAD}.isdisjoint(facts.layout.ranks):
        raise RejectedError("AG-RCP-024", "a delta of vectors or embeddings is no PEFT adapter")
    family = FAMILIES[facts.shape.family]
    ranks: dict[str, int] = {}
    tensors: dict[str, torch.Tensor] = {}
    for target, packed in packed_directions(attachment).items():
        _, number, name = target.split(".", 2)
        module = f"{family.trunk}.{family.blocks}.{number}.{name.removesuffix('.weight')}"
        left, right = unpack(packed, *base.blocks[int(number)][name].shape)
        a, b = (left, right.T) if family.transposed else (right, left.T)
        ranks[module] = len(a)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = a.contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = (b * attachment.dose).contiguous()
    return ranks, tensors


@contextlib.contextmanager
def _new_directory(directory: Path) -> Iterator[Path]:
    if directory.exists():
        raise RejectedError("AG-RCP-024", "the export directory exists already")
    temporary = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}.tmp")
    with storage_errors(directory.name):
        temporary.mkdir(mode=0o700, parents=True)
        try:
            yield temporary
            temporary.rename(directory)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_directory(directory.parent)
