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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save

from allograft.crypto import canonical
from allograft.durable import durable_write, storage_errors, sync_directory
from allograft.errors import RejectedError
from allograft.packet.adapter import CONFIG_NAME, render_adapter_config
from allograft.provenance.ancestry import FILE_NAME, Ancestry
from allograft.recipes.base import Attachment
from allograft.recipes.blocks import FAMILIES
from allograft.recipes.facts import LoraFacts
from allograft.recipes.lora import PAYLOAD
from allograft.recipes.mixture import has_experts
from allograft.recipes.patch import has_attachments
from allograft.recipes.stack import Stack, stack_digest

#: What is inside an export, written beside its weights.
CONTENTS_NAME = "allograft-contents.json"


@dataclass(frozen=True, slots=True)
class Source:
    """Where the attachments of an export came from, as far as it is known.

    Attributes:
        base: Weights digest (hex) of the model they were attached to; empty if unknown.
        donors: The donor of each packet, by packet id.
    """

    base: str = ""
    donors: Mapping[str, str] = field(default_factory=dict)


def export_merged(
    stack: Stack,
    tokenizer: Any,
    directory: Path,
    source: Source | None = None,
    ancestry: Ancestry | None = None,
) -> None:
    """Write a model with its attachments as one snapshot for `from_pretrained`.

    Args:
        stack: The model with attachments at their doses; all of them are in the stack.
        tokenizer: Written beside it.
        directory: Must not exist yet.
        source: What the list of contents says beyond the stack.
        ancestry: The packets inside with their licences, written beside it as well.

    Raises:
        RejectedError: AG-RCP-024 if the directory exists, if the model carries something that the
            stack does not know, or if an expert speaks beside it: no weight holds its words.
        UnavailableError: AG-STO-001 when the disk is full.
    """
    if has_experts(stack.model):
        raise RejectedError("AG-RCP-024", "an expert is no part of the model's weights")
    if has_attachments(stack.model) and not stack.attachments:
        raise RejectedError("AG-RCP-024", "the model carries attachments that are not listed")
    with _new_directory(directory) as temporary:
        stack.model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        contents = describe_contents("merged", stack.attachments, source or Source())
        durable_write(temporary / CONTENTS_NAME, contents)
        if ancestry is not None:
            durable_write(temporary / FILE_NAME, ancestry.to_bytes())


def export_peft(
    attachment: Attachment, directory: Path, base_model: str = "", source: Source | None = None
) -> None:
    """Write a LoRA attachment as a directory for `PeftModel.from_pretrained`.

    Args:
        attachment: A LoRA; its dose becomes part of `lora_alpha`.
        directory: Must not exist yet.
        base_model: What the configuration should name as its base; empty leaves it open.
        source: What the list of contents says beyond the attachment.

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
        contents = describe_contents("peft", (attachment,), source or Source())
        durable_write(temporary / CONTENTS_NAME, contents)


def describe_contents(
    form: Literal["merged", "peft"], attachments: Sequence[Attachment], source: Source
) -> bytes:
    """What an export holds, as canonical JSON: base, packets, kinds, doses, donors."""
    inside: list[canonical.Json] = [
        {
            "packet_id": entry.attachment_id,
            "kind": entry.kind,
            "dose": entry.dose,
            "donor": source.donors.get(entry.attachment_id, ""),
        }
        for entry in attachments
    ]
    digest = stack_digest(attachments)
    return canonical.dumps(
        {"v": 1, "form": form, "base": source.base, "stack": digest, "inside": inside}
    )


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
