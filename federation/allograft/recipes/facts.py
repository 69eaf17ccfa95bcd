# SPDX-License-Identifier: Apache-2.0
"""What the signed statement of a packet says about its weights, per kind, with the cross-checks.

Invariant: facts that exist are consistent; a recipient never computes with a position, a type or a
rank that contradicts the shape beside it. Free of tensor libraries, so that offline tools can
read statements. See protos/spec/recipes.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace

from allograft.crypto import canonical
from allograft.errors import RejectedError
from allograft.packet.adapter import AdapterSettings, check_adapter_settings, read_adapter_settings
from allograft.packet.delta import EMBEDDING, HEAD, DeltaLayout, read_delta_layout
from allograft.packet.organ import ORGAN_BITS
from allograft.recipes.base import (
    Declaration,
    Facts,
    ModelCard,
    ModelShape,
    Verdict,
    check_base,
    check_tokenizer,
)
from allograft.recipes.plan import MOST_VIRTUAL_TOKENS, RANKINGS

#: How a dose acts on an organ, by its mode; stated in the facts so that no reader has to guess.
DOSE_RULES: Mapping[str, str] = {"insert": "residual-branches", "replace": "change"}

#: Floating-point element types that payloads may have; the same as in packet/tensors.
DTYPES = frozenset({"float32", "bfloat16", "float16"})


@dataclass(frozen=True, slots=True)
class OrganFacts:
    """What a recipient must know before it opens an organ.

    `layer_types` repeats the types of the source blocks (empty where the family has none): a block
    computed with another type's mask runs without an error and is wrong. An organ in mode `replace`
    holds the change against the blocks it replaces, so its source and position are one. With 8 bits
    its matrices travel as changes of what training began from; see `packet.organ`.
    """

    shape: ModelShape
    blocks: int
    source: int
    position: int
    layer_types: tuple[str, ...]
    dtype: str
    mode: str = "insert"
    bits: int = 16

    def __post_init__(self) -> None:
        depth = self.shape.layers
        inside = 1 <= self.blocks <= depth and self.source + self.blocks <= depth
        if not inside or self.position > depth:
            raise RejectedError("AG-RCP-002", "the organ lies outside its base")
        if self.mode not in DOSE_RULES or (self.replaces and self.source != self.position):
            raise RejectedError("AG-RCP-002", "the organ's mode is unknown or has another source")
        types = self.shape.layer_types[self.source : self.source + self.blocks]
        if types != self.layer_types or self.dtype not in DTYPES or self.bits not in ORGAN_BITS:
            raise RejectedError("AG-RCP-002", "the organ's types, dtype or bits are unknown")

    @property
    def replaces(self) -> bool:
        """Whether it holds a change of the base's own blocks, and adds none."""
        return self.mode == "replace"

    def to_json(self) -> dict[str, canonical.Json]:
        """The facts as a JSON object."""
        return {
            "shape": self.shape.to_json(),
            "blocks": self.blocks,
            "source": self.source,
            "position": self.position,
            "layer_types": list(self.layer_types),
            "dtype": self.dtype,
            "mode": self.mode,
            "bits": self.bits,
            "dose_rule": DOSE_RULES[self.mode],
        }

    @classmethod
    def from_json(cls, value: canonical.Json) -> OrganFacts:
        """Read and check the facts.

        Raises:
            RejectedError: AG-IN-003 if malformed, AG-RCP-002 if they contradict each other.
        """
        fields = canonical.as_object(value, {*cls.__dataclass_fields__, "dose_rule"})
        types = canonical.as_list(fields["layer_types"])
        facts = cls(
            shape=ModelShape.from_json(fields["shape"]),
            blocks=canonical.as_int(fields["blocks"]),
            source=canonical.as_int(fields["source"]),
            position=canonical.as_int(fields["position"]),
            layer_types=tuple(canonical.as_text(entry) for entry in types),
            dtype=canonical.as_text(fields["dtype"]),
            mode=canonical.as_text(fields["mode"]),
            bits=canonical.as_int(fields["bits"]),
        )
        if fields["dose_rule"] != DOSE_RULES[facts.mode]:
            raise RejectedError("AG-RCP-002", "the organ's dose rule is not that of its mode")
        return facts


