# SPDX-License-Identifier: Apache-2.0
"""One function per method: what is put on a recipient, and how it is measured.

Invariant: a recipe's change is measured between `attach` and `detach`, and the removal is proved
by state digest and logits each time; every other change is made to a copy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from allograft.crypto import canonical
from allograft.errors import RejectedError
from allograft.evaluate.bootstrap import Losses
from allograft.evaluate.loss import measure_tokens
from allograft.evaluate.transfer.bench import Bench, Packet
from allograft.evaluate.transfer.cell import HELD_OUT, Cell, Measured, Point, Role
from allograft.evaluate.transfer.footprint import Footprint, footprint
from allograft.evaluate.transfer.ngram import NgramModel, mix
from allograft.evaluate.transfer.plan import Arm
from allograft.evaluate.transfer.world import BASE
from allograft.evaluate.trial import attached, seal_state
from allograft.provenance.lineage import compare_bases
from allograft.recipes import blocks as surgery
from allograft.recipes.base import (
    DOSES,
    Attachment,
    Declaration,
    ModelCard,
    Payload,
    Recipient,
    Verdict,
    load_recipe,
)
from allograft.recipes.controls import null_packet, rotated_packet
from allograft.recipes.facts import ModuleGraftFacts, OrganFacts
from allograft.recipes.graft import keep_first
from allograft.recipes.loop import train

NGRAM_ORDER = 5
_NGRAM_WEIGHTS = (0.1, 0.25, 0.5, 0.75, 0.9)
_MODULE_SHARES = (0.125, 0.25, 0.5)
# A bias is added to logits of the order of ten, and AdamW moves it by the rate per step.
_BIAS_RATE = 0.05


@dataclass(frozen=True, slots=True)
class Task:
    """One cell to fill.

    Attributes:
        method: Key of `METHODS`.
        name: The arm's name in tables.
        role: What it is there for.
        recipient: Name of a model.
        seed: Of training and noise.
        arm: The recipe, for methods that have one.
        rate: Peak learning rate, for methods that train.
        text: What is trained on: `domain`, `general` or `wrong`.
    """

    method: str
    name: str
    role: Role
    recipient: str = BASE
    seed: int = 0
    arm: Arm | None = None
    rate: float = 0.0
    text: str = "domain"

    def to_json(self) -> dict[str, canonical.Json]:
        """All of it, for the cell's key."""
        fields: dict[str, canonical.Json] = {
            "method": self.method,
            "name": self.name,
            "role": str(self.role),
            "recipient": self.recipient,
            "seed": self.seed,
            "rate": self.rate,
            "text": self.text,
        }
        if self.arm is not None:
            fields |= {"kind": self.arm.kind, "plan": self.arm.plan.to_json()}
        return fields


def run_task(bench: Bench, task: Task) -> Cell:
    """Fill one cell."""
    return METHODS[task.method](bench, task)


def _cell(
    task: Task,
    points: Sequence[Point],
    payload_bytes: int = 0,
    cost: Footprint | Packet | None = None,
) -> Cell:
    """A filled cell; `cost` is that of the training behind it."""
    cost = cost or Footprint()
    return Cell(
        arm=task.name,
        role=task.role,
        recipient=task.recipient,
        seed=task.seed,
        points=tuple(points),
        rate=task.rate,
        payload_bytes=payload_bytes,
        seconds=cost.seconds,
        peak_bytes=cost.peak_bytes,
    )


def _zero_shot(bench: Bench, task: Task) -> Cell:
    measured = bench.held(task.recipient).measure(bench.model(task.recipient))
    return _cell(task, [Point(0.0, "as it is", measured)])


def _recipe(bench: Bench, task: Task) -> Cell:
    """A packet on a recipient: its own verdict first, then every dose, refused or not."""
    packet = _packet(bench, task)
    model = bench.model(task.recipient)
    verdict = _ask(bench, task, packet, model)
    points: list[Point] = []
    # What the recipe refuses is forced where the tensors fit, so that the table shows what the
    # refusal was worth.
    try:
        points = _measure_doses(bench, task, _fit(bench, task, packet, model), model)
    except RejectedError as error:
        if verdict.level != "refuse" or error.code == "AG-EVA-003":
            raise
    cell = _cell(task, points, packet.payload_bytes, packet)
    return replace(cell, verdict=verdict.level, code=verdict.code, reason=verdict.reason)


def _null(bench: Bench, task: Task) -> Cell:
    """Noise of the packet's own norm, drawn anew for each seed."""
    packet, model = _packet(bench, task), bench.model(task.recipient)
    noise = null_packet(_fit(bench, task, packet, model), model, seed=1000 + task.seed)
    return _cell(task, _measure_doses(bench, task, noise, model), packet.payload_bytes, packet)


