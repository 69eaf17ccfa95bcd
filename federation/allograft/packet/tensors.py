# SPDX-License-Identifier: Apache-2.0
"""Strict safetensors: the only tensor files that leave or enter a site.

The format has two readers in the world, and where they disagree an attack fits in between. So
this reader stands in front of the library and accepts one spelling only: what `write_tensors`
writes, byte for byte. Each way of being wrong has its own code (AG-PKT-010 to -026).

Invariant: no allocation grows with what a file claims; only with the header bytes that came, and
with one tensor at a time for `read_tensor`. Free of tensor libraries; bf16 is read as float32.
See protos/spec/packet.md, "Tensors".
"""

from __future__ import annotations

import io
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from allograft.crypto import canonical
from allograft.errors import RejectedError
from allograft.limits import LIMITS

Float32: TypeAlias = npt.NDArray[np.float32]

#: Bytes per element, in the order in which the safetensors library lays dtypes out.
DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "U32": 4, "I32": 4, "BF16": 2, "F16": 2, "U16": 2,
    "I16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip

#: What a packet may carry. Integers could hide text; 8-bit floats are no format we train in.
PACKET_DTYPES = frozenset({"F32", "BF16", "F16"})
#: What a packet of a kind with quantised tensors may carry besides; its kind bounds their values.
INTEGER_DTYPES = frozenset({"I8", "U8"})

_NAME = re.compile(r"[A-Za-z0-9_.\-/]+")
_LAYOUT = {name: place for place, name in enumerate(DTYPE_BYTES)}
_ENTRY_FIELDS = {"dtype", "shape", "data_offsets"}
_PREFIX = 8  # bytes that hold the header's size
# Values are measured in blocks of this size; a quarter of it took more than twice as long, because
# of the calls (measured).
_BLOCK = 1 << 20
# Squares of this many elements are summed in single precision, which loses less than 1e-6 of a
# norm; longer products would also start BLAS threads, each with memory of its own.
_ROW = 8192


@dataclass(frozen=True, slots=True)
class Rules:
    """How strict a reading is.

    Attributes:
        dtypes: Allowed element types.
        only_our_spelling: Refuse metadata, empty tensors, and any header other than the one
            `write_tensors` would write for the same tensors.
    """

    dtypes: frozenset[str]
    only_our_spelling: bool


#: For everything that crosses a site's border.
PACKET_RULES = Rules(PACKET_DTYPES, only_our_spelling=True)
#: The same for kinds with quantised tensors.
QUANTISED_RULES = Rules(PACKET_DTYPES | INTEGER_DTYPES, only_our_spelling=True)
#: For the site's own base models, as other tools wrote them.
LOCAL_RULES = Rules(frozenset(DTYPE_BYTES), only_our_spelling=False)


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file; `offset` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class TensorTable:
    """The checked header of a file, in the order of the data."""

    entries: tuple[TensorEntry, ...]
    header_bytes: int
    file_bytes: int

    def entry(self, name: str) -> TensorEntry:
        """The entry of this name.

        Raises:
            RejectedError: AG-PKT-023 if there is none.
        """
        for entry in self.entries:
            if entry.name == name:
                return entry
        raise RejectedError("AG-PKT-023", f"there is no tensor {name[:80]}")


@dataclass(frozen=True, slots=True)
class TensorFigures:
    """What one pass over a tensor's values found."""

    name: str
    frobenius_norm: float


@dataclass(frozen=True, slots=True)
class CheckedTensors:
    """A file whose header and values were checked."""

    table: TensorTable
    figures: tuple[TensorFigures, ...]

    @property
    def frobenius_norm(self) -> float:
        """The norm of all tensors together."""
        return math.sqrt(math.fsum(f.frobenius_norm**2 for f in self.figures))


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A tensor to be written: its little-endian bytes and how to read them."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview


class TensorChecker:
    """Checks a packet file while its bytes pass by: its header first, then every value.

    Bytes are fed in order, in pieces of any size; how a file is cut changes neither the verdict nor
    the figures. `feed` keeps a finding for `finish` to raise, because whoever feeds may have to say
    first that these are not the bytes that were signed.
    """

    def __init__(self, file_bytes: int, rules: Rules = PACKET_RULES) -> None:
        """Begin a file.

        Args:
            file_bytes: Its size, which the header must account for.
            rules: What its kind may carry.
        """
        self._file_bytes = file_bytes
        self._rules = rules
        self._head = bytearray()
        self._header_bytes: int | None = None
        self._meter: _Meter | None = None
        self._finding: RejectedError | None = None

    @property
    def is_refused(self) -> bool:
        """Whether the file is refused already, whatever bytes may follow."""
        return self._finding is not None

    def feed(self, piece: memoryview) -> None:
        """Check the next bytes of the file."""
        try:
            while piece and not self._finding:
                piece = self._meter.take(piece) if self._meter else self._take_header(piece)
        except RejectedError as error:
            self._finding = error

    def finish(self) -> CheckedTensors:
        """The verdict on the bytes that were fed.

        Raises:
            RejectedError: AG-PKT-010 to -022 and -024 to -026, one per way of being wrong.
        """
        if self._finding:
            raise self._finding
        if not self._meter:
            raise RejectedError("AG-PKT-010", "the file ends inside its header")
        return self._meter.finish()

    def _take_header(self, piece: memoryview) -> memoryview:
        missing = _PREFIX + (self._header_bytes or 0) - len(self._head)
        self._head += piece[:missing]
        if self._header_bytes is None and len(self._head) == _PREFIX:
            self._header_bytes = _read_header_size(self._head, self._file_bytes)
        if self._header_bytes is not None and len(self._head) == _PREFIX + self._header_bytes:
            header = bytes(self._head[_PREFIX:])
            self._meter = _Meter(_read_header(header, self._file_bytes, self._rules))
            self._head.clear()
        return piece[missing:]


def read_table(handle: IO[bytes] | io.BufferedIOBase, rules: Rules = PACKET_RULES) -> TensorTable:
    """Read and check a header; no value is read.

    Raises:
        RejectedError: AG-PKT-010 to -021 and -024 to -026, one per way of being wrong.
    """
    file_bytes = handle.seek(0, os.SEEK_END)
    handle.seek(0)
    prefix = handle.read(_PREFIX)
    size = _read_header_size(prefix, file_bytes)
    header = handle.read(size)
    if len(header) != size:
        raise RejectedError("AG-PKT-010", "the file ends inside its header")
    return _read_header(header, file_bytes, rules)


def check_file(handle: io.BufferedIOBase, rules: Rules = PACKET_RULES) -> CheckedTensors:
    """Check a whole packet file: its header, then every value.

    Raises:
        RejectedError: As `TensorChecker.finish`.
    """
    checker = TensorChecker(handle.seek(0, os.SEEK_END), rules)
    handle.seek(0)
    block = memoryview(bytearray(_BLOCK))
    while not checker.is_refused and (count := handle.readinto(block)):
        checker.feed(block[:count])
    return checker.finish()