@dataclass(frozen=True, slots=True)
class StitchedFacts:
    """What a recipient must know before it opens a stitched organ (experimental).

    `probe` is the digest of the public windows on which both sides record hidden states, and
    `tokens` how many of these the payload holds.
    """

    organ: OrganFacts
    probe: str
    tokens: int

    def __post_init__(self) -> None:
        organ = self.organ
        if organ.replaces or organ.position != organ.shape.layers or self.tokens < 1:
            raise RejectedError("AG-RCP-002", "a stitched organ is made behind the last block")

    @property
    def shape(self) -> ModelShape:
        """The base it was made on."""
        return self.organ.shape

    def to_json(self) -> dict[str, canonical.Json]:
        """The facts as a JSON object."""
        return {"organ": self.organ.to_json(), "probe": self.probe, "tokens": self.tokens}

    @classmethod
    def from_json(cls, value: canonical.Json) -> StitchedFacts:
        """Read and check the facts.

        Raises:
            RejectedError: AG-IN-003 if malformed, AG-RCP-002 if they contradict each other.
        """
        fields = canonical.as_object(value, cls.__dataclass_fields__.keys())
        return cls(
            organ=OrganFacts.from_json(fields["organ"]),
            probe=canonical.as_sha256(fields["probe"]),
            tokens=canonical.as_int(fields["tokens"]),
        )


@dataclass(frozen=True, slots=True)
class LoraFacts:
    """What a recipient must know before it opens a LoRA adapter.

    The settings are all that PEFT's configuration is rebuilt from. Targets are last components of
    module names (`q_proj`); a name that occurs twice in a block means both.
    """

    shape: ModelShape
    settings: AdapterSettings
    dtype: str
    peft_version: str

    def __post_init__(self) -> None:
        check_adapter_settings(self.settings)
        if self.dtype not in DTYPES:
            raise RejectedError("AG-RCP-002", "the adapter's dtype is unknown")

    def to_json(self) -> dict[str, canonical.Json]:
        """The facts as a JSON object."""
        return {
            "shape": self.shape.to_json(),
            "dtype": self.dtype,
            "peft_version": self.peft_version,
            **asdict(self.settings),
            "target_modules": list(self.settings.target_modules),
        }

    @classmethod
    def from_json(cls, value: canonical.Json) -> LoraFacts:
        """Read and check the facts.

        Raises:
            RejectedError: AG-IN-003 if malformed, AG-PKT-009 or AG-RCP-002 if out of bounds.
        """
        names = {"shape", "dtype", "peft_version", *AdapterSettings.__dataclass_fields__}
        fields = canonical.as_object(value, names)
        return cls(
            shape=ModelShape.from_json(fields["shape"]),
            settings=read_adapter_settings(fields),
            dtype=canonical.as_text(fields["dtype"]),
            peft_version=canonical.as_text(fields["peft_version"]),
        )


#: Stage of an anchor that is a base as published.
BASE_STAGE = "base"

_STAGE = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")


