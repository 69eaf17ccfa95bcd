# SPDX-License-Identifier: Apache-2.0
"""Which base a model is, and whether two bases are relatives.

Equal architecture proves nothing: weights moved to another seed of the same architecture gained
nothing or did harm. So a base has a digest that does not depend on how its tensors are spread over
files, and a sketch (random projections of a few matrices, from a fixed public seed) by which a
recipient compares its own weights with the donor's. Measured cosines: .996 for a continued base,
at most .02 for another seed. See protos/spec/packet.md, "Base model".
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt

from allograft.crypto import canonical
from allograft.errors import RejectedError
from allograft.packet.tensors import (
    DTYPE_BYTES,
    LOCAL_RULES,
    TensorEntry,
    as_float32,
    read_table,
)
from allograft.provenance.statement import Architecture, BaseModel, SketchedTensor

LINEAGE_COSINE = 0.9

Level = Literal["exact", "lineage", "refuse"]

_SKETCH_LABEL = b"allograft/sketch/v1\0"
_SKETCH_TENSORS = 8
_SKETCH_VALUES = 64
# Elements of a matrix that are projected, evenly spaced: enough for a standard error of .004.
_SAMPLE = 1 << 16
_SMALLEST_MATRIX = 256
_BLOCK = 1 << 20

#: Configuration fields that decide what the weights mean, in the names of all supported families.
_ARCHITECTURE_FIELDS = (
    "activation_function", "attention_bias", "head_dim", "hidden_act", "hidden_size",
    "intermediate_size", "layer_norm_eps", "layer_norm_epsilon", "layer_types",
    "max_position_embeddings", "mlp_bias", "model_type", "n_ctx", "n_embd", "n_head", "n_inner",
    "n_layer", "n_positions", "norm_eps", "num_attention_heads", "num_hidden_layers",
    "num_key_value_heads", "partial_rotary_factor", "rms_norm_eps", "rope_parameters",
    "rope_scaling", "rope_theta", "sliding_window", "tie_word_embeddings", "vocab_size",
)  # fmt: skip

_TOKENIZER_FILES = ("tokenizer.model", "vocab.json", "merges.txt")
# What a tokenizer does with text; padding and truncation are settings of whoever saved it.
_TOKENIZER_FIELDS = (
    "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "model",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Lineage:
    """How two bases are related.

    Attributes:
        cosine: Mean cosine of the sketched tensors; 1.0 for equal digests.
        lowest: The lowest of them.
        tensors: How many tensors were compared.
    """

    level: Level
    cosine: float
    lowest: float
    tensors: int
    reason: str


def describe_base(directory: Path) -> BaseModel:
    """Identify the model in a directory of config.json, a tokenizer and safetensors files.

    Reads every weight once, and no tensor library.

    Raises:
        RejectedError: AG-PRO-011 if something is missing or a tensor stands in two files, AG-PKT-*
            if a tensor file is malformed.
    """
    config = _read_object(directory / "config.json")
    return BaseModel(
        weights_digest=digest_weights(directory),
        architecture=read_architecture(config),
        config_digest=digest_config(config),
        tokenizer_digest=digest_tokenizer(directory),
        sketch=sketch_weights(directory),
    )


def digest_weights(directory: Path) -> str:
    """SHA-256 (hex) over all tensors of a model, however they are spread over files.

    Raises:
        RejectedError: AG-PRO-011 or AG-PKT-*, as `describe_base`.
    """
    with _open_tensors(directory) as found:
        rows: list[canonical.Json] = [
            [name, entry.dtype, list(entry.shape), _digest_tensor(handle, entry)]
            for name, (handle, entry) in sorted(found.items())
        ]
    return hashlib.sha256(canonical.dumps(rows)).hexdigest()


def digest_config(config: dict[str, Any]) -> str:
    """SHA-256 (hex) of the architecture fields of a model's configuration."""
    kept = {name: config[name] for name in _ARCHITECTURE_FIELDS if config.get(name) is not None}
    return _digest_json(kept)


