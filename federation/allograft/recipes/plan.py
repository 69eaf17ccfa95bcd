# SPDX-License-Identifier: Apache-2.0
"""How to train, and what a run says about itself. Free of tensor libraries.

Every number here is public: it goes into the signed provenance statement as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, get_type_hints

from allograft.crypto import canonical
from allograft.errors import RejectedError
from allograft.packet.adapter import AdapterSettings, check_adapter_settings


class RecipePlan(Protocol):
    """One kind's choices. Its JSON stands in job, privacy plan and provenance alike."""

    def to_json(self) -> dict[str, canonical.Json]:
        """The choices as a JSON object."""
        ...

    @classmethod
    def from_json(cls, value: canonical.Json) -> Self:
        """Read them.

        Raises:
            RejectedError: AG-IN-003 if malformed.
        """
        ...


class _Choices:
    """How the plans of all kinds are written and read: by the names and types of their fields."""

    __slots__ = ()

    def to_json(self) -> dict[str, canonical.Json]:
        """The choices as a JSON object."""
        # No list: a privacy plan holds none, since a length could tell of the data.
        fields = ((name, getattr(self, name)) for name in get_type_hints(type(self)))
        return {name: "+".join(v) if isinstance(v, tuple) else v for name, v in fields}

    @classmethod
    def from_json(cls, value: canonical.Json) -> Self:
        """Read them.

        Raises:
            RejectedError: AG-IN-003 if malformed; what the kind itself refuses.
        """
        types = get_type_hints(cls)
        fields = canonical.as_object(value, types.keys())
        return cls(**{name: _READERS[kind](fields[name]) for name, kind in types.items()})._read()

    def _read(self) -> Self:
        """Itself, if it may be read."""
        return self


def _read_optional(value: canonical.Json) -> int | None:
    return None if value is None else canonical.as_int(value)


def _read_words(value: canonical.Json) -> tuple[str, ...]:
    text = canonical.as_text(value)
    return tuple(text.split("+")) if text else ()


_READERS: Mapping[Any, Callable[[canonical.Json], Any]] = {
    int: canonical.as_int,
    float: canonical.as_number,
    bool: canonical.as_bool,
    str: canonical.as_text,
    int | None: _read_optional,
    tuple[str, ...]: _read_words,
}


@dataclass(frozen=True, slots=True)
class OrganPlan(_Choices):
    """Where an organ's blocks come from and where they go; None lets the recipe choose.

    Attributes:
        blocks: How many.
        source: The first base block that they begin as copies of; when replacing, `position`.
        position: The base block before which they are inserted, or the first that they replace.
        mode: `insert` or `replace`.
        wire_bits: 16 to send values in the wire's format; 8 to send matrices as changes of what
            they began as, in 8 bits and a scale for each row: half the bytes of bf16.
        search_steps: Above 0, several positions are tried with so many steps each, on text held out
            of training. On private data each trial would be a run of its own, so it is refused.
    """

    blocks: int = 2
    source: int | None = None
    position: int | None = None
    mode: str = "insert"
    search_steps: int = 0
    wire_bits: int = 16


@dataclass(frozen=True, slots=True)
class LoraPlan(_Choices):
    """Rank, scale and the linear modules of each block that receive a low-rank change.

    No targets means all linear modules of the family's blocks. `rslora` and `dora` are PEFT's;
    `frozen_a` names the public seed that A is drawn from when B alone is to learn.
    """

    rank: int = 8
    alpha: float = 16.0
    target_modules: tuple[str, ...] = ()
    rslora: bool = False
    dora: bool = False
    frozen_a: str = ""

    def _read(self) -> LoraPlan:
        self.settings(self.target_modules or ("all",))
        return self

    def settings(self, modules: tuple[str, ...]) -> AdapterSettings:
        """The settings of an adapter of these modules.

        Raises:
            RejectedError: AG-PKT-009 if they are out of bounds.
        """
        settings = AdapterSettings(
            self.rank, self.alpha, modules, self.rslora, self.dora, self.frozen_a
        )
        return check_adapter_settings(settings)


@dataclass(frozen=True, slots=True)
class DeltaPlan(_Choices):
    """Which part of the base is trained, and how much of its change travels.

    Attributes:
        bits: 8, or 4 with 8 for leading directions.
        budget_bytes: Most bytes of the payload; 0 lets `energy` decide.
        energy: Share of the change's squared norm that is kept without a budget.
        vectors: Gains and biases of the blocks learn too.
        embeddings: Embedding and head learn too. Their changed rows tell which tokens the text
            held, and in our measurements they doubled what general text lost.
    """

    bits: int = 4
    budget_bytes: int = 0
    energy: float = 0.9
    vectors: bool = False
    embeddings: bool = False

    def check(self) -> None:
        """Refuse a plan that cannot be run.

        Raises:
            RejectedError: AG-RCP-035.
        """
        # Written so that NaN refuses.
        if self.bits not in {4, 8} or self.budget_bytes < 0 or not 0 < self.energy <= 1:
            raise RejectedError(
                "AG-RCP-035", "a delta has 4 or 8 bits, and keeps a share of energy up to 1"
            )


@dataclass(frozen=True, slots=True)
class ExpertPlan(_Choices):
    """What carries an expert's knowledge, and how its words are weighed beside a recipient's.

    Attributes:
        carrier: `whole`: the base trained in full; its embeddings and head stay as they are,
            because changed rows would tell which tokens the text holds. `organ` or `lora`: a change
            of the base, for recipients that have the base too.
        mixing: `ensemble` or `difference`; see `mixture`.
        gate: Probability that the expert's likeliest token must reach to be heard; 0 always.
        blocks: As in an organ's plan.
        position: As in an organ's plan.
        rank: As in a LoRA's plan.
        alpha: As in a LoRA's plan.
    """

    carrier: str = "whole"
    mixing: str = "ensemble"
    gate: float = 0.0
    blocks: int = 2
    position: int | None = None
    rank: int = 8
    alpha: float = 16.0


