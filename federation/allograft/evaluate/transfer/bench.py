# SPDX-License-Identifier: Apache-2.0
"""What every arm shares: models, held-out text, training text, packets made once."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from allograft.durable import durable_write
from allograft.evaluate.loss import Prepared, Scoring, measure, prepare
from allograft.evaluate.transfer.cell import HELD_OUT, Measured
from allograft.evaluate.transfer.footprint import footprint
from allograft.evaluate.transfer.plan import Arm, MatrixPlan
from allograft.evaluate.transfer.store import content_key
from allograft.evaluate.transfer.text import Texts
from allograft.evaluate.transfer.world import BASE
from allograft.provenance.lineage import describe_base
from allograft.provenance.statement import BaseModel
from allograft.recipes.base import Donor, Plan, load_recipe
from allograft.recipes.documents import Document
from allograft.recipes.plan import LoopPlan
from allograft.recipes.snapshot import load_model, load_tokenizer
from allograft.recipes.windows import Windows, make_windows

_MADE = "packet.json"


@dataclass(frozen=True, slots=True)
class Lab:
    """Everything a worker needs; it goes to other processes as a whole.

    Attributes:
        cache: Where models, packets and cells are kept.
        plan: What is run.
        texts: What is read.
        models: Directories by name; `base` is the donor's.
    """

    cache: Path
    plan: MatrixPlan
    texts: Texts
    models: Mapping[str, Path]


@dataclass(frozen=True, slots=True)
class Packet:
    """A donor's packet on disk, with what it cost."""

    directory: Path
    facts: dict[str, Any]
    payload_bytes: int
    seconds: float
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Held:
    """Held-out text, cut for one tokenizer.

    Attributes:
        documents: The sets of held-out documents by name.
        answers: Every question of the label task with every label; None without a task.
        right: Number of the right label of each question.
    """

    documents: Mapping[str, Prepared]
    answers: Prepared | None
    right: tuple[int, ...]

    def measure(self, model: Any) -> Measured:
        """What the model does as it is now."""
        losses = {name: measure(model, documents) for name, documents in self.documents.items()}
        return Measured(**losses, correct=self._answer(model))

    def _answer(self, model: Any) -> tuple[float, ...]:
        if self.answers is None:
            return ()
        # The whole text's loss: the question's own part is the same under every label.
        nats = measure(model, self.answers).nats.reshape(len(self.right), -1)
        return tuple((nats.argmin(axis=1) == np.array(self.right)).astype(float).tolist())


class Bench:
    """Loads, cuts and trains for the arms; keeps what several of them need."""

    def __init__(self, lab: Lab) -> None:
        logging.disable_progress_bar()
        torch.set_num_threads(lab.plan.threads)
        self.lab = lab
        self.size = lab.plan.size
        self.describe = functools.cache(self._describe)
        self.held = functools.cache(self._held)
        self.windows = functools.cache(self._windows)
        self.tokenizer = functools.cache(self._tokenizer)

    def model(self, name: str) -> PreTrainedModel:
        """A fresh copy of a model, which the caller may change."""
        return load_model(self.lab.models[name], self.lab.plan.device)

    def held_texts(self, name: str) -> tuple[str, ...]:
        """One of the sets of held-out documents."""
        found: tuple[str, ...] = getattr(self.lab.texts, name)
        return found

    def training_texts(self, text: str) -> tuple[str, ...]:
        """What is trained on: `domain`, `general` or `wrong`."""
        texts = self.lab.texts
        return {
            "domain": texts.training,
            "general": texts.general_training,
            "wrong": texts.wrong,
        }[text]

    def loop(self, rate: float, seed: int) -> LoopPlan:
        """The one budget of every training in the matrix."""
        return LoopPlan(
            steps=self.size.steps, batch_windows=self.size.batch, learning_rate=rate, seed=seed
        )

    def packet(self, arm: Arm, rate: float, seed: int, text: str) -> Packet:
        """Make a packet on the base, or find it made."""
        base = self.describe(BASE)
        key = content_key(
            {
                "kind": arm.kind,
                "plan": arm.plan.to_json(),
                "loop": asdict(self.loop(rate, seed)),
                "window": self.size.window,
                "text": list(self.training_texts(text)),
                "base": base.weights_digest,
                "tokenizer": base.tokenizer_digest,
                "device": self.lab.plan.device,
            }
        )
        directory = self.lab.cache / "packets" / key
        if not (directory / _MADE).exists():
            self._make_packet(directory, arm, rate, seed, text)
        fields = json.loads((directory / _MADE).read_bytes())
        return Packet(directory, **fields)

    def _make_packet(self, directory: Path, arm: Arm, rate: float, seed: int, text: str) -> None:
        # Training that was interrupted left a snapshot here, and goes on from it.
        directory.mkdir(parents=True, exist_ok=True)
        model, windows = self.model(BASE), self.windows(BASE, text)
        recipe = load_recipe(arm.kind)
        plan = Plan(arm.plan, self.loop(rate, seed))
        with footprint(self.lab.plan.device) as cost:
            made = recipe.extract(Donor(model, windows, directory), plan)
        fields = {
            "facts": made.facts.to_json(),
            "payload_bytes": sum(path.stat().st_size for path in made.files),
            "seconds": cost.seconds,
            "peak_bytes": cost.peak_bytes,
        }
        durable_write(directory / _MADE, json.dumps(fields).encode(), mode=0o644)

    def _describe(self, name: str) -> BaseModel:
        return describe_base(self.lab.models[name])

    def _tokenizer(self, name: str) -> Any:
        return load_tokenizer(self.lab.models[name])

    def _held(self, name: str) -> Held:
        model, tokenizer = self.model(name), self.tokenizer(name)
        # As long as what was trained on: longer ones would measure positions nobody learnt.
        scoring = Scoring(window_tokens=self.size.window)
        texts = self.lab.texts
        options = [f"{q.prompt}{label}" for q in texts.questions for label in texts.labels]
        return Held(
            {name: prepare(self.held_texts(name), tokenizer, model, scoring) for name in HELD_OUT},
            prepare(options, tokenizer, model, scoring) if options else None,
            tuple(question.right for question in texts.questions),
        )

    def _windows(self, name: str, text: str) -> Windows:
        documents = [Document(each) for each in self.training_texts(text)]
        return make_windows(documents, self.tokenizer(name), self.size.window, packed=True)
