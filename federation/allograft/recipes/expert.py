# SPDX-License-Identifier: Apache-2.0
"""The expert: a small model that speaks beside a recipient with which it shares a tokenizer only.

Weights mean nothing to an independently trained model; probabilities over one vocabulary do. On
models of 1 to 2 million parameters, an ensemble with the donor's expert kept 88 % of what the same
knowledge gains on its own base, where moved weights kept none. The donor ships a whole small model,
or a change of a small base that the recipient has; `fit` makes either into the weights of a whole
one, so that an attachment needs nothing but itself. Where the base is at hand its weights come
along: a difference is taken from them, and noise around them is what the expert must beat.
"""

from __future__ import annotations

import contextlib
import copy
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from allograft.crypto import canonical
from allograft.durable import durable_write
from allograft.errors import RejectedError
from allograft.packet.kinds import find_kind
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
    load_recipe,
)
from allograft.recipes.blueprint import (
    NO_MODEL,
    build_config,
    build_model,
    describe_whole,
    own_parameters,
    read_settings,
    tensor_shapes,
)
from allograft.recipes.controls import starting_point
from allograft.recipes.facts import ExpertFacts, check_statement
from allograft.recipes.loop import SNAPSHOT, train
from allograft.recipes.mixture import Expert, add_expert, remove_expert, set_expert_dose
from allograft.recipes.patch import folded, has_attachments
from allograft.recipes.plan import ExpertPlan, LoopPlan, LoraPlan, OrganPlan
from allograft.recipes.shortage import memory_errors
from allograft.recipes.snapshot import load_model

PAYLOAD = "expert.safetensors"

_EXPERT, _BASE = "expert.", "base."
_COST_TOKENS, _COST_ROUNDS = 32, 3


class ExpertHandle:
    """An expert at work beside a model."""

    def __init__(self, attachment: Attachment, model: PreTrainedModel) -> None:
        self.attachment = attachment
        self.model = model

    def set_dose(self, dose: float) -> None:
        """Change the weight of the expert's words.

        Raises:
            RejectedError: AG-RCP-021 for a bad dose, AG-RCP-023 after detaching.
        """
        set_expert_dose(self.model, self.attachment.attachment_id, dose)
        self.attachment = replace(self.attachment, dose=dose)


class ExpertRecipe:
    """Makes, fits, attaches and removes experts."""

    kind = "expert"
    read_facts = staticmethod(ExpertFacts.from_json)

    def extract(self, donor: Donor, plan: Plan) -> Extract:
        """Train an expert from the donor's small base and write it.

        Raises:
            RejectedError: AG-RCP-002 or AG-RCP-035 for a bad plan, AG-RCP-020 for a model that
                facts cannot describe, AG-RCP-022 if it carries attachments, and those of `train`.
        """
        choices = plan.recipe
        if not isinstance(choices, ExpertPlan):
            raise RejectedError("AG-RCP-035", "an expert needs an expert plan")
        if has_attachments(donor.model):
            raise RejectedError("AG-RCP-022", "an expert is trained from a plain model")
        if choices.carrier == "whole":
            return _extract_whole(donor, plan, choices)
        inner = _change_plan(choices)
        made = load_recipe(choices.carrier).extract(donor, replace(plan, recipe=inner))
        (file,) = made.files
        os.replace(file, donor.workdir / PAYLOAD)
        fields = made.facts.to_json()
        dtype = canonical.as_text(fields.pop("dtype"))
        shape = made.facts.shape
        del fields["shape"]
        facts = ExpertFacts(shape, choices.carrier, choices.mixing, choices.gate, dtype, {}, fields)
        return Extract(self.kind, (donor.workdir / PAYLOAD,), facts, made.report)

    def check(self, statement: Declaration, model_card: ModelCard) -> Verdict:
        """Accept experts of the model's tokenizer, if the base that they name is here."""
        return check_statement(statement, model_card)

    def fit(self, payload: Payload, recipient: Recipient) -> Attachment:
        """Read an expert strictly, make it whole, and measure what its words cost.

        Raises:
            RejectedError: AG-RCP-002, AG-RCP-010, AG-RCP-011 or AG-RCP-014 if the facts do not fit,
                AG-RCP-003 if the tensors do not.
            UnavailableError: AG-RCP-027 if memory runs out.
        """
        facts = ExpertFacts.from_json(dict(payload.facts))
        if facts.shape.vocab != surgery.base_shape(recipient.model).vocab:
            raise RejectedError("AG-RCP-011", "the expert was made with another vocabulary")
        base = _load_base(payload, facts, recipient)
        if facts.carrier == "whole":
            path, expected = payload.directory / PAYLOAD, tensor_shapes(build_config(facts))
            made = read_tensors(path, expected, DTYPES[facts.dtype])
            start = _copy_weights(base) if base is not None else {}
        else:
            assert base is not None
            facts, made, start = _make_whole(payload, facts, base)
        tensors = _named(_EXPERT, made) | _named(_BASE, start)
        attachment = Attachment(self.kind, payload.packet_id, facts, tensors)
        cost = measure_cost(attachment, recipient.model)
        report: dict[str, canonical.Json] = {"cost_ratio": round(cost, 3)}
        return replace(attachment, report=report)

    def attach(self, attachment: Attachment, model: PreTrainedModel) -> ExpertHandle:
        """Let an expert speak beside a model at its dose.

        Raises:
            RejectedError: AG-RCP-002 if the facts make no model, AG-RCP-011 for another vocabulary,
                AG-RCP-021 for a bad dose, AG-RCP-023 if it is already attached.
            UnavailableError: AG-RCP-027 if memory runs out.
        """
        facts = attachment.facts
        assert isinstance(facts, ExpertFacts)
        if facts.shape.vocab != surgery.base_shape(model).vocab:
            raise RejectedError("AG-RCP-011", "the expert was made with another vocabulary")
        expert = _build(facts, attachment, _EXPERT, model)
        difference = facts.mixing == "difference"
        base = _build(facts, attachment, _BASE, model) if difference else None
        beside = Expert(expert, base, attachment.dose, facts.gate)
        add_expert(model, attachment.attachment_id, beside)
        return ExpertHandle(attachment, model)

    def detach(self, handle: ExpertHandle) -> None:
        """Let it speak no more.

        Raises:
            RejectedError: AG-RCP-023 if it is not attached.
        """
        remove_expert(handle.model, handle.attachment.attachment_id)


