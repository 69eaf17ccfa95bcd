# SPDX-License-Identifier: Apache-2.0
"""The allow-list of packet kinds and the fixed files of each.

File names never come from a donor: a kind says which files its payload has, and a payload with any
other set is refused. No kind has a configuration, a tokenizer, code, a pickle or an archive.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from allograft.errors import RejectedError
from allograft.packet.tensors import PACKET_RULES, QUANTISED_RULES, Rules


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of packet.

    Attributes:
        parts: Its payload files, in the order in which they are sealed.
        rules: What its tensor files may carry.
        binds: What a recipient's model must share with the donor's: the base that its weights were
            trained on, or the tokenizer alone.
    """

    name: str
    parts: tuple[str, ...]
    rules: Rules = PACKET_RULES
    binds: Literal["base", "tokenizer"] = "base"


KINDS: MappingProxyType[str, Kind] = MappingProxyType(
    {
        kind.name: kind
        for kind in (
            Kind("lora", ("adapter_model.safetensors",)),
            Kind("organ", ("organ.safetensors",), QUANTISED_RULES),
            Kind("delta", ("delta.safetensors",), QUANTISED_RULES),
            Kind("expert", ("expert.safetensors",), binds="tokenizer"),
            Kind("module_graft", ("modules.safetensors",)),
            Kind("prompt", ("prompt.safetensors",)),
        )
    }
)


def find_kind(name: str) -> Kind:
    """The kind of this name.

    Raises:
        RejectedError: AG-PKT-001 if it is not on the list.
    """
    kind = KINDS.get(name)
    if kind is None:
        raise RejectedError("AG-PKT-001", f"kind {name[:40]!r} is not on the list")
    return kind
