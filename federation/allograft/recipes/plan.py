# SPDX-License-Identifier: Apache-2.0
"""How to train, and what a run says about itself. Free of tensor libraries.

Every number here is public: it goes into the signed provenance statement as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
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


@dataclass(frozen=True, slots=True)
class OrganPlan:
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

    def to_json(self) -> dict[str, canonical.Json]:
        """The choices as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: canonical.Json) -> OrganPlan:
        """Read them.

        Raises:
            RejectedError: AG-IN-003 if malformed.
        """
        fields = canonical.as_object(value, cls.__dataclass_fields__.keys())
        return cls(
            blocks=canonical.as_int(fields["blocks"]),
            source=_optional_int(fields["source"]),
            position=_optional_int(fields["position"]),
            mode=canonical.as_text(fields["mode"]),
            search_steps=canonical.as_int(fields["search_steps"]),
            wire_bits=canonical.as_int(fields["wire_bits"]),
        )


@dataclass(frozen=True, slots=True)
class LoraPlan:
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

    def to_json(self) -> dict[str, canonical.Json]:
        """The choices as a JSON object."""
        # No list: a privacy plan holds none, since a length could tell of the data.
        return {**asdict(self), "target_modules": "+".join(self.target_modules)}

    @classmethod
    def from_json(cls, value: canonical.Json) -> LoraPlan:
        """Read them.

        Raises:
            RejectedError: AG-IN-003 if malformed, AG-PKT-009 if no adapter can be so.
        """
        fields = canonical.as_object(value, cls.__dataclass_fields__.keys())
        modules = canonical.as_text(fields["target_modules"])
        plan = cls(
            rank=canonical.as_int(fields["rank"]),
            alpha=canonical.as_number(fields["alpha"]),
            target_modules=tuple(modules.split("+")) if modules else (),
            rslora=canonical.as_bool(fields["rslora"]),
            dora=canonical.as_bool(fields["dora"]),
            frozen_a=canonical.as_text(fields["frozen_a"]),
        )
        plan.settings(plan.target_modules or ("all",))
        return plan

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
class DeltaPlan:
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

    def to_json(self) -> dict[str, canonical.Json]:
        """The choices as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: canonical.Json) -> DeltaPlan:
        """Read them.

        Raises:
            RejectedError: AG-IN-003 if malformed.
        """
        fields = canonical.as_object(value, cls.__dataclass_fields__.keys())
        return cls(
            bits=canonical.as_int(fields["bits"]),
            budget_bytes=canonical.as_int(fields["budget_bytes"]),
            energy=canonical.as_number(fields["energy"]),
            vectors=canonical.as_bool(fields["vectors"]),
            embeddings=canonical.as_bool(fields["embeddings"]),
        )

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
class ExpertPlan:
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

    def to_json(self) -> dict[str, canonical.Json]:
        """The choices as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: canonical.Json) -> ExpertPlan:
        """Read them.

        Raises:
            RejectedError: AG-IN-003 if malformed.
        """
        fields = canonical.as_object(value, cls.__dataclass_fields__.keys())
        return cls(
            carrier=canonical.as_text(fields["carrier"]),
            mixing=canonical.as_text(fields["mixing"]),
            gate=canonical.as_number(fields["gate"]),
            blocks=canonical.as_int(fields["blocks"]),
            position=_optional_int(fields["position"]),
            rank=canonical.as_int(fields["rank"]),
            alpha=canonical.as_number(fields["alpha"]),
        )


#: How a module graft ranks the modules of its base; see `recipes.graft`.
RANKINGS = ("activation", "change", "random", "bottom")


@dataclass(frozen=True, slots=True)
class ModuleGraftPlan:
    """How many linear modules travel, and which come first.

    Attributes:
        modules: How many; 0 for all.
        ranking: `activation` by how much their outputs changed, `change` by how much their weights
            did, `random` and `bottom` (activation, the least first) as controls.
    """

    modules: int = 0
    ranking: str = "activation"

    def to_json(self) -> dict[str, canonical.Json]:
        """The choices as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: canonical.Json) -> ModuleGraftPlan:
        """Read them.

        Raises:
            RejectedError: AG-IN-003 if malformed, AG-RCP-035 for an unknown ranking.
        """
        fields = canonical.as_object(value, cls.__dataclass_fields__.keys())
        plan = cls(canonical.as_int(fields["modules"]), canonical.as_text(fields["ranking"]))
        if plan.modules < 0 or plan.ranking not in RANKINGS:
            raise RejectedError("AG-RCP-035", f"a ranking is one of {', '.join(RANKINGS)}")
        return plan


#: Each vector takes a position of the context from the text.
MOST_VIRTUAL_TOKENS = 512


@dataclass(frozen=True, slots=True)
class PromptPlan:
    """How many vectors stand before the text."""

    virtual_tokens: int = 20

    def to_json(self) -> dict[str, canonical.Json]:
        """The choices as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: canonical.Json) -> PromptPlan:
        """Read them.

        Raises:
            RejectedError: AG-IN-003 if malformed, AG-RCP-035 if out of range.
        """
        fields = canonical.as_object(value, cls.__dataclass_fields__.keys())
        return cls(canonical.as_int(fields["virtual_tokens"])).check()

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


def _optional_int(value: canonical.Json) -> int | None:
    return None if value is None else canonical.as_int(value)


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