def measure_cost(attachment: Attachment, model: PreTrainedModel) -> float:
    """Time per generated token with the expert, as a multiple of the model alone on this machine.

    The median of a few rounds of cached greedy tokens, the two taking turns.
    """
    tokens = min(_COST_TOKENS, int(model.config.max_position_embeddings) // 2)
    ids = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    plan = GenerationConfig(
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    )

    def spend() -> float:
        started = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=plan)
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        return time.perf_counter() - started

    handle = ExpertRecipe().attach(replace(attachment, dose=0.5), model)
    try:
        ratios = []
        for number in range(_COST_ROUNDS + 1):
            handle.set_dose(0.5)
            beside = spend()
            handle.set_dose(0.0)
            if number:  # the first round warms up
                ratios.append(beside / spend())
    finally:
        ExpertRecipe().detach(handle)
    return statistics.median(ratios)


def _change_plan(choices: ExpertPlan) -> OrganPlan | LoraPlan:
    if choices.carrier == "organ":
        return OrganPlan(choices.blocks, position=choices.position)
    if choices.carrier == "lora":
        return LoraPlan(choices.rank, choices.alpha)
    raise RejectedError("AG-RCP-035", "an expert is carried by whole, organ or lora")


def _extract_whole(donor: Donor, plan: Plan, choices: ExpertPlan) -> Extract:
    shape, settings = describe_whole(donor.model)
    dtype = _dtype_name(donor.model)
    facts = ExpertFacts(shape, "whole", choices.mixing, choices.gate, dtype, settings, {})
    with _learning(donor.model, plan.loop) as (twin, parameters):

        def forward(_numbers: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = twin(input_ids=tokens, use_cache=False).logits
            return logits

        training = train(
            forward,
            parameters,
            donor.windows,
            plan.loop,
            private=plan.private,
            model=twin,
            private_way=donor.private_way,
            snapshot=donor.workdir / SNAPSHOT,
            progress=donor.progress,
        )
        tensors = _copy_weights(twin, DTYPES[dtype])
    path = donor.workdir / PAYLOAD
    durable_write(path, save(tensors))
    (donor.workdir / SNAPSHOT).unlink(missing_ok=True)
    report: dict[str, canonical.Json] = {
        "trainable_parameters": sum(value.numel() for value in parameters.values()),
        "first_loss": training.losses[0],
        "last_loss": training.losses[-1],
        "seconds": round(training.seconds, 3),
        "resumed_at": training.resumed_at,
        "noise": training.noise,
    }
    return Extract("expert", (path,), facts, report)


@contextlib.contextmanager
def _learning(
    model: PreTrainedModel, plan: LoopPlan
) -> Iterator[tuple[PreTrainedModel, dict[str, nn.Parameter]]]:
    """A copy of a model in full precision, and what of it learns: all but embeddings and head."""
    twin = copy.deepcopy(model).float().eval().requires_grad_(False)
    tables = [m for m in twin.modules() if isinstance(m, nn.Embedding)]
    still = {
        id(value)
        for table in (*tables, twin.get_output_embeddings())
        for value in table.parameters()
    }
    parameters = {n: p for n, p in own_parameters(twin).items() if id(p) not in still}
    for value in parameters.values():
        value.requires_grad_(True)
    with surgery.checkpointed(twin, plan.checkpointing):
        yield twin, parameters


def _load_base(
    payload: Payload, facts: ExpertFacts, recipient: Recipient
) -> PreTrainedModel | None:
    """The donor's base, where this site has it; None where it has not and need not."""
    directory = recipient.bases.get(payload.base_digest)
    if directory is None:
        if facts.needs_base:
            raise RejectedError("AG-RCP-014", "the expert's base is not at hand")
        return None
    base = load_model(directory, str(recipient.model.device))
    if surgery.describe_model(base.config) != facts.shape:
        raise RejectedError("AG-RCP-010", "the expert's base has another shape than its facts say")
    if facts.carrier == "whole":
        # Its weights will run in the expert's configuration, in another of which they mean nothing.
        shapes = {name: tuple(value.shape) for name, value in own_parameters(base).items()}
        same = read_settings(base.config) == dict(facts.settings)
        if not same or shapes != tensor_shapes(build_config(facts)):
            raise RejectedError("AG-RCP-010", "the expert's base has other settings than it")
    return base


def _make_whole(
    payload: Payload, facts: ExpertFacts, base: PreTrainedModel
) -> tuple[ExpertFacts, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A changed base as a whole model: its facts, its weights, and those its training began with.

    The latter are the base's own, with silent blocks where an organ was inserted, so that both
    models have one configuration.
    """
    recipe = load_recipe(facts.carrier)
    (name,) = find_kind(facts.carrier).parts
    with tempfile.TemporaryDirectory(dir=payload.directory) as directory:
        # Under the name that its kind reads; a link costs no space.
        os.link(payload.directory / PAYLOAD, Path(directory, name))
        change = recipe.fit(
            Payload(facts.carrier, payload.packet_id, Path(directory), facts.change.to_json()),
            Recipient(base),
        )
    begun = starting_point(change, base)
    silent = {n: begun.get(n, torch.zeros_like(v)) for n, v in change.tensors.items()}
    handle = recipe.attach(replace(change, tensors=silent), base)
    with folded(base):
        start = _copy_weights(base)
    recipe.detach(handle)
    recipe.attach(change, base)
    with folded(base):
        shape, settings = describe_whole(base)
        made = _copy_weights(base)
    whole = replace(
        facts, shape=shape, carrier="whole", dtype=_dtype_name(base), settings=settings, inner={}
    )
    return whole, made, start


def _dtype_name(model: PreTrainedModel) -> str:
    return str(model.dtype).removeprefix("torch.")


def _copy_weights(
    model: PreTrainedModel, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    return {
        name: value.detach().to("cpu", dtype, copy=True).contiguous()
        for name, value in own_parameters(model).items()
    }


def _build(
    facts: ExpertFacts, attachment: Attachment, prefix: str, beside: PreTrainedModel
) -> PreTrainedModel:
    """One of an attachment's models, in the type and place of the model it will run beside.

    Raises:
        RejectedError: AG-RCP-002 if it cannot be built, or cannot be run once it is.
        UnavailableError: AG-RCP-027 if memory runs out.
    """
    tensors = {
        name.removeprefix(prefix): value.to(beside.dtype)
        for name, value in attachment.tensors.items()
        if name.startswith(prefix)
    }
    config = build_config(facts)
    length = max(1, min(2, int(config.max_position_embeddings)))
    ids = torch.zeros((1, length), dtype=torch.long, device=beside.device)
    try:
        with memory_errors("building the expert"), torch.no_grad():
            model = build_model(config, tensors).to(beside.device)
            model(input_ids=ids, use_cache=False)
    # Numbers may make modules that do not fit each other; only running them tells.
    except NO_MODEL as error:
        raise RejectedError("AG-RCP-002", f"not a model: {type(error).__name__}") from error
    return model


def _named(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": value for name, value in tensors.items()}
