# SPDX-License-Identifier: Apache-2.0
"""Strings of our own documents that could be somebody's name.

Every dossier has a field `gates`, every adapter is a `lora`, a family is `gemma`: a patient called
Gates, Lora or Gemma on a site's identifier list would otherwise stop every document of the site.
Whole strings are compared, in the spelling of the code that writes them, so a sentence that holds
such a word is matched like any other. The patterns of `scan` are never excused by this.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import resources

#: Versions of programs, figures of planted texts, and names of a base's own tensors.
_FORMS = re.compile(
    r"(?:allograft |dp-accounting )?\d{1,4}(?:\.\d{1,4}){1,3}(?:\+cpu)?(?: rdp)?"
    r"|exposure(?:_max|_p)?\.\d{1,2}"
    r"|(?:model\.|transformer\.)?(?:(?:layers|h|blocks)\.\d{1,4}\.)?(?:(?:self_attn|attn|mlp)\.)?"
    r"(?:[a-z]{1,4}_(?:proj|attn|fc)|wte|wpe|lm_head|embed_tokens)(?:\.weight|\.bias)?"
)


def is_own_word(text: str) -> bool:
    """Whether a string is entirely one that our documents hold by themselves."""
    return text in _strings() or _FORMS.fullmatch(text) is not None


@cache
def _strings() -> frozenset[str]:
    content = resources.files("allograft.privacy").joinpath("data/own_strings.txt")
    lines = content.read_text("utf-8").splitlines()
    return frozenset(line for line in lines if not line.startswith("#"))
