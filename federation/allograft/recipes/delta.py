# SPDX-License-Identifier: Apache-2.0
"""The delta: what fine-tuning changed in a base, as quantised low-rank changes of its matrices.

The donor trains matrices of the base itself, or brings a snapshot that was trained elsewhere. What
changed is cut into singular directions, the best of them for a byte budget are quantised, and the
base is put back bit for bit. A recipient adds the directions to its own matrices at a dose. A delta
against a later snapshot than the public base, the *anchor*, is a skill: it is added to whatever a
recipient made of its own base at that stage. See protos/spec/recipes.md.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn
from transformers import PreTrainedModel

from allograft.crypto import canonical
from allograft.durable import durable_write
from allograft.errors import RejectedError
from allograft.packet.delta import EMBEDDING, HEAD, DeltaLayout, group_matrices
from allograft.provenance.lineage import digest_weights
from allograft.recipes import blocks as surgery, factors
from allograft.recipes.attachment import DTYPES, is_finite, read_tensors
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
from allograft.recipes.facts import BASE_STAGE, DeltaFacts, check_statement
from allograft.recipes.loop import SNAPSHOT, train
from allograft.recipes.patch import Dense, PatchHandle, Place, has_attachments, unpatch
from allograft.recipes.plan import DeltaPlan, LoopPlan
from allograft.recipes.snapshot import load_model

PAYLOAD = "delta.safetensors"

#: Most bytes of a tensor's entry in the header, beside its name; see packet.md, "Tensors".
_ENTRY_BYTES = 88

_INTEGERS = {"I8": torch.int8, "U8": torch.uint8}


@dataclass(frozen=True, slots=True, eq=False)
class PackedChange:
    """scale · the sum of the packed directions of one matrix, which stay packed.

    While a matrix is written, block of rows by block of rows from its first, the right factor is
    held as floats, and of the left one the part for one block. Afterwards an attachment takes the
    space of its payload again.
    """

    packed: Mapping[str, torch.Tensor]
    shape: tuple[int, ...]
    scale: float
    _held: list[torch.Tensor] = field(default_factory=list, init=False, repr=False)

    def add_to(self, rows: torch.Tensor, original: torch.Tensor, first: int) -> None:
        """See `patch.Change`."""
        del original
        count, last = self.shape[0], first + len(rows)
        if first == 0:
            self._held.clear()  # of a write that failed in the middle
        right = self._held.pop() if self._held else factors.unpack_right(self.packed, *self.shape)
        right = right.to(rows.device)
        left = factors.unpack_left(self.packed, first, last)
        rows.addmm_(left.T.to(rows.device), right, alpha=self.scale)
        if last < count:
            self._held.append(right)


class DeltaRecipe:
    """Makes, fits, applies and removes deltas."""

    kind = "delta"
    read_facts = staticmethod(DeltaFacts.from_json)

    def extract(self, donor: Donor, plan: Plan) -> Extract:
        """Train matrices of the base in place, write what changed, and put them back.

        Raises:
            RejectedError: AG-RCP-022 if the model already carries attachments, AG-RCP-035 for a bad
                plan or for a tuned snapshot, which `extract_difference` takes with the anchor that
                its facts name; and those of `train`.
        """
        recipe = _check_plan(plan.recipe)
        if donor.tuned is not None:
            raise RejectedError("AG-RCP-035", "a delta of two snapshots is not trained")
        if has_attachments(donor.model):
            raise RejectedError("AG-RCP-022", "a delta is trained on the plain base")
        shape = surgery.describe_model(donor.model.config)
        places = _chosen_places(donor.model, recipe)
        with learning_in_place(donor.model, places, plan.loop) as (parameters, originals):
            report = train_in_place(donor, plan, parameters)
            changes = {
                target: (value.detach() - originals[target].float()).to("cpu")
                for target, value in parameters.items()
            }
        dtype = str(next(donor.model.parameters()).dtype).removeprefix("torch.")
        origin = _Origin(shape, dtype, device=str(donor.model.device))
        made = _write_delta(changes, recipe, origin, donor.workdir)
        (donor.workdir / SNAPSHOT).unlink(missing_ok=True)
        return replace(made, report={**report, **made.report})

    def check(self, statement: Declaration, model_card: ModelCard) -> Verdict:
        """Accept deltas made on this base or on a relative of it."""
        return check_statement(statement, model_card)

    def fit(self, payload: Payload, recipient: Recipient) -> Attachment:
        """Read a delta strictly against the recipient's own tensors.

        Raises:
            RejectedError: AG-RCP-002, AG-RCP-010 or AG-PKT-028 if the facts do not fit, AG-RCP-003
                or AG-PKT-027 if the tensors do not.
        """
        facts = DeltaFacts.from_json(dict(payload.facts))
        if surgery.base_shape(recipient.model) != facts.shape:
            raise RejectedError("AG-RCP-010", "the delta was made on a model of another shape")
        expected = facts.layout.tensors(_shapes(delta_places(recipient.model)))
        whole = {name: each.integers for name, each in expected.items() if each.integers}
        tensors = read_tensors(
            payload.directory / PAYLOAD,
            {name: each.shape for name, each in expected.items()},
            DTYPES[facts.dtype],
            {name: _INTEGERS[form.dtype] for name, form in whole.items()},
        )
        for name, value in tensors.items():
            if form := whole.get(name):
                form.check(value.contiguous().view(torch.uint8).numpy().tobytes())
            elif name.endswith(".scale") and bool((value < 0).any()):
                # The sign belongs to the numbers; a second place for it could hold anything.
                raise RejectedError("AG-RCP-003", f"tensor {name} holds a negative scale")
        return Attachment(self.kind, payload.packet_id, facts, tensors)

    def attach(self, attachment: Attachment, model: PreTrainedModel) -> PatchHandle:
        """Add a delta to the base's own tensors at its dose.

        Raises:
            RejectedError: AG-RCP-010 for another model, AG-RCP-021 for a bad dose, AG-RCP-023 if
                it is already attached.
        """
        if surgery.base_shape(model) != attachment.facts.shape:
            raise RejectedError("AG-RCP-010", "the delta was made on a model of another shape")
        return PatchHandle(attachment, model, _places)

    def detach(self, handle: PatchHandle) -> None:
        """Take a delta out of the weights.

        Raises:
            RejectedError: AG-RCP-023 if it is not attached.
        """
        unpatch(handle.model, handle.attachment.attachment_id)


def extract_difference(
    anchor: Path, tuned: Path, plan: DeltaPlan, workdir: Path, base_digest: str, stage: str
) -> Extract:
    """Make a delta from two local snapshots of one architecture, without training.

    Args:
        anchor: The directory of the model that the change starts from.
        tuned: The directory of the model with the change in it.
        plan: What travels; the report says how much of the change lies elsewhere.
        workdir: Receives the payload.
        base_digest: The weights digest that the statement will name as its base.
        stage: `base`, or what the anchor has been through, such as `post-sft`: then it is a skill.

    Raises:
        RejectedError: AG-RCP-012 if the anchor is not the declared base, AG-RCP-010 for models of
            two shapes, AG-RCP-032 if a directory is unusable, AG-RCP-035 for a bad plan or if
            nothing changed.
    """
    _check_plan(plan)
    digest = digest_weights(anchor)
    if digest != base_digest:
        raise RejectedError("AG-RCP-012", "the anchor is not the base that the packet will name")
    before, after = load_model(anchor), load_model(tuned)
    shape = surgery.describe_model(before.config)
    if surgery.describe_model(after.config) != shape:
        raise RejectedError("AG-RCP-010", "the two snapshots differ in their shape")
    others = dict(after.named_parameters())
    whole = sum(_squared(others[n] - value) for n, value in before.named_parameters())
    tuned_places = _chosen_places(after, plan)
    with torch.no_grad():
        changes = {
            target: tuned_places[target][0].get_parameter(name) - module.get_parameter(name)
            for target, (module, name) in _chosen_places(before, plan).items()
        }
    origin = _Origin(shape, "float32", digest, stage)
    carried = sum(_squared(change) for change in changes.values())
    made = _write_delta(changes, plan, origin, workdir)
    return replace(made, report={**made.report, "energy_in_reach": carried / whole})


def delta_places(model: PreTrainedModel) -> dict[str, tuple[nn.Module, str]]:
    """Everything that a delta may change: module and parameter name by target, blocks in order.

    A head that is the embedding itself is no target of its own: it changes with the embedding.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    found: dict[str, tuple[nn.Module, str]] = {EMBEDDING: (embedding, "weight")}
    if head is not None and head.weight is not embedding.weight:
        found[HEAD] = (head, "weight")
    for number, block in enumerate(surgery.base_blocks(model)):
        for path, _ in block.named_parameters():
            module, _, name = path.rpartition(".")
            found[f"blocks.{number}.{path}"] = (block.get_submodule(module), name)
    return found


