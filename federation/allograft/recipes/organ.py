# SPDX-License-Identifier: Apache-2.0
"""The organ: a few decoder blocks, trained in place in a frozen base, that others can take over.

To *insert*, the donor copies blocks of its base, silences them (an exact identity that can learn),
inserts them and trains only them; the payload is those blocks. A recipient with the same base
inserts them at the same place, at a dose. To *replace*, the donor trains copies in the place of the
originals, and the payload is their change, which a recipient adds to its own blocks.

Trained in place they improve the base from the first step; blocks trained outside it, as first
published, never beat the untouched recipient in our replication. Invariant: inserting writes none
of the base's own tensors, and a replaced block returns bit for bit. See protos/spec/recipes.md.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn
from transformers import PreTrainedModel

from allograft.crypto import canonical
from allograft.durable import durable_write
from allograft.errors import RejectedError
from allograft.packet.organ import INTEGERS, ORGAN_BITS, SCALE, OrganTensor, organ_layout
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
)
from allograft.recipes.facts import DOSE_RULES, OrganFacts, check_statement
from allograft.recipes.loop import SNAPSHOT, train
from allograft.recipes.losses import token_losses
from allograft.recipes.patch import (
    Dense,
    Place,
    has_attachments,
    has_patches,
    original_values,
    patch,
    unpatch,
)
from allograft.recipes.plan import LoopPlan, OrganPlan
from allograft.recipes.prefix import CacheBudget, choose_prefix, replayed_prefix
from allograft.recipes.shortage import memory_errors
from allograft.recipes.windows import Windows

PAYLOAD = "organ.safetensors"

_GAIN_FACTOR = 10.0

#: Name of a search's result in a job's work directory.
_SEARCH = "search.json"
#: Where a search looks, as shares of the base's depth; its held-out part is one in so many.
_SEARCH_SHARES = (1 / 3, 1 / 2, 2 / 3, 5 / 6, 1.0)
_SEARCH_PART = 10
_SEARCH_BATCH = 16


class OrganHandle:
    """An organ at work on a model; `blocks` are those that it inserted."""

    def __init__(
        self, attachment: Attachment, model: PreTrainedModel, blocks: Sequence[nn.Module] = ()
    ) -> None:
        self.attachment = attachment
        self.model = model
        self.blocks = blocks

    def set_dose(self, dose: float) -> None:
        """Scale the residual branches of every inserted block, or the change of replaced ones.

        Raises:
            RejectedError: AG-RCP-021 for a bad dose, AG-RCP-023 after detaching.
            UnavailableError: AG-RCP-027 if memory runs out; the dose is then as before.
        """
        if not _is_attached(self.attachment, self.model):
            raise RejectedError("AG-RCP-023", "the attachment is not on this model")
        changed = replace(self.attachment, dose=dose)
        if _facts_of(changed).replaces:
            _write_changes(changed, self.model)
        else:
            try:
                with memory_errors("changing an organ's dose"):
                    _write_doses(changed, self.model, self.blocks)
            except BaseException:
                _write_doses(self.attachment, self.model, self.blocks)
                raise
        self.attachment = changed


class OrganRecipe:
    """Makes, fits, attaches and removes organs."""

    kind = "organ"
    read_facts = staticmethod(OrganFacts.from_json)

    def extract(self, donor: Donor, plan: Plan) -> Extract:
        """Train an organ in place and write it.

        Raises:
            RejectedError: AG-RCP-021 for a bad position, AG-RCP-022 if the model already carries
                attachments, AG-RCP-026 for a base that cannot be worked on, AG-RCP-029 for a search
                on private data, and those of `train`.
        """
        facts, search = _choose_facts(donor, plan)
        own = _source_blocks(donor.model, facts)
        with _growing(donor.model, facts, plan.loop) as organ:
            report = _train_organ(donor, facts, plan, organ, donor.workdir / SNAPSHOT) | search
            tensors = _payload_tensors(donor.model, facts, organ, own)
        path = donor.workdir / PAYLOAD
        durable_write(path, save(tensors))
        for name in (SNAPSHOT, _SEARCH):
            (donor.workdir / name).unlink(missing_ok=True)
        return Extract(self.kind, (path,), facts, report)

    def check(self, statement: Declaration, model_card: ModelCard) -> Verdict:
        """Accept organs made on this base or on a relative of it."""
        return check_statement(statement, model_card)

    def fit(self, payload: Payload, recipient: Recipient) -> Attachment:
        """Read an organ strictly against the recipient's own blocks.

        Raises:
            RejectedError: AG-RCP-002 or AG-RCP-010 if the facts do not fit, AG-RCP-003 if the
                tensors do not.
        """
        facts = OrganFacts.from_json(dict(payload.facts))
        if surgery.base_shape(recipient.model) != facts.shape:
            raise RejectedError("AG-RCP-010", "the organ was made on a model of another shape")
        layout = organ_layout(
            {
                f"blocks.{number}.{name}": tuple(value.shape)
                for number, block in enumerate(_source_blocks(recipient.model, facts))
                for name, value in block.named_parameters()
            },
            facts.bits,
        )
        tensors = read_tensors(
            payload.directory / PAYLOAD,
            {name: tensor.shape for name, tensor in layout.items()},
            DTYPES[facts.dtype],
            {name: torch.int8 for name, tensor in layout.items() if tensor.integers},
        )
        if facts.bits != 16:
            tensors = _unpack(recipient.model, facts, layout, tensors)
        return Attachment(self.kind, payload.packet_id, facts, tensors)

    def attach(self, attachment: Attachment, model: PreTrainedModel) -> OrganHandle:
        """Insert an organ at its position and dose, or add its change to the blocks it replaces.

        Raises:
            RejectedError: AG-RCP-010 for another model, AG-RCP-021 for a bad dose, AG-RCP-023 if
                it is already attached, AG-RCP-026 for a base that cannot be worked on.
            UnavailableError: AG-RCP-027 if memory runs out; the model is then as before.
        """
        facts = _facts_of(attachment)
        if surgery.base_shape(model) != facts.shape:
            raise RejectedError("AG-RCP-010", "the organ was made on a model of another shape")
        if _is_attached(attachment, model):
            raise RejectedError("AG-RCP-023", "the attachment is already on this model")
        surgery.check_weights(model)
        if facts.replaces:
            _write_changes(attachment, model)
            return OrganHandle(attachment, model)
        with memory_errors("attaching an organ"):
            made = surgery.new_blocks(model, facts.source, facts.blocks)
            for number, block in enumerate(made):
                surgery.fill_block(block, block_tensors(attachment, number))
            _write_doses(attachment, model, made)
        # Only now is the model touched, and nothing in it is allocated any more.
        surgery.insert_blocks(model, made, facts.source, facts.position, attachment.attachment_id)
        return OrganHandle(attachment, model, made)

    def detach(self, handle: OrganHandle) -> None:
        """Take an organ's blocks or its change out.

        Raises:
            RejectedError: AG-RCP-023 if it is not attached.
        """
        facts, owner = _facts_of(handle.attachment), handle.attachment.attachment_id
        if facts.replaces:
            unpatch(handle.model, owner)
        else:
            surgery.remove_blocks(handle.model, owner)


def default_position(layers: int, blocks: int) -> int:
    """Where an organ goes unless the plan says: behind five sixths of the base.

    Measured on six layers: any place from the third block on gains the same within noise, the
    very first is harmful. Late is cheap: what lies below is computed once and replayed.
    """
    return max(min(blocks, layers), 5 * layers // 6)


def search_positions(layers: int, blocks: int, mode: str) -> list[int]:
    """The positions that a search tries: spread over the base, but for the very first.

    A block there sees raw embeddings, which was harmful in every measurement.
    """
    last = layers if mode == "insert" else layers - blocks
    return sorted({min(last, max(1, round(last * share))) for share in _SEARCH_SHARES})


def _choose_facts(donor: Donor, plan: Plan) -> tuple[OrganFacts, dict[str, canonical.Json]]:
    """The organ as planned, its position searched for if the plan says so, and the search's report.

    A search's result is kept until the payload is written, so that a resumed run trains on at the
    position that it began with. A search is refused under differential privacy; that it is refused
    on other private data too is up to the caller, who alone knows it (`DonationPlan.check`).
    """
    facts = _plan_facts(donor.model, plan.recipe)
    assert isinstance(plan.recipe, OrganPlan)
    if not plan.recipe.search_steps:
        return facts, {}
    if plan.recipe.position is not None:
        raise RejectedError("AG-RCP-035", "a plan fixes a position or lets it be searched for")
    if plan.private is not None:
        raise RejectedError("AG-RCP-029", "each trial on private data is a run of its own")
    kept = donor.workdir / _SEARCH
    if not kept.exists():
        durable_write(kept, canonical.dumps(_search(donor, plan, facts.shape.layers)))
    search = canonical.as_mapping(canonical.loads(kept.read_bytes()))
    position = canonical.as_int(search["position"])
    return _plan_facts(donor.model, replace(plan.recipe, position=position)), {"search": search}


def _search(donor: Donor, plan: Plan, layers: int) -> dict[str, canonical.Json]:
    """Train briefly at several positions and compare them on text that no trial saw."""
    recipe = plan.recipe
    assert isinstance(recipe, OrganPlan)
    documents = sorted(set(donor.windows.documents.tolist()))
    is_kept = donor.windows.documents >= documents[-max(1, len(documents) // _SEARCH_PART)]
    if bool(is_kept.all()):
        raise RejectedError("AG-RCP-030", "a search holds out a document, and there is only one")
    train_part, kept_part = donor.windows.choose(~is_kept), donor.windows.choose(is_kept)
    trial = replace(donor, windows=train_part, progress=None)
    brief = replace(plan, loop=replace(plan.loop, steps=recipe.search_steps))
    trials: list[canonical.Json] = []
    began = time.monotonic()
    for position in search_positions(layers, recipe.blocks, recipe.mode):
        facts = _plan_facts(donor.model, replace(recipe, position=position))
        with _growing(donor.model, facts, brief.loop) as organ:
            _train_organ(trial, facts, brief, organ, None)
            trials.append({"position": position, "loss": _mean_loss(donor.model, kept_part)})
    best = min(trials, key=lambda trial: canonical.as_number(canonical.as_mapping(trial)["loss"]))
    return {
        "position": canonical.as_mapping(best)["position"],
        "trials": trials,
        "steps": len(trials) * recipe.search_steps,
        "seconds": round(time.monotonic() - began, 3),
    }


@torch.no_grad()
def _mean_loss(model: PreTrainedModel, windows: Windows) -> float:
    """Nats per token."""
    total = 0.0
    for numbers in torch.split(torch.arange(len(windows)), _SEARCH_BATCH):
        tokens = windows.tokens[numbers].to(model.device)
        with torch.autocast(tokens.device.type, torch.bfloat16, tokens.device.type == "cuda"):
            logits = model(input_ids=tokens, use_cache=False).logits
        total += float(token_losses(logits, tokens, windows.lengths[numbers]).sum())
    return total / int((windows.lengths - 1).sum())


def _plan_facts(model: PreTrainedModel, plan: object) -> OrganFacts:
    if not isinstance(plan, OrganPlan):
        raise RejectedError("AG-RCP-035", "an organ needs an organ plan")
    if plan.mode not in DOSE_RULES:
        raise RejectedError("AG-RCP-035", f"an organ's mode is one of {', '.join(DOSE_RULES)}")
    if plan.wire_bits not in ORGAN_BITS:
        raise RejectedError("AG-RCP-035", "an organ travels in 8 or 16 bits")
    if has_attachments(model):
        raise RejectedError("AG-RCP-022", "an organ is trained on the plain base")
    surgery.check_weights(model)
    shape = surgery.describe_model(model.config)
    inserts, position = plan.mode == "insert", plan.position
    if position is None:
        position = default_position(shape.layers, plan.blocks) - (0 if inserts else plan.blocks)
    source = plan.source
    if source is None:
        source = max(0, position - plan.blocks) if inserts else position
    inside = plan.blocks >= 1 and 0 <= source <= shape.layers - plan.blocks
    if not inside or not 0 <= position <= shape.layers or not (inserts or source == position):
        raise RejectedError(
            "AG-RCP-021", f"{plan.blocks} blocks from {source} to {position} of {shape.layers}"
        )
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    types = shape.layer_types[source : source + plan.blocks]
    return OrganFacts(shape, plan.blocks, source, position, types, dtype, plan.mode, plan.wire_bits)


@contextlib.contextmanager
def _growing(
    model: PreTrainedModel, facts: OrganFacts, plan: LoopPlan
) -> Iterator[list[nn.Module]]:
    """The base with an organ in it that changes nothing yet and alone can learn.

    The plain base afterwards.
    """
    learning = [(value, value.requires_grad) for value in model.parameters()]
    was_training = [(module, module.training) for module in model.modules()]
    for value, _ in learning:
        value.requires_grad_(False)
    model.eval()
    organ = surgery.copy_blocks(model, facts.source, facts.blocks)
    chain, types = surgery.model_blocks(model), surgery.layer_types(model) or []
    kind = types[facts.source : facts.source + facts.blocks]
    after = facts.position + (facts.blocks if facts.replaces else 0)
    for block in organ:
        if not facts.replaces:
            surgery.silence(surgery.find_family(model.config), block)
        # Master weights in full precision: bfloat16 would round most updates away.
        block.float().requires_grad_(True)
    grown = [*chain[: facts.position], *organ, *chain[after:]]
    grown_types = [*types[: facts.position], *kind, *types[after:]]
    try:
        with (
            surgery.only_blocks(model, grown, grown_types),
            surgery.checkpointed(model, plan.checkpointing),
        ):
            yield organ
    finally:
        for value, flag in learning:
            value.requires_grad_(flag)
        for module, mode in was_training:
            module.training = mode


def _payload_tensors(
    model: PreTrainedModel, facts: OrganFacts, organ: Sequence[nn.Module], own: Sequence[nn.Module]
) -> dict[str, torch.Tensor]:
    """The trained blocks as they travel; in mode `replace`, less the base's own that they replace.

    Args:
        model: The donor's.
        facts: Of the organ.
        organ: The trained blocks.
        own: The base's blocks that they began as copies of.
    """
    tensors = {}
    dtype = DTYPES[facts.dtype]
    for number, (block, original) in enumerate(zip(organ, own, strict=True)):
        start = _Start(model, facts, original)
        for name, value in block.named_parameters():
            made, full = value.detach(), f"blocks.{number}.{name}"
            if facts.replaces:
                made = made - original.get_parameter(name).detach()
            if facts.bits == 16 or made.ndim != 2:
                tensors[full] = made.to("cpu", dtype)
                continue
            began = start.of(name)
            change = made.float() if began is None else made.float() - began
            scale = change.abs().amax(1)
            steps = 127.0 / torch.where(scale > 0.0, scale, 1.0)
            tensors[full + INTEGERS] = (change * steps[:, None]).round().to("cpu", torch.int8)
            tensors[full + SCALE] = scale.to("cpu", dtype)
    return tensors


def _unpack(
    model: PreTrainedModel,
    facts: OrganFacts,
    layout: Mapping[str, OrganTensor],
    tensors: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """A payload of 8 bits as the parameters of blocks, or their change, in the type of the blocks.

    What each entry began as comes from the recipient's own blocks.

    Raises:
        RejectedError: AG-PKT-027 for -128, which 8 bits could hold and no donor writes, AG-RCP-003
            for a negative scale.
    """
    own = _source_blocks(model, facts)
    starts = [_Start(model, facts, block) for block in own]
    dtype = next(own[0].parameters()).dtype
    found: dict[str, torch.Tensor] = {}
    for name, tensor in layout.items():
        if tensor.integers is None:
            if not name.endswith(SCALE):
                found[name] = tensors[name].to(dtype)
            continue
        if bool((tensors[name] == -128).any()):
            raise RejectedError("AG-PKT-027", f"a number of {name} is not one of 8 bits")
        scale = tensors[tensor.parameter + SCALE].float() / 127.0
        if bool((scale < 0).any()):
            # The sign belongs to the numbers; a second place for it could hold anything.
            raise RejectedError("AG-RCP-003", f"a scale of {tensor.parameter} is negative")
        value = tensors[name].float().mul_(scale[:, None])
        number, inner = tensor.parameter.split(".", 2)[1:]
        began = starts[int(number)].of(inner)
        found[tensor.parameter] = (value if began is None else value.add_(began.cpu())).to(dtype)
    return found


class _Start:
    """What the matrices of one block began as."""

    def __init__(self, model: PreTrainedModel, facts: OrganFacts, original: nn.Module) -> None:
        family = surgery.find_family(model.config)
        # A change, and an output projection that was silenced, begin as zeros.
        self._is_zero = facts.replaces
        self._silenced = frozenset(surgery.dosed_names(family, original))
        self._values = original_values(original)

    def of(self, name: str) -> torch.Tensor | None:
        """A parameter at the start of training, without changes of others on it; None for zeros."""
        if self._is_zero or name in self._silenced:
            return None
        return self._values[name].float()


def _train_organ(
    donor: Donor,
    facts: OrganFacts,
    plan: Plan,
    organ: list[nn.Module],
    snapshot: Path | None,
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

        training = train(
            forward,
            parameters,
            donor.windows,
            plan.loop,
            private=plan.private,
            model=donor.model,
            private_way=donor.private_way,
            hasten={} if facts.replaces else _hastened(donor.model, organ),
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


def _facts_of(attachment: Attachment) -> OrganFacts:
    assert isinstance(attachment.facts, OrganFacts)
    return attachment.facts


def _source_blocks(model: PreTrainedModel, facts: OrganFacts) -> list[nn.Module]:
    return surgery.base_blocks(model)[facts.source : facts.source + facts.blocks]


def _is_attached(attachment: Attachment, model: PreTrainedModel) -> bool:
    owner = attachment.attachment_id
    if _facts_of(attachment).replaces:
        return has_patches(model, owner)
    return surgery.is_inserted(model, owner)


def _places(attachment: Attachment, model: PreTrainedModel) -> list[Place]:
    """Every parameter that an organ replaces, with its change."""
    places: list[Place] = []
    for number, block in enumerate(_source_blocks(model, _facts_of(attachment))):
        for name, value in block_tensors(attachment, number).items():
            module, _, parameter = name.rpartition(".")
            change = Dense(value, attachment.dose)
            places.append((block.get_submodule(module), parameter, change))
    return places


def _write_changes(attachment: Attachment, model: PreTrainedModel) -> None:
    if not 0.0 <= attachment.dose <= 1.0:
        raise RejectedError("AG-RCP-021", "a dose lies between 0 and 1")
    patch(_places(attachment, model), attachment.attachment_id)


def _write_doses(
    attachment: Attachment, model: PreTrainedModel, organ: Sequence[nn.Module]
) -> None:
    family = surgery.find_family(model.config)
    for number, block in enumerate(organ):
        surgery.write_dose(family, block, block_tensors(attachment, number), attachment.dose)


def block_tensors(attachment: Attachment, number: int) -> dict[str, torch.Tensor]:
    """The tensors of one of an organ's blocks, by their names inside the block."""
    prefix = f"blocks.{number}."
    return {
        name.removeprefix(prefix): value
        for name, value in attachment.tensors.items()
        if name.startswith(prefix)
    }
