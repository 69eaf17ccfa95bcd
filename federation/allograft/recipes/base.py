# SPDX-License-Identifier: Apache-2.0
"""What every recipe is: five verbs, the values between them, and the registry of kinds.

A recipe makes one kind of packet at the donor (`extract`), judges it by its statement before the
payload is opened (`check`), turns the opened payload into an attachment for one model (`fit`), and
puts that on the model and takes it off again (`attach`, `detach`). Detaching is bit-exact.

This module imports no tensor library, so that statements can be read and checked without one.
A packet names a kind; it never names code. See protos/spec/recipes.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from allograft.crypto import canonical
from allograft.errors import RejectedError
from allograft.privacy.dp import DpConstants
from allograft.recipes.plan import LoopPlan, RecipePlan, Step

if TYPE_CHECKING:
    import torch

    from allograft.recipes.windows import Windows

#: Kinds that ship with this package. A site's policy may allow more, by the name of an installed
#: entry point; a packet can only choose among the allowed ones.
BUILT_IN_KINDS = frozenset({"organ", "lora", "delta", "expert", "module_graft", "prompt"})

#: Kinds that measurement has not borne out. No packet travels with one, and `load_recipe` refuses
#: them unless the caller's own allow-list names them.
EXPERIMENTAL_KINDS = frozenset({"stitched"})

#: Doses that the gate tries. Half a dose kept two thirds of the gain at a fifth of the harm to
#: general text in our measurements, so a full dose is never the only candidate.
DOSES = (0.25, 0.5, 1.0)

#: Mean cosine of sketched tensors above which two bases count as one lineage. Measured: .996 for a
#: continued base, at most .02 for an independent seed; anything between is unusual.
LINEAGE_COSINE = 0.9

#: How a packet fits a model. `behavioural`: it works beside the model or through what the model
#: says, so the two share a tokenizer and need not share a weight.
Level = Literal["exact", "lineage", "behavioural", "refuse"]

#: How a private step takes the persons drawn: one at a time, several at once, or as suits.
PrivateWay = Literal["auto", "single", "joint"]


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Everything about a base that inserted blocks or patched matrices must agree with.

    `rope` is the canonical JSON of the rotary parameters (empty for learned positions): blocks
    carry no positions of their own, so a different rotation silently changes what they attend to.
    `sliding_window` is 0 where no block slides.
    """

    family: str
    hidden: int
    layers: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    rope: str
    layer_types: tuple[str, ...]
    sliding_window: int

    def to_json(self) -> dict[str, canonical.Json]:
        """The shape as a JSON object."""
        return {
            "family": self.family,
            "hidden": self.hidden,
            "layers": self.layers,
            "vocab": self.vocab,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate": self.intermediate,
            "rope": self.rope,
            "layer_types": list(self.layer_types),
            "sliding_window": self.sliding_window,
        }

    @classmethod
    def from_json(cls, value: canonical.Json) -> ModelShape:
        """Read a shape.

        Raises:
            RejectedError: AG-IN-003.
        """
        names = cls.__dataclass_fields__.keys()
        fields = canonical.as_object(value, names)
        types = canonical.as_list(fields["layer_types"])
        return cls(
            family=canonical.as_text(fields["family"]),
            hidden=canonical.as_int(fields["hidden"]),
            layers=canonical.as_int(fields["layers"]),
            vocab=canonical.as_int(fields["vocab"]),
            heads=canonical.as_int(fields["heads"]),
            kv_heads=canonical.as_int(fields["kv_heads"]),
            head_dim=canonical.as_int(fields["head_dim"]),
            intermediate=canonical.as_int(fields["intermediate"]),
            rope=canonical.as_text(fields["rope"]),
            layer_types=tuple(canonical.as_text(entry) for entry in types),
            sliding_window=canonical.as_int(fields["sliding_window"]),
        )


class Facts(Protocol):
    """Kind-specific, typed facts that go into the signed packet statement."""

    @property
    def shape(self) -> ModelShape:
        """The base the packet was made on."""
        ...

    def to_json(self) -> dict[str, canonical.Json]:
        """The facts as a JSON object, for the statement."""
        ...


