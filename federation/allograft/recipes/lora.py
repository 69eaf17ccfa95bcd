# SPDX-License-Identifier: Apache-2.0
"""LoRA, rsLoRA and DoRA: low-rank changes to linear modules, in PEFT's own file format.

PEFT trains the adapter; the payload is the file `PeftModel.from_pretrained` reads, next to a
configuration that each recipient rebuilds from the signed facts. Attaching does not go through
PEFT: it keys adapters by block index, and after an organ has been inserted an index means another
block, without any error. Here block n is the base's own block n, whatever stands around it, and
the two factors stand beside its weight (see `patch`); DoRA's change, which no two factors make, is
written into it. With a frozen A the file holds the B matrices alone, and each side draws A for
itself (see `frozen`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn
from transformers import PreTrainedModel

from allograft.crypto import canonical
from allograft.durable import durable_write
from allograft.errors import RejectedError
from allograft.packet.adapter import AdapterSettings
from allograft.recipes import blocks as surgery
from allograft.recipes.attachment import DTYPES, is_finite, read_tensors
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
from allograft.recipes.facts import LoraFacts, check_statement
from allograft.recipes.frozen import draw_a
from allograft.recipes.loop import SNAPSHOT, train
from allograft.recipes.patch import (
    LowRank,
    PatchHandle,
    Place,
    Rescaled,
    has_attachments,
    matrix_shape,
    original_value,
    unpatch,
    walk_rows,
)
from allograft.recipes.plan import LoopPlan, LoraPlan
from allograft.recipes.snapshot import load_model

PAYLOAD = "adapter_model.safetensors"

#: How PEFT begins the name of every tensor.
PREFIX = "base_model.model."


class LoraRecipe:
    """Makes, fits, applies and removes LoRA adapters."""

    kind = "lora"
    read_facts = staticmethod(LoraFacts.from_json)

    def extract(self, donor: Donor, plan: Plan) -> Extract:
        """Train an adapter with PEFT and write it.

        Raises:
            RejectedError: AG-PKT-009 or AG-RCP-021 for bad settings, AG-RCP-022 if the model
                already carries attachments, and those of `train`.
        """
        facts = _plan_facts(donor.model, plan.recipe)
        with _adapted(donor.model, facts, plan.loop) as (parameters, names):
            report = _train_adapter(donor, plan, parameters)
            tensors = {
                names[name]: value.detach().to("cpu", DTYPES[facts.dtype]).contiguous()
                for name, value in parameters.items()
            }
        path = donor.workdir / PAYLOAD
        durable_write(path, save(tensors))
        (donor.workdir / SNAPSHOT).unlink(missing_ok=True)
        return Extract(self.kind, (path,), facts, report)

    def check(self, statement: Declaration, model_card: ModelCard) -> Verdict:
        """Accept adapters made on this base or on a relative of it."""
        return check_statement(statement, model_card)

    def fit(self, payload: Payload, recipient: Recipient) -> Attachment:
        """Read an adapter strictly against the recipient's own matrices.

        Raises:
            RejectedError: AG-PKT-009 or AG-RCP-010 if the facts do not fit, AG-RCP-003 if the
                tensors do not.
        """
        facts = LoraFacts.from_json(dict(payload.facts))
        if surgery.base_shape(recipient.model) != facts.shape:
            raise RejectedError("AG-RCP-010", "the adapter was made on a model of another shape")
        settings, transposed = facts.settings, surgery.FAMILIES[facts.shape.family].transposed
        expected: dict[str, tuple[int, ...]] = {}
        drawn: dict[str, torch.Tensor] = {}
        for name, module in _targets(recipient.model, facts).items():
            outputs, inputs = matrix_shape(module, transposed)
            expected[f"{name}.lora_B.weight"] = (outputs, settings.rank)
            if settings.frozen_a:
                a = draw_a(settings.frozen_a, name, settings.rank, inputs)
                drawn[f"{name}.lora_A.weight"] = a
            else:
                expected[f"{name}.lora_A.weight"] = (settings.rank, inputs)
            if settings.dora:
                expected[f"{name}.lora_magnitude_vector"] = (outputs,)
        tensors = read_tensors(payload.directory / PAYLOAD, expected, DTYPES[facts.dtype])
        return Attachment(self.kind, payload.packet_id, facts, tensors | drawn)

    def attach(self, attachment: Attachment, model: PreTrainedModel) -> PatchHandle:
        """Put an adapter's changes on the base's own blocks at its dose.

        Raises:
            RejectedError: AG-RCP-010 for another model, AG-RCP-021 for a bad dose, AG-RCP-023 if
                it is already attached.
        """
        if surgery.base_shape(model) != attachment.facts.shape:
            raise RejectedError("AG-RCP-010", "the adapter was made on a model of another shape")
        return PatchHandle(attachment, model, _places)

    def detach(self, handle: PatchHandle) -> None:
        """Take an adapter's changes away.

        Raises:
            RejectedError: AG-RCP-023 if it is not attached.
        """
        unpatch(handle.model, handle.attachment.attachment_id)


def target_linears(family: str, target_modules: tuple[str, ...]) -> tuple[str, ...]:
    """The full names inside a block of an adapter's targets; every linear one for no targets.

    Raises:
        RejectedError: AG-RCP-020 for an unknown family, AG-RCP-021 for a target it does not have.
    """
    known = surgery.FAMILIES.get(family)
    if known is None:
        raise RejectedError("AG-RCP-020", f"family {family[:40]!r} is not known")
    last = {name.rpartition(".")[2] for name in known.linears}
    if not set(target_modules) <= last:
        raise RejectedError("AG-RCP-021", "an adapter targets modules that the family lacks")
    chosen = set(target_modules) or last
    return tuple(name for name in known.linears if name.rpartition(".")[2] in chosen)


def _plan_facts(model: PreTrainedModel, plan: object) -> LoraFacts:
    if not isinstance(plan, LoraPlan):
        raise RejectedError("AG-RCP-035", "a LoRA adapter needs a LoRA plan")
    if has_attachments(model):
        raise RejectedError("AG-RCP-022", "an adapter is trained on the plain base")
    shape = surgery.describe_model(model.config)
    linears = target_linears(shape.family, plan.target_modules)
    last = tuple(sorted({name.rpartition(".")[2] for name in linears}))
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return LoraFacts(shape, plan.settings(last), dtype, version("peft"))


def _facts_of(attachment: Attachment) -> LoraFacts:
    assert isinstance(attachment.facts, LoraFacts)
    return attachment.facts


def _targets(model: PreTrainedModel, facts: LoraFacts) -> dict[str, nn.Module]:
    """Target modules of the base's own blocks, by the names PEFT gives them in the plain base."""
    family = surgery.find_family(model.config)
    prefix = f"{PREFIX}{family.trunk}.{family.blocks}"
    return {
        f"{prefix}.{number}.{linear}": block.get_submodule(linear)
        for number, block in enumerate(surgery.base_blocks(model))
        for linear in target_linears(facts.shape.family, facts.settings.target_modules)
    }


