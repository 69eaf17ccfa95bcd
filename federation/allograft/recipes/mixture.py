# SPDX-License-Identifier: Apache-2.0
"""Small models that speak beside a large one: their words are mixed at every token.

The recipient stays a stock model. A hook on its forward pass runs each expert on the same tokens
and replaces the logits by the log-probabilities of the mixture, so that `generate`, pipelines and
measurements work as ever, and taking the last expert off takes the hook off: no weight was written.

    ensemble    p(x) = (1 - dose) p_recipient(x) + dose p_expert(x)
    difference  log p(x) = log p_recipient(x) + dose (log p_expert(x) - log p_base(x)), normalised

where p_base is the model the expert was trained from (proxy tuning, arXiv 2401.08565). Where the
expert's likeliest token has less than the probability `gate`, it is unsure, and the recipient
speaks alone; so it does beyond the positions that the expert knows. Several experts are mixed in
one after the other, in ascending order of their ids, so the result depends on the set alone.

Each expert has a key-value cache of its own. It hangs on the recipient's cache and goes wherever
that goes: a cache without it, or of another length, is refused rather than read. So is a static
cache: generation then hands down a mask made for the recipient's own layers.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.utils import ModelOutput

from allograft.errors import RejectedError

_MIXTURE = "allograft_mixture"
_COMPANIONS = "allograft_companions"

#: Where a prompt's vectors are while they are on a model's trunk: in its state, so that its digest
#: tells.
PROMPT_VECTORS = "allograft_prompt"

#: What transformers calls a cache, since 5.24 and before.
_CACHE_NAMES = ("cache", "past_key_values")

#: What reorders, repeats or shortens a cache; companions must follow.
_MOVES = ("reorder_cache", "batch_select_indices", "batch_repeat_interleave", "crop", "reset")


@dataclass(slots=True, eq=False)
class Expert:
    """A model that speaks beside another.

    Attributes:
        model: Frozen, with the vocabulary of the model it speaks beside.
        base: What it was trained from, for a difference; None for an ensemble.
        dose: 0 to 1; at 0 it is not run and logits pass untouched.
        gate: Probability that its likeliest token must reach to be heard.
    """

    model: PreTrainedModel
    base: PreTrainedModel | None
    dose: float
    gate: float

    @property
    def positions(self) -> int:
        """How many tokens of a text it can see."""
        return int(self.model.config.max_position_embeddings)


@dataclass(slots=True, eq=False)
class _Mixture:
    """The experts beside one model, by id, and the hook that runs them."""

    experts: dict[str, Expert] = field(default_factory=dict)
    hook: RemovableHandle | None = None

    def __call__(
        self, module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any], output: Any
    ) -> Any:
        active = {key: e for key, e in sorted(self.experts.items()) if e.dose > 0.0}
        if not active:
            return output
        call = _Call(inputs, named, output, _count_virtual(module))
        logits = output.logits
        for key, expert in active.items():
            logits = _mix_in(key, expert, call, logits)
        output.logits = logits
        if output.get("loss") is not None:
            # The model computed it from its own words alone.
            loss_of: Any = module.loss_function
            labels, config = named["labels"], module.config
            output.loss = loss_of(logits=logits, labels=labels, vocab_size=config.vocab_size)  # type: ignore[union-attr]
        return output


class _Call:
    """One forward pass of the recipient: what went in, and the caches of what spoke beside it."""

    def __init__(
        self, inputs: tuple[Any, ...], named: Mapping[str, Any], output: Any, virtual: int
    ) -> None:
        ids = inputs[0] if inputs else named.get("input_ids")
        mask = named.get("attention_mask")
        if not isinstance(ids, torch.Tensor) or not isinstance(output, ModelOutput):
            raise RejectedError("AG-RCP-025", "the model was not called with token ids and by name")
        if mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2):
            raise RejectedError("AG-RCP-025", "the mask is not one row per text")
        self.ids, self.mask, self.positions = ids, mask, named.get("position_ids")
        self.kept = named.get("logits_to_keep") or 0
        names = [name for name in _CACHE_NAMES if name in output]
        self.cache: Cache | None = output[names[0]] if names else None
        # Vectors of a prompt are in the recipient's cache, and are no tokens to an expert.
        held = 0 if self.cache is None else int(self.cache.get_seq_length()) - virtual
        self.seen = 0 if self.cache is None else held - ids.shape[1]

    def run(self, name: str, model: PreTrainedModel, most: int) -> torch.Tensor:
        """Logits of another model for the same tokens, or for the first `most` of them."""
        if model.device != self.ids.device:
            model.to(self.ids.device)
        cache = None if self.cache is None else self._companion(name, model)
        cut = slice(None, most)
        found = model(
            input_ids=self.ids[:, cut],
            attention_mask=None if self.mask is None else self.mask[:, : self.seen + most],
            position_ids=None if self.positions is None else self.positions[:, cut],
            use_cache=cache is not None,
            logits_to_keep=self.kept,
            **{_cache_name(model): cache},
        )
        logits: torch.Tensor = found.logits
        return logits

    def _companion(self, name: str, model: PreTrainedModel) -> Cache:
        assert self.cache is not None
        companions: dict[str, Cache] | None = vars(self.cache).get(_COMPANIONS)
        if companions is None:
            companions = {}
            _hang(self.cache, companions)
        cache = companions.setdefault(name, DynamicCache(config=model.config))
        if int(cache.get_seq_length()) != self.seen:
            raise RejectedError("AG-RCP-025", "the cache began before the expert came")
        return cache


def _count_virtual(module: nn.Module) -> int:
    """How many vectors a prompt has before the text of a model."""
    vectors = getattr(module.base_model, PROMPT_VECTORS, None)
    return len(vectors) if isinstance(vectors, torch.Tensor) else 0


def _cache_name(model: PreTrainedModel) -> str:
    known = inspect.signature(model.forward).parameters
    return next(name for name in _CACHE_NAMES if name in known)


def _mix_in(key: str, expert: Expert, call: _Call, logits: torch.Tensor) -> torch.Tensor:
    """Mix one expert into logits [b, t, vocabulary], as far as it knows the positions."""
    length = call.ids.shape[1]
    most = max(0, min(length, expert.positions - call.seen))
    # A text that outgrows the expert is the recipient's alone from there on; where only the last
    # logits are asked for, they are beyond.
    if most == 0 or (most < length and not (isinstance(call.kept, int) and call.kept == 0)):
        return logits
    theirs = call.run(key, expert.model, most)
    base = None if expert.base is None else call.run(f"{key}/base", expert.base, most)
    mixed = mix(logits[:, :most] if most < length else logits, theirs, base, expert)
    return torch.cat([mixed, logits[:, most:].float()], 1) if most < length else mixed


def mix(
    ours: torch.Tensor, theirs: torch.Tensor, base: torch.Tensor | None, expert: Expert
) -> torch.Tensor:
    """Log-probabilities of a mixture, float32, [..., vocabulary].

    Args:
        ours: Logits of the recipient.
        theirs: Logits of the expert.
        base: Logits of what the expert was trained from, for a difference.
        expert: Dose and gate.
    """
    dose = expert.dose
    ours, theirs = (value.float().log_softmax(dim=-1) for value in (ours, theirs))
    if base is not None:
        mixed = (ours + dose * (theirs - base.float().log_softmax(dim=-1))).log_softmax(dim=-1)
    elif dose == 1.0:
        mixed = theirs
    else:
        mixed = torch.logaddexp(ours + math.log1p(-dose), theirs + math.log(dose))
    if expert.gate > 0.0:
        unsure = theirs.amax(dim=-1, keepdim=True) < math.log(expert.gate)
        mixed = torch.where(unsure, ours, mixed)
    return mixed


def _hang(cache: Cache, companions: dict[str, Cache]) -> None:
    """Let companions follow whatever is done to a cache."""
    setattr(cache, _COMPANIONS, companions)
    for name in _MOVES:
        setattr(cache, name, functools.partial(_move, getattr(cache, name), name, companions))


def _move(own: Any, name: str, companions: Mapping[str, Cache], *inputs: Any, **named: Any) -> None:
    own(*inputs, **named)
    for companion in companions.values():
        getattr(companion, name)(*inputs, **named)


def add_expert(model: PreTrainedModel, key: str, expert: Expert) -> None:
    """Let an expert speak beside a model.

    Raises:
        RejectedError: AG-RCP-021 for a bad dose, AG-RCP-023 if one of this id does already.
    """
    _check_dose(expert.dose)
    mixture: _Mixture = vars(model).get(_MIXTURE) or _Mixture()
    if key in mixture.experts:
        raise RejectedError("AG-RCP-023", "the attachment is already on this model")
    mixture.experts[key] = expert
    if mixture.hook is None:
        mixture.hook = model.register_forward_hook(mixture, with_kwargs=True)
        setattr(model, _MIXTURE, mixture)


def remove_expert(model: PreTrainedModel, key: str) -> None:
    """Let it speak no more; with the last one the hook goes too.

    Raises:
        RejectedError: AG-RCP-023 if none of this id does.
    """
    mixture = _mixture_with(model, key)
    del mixture.experts[key]
    if not mixture.experts:
        assert mixture.hook is not None
        mixture.hook.remove()
        delattr(model, _MIXTURE)


def set_expert_dose(model: PreTrainedModel, key: str, dose: float) -> None:
    """Change the weight of its words.

    Raises:
        RejectedError: AG-RCP-021 for a bad dose, AG-RCP-023 if none of this id is there.
    """
    _check_dose(dose)
    _mixture_with(model, key).experts[key].dose = dose


def has_experts(model: nn.Module) -> bool:
    """Whether anything speaks beside a model."""
    return _MIXTURE in vars(model)


def _mixture_with(model: PreTrainedModel, key: str) -> _Mixture:
    mixture: _Mixture | None = vars(model).get(_MIXTURE)
    if mixture is None or key not in mixture.experts:
        raise RejectedError("AG-RCP-023", "the attachment is not on this model")
    return mixture


def _check_dose(dose: float) -> None:
    if not 0.0 <= dose <= 1.0:
        raise RejectedError("AG-RCP-021", "a dose lies between 0 and 1")