@dataclass(frozen=True, slots=True)
class DeltaFacts:
    """What a recipient must know before it opens a delta.

    Ranks and the base's shapes say every name and shape of the payload. The change starts from an
    *anchor*: the base itself, or, for a skill, a snapshot at a later stage of its training, which
    is then the statement's base. `anchor` is its weights digest, or empty where the statement alone
    says it.
    """

    shape: ModelShape
    layout: DeltaLayout
    dtype: str
    anchor: str = ""
    stage: str = BASE_STAGE

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES or not _STAGE.fullmatch(self.stage):
            raise RejectedError("AG-RCP-002", "the delta's dtype or stage is unknown")
        if self.stage != BASE_STAGE and not self.anchor:
            raise RejectedError("AG-RCP-002", "a skill does not name its anchor")
        for name, ranks in self.layout.ranks.items():
            if len(ranks) != (1 if name in {EMBEDDING, HEAD} else self.shape.layers):
                raise RejectedError("AG-RCP-002", "a delta does not cover the blocks of its base")

    def to_json(self) -> dict[str, canonical.Json]:
        """The facts as a JSON object."""
        return {
            "shape": self.shape.to_json(),
            **self.layout.to_json(),
            "dtype": self.dtype,
            "anchor": self.anchor,
            "stage": self.stage,
        }

    @classmethod
    def from_json(cls, value: canonical.Json) -> DeltaFacts:
        """Read and check the facts.

        Raises:
            RejectedError: AG-IN-003 or AG-PKT-028 if malformed, AG-RCP-002 if they contradict each
                other.
        """
        names = {"shape", "ranks", "vectors", "dtype", "anchor", "stage"}
        fields = canonical.as_object(value, names)
        anchor = canonical.as_text(fields["anchor"])
        return cls(
            shape=ModelShape.from_json(fields["shape"]),
            layout=read_delta_layout(fields),
            dtype=canonical.as_text(fields["dtype"]),
            anchor=canonical.as_sha256(anchor) if anchor else "",
            stage=canonical.as_text(fields["stage"]),
        )


#: Everything of an expert's configuration that its shape does not say, and of which type it is. A
#: configuration is rebuilt from these names alone; see `blueprint`.
EXPERT_SETTINGS: Mapping[str, type] = {
    "max_position_embeddings": int,
    "query_pre_attn_scalar": int,
    "rms_norm_eps": float,
    "layer_norm_epsilon": float,
    "attn_logit_softcapping": float,
    "final_logit_softcapping": float,
    "tie_word_embeddings": bool,
    "attention_bias": bool,
    "mlp_bias": bool,
    "scale_attn_weights": bool,
    "use_sliding_window": bool,
    "hidden_act": str,
    "hidden_activation": str,
    "activation_function": str,
}

_ACTIVATIONS = frozenset({"silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "relu"})
_MIXINGS = frozenset({"ensemble", "difference"})
_MOST_BLOCKS = 512  # a model of more is no small expert, and building one costs time

#: Kinds of rotation, and the numbers that each needs. Others hold lists or compute their own sizes.
_ROTATIONS: Mapping[str, frozenset[str]] = {
    "default": frozenset({"rope_theta"}),
    "linear": frozenset({"rope_theta", "factor"}),
    "dynamic": frozenset({"rope_theta", "factor"}),
    "llama3": frozenset(
        {
            "rope_theta",
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        }
    ),
}
_ROTATION_EXTRAS = frozenset({"partial_rotary_factor", "original_max_position_embeddings"})

#: The one family whose types of layers rotate differently.
_ROTATES_BY_TYPE = "gemma3_text"
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})


