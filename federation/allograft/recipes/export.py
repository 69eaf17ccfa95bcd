# SPDX-License-Identifier: Apache-2.0
"""Kept attachments as ordinary files that other tools load.

A merged snapshot is exact: inserted blocks are stock blocks and low-rank changes are already in
the weights. A PEFT directory holds one LoRA with the dose folded into its scale. Invariant: a
directory appears whole or not at all, and never replaces an existing one.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save
from transformers import PreTrainedModel

from allograft.durable import durable_write, storage_errors, sync_directory
from allograft.errors import RejectedError
from allograft.packet.adapter import CONFIG_NAME, render_adapter_config
from allograft.provenance.ancestry import FILE_NAME, Ancestry
from allograft.recipes.base import Attachment
from allograft.recipes.blocks import FAMILIES, model_blocks, sides_of
from allograft.recipes.facts import LoraFacts
from allograft.recipes.lora import PAYLOAD


def export_merged(
    model: PreTrainedModel, tokenizer: Any, directory: Path, ancestry: Ancestry | None = None
) -> None:
    """Write a model with its attachments as one snapshot for `from_pretrained`.

    Args:
        model: With attachments at their doses.
        tokenizer: Written beside it.
        directory: Must not exist yet.
        ancestry: The packets inside, written beside it as well.

    Raises:
        RejectedError: AG-RCP-024 if the directory exists, or if blocks stand beside others: no
            stock model has such a place for them.
        UnavailableError: AG-STO-001 when the disk is full.
    """
    if any(sides_of(block) for block in model_blocks(model)):
        raise RejectedError("AG-RCP-024", "blocks beside a block cannot be merged into a snapshot")
    with _new_directory(directory) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        if ancestry is not None:
            durable_write(temporary / FILE_NAME, ancestry.to_bytes())


def export_peft(attachment: Attachment, directory: Path, base_model: str = "") -> None:
    """Write a LoRA attachment as a directory for `PeftModel.from_pretrained`.

    Args:
        attachment: A LoRA; its dose becomes part of `lora_alpha`.
        directory: Must not exist yet.
        base_model: What the configuration should name as its base; empty leaves it open.

    Raises:
        RejectedError: AG-RCP-024 for other kinds, for dose 0, or if the directory exists.
    """
    facts = attachment.facts
    if not isinstance(facts, LoraFacts) or attachment.dose == 0.0:
        raise RejectedError("AG-RCP-024", f"a {attachment.kind} at this dose is no PEFT adapter")
    settings = replace(facts.settings, alpha=facts.alpha * attachment.dose)
    transposed = FAMILIES[facts.shape.family].transposed
    config = render_adapter_config(settings, base_model, transposed=transposed)
    with _new_directory(directory) as temporary:
        durable_write(temporary / PAYLOAD, save(dict(attachment.tensors), {"format": "pt"}))
        durable_write(temporary / CONFIG_NAME, config)


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