def packed_directions(attachment: Attachment) -> dict[str, dict[str, torch.Tensor]]:
    """The packed directions of each matrix of a delta, by target."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in attachment.tensors.items():
        target, _, ending = name.rpartition(".")
        if ending != "change":
            found.setdefault(target, {})[ending] = value
    return found


def draw_noise(
    attachment: Attachment, model: PreTrainedModel, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Random directions for every matrix of a delta, of the norm that its change has there."""
    shapes = _shapes(delta_places(model))
    return {
        f"{target}.{ending}": value
        for target, packed in sorted(packed_directions(attachment).items())
        for ending, value in factors.draw_noise(packed, generator, *shapes[target]).items()
    }


def turn_directions(
    attachment: Attachment, model: PreTrainedModel, draw: Callable[[int], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The directions of every matrix of a delta, turned on the side of the model's width.

    Args:
        attachment: A delta.
        model: What it fits.
        draw: Makes a rotation of so many dimensions.
    """
    shapes, turned = _shapes(delta_places(model)), {}
    for target, packed in sorted(packed_directions(attachment).items()):
        rows, columns = shapes[target]
        # The rows of an embedding or a head are tokens, far too many for a rotation of them.
        tokens = target in {EMBEDDING, HEAD}
        rotation = draw(columns if tokens else rows)
        for ending, value in factors.turn(packed, rows, columns, rotation, right=tokens).items():
            turned[f"{target}.{ending}"] = value
    return turned


@dataclass(frozen=True, slots=True)
class _Origin:
    """What a change was made on."""

    shape: ModelShape
    dtype: str
    anchor: str = ""
    stage: str = BASE_STAGE
    device: str = "cpu"  # where its changes are decomposed


def _check_plan(plan: object) -> DeltaPlan:
    if not isinstance(plan, DeltaPlan):
        raise RejectedError("AG-RCP-035", "a delta needs a delta plan")
    plan.check()
    return plan


def _shapes(places: Mapping[str, tuple[nn.Module, str]]) -> dict[str, tuple[int, ...]]:
    return {t: tuple(module.get_parameter(name).shape) for t, (module, name) in places.items()}


def _chosen_places(model: PreTrainedModel, plan: DeltaPlan) -> dict[str, tuple[nn.Module, str]]:
    """The places that a plan lets learn."""
    places = delta_places(model)
    return {
        target: places[target]
        for target, shape in _shapes(places).items()
        if (plan.embeddings if target in {EMBEDDING, HEAD} else len(shape) == 2 or plan.vectors)
    }


def _places(attachment: Attachment, model: PreTrainedModel) -> list[Place]:
    if not 0.0 <= attachment.dose <= 1.0:
        raise RejectedError("AG-RCP-021", "a dose lies between 0 and 1")
    places = delta_places(model)
    shapes = _shapes(places)
    found: list[Place] = [
        (*places[target], PackedChange(packed, shapes[target], attachment.dose))
        for target, packed in packed_directions(attachment).items()
    ]
    for name, value in attachment.tensors.items():
        target, _, ending = name.rpartition(".")
        if ending == "change":
            found.append((*places[target], Dense(value, attachment.dose)))
    return found


@contextlib.contextmanager
def learning_in_place(
    model: PreTrainedModel, places: Mapping[str, tuple[nn.Module, str]], plan: LoopPlan
) -> Iterator[tuple[dict[str, nn.Parameter], dict[str, torch.Tensor]]]:
    """The base with copies of some tensors in it, which alone can learn; the base afterwards.

    Yields:
        The parameters, and the base's own tensors, which nothing writes to.
    """
    learning = [(value, value.requires_grad) for value in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    parameters = {t: module.get_parameter(name) for t, (module, name) in places.items()}
    originals = {target: value.data for target, value in parameters.items()}
    for value, _ in learning:
        value.requires_grad_(False)
    for value in parameters.values():
        # Master weights in full precision: bfloat16 would round most updates away.
        value.data = value.data.to(torch.float32, copy=True)
        value.requires_grad_(True)
    model.eval()
    try:
        with surgery.checkpointed(model, plan.checkpointing):
            yield parameters, originals
    finally:
        for target, value in parameters.items():
            value.grad = None
            value.data = originals[target]
        for value, flag in learning:
            value.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


def train_in_place(
    donor: Donor, plan: Plan, parameters: Mapping[str, nn.Parameter]
) -> dict[str, canonical.Json]:
    """Train parameters of the base itself; returns figures for the extract's report."""

    def forward(_numbers: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = donor.model(input_ids=tokens, use_cache=False).logits
        return logits

    training = train(
        forward,
        parameters,
        donor.windows,
        # Decay pulls a weight towards zero, and these are the base's: it would add a change of full
        # rank that no text asked for.
        replace(plan.loop, weight_decay=0.0),
        private=plan.private,
        model=donor.model,
        private_way=donor.private_way,
        snapshot=donor.workdir / SNAPSHOT,
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


def _write_delta(
    changes: dict[str, torch.Tensor], plan: DeltaPlan, origin: _Origin, workdir: Path
) -> Extract:
    """Cut, quantise and write changes, which are used up; figures are those of the result."""
    dtype = DTYPES[origin.dtype]
    if not all(is_finite(change) for change in changes.values()):
        raise RejectedError("AG-RCP-033", "a change is not finite")
    shapes = {target: tuple(change.shape) for target, change in changes.items()}
    tensors = {
        f"{target}.change": change.to(dtype)
        for target, change in changes.items()
        if change.ndim == 1
    }
    directions = {
        target: factors.decompose(change.to(origin.device))
        for target, change in changes.items()
        if change.ndim == 2
    }
    budget = 0
    if plan.budget_bytes:
        endings = ("int8", "scale") if plan.bits == 8 else ("int8", "int4", "scale")
        names = [*tensors, *(f"{target}.{end}" for target in directions for end in endings)]
        spent = sum(value.numel() * value.element_size() for value in tensors.values())
        spent += sum(len(name) + _ENTRY_BYTES for name in names)
        budget = max(1, plan.budget_bytes - spent)
    chosen = factors.allocate(directions, plan.bits, budget, plan.energy)
    if not any(sum(ranks) for ranks in chosen.values()):
        raise RejectedError("AG-RCP-035", "nothing changed, or the budget holds no direction")
    total = error = 0.0
    for target, ranks in chosen.items():
        change = changes.pop(target)
        packed = factors.pack(directions.pop(target), ranks)
        total += _squared(change)
        if packed:
            packed["scale"] = packed["scale"].to(dtype)
            left, right = factors.unpack(packed, *change.shape)
            change.addmm_(left.T, right, alpha=-1.0)
        error += _squared(change)
        tensors |= {f"{target}.{ending}": value for ending, value in packed.items()}
    by_module = {
        name: tuple(chosen[target] for target in targets)
        for name, targets in group_matrices(shapes).items()
    }
    layout = DeltaLayout(by_module, plan.vectors)
    facts = DeltaFacts(origin.shape, layout, origin.dtype, origin.anchor, origin.stage)
    path = workdir / PAYLOAD
    durable_write(path, save({name: value.contiguous() for name, value in tensors.items()}))
    report: dict[str, canonical.Json] = {
        "directions": sum(sum(pair) for pair in chosen.values()),
        "wide_directions": sum(wide for wide, _ in chosen.values()),
        "energy_kept": 1.0 - error / total,
        "payload_bytes": path.stat().st_size,
    }
    return Extract(DeltaRecipe.kind, (path,), facts, report)


def _squared(value: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(value.detach(), dtype=torch.float64)) ** 2