def changes_of(
    attachment: Attachment, model: PreTrainedModel
) -> Iterator[tuple[str, nn.Module, LowRank | Rescaled]]:
    """Each target's name, its module and its change at the attachment's dose.

    Raises:
        RejectedError: AG-RCP-021 for a bad dose.
    """
    facts, dose = _facts_of(attachment), attachment.dose
    if not 0.0 <= dose <= 1.0:
        raise RejectedError("AG-RCP-021", "a dose lies between 0 and 1")
    transposed = surgery.find_family(model.config).transposed
    settings = facts.settings
    for name, module in _targets(model, facts).items():
        a = attachment.tensors[f"{name}.lora_A.weight"]
        b = attachment.tensors[f"{name}.lora_B.weight"]
        left, right = (a.T, b.T) if transposed else (b, a)
        if settings.dora:
            change = LowRank(left, right, settings.scale)
            found = _row_lengths(original_value(module), transposed, change)
            wanted = attachment.tensors[f"{name}.lora_magnitude_vector"].to(found)
            # A row without length stays without: PEFT would divide by zero.
            factors = torch.where(found > 0.0, wanted / found, 0.0)
            yield name, module, Rescaled(change, factors, transposed, dose)
        else:
            yield name, module, LowRank(left, right, dose * settings.scale)


def _row_lengths(
    original: torch.Tensor, transposed: bool, change: LowRank | None = None
) -> torch.Tensor:
    """The length of each output's row of a matrix with a change on it, [outputs], float32."""
    squares = []
    for first, rows in walk_rows(original):
        after = rows
        if change is not None:
            after = rows.clone()
            change.add_to(after, rows, first)
        squares.append(after.square().sum(dim=0 if transposed else 1))
    joined = torch.stack(squares).sum(dim=0) if transposed else torch.cat(squares)
    return joined.sqrt()