@dataclass(frozen=True, slots=True)
class Donor:
    """What `extract` works on.

    `model` is a plain transformers causal model without attachments; training leaves its own
    weights untouched. `workdir` is private to this job: it holds resumable training snapshots and
    possibly cached activations of private text, and receives the payload files.
    """

    model: Any
    windows: Windows
    workdir: Path
    progress: Callable[[Step], None] | None = None
    ram_bytes: int = 1 << 30  # ceiling for cached activations in memory
    disk_bytes: int = 16 << 30  # ceiling for cached activations in a file under workdir
    private_way: PrivateWay = "auto"  # the same sums, but for rounding; no matter of the plan
    probe: Windows | None = None  # public text that recipients have too, for stitching
    tuned: Any = None  # the base after training elsewhere; a kind that ships changes takes these


@dataclass(frozen=True, slots=True)
class Plan:
    """How to train: one kind's choices, the loop's, and the constants of a private run."""

    recipe: RecipePlan
    loop: LoopPlan
    private: DpConstants | None = None

    def passes(self, windows: int) -> float:
        """How often each of so many windows is seen, on average."""
        if self.private is not None:
            return self.private.steps * self.private.sampling_rate
        seen = self.loop.steps * self.loop.batch_windows * self.loop.accumulation
        return seen / max(1, windows)


@dataclass(frozen=True, slots=True)
class Extract:
    """What a donor's training produced: payload files and facts for the statement.

    `report` holds figures for people and for the provenance statement (losses, seconds, cache).
    """

    kind: str
    files: tuple[Path, ...]
    facts: Facts
    report: Mapping[str, canonical.Json]


@dataclass(frozen=True, slots=True)
class Declaration:
    """The part of a verified packet statement that `check` reads."""

    kind: str
    base_weights_digest: str
    tokenizer_digest: str
    facts: Mapping[str, canonical.Json]


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What `check` may know about the recipient's model.

    `lineage_cosine` is the recipient's own comparison of its weights with the statement's sealed
    sketch; None means that nobody has compared yet, and then only an equal digest is accepted.
    `bases` are the weights digests of all models at the site, for packets that name another one.
    """

    weights_digest: str
    tokenizer_digest: str
    shape: ModelShape
    lineage_cosine: float | None = None
    bases: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a packet may be opened for a model, and why (not).

    `code` is an error code for a refusal and empty otherwise. `needs` lists what the recipient
    must supply: `validation_text`, `retention_text`, or `lineage_test` when only that is missing.
    """

    level: Level
    reason: str
    code: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Payload:
    """An opened, digest-checked payload directory with the facts from its statement.

    `base_digest` is the weights digest of the donor's base, for kinds that need that very model.
    """

    kind: str
    packet_id: str
    directory: Path
    facts: Mapping[str, canonical.Json]
    base_digest: str = ""


@dataclass(frozen=True, slots=True)
class Recipient:
    """The model that `fit` prepares an attachment for.

    `bases` are directories of the site's models by weights digest.
    """

    model: Any
    seed: int = 0
    probe: Windows | None = None  # the donor's public text, for stitching
    bases: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Attachment:
    """A fitted packet: tensors that fit one model, and the dose at which they act.

    Change the dose with `dataclasses.replace(attachment, dose=0.5)`. `attachment_id` is the packet
    id where there is one; two attachments of one model never share it.
    """

    kind: str
    attachment_id: str
    facts: Facts
    tensors: Mapping[str, torch.Tensor]
    dose: float = 1.0
    doses: tuple[float, ...] = DOSES
    report: Mapping[str, canonical.Json] = field(default_factory=dict)


class Handle(Protocol):
    """An attachment at work on a model, as `attach` returned it."""

    @property
    def attachment(self) -> Attachment:
        """What was attached, at its present dose."""
        ...

    @property
    def model(self) -> Any:
        """The model it was attached to."""
        ...

    def set_dose(self, dose: float) -> None:
        """Change the dose in place, without detaching; 0 is exactly the model without it."""
        ...