def digest_tokenizer(directory: Path) -> str:
    """SHA-256 (hex) of what a tokenizer does, equal for copies saved by different versions.

    Raises:
        RejectedError: AG-PRO-011 if there is none.
    """
    path = directory / "tokenizer.json"
    if path.exists():
        content = _read_object(path)
        kept = {name: content[name] for name in _TOKENIZER_FIELDS if content.get(name) is not None}
        model = dict(kept.get("model") or {})
        if isinstance(model.get("merges"), list):
            # Older versions write a merge as one string, newer ones as a pair.
            model["merges"] = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        return _digest_json({**kept, "model": model})
    present = [directory / name for name in _TOKENIZER_FILES if (directory / name).exists()]
    if not present:
        raise RejectedError("AG-PRO-011", "the model directory has no tokenizer")
    rows = [[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in present]
    return _digest_json(rows)


def read_architecture(config: dict[str, Any]) -> Architecture:
    """The architecture of a model from its configuration.

    Raises:
        RejectedError: AG-PRO-011 if a field is missing or of the wrong type.
    """
    try:
        return Architecture(
            family=canonical.as_text(config.get("model_type")),
            hidden=canonical.as_int(config.get("hidden_size", config.get("n_embd"))),
            layers=canonical.as_int(config.get("num_hidden_layers", config.get("n_layer"))),
            vocab=canonical.as_int(config.get("vocab_size")),
        )
    except RejectedError as error:
        raise RejectedError("AG-PRO-011", f"config.json: {error.cause}") from error


def sketch_weights(directory: Path) -> tuple[SketchedTensor, ...]:
    """Project a few evenly chosen matrices of a model.

    Raises:
        RejectedError: AG-PRO-011 or AG-PKT-*, as `describe_base`.
    """
    with _open_tensors(directory) as found:
        matrices = [name for name, (_, entry) in sorted(found.items()) if _is_matrix(entry)]
        count = min(_SKETCH_TENSORS, len(matrices))
        chosen = [matrices[place * len(matrices) // count] for place in range(count)]
        return tuple(
            SketchedTensor(name, found[name][1].shape, _project(*found[name])) for name in chosen
        )


def compare_bases(ours: BaseModel, theirs: BaseModel) -> Lineage:
    """Compare our base with the one a packet was made on.

    Which tensors are sketched follows from our own weights: a donor that chose others, such as
    norms that are alike in all models, is refused.
    """
    if ours.weights_digest == theirs.weights_digest:
        return Lineage("exact", 1.0, 1.0, len(ours.sketch), "the same weights")
    if ours.architecture != theirs.architecture:
        return Lineage("refuse", 0.0, 0.0, 0, "another architecture")
    if ours.tokenizer_digest != theirs.tokenizer_digest:
        return Lineage("refuse", 0.0, 0.0, 0, "another tokenizer")
    names = [(tensor.name, tensor.shape, len(tensor.values)) for tensor in ours.sketch]
    if not names or names != [(t.name, t.shape, len(t.values)) for t in theirs.sketch]:
        return Lineage("refuse", 0.0, 0.0, 0, "the sketches are of different tensors")
    cosines = [
        _cosine(mine.values, yours.values)
        for mine, yours in zip(ours.sketch, theirs.sketch, strict=True)
    ]
    mean, lowest = math.fsum(cosines) / len(cosines), min(cosines)
    if mean >= LINEAGE_COSINE:
        reason = f"a relative: mean cosine {mean:.3f}"
        return Lineage("lineage", mean, lowest, len(cosines), reason)
    reason = f"other weights: mean cosine {mean:.3f} is below {LINEAGE_COSINE}"
    return Lineage("refuse", mean, lowest, len(cosines), reason)


@contextmanager
def _open_tensors(directory: Path) -> Iterator[dict[str, tuple[IO[bytes], TensorEntry]]]:
    found: dict[str, tuple[IO[bytes], TensorEntry]] = {}
    with ExitStack() as stack:
        for path in sorted(directory.glob("*.safetensors")):
            handle = stack.enter_context(path.open("rb"))
            for entry in read_table(handle, LOCAL_RULES).entries:
                if entry.name in found:
                    raise RejectedError("AG-PRO-011", f"{entry.name} stands in two files")
                found[entry.name] = (handle, entry)
        if not found:
            raise RejectedError("AG-PRO-011", "the model directory has no safetensors files")
        yield found


def _digest_tensor(handle: IO[bytes], entry: TensorEntry) -> str:
    digest = hashlib.sha256()
    handle.seek(entry.offset)
    left = entry.size_bytes
    while left:
        block = handle.read(min(_BLOCK, left))
        if not block:
            raise RejectedError("AG-PRO-011", f"{entry.name} became shorter while it was read")
        digest.update(block)
        left -= len(block)
    return digest.hexdigest()


def _is_matrix(entry: TensorEntry) -> bool:
    # Vectors (norms, biases) and stored attention masks look alike in unrelated models.
    is_float = entry.dtype in {"F64", "F32", "BF16", "F16"}
    return is_float and len(entry.shape) == 2 and math.prod(entry.shape) >= _SMALLEST_MATRIX


def _project(handle: IO[bytes], entry: TensorEntry) -> bytes:
    """Project a matrix to a few values with random signs; float32, little-endian."""
    values = _sample(handle, entry)
    # Without its mean: a common offset would make unrelated matrices look alike.
    values = values - values.mean()
    seed = hashlib.shake_256(_SKETCH_LABEL + entry.name.encode("utf-8"))
    bits = np.frombuffer(seed.digest(_SKETCH_VALUES * _SAMPLE // 8), dtype=np.uint8)
    signs = np.unpackbits(bits).reshape(_SKETCH_VALUES, _SAMPLE)[:, : len(values)]
    projected = np.array([values[row == 1].sum() - values[row == 0].sum() for row in signs])
    return projected.astype("<f4").tobytes()


def _sample(handle: IO[bytes], entry: TensorEntry) -> npt.NDArray[np.float64]:
    """Evenly spaced elements of a tensor, without reading the others into memory."""
    width = DTYPE_BYTES[entry.dtype]
    count = entry.size_bytes // width
    raw = np.memmap(handle, dtype=f"V{width}", mode="r", offset=entry.offset, shape=(count,))
    places = np.arange(min(count, _SAMPLE), dtype=np.int64)
    if count > _SAMPLE:
        places = places * count // _SAMPLE
    return as_float32(raw[places].tobytes(), entry.dtype).astype(np.float64)


def _cosine(ours: bytes, theirs: bytes) -> float:
    mine, yours = (np.frombuffer(v, dtype="<f4").astype(np.float64) for v in (ours, theirs))
    scale = float(np.linalg.norm(mine) * np.linalg.norm(yours))
    cosine = float(mine @ yours) / scale if scale else 0.0
    # Sketches come from a donor: NaN and infinities count as no relation.
    return max(-1.0, min(1.0, cosine)) if math.isfinite(cosine) else 0.0


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RejectedError("AG-PRO-011", f"{path.name} is missing or no JSON") from error
    if not isinstance(value, dict):
        raise RejectedError("AG-PRO-011", f"{path.name} is no JSON object")
    return value


def _digest_json(value: object) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()
