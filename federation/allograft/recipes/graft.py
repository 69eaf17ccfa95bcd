# SPDX-License-Identifier: Apache-2.0
"""The module graft: what changed in a few whole linear modules of a base, strongest first.

The donor trains all linear modules of its base's blocks, or brings a snapshot trained elsewhere,
ranks them, and ships the change of the first K. After Beyond Learning (arXiv 2602.16189), which
copies the K modules whose mean absolute output at the last token differs most between two siblings;
here the change against the named base travels, so that it has a dose and fits relatives of it.

A kind for comparison: in our measurements K modules taken by chance gain as much as the first K by
activation, and the whole change at a part of its dose gains more, at less cost to general text,
than any choice of modules. See protos/spec/recipes.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

import torch
from safetensors.torch import save
from torch import nn
from transformers import PreTrainedModel

from allograft.crypto import canonical
from allograft.durable import durable_write
from allograft.errors import RejectedError
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
from allograft.recipes.delta import learning_in_place, train_in_place
from allograft.recipes.facts import ModuleGraftFacts, check_statement
from allograft.recipes.loop import SNAPSHOT
from allograft.recipes.patch import Dense, PatchHandle, Place, has_attachments, unpatch
from allograft.recipes.plan import ModuleGraftPlan

PAYLOAD = "modules.safetensors"

_PROMPTS = 16
_PROMPT_TOKENS = 32


class ModuleGraftRecipe:
    """Makes, fits, applies and removes module grafts."""

    kind = "module_graft"
    read_facts = staticmethod(ModuleGraftFacts.from_json)

    def extract(self, donor: Donor, plan: Plan) -> Extract:
        """Train all linear modules, or compare with `donor.tuned`, and write the first K changes.

        The calibration prompts are drawn from the base, not from the donor's text: ranks and
        scores then say nothing about it that the weights do not.

        Raises:
            RejectedError: AG-RCP-010 if the tuned model has another shape, AG-RCP-022 if the model
                already carries attachments, AG-RCP-033 if a change is not finite, AG-RCP-035 for
                another kind's plan, for more modules than there are, or if nothing changed; and
                those of `train`.
        """
        recipe, model = plan.recipe, donor.model
        if not isinstance(recipe, ModuleGraftPlan):
            raise RejectedError("AG-RCP-035", "a module graft needs its own plan")
        if has_attachments(model):
            raise RejectedError("AG-RCP-022", "a module graft is made on the plain base")
        shape = surgery.describe_model(model.config)
        modules = linear_modules(model)
        if recipe.modules > len(modules):
            raise RejectedError("AG-RCP-035", f"{recipe.modules} modules of {len(modules)}")
        by_outputs = recipe.ranking in {"activation", "bottom"}
        prompts = draw_prompts(model, plan.loop.seed) if by_outputs else None
        before = measure_outputs(model, prompts)
        if donor.tuned is None:
            changes, after, report = _train_modules(donor, plan, prompts)
        else:
            changes, after, report = *_compare_modules(donor, prompts), {}
        if not all(is_finite(change) for change in changes.values()):
            raise RejectedError("AG-RCP-033", "a change is not finite")
        if not any(bool(change.any()) for change in changes.values()):
            raise RejectedError("AG-RCP-035", "no linear module changed")
        outputs = {name: abs(value - before[name]) for name, value in after.items()}
        scores = _score(recipe.ranking, list(modules), outputs, changes)
        order = _order(recipe.ranking, scores, plan.loop.seed)
        facts = ModuleGraftFacts(
            shape=shape,
            modules=tuple(order[: recipe.modules or len(order)]),
            # Three digits: what a score is for needs no more, and more would be room for a message.
            scores=tuple(float(f"{scores[name]:.3g}") for name in order)[: recipe.modules or None],
            ranking=recipe.ranking,
            calibration="" if prompts is None else digest_prompts(prompts),
            source="trained" if donor.tuned is None else "snapshot",
            dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        )
        path = donor.workdir / PAYLOAD
        kept = {name: modules[name] for name in facts.modules}
        tensors = {
            name: changes[name].to("cpu", DTYPES[facts.dtype]).contiguous()
            for name in _parameters_of(kept)
        }
        durable_write(path, save(tensors))
        (donor.workdir / SNAPSHOT).unlink(missing_ok=True)
        report |= {"modules": len(facts.modules), "payload_bytes": path.stat().st_size}
        return Extract(self.kind, (path,), facts, report)

    def check(self, statement: Declaration, model_card: ModelCard) -> Verdict:
        """Accept grafts made on this base or on a relative of it."""
        return check_statement(statement, model_card)

    def fit(self, payload: Payload, recipient: Recipient) -> Attachment:
        """Read a graft strictly against the recipient's own modules.

        Raises:
            RejectedError: AG-RCP-002 or AG-RCP-010 if the facts do not fit, AG-RCP-003 if the
                tensors do not.
        """
        facts = ModuleGraftFacts.from_json(dict(payload.facts))
        if surgery.base_shape(recipient.model) != facts.shape:
            raise RejectedError("AG-RCP-010", "the graft was made on a model of another shape")
        expected = {
            target: tuple(module.get_parameter(name).shape)
            for target, (module, name) in _targets(facts, recipient.model).items()
        }
        tensors = read_tensors(payload.directory / PAYLOAD, expected, DTYPES[facts.dtype])
        return Attachment(self.kind, payload.packet_id, facts, tensors)

    def attach(self, attachment: Attachment, model: PreTrainedModel) -> PatchHandle:
        """Add a graft's changes to the base's own modules at its dose.

        Raises:
            RejectedError: AG-RCP-010 for another model, AG-RCP-021 for a bad dose, AG-RCP-023 if
                it is already attached.
        """
        if surgery.base_shape(model) != attachment.facts.shape:
            raise RejectedError("AG-RCP-010", "the graft was made on a model of another shape")
        return PatchHandle(attachment, model, _places)

    def detach(self, handle: PatchHandle) -> None:
        """Take a graft's changes out of the weights.

        Raises:
            RejectedError: AG-RCP-023 if it is not attached.
        """
        unpatch(handle.model, handle.attachment.attachment_id)


def keep_first(attachment: Attachment, count: int) -> Attachment:
    """A graft of only its first modules: the strength that a recipient can choose beside the dose.

    Raises:
        RejectedError: AG-RCP-021 if it has not so many.
    """
    facts = _facts_of(attachment)
    if not 1 <= count <= len(facts.modules):
        raise RejectedError("AG-RCP-021", f"{count} of {len(facts.modules)} modules")
    fewer = replace(facts, modules=facts.modules[:count], scores=facts.scores[:count])
    tensors = {
        name: value
        for name, value in attachment.tensors.items()
        if name.rpartition(".")[0] in fewer.modules
    }
    return replace(attachment, facts=fewer, tensors=tensors)


def linear_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Every linear module of the base's own blocks, by name; fused ones count once.

    By the family's table and not by class: GPT-2 has no `nn.Linear` inside its blocks.
    """
    family = surgery.find_family(model.config)
    return {
        f"blocks.{number}.{linear}": block.get_submodule(linear)
        for number, block in enumerate(surgery.base_blocks(model))
        for linear in family.linears
    }


