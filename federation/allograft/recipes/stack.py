# SPDX-License-Identifier: Apache-2.0
"""The attachments that a recipient keeps on one model.

Invariant: the model's state follows from the set of attachments and their doses, not from the
order in which they came or went; with none left it is the plain base, bit for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from allograft.crypto import canonical
from allograft.errors import RejectedError
from allograft.recipes import blocks as surgery
from allograft.recipes.attachment import attachment_digest
from allograft.recipes.base import BUILT_IN_KINDS, Attachment, Handle, load_recipe
from allograft.recipes.delta import draw_noise
from allograft.recipes.facts import DeltaFacts, ExpertFacts, LoraFacts, OrganFacts
from allograft.recipes.lora import starting_tensors
from allograft.recipes.patch import original_values


class Stack:
    """A model with the attachments that this stack put on it.

    Args:
        model: A plain base; changed in place by `attach` and `detach`.
        allowed: Kinds whose recipes may be loaded.
    """

    def __init__(self, model: PreTrainedModel, allowed: frozenset[str] = BUILT_IN_KINDS) -> None:
        self.model = model
        self._allowed = allowed
        self._handles: dict[str, Handle] = {}

    @property
    def attachments(self) -> tuple[Attachment, ...]:
        """What is attached, by id."""
        return tuple(self._handles[key].attachment for key in sorted(self._handles))

    def attach(self, attachment: Attachment) -> Handle:
        """Put an attachment on the model at its dose.

        Raises:
            RejectedError: AG-RCP-023 if it is already on it, and those of its recipe.
        """
        key = attachment.attachment_id
        if key in self._handles:
            raise RejectedError("AG-RCP-023", "the attachment is already on this model")
        handle = load_recipe(attachment.kind, self._allowed).attach(attachment, self.model)
        self._handles[key] = handle
        return handle

    def attach_all(self, attachments: Iterable[Attachment]) -> None:
        """Put several attachments on the model, or none of them if one is refused.

        Raises:
            AllograftError: As `attach`.
        """
        done: list[str] = []
        try:
            for attachment in attachments:
                self.attach(attachment)
                done.append(attachment.attachment_id)
        except BaseException:
            for key in done:
                self.detach(key)
            raise

    def set_dose(self, attachment_id: str, dose: float) -> None:
        """Change the dose of an attachment in place.

        Raises:
            RejectedError: AG-RCP-021 for a bad dose, AG-RCP-023 if it is not on the model.
        """
        self._handle(attachment_id).set_dose(dose)

    def detach(self, attachment_id: str) -> None:
        """Take an attachment off, whatever came before or after it.

        Raises:
            RejectedError: AG-RCP-023 if it is not on the model.
        """
        handle = self._handle(attachment_id)
        load_recipe(handle.attachment.kind, self._allowed).detach(handle)
        del self._handles[attachment_id]

    def _handle(self, attachment_id: str) -> Handle:
        handle = self._handles.get(attachment_id)
        if handle is None:
            raise RejectedError("AG-RCP-023", "the attachment is not on this model")
        return handle

    def digest(self) -> str:
        """SHA-256 (hex) that names this set of attachments at their doses."""
        return stack_digest(self.attachments)


def stack_digest(attachments: Iterable[Attachment]) -> str:
    """The digest of a set of attachments, without a model."""
    digests = sorted(attachment_digest(attachment) for attachment in attachments)
    return hashlib.sha256(canonical.dumps(list(digests))).hexdigest()


def null_packet(attachment: Attachment, model: PreTrainedModel, seed: int) -> Attachment:
    """Noise that looks like an attachment: what any change of this size would do to a model.

    Each tensor moves away from where its training began by noise of the same Frobenius norm, so
    gain that the null shows too is gain that has nothing to do with the donor's text.

    Args:
        attachment: What to imitate.
        model: The recipient's model, whose blocks an organ began as copies of.
        seed: Same seed, same noise.
    """
    generator = torch.Generator().manual_seed(seed)
    start = starting_point(attachment, model)
    tensors = {}
    if isinstance(attachment.facts, DeltaFacts):
        # Noise in packed numbers would be of another norm: what counts is what they stand for.
        tensors = draw_noise(attachment, model, generator)
    for name, value in sorted(attachment.tensors.items()):
        if name in tensors:
            continue
        origin = start.get(name, torch.zeros_like(value)).to(torch.float32)
        size = float((value.to(torch.float32) - origin).norm())
        noise = torch.randn(value.shape, generator=generator)
        noise *= size / max(float(noise.norm()), 1e-30)
        tensors[name] = (origin + noise).to(value.dtype)
    key = f"null-{attachment.attachment_id}"
    return replace(attachment, attachment_id=key, tensors=tensors)


def starting_point(attachment: Attachment, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What training began from, where that is known and not zero.

    Silenced copies for an organ, of the base's blocks without what other attachments changed in
    them; its base for an expert. Of an expert whose base is not here nothing is known, and its null
    is a model of random weights.
    """
    facts = attachment.facts
    if isinstance(facts, ExpertFacts):
        bases = {n: v for n, v in attachment.tensors.items() if n.startswith("base.")}
        return bases | {n.replace("base.", "expert.", 1): v for n, v in bases.items()}
    if isinstance(facts, LoraFacts):
        return starting_tensors(attachment, model)
    if not isinstance(facts, OrganFacts) or facts.replaces:
        return {}
    family = surgery.find_family(model.config)
    start = {}
    made = surgery.new_blocks(model, facts.source, facts.blocks)
    originals = surgery.base_blocks(model)[facts.source : facts.source + facts.blocks]
    for number, (block, original) in enumerate(zip(made, originals, strict=True)):
        surgery.fill_block(block, original_values(original))
        surgery.silence(family, block)
        for name, value in block.state_dict().items():
            start[f"blocks.{number}.{name}"] = value.to("cpu")
    return start
