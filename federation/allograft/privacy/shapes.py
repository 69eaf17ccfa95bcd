# SPDX-License-Identifier: Apache-2.0
"""Which tensors a packet of each kind may hold, worked out from the base model's own files.

The allow-list must not come from whoever made the payload. It follows from the headers of the
base's safetensors files and a few small numbers of the plan (which blocks, which rank), so a
smuggled tensor has no name to hide under. No tensor library is needed and no payload is read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from allograft.crypto import canonical
from allograft.errors import RejectedError
from allograft.packet.adapter import AdapterSettings, read_adapter_settings
from allograft.packet.delta import EMBEDDING, HEAD, read_delta_layout
from allograft.packet.kinds import find_kind
from allograft.packet.organ import ORGAN_BITS, organ_layout
from allograft.packet.tensors import LOCAL_RULES, TensorEntry, read_table, read_tensor
from allograft.privacy.egress import AllowedTensor, AllowList

#: A tensor may be this many times larger (root mean square) than its counterpart in the base.
RMS_FACTOR = 10.0
#: Counterparts smaller than this, such as biases that start at zero, count as this large.
RMS_FLOOR = 0.1
#: The floor of a norm's gain. Gemma stores it less one: a base near zero has a gain near one, and
#: an organ's gain begins at the stored -1, exactly on the ceiling that the other floor would set.
GAIN_FLOOR = 1.0

_BLOCK = re.compile(r"(?:.+\.)?(?:layers|h)\.(\d{1,5})\.([A-Za-z0-9_.]{1,128})")
# GPT-2 files carry the causal mask as a tensor; it is a constant and no part of a block.
_CONSTANTS = re.compile(r"attn\.(?:masked_)?bias|(?:.+\.)?rotary_emb\.inv_freq")
_EMBEDDINGS = ("model.embed_tokens.weight", "transformer.wte.weight")
_HEAD = "lm_head.weight"
_OTHER = re.compile(
    r"(?:.+\.)?((?:embed_tokens|wte|wpe|norm)\.weight|ln_f\.(?:weight|bias)|lm_head\.weight)"
)
# One spelling of each number: of two the choice could carry a message.
_GRAFTED = re.compile(r"blocks\.(0|[1-9][0-9]{0,4})\.([a-z0-9_.]{1,64})")
_GAIN = re.compile(r"(?:.+\.)?(?:[a-z_]*norm|ln_[\df])\.weight")
_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class BaseTensors:
    """The tensors of a base model.

    Attributes:
        blocks: For each block, its tensors by their name inside the block.
        transposed: Whether matrices are stored input-first (GPT-2's Conv1D).
        others: Embeddings, last norm and head, by the name that transformers gives them.
    """

    blocks: tuple[Mapping[str, BaseTensor], ...]
    transposed: bool
    others: Mapping[str, BaseTensor]

    @property
    def trunk(self) -> str:
        """What transformers puts before a block's number."""
        return "transformer.h" if self.transposed else "model.layers"

    @property
    def tokens(self) -> dict[str, BaseTensor]:
        """The matrices over the vocabulary, by what a delta calls them."""
        named = dict.fromkeys(_EMBEDDINGS, EMBEDDING) | {_HEAD: HEAD}
        return {named[n]: tensor for n, tensor in self.others.items() if n in named}


@dataclass(frozen=True, slots=True)
class BaseTensor:
    """Where one tensor of the base lies."""

    path: Path
    entry: TensorEntry

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.entry.shape

    def rms(self) -> float:
        """Root mean square of its values."""
        with self.path.open("rb") as handle:
            values = read_tensor(handle, self.entry).ravel()
        return math.sqrt(float(np.dot(values, values)) / max(values.size, 1))


def read_base(directory: Path) -> BaseTensors:
    """List the tensors of a local model directory that packets may change; only headers are read.

    Raises:
        RejectedError: AG-PRV-042 if there is no configuration or no block, AG-PKT-* if a file is
            no tensor file.
    """
    family = _family(directory)
    blocks: dict[int, dict[str, BaseTensor]] = {}
    others: dict[str, BaseTensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as handle:
            table = read_table(handle, LOCAL_RULES)
        for entry in table.entries:
            match = _BLOCK.fullmatch(entry.name)
            if match and not _CONSTANTS.fullmatch(match[2]):
                blocks.setdefault(int(match[1]), {})[match[2]] = BaseTensor(path, entry)
            elif match := _OTHER.fullmatch(entry.name):
                trunk = "transformer." if family == "gpt2" else "model."
                name = match[1] if match[1] == _HEAD else trunk + match[1]
                others[name] = BaseTensor(path, entry)
    if not blocks or sorted(blocks) != list(range(len(blocks))):
        raise RejectedError("AG-PRV-042", "the base's files do not hold a whole stack of blocks")
    return BaseTensors(tuple(blocks[i] for i in range(len(blocks))), family == "gpt2", others)


def _family(directory: Path) -> str:
    try:
        with (directory / "config.json").open("rb") as handle:
            config = json.loads(handle.read(_CONFIG_BYTES))
        return str(config["model_type"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RejectedError(
            "AG-PRV-042", f"the base has no readable config.json: {type(error).__name__}"
        ) from error


def allow_list(kind: str, facts: Mapping[str, canonical.Json], base: BaseTensors) -> AllowList:
    """The tensors that a packet of a kind may hold, by the typed facts of its statement.

    Raises:
        RejectedError: AG-PKT-001 for an unknown kind, AG-PKT-009, AG-PKT-028 or AG-IN-003 for
            malformed facts, AG-PRV-040 or AG-PKT-028 for facts that do not fit the base.
    """
    name = find_kind(kind).name
    if name == "expert":
        carrier = canonical.as_text(facts.get("carrier"))
        if carrier in {"organ", "lora"}:
            return allow_list(carrier, canonical.as_mapping(facts.get("inner")), base)
        stated = canonical.as_mapping(facts.get("settings"))
        return model_tensors(base, tied=canonical.as_bool(stated.get("tie_word_embeddings")))
    if name == "lora":
        settings = read_adapter_settings(facts)
        return lora_tensors(base, settings)
    if name == "delta":
        return delta_tensors(base, facts)
    if name == "module_graft":
        modules = [canonical.as_text(each) for each in canonical.as_list(facts.get("modules"))]
        return graft_tensors(base, modules)
    if name == "prompt":
        return prompt_tensors(base, canonical.as_int(facts.get("virtual_tokens")))
    source, count = canonical.as_int(facts.get("source")), canonical.as_int(facts.get("blocks"))
    return organ_tensors(base, source, count, canonical.as_int(facts.get("bits", 16)))


def organ_tensors(base: BaseTensors, source: int, count: int, bits: int = 16) -> AllowList:
    """The tensors of an organ made from blocks `source` to `source + count - 1`.

    A row's scale is the largest entry that the row can have, and is bounded as the base's own
    entries are; the numbers beside it are bounded by their form.

    Raises:
        RejectedError: AG-PRV-040 if the base has no such blocks, or for other bits than an organ's.
    """
    if bits not in ORGAN_BITS:
        raise RejectedError("AG-PRV-040", "the organ's numbers have bits that no organ has")
    if count < 1 or source < 0 or source + count > len(base.blocks):
        raise RejectedError("AG-PRV-040", "the organ names blocks that its base does not have")
    own = {
        f"blocks.{number}.{name}": (name, tensor)
        for number in range(count)
        for name, tensor in base.blocks[source + number].items()
    }
    layout = organ_layout({name: tensor.shape for name, (_, tensor) in own.items()}, bits)
    return {
        name: AllowedTensor(
            made.shape,
            math.inf if made.integers else _ceiling(*own[made.parameter]),
            made.integers,
        )
        for name, made in layout.items()
    }


def model_tensors(base: BaseTensors, *, tied: bool) -> AllowList:
    """Every tensor of a whole model that was trained from the base.

    Args:
        base: The base.
        tied: Whether its head is its embeddings, and no tensor of its own.

    Raises:
        RejectedError: AG-PRV-040 if the base's files lack a head of its own.
    """
    named = {
        f"{base.trunk}.{number}.{name}": tensor
        for number, block in enumerate(base.blocks)
        for name, tensor in block.items()
    }
    named |= {n: t for n, t in base.others.items() if not (tied and n == _HEAD)}
    if not tied and _HEAD not in named:
        raise RejectedError("AG-PRV-040", "the base's files hold no head")
    return {n: AllowedTensor(t.shape, _ceiling(n, t)) for n, t in named.items()}


def lora_tensors(base: BaseTensors, settings: AdapterSettings) -> AllowList:
    """The tensors of a low-rank adapter, named as PEFT names them.

    Args:
        base: The base.
        settings: Checked settings; each target stands for all matrices of that name in all blocks,
            as in PEFT. Frozen A's do not travel.

    Raises:
        RejectedError: AG-PRV-040 for modules that the base does not have or ranks it cannot have.
    """
    allowed: dict[str, AllowedTensor] = {}
    limit = RMS_FACTOR * RMS_FLOOR
    rank = settings.rank
    for module in settings.target_modules:
        found = list(_matrices(base, module))
        if not found:
            raise RejectedError("AG-PRV-040", "the adapter names a module without a matrix")
        for number, name, tensor in found:
            outputs, inputs = tensor.shape[::-1] if base.transposed else tensor.shape
            if not 1 <= rank <= min(outputs, inputs):
                raise RejectedError("AG-PRV-040", f"rank {rank} does not fit its matrix")
            stem = f"base_model.model.{base.trunk}.{number}.{name}"
            if not settings.frozen_a:
                allowed[f"{stem}.lora_A.weight"] = AllowedTensor((rank, inputs), limit)
            allowed[f"{stem}.lora_B.weight"] = AllowedTensor((outputs, rank), limit)
            if settings.dora:
                longest = math.sqrt(inputs) * _ceiling(name, tensor)
                allowed[f"{stem}.lora_magnitude_vector"] = AllowedTensor((outputs,), longest)
    if not allowed:
        raise RejectedError("AG-PRV-040", "the adapter names no module")
    return allowed


def delta_tensors(base: BaseTensors, facts: Mapping[str, canonical.Json]) -> AllowList:
    """The tensors of a delta.

    A scale is the largest entry that its direction can have, and is bounded as the base's own
    entries are; the numbers beside it are bounded by their form.

    Raises:
        RejectedError: AG-PKT-028 for ranks that are malformed or do not fit the base.
    """
    targets = dict(base.tokens)
    for number, block in enumerate(base.blocks):
        targets |= {f"blocks.{number}.{name}": tensor for name, tensor in block.items()}
    tensors = read_delta_layout(facts).tensors({n: t.shape for n, t in targets.items()})
    ceilings = {t: _ceiling(t, targets[t]) for t in {tensor.target for tensor in tensors.values()}}
    return {
        name: AllowedTensor(
            tensor.shape,
            math.inf if tensor.integers else ceilings[tensor.target],
            tensor.integers,
        )
        for name, tensor in tensors.items()
    }


def graft_tensors(base: BaseTensors, modules: Sequence[str]) -> AllowList:
    """The tensors of a module graft: weight and, where the base has one, bias of each module.

    Raises:
        RejectedError: AG-PRV-040 for modules that the base does not have.
    """
    allowed: dict[str, AllowedTensor] = {}
    for module in modules:
        match = _GRAFTED.fullmatch(module)
        number, stem = (int(match[1]), match[2]) if match else (len(base.blocks), "")
        block = base.blocks[number] if number < len(base.blocks) else {}
        weight = block.get(f"{stem}.weight")
        if weight is None or len(weight.shape) != 2:
            raise RejectedError("AG-PRV-040", "the graft names a module without a matrix")
        for name in (f"{stem}.weight", f"{stem}.bias"):
            if tensor := block.get(name):
                ceiling = _ceiling(name, tensor)
                allowed[f"blocks.{number}.{name}"] = AllowedTensor(tensor.shape, ceiling)
    return allowed


def prompt_tensors(base: BaseTensors, count: int) -> AllowList:
    """The one tensor of a prompt of so many vectors.

    They are as large as embeddings are where they enter; Gemma multiplies those by the root of
    their width.

    Raises:
        RejectedError: AG-PRV-040 if the base's files hold no embedding, or for no vectors.
    """
    embedding = base.tokens.get(EMBEDDING)
    if embedding is None or count < 1:
        raise RejectedError("AG-PRV-040", "the prompt has no vectors, or its base no embedding")
    hidden = embedding.shape[1]
    ceiling = math.sqrt(hidden) * _ceiling("embedding", embedding)
    return {"prompt_embeddings": AllowedTensor((count, hidden), ceiling)}


def _matrices(base: BaseTensors, module: str) -> Iterator[tuple[int, str, BaseTensor]]:
    """Block number, name inside the block and tensor of every matrix of a module name."""
    for number, block in enumerate(base.blocks):
        for name, tensor in block.items():
            stem = name.removesuffix(".weight")
            if stem != name and stem.split(".")[-1] == module and len(tensor.shape) == 2:
                yield number, stem, tensor


def _ceiling(name: str, tensor: BaseTensor) -> float:
    floor = GAIN_FLOOR if _GAIN.fullmatch(name) else RMS_FLOOR
    return RMS_FACTOR * max(tensor.rms(), floor)
