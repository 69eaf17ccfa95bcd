# SPDX-License-Identifier: Apache-2.0
"""The stitched organ (experimental) between strangers, beside what it must beat.

Three models of one shape and tokenizer learn general text from different beginnings: a donor and
two recipients. The donor trains an organ behind its last block on medical text; each recipient
wears it through the rotation that public text gives. Beside it: the same through a random rotation,
an untrained block through the true one, and a bias on the logits that the donor trained on the same
text (one number per word of the vocabulary). Gains are in percent of the organ's gain on the
donor's own base, with a standard error over windows. They are printed whatever they are.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from allograft.recipes import blocks
from allograft.recipes.base import (
    Attachment,
    Donor,
    Payload,
    Plan,
    Recipient,
    load_recipe,
)
from allograft.recipes.documents import drop_near_duplicates, read_documents, split_documents
from allograft.recipes.facts import StitchedFacts
from allograft.recipes.loop import train
from allograft.recipes.losses import token_losses
from allograft.recipes.plan import LoopPlan, OrganPlan
from allograft.recipes.snapshot import load_tokenizer
from allograft.recipes.stitched import (
    LARGEST_DOSE,
    StitchedRecipe,
    StitchMaps,
    record_hidden,
    wear,
)
from allograft.recipes.windows import Windows, make_windows
from benchmarks.report import Figure, parse_options, publish

_SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
_TOKENIZER = _SHARED / "models/stories260K/hf"
_DOMAIN = _SHARED / "medical/medquad.jsonl.gz"
_GENERAL = _SHARED / "general/wikitext2"
_LENGTH = 96
_DOCUMENTS = 3000
_DOSES = (LARGEST_DOSE / 2, LARGEST_DOSE)


@dataclass(frozen=True, slots=True)
class Setting:
    """Sizes of one run."""

    width: int
    layers: int
    base_steps: int
    organ_steps: int
    windows: int  # of each kind of training text
    scored: int  # held-out windows of each kind


@dataclass(frozen=True, slots=True)
class Texts:
    """Windows to train on and to score, of the domain and in general, and the public probe."""

    domain: Windows
    domain_kept: Windows
    general: Windows
    general_kept: Windows
    probe: Windows


def read_texts(setting: Setting) -> Texts:
    """Cut the real texts; near-duplicates are removed before they are split."""
    tokenizer = load_tokenizer(_TOKENIZER)

    def cut(paths: Sequence[Path]) -> tuple[Windows, Windows]:
        found = [document for path in paths for document in read_documents(path)]
        documents = drop_near_duplicates(found)[:_DOCUMENTS]
        parts = split_documents(documents, 0.1)
        train_part, kept = (make_windows(part, tokenizer, _LENGTH) for part in parts)
        return _some(train_part, setting.windows), _some(kept, setting.scored)

    domain, domain_kept = cut([_DOMAIN])
    general, general_kept = cut(sorted(_GENERAL.glob("*.txt")))
    probe = general.choose(torch.arange(min(len(general), 256)))
    return Texts(domain, domain_kept, general, general_kept, probe)


def _some(windows: Windows, count: int) -> Windows:
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    return windows.choose(order[:count].sort().values)


def make_base(setting: Setting, text: Windows, seed: int) -> PreTrainedModel:
    """A model that learnt general text from a beginning of its own."""
    torch.manual_seed(seed)
    model: PreTrainedModel = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=setting.width,
            intermediate_size=3 * setting.width,
            num_hidden_layers=setting.layers,
            num_attention_heads=4,
            max_position_embeddings=_LENGTH,
            tie_word_embeddings=True,
        )
    ).eval()

    def forward(_numbers: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
        return logits

    plan = LoopPlan(steps=setting.base_steps, batch_windows=16, learning_rate=3e-3, seed=seed)
    train(forward, dict(model.named_parameters()), text, plan)
    model.zero_grad(set_to_none=True)
    return model


@torch.no_grad()
def score(model: PreTrainedModel, text: Windows, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Nats per token of each window."""
    losses = []
    for numbers in torch.split(torch.arange(len(text)), 16):
        tokens, lengths = text.tokens[numbers], text.lengths[numbers]
        logits = model(input_ids=tokens, use_cache=False).logits
        if bias is not None:
            logits = logits + bias
        losses.append(token_losses(logits, tokens, lengths).view(len(numbers), -1).sum(1))
    return torch.cat(losses) / (text.lengths - 1)


