# SPDX-License-Identifier: Apache-2.0
"""The organ: a few decoder blocks, trained in place in a frozen base, that others can insert.

The donor copies blocks of its base, silences them (an exact identity that can learn), inserts them
and trains only them; the payload is those blocks. A recipient with the same base inserts them at
the same place, at a dose. Trained in place they improve the base from the first step; blocks
trained outside it, as first published, never beat the untouched recipient in our replication.
Invariant: the base's own tensors are never written. See protos/spec/recipes.md.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, replace

import torch
from safetensors.torch import save
from torch import nn
from transformers import PreTrainedModel

from allograft.crypto import canonical
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
    Payload,
    Plan,
    Recipient,
    Verdict,
    check_base,
)
from allograft.recipes.facts import OrganFacts
from allograft.recipes.loop import SNAPSHOT, train
from allograft.recipes.patch import has_attachments
from allograft.recipes.plan import LoopPlan, OrganPlan
from allograft.recipes.prefix import CacheBudget, choose_prefix, replayed_prefix

PAYLOAD = "organ.safetensors"

_GAIN_FACTOR = 10.0

_TRAINING_OWNER = "training"


class OrganHandle:
    """An organ at work: its blocks inside a model."""

    def __init__(
        self, attachment: Attachment, model: PreTrainedModel, blocks: list[nn.Module]
    ) -> None:
        self.attachment = attachment
        self.model = model
        self.blocks = blocks

    def set_dose(self, dose: float) -> None:
        """Scale the residual branches of every block of the organ.

        Raises:
            RejectedError: AG-RCP-021 for a bad dose, AG-RCP-023 after detaching.
        """
        present = surgery.model_blocks(self.model)
        if not any(block is self.blocks[0] for block in present):
            raise RejectedError("AG-RCP-023", "the attachment is not on this model")
        changed = replace(self.attachment, dose=dose)
        _write_doses(changed, self.model, self.blocks)
        self.attachment = changed


class OrganRecipe:
    """Makes, fits, inserts and removes organs."""

    kind = "organ"
    read_facts = staticmethod(OrganFacts.from_json)

    def extract(self, donor: Donor, plan: Plan) -> Extract:
        """Train an organ in place and write it.

        Raises:
            RejectedError: AG-RCP-021 for a bad position, AG-RCP-022 if the model already carries
                attachments, and those of `train`.
        """
        facts = _plan_facts(donor.model, plan.recipe)
        with _growing(donor.model, facts, plan.loop) as organ:
            report = _train_organ(donor, facts, plan, organ)
            tensors = {
                f"blocks.{number}.{name}": value.detach().to("cpu", DTYPES[facts.dtype])
                for number, block in enumerate(organ)
                for name, value in block.state_dict().items()
            }
        path = donor.workdir / PAYLOAD
        durable_write(path, save(tensors))
        (donor.workdir / SNAPSHOT).unlink(missing_ok=True)
        return Extract(self.kind, (path,), facts, report)

    def check(self, statement: Declaration, model_card: ModelCard) -> Verdict:
        """Accept organs made on this base or on a relative of it."""
        return check_base(statement, OrganFacts.from_json(dict(statement.facts)), model_card)

    def fit(self, payload: Payload, recipient: Recipient) -> Attachment:
        """Read an organ strictly against the recipient's own blocks.

        Raises:
            RejectedError: AG-RCP-002 or AG-RCP-010 if the facts do not fit, AG-RCP-003 if the
                tensors do not.
        """
        facts = OrganFacts.from_json(dict(payload.facts))
        if surgery.base_shape(recipient.model) != facts.shape:
            raise RejectedError("AG-RCP-010", "the organ was made on a model of another shape")
        own = surgery.base_blocks(recipient.model)[facts.source : facts.source + facts.blocks]
        expected = {
            f"blocks.{number}.{name}": tuple(value.shape)
            for number, block in enumerate(own)
            for name, value in block.state_dict().items()
        }
        tensors = read_tensors(payload.directory / PAYLOAD, expected, DTYPES[facts.dtype])
        return Attachment(self.kind, payload.packet_id, facts, tensors)

    def attach(self, attachment: Attachment, model: PreTrainedModel) -> OrganHandle:
        """Insert an organ at its position and dose.

        Raises:
            RejectedError: AG-RCP-010 for another model, AG-RCP-021 for a bad dose, AG-RCP-023 if
                it is already attached.
        """
        facts = attachment.facts
        assert isinstance(facts, OrganFacts)
        if surgery.base_shape(model) != facts.shape:
            raise RejectedError("AG-RCP-010", "the organ was made on a model of another shape")
        made = surgery.new_blocks(model, facts.source, facts.blocks)
        for number, block in enumerate(made):
            block.load_state_dict(_block_tensors(attachment, number), strict=True)
        _write_doses(attachment, model, made)
        surgery.insert_blocks(model, made, facts.source, facts.position, attachment.attachment_id)
        return OrganHandle(attachment, model, made)

    def detach(self, handle: OrganHandle) -> None:
        """Take an organ's blocks out.

        Raises:
            RejectedError: AG-RCP-023 if it is not attached.
        """
        surgery.remove_blocks(handle.model, handle.attachment.attachment_id)


def default_position(layers: int, blocks: int) -> int:
    """Where an organ goes unless the plan says: behind five sixths of the base.

    Measured on six layers: any place from the third block on gains the same within noise, the
    very first is harmful. Late is cheap: what lies below is computed once and replayed.
    """
    return max(min(blocks, layers), 5 * layers // 6)


def _plan_facts(model: PreTrainedModel, plan: object) -> OrganFacts:
    if not isinstance(plan, OrganPlan):
        raise RejectedError("AG-RCP-035", "an organ needs an organ plan")
    if has_attachments(model):
        raise RejectedError("AG-RCP-022", "an organ is trained on the plain base")
    shape = surgery.describe_model(model.config)
    position = plan.position
    if position is None:
        position = default_position(shape.layers, plan.blocks)
    source = max(0, position - plan.blocks) if plan.source is None else plan.source
    inside = plan.blocks >= 1 and 0 <= source <= shape.layers - plan.blocks
    if not inside or not 0 <= position <= shape.layers:
        raise RejectedError(
            "AG-RCP-021", f"{plan.blocks} blocks from {source} to {position} of {shape.layers}"
        )
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    types = shape.layer_types[source : source + plan.blocks]
    return OrganFacts(shape, plan.blocks, source, position, types, dtype)


@contextlib.contextmanager
def _growing(
    model: PreTrainedModel, facts: OrganFacts, plan: LoopPlan
) -> Iterator[list[nn.Module]]:
    """The base with a silent organ in it, which alone can learn; the plain base afterwards."""
    family = surgery.find_family(model.config)
    learning = [(value, value.requires_grad) for value in model.parameters()]
    was_training = [(module, module.training) for module in model.modules()]
    for value, _ in learning:
        value.requires_grad_(False)
    model.eval()
    organ = surgery.copy_blocks(model, facts.source, facts.blocks)
    for block in organ:
        surgery.silence(family, block)
        # Master weights in full precision: bfloat16 would round most updates away.
        block.float().requires_grad_(True)
    surgery.insert_blocks(model, organ, facts.source, facts.position, _TRAINING_OWNER)
    try:
        with surgery.checkpointed(model, plan.checkpointing):
            yield organ
    finally:
        surgery.remove_blocks(model, _TRAINING_OWNER)
        for value, flag in learning:
            value.requires_grad_(flag)
        for module, mode in was_training:
            module.training = mode


def _train_organ(
    donor: Donor, facts: OrganFacts, plan: Plan, organ: list[nn.Module]
) -> dict[str, canonical.Json]:
    parameters = {
        f"{number}.{name}": value
        for number, block in enumerate(organ)
        for name, value in block.named_parameters()
    }
    passes = plan.passes(len(donor.windows))
    budget = CacheBudget(donor.ram_bytes, donor.disk_bytes)
    choice = choose_prefix(donor.model, facts.position, donor.windows, passes, budget)
    with replayed_prefix(
        donor.model, facts.position, donor.windows, choice, donor.workdir
    ) as select:

        def forward(numbers: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
            select(numbers)
            logits: torch.Tensor = donor.model(input_ids=tokens, use_cache=False).logits
            return logits

        snapshot = donor.workdir / SNAPSHOT
        training = train(
            forward,
            parameters,
            donor.windows,
            plan.loop,
            private=plan.private,
            model=donor.model,
            private_way=donor.private_way,
            hasten=_hastened(donor.model, organ),
            snapshot=snapshot,
            progress=donor.progress,
        )
    return {
        "trainable_parameters": sum(value.numel() for value in parameters.values()),
        "first_loss": training.losses[0],
        "last_loss": training.losses[-1],
        "seconds": round(training.seconds, 3),
        "resumed_at": training.resumed_at,
        "noise": training.noise,
        "prefix": asdict(choice),
    }


def _hastened(model: PreTrainedModel, organ: list[nn.Module]) -> dict[str, float]:
    """Faster rates for gains that begin at zero and have to grow to the order of one.

    A projection's entries only have to reach their usual few hundredths. At one rate for all, a
    silenced Gemma block needed five times the steps of a Llama block to the same gain (measured
    on random four-block models).
    """
    family = surgery.find_family(model.config)
    if not family.gain_offset:
        return {}
    return {
        f"{number}.{name}": _GAIN_FACTOR
        for number, block in enumerate(organ)
        for name in surgery.dosed_names(family, block)
    }


def _write_doses(attachment: Attachment, model: PreTrainedModel, organ: list[nn.Module]) -> None:
    family = surgery.find_family(model.config)
    for number, block in enumerate(organ):
        surgery.write_dose(family, block, _block_tensors(attachment, number), attachment.dose)


def _block_tensors(attachment: Attachment, number: int) -> dict[str, torch.Tensor]:
    prefix = f"blocks.{number}."
    return {
        name.removeprefix(prefix): value
        for name, value in attachment.tensors.items()
        if name.startswith(prefix)
    }