@dataclass(frozen=True, slots=True)
class ExpertFacts:
    """What a recipient must know before it opens an expert.

    Attributes:
        shape: The donor's small base; of the expert itself where it is whole.
        carrier: `whole`, or the kind of change that makes the base an expert.
        mixing: How its words are weighed beside a recipient's; see `mixture`.
        gate: Probability that its likeliest token must reach to be heard.
        dtype: Element type of the payload.
        settings: For a whole model, the rest of its configuration.
        inner: For a change, the facts of its kind without shape and dtype.
    """

    shape: ModelShape
    carrier: str
    mixing: str
    gate: float
    dtype: str
    settings: Mapping[str, canonical.Json]
    inner: Mapping[str, canonical.Json]

    def __post_init__(self) -> None:
        if self.mixing not in _MIXINGS or self.dtype not in DTYPES or not 0 <= self.gate < 1:
            raise RejectedError("AG-RCP-002", "the expert's mixing, gate or dtype is unknown")
        self._check_shape()
        if self.carrier == "whole":
            self._check_settings()
        elif self.settings:
            raise RejectedError("AG-RCP-002", "a change of a base has no settings of its own")
        else:
            _ = self.change

    @property
    def needs_base(self) -> bool:
        """Whether a recipient must have the donor's base."""
        return self.carrier != "whole" or self.mixing == "difference"

    @property
    def change(self) -> Facts:
        """The facts of the change that makes the base an expert.

        Raises:
            RejectedError: AG-RCP-002 for an unknown carrier or a whole model.
        """
        if self.carrier not in {"organ", "lora"}:
            raise RejectedError("AG-RCP-002", "nothing known carries the expert")
        if self.inner.keys() & {"shape", "dtype"}:
            # They would be overwritten, so anything at all could stand there.
            raise RejectedError("AG-RCP-002", "the facts of the change repeat those of the expert")
        whole = {**self.inner, "shape": self.shape.to_json(), "dtype": self.dtype}
        return read_facts(self.carrier, whole)

    def _check_shape(self) -> None:
        shape = self.shape
        sizes = (shape.hidden, shape.layers, shape.vocab, shape.heads, shape.kv_heads)
        if min(*sizes, shape.head_dim, shape.intermediate) < 1 or shape.sliding_window < 0:
            raise RejectedError("AG-RCP-002", "the expert's shape has a size below 1")
        if shape.heads % shape.kv_heads:
            raise RejectedError("AG-RCP-002", "the expert's heads do not share keys evenly")

    def _check_settings(self) -> None:
        if self.shape.rope:
            _check_rotations(self.shape)
        for name, value in self.settings.items():
            known = EXPERT_SETTINGS.get(name)
            numeric = known is float and type(value) in {int, float}
            if known is None or not (type(value) is known or numeric):
                raise RejectedError("AG-RCP-002", "a setting of the expert is unknown")
            fits = value in _ACTIVATIONS if known is str else 0 <= float(value) <= 1 << 30  # type: ignore[arg-type]
            if not fits:
                raise RejectedError("AG-RCP-002", f"the expert's {name} is out of range")
        if self.inner or not 1 <= self.shape.layers <= _MOST_BLOCKS:
            raise RejectedError("AG-RCP-002", "the expert is no model of a few blocks")

    def to_json(self) -> dict[str, canonical.Json]:
        """The facts as a JSON object."""
        return {
            "shape": self.shape.to_json(),
            "carrier": self.carrier,
            "mixing": self.mixing,
            "gate": self.gate,
            "dtype": self.dtype,
            "settings": dict(self.settings),
            "inner": dict(self.inner),
        }

    @classmethod
    def from_json(cls, value: canonical.Json) -> ExpertFacts:
        """Read and check the facts.

        Raises:
            RejectedError: AG-IN-003 if malformed, AG-RCP-002 if unknown or out of range.
        """
        fields = canonical.as_object(value, cls.__dataclass_fields__.keys())
        return cls(
            shape=ModelShape.from_json(fields["shape"]),
            carrier=canonical.as_text(fields["carrier"]),
            mixing=canonical.as_text(fields["mixing"]),
            gate=canonical.as_number(fields["gate"]),
            dtype=canonical.as_text(fields["dtype"]),
            settings=canonical.as_mapping(fields["settings"]),
            inner=canonical.as_mapping(fields["inner"]),
        )


def _check_rotations(shape: ModelShape) -> None:
    """Refuse rotary parameters that no supported family has in stock.

    They decide on sizes and types of buffers, which no payload shows.
    """
    rope = canonical.as_mapping(canonical.loads(shape.rope.encode()))
    if shape.family != _ROTATES_BY_TYPE:
        _check_rotation(rope)
    elif not rope.keys() <= _LAYER_TYPES:
        raise RejectedError("AG-RCP-002", "the expert rotates layers of an unknown type")
    else:
        for each in rope.values():
            _check_rotation(canonical.as_mapping(each))


