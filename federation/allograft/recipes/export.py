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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save

from allograft.crypto import canonical
from allograft.durable import durable_write, storage_errors, sync_directory
from allograft.errors import RejectedError
from allograft.packet.adapter import CONFIG_NAME, AdapterSettings, render_adapter_config
from allograft.packet.delta import EMBEDDING, HEAD
from allograft.privacy.shapes import BaseTensors, read_base
from allograft.provenance.ancestry import FILE_NAME, Ancestry
from allograft.recipes.base import Attachment
from allograft.recipes.blocks import FAMILIES, model_blocks, sides_of
from allograft.recipes.delta import packed_directions
from allograft.recipes.factors import unpack
from allograft.recipes.facts import DeltaFacts, LoraFacts
from allograft.recipes.lora import PAYLOAD, PREFIX, fold_dose
from allograft.recipes.mixture import has_experts
from allograft.recipes.patch import PROMPT_OWNER, folded, has_attachments
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

    A prompt is no part of any weight and cannot be in a snapshot. Low-rank changes are folded into
    the weights, so the snapshot's outputs differ from the model's by the rounding of its type.

    Args:
        stack: The model with attachments at their doses; all of them are in the stack.
        tokenizer: Written beside it.
        directory: Must not exist yet.
        source: What the list of contents says beyond the stack.
        ancestry: The packets inside with their licences, written beside it as well.

    Raises:
        RejectedError: AG-RCP-024 if the directory exists, if the model carries something that the
            stack does not know, if blocks stand beside others, since no stock model has such a
            place for them, if an expert speaks beside it, whose words no weight holds, or if a
            prompt stands before the text.
        UnavailableError: AG-STO-001 when the disk is full.
    """
    if any(sides_of(block) for block in model_blocks(stack.model)):
        raise RejectedError("AG-RCP-024", "blocks beside a block cannot be merged into a snapshot")
    if has_experts(stack.model):
        raise RejectedError("AG-RCP-024", "an expert is no part of the model's weights")
    if any(hasattr(module, PROMPT_OWNER) for module in stack.model.modules()):
        raise RejectedError("AG-RCP-024", "a prompt stands before the text, not in the weights")
    if has_attachments(stack.model) and not stack.attachments:
        raise RejectedError("AG-RCP-024", "the model carries attachments that are not listed")
    with _new_directory(directory) as temporary, folded(stack.model):
        stack.model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        contents = describe_contents("merged", stack.attachments, source or Source())
        durable_write(temporary / CONTENTS_NAME, contents)
        if ancestry is not None:
            durable_write(temporary / FILE_NAME, ancestry.to_bytes())


def export_peft(
    attachment: Attachment,
    directory: Path,
    base_model: str = "",
    base: Path | None = None,
    source: Source | None = None,
) -> None:
    """Write a LoRA, or a delta of blocks' matrices, as a directory for `PeftModel.from_pretrained`.

    Args:
        attachment: Its dose is folded into the adapter.
        directory: Must not exist yet.
        base_model: What the configuration should name as its base; empty leaves it open.
        base: The directory of the base: a delta needs its shapes, and DoRA at a part of its dose
            its weights.
        source: What the list of contents says beyond the attachment.

    Raises:
        RejectedError: AG-RCP-024 for other kinds and for deltas that change more than matrices of
            blocks, for dose 0, if the directory exists, or if the base is needed and there is none.
    """
    if attachment.dose == 0.0:
        raise RejectedError("AG-RCP-024", "an attachment at dose 0 is no PEFT adapter")
    facts = attachment.facts
    ranks: dict[str, int] = {}
    if isinstance(facts, LoraFacts):
        settings, tensors = fold_dose(attachment, base)
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