def train_bias(model: PreTrainedModel, text: Windows, steps: int) -> torch.Tensor:
    """One number per word, added to the logits: what the donor could send in two kilobytes."""
    bias = torch.nn.Parameter(torch.zeros(int(model.config.vocab_size)))

    def forward(_numbers: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
        return logits + bias

    train(forward, {"bias": bias}, text, LoopPlan(steps=steps, learning_rate=3e-2))
    return bias.detach()


def untrained(attachment: Attachment, model: PreTrainedModel) -> Attachment:
    """The same attachment with the recipient's own last block instead of the organ."""
    facts = attachment.facts
    assert isinstance(facts, StitchedFacts)
    tensors = dict(attachment.tensors)
    for number, block in enumerate(blocks.base_blocks(model)[-facts.organ.blocks :]):
        for name, value in block.named_parameters():
            tensors[f"blocks.{number}.{name}"] = value.detach().clone()
    return replace(attachment, tensors=tensors)


def rotated(attachment: Attachment, model: PreTrainedModel, text: Windows) -> Attachment:
    """The same organ through a rotation drawn by chance, of the true one's scale and means."""
    facts = attachment.facts
    assert isinstance(facts, StitchedFacts)
    width = facts.shape.hidden
    generator = torch.Generator().manual_seed(1)
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    scale = float(attachment.tensors["stitch.into"].norm()) / width**0.5
    into = scale * rotation
    mean = record_hidden(model, text).mean(0)
    shift = mean @ attachment.tensors["stitch.into"] + attachment.tensors["stitch.shift"]
    maps = StitchMaps(into, shift - mean @ into, rotation.T / scale, 0.0)
    organ = {n: v for n, v in attachment.tensors.items() if n.startswith("blocks.")}
    return wear(attachment.attachment_id, facts, organ, maps)


class _Table:
    """Collects differences as shares of the organ's gain at home."""

    def __init__(self, home: float) -> None:
        self.figures: list[Figure] = []
        self._home = home

    def add(self, name: str, before: torch.Tensor, after: torch.Tensor) -> None:
        gain = (before - after).double()
        error = float(gain.std()) / len(gain) ** 0.5
        share = 100.0 / self._home
        self.figures.append(Figure(f"{name}_gain", float(gain.mean()) * share, "%"))
        self.figures.append(Figure(f"{name}_error", error * share, "%"))


def measure(setting: Setting, tell: Callable[[str], None]) -> list[Figure]:
    """Everything, from the text up."""
    texts = read_texts(setting)
    tell(f"{len(texts.domain)} and {len(texts.general)} windows; training a donor")
    donor = make_base(setting, texts.general, 1)
    recipe = StitchedRecipe()
    with tempfile.TemporaryDirectory() as folder:
        loop = LoopPlan(steps=setting.organ_steps, learning_rate=5e-3)
        given = Donor(donor, texts.domain, Path(folder), probe=texts.probe)
        made = recipe.extract(given, Plan(OrganPlan(1), loop))
        payload = Payload("stitched", "a" * 32, Path(folder), made.facts.to_json())
        size = made.files[0].stat().st_size
        at_home = recipe.fit(payload, Recipient(donor, probe=texts.probe))
        facts = at_home.facts
        assert isinstance(facts, StitchedFacts)
        organ = {n: v for n, v in at_home.tensors.items() if n.startswith("blocks.")}
        whole = load_recipe("organ")
        before = score(donor, texts.domain_kept)
        handle = whole.attach(Attachment("organ", "b" * 32, facts.organ, organ), donor)
        home = float((before - score(donor, texts.domain_kept)).mean())
        whole.detach(handle)
        tell("training the donor's bias")
        bias = train_bias(donor, texts.domain, setting.organ_steps)
        table = _Table(home)
        table.add("bias_at_home", before, score(donor, texts.domain_kept, bias))
        head = [
            Figure("loss_before", float(before.mean()), "nats/token"),
            Figure("same_base_gain", home, "nats/token"),
            Figure("payload", size / 2**10, "KiB"),
            Figure("bias", 2 * len(bias) / 2**10, "KiB"),
        ]
        for number in (1, 2):
            tell(f"training recipient {number}")
            model = make_base(setting, texts.general, 1 + number)
            attachment = recipe.fit(payload, Recipient(model, probe=texts.probe))
            head.append(_alignment(number, attachment))
            _compare(table, f"r{number}", model, attachment, bias, texts)
    return head + table.figures


def _alignment(number: int, attachment: Attachment) -> Figure:
    return Figure(f"r{number}_alignment", float(str(attachment.report["alignment"])), "")


def _compare(
    table: _Table,
    name: str,
    model: PreTrainedModel,
    attachment: Attachment,
    bias: torch.Tensor,
    texts: Texts,
) -> None:
    recipe = StitchedRecipe()
    before, kept = score(model, texts.domain_kept), score(model, texts.general_kept)
    arms = {
        "stitched": attachment,
        "random_rotation": rotated(attachment, model, texts.probe),
        "untrained_block": untrained(attachment, model),
    }
    for arm, worn in arms.items():
        for dose in _DOSES:
            handle = recipe.attach(replace(worn, dose=dose), model)
            table.add(f"{name}_{arm}_{dose:g}", before, score(model, texts.domain_kept))
            if arm == "stitched":
                table.add(f"{name}_general_{dose:g}", kept, score(model, texts.general_kept))
            recipe.detach(handle)
    table.add(f"{name}_bias", before, score(model, texts.domain_kept, bias))
    table.add(f"{name}_general_bias", kept, score(model, texts.general_kept, bias))


def main() -> None:
    """Run and publish."""
    options = parse_options(str(__doc__))
    if options.quick:
        setting = Setting(64, 3, 120, 60, 2000, 96)
    else:
        setting = Setting(64, 4, 400, 150, 6000, 256)
    torch.set_num_threads(1)
    figures = measure(setting, lambda text: None if options.json else print(text, flush=True))
    publish("stitched", figures, options)


if __name__ == "__main__":
    main()