@torch.no_grad()
def draw_prompts(model: PreTrainedModel, seed: int) -> torch.Tensor:
    """Prompts that a model writes by itself from one random token each, [prompts, tokens]."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.config.vocab_size, (_PROMPTS, 1), generator=generator)
    while tokens.shape[1] < _PROMPT_TOKENS:
        logits = model(input_ids=tokens.to(model.device), use_cache=False).logits[:, -1]
        chances = torch.softmax(logits.to("cpu", torch.float64), dim=-1)
        tokens = torch.cat([tokens, torch.multinomial(chances, 1, generator=generator)], dim=1)
    return tokens


def digest_prompts(prompts: torch.Tensor) -> str:
    """SHA-256 (hex) of prompts: their tokens, row after row, as little-endian 32-bit numbers."""
    return hashlib.sha256(prompts.to(torch.int32).numpy().astype("<i4").tobytes()).hexdigest()


@torch.no_grad()
def measure_outputs(model: PreTrainedModel, prompts: torch.Tensor | None) -> dict[str, float]:
    """The mean absolute output of each linear module at the last token; nothing without prompts."""
    found: dict[str, float] = {}
    if prompts is None:
        return found

    def note(name: str) -> object:
        def hook(_module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
            found[name] = float(output[:, -1].abs().mean(dtype=torch.float64))

        return hook

    handles = [
        module.register_forward_hook(note(name))  # type: ignore[arg-type]
        for name, module in linear_modules(model).items()
    ]
    device = model.device
    try:
        # As the loop computes: a trained module is in full precision, the rest may be in half.
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            model(input_ids=prompts.to(device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


_Changes = dict[str, torch.Tensor]


def _train_modules(
    donor: Donor, plan: Plan, prompts: torch.Tensor | None
) -> tuple[_Changes, dict[str, float], dict[str, canonical.Json]]:
    """Changes by training, outputs with them, and the report; the base is then as it was."""
    places = _parameters_of(linear_modules(donor.model))
    with learning_in_place(donor.model, places, plan.loop) as (parameters, originals):
        report = train_in_place(donor, plan, parameters)
        after = measure_outputs(donor.model, prompts)
        changes = {
            target: value.detach().float() - originals[target].float()
            for target, value in parameters.items()
        }
    return changes, after, report


def _compare_modules(
    donor: Donor, prompts: torch.Tensor | None
) -> tuple[_Changes, dict[str, float]]:
    """Changes from the base to the donor's tuned model, and outputs with them."""
    if surgery.describe_model(donor.tuned.config) != surgery.describe_model(donor.model.config):
        raise RejectedError("AG-RCP-010", "the tuned model is of another shape")
    after = measure_outputs(donor.tuned, prompts)
    theirs = _parameters_of(linear_modules(donor.tuned))
    changes = {
        target: theirs[target][0].get_parameter(name).detach().float()
        - module.get_parameter(name).detach().float()
        for target, (module, name) in _parameters_of(linear_modules(donor.model)).items()
    }
    return changes, after


