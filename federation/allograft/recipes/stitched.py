# SPDX-License-Identifier: Apache-2.0
"""Experimental: an organ worn by a model of another training run, through two rotations.

Two models that never shared a weight write the same text into different coordinates. From hidden
states of both on a public probe follows, in closed form, the rotation that turns one set into the
other (Procrustes); the organ then works beside the recipient's last block,

    h + dose (O(u) - u) B,   u = h A + a.

It is published for what it measured, not as a way to share knowledge. On models of one to two
million weights it reached 2 to 7 % of the gain on the donor's own base in the middle of a model and
13 to 21 % behind the last block, where a bias on the logits of a few kilobytes reached 9 to 15 %;
smaller models disagree (benchmarks/RESULTS.md). Hence: no packet kind, refused unless named
(`EXPERIMENTAL_KINDS`), a half dose at most. How well the rotation fits says nothing about what it
carries over. See protos/spec/recipes.md, "Stitched".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from safetensors.torch import load_file, save
from torch import nn
from transformers import PreTrainedModel

from allograft.durable import durable_write
from allograft.errors import RejectedError
from allograft.recipes import blocks as surgery
from allograft.recipes.attachment import DTYPES, read_tensors
from allograft.recipes.base import (
    Attachment,
    Declaration,
    Donor,
    Extract,
    ModelCard,
    ModelShape,
    Payload,
    Plan,
    Recipient,
    Verdict,
)
from allograft.recipes.facts import StitchedFacts
from allograft.recipes.organ import OrganRecipe, block_tensors
from allograft.recipes.plan import OrganPlan
from allograft.recipes.shortage import memory_errors
from allograft.recipes.windows import Windows

PAYLOAD = "stitched.safetensors"

#: More than a half harmed every recipient that was measured.
LARGEST_DOSE = 0.5

_HIDDEN = "probe.hidden"
_MAPS = ("into", "shift", "back")
_BATCH_WINDOWS = 16


@dataclass(frozen=True, slots=True, eq=False)
class StitchMaps:
    """The way into the donor's coordinates and back; `alignment` is the share that it explains."""

    into: torch.Tensor  # [width, width]
    shift: torch.Tensor  # [width]
    back: torch.Tensor  # [width, width]
    alignment: float


def fit_maps(recipient: torch.Tensor, donor: torch.Tensor) -> StitchMaps:
    """The rotation and scale that bring one model's hidden states nearest to another's.

    Orthogonal Procrustes: with X and Y centred and U S V' the singular value decomposition of X'Y,
    the rotation is U V'. Ridge regression fits better and carries over less (measured).

    Args:
        recipient: [tokens, width].
        donor: [tokens, width], of the same tokens.
    """
    x, y = recipient.to(torch.float64), donor.to(torch.float64)
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = x - mean_x, y - mean_y
    left, _, right = torch.linalg.svd(x.T @ y)
    rotation = left @ right
    scale = float(y.norm() / x.norm())
    into = scale * rotation
    rest = float((x @ into - y).norm() / y.norm())
    shift, back = mean_y - mean_x @ into, rotation.T / scale
    return StitchMaps(into.float(), shift.float(), back.float(), 1.0 - rest**2)


@torch.no_grad()
def record_hidden(model: PreTrainedModel, windows: Windows) -> torch.Tensor:
    """What a model's last block puts out for every real token, [tokens, width], on the CPU."""
    seen: list[torch.Tensor] = []
    last = surgery.model_blocks(model)[-1]
    hook = last.register_forward_hook(
        lambda _module, _inputs, output: seen.append(surgery.hidden_of(output))
    )
    try:
        for numbers in torch.split(torch.arange(len(windows)), _BATCH_WINDOWS):
            tokens = windows.tokens[numbers].to(model.device)
            model.base_model(input_ids=tokens, use_cache=False)
            real = torch.arange(tokens.shape[1]) < windows.lengths[numbers, None]
            seen[-1] = seen[-1].to("cpu", torch.float32)[real]
    finally:
        hook.remove()
    return torch.cat(seen)


class StitchedHandle:
    """A stitched organ at work beside a model's last block."""

    def __init__(self, attachment: Attachment, model: PreTrainedModel, side: surgery.Side) -> None:
        self.attachment = attachment
        self.model = model
        self._side = side

    def set_dose(self, dose: float) -> None:
        """Scale what the organ adds.

        Raises:
            RejectedError: AG-RCP-021 above the largest dose, AG-RCP-023 after detaching.
        """
        last = surgery.base_blocks(self.model)[-1]
        if self.attachment.attachment_id not in surgery.sides_of(last):
            raise RejectedError("AG-RCP-023", "the attachment is not on this model")
        self._side.dose = _check_dose(dose)
        self.attachment = replace(self.attachment, dose=dose)


