# SPDX-License-Identifier: Apache-2.0
"""Every way a tensor file can be wrong is refused with a code of its own."""

import io
import json
import struct

import pytest

from allograft.errors import RejectedError
from allograft.limits import LIMITS
from allograft.packet import tensors

GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DATA = bytes(8)


def file_of(header, data=DATA, size=None, pad=True):
    """A file with this header (an object or its text), padded as the format asks."""
    text = (
        header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    )
    if pad:
        text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def entry(**changes):
    return {"w": {**GOOD, **changes}}


def two(first, second, data):
    return file_of(
        {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": first},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": second},
        },
        bytes(data),
    )


NESTED = b'{"w":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
FILES = {
    "empty file": (b"", "AG-PKT-010"),
    "seven bytes": (bytes(7), "AG-PKT-010"),
    "header cut": (file_of(entry())[:20], "AG-PKT-010"),
    "data cut": (file_of(entry())[:-1], "AG-PKT-010"),
    "header claims 2**63": (file_of(entry(), size=2**63), "AG-PKT-011"),
    "header claims 17 MiB": (file_of(entry(), size=17 << 20), "AG-PKT-011"),
    "header of a million objects": (file_of(b'{"w":[' + b"{}," * 10**6 + b"{}]}"), "AG-PKT-011"),
    "header of five million numbers": (
        file_of(b'{"w":[' + b"1," * (5 * 10**6) + b"1]}"), "AG-PKT-011"),
    "nested too deeply": (file_of(NESTED), "AG-PKT-012"),
    "no JSON": (file_of(b"{w"), "AG-PKT-012"),
    "led by a space": (file_of(b" " + json.dumps(entry()).encode()), "AG-PKT-012"),
    "an array": (file_of(b"[]"), "AG-PKT-012"),
    "two objects": (file_of(b"{}{}"), "AG-PKT-012"),
    "not UTF-8": (file_of(b'{"\xff":1}'), "AG-PKT-012"),
    "NaN in the header": (file_of(b'{"w":NaN}'), "AG-PKT-012"),
    "a float offset": (file_of(entry(data_offsets=[0, 8.0])), "AG-PKT-012"),
    "an exponent": (
        file_of(b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8e0]}}'), "AG-PKT-012"),
    "an integer of 400 digits": (file_of(entry(shape=[10**400])), "AG-PKT-012"),
    "a tensor twice": (
        file_of(b'{"w":%b,"w":%b}' % ((json.dumps(GOOD).encode(),) * 2)), "AG-PKT-013"),
    "a tensor twice, once escaped": (
        file_of(b'{"w":%b,"\\u0077":%b}' % ((json.dumps(GOOD).encode(),) * 2)), "AG-PKT-013"),
    "a field twice": (
        file_of(b'{"w":{"dtype":"F16","dtype":"F32","shape":[2],"data_offsets":[0,8]}}'),
        "AG-PKT-013"),
    "metadata": (file_of({"__metadata__": {"a": "b"}, **entry()}), "AG-PKT-014"),
    "empty metadata": (file_of({"__metadata__": {}, **entry()}), "AG-PKT-014"),
    "metadata of another type": (file_of({"__metadata__": 1, **entry()}), "AG-PKT-014"),
    "a path upwards": (file_of({"../w": GOOD}), "AG-PKT-015"),
    "an absolute path": (file_of({"/w": GOOD}), "AG-PKT-015"),
    "a NUL in a name": (file_of({"w\0": GOOD}), "AG-PKT-015"),
    "a newline after a name": (file_of({"w\n": GOOD}), "AG-PKT-015"),
    "a bidirectional override": (file_of({"w\u202e": GOOD}), "AG-PKT-015"),
    "an empty name": (file_of({"": GOOD}), "AG-PKT-015"),
    "a long name": (file_of({"w" * 257: GOOD}), "AG-PKT-015"),
    "an unknown dtype": (file_of(entry(dtype="Q4")), "AG-PKT-016"),
    "an integer dtype": (file_of(entry(dtype="I32")), "AG-PKT-016"),
    "nine dimensions": (file_of(entry(shape=[1] * 8 + [2])), "AG-PKT-017"),
    "a negative dimension": (file_of(entry(shape=[-2])), "AG-PKT-017"),
    "a negative offset": (file_of(entry(data_offsets=[-8, 0])), "AG-PKT-017"),
    "a boolean dimension": (file_of(entry(shape=[True, 2])), "AG-PKT-017"),
    "an empty tensor": (file_of(entry(shape=[0], data_offsets=[0, 0]), b""), "AG-PKT-017"),
    "overlap": (two([0, 8], [4, 12], 12), "AG-PKT-018"),
    "the same bytes twice": (two([0, 8], [0, 8], 8), "AG-PKT-018"),
    "shape beyond offsets": (file_of(entry(shape=[3])), "AG-PKT-019"),
    "shape that overflows 64 bits": (file_of(entry(shape=[2**32, 2**32, 2**3])), "AG-PKT-019"),
    "offsets reversed": (file_of(entry(data_offsets=[8, 0])), "AG-PKT-019"),
    "hole at the start": (file_of(entry(data_offsets=[8, 16]), bytes(16)), "AG-PKT-020"),
    "hole between": (two([0, 8], [16, 24], 24), "AG-PKT-020"),
    "bytes at the end": (file_of(entry(), DATA + b"x"), "AG-PKT-021"),
    "a terabyte that is not there": (
        file_of(entry(shape=[2**38], data_offsets=[0, 2**40])), "AG-PKT-010"),
    "NaN": (file_of(entry(), struct.pack("<2f", 1.0, float("nan"))), "AG-PKT-022"),
    "infinity": (file_of(entry(), struct.pack("<2f", float("-inf"), 0)), "AG-PKT-022"),
    "no tensors": (file_of(b"{}", b""), "AG-PKT-024"),
    "an entry that is a number": (file_of({"w": 1}), "AG-PKT-025"),
    "a missing field": (file_of({"w": {"dtype": "F32", "shape": [2]}}), "AG-PKT-025"),
    "an unknown field": (file_of(entry(note="hello")), "AG-PKT-025"),
    "a shape that is text": (file_of(entry(shape="2")), "AG-PKT-025"),
    "a dtype that is a number": (file_of(entry(dtype=32)), "AG-PKT-025"),
    "three offsets": (file_of(entry(data_offsets=[0, 8, 8])), "AG-PKT-025"),
    "unaligned header": (file_of(entry(), pad=False), "AG-PKT-026"),
    "padding that carries bits": (
        file_of(json.dumps(entry(), separators=(",", ":")).encode() + b"\t"), "AG-PKT-026"),
    "sixteen spaces": (
        file_of(json.dumps(entry(), separators=(",", ":")).encode() + b" " * 16), "AG-PKT-026"),
    "spaces inside": (file_of(json.dumps(entry()).encode()), "AG-PKT-026"),
    "an escaped name": (
        file_of(b'{"\\u0077":%b}' % json.dumps(GOOD, separators=(",", ":")).encode()),
        "AG-PKT-026"),
    "tensors out of order": (two([8, 16], [0, 8], 16), "AG-PKT-026"),
    "fields in another order": (
        file_of({"w": {"shape": [2], "dtype": "F32", "data_offsets": [0, 8]}}), "AG-PKT-026"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_refuses_malformed_file(name):
    content, code = FILES[name]
    with pytest.raises(RejectedError) as caught:
        tensors.check_file(io.BytesIO(content))
    assert caught.value.code == code


def test_every_code_of_a_malformed_file_is_shown_by_some_file():
    assert {code for _, code in FILES.values()} == {
        f"AG-PKT-{number:03d}" for number in range(10, 27) if number != 23
    }


def test_the_unbroken_file_is_accepted():
    assert tensors.check_file(io.BytesIO(file_of(entry()))).table.entries[0].shape == (2,)


def test_a_sparse_terabyte_is_refused_without_being_read(tmp_path):
    path = tmp_path / "sparse"
    path.write_bytes(file_of(entry()))
    with path.open("r+b") as handle:
        handle.truncate(1 << 40)
        with pytest.raises(RejectedError) as caught:
            tensors.check_file(handle)
    assert caught.value.code == "AG-PKT-021"


def test_too_many_tensors_are_refused_before_their_entries_are_read():
    header = b"{" + b",".join(b'"t%d":0' % n for n in range(LIMITS.tensors + 1)) + b"}"
    with pytest.raises(RejectedError) as caught:
        tensors.check_file(io.BytesIO(file_of(header)))
    assert caught.value.code == "AG-PKT-024"


def test_refusals_never_quote_the_file():
    secret = "patient-4711"
    for content in (file_of({f"../{secret}": GOOD}), file_of(entry(**{secret: 1})),
                    file_of({"__metadata__": {secret: secret}, **entry()})):  # fmt: skip
        with pytest.raises(RejectedError) as caught:
            tensors.check_file(io.BytesIO(content))
        assert secret not in str(caught.value)