def starting_tensors(attachment: Attachment, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What training began from, where a recipient can know it: frozen A's, and the base's lengths.

    A trained A begins as noise too, but of a seed that only the donor knows.
    """
    facts, transposed = _facts_of(attachment), surgery.find_family(model.config).transposed
    start: dict[str, torch.Tensor] = {}
    for name, module in _targets(model, facts).items():
        if facts.settings.frozen_a:
            start[f"{name}.lora_A.weight"] = attachment.tensors[f"{name}.lora_A.weight"]
        if facts.settings.dora:
            lengths = _row_lengths(original_value(module), transposed)
            start[f"{name}.lora_magnitude_vector"] = lengths.to("cpu")
    return start


def fold_dose(
    attachment: Attachment, base: Path | None
) -> tuple[AdapterSettings, dict[str, torch.Tensor]]:
    """An adapter that does at full dose what this one does at its own.

    Without DoRA the dose becomes part of alpha. With it, W + d (m V / |V| - W) is k times W with a
    low-rank change again, where V = W + s B A, c = m / |V| and k = 1 - d + d c for each row: B is
    multiplied by d c / k, and the new length is k times that of the new V.

    Args:
        attachment: A LoRA.
        base: Directory of its base, which DoRA needs for any dose but 1.

    Raises:
        RejectedError: AG-RCP-024 where the base is needed and there is none, or a row vanishes;
            AG-RCP-032 if it cannot be read.
    """
    settings, tensors = _facts_of(attachment).settings, dict(attachment.tensors)
    if not settings.dora:
        return replace(settings, alpha=settings.alpha * attachment.dose), tensors
    if attachment.dose == 1.0:
        return settings, tensors
    if base is None:
        raise RejectedError("AG-RCP-024", "a DoRA adapter at a part of its dose needs its base")
    for name, module, change in changes_of(attachment, load_model(base)):
        assert isinstance(change, Rescaled)
        parts = change.scale * change.factors
        whole = 1.0 - change.scale + parts
        b = tensors[f"{name}.lora_B.weight"].float() * (parts / whole)[:, None]
        low_rank, transposed = change.low_rank, change.transposed
        folded = replace(low_rank, right=b.T) if transposed else replace(low_rank, left=b)
        lengths = whole * _row_lengths(original_value(module), transposed, folded)
        if not is_finite(lengths):
            raise RejectedError("AG-RCP-024", "an output of the adapter vanishes at this dose")
        tensors[f"{name}.lora_B.weight"] = b
        tensors[f"{name}.lora_magnitude_vector"] = lengths
    return settings, tensors


def _places(attachment: Attachment, model: PreTrainedModel) -> Iterator[Place]:
    return ((module, "weight", change) for _, module, change in changes_of(attachment, model))


@contextlib.contextmanager
def _adapted(
    model: PreTrainedModel, facts: LoraFacts, plan: LoopPlan
) -> Iterator[tuple[dict[str, nn.Parameter], dict[str, str]]]:
    """The base with PEFT's adapter in it, which alone can learn; the plain base afterwards.

    Yields:
        The adapter's parameters, and the name of each in PEFT's file format.
    """
    import peft  # Nine seconds; only a donor that trains an adapter pays them.

    settings = facts.settings
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=list(settings.target_modules),
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=surgery.FAMILIES[facts.shape.family].transposed,
        task_type="CAUSAL_LM",
    )
    learning = [(value, value.requires_grad) for value in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(plan.seed)
        # The tuner alone, without PeftModel's wrapper: what we need is the adapted modules.
        tuner: Any = peft.LoraModel(model, config, "default")
    model.eval()
    try:
        adapter = {n: p for n, p in model.named_parameters() if p.requires_grad}
        for value in adapter.values():
            # Master weights in full precision: bfloat16 would round most updates away, and takes no
            # float32 gradient of a private step. The base's own are frozen and stay as they are.
            value.data = value.data.float()
        names = {n: _peft_name(n) for n in adapter}
        parameters = dict(adapter)
        if settings.frozen_a:
            for n in [n for n in adapter if ".lora_A." in n]:
                stem, value = names[n].partition(".lora_A.")[0], parameters.pop(n)
                a = draw_a(settings.frozen_a, stem, *value.shape)
                value.requires_grad_(False).data = a.to(value.device)
        with surgery.checkpointed(model, plan.checkpointing):
            yield parameters, names
    finally:
        tuner.unload()
        for value, flag in learning:
            value.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


def _peft_name(name: str) -> str:
    """The name of an adapter's parameter in PEFT's file format."""
    name = PREFIX + name.replace(".default.", ".")
    return name.removesuffix(".weight") if ".lora_magnitude_vector." in name else name


def _train_adapter(
    donor: Donor, plan: Plan, parameters: Mapping[str, nn.Parameter]
) -> dict[str, canonical.Json]:
    def forward(_numbers: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
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
    }
