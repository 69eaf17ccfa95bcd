# SPDX-License-Identifier: Apache-2.0
"""What the signed statement of a packet says about its weights, per kind, with the cross-checks.

Invariant: facts that exist are consistent; a recipient never computes with a position, a type or a
rank that contradicts the shape beside it. Free of tensor libraries, so that offline tools can
read statements. See protos/spec/recipes.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from allograft.crypto import canonical
from allograft.errors import RejectedError
from allograft.packet.adapter import AdapterSettings, check_adapter_settings, read_adapter_settings
from allograft.packet.delta import EMBEDDING, HEAD, DeltaLayout, read_delta_layout
from allograft.packet.organ import ORGAN_BITS
from allograft.recipes.base import Facts, ModelShape

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

    Rank, alpha and target modules are all that PEFT's configuration is rebuilt from. Targets are
    last components of module names (`q_proj`); a name that occurs twice in a block means both.
    """

    shape: ModelShape
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    dtype: str
    peft_version: str

    def __post_init__(self) -> None:
        check_adapter_settings(self.settings)
        if self.dtype not in DTYPES:
            raise RejectedError("AG-RCP-002", "the adapter's dtype is unknown")

    @property
    def settings(self) -> AdapterSettings:
        """The part that goes into a rebuilt PEFT configuration."""
        return AdapterSettings(self.rank, self.alpha, self.target_modules)

    def to_json(self) -> dict[str, canonical.Json]:
        """The facts as a JSON object."""
        return {
            "shape": self.shape.to_json(),
            "rank": self.rank,
            "alpha": self.alpha,
            "target_modules": list(self.target_modules),
            "dtype": self.dtype,
            "peft_version": self.peft_version,
        }

    @classmethod
    def from_json(cls, value: canonical.Json) -> LoraFacts:
        """Read and check the facts.

        Raises:
            RejectedError: AG-IN-003 if malformed, AG-PKT-009 or AG-RCP-002 if out of bounds.
        """
        fields = canonical.as_object(value, cls.__dataclass_fields__.keys())
        settings = read_adapter_settings(fields)
        return cls(
            shape=ModelShape.from_json(fields["shape"]),
            rank=settings.rank,
            alpha=settings.alpha,
            target_modules=settings.target_modules,
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


#: How the facts of each kind are read.
_READERS: Mapping[str, Callable[[canonical.Json], Facts]] = {
    "organ": OrganFacts.from_json,
    "lora": LoraFacts.from_json,
    "delta": DeltaFacts.from_json,
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
