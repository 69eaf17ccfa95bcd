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
from dataclasses import asdict, dataclass

from allograft.crypto import canonical
from allograft.errors import RejectedError
from allograft.packet.adapter import AdapterSettings, check_adapter_settings, read_adapter_settings
from allograft.packet.delta import EMBEDDING, HEAD, DeltaLayout, read_delta_layout
from allograft.recipes.base import Facts, ModelShape
from allograft.recipes.plan import MOST_VIRTUAL_TOKENS, RANKINGS

#: How a dose acts on an organ; stated in the facts so that no reader has to guess.
DOSE_RULE = "residual-branches"

#: Floating-point element types that payloads may have; the same as in packet/tensors.
DTYPES = frozenset({"float32", "bfloat16", "float16"})


@dataclass(frozen=True, slots=True)
class OrganFacts:
    """What a recipient must know before it opens an organ.

    `layer_types` repeats the types of the source blocks (empty where the family has none): a block
    computed with another type's mask runs without an error and is wrong.
    """

    shape: ModelShape
    blocks: int
    source: int
    position: int
    layer_types: tuple[str, ...]
    dtype: str
    dose_rule: str = DOSE_RULE

    def __post_init__(self) -> None:
        depth = self.shape.layers
        inside = 1 <= self.blocks <= depth and self.source + self.blocks <= depth
        if not inside or self.position > depth:
            raise RejectedError("AG-RCP-002", "the organ lies outside its base")
        types = self.shape.layer_types[self.source : self.source + self.blocks]
        if types != self.layer_types or self.dose_rule != DOSE_RULE or self.dtype not in DTYPES:
            raise RejectedError("AG-RCP-002", "the organ's types, dose rule or dtype are unknown")

    def to_json(self) -> dict[str, canonical.Json]:
        """The facts as a JSON object."""
        return {
            "shape": self.shape.to_json(),
            "blocks": self.blocks,
            "source": self.source,
            "position": self.position,
            "layer_types": list(self.layer_types),
            "dtype": self.dtype,
            "dose_rule": self.dose_rule,
        }

    @classmethod
    def from_json(cls, value: canonical.Json) -> OrganFacts:
        """Read and check the facts.

        Raises:
            RejectedError: AG-IN-003 if malformed, AG-RCP-002 if they contradict each other.
        """
        fields = canonical.as_object(value, cls.__dataclass_fields__.keys())
        types = canonical.as_list(fields["layer_types"])
        return cls(
            shape=ModelShape.from_json(fields["shape"]),
            blocks=canonical.as_int(fields["blocks"]),
            source=canonical.as_int(fields["source"]),
            position=canonical.as_int(fields["position"]),
            layer_types=tuple(canonical.as_text(entry) for entry in types),
            dtype=canonical.as_text(fields["dtype"]),
            dose_rule=canonical.as_text(fields["dose_rule"]),
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


_GRAFTED = re.compile(r"blocks\.(\d{1,5})\.[a-z0-9_.]{1,64}")


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
        # Written so that NaN refuses.
        ranked = len(self.scores) == len(found) and all(0 <= s < math.inf for s in self.scores)
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