def _check_rotation(rope: Mapping[str, canonical.Json]) -> None:
    kind = rope.get("rope_type")
    needed = _ROTATIONS.get(kind) if isinstance(kind, str) else None
    names = rope.keys() - {"rope_type"}
    if needed is None or not needed <= names <= needed | _ROTATION_EXTRAS:
        raise RejectedError("AG-RCP-002", "the expert's kind of rotation is unknown")
    values = {name: rope[name] for name in names}
    numbers = {n: float(v) for n, v in values.items() if type(v) in {int, float}}  # type: ignore[arg-type]
    # Written so that NaN refuses.
    sane = numbers.keys() == values.keys() and all(0 < v <= 1e12 for v in numbers.values())
    if not sane or not numbers.get("partial_rotary_factor", 1.0) <= 1:
        raise RejectedError("AG-RCP-002", "the expert's rotation is out of range")
    length = values.get("original_max_position_embeddings", 1)
    if type(length) is not int or numbers.get("factor", 1.0) < 1:
        raise RejectedError("AG-RCP-002", "the expert's rotation is out of range")
    if kind == "llama3" and not numbers["low_freq_factor"] < numbers["high_freq_factor"]:
        raise RejectedError("AG-RCP-002", "the expert's rotation is out of range")


# One spelling of each number: of two the choice could carry a message.
_GRAFTED = re.compile(r"blocks\.(0|[1-9][0-9]{0,4})\.[a-z0-9_.]{1,64}")


@dataclass(frozen=True, slots=True)
class ModuleGraftFacts:
    """What a recipient must know before it opens a module graft.

    Modules stand in the order of their rank, strongest first, so that fewer of them can be used.
    A score is how far a module's mean absolute output at the last token of the calibration prompts
    moved (`activation`, `bottom`) or the Frobenius norm of its weight's change (`change`).

    Attributes:
        modules: `blocks.{n}.{name}` of each.
        scores: One for each module, to three digits; 0 where the order is random.
        calibration: SHA-256 (hex) of the calibration tokens; empty where none were used.
        source: `trained` by the donor on its base, or a `snapshot` trained elsewhere.
    """

    shape: ModelShape
    modules: tuple[str, ...]
    scores: tuple[float, ...]
    ranking: str
    calibration: str
    source: str
    dtype: str

    def __post_init__(self) -> None:
        found = [_GRAFTED.fullmatch(name) for name in self.modules]
        inside = all(match and int(match[1]) < self.shape.layers for match in found)
        if not found or not inside or len(set(self.modules)) != len(found):
            raise RejectedError("AG-RCP-002", "the graft's modules are none of its base")
        # Written so that NaN refuses; digits that no rank needs could carry a message.
        short = all(0 <= s < math.inf and s == float(f"{s:.3g}") for s in self.scores)
        ranked = len(self.scores) == len(found) and short
        known = self.ranking in RANKINGS and self.source in {"trained", "snapshot"}
        if not ranked or not known or self.dtype not in DTYPES:
            raise RejectedError("AG-RCP-002", "the graft's scores, ranking or dtype are unknown")

    def to_json(self) -> dict[str, canonical.Json]:
        """The facts as a JSON object."""
        return {
            "shape": self.shape.to_json(),
            "modules": list(self.modules),
            "scores": list(self.scores),
            "ranking": self.ranking,
            "calibration": self.calibration,
            "source": self.source,
            "dtype": self.dtype,
        }

    @classmethod
    def from_json(cls, value: canonical.Json) -> ModuleGraftFacts:
        """Read and check the facts.

        Raises:
            RejectedError: AG-IN-003 if malformed, AG-RCP-002 if they contradict each other.
        """
        fields = canonical.as_object(value, cls.__dataclass_fields__.keys())
        calibration = canonical.as_text(fields["calibration"])
        return cls(
            shape=ModelShape.from_json(fields["shape"]),
            modules=tuple(canonical.as_text(name) for name in canonical.as_list(fields["modules"])),
            scores=tuple(canonical.as_number(each) for each in canonical.as_list(fields["scores"])),
            ranking=canonical.as_text(fields["ranking"]),
            calibration=canonical.as_sha256(calibration) if calibration else "",
            source=canonical.as_text(fields["source"]),
            dtype=canonical.as_text(fields["dtype"]),
        )