class Recipe(Protocol):
    """The five verbs of one kind of packet, and the codec of its facts."""

    kind: str

    def read_facts(self, value: canonical.Json) -> Facts:
        """Read the facts of this kind from a statement."""
        ...

    def extract(self, donor: Donor, plan: Plan) -> Extract:
        """Train at the donor; write the payload and return it with its facts."""
        ...

    def check(self, statement: Declaration, model_card: ModelCard) -> Verdict:
        """Judge a statement against a model, before the payload is opened."""
        ...

    def fit(self, payload: Payload, recipient: Recipient) -> Attachment:
        """Read the payload strictly against the recipient's model."""
        ...

    def attach(self, attachment: Attachment, model: Any) -> Handle:
        """Put an attachment on a model at the attachment's dose."""
        ...

    def detach(self, handle: Handle) -> None:
        """Take it off; the model's state is then bit-equal to never having had it."""
        ...


def load_recipe(kind: str, allowed: frozenset[str] = BUILT_IN_KINDS) -> Recipe:
    """The recipe of a kind.

    The kind may come from a packet, hence the allow-list: it selects among entry points that the
    operator installed *and* allowed, and is never used as a module path.

    Raises:
        RejectedError: AG-RCP-001 if the kind is not allowed or no installed package provides it.
    """
    if kind not in allowed:
        raise RejectedError("AG-RCP-001", f"kind {kind[:40]!r} is not in this site's allow-list")
    found = [entry for entry in entry_points(group="allograft.recipes") if entry.name == kind]
    if len(found) != 1:
        raise RejectedError("AG-RCP-001", f"{len(found)} installed packages provide kind {kind!r}")
    recipe: Recipe = found[0].load()()
    if recipe.kind != kind:
        raise RejectedError("AG-RCP-001", f"the recipe registered for {kind!r} is of another kind")
    return recipe


def check_base(statement: Declaration, facts: Facts, card: ModelCard) -> Verdict:
    """The rule that all weight-carrying kinds share: one base, or one lineage, or nothing.

    Equal shapes prove nothing: on an independent seed of the same architecture a copied change
    recovered 0 % of its gain, and pasted blocks did harm. So shape is necessary, never sufficient.
    """
    needs = ("validation_text", "retention_text")
    difference = _difference(facts.shape, card.shape)
    if difference:
        return Verdict("refuse", f"the models differ in {difference}", "AG-RCP-010")
    if statement.tokenizer_digest != card.tokenizer_digest:
        return Verdict("refuse", "the models differ in their tokenizer", "AG-RCP-011")
    if statement.base_weights_digest == card.weights_digest:
        return Verdict("exact", "made on exactly this base", needs=needs)
    cosine = card.lineage_cosine
    if cosine is None:
        reason = "another snapshot of this shape, and its lineage has not been tested"
        return Verdict("refuse", reason, "AG-RCP-012", needs=("lineage_test",))
    numbers = {"lineage_cosine": cosine, "threshold": LINEAGE_COSINE}
    # Written so that NaN refuses.
    if not cosine >= LINEAGE_COSINE:
        reason = f"same shape, other lineage (cosine {cosine:.3f} < {LINEAGE_COSINE})"
        return Verdict("refuse", reason, "AG-RCP-013", numbers)
    return Verdict("lineage", "a relative of the base it was made on", "", numbers, needs)


def check_tokenizer(
    statement: Declaration, facts: Facts, card: ModelCard, *, needs_base: bool
) -> Verdict:
    """The rule of kinds that run beside a model: one tokenizer, and the base if they name one.

    Args:
        statement: What the packet says about itself.
        facts: Its facts; their shape is that of the donor's model.
        card: The recipient's model.
        needs_base: Whether the donor's base itself must be at the recipient's site.
    """
    digests = statement.tokenizer_digest, facts.shape.vocab
    if digests != (card.tokenizer_digest, card.shape.vocab):
        return Verdict("refuse", "the models differ in their tokenizer", "AG-RCP-011")
    base = statement.base_weights_digest
    if needs_base and base not in card.bases | {card.weights_digest}:
        reason = f"this site has no model with the weights {base[:16]}"
        return Verdict("refuse", reason, "AG-RCP-014")
    # On its own base the same knowledge would cost less as a change of weights.
    numbers = {"own_base": float(base == card.weights_digest)}
    needs = ("validation_text", "retention_text")
    return Verdict("behavioural", "works beside any model of this tokenizer", "", numbers, needs)


def _difference(ours: ModelShape, theirs: ModelShape) -> str:
    """Name the first field in which two shapes differ, or nothing."""
    for name in ModelShape.__dataclass_fields__:
        if getattr(ours, name) != getattr(theirs, name):
            return name
    return ""
