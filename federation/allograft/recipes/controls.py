# SPDX-License-Identifier: Apache-2.0
"""Attachments that carry nothing: what is left of a gain when the donor's text is taken out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from allograft.recipes import blocks as surgery
from allograft.recipes.base import Attachment
from allograft.recipes.delta import draw_noise, turn_directions
from allograft.recipes.facts import DeltaFacts, ExpertFacts, LoraFacts, OrganFacts, PromptFacts
from allograft.recipes.lora import starting_tensors
from allograft.recipes.patch import original_values


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
    packed = {}
    if isinstance(attachment.facts, DeltaFacts):
        # Noise in packed numbers would be of another norm: what counts is what they stand for.
        packed = draw_noise(attachment, model, generator)

    def draw(_name: str, change: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(change.shape, generator=generator)
        return noise * (float(change.norm()) / max(float(noise.norm()), 1e-30))

    return _changed("null", attachment, model, packed, draw)


def rotated_packet(attachment: Attachment, model: PreTrainedModel, seed: int) -> Attachment:
    """A packet whose change lost its place: turned by a random rotation, otherwise as it was.

    Norm, rank and singular values of each matrix stay, and which directions it writes to are drawn
    anew. Gain that is left comes from the size and form of the change. Vectors stay as they are.

    Args:
        attachment: What to turn.
        model: The recipient's model, as for `null_packet`.
        seed: Same seed, same rotation.
    """
    generator = torch.Generator().manual_seed(seed)
    packed = {}
    if isinstance(attachment.facts, DeltaFacts):
        packed = turn_directions(attachment, model, lambda n: _rotation(n, generator))

    def turn(name: str, change: torch.Tensor) -> torch.Tensor:
        # Of two factors the one that writes; of vectors before the text what each of them says.
        if change.dim() != 2 or ".lora_A." in name:
            return change
        if isinstance(attachment.facts, PromptFacts):
            return change @ _rotation(change.shape[1], generator)
        return _rotation(change.shape[0], generator) @ change

    return _changed("rotated", attachment, model, packed, turn)


def _changed(
    name: str,
    attachment: Attachment,
    model: PreTrainedModel,
    packed: Mapping[str, torch.Tensor],
    change: Callable[[str, torch.Tensor], torch.Tensor],
) -> Attachment:
    """An attachment with another change in every tensor; `packed` are already as they will be."""
    start, tensors = starting_point(attachment, model), dict(packed)
    for key, value in sorted(attachment.tensors.items()):
        if key not in tensors:
            origin = start.get(key, torch.zeros_like(value)).to(torch.float32)
            tensors[key] = (origin + change(key, value.to(torch.float32) - origin)).to(value.dtype)
    return replace(attachment, attachment_id=f"{name}-{attachment.attachment_id}", tensors=tensors)


def _rotation(size: int, generator: torch.Generator) -> torch.Tensor:
    """A random rotation, [size, size]: the orthogonal factor of a matrix of normal numbers."""
    turned, upper = torch.linalg.qr(torch.randn(size, size, generator=generator))
    # With the signs of the other factor's diagonal it is uniform (Mezzadri, math-ph/0609050).
    rotation: torch.Tensor = turned * upper.diagonal().sign()
    return rotation


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