def _rotated(bench: Bench, task: Task) -> Cell:
    """The packet's change, turned by random rotations."""
    packet, model = _packet(bench, task), bench.model(task.recipient)
    turned = rotated_packet(_fit(bench, task, packet, model), model, seed=2000 + task.seed)
    return _cell(task, _measure_doses(bench, task, turned, model), packet.payload_bytes, packet)


def _modules(bench: Bench, task: Task) -> Cell:
    """Parts of a module graft at full dose: the first modules of its ranking, or any."""
    packet, model = _packet(bench, task), bench.model(task.recipient)
    graft = _fit(bench, task, packet, model)
    facts = graft.facts
    assert isinstance(facts, ModuleGraftFacts)
    if task.method == "random modules":
        generator = torch.Generator().manual_seed(task.seed)
        order = torch.randperm(len(facts.modules), generator=generator).tolist()
        drawn = tuple(facts.modules[number] for number in order)
        graft = replace(graft, facts=replace(facts, modules=drawn, ranking="random"))
    points: list[Point] = []
    for share in _MODULE_SHARES:
        count = max(1, round(share * len(facts.modules)))
        fewer, label = keep_first(graft, count), f"{count} of {len(facts.modules)}"
        points += _measure_doses(bench, task, fewer, model, (1.0,), label)
    return _cell(task, points, packet.payload_bytes, packet)


def _untrained(bench: Bench, task: Task) -> Cell:
    """Copies of the base's own blocks where an organ would go."""
    packet, model = _packet(bench, task), bench.model(task.recipient)
    attachment = _fit(bench, task, packet, model)
    facts = attachment.facts
    assert isinstance(facts, OrganFacts)
    copies = surgery.copy_blocks(model, facts.source, facts.blocks)
    changed = replace(attachment, tensors=_block_tensors(copies))
    return _cell(task, _measure_doses(bench, task, changed, model), packet.payload_bytes, packet)


def _full(bench: Bench, task: Task) -> Cell:
    """Full fine-tuning of the recipient itself, with the budget of every other training."""
    model, windows = bench.model(task.recipient), bench.windows(task.recipient, task.text)
    with footprint(bench.lab.plan.device) as cost:
        train(
            _forward(model),
            dict(model.named_parameters()),
            windows,
            bench.loop(task.rate, task.seed),
        )
    measured = bench.held(task.recipient).measure(model)
    return _cell(
        task,
        [Point(1.0, "fine-tuned", measured)],
        sum(v.numel() * v.element_size() for v in model.parameters()),
        cost,
    )


def _bias(bench: Bench, task: Task) -> Cell:
    """One number per token, trained on the donor's base and added to the recipient's logits."""
    with footprint(bench.lab.plan.device) as cost:
        bias = train_bias(bench, task.seed)
    model, held = bench.model(task.recipient), bench.held(task.recipient)
    points = []
    for dose in DOSES:
        with biased(model, dose * bias):
            points.append(Point(dose, f"dose {dose:g}", held.measure(model)))
    return _cell(replace(task, rate=_BIAS_RATE), points, 2 * bias.numel(), cost)


def train_bias(bench: Bench, seed: int) -> torch.Tensor:
    """The bias that fits the donor's text best on top of the frozen base, [vocabulary]."""
    model = bench.model(BASE).requires_grad_(False)
    bias = nn.Parameter(torch.zeros(model.config.vocab_size, device=model.device))

    def forward(_numbers: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
        return logits + bias

    train(forward, {"bias": bias}, bench.windows(BASE, "domain"), bench.loop(_BIAS_RATE, seed))
    return bias.detach()


@contextlib.contextmanager
def biased(model: PreTrainedModel, bias: torch.Tensor) -> Iterator[None]:
    """Add a bias to a model's logits for a while."""
    head = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda _module, _inputs, logits: logits + bias)
    try:
        yield
    finally:
        hook.remove()


def _ngram(bench: Bench, task: Task) -> Cell:
    """Counts of the donor's text, mixed with the recipient token by token."""
    tokenizer, model = bench.tokenizer(task.recipient), bench.model(task.recipient)
    texts = bench.training_texts("domain")
    with footprint("cpu") as cost:
        documents = [tokenizer.encode(text, verbose=False) for text in texts]
        table = NgramModel(documents, NGRAM_ORDER, model.config.vocab_size)
    held = bench.held(task.recipient)
    mixed: dict[float, dict[str, Losses]] = {weight: {} for weight in _NGRAM_WEIGHTS}
    for name in HELD_OUT:
        prepared = held.documents[name]
        own = measure_tokens(model, prepared)
        other = [
            table.probabilities(tokenizer.encode(text, verbose=False))
            for text in bench.held_texts(name)
        ]
        for weight, found in mixed.items():
            sums = [
                float(mix(nats, chances, weight).sum())
                for nats, chances in zip(own, other, strict=True)
            ]
            found[name] = Losses(
                np.array(sums), np.array(prepared.tokens), np.array(prepared.text_bytes)
            )
    points = [
        Point(weight, f"weight {weight:g}", Measured(**found, correct=()))
        for weight, found in mixed.items()
    ]
    return _cell(task, points, sum(len(text.encode()) for text in texts), cost)