#: How a module graft ranks the modules of its base; see `recipes.graft`.
RANKINGS = ("activation", "change", "random", "bottom")


@dataclass(frozen=True, slots=True)
class ModuleGraftPlan(_Choices):
    """How many linear modules travel, and which come first.

    Attributes:
        modules: How many; 0 for all.
        ranking: `activation` by how much their outputs changed, `change` by how much their weights
            did, `random` and `bottom` (activation, the least first) as controls.
    """

    modules: int = 0
    ranking: str = "activation"

    def _read(self) -> ModuleGraftPlan:
        if self.modules < 0 or self.ranking not in RANKINGS:
            raise RejectedError("AG-RCP-035", f"a ranking is one of {', '.join(RANKINGS)}")
        return self


#: Each vector takes a position of the context from the text.
MOST_VIRTUAL_TOKENS = 512


@dataclass(frozen=True, slots=True)
class PromptPlan(_Choices):
    """How many vectors stand before the text."""

    virtual_tokens: int = 20

    def _read(self) -> PromptPlan:
        return self.check()

    def check(self) -> PromptPlan:
        """Return itself if it can be run.

        Raises:
            RejectedError: AG-RCP-035.
        """
        if not 1 <= self.virtual_tokens <= MOST_VIRTUAL_TOKENS:
            raise RejectedError("AG-RCP-035", f"a prompt has 1 to {MOST_VIRTUAL_TOKENS} vectors")
        return self


#: What each kind lets a donor choose.
RECIPE_PLANS: Mapping[str, type[RecipePlan]] = {
    "organ": OrganPlan,
    "lora": LoraPlan,
    "delta": DeltaPlan,
    "expert": ExpertPlan,
    "module_graft": ModuleGraftPlan,
    "prompt": PromptPlan,
}


def read_recipe_plan(kind: str, value: canonical.Json) -> RecipePlan:
    """One kind's choices, as their `to_json` wrote them.

    Raises:
        RejectedError: AG-RCP-001 for an unknown kind, AG-IN-003 if malformed.
    """
    return _plan_class(kind).from_json(value)


def make_recipe_plan(kind: str, choices: Sequence[str] = ()) -> RecipePlan:
    """One kind's choices from words such as `rank=16`; what is not named is as usual.

    Raises:
        RejectedError: AG-RCP-001 for an unknown kind, AG-IN-003 for a choice that it does not have
            or cannot read; what the kind's `from_json` refuses.
    """
    made = _plan_class(kind)
    types = get_type_hints(made)
    chosen: dict[str, Any] = {}
    for choice in choices:
        name, _, text = choice.partition("=")
        if name not in types or name in chosen:
            names = ", ".join(types)
            raise RejectedError("AG-IN-003", f"{choice[:60]!r}: {kind} has {names}, each once")
        chosen[name] = _read_choice(types[name], text, choice)
    return made.from_json(made(**chosen).to_json())


def _read_choice(kind: Any, text: str, choice: str) -> Any:
    try:
        if kind is bool:
            return {"true": True, "false": False}[text]
        if kind == int | None and text == "none":
            return None
        if kind in {int, int | None}:
            return int(text)
        if kind is float:
            return float(text)
    except (ValueError, KeyError):
        raise RejectedError("AG-IN-003", f"{choice[:60]!r} cannot be read") from None
    return tuple(text.split("+")) if kind == tuple[str, ...] else text


def _plan_class(kind: str) -> type[RecipePlan]:
    made = RECIPE_PLANS.get(kind)
    if made is None:
        kinds = ", ".join(RECIPE_PLANS)
        raise RejectedError("AG-RCP-001", f"kind {kind[:40]!r} is none of {kinds}")
    return made


@dataclass(frozen=True, slots=True)
class LoopPlan:
    """How long and how fast to train. One step updates the weights once."""

    steps: int = 200
    batch_windows: int = 16  # windows per forward pass
    accumulation: int = 1  # forward passes per step
    learning_rate: float = 1e-3  # 1e-3 for toys; 1e-4 to 5e-5 from 100 M parameters
    warmup_steps: int = 10
    final_rate: float = 0.1  # the cosine ends at this fraction of the learning rate
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    seed: int = 0
    checkpointing: bool = False  # recompute activations: less memory, a third more time
    snapshot_s: float = 60.0  # at most this much work is lost when the process dies

    def check(self) -> None:
        """Refuse a plan that cannot be run.

        Raises:
            RejectedError: AG-RCP-035.
        """
        counts = (self.steps, self.batch_windows, self.accumulation)
        rates = (self.learning_rate, self.clip_norm)
        # Written so that NaN refuses.
        if min(counts) < 1 or not all(0 < rate < math.inf for rate in rates) or self.seed < 0:
            raise RejectedError("AG-RCP-035", "steps, batch, rate and clip must be positive")

    def rate(self, step: int) -> float:
        """The learning rate of a step: linear warm-up, then a cosine."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        floor = self.final_rate
        return self.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))


@dataclass(frozen=True, slots=True)
class Step:
    """What the progress callback is told after each step."""

    number: int  # counts from 1
    steps: int
    loss: float  # nats per token
    tokens: int
