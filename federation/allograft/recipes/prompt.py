# SPDX-License-Identifier: Apache-2.0
"""The prompt: a few trained vectors that stand before every text, as PEFT's prompt tuning has them.

They enter where token embeddings do. The model stays a stock one with two hooks on its trunk: one
puts the vectors before the first tokens, moves positions and widens the attention mask; the other
takes their outputs away again, so that logits stand beside the tokens they belong to. With a cache
the vectors are in it, and later steps only count them. So `generate`, batches and padding work as
they are, and whatever the hooks cannot serve is refused instead of being computed wrongly.

A prompt has no half dose: vectors of half the size attend and are attended to like whole ones,
since every block normalises them, and even vectors of size zero take part. It is there or not. See
protos/spec/recipes.md.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from safetensors.torch import save
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from allograft.crypto import canonical
from allograft.durable import durable_write
from allograft.errors import RejectedError
from allograft.recipes import blocks as surgery
from allograft.recipes.attachment import DTYPES, read_tensors
from allograft.recipes.base import (
    Attachment,
    Declaration,
    Donor,
    Extract,
    ModelCard,
    Payload,
    Plan,
    Recipient,
    Verdict,
)
from allograft.recipes.facts import PromptFacts, check_statement
from allograft.recipes.loop import SNAPSHOT, train
from allograft.recipes.mixture import PROMPT_VECTORS
from allograft.recipes.patch import PROMPT_OWNER, has_attachments
from allograft.recipes.plan import LoopPlan, PromptPlan
from allograft.recipes.shortage import memory_errors

PAYLOAD = "prompt.safetensors"

#: The one tensor, by PEFT's name for it.
TENSOR = "prompt_embeddings"

#: A prompt is there or it is not.
PROMPT_DOSES = (1.0,)


class PromptHandle:
    """A prompt at work: vectors before the text of a model."""

    def __init__(
        self, attachment: Attachment, model: PreTrainedModel, seat: _Seat | None = None
    ) -> None:
        self.attachment = attachment
        self.model = model
        self.seat = seat

    def set_dose(self, dose: float) -> None:
        """Put the vectors before the text, or take them away.

        Raises:
            RejectedError: AG-RCP-021 unless the dose is 0 or 1, AG-RCP-023 after detaching.
            UnavailableError: AG-RCP-027 if memory runs out; the dose is then as before.
        """
        if _owner_of(self.model) != self.attachment.attachment_id:
            raise RejectedError("AG-RCP-023", "the attachment is not on this model")
        _check_dose(dose)
        # Vectors that are there stay: they are the same at every dose that has any.
        if dose == 1.0 and self.seat is None:
            self.seat = _take_seat(self.model, self.attachment)
        elif dose == 0.0 and self.seat is not None:
            self.seat.leave()
            self.seat = None
        self.attachment = replace(self.attachment, dose=dose)


class PromptRecipe:
    """Makes, fits, applies and removes prompts."""

    kind = "prompt"
    read_facts = staticmethod(PromptFacts.from_json)

    def extract(self, donor: Donor, plan: Plan) -> Extract:
        """Train vectors before the frozen base and write them.

        Raises:
            RejectedError: AG-RCP-022 if the model already carries attachments, AG-RCP-035 for
                another kind's plan or a number of vectors out of range, AG-RCP-036 if windows and
                vectors do not fit into the base's positions, and those of `train`.
        """
        model, recipe = donor.model, plan.recipe
        if not isinstance(recipe, PromptPlan):
            raise RejectedError("AG-RCP-035", "a prompt needs a prompt plan")
        if has_attachments(model):
            raise RejectedError("AG-RCP-022", "a prompt is trained on the plain base")
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        shape = surgery.describe_model(model.config)
        facts = PromptFacts(shape, recipe.check().virtual_tokens, dtype)
        with _growing(model, facts.virtual_tokens, plan.loop) as vectors:
            report = _train_vectors(donor, plan, vectors)
        value = vectors.detach().to("cpu", DTYPES[dtype]).contiguous()
        path = donor.workdir / PAYLOAD
        durable_write(path, save({TENSOR: value}))
        (donor.workdir / SNAPSHOT).unlink(missing_ok=True)
        return Extract(self.kind, (path,), facts, report)

    def check(self, statement: Declaration, model_card: ModelCard) -> Verdict:
        """Accept prompts made on exactly this base: a relative reads its vectors another way."""
        return check_statement(statement, model_card)

    def fit(self, payload: Payload, recipient: Recipient) -> Attachment:
        """Read a prompt strictly.

        Raises:
            RejectedError: AG-RCP-002 or AG-RCP-010 if the facts do not fit, AG-RCP-003 if the
                tensor does not.
        """
        facts = PromptFacts.from_json(dict(payload.facts))
        if surgery.base_shape(recipient.model) != facts.shape:
            raise RejectedError("AG-RCP-010", "the prompt was made on a model of another shape")
        expected = {TENSOR: (facts.virtual_tokens, facts.shape.hidden)}
        tensors = read_tensors(payload.directory / PAYLOAD, expected, DTYPES[facts.dtype])
        return Attachment(self.kind, payload.packet_id, facts, tensors, doses=PROMPT_DOSES)

    def attach(self, attachment: Attachment, model: PreTrainedModel) -> PromptHandle:
        """Put a prompt before a model's text.

        Raises:
            RejectedError: AG-RCP-010 for another model, AG-RCP-021 unless the dose is 0 or 1,
                AG-RCP-023 if it is already attached, AG-RCP-036 if another prompt is.
            UnavailableError: AG-RCP-027 if memory runs out; the model is then as before.
        """
        if surgery.base_shape(model) != attachment.facts.shape:
            raise RejectedError("AG-RCP-010", "the prompt was made on a model of another shape")
        _check_dose(attachment.dose)
        owner = _owner_of(model)
        if owner == attachment.attachment_id:
            raise RejectedError("AG-RCP-023", "the attachment is already on this model")
        if owner:
            # Both were trained to be the first thing before the text.
            raise RejectedError("AG-RCP-036", "another prompt is on this model")
        seat = _take_seat(model, attachment) if attachment.dose else None
        setattr(_trunk(model), PROMPT_OWNER, attachment.attachment_id)
        return PromptHandle(attachment, model, seat)

    def detach(self, handle: PromptHandle) -> None:
        """Take a prompt away.

        Raises:
            RejectedError: AG-RCP-023 if it is not attached.
        """
        if _owner_of(handle.model) != handle.attachment.attachment_id:
            raise RejectedError("AG-RCP-023", "the attachment is not on this model")
        if handle.seat is not None:
            handle.seat.leave()
            handle.seat = None
        delattr(_trunk(handle.model), PROMPT_OWNER)


def _check_dose(dose: float) -> None:
    if dose not in {0.0, 1.0}:
        raise RejectedError("AG-RCP-021", "a prompt is there or not: its dose is 0 or 1")


def _trunk(model: PreTrainedModel) -> nn.Module:
    trunk: nn.Module = getattr(model, surgery.find_family(model.config).trunk)
    return trunk


def _owner_of(model: PreTrainedModel) -> str:
    return getattr(_trunk(model), PROMPT_OWNER, "")


def _take_seat(model: PreTrainedModel, attachment: Attachment) -> _Seat:
    with memory_errors("putting a prompt on a model"):
        return _Seat.take(model, attachment.tensors[TENSOR])


@dataclass(slots=True, eq=False)
class _Seat:
    """Vectors in a model's trunk, with the two hooks that serve them."""

    trunk: nn.Module
    embed: nn.Module
    positions: int  # 0 where the family has no last position
    hooks: list[RemovableHandle] = field(default_factory=list)
    added: int = 0  # vectors in the present pass
    padding: torch.Tensor | None = None  # of the present pass

    @classmethod
    def take(cls, model: PreTrainedModel, vectors: torch.Tensor) -> _Seat:
        """Put vectors [count, hidden] into a model; a parameter stays one and can learn."""
        trunk = _trunk(model)
        limit = 0 if surgery.base_shape(model).rope else model.config.max_position_embeddings
        seat = cls(trunk, model.get_input_embeddings(), limit)
        if isinstance(vectors, nn.Parameter):
            trunk.register_parameter(PROMPT_VECTORS, vectors)
        else:
            trunk.register_buffer(PROMPT_VECTORS, vectors.to(model.device, model.dtype, copy=True))
        seat.hooks = [
            trunk.register_forward_pre_hook(seat.before, with_kwargs=True),
            trunk.register_forward_hook(seat.after),
        ]
        return seat

    def leave(self) -> None:
        """Take vectors and hooks out again."""
        for hook in self.hooks:
            hook.remove()
        delattr(self.trunk, PROMPT_VECTORS)

    def before(
        self, trunk: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]]:
        """Put the vectors before the tokens of a first pass; in later ones only count them."""
        given = dict(inspect.signature(trunk.forward).bind_partial(*args, **kwargs).arguments)
        given.update(given.pop("kwargs", {}))
        vectors: torch.Tensor = getattr(trunk, PROMPT_VECTORS)
        count = len(vectors)
        tokens, embedded = given.pop("input_ids", None), given.get("inputs_embeds")
        if embedded is None:
            embedded = self.embed(tokens)
        rows, length = embedded.shape[:2]
        cache = given.get("cache", given.get("past_key_values"))
        past = 0 if cache is None else int(cache.get_seq_length())
        mask = given.get("attention_mask")
        # A static cache has no room for the vectors, and makes its masks without them.
        fixed = getattr(cache, "is_compileable", False) or not (mask is None or _is_flat(mask))
        if fixed or given.get("token_type_ids") is not None:
            raise RejectedError("AG-RCP-036", "a prompt serves token masks and growing caches only")
        places, so_far = given.get("position_ids"), max(past - count, 0)
        # For one, `generate` given a cache: it would skip as many tokens as there are vectors,
        # because it takes all that is in the cache for text. It leaves out masks without padding.
        if mask is not None:
            known = mask.shape[1] == so_far + length
        else:
            known = places is None or not past or bool((places[:, 0] == so_far).all())
        if not known:
            raise RejectedError("AG-RCP-036", "the cache holds other text than the mask says")
        if self.positions and max(past, count) + length > self.positions:
            raise RejectedError("AG-RCP-036", f"text and vectors exceed {self.positions} positions")
        self.added = 0 if past else count
        self.padding = None if mask is None else _leading_zeros(mask)
        if mask is not None:
            wider = torch.cat([mask.new_ones(rows, count), mask], dim=1)
            given["attention_mask"] = self._move_behind_padding(wider, count)
        if places is not None:
            first = torch.arange(self.added, device=places.device).expand(rows, -1)
            after = (places + count).expand(rows, -1)
            joined = torch.cat([first, after], dim=1)
            given["position_ids"] = self._move_behind_padding(joined, self.added)
        if self.added:
            front = vectors.to(embedded.dtype).expand(rows, -1, -1)
            embedded = self._move_behind_padding(torch.cat([front, embedded], dim=1), count)
        given["inputs_embeds"] = embedded
        return (), given

    def after(self, _trunk: nn.Module, _args: object, output: Any) -> Any:
        """Take the outputs of the vectors away."""
        if self.added:
            states = output.last_hidden_state
            slots = torch.arange(states.shape[1] - self.added, device=states.device)
            if self.padding is None:
                output.last_hidden_state = states[:, self.added :]
            else:
                slots = torch.where(slots < self.padding, slots, slots + self.added)
                output.last_hidden_state = torch.take_along_dim(states, slots[..., None], dim=1)
        return output

    def _move_behind_padding(self, value: torch.Tensor, count: int) -> torch.Tensor:
        """Let the first `count` entries of each row stand right before its text.

        In front of the padding they would leave a sliding window earlier than without padding.
        """
        if self.padding is None or not count:
            return value
        slots = torch.arange(value.shape[1], device=value.device)
        inside = torch.where(slots < self.padding + count, slots - self.padding, slots)
        order = torch.where(slots < self.padding, slots + count, inside)
        return torch.take_along_dim(value, order if value.ndim == 2 else order[..., None], dim=1)