def _score(
    ranking: str,
    names: list[str],
    outputs: Mapping[str, float],
    changes: Mapping[str, torch.Tensor],
) -> dict[str, float]:
    if ranking == "random":
        return dict.fromkeys(names, 0.0)
    if ranking == "change":
        return {name: float(changes[f"{name}.weight"].norm()) for name in names}
    return {name: outputs[name] for name in names}


def _order(ranking: str, scores: Mapping[str, float], seed: int) -> list[str]:
    names = list(scores)
    if ranking == "random":
        shuffled = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
        return [names[number] for number in shuffled.tolist()]
    return sorted(names, key=lambda name: scores[name], reverse=ranking != "bottom")


def _parameters_of(modules: Mapping[str, nn.Module]) -> dict[str, tuple[nn.Module, str]]:
    """Weight and, where there is one, bias of modules: module and parameter name by target."""
    return {
        f"{name}.{parameter}": (module, parameter)
        for name, module in modules.items()
        for parameter in ("weight", "bias")
        if getattr(module, parameter, None) is not None
    }


def _facts_of(attachment: Attachment) -> ModuleGraftFacts:
    assert isinstance(attachment.facts, ModuleGraftFacts)
    return attachment.facts


def _targets(facts: ModuleGraftFacts, model: PreTrainedModel) -> dict[str, tuple[nn.Module, str]]:
    modules = linear_modules(model)
    if not modules.keys() >= set(facts.modules):
        raise RejectedError("AG-RCP-002", "the graft names modules that its family lacks")
    return _parameters_of({name: modules[name] for name in facts.modules})


def _places(attachment: Attachment, model: PreTrainedModel) -> list[Place]:
    if not 0.0 <= attachment.dose <= 1.0:
        raise RejectedError("AG-RCP-021", "a dose lies between 0 and 1")
    return [
        (module, name, Dense(attachment.tensors[target], attachment.dose))
        for target, (module, name) in _targets(_facts_of(attachment), model).items()
    ]
