# SPDX-License-Identifier: Apache-2.0
"""For any file: what we accept, the library accepts identically; how it is cut changes nothing."""

import io
from itertools import pairwise

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings, strategies as st

from allograft.errors import RejectedError
from allograft.packet import tensors

NAMES = st.text("abcXYZ019._-/", min_size=1, max_size=12).filter(
    lambda name: ".." not in name and not name.startswith("/")
)
SHAPES = st.lists(st.integers(1, 4), max_size=4).map(tuple)
DTYPES = {"F32": "<f4", "F16": "<f2"}


@st.composite
def files(draw):
    raw = {}
    for name in draw(st.lists(NAMES, min_size=1, max_size=6, unique=True)):
        dtype, shape = draw(st.sampled_from(sorted(DTYPES))), draw(SHAPES)
        count = int(np.prod(shape))
        values = draw(st.lists(st.integers(-9, 9), min_size=count, max_size=count))
        raw[name] = tensors.RawTensor(dtype, shape, np.array(values, DTYPES[dtype]).tobytes())
    return raw


def render(raw):
    sink = io.BytesIO()
    tensors.write_tensors(sink, raw)
    return sink.getvalue()


@given(files())
@settings(deadline=None)
def test_the_library_reads_what_we_write_and_writes_the_same(raw):
    content = render(raw)
    theirs = safetensors.numpy.load(content)
    assert theirs.keys() == raw.keys()
    for name, array in theirs.items():
        assert (array.tobytes(), array.shape) == (raw[name].data, raw[name].shape)
    assert safetensors.numpy.save(theirs) == content
    tensors.check_file(io.BytesIO(content))


@given(files(), st.data())
@settings(deadline=None, max_examples=300)
def test_whatever_we_accept_the_library_accepts_identically(raw, data):
    content = bytearray(render(raw))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, min(len(content) - 1, 400)))
        edit = data.draw(st.sampled_from(["flip", "drop", "insert"]))
        if edit == "flip":
            content[place] ^= 1 << data.draw(st.integers(0, 7))
        elif edit == "drop":
            del content[place]
        else:
            content.insert(place, data.draw(st.sampled_from(b'{}[],:" 0129wF')))
        if not content:
            return
    handle = io.BytesIO(bytes(content))
    try:
        table = tensors.check_file(handle).table
    except RejectedError:
        return
    theirs = safetensors.numpy.load(bytes(content))
    assert sorted(theirs) == sorted(entry.name for entry in table.entries)
    for entry in table.entries:
        found = theirs[entry.name].astype(np.float32)
        assert np.array_equal(tensors.read_tensor(handle, entry), found)


@st.composite
def damaged_files(draw):
    """Files of any values, NaN among them, some with bytes changed, added or cut off."""
    raw = {}
    for name in draw(st.lists(NAMES, min_size=1, max_size=4, unique=True)):
        dtype, shape = draw(st.sampled_from(["BF16", "F16", "F32"])), draw(SHAPES)
        size = int(np.prod(shape)) * tensors.DTYPE_BYTES[dtype]
        # Ones and random bytes: of the latter many are NaN in half precision.
        data = draw(st.just(b"\x3c" * size) | st.binary(min_size=size, max_size=size))
        raw[name] = tensors.RawTensor(dtype, shape, data)
    content = render(raw)
    place = draw(st.integers(0, len(content)))
    edit = draw(st.sampled_from(["", "", "change", "insert", "cut"]))
    if edit == "cut":
        return content[:place]
    rest = content[place + 1 :] if edit == "change" else content[place:]
    return content[:place] + (draw(st.binary(min_size=1, max_size=3)) if edit else b"") + rest


def verdict(check, *args):
    try:
        return check(*args)
    except RejectedError as error:
        return error.code, error.cause


def check_pieces(pieces, file_bytes):
    checker = tensors.TensorChecker(file_bytes)
    for piece in pieces:
        checker.feed(memoryview(piece))
    return checker.finish()


@given(damaged_files(), st.data())
@settings(deadline=None, max_examples=300)
def test_how_a_file_is_cut_changes_neither_verdict_nor_figures(content, data):
    places = st.lists(st.integers(0, len(content)), max_size=12)
    cuts = data.draw(places | st.just(range(len(content))))
    ends = [0, *sorted(cuts), len(content)]
    pieces = [content[start:end] for start, end in pairwise(ends)]
    announced = max(0, len(content) + data.draw(st.just(0) | st.integers(-9, 9)))
    with pytest.MonkeyPatch.context() as patch:
        # Small blocks, so that tensors of a few values have several.
        patch.setattr(tensors, "_BLOCK", data.draw(st.sampled_from([16, 64, tensors._BLOCK])))
        whole = verdict(check_pieces, [content], announced)
        assert verdict(check_pieces, pieces, announced) == whole


@given(damaged_files())
@settings(deadline=None)
def test_values_are_judged_as_numpy_judges_them(content):
    found = verdict(tensors.check_file, io.BytesIO(content))
    header = verdict(tensors.read_table, io.BytesIO(content))
    if isinstance(header, tuple):
        assert found == header
        return
    values = [tensors.read_tensor(io.BytesIO(content), entry) for entry in header.entries]
    if all(np.isfinite(value).all() for value in values):
        norms = [np.linalg.norm(value.astype(np.float64)) for value in values]
        assert [f.frobenius_norm for f in found.figures] == pytest.approx(
            norms, rel=1e-5, abs=1e-20
        )
    else:
        assert found[0] == "AG-PKT-022"
