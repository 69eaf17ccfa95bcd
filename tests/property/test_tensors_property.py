# SPDX-License-Identifier: Apache-2.0
"""For any file: what we accept, the safetensors library accepts with identical tensors."""

import io

import numpy as np
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
