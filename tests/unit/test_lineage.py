# SPDX-License-Identifier: Apache-2.0
"""Claims about which base a model is, and whether two bases are relatives."""

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

from allograft.errors import RejectedError
from allograft.provenance import lineage
from allograft.provenance.statement import read_base, write_base

CONFIG = {
    "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64,
    "rope_theta": 10000.0, "transformers_version": "5.0", "_name_or_path": "somewhere",
}  # fmt: skip
TOKENIZER = {
    "version": "1.0",
    "truncation": None,
    "added_tokens": [],
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
}


def weights(seed, noise=0.0):
    """A small model; `noise` continues its training a little."""
    rng, change = np.random.default_rng(seed), np.random.default_rng(99)
    found = {"norm.weight": np.ones(32, np.float32)}
    for layer in range(6):
        matrix = rng.standard_normal((32, 48)).astype(np.float32)
        drift = change.standard_normal((32, 48)).astype(np.float32)
        found[f"layers.{layer}.w"] = matrix + noise * drift
    return found


def write(directory, tensors, shards=1, config=CONFIG, tokenizer=TOKENIZER):
    directory.mkdir()
    names = sorted(tensors)
    for number in range(shards):
        part = {name: tensors[name] for name in names[number::shards]}
        save_file(part, directory / f"model-{number}.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    return lineage.describe_base(directory)


@pytest.fixture
def base(tmp_path):
    return write(tmp_path / "base", weights(0))


def test_digest_does_not_depend_on_shards_or_metadata(tmp_path, base):
    sharded = write(tmp_path / "sharded", weights(0), shards=3)
    assert sharded == base
    assert lineage.compare_bases(base, sharded).level == "exact"


@pytest.mark.parametrize("change", ["value", "name", "shape", "dtype"])
def test_digest_depends_on_every_tensor(tmp_path, base, change):
    tensors = weights(0)
    if change == "value":
        tensors["norm.weight"][3] += 1e-6
    elif change == "name":
        tensors["other"] = tensors.pop("norm.weight")
    elif change == "shape":
        tensors["norm.weight"] = tensors["norm.weight"].reshape(4, 8)
    else:
        tensors["norm.weight"] = tensors["norm.weight"].view(np.int32)
    assert write(tmp_path / "x", tensors).weights_digest != base.weights_digest


def test_a_continued_base_is_a_relative(tmp_path, base):
    found = lineage.compare_bases(base, write(tmp_path / "x", weights(0, noise=0.05)))
    assert found.level == "lineage"
    assert found.cosine >= found.lowest > 0.99
    assert found.tensors == 6


def test_another_seed_of_the_same_shape_is_refused(tmp_path, base):
    found = lineage.compare_bases(base, write(tmp_path / "x", weights(1)))
    assert found.level == "refuse"
    assert abs(found.cosine) < 0.3


def test_a_common_offset_makes_no_relative(tmp_path):
    ours = write(tmp_path / "a", {n: w + 5 for n, w in weights(0).items()})
    theirs = write(tmp_path / "b", {n: w + 5 for n, w in weights(1).items()})
    assert lineage.compare_bases(ours, theirs).level == "refuse"


def test_norms_and_masks_are_not_sketched(tmp_path, base):
    tensors = {**weights(0), "mask": np.tril(np.ones((1, 1, 32, 32), np.float32))}
    sketch = write(tmp_path / "x", tensors).sketch
    assert [tensor.name for tensor in sketch] == [f"layers.{n}.w" for n in range(6)]
    assert all(len(tensor.values) == 256 for tensor in sketch)


@pytest.mark.parametrize(
    "forge",
    [
        lambda base: replace(base, sketch=base.sketch[:1]),
        lambda base: replace(base, sketch=()),
        lambda base: replace(base, sketch=base.sketch[::-1]),
        lambda base: replace(base, sketch=(replace(base.sketch[0], values=bytes(4)),) * 6),
        lambda base: replace(
            base, sketch=tuple(replace(t, values=b"\0\0\xc0\x7f" * 64) for t in base.sketch)),
        lambda base: replace(
            base, sketch=tuple(replace(t, values=bytes(256)) for t in base.sketch)),
        lambda base: replace(base, tokenizer_digest="0" * 64),
        lambda base: replace(base, architecture=replace(base.architecture, layers=3)),
    ],
)  # fmt: skip
def test_forged_sketches_make_no_relative(base, forge):
    theirs = replace(forge(base), weights_digest="0" * 64)
    found = lineage.compare_bases(base, theirs)
    assert found.level == "refuse"
    assert found.reason


def test_only_architecture_counts_in_the_configuration():
    moved = {**CONFIG, "transformers_version": "6.0", "_name_or_path": "elsewhere"}
    assert lineage.digest_config(moved) == lineage.digest_config(CONFIG)
    other = {**CONFIG, "rope_theta": 20000.0}
    assert lineage.digest_config(other) != lineage.digest_config(CONFIG)


def test_gpt2_names_are_understood():
    config = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "vocab_size": 50257}
    found = lineage.read_architecture(config)
    assert (found.family, found.hidden, found.layers, found.vocab) == ("gpt2", 768, 12, 50257)


def tokenizer_digest(tmp_path, value):
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "tokenizer.json").write_text(json.dumps(value))
    return lineage.digest_tokenizer(tmp_path)


def test_tokenizers_saved_by_other_versions_are_equal(tmp_path):
    model = {**TOKENIZER["model"], "merges": [["a", "b"]]}
    newer = {**TOKENIZER, "model": model, "truncation": {"max_length": 8}, "padding": {}}
    same = tokenizer_digest(tmp_path / "a", newer)
    assert same == tokenizer_digest(tmp_path / "b", TOKENIZER)
    other = {**TOKENIZER, "model": {**model, "vocab": {"b": 0, "a": 1, "ab": 2}}}
    assert tokenizer_digest(tmp_path / "c", other) != same


def test_older_tokenizer_files_have_a_digest(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    first = lineage.digest_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text("a b")
    assert lineage.digest_tokenizer(tmp_path) != first


def refused(call, *arguments):
    with pytest.raises(RejectedError) as caught:
        call(*arguments)
    return caught.value.code


def test_unidentifiable_directories_are_refused(tmp_path, base):
    assert refused(lineage.describe_base, tmp_path / "absent") == "AG-PRO-011"
    assert refused(lineage.digest_tokenizer, tmp_path) == "AG-PRO-011"
    assert refused(lineage.digest_weights, tmp_path) == "AG-PRO-011"
    assert refused(lineage.read_architecture, {"model_type": "llama"}) == "AG-PRO-011"
    (tmp_path / "base" / "config.json").write_text("[]")
    assert refused(lineage.describe_base, tmp_path / "base") == "AG-PRO-011"


def test_a_tensor_in_two_files_is_refused(tmp_path, base):
    save_file(weights(1), tmp_path / "base" / "model-9.safetensors")
    assert refused(lineage.digest_weights, tmp_path / "base") == "AG-PRO-011"


def test_a_base_survives_its_json(base):
    assert read_base(write_base(base)) == base