class StitchedRecipe:
    """Makes, fits, attaches and removes stitched organs."""

    kind = "stitched"
    read_facts = staticmethod(StitchedFacts.from_json)

    def extract(self, donor: Donor, plan: Plan) -> Extract:
        """Train an organ behind the last block, and record the base's hidden states on the probe.

        The hidden states are those of the base, without the organ, on public text.

        Raises:
            RejectedError: AG-RCP-030 without a probe, and those of `OrganRecipe.extract`.
        """
        if donor.probe is None:
            raise RejectedError("AG-RCP-030", "stitching needs a public probe")
        if not isinstance(plan.recipe, OrganPlan):
            raise RejectedError("AG-RCP-035", "a stitched organ needs an organ plan")
        depth = surgery.base_shape(donor.model).layers
        last = replace(plan.recipe, source=None, position=depth, search_steps=0, wire_bits=16)
        made = OrganRecipe().extract(donor, replace(plan, recipe=last))
        hidden = record_hidden(donor.model, donor.probe)
        organ = OrganRecipe.read_facts(made.facts.to_json())
        tensors = load_file(made.files[0])
        tensors[_HIDDEN] = hidden.to(DTYPES[organ.dtype])
        path = donor.workdir / PAYLOAD
        durable_write(path, save(tensors))
        made.files[0].unlink()
        facts = StitchedFacts(organ, donor.probe.digest(), len(hidden))
        return Extract(self.kind, (path,), facts, made.report)

    def check(self, statement: Declaration, model_card: ModelCard) -> Verdict:
        """Accept any model of the donor's shape, but for its depth, and of its tokenizer."""
        facts = StitchedFacts.from_json(dict(statement.facts))
        if _at_any_depth(facts.shape) != _at_any_depth(model_card.shape):
            return Verdict("refuse", "the models differ in shape", "AG-RCP-010")
        if statement.tokenizer_digest != model_card.tokenizer_digest:
            return Verdict("refuse", "the models differ in their tokenizer", "AG-RCP-011")
        needs = ("probe", "validation_text", "retention_text")
        return Verdict("behavioural", "experimental: expect next to nothing", needs=needs)

    def fit(self, payload: Payload, recipient: Recipient) -> Attachment:
        """Read the payload strictly and rotate it into the recipient's coordinates.

        Raises:
            RejectedError: AG-RCP-002, AG-RCP-003 or AG-RCP-010 if it does not fit, AG-RCP-034 if
                the recipient's probe is missing or another.
        """
        facts = StitchedFacts.from_json(dict(payload.facts))
        shape = surgery.base_shape(recipient.model)
        if _at_any_depth(shape) != _at_any_depth(facts.shape):
            raise RejectedError("AG-RCP-010", "the organ was made on a model of another shape")
        if recipient.probe is None or recipient.probe.digest() != facts.probe:
            raise RejectedError("AG-RCP-034", "the probe is not the donor's")
        own = surgery.base_blocks(recipient.model)[-facts.organ.blocks :]
        expected = {
            f"blocks.{number}.{name}": tuple(value.shape)
            for number, block in enumerate(own)
            for name, value in block.named_parameters()
        }
        expected[_HIDDEN] = (facts.tokens, shape.hidden)
        tensors = read_tensors(payload.directory / PAYLOAD, expected, DTYPES[facts.organ.dtype])
        theirs = tensors.pop(_HIDDEN)
        hidden = record_hidden(recipient.model, recipient.probe)
        if hidden.shape != theirs.shape:
            raise RejectedError("AG-RCP-003", "the probe has another number of tokens")
        return wear(payload.packet_id, facts, tensors, fit_maps(hidden, theirs))

    def attach(self, attachment: Attachment, model: PreTrainedModel) -> StitchedHandle:
        """Put the organ beside the last block.

        Raises:
            RejectedError: AG-RCP-010 for another model, AG-RCP-021 above the largest dose or where
                the last block attends otherwise than the organ, AG-RCP-023 if it is attached.
            UnavailableError: AG-RCP-027 if memory runs out; the model is then as before.
        """
        facts = attachment.facts
        assert isinstance(facts, StitchedFacts)
        shape = surgery.base_shape(model)
        if _at_any_depth(shape) != _at_any_depth(facts.shape):
            raise RejectedError("AG-RCP-010", "the organ was made on a model of another shape")
        dose = _check_dose(attachment.dose)
        surgery.check_weights(model)
        count = facts.organ.blocks
        source = shape.layers - count
        with memory_errors("attaching a stitched organ"):
            made: list[nn.Module] = surgery.new_blocks(model, source, count)
            for number, block in enumerate(made):
                surgery.fill_block(block, block_tensors(attachment, number))
            like = next(made[0].parameters())
            into, shift, back = (attachment.tensors[f"stitch.{name}"].to(like) for name in _MAPS)
        side = surgery.Side(made, into, shift, back, dose)
        owner = attachment.attachment_id
        surgery.add_side(model, side, source, shape.layers - 1, owner)
        return StitchedHandle(attachment, model, side)

    def detach(self, handle: StitchedHandle) -> None:
        """Take the organ away.

        Raises:
            RejectedError: AG-RCP-023 if it is not attached.
        """
        surgery.remove_side(handle.model, handle.attachment.attachment_id)


def wear(
    attachment_id: str,
    facts: StitchedFacts,
    blocks: Mapping[str, torch.Tensor],
    maps: StitchMaps,
) -> Attachment:
    """An organ's tensors with the maps through which a model wears it."""
    tensors = {**blocks, **{f"stitch.{name}": getattr(maps, name) for name in _MAPS}}
    return Attachment(
        kind=StitchedRecipe.kind,
        attachment_id=attachment_id,
        facts=facts,
        tensors=tensors,
        dose=LARGEST_DOSE,
        doses=(LARGEST_DOSE / 2, LARGEST_DOSE),
        report={"alignment": maps.alignment},
    )


def _check_dose(dose: float) -> float:
    if not 0.0 <= dose <= LARGEST_DOSE:
        raise RejectedError("AG-RCP-021", f"a stitched organ's dose is at most {LARGEST_DOSE}")
    return dose


def _at_any_depth(shape: ModelShape) -> ModelShape:
    return replace(shape, layers=0, layer_types=())
