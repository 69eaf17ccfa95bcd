# SPDX-License-Identifier: Apache-2.0
"""The settings of a LoRA adapter, and the PEFT configuration rebuilt from them.

A donor's `adapter_config.json` never travels: PEFT configurations name classes, files and hub
repositories. The signed statement carries three typed values; the recipient writes the rest.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from allograft.crypto import canonical
from allograft.errors import RejectedError

CONFIG_NAME = "adapter_config.json"

_MODULE = re.compile(r"[A-Za-z0-9_]{1,64}")
# Names under which embeddings and output heads are known. Their changed rows tell which tokens
# occurred in the donor's text, so no adapter may touch them.
_TOKEN_MODULES = frozenset(
    {"embed_tokens", "lm_head", "wte", "wpe", "embeddings", "word_embeddings", "embed_out"}
)
# Families that store their matrices input-first (Conv1D).
_TRANSPOSED_FAMILIES = frozenset({"gpt2"})
_MAX_RANK = 512
_MAX_ALPHA = 4096.0
_MAX_MODULES = 64


@dataclass(frozen=True, slots=True)
class AdapterSettings:
    """Rank, scale and the linear modules that an adapter changes.

    Attributes:
        rank: Rank of each low-rank change.
        alpha: The change is scaled by alpha / rank.
        target_modules: Last components of module names, such as `q_proj`.
    """

    rank: int
    alpha: float
    target_modules: tuple[str, ...]


def read_adapter_settings(facts: Mapping[str, canonical.Json]) -> AdapterSettings:
    """Read and bound the settings in the facts of a `lora` statement; other facts are ignored.

    Raises:
        RejectedError: AG-PKT-009 if a setting is missing, malformed or out of bounds.
    """
    try:
        settings = AdapterSettings(
            rank=canonical.as_int(facts.get("rank")),
            alpha=canonical.as_number(facts.get("alpha")),
            target_modules=tuple(
                canonical.as_text(name) for name in canonical.as_list(facts.get("target_modules"))
            ),
        )
    except RejectedError as error:
        raise RejectedError("AG-PKT-009", f"adapter settings: {error.cause}") from error
    return check_adapter_settings(settings)


def check_adapter_settings(settings: AdapterSettings) -> AdapterSettings:
    """Return the settings if they are within bounds.

    Raises:
        RejectedError: AG-PKT-009.
    """
    modules = settings.target_modules
    if not 1 <= settings.rank <= _MAX_RANK or not 0 < settings.alpha <= _MAX_ALPHA:
        raise RejectedError("AG-PKT-009", "rank or alpha of an adapter is out of bounds")
    if not 1 <= len(modules) <= _MAX_MODULES or len(set(modules)) != len(modules):
        raise RejectedError("AG-PKT-009", "an adapter names no modules, too many, or one twice")
    for name in modules:
        # PEFT reads a lone string as a regular expression; names are plain words in a list.
        if not _MODULE.fullmatch(name) or name in _TOKEN_MODULES:
            raise RejectedError("AG-PKT-009", "an adapter names a module that is not allowed")
    return settings


def is_transposed(family: str) -> bool:
    """Whether a model family stores its matrices input-first, which PEFT has to be told."""
    return family in _TRANSPOSED_FAMILIES


def render_adapter_config(
    settings: AdapterSettings,
    base_model: str = "",
    *,
    transposed: bool = False,
    ranks: Mapping[str, int] | None = None,
) -> bytes:
    """Write the configuration that `PeftModel.from_pretrained` reads.

    Args:
        settings: Checked settings.
        base_model: The recipient's own name or path of its base; empty leaves it open.
        transposed: As `is_transposed` says for the base.
        ranks: Modules, by their full names, whose rank is another; their scale is one.
    """
    pattern = dict(ranks or {})
    document: dict[str, object] = {
        "alpha_pattern": pattern,
        "auto_mapping": None,
        "base_model_name_or_path": base_model or None,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": settings.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": settings.rank,
        "rank_pattern": pattern,
        "target_modules": sorted(settings.target_modules),
        "task_type": "CAUSAL_LM",
        "use_rslora": False,
    }
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode("utf-8")
