# SPDX-License-Identifier: Apache-2.0
"""The egress guard: rebuilds a payload so that nothing leaves but agreed names and values.

Weights are a channel: a file has room for metadata, extra tensors and an order, and 32-bit values
have low bits that nobody would miss. So the guard never forwards a file. It writes a new one from
an allow-list, in the one canonical form, and rounds every value to bf16 stochastically with the
operating system's randomness, which replaces the low 16 bits by chance. What remains is what the
values themselves say; an insider who encodes data in high bits is not stopped here. Integers of a
quantised kind are copied: of 8 or 4 bits each, all are high ones, and another random rounding would
only add noise. Their type, size and range are checked.

`seal_release` is the only caller of the sealing step: it asks for a Release and seals the approved
bytes for the released recipients, and no others.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import numpy as np
import numpy.typing as npt

from allograft.crypto import canonical, dsse
from allograft.durable import durable_file, storage_errors
from allograft.errors import RejectedError
from allograft.packet.container import SealPlan, seal_packet, split_attestations
from allograft.packet.delta import Integers
from allograft.packet.header import Header
from allograft.packet.tensors import (
    DTYPE_BYTES,
    LOCAL_RULES,
    RawTensor,
    TensorEntry,
    TensorTable,
    as_float32,
    read_table,
    write_tensors,
)
from allograft.privacy.dossier import PayloadPart
from allograft.privacy.release import Release

WireDtype = Literal["bf16", "f32"]

#: The wire formats by their names in the policy, as safetensors spells them.
WIRE_DTYPES: Mapping[str, str] = {"bf16": "BF16", "f32": "F32"}

_FLOATS = frozenset({"F64", "F32", "BF16", "F16"})
_BLOCK_ELEMENTS = 1 << 20

RandomBytes = Callable[[int], bytes]


@dataclass(frozen=True, slots=True)
class AllowedTensor:
    """What one tensor of a payload may be.

    Attributes:
        shape: Its only shape.
        max_rms: Largest root mean square of its values; see `shapes`. Integers have bounds of their
            own.
        integers: Their form, if it holds whole numbers; the wire's format is for all others.
    """

    shape: tuple[int, ...]
    max_rms: float
    integers: Integers | None = None


#: Every tensor that a payload file must hold, by name; nothing else may be in it.
AllowList = Mapping[str, AllowedTensor]


def rebuild_file(
    source: Path,
    target: Path,
    allowed: AllowList,
    wire_dtype: WireDtype = "bf16",
    random_bytes: RandomBytes = os.urandom,
) -> PayloadPart:
    """Write a fresh payload file from an extracted one.

    Memory stays constant: values pass through a scratch file beside the target.

    Args:
        source: What the recipe extracted.
        target: The payload file to write; its name is the part's name.
        allowed: The tensors it must hold.
        wire_dtype: `bf16`, or `f32`, which copies values and keeps their low bits.
        random_bytes: Source of randomness for rounding; the default is the only sound choice.

    Raises:
        RejectedError: AG-PKT-* if the source is no tensor file or holds integers out of range,
            AG-PRV-040 if it holds anything but the allowed tensors, AG-PRV-041 for values that are
            not finite.
        UnavailableError: AG-STO-001 if the disk is full.
    """
    dtype = WIRE_DTYPES[wire_dtype]
    with source.open("rb") as handle, storage_errors(target.name), ExitStack() as stack:
        table = read_table(handle, LOCAL_RULES)
        _check_allowed(table, allowed)
        forms = [allowed[entry.name].integers for entry in table.entries]
        dtypes = [form.dtype if form else dtype for form in forms]
        sizes = [_elements(e) * DTYPE_BYTES[d] for e, d in zip(table.entries, dtypes, strict=True)]
        scratch = _map_scratch(stack, target.parent, sum(sizes))
        tensors: dict[str, RawTensor] = {}
        start = 0
        for entry, form, size in zip(table.entries, forms, sizes, strict=True):
            view = stack.enter_context(scratch[start : start + size])
            if form:
                _copy_integers(handle, entry, view, form)
            else:
                _convert(handle, entry, view, wire_dtype, random_bytes)
            to = form.dtype if form else dtype
            tensors[entry.name] = RawTensor(to, entry.shape, view)
            start += size
        with durable_file(target) as sink:
            written = write_tensors(sink, tensors)
    if target.stat().st_size != written.file_bytes:
        raise RejectedError("AG-PRV-040", "the rebuilt file has another size than its table")
    return PayloadPart(target.name, written.file_bytes, hash_file(target))


def with_wire_dtype(
    facts: Mapping[str, canonical.Json], wire_dtype: WireDtype
) -> dict[str, canonical.Json]:
    """The facts of an extract as they are true of the rebuilt payload.

    Facts that name a tensor type (`dtype`, as torch spells it) must name the wire's.
    """
    named = {"bf16": "bfloat16", "f32": "float32"}[wire_dtype]
    return dict(facts) | ({"dtype": named} if "dtype" in facts else {})


def hash_file(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def admit_payload(release: Release, directory: Path) -> tuple[Path, ...]:
    """The files of a payload directory, if they are exactly the approved bytes.

    Raises:
        RejectedError: AG-PRV-032 if a file is missing, added, replaced by a link or changed.
    """
    found = sorted(entry.name for entry in os.scandir(directory))
    if found != [part.name for part in release.parts]:
        raise RejectedError("AG-PRV-032", "the payload directory has other files than approved")
    paths = []
    for part in release.parts:
        path = directory / part.name
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size != part.size_bytes:
            raise RejectedError("AG-PRV-032", f"{part.name} is no file of the approved size")
        if hash_file(path) != part.sha256:
            raise RejectedError("AG-PRV-032", f"{part.name} changed since it was approved")
        paths.append(path)
    return tuple(paths)


def seal_release(
    release: Release, payload: Path, attestations: bytes, plan: SealPlan, out: Path
) -> Header:
    """Seal a released payload into a dispatch directory.

    Args:
        release: What `check_release` allowed.
        payload: The payload directory.
        attestations: The content of `attestations.jsonl`; must hold the released dossier.
        plan: The dispatch; must name the released packet, parts and recipients.
        out: An existing directory for the sealed files.

    Raises:
        RejectedError: AG-PRV-032 if the plan, the payload or the dossier is not the released one,
            and those of `seal_packet`.
        UnavailableError: AG-STO-001 when the disk is full.
    """
    planned = tuple(PayloadPart(p.name, p.size_bytes, p.sha256) for p in plan.parts)
    if (plan.packet_id, plan.kind, planned) != (release.packet_id, release.kind, release.parts):
        raise RejectedError("AG-PRV-032", "the dispatch is of another packet than was released")
    if sorted(recipient.site for recipient in plan.recipients) != list(release.recipients):
        raise RejectedError("AG-PRV-032", "the dispatch is for other recipients than released")
    if release.dossier_digest not in _statement_digests(attestations):
        raise RejectedError("AG-PRV-032", "the attestations lack the released dossier")
    admit_payload(release, payload)
    return seal_packet(payload, attestations, plan, out)


def _statement_digests(attestations: bytes) -> set[str]:
    """SHA-256 of each statement in an attestation file; lines of other formats are passed over."""
    digests = set()
    for line in split_attestations(attestations):
        try:
            payload = dsse.Envelope.from_bytes(line).payload
        except RejectedError:
            continue
        digests.add(hashlib.sha256(payload).hexdigest())
    return digests


def round_to_bf16(
    values: npt.NDArray[np.float32], random_bytes: RandomBytes = os.urandom
) -> npt.NDArray[np.uint16]:
    """Round float32 values to bf16, up or down by chance, so that the mean is kept.

    A uniform 16-bit number is added to the magnitude before its low 16 bits are cut: the value
    moves to the next bf16 number with the probability of its distance. Zero stays zero.

    Raises:
        RejectedError: AG-PRV-041 if a value is or becomes infinite, or is NaN.
    """
    noise = np.frombuffer(random_bytes(2 * values.size), dtype="<u2")
    bits = np.ascontiguousarray(values).view(np.uint32)
    _check_finite(values)
    # The sign is the top bit and a finite exponent leaves room above, so the sum cannot wrap.
    rounded: npt.NDArray[np.uint16] = ((bits + noise) >> np.uint32(16)).astype(np.uint16)
    if ((rounded & 0x7F80) == 0x7F80).any():
        raise RejectedError("AG-PRV-041", "a value is beyond the range of bf16")
    return rounded


def _check_allowed(table: TensorTable, allowed: AllowList) -> None:
    found = {entry.name: entry for entry in table.entries}
    for name in sorted(found.keys() ^ allowed.keys()):
        # Not named when unexpected: a smuggled name may itself be the message.
        what = "a tensor that the kind does not have" if name in found else f"no tensor {name}"
        raise RejectedError("AG-PRV-040", f"the extract holds {what}")
    for name, entry in found.items():
        if entry.shape != allowed[name].shape:
            raise RejectedError("AG-PRV-040", f"tensor {name} has another shape than its base")
        form = allowed[name].integers
        if entry.dtype not in ({form.dtype} if form else _FLOATS):
            what = form.dtype if form else "a floating-point type"
            raise RejectedError("AG-PRV-040", f"tensor {name} is not of {what}")


def _elements(entry: TensorEntry) -> int:
    return entry.size_bytes // DTYPE_BYTES[entry.dtype]


def _map_scratch(stack: ExitStack, directory: Path, size: int) -> memoryview:
    """Memory backed by an unnamed private file, gone with the stack."""
    file = stack.enter_context(tempfile.TemporaryFile(dir=directory))  # noqa: SIM115
    # Reserved up front: writing to a mapped hole on a full disk would kill the process.
    os.posix_fallocate(file.fileno(), 0, size)
    mapped = stack.enter_context(mmap.mmap(file.fileno(), size))
    return stack.enter_context(memoryview(mapped))


def _convert(
    handle: IO[bytes],
    entry: TensorEntry,
    target: memoryview,
    wire_dtype: WireDtype,
    random_bytes: RandomBytes,
) -> None:
    written = 0
    for values in _blocks(handle, entry):
        if wire_dtype == "bf16":
            content = round_to_bf16(values, random_bytes).astype("<u2").tobytes()
        else:
            _check_finite(values)
            content = values.astype("<f4").tobytes()
        target[written : written + len(content)] = content
        written += len(content)


def _copy_integers(
    handle: IO[bytes], entry: TensorEntry, target: memoryview, form: Integers
) -> None:
    written = 0
    rows = max(1, _BLOCK_ELEMENTS // form.row_bytes)
    for content in _read_blocks(handle, entry, rows * form.row_bytes):
        form.check(content)
        target[written : written + len(content)] = content
        written += len(content)


def _blocks(handle: IO[bytes], entry: TensorEntry) -> Iterator[npt.NDArray[np.float32]]:
    for content in _read_blocks(handle, entry, _BLOCK_ELEMENTS * DTYPE_BYTES[entry.dtype]):
        yield as_float32(content, entry.dtype)


def _read_blocks(handle: IO[bytes], entry: TensorEntry, size: int) -> Iterator[bytes]:
    handle.seek(entry.offset)
    left = entry.size_bytes
    while left:
        content = handle.read(min(size, left))
        if len(content) < min(size, left):
            raise RejectedError("AG-PRV-040", "the extract became shorter while it was read")
        left -= len(content)
        yield content


def _check_finite(values: npt.NDArray[np.float32]) -> None:
    if not np.isfinite(values).all():
        raise RejectedError("AG-PRV-041", "the extract holds NaN or infinite values")