def check_shapes(table: TensorTable, expected: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Compare a table with the names, dtypes and shapes that were agreed.

    Raises:
        RejectedError: AG-PKT-023 at the first difference.
    """
    found = {entry.name: (entry.dtype, entry.shape) for entry in table.entries}
    for name in sorted(found.keys() ^ expected.keys()):
        state = "unexpected" if name in found else "missing"
        raise RejectedError("AG-PKT-023", f"{state} tensor {name[:80]}")
    for name, value in sorted(found.items()):
        if value != expected[name]:
            raise RejectedError("AG-PKT-023", f"tensor {name[:80]} has another dtype or shape")


def read_tensor(handle: IO[bytes], entry: TensorEntry) -> Float32:
    """Read one floating-point tensor as float32.

    Raises:
        RejectedError: AG-PKT-016 for other dtypes, AG-PKT-010 if the file became shorter.
    """
    handle.seek(entry.offset)
    content = handle.read(entry.size_bytes)
    if len(content) != entry.size_bytes:
        raise RejectedError("AG-PKT-010", "the file is shorter than its header says")
    return as_float32(content, entry.dtype).reshape(entry.shape)


def as_float32(content: bytes | memoryview, dtype: str) -> Float32:
    """Little-endian elements as float32; F64 is rounded.

    Raises:
        RejectedError: AG-PKT-016 for dtypes that are not floating point.
    """
    if dtype == "F32":
        return np.frombuffer(content, dtype="<f4")
    if dtype == "BF16":
        # bf16 is the upper half of a float32.
        halves = np.frombuffer(content, dtype="<u2")
        words: npt.NDArray[np.uint32] = np.left_shift(halves, np.uint32(16), dtype=np.uint32)
        return words.view(np.float32)
    if dtype in {"F16", "F64"}:
        wide = np.frombuffer(content, dtype="<f2" if dtype == "F16" else "<f8")
        # What is not finite afterwards is the caller's to refuse, not numpy's to warn about.
        with np.errstate(invalid="ignore", over="ignore"):
            return wide.astype(np.float32)
    raise RejectedError("AG-PKT-016", f"{dtype} holds no floating-point values")


def write_tensors(sink: IO[bytes], tensors: Mapping[str, RawTensor]) -> TensorTable:
    """Write tensors in the one canonical form and return the table of what was written.

    The egress guard rebuilds every outgoing file through this function, so nothing but names,
    shapes and values can leave: no metadata, no order, no padding chosen by anyone.

    Raises:
        RejectedError: AG-PKT-015 to -017, -019 and -024 for tensors that no reader would accept.
    """
    if not 1 <= len(tensors) <= LIMITS.tensors:
        raise RejectedError("AG-PKT-024", f"{len(tensors)} tensors to write")
    names = sorted(tensors, key=lambda name: (_LAYOUT.get(tensors[name].dtype, 0), name))
    entries = []
    offset = 0
    for name in names:
        tensor = tensors[name]
        size = memoryview(tensor.data).nbytes
        _check_name(name)
        if size != _expected_bytes(name, tensor.dtype, tensor.shape, QUANTISED_RULES):
            raise RejectedError("AG-PKT-019", f"{name[:80]}: size and shape disagree")
        entries.append(TensorEntry(name, tensor.dtype, tensor.shape, offset, size))
        offset += size
    header = _render_header(entries)
    sink.write(len(header).to_bytes(_PREFIX, "little") + header)
    for name in names:
        sink.write(tensors[name].data)
    start = _PREFIX + len(header)
    placed = tuple(
        TensorEntry(e.name, e.dtype, e.shape, e.offset + start, e.size_bytes) for e in entries
    )
    return TensorTable(placed, len(header), start + offset)


def _read_header_size(prefix: bytes | bytearray, file_bytes: int) -> int:
    size = int.from_bytes(prefix, "little")
    if len(prefix) == _PREFIX and size > LIMITS.tensor_header_bytes:
        raise RejectedError("AG-PKT-011", f"the header claims {size} bytes")
    if len(prefix) < _PREFIX or size > file_bytes - _PREFIX:
        raise RejectedError("AG-PKT-010", "the file ends inside its header")
    return size


def _read_header(header: bytes, file_bytes: int, rules: Rules) -> TensorTable:
    fields = _parse_header(header)
    metadata = fields.pop("__metadata__", None)
    if metadata is not None and rules.only_our_spelling:
        raise RejectedError("AG-PKT-014", "the header carries metadata")
    if not 1 <= len(fields) <= LIMITS.tensors:
        raise RejectedError("AG-PKT-024", f"the file has {len(fields)} tensors")
    start = _PREFIX + len(header)
    entries = sorted(
        (_read_entry(name, value, start, rules) for name, value in fields.items()),
        key=lambda entry: (entry.offset, entry.size_bytes),
    )
    _check_layout(entries, start, file_bytes)
    if rules.only_our_spelling and header != _render_header(entries):
        raise RejectedError("AG-PKT-026", "the header is not in its one canonical form")
    return TensorTable(tuple(entries), len(header), file_bytes)


def _parse_header(header: bytes) -> dict[str, canonical.Json]:
    if not header.startswith(b"{"):
        raise RejectedError("AG-PKT-012", "the header does not start with an object")
    # A parsed value takes some twenty times its text, so what a header of allowed tensors can hold
    # is counted before it is parsed. Neither character can occur in an allowed name.
    braces, commas = header.count(b"{") + header.count(b"["), header.count(b",")
    if braces > 3 * LIMITS.tensors + 8 or commas > 16 * LIMITS.tensors:
        raise RejectedError("AG-PKT-011", "the header holds more values than tensors need")
    try:
        value = json.loads(
            header.decode("utf-8"),
            object_pairs_hook=_refuse_duplicates,
            parse_constant=_refuse_number,
            parse_float=_refuse_number,
            parse_int=_read_integer,
        )
    except RejectedError:
        raise
    except (ValueError, RecursionError) as error:
        raise RejectedError(
            "AG-PKT-012", f"the header is not JSON: {type(error).__name__}"
        ) from error
    if not isinstance(value, dict):
        raise RejectedError("AG-PKT-012", "the header is not an object")
    return value


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = {name for name, _ in pairs}
    if len(names) != len(pairs):
        raise RejectedError("AG-PKT-013", "the header has the same name twice")
    return dict(pairs)


def _refuse_number(_text: str) -> Any:
    raise RejectedError("AG-PKT-012", "the header holds a number that is not an integer")


def _read_integer(digits: str) -> int:
    if len(digits) > 16:
        raise RejectedError("AG-PKT-012", "the header holds an integer beyond 2**53")
    return int(digits)


def _read_entry(name: str, value: canonical.Json, start: int, rules: Rules) -> TensorEntry:
    _check_name(name)
    if not isinstance(value, dict) or value.keys() != _ENTRY_FIELDS:
        raise RejectedError("AG-PKT-025", f"{name}: fields are not dtype, shape, data_offsets")
    dtype, shape = value["dtype"], _read_integers(value["shape"], name)
    offsets = _read_integers(value["data_offsets"], name)
    if not isinstance(dtype, str) or len(offsets) != 2:
        raise RejectedError("AG-PKT-025", f"{name}: a field has the wrong type")
    begin, end = offsets
    size = _expected_bytes(name, dtype, shape, rules)
    if end - begin != size:
        raise RejectedError("AG-PKT-019", f"{name}: offsets and shape disagree")
    return TensorEntry(name, dtype, shape, start + begin, size)


def _check_name(name: str) -> None:
    allowed = len(name) <= LIMITS.tensor_name_chars and _NAME.fullmatch(name)
    if not allowed or ".." in name or name.startswith("/"):
        raise RejectedError("AG-PKT-015", "a tensor name is not allowed")


def _read_integers(value: canonical.Json, name: str) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise RejectedError("AG-PKT-025", f"{name}: a field has the wrong type")
    # `true` is an int to Python and not to anyone else.
    if not all(type(number) is int and number >= 0 for number in value):
        raise RejectedError("AG-PKT-017", f"{name}: a shape or offset is not a natural number")
    return tuple(number for number in value if isinstance(number, int))


def _expected_bytes(name: str, dtype: str, shape: tuple[int, ...], rules: Rules) -> int:
    if dtype not in rules.dtypes:
        raise RejectedError("AG-PKT-016", f"{name}: a dtype is not allowed")
    if len(shape) > LIMITS.tensor_dimensions:
        raise RejectedError("AG-PKT-017", f"{name}: {len(shape)} dimensions")
    if rules.only_our_spelling and 0 in shape:
        raise RejectedError("AG-PKT-017", f"{name}: an empty tensor")
    return math.prod(shape) * DTYPE_BYTES[dtype]


def _check_layout(entries: Iterable[TensorEntry], start: int, file_bytes: int) -> None:
    """Every byte after the header belongs to exactly one tensor."""
    end = start
    for entry in entries:
        if entry.offset < end:
            raise RejectedError("AG-PKT-018", f"{entry.name} overlaps another tensor")
        if entry.offset > end:
            raise RejectedError("AG-PKT-020", f"there is a hole before {entry.name}")
        end = entry.offset + entry.size_bytes
    if end > file_bytes:
        raise RejectedError("AG-PKT-010", "the file is shorter than its header says")
    if end < file_bytes:
        raise RejectedError("AG-PKT-021", f"{file_bytes - end} bytes follow the last tensor")


def _render_header(entries: Iterable[TensorEntry]) -> bytes:
    """The header for these tensors, data laid out by element size, then by name."""
    ordered = sorted(entries, key=lambda entry: (_LAYOUT[entry.dtype], entry.name))
    parts = []
    offset = 0
    for entry in ordered:
        shape = ",".join(map(str, entry.shape))
        end = offset + entry.size_bytes
        parts.append(
            f'"{entry.name}":{{"dtype":"{entry.dtype}","shape":[{shape}],'
            f'"data_offsets":[{offset},{end}]}}'
        )
        offset = end
    header = ("{" + ",".join(parts) + "}").encode("ascii")
    # Spaces bring the data to a multiple of eight, as the library does.
    return header + b" " * (-len(header) % 8)


class _Meter:
    """Measures the tensors of a file one after another, block by block.

    Blocks are counted from the start of a tensor and gathered in buffers that are made once: fresh
    ones of this size would each be mapped and cleared by the kernel, which costs more than the
    arithmetic. Copying costs a quarter of it (measured).
    """

    def __init__(self, table: TensorTable) -> None:
        self._table = table
        self._figures: list[TensorFigures] = []
        self._raw = memoryview(bytearray(_BLOCK))
        self._wide = np.empty(_BLOCK // 2, dtype=np.float32)
        # Of the tensor whose bytes come now:
        self._gathered = self._measured = 0
        self._squares = 0.0

    def take(self, piece: memoryview) -> memoryview:
        """Take as much as the block still needs, and return the rest."""
        if len(self._figures) == len(self._table.entries):
            raise RejectedError("AG-PKT-021", "bytes follow the last tensor")
        entry = self._table.entries[len(self._figures)]
        wanted = min(_BLOCK, entry.size_bytes - self._measured)
        count = min(len(piece), wanted - self._gathered)
        self._raw[self._gathered : self._gathered + count] = piece[:count]
        self._gathered += count
        if self._gathered == wanted:
            self._measure(entry)
        return piece[count:]

    def finish(self) -> CheckedTensors:
        if len(self._figures) < len(self._table.entries):
            raise RejectedError("AG-PKT-010", "the file is shorter than its header says")
        return CheckedTensors(self._table, tuple(self._figures))

    def _measure(self, entry: TensorEntry) -> None:
        for values in self._widen(self._raw[: self._gathered], entry.dtype):
            self._squares += _sum_squares(values, entry.name)
        self._measured, self._gathered = self._measured + self._gathered, 0
        if self._measured == entry.size_bytes:
            self._figures.append(TensorFigures(entry.name, math.sqrt(self._squares)))
            self._measured, self._squares = 0, 0.0

    def _widen(self, block: memoryview, dtype: str) -> Iterator[Float32]:
        """The values of a block as float32, in any order; each is overwritten by the next."""
        if dtype == "F32":
            yield as_float32(block, dtype)
        elif dtype == "F16":
            with np.errstate(invalid="ignore"):
                self._wide[: len(block) // 2] = np.frombuffer(block, dtype="<f2")
            yield self._wide[: len(block) // 2]
        elif dtype in INTEGER_DTYPES:
            # As the numbers they are, in two parts because the buffer holds half as many.
            whole = np.frombuffer(block, dtype=np.int8 if dtype == "I8" else np.uint8)
            for part in (whole[: len(self._wide)], whole[len(self._wide) :]):
                self._wide[: len(part)] = part
                yield self._wide[: len(part)]
        else:
            # Two bf16 values share a 32-bit word: four times faster than widening each.
            words = np.frombuffer(block, dtype="<u4", count=len(block) // 4)
            wide = self._wide[: len(words)]
            np.left_shift(words, np.uint32(16), out=wide.view(np.uint32))
            yield wide
            np.bitwise_and(words, np.uint32(0xFFFF0000), out=wide.view(np.uint32))
            yield wide
            if len(block) % 4:
                yield as_float32(block[-2:], dtype)


def _sum_squares(values: Float32, name: str) -> float:
    """The sum of squares of a block, refusing values that are not finite.

    Squares never cancel, so a NaN or an infinity always shows in the sum and values need no pass
    of their own. Rows are short because single precision loses digits in long sums.
    """
    whole = len(values) // _ROW * _ROW
    rows, rest = values[:whole].reshape(-1, _ROW), values[whole:]
    with np.errstate(over="ignore", invalid="ignore"):
        squares = float(np.vecdot(rows, rows).sum(dtype=np.float64)) + float(rest.dot(rest))
    return squares if math.isfinite(squares) else _sum_wide(values, name)


def _sum_wide(values: Float32, name: str) -> float:
    if not np.isfinite(values).all():
        raise RejectedError("AG-PKT-022", f"{name} holds NaN or infinite values")
    # All values are finite, but a square is beyond single precision.
    return float(np.square(values.astype(np.float64)).sum())