def _leading_zeros(mask: torch.Tensor) -> torch.Tensor | None:
    """How many entries of padding each row begins with, [rows, 1]; None if no row does."""
    leading = (mask.cumsum(dim=1) == 0).sum(dim=1, keepdim=True)
    return leading if bool(leading.any()) else None


def _is_flat(mask: object) -> bool:
    return isinstance(mask, torch.Tensor) and mask.ndim == 2


@contextlib.contextmanager
def _growing(model: PreTrainedModel, count: int, plan: LoopPlan) -> Iterator[nn.Parameter]:
    """The base with vectors before its text, which alone can learn; the plain base afterwards.

    They begin as the embeddings of random tokens, which served small models better than random
    vectors in the paper that introduced them (Lester et al. 2021, arXiv 2104.08691).
    """
    learning = [(value, value.requires_grad) for value in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    generator = torch.Generator().manual_seed(plan.seed)
    tokens = torch.randint(model.config.vocab_size, (count,), generator=generator)
    with torch.no_grad():
        start = model.get_input_embeddings()(tokens.to(model.device))
    for value, _ in learning:
        value.requires_grad_(False)
    vectors = nn.Parameter(start.detach().float())
    model.eval()
    seat = _Seat.take(model, vectors)
    try:
        with surgery.checkpointed(model, plan.checkpointing):
            yield vectors
    finally:
        seat.leave()
        for value, flag in learning:
            value.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


def _train_vectors(donor: Donor, plan: Plan, vectors: nn.Parameter) -> dict[str, canonical.Json]:
    def forward(_numbers: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = donor.model(input_ids=tokens, use_cache=False).logits
        return logits

    training = train(
        forward,
        {TENSOR: vectors},
        donor.windows,
        # Decay pulls towards the zero vector, which is no prompt at all, not towards the base.
        replace(plan.loop, weight_decay=0.0),
        private=plan.private,
        model=donor.model,
        private_way=donor.private_way,
        snapshot=donor.workdir / SNAPSHOT,
        progress=donor.progress,
    )
    return {
        "trainable_parameters": vectors.numel(),
        "first_loss": training.losses[0],
        "last_loss": training.losses[-1],
        "seconds": round(training.seconds, 3),
        "resumed_at": training.resumed_at,
        "noise": training.noise,
    }