@dataclass(frozen=True, slots=True)
class PromptFacts:
    """What a recipient must know before it opens a prompt."""

    shape: ModelShape
    virtual_tokens: int
    dtype: str

    def __post_init__(self) -> None:
        if not 1 <= self.virtual_tokens <= MOST_VIRTUAL_TOKENS or self.dtype not in DTYPES:
            raise RejectedError("AG-RCP-002", "the prompt's vectors or dtype are out of range")

    def to_json(self) -> dict[str, canonical.Json]:
        """The facts as a JSON object."""
        return {
            "shape": self.shape.to_json(),
            "virtual_tokens": self.virtual_tokens,
            "dtype": self.dtype,
        }

    @classmethod
    def from_json(cls, value: canonical.Json) -> PromptFacts:
        """Read and check the facts.

        Raises:
            RejectedError: AG-IN-003 if malformed, AG-RCP-002 if out of range.
        """
        fields = canonical.as_object(value, cls.__dataclass_fields__.keys())
        return cls(
            shape=ModelShape.from_json(fields["shape"]),
            virtual_tokens=canonical.as_int(fields["virtual_tokens"]),
            dtype=canonical.as_text(fields["dtype"]),
        )


#: How the facts of each kind are read.
_READERS: Mapping[str, Callable[[canonical.Json], Facts]] = {
    "organ": OrganFacts.from_json,
    "lora": LoraFacts.from_json,
    "delta": DeltaFacts.from_json,
    "expert": ExpertFacts.from_json,
    "module_graft": ModuleGraftFacts.from_json,
    "prompt": PromptFacts.from_json,
}


def read_facts(kind: str, value: canonical.Json) -> Facts:
    """The facts of a packet of any kind, without its recipe.

    Raises:
        RejectedError: AG-RCP-001 for an unknown kind; what the kind's own reader refuses.
    """
    read = _READERS.get(kind)
    if read is None:
        raise RejectedError("AG-RCP-001", f"kind {kind[:40]!r} has no facts")
    return read(value)


def check_statement(statement: Declaration, card: ModelCard) -> Verdict:
    """Judge a packet of any kind against a model by its statement, without its recipe.

    Raises:
        RejectedError: As `read_facts`.
    """
    facts = read_facts(statement.kind, dict(statement.facts))
    if isinstance(facts, ExpertFacts):
        return check_tokenizer(statement, facts, card, needs_base=facts.needs_base)
    if isinstance(facts, DeltaFacts) and facts.anchor not in {"", statement.base_weights_digest}:
        return Verdict("refuse", "its anchor is not the base of its statement", "AG-RCP-002")
    verdict = check_base(statement, facts, card)
    if isinstance(facts, PromptFacts) and verdict.level != "exact":
        if verdict.code in {"AG-RCP-010", "AG-RCP-011"}:
            return verdict
        # A relative reads its vectors another way.
        reason = "a prompt fits no other weights than those it was made on"
        return Verdict("refuse", reason, "AG-RCP-036", verdict.numbers)
    if isinstance(facts, DeltaFacts) and facts.stage != BASE_STAGE and verdict.level != "refuse":
        return replace(verdict, reason=f"{verdict.reason}; a skill for stage {facts.stage}")
    return verdict
