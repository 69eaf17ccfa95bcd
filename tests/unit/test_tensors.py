# SPDX-License-Identifier: Apache-2.0
"""Claims about reading, measuring and writing tensor files."""

import io

import numpy as np
import pytest
import safetensors.numpy

from allograft.errors import RejectedError
from allograft.packet import tensors

RAW = {
    "b.weight": tensors.RawTensor("F32", (2, 3), np.arange(6, dtype="<f4").tobytes()),
    "a.weight": tensors.RawTensor("F32", (4,), np.full(4, 2, "<f4").tobytes()),
    "half": tensors.RawTensor("F16", (5,), np.full(5, 0.5, "<f2").tobytes()),
    "brain": tensors.RawTensor("BF16", (3,), np.array([0x3F80, 0xC000, 0], "<u2").tobytes()),
    "scalar": tensors.RawTensor("F32", (), np.float32(3).tobytes()),
}


def written(raw):
    sink = io.BytesIO()
    table = tensors.write_tensors(sink, raw)
    return sink, table


def test_writes_byte_for_byte_what_the_library_writes():
    arrays = {
        name: np.frombuffer(raw.data, {"F32": "<f4", "F16": "<f2"}[raw.dtype]).reshape(raw.shape)
        for name, raw in RAW.items()
        if raw.dtype != "BF16"
    }
    sink, _ = written({name: RAW[name] for name in arrays})
    assert sink.getvalue() == safetensors.numpy.save(arrays)


def test_order_of_the_caller_does_not_show():
    assert written(RAW)[0].getvalue() == written(dict(reversed(RAW.items())))[0].getvalue()


def test_reads_what_it_wrote():
    sink, table = written(RAW)
    checked = tensors.check_file(sink)
    assert checked.table == table
    assert table.file_bytes == len(sink.getvalue())
    assert [entry.name for entry in table.entries] == [
        "a.weight",
        "b.weight",
        "scalar",
        "brain",
        "half",
    ]
    assert all(entry.offset % 8 == 0 for entry in table.entries[:2])
    brain = tensors.read_tensor(sink, table.entry("brain"))
    assert brain.dtype == np.float32
    assert brain.tolist() == [1.0, -2.0, 0.0]
    assert tensors.read_tensor(sink, table.entry("b.weight")).shape == (2, 3)
    assert tensors.read_tensor(sink, table.entry("scalar")).shape == ()


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_norms_are_those_of_numpy_over_many_blocks(dtype):
    values = np.random.default_rng(0).standard_normal(600_001).astype(np.float32)
    if dtype == "BF16":
        data = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    else:
        data = values.astype("<f4" if dtype == "F32" else "<f2").tobytes()
    sink, table = written({"w": tensors.RawTensor(dtype, values.shape, data)})
    exact = np.linalg.norm(tensors.read_tensor(sink, table.entry("w")).astype(np.float64))
    assert tensors.check_file(sink).frobenius_norm == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_norms_are_equal_to_the_last_bit_however_a_file_comes(dtype):
    data = np.random.default_rng(1).integers(0, 0x3C00, 1_500_000).astype("<u2").tobytes()
    size = tensors.DTYPE_BYTES[dtype]
    sink, table = written({name: tensors.RawTensor(dtype, (len(data) // size,), data)
                           for name in "vw"})  # fmt: skip
    content = memoryview(sink.getvalue())
    for step in (4099, 1 << 20, len(content)):
        checker = tensors.TensorChecker(table.file_bytes)
        for start in range(0, len(content), step):
            checker.feed(content[start : start + step])
        assert checker.finish() == tensors.check_file(sink)


def test_a_finding_waits_for_the_verdict_and_the_first_one_stays():
    sink, table = written({"w": tensors.RawTensor("F32", (1,), np.float32("nan").tobytes())})
    checker = tensors.TensorChecker(table.file_bytes)
    checker.feed(memoryview(sink.getvalue()[:-1]))
    assert not checker.is_refused
    checker.feed(memoryview(sink.getvalue()[-1:]))
    assert checker.is_refused
    checker.feed(memoryview(b"more than was announced"))
    with pytest.raises(RejectedError) as caught:
        checker.finish()
    assert caught.value.code == "AG-PKT-022"


def test_large_finite_values_are_no_infinities():
    sink, _ = written({"w": tensors.RawTensor("F32", (2,), np.full(2, 3e38, "<f4").tobytes())})
    assert tensors.check_file(sink).frobenius_norm == pytest.approx(3e38 * 2**0.5)


@pytest.mark.parametrize("place", [0, 100_000, 199_999])
@pytest.mark.parametrize(
    ("dtype", "bits"),
    [("F32", 0x7F800000), ("F32", 0xFFC00001), ("F32", 0x7F800001), ("F16", 0x7C00),
     ("F16", 0xFE00), ("F16", 0x7C01),
     ("BF16", 0x7F80), ("BF16", 0xFF81)],
)  # fmt: skip
def test_refuses_nan_and_infinity_wherever_they_hide(dtype, bits, place):
    data = np.zeros(200_000, "<u4" if dtype == "F32" else "<u2")
    data[place] = bits
    sink, _ = written({"w": tensors.RawTensor(dtype, data.shape, data.tobytes())})
    with pytest.raises(RejectedError) as caught:
        tensors.check_file(sink)
    assert caught.value.code == "AG-PKT-022"


def test_reads_other_tools_files_under_local_rules_only():
    content = safetensors.numpy.save({"w": np.arange(4)}, metadata={"format": "pt"})
    table = tensors.read_table(io.BytesIO(content), tensors.LOCAL_RULES)
    assert table.entries[0].dtype == "I64"
    with pytest.raises(RejectedError):
        tensors.read_table(io.BytesIO(content))
    with pytest.raises(RejectedError) as caught:
        tensors.read_tensor(io.BytesIO(content), table.entries[0])
    assert caught.value.code == "AG-PKT-016"


def test_compares_a_table_with_what_was_agreed():
    _, table = written({"w": RAW["b.weight"]})
    tensors.check_shapes(table, {"w": ("F32", (2, 3))})
    for expected in ({}, {"w": ("F32", (3, 2))}, {"w": ("F16", (2, 3))},
                     {"w": ("F32", (2, 3)), "v": ("F32", (1,))}):  # fmt: skip
        with pytest.raises(RejectedError) as caught:
            tensors.check_shapes(table, expected)
        assert caught.value.code == "AG-PKT-023"
    with pytest.raises(RejectedError) as caught:
        table.entry("v")
    assert caught.value.code == "AG-PKT-023"


@pytest.mark.parametrize(
    ("name", "raw", "code"),
    [
        ("w", tensors.RawTensor("I64", (1,), bytes(8)), "AG-PKT-016"),
        ("w", tensors.RawTensor("F32", (2,), bytes(4)), "AG-PKT-019"),
        ("w", tensors.RawTensor("F32", (0,), b""), "AG-PKT-017"),
        ("../w", tensors.RawTensor("F32", (1,), bytes(4)), "AG-PKT-015"),
    ],
)
def test_writes_nothing_that_no_reader_accepts(name, raw, code):
    sink = io.BytesIO()
    with pytest.raises(RejectedError) as caught:
        tensors.write_tensors(sink, {name: raw})
    assert caught.value.code == code
    assert sink.getvalue() == b""