def _wrapper(bench: Bench, task: Task) -> Cell:
    """Blocks trained alone between frozen embedding and head, then inserted; no recovery.

    The protocol of Neural Organ Transplantation (arXiv 2601.13580) as far as it is known: a third
    of the way up, inserted at every position, with the base otherwise as it was.
    """
    model = bench.model(BASE)
    layers = surgery.base_shape(model).layers
    blocks = max(1, layers // 3)
    source = min(blocks, layers - blocks)
    organ = surgery.copy_blocks(model, source, blocks)
    types = (surgery.layer_types(model) or [])[source : source + blocks]
    model.requires_grad_(False)
    parameters: dict[str, nn.Parameter] = {}
    for number, block in enumerate(organ):
        block.requires_grad_(True)
        parameters |= {f"{number}.{name}": value for name, value in block.named_parameters()}
    with footprint(bench.lab.plan.device) as cost, surgery.only_blocks(model, organ, types):
        train(
            _forward(model), parameters, bench.windows(BASE, "domain"),
            bench.loop(task.rate, task.seed),
        )  # fmt: skip
    shape = surgery.base_shape(model)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    facts = OrganFacts(shape, blocks, source, 0, tuple(types), dtype)
    tensors = _block_tensors(organ)
    attachment = Attachment("organ", "wrapper", facts, tensors)
    points = []
    for position in range(layers + 1):
        moved = replace(attachment, facts=replace(facts, position=position))
        points += _measure_doses(bench, task, moved, model, (1.0,), f"position {position}")
    return _cell(task, points, sum(v.numel() * v.element_size() for v in tensors.values()), cost)


#: How each method fills a cell.
METHODS: Mapping[str, Callable[[Bench, Task], Cell]] = {
    "zero-shot": _zero_shot,
    "recipe": _recipe,
    "null": _null,
    "rotated": _rotated,
    "first modules": _modules,
    "random modules": _modules,
    "untrained": _untrained,
    "full": _full,
    "bias": _bias,
    "ngram": _ngram,
    "wrapper": _wrapper,
}


def _packet(bench: Bench, task: Task) -> Packet:
    assert task.arm is not None
    return bench.packet(task.arm, task.rate, task.seed, task.text)


def _fit(bench: Bench, task: Task, packet: Packet, model: PreTrainedModel) -> Attachment:
    assert task.arm is not None
    base = bench.describe(BASE).weights_digest
    payload = Payload(task.arm.kind, packet.directory.name, packet.directory, packet.facts, base)
    # Every recipient has the donor's base at hand, as an expert that is a change of it needs.
    bases = {base: bench.lab.models[BASE]}
    return load_recipe(task.arm.kind).fit(payload, Recipient(model, task.seed, bases=bases))


def _ask(bench: Bench, task: Task, packet: Packet, model: PreTrainedModel) -> Verdict:
    """The recipe's own verdict on this recipient."""
    assert task.arm is not None
    theirs, ours = bench.describe(BASE), bench.describe(task.recipient)
    statement = Declaration(
        task.arm.kind, theirs.weights_digest, theirs.tokenizer_digest, packet.facts
    )
    card = ModelCard(
        ours.weights_digest,
        ours.tokenizer_digest,
        surgery.describe_model(model.config),
        compare_bases(ours, theirs).cosine,
    )
    return load_recipe(task.arm.kind).check(statement, card)


def _measure_doses(
    bench: Bench,
    task: Task,
    attachment: Attachment,
    model: PreTrainedModel,
    doses: Sequence[float] = (),
    label: str = "",
) -> list[Point]:
    recipe, held = load_recipe(attachment.kind), bench.held(task.recipient)
    seal = seal_state(model, held.documents["validation"])
    points = []
    for dose in doses or attachment.doses:
        with attached(recipe, replace(attachment, dose=dose), model, seal):
            points.append(Point(dose, label or f"dose {dose:g}", held.measure(model)))
    return points


def _block_tensors(blocks: Sequence[nn.Module]) -> dict[str, torch.Tensor]:
    """Blocks as an organ's tensors."""
    return {
        f"blocks.{number}.{name}": value.detach().to("cpu", copy=True)
        for number, block in enumerate(blocks)
        for name, value in block.state_dict().items()
    }


def _forward(model: PreTrainedModel) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    def forward(_numbers: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
        return logits

    return forward
