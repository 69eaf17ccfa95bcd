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


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of packet and its payload files, in the order in which they are sealed.

    `binds` says what a recipient's model must share with the donor's: the base its weights were
    trained on, or the tokenizer alone.
    """

    name: str
    parts: tuple[str, ...]
    binds: Literal["base", "tokenizer"] = "base"


KINDS: MappingProxyType[str, Kind] = MappingProxyType(
    {
        kind.name: kind
        for kind in (
            Kind("lora", ("adapter_model.safetensors",)),
            Kind("organ", ("organ.safetensors",)),
            Kind("expert", ("expert.safetensors",), binds="tokenizer"),
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
