# SPDX-License-Identifier: Apache-2.0
"""Sealing and opening, against the speed of SHA-256 on one thread of the same machine.

SHA-256 is the wall: every packet is hashed as plaintext and as ciphertext, on a thread each, so the
ratios need two free cores. `seal_and_sign` is what a donor does for a dispatch (seal, hash both
sides, wrap for ten recipients, sign, write and sync); `open_and_verify` is what a recipient does
(verify, unwrap, open, hash both sides, check every tensor value, write and sync). Two controls tell
what no sealing can do without: `copy` only reads and writes the same bytes, which on a virtual
machine whose memory is taken back by its host can cost as much as a hash; `seal_without_files` is
the cipher and the two hashes between buffers in memory. Memory is the peak of a process that does
nothing else.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path

from allograft.crypto import keystore, seal
from allograft.crypto.keys import SealingKey, SigningKey
from allograft.durable import durable_file
from allograft.packet import container, oms
from allograft.packet.header import HEADER_NAME
from allograft.provenance.dispatch import DISPATCH_TYPE, read_dispatch, sign_dispatch
from allograft.provenance.intoto import verify_statement
from benchmarks import report

_NAME = "organ.safetensors"
_RECIPIENTS = 10
_TENSOR_BYTES = 32 << 20
_BLOCK = 1 << 20


def main() -> None:
    """Measure and tell; with `--step`, be the process that is measured."""
    if sys.argv[1:2] == ["--step"]:
        _be_measured(sys.argv[2], Path(sys.argv[3]))
        return
    options = report.parse_options("speed and memory of sealing and opening")
    size = (256 << 20) if options.quick else (2 << 30)
    rounds = 2 if options.quick else 5
    walls, cpus, copies, bare, seals, opens = [], [], [], [], [], []
    # A RAM disk where there is one: the ratios are about processor work, and disks differ.
    ram = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108
    with tempfile.TemporaryDirectory(prefix="allograft-bench-", dir=ram) as folder:
        root = Path(folder)
        _prepare(root, size)
        # Taken in turns, so that a busy neighbour slows all alike.
        for _ in range(rounds):
            seconds, cpu_seconds = _time_hash(root / "payload" / _NAME)
            walls.append(seconds)
            cpus.append(cpu_seconds)
            copies.append(_run("copy", root))
            (root / "copy").unlink()
            bare.append(_run("bare", root))
            seals.append(_run("seal", root))
            opens.append(_run("open", root))
            # Here, not in a step: to remove a file from a RAM disk costs a quarter of a pass.
            shutil.rmtree(root / "out")
            shutil.rmtree(root / "opened")
    wall, passes = min(walls), min(cpus)
    seal_s = min(run["seconds"] for run in seals)
    open_s = min(run["seconds"] for run in opens)
    figures = [
        report.Figure("payload", size / (1 << 20), "MiB"),
        report.Figure("sha256_one_thread", size / wall / 1e6, "MB/s"),
        report.Figure("seal_and_sign", size / seal_s / 1e6, "MB/s"),
        report.Figure("open_and_verify", size / open_s / 1e6, "MB/s"),
        report.Figure("seal_and_sign_ratio", wall / seal_s, "x", ">= 0.6"),
        report.Figure("open_and_verify_ratio", wall / open_s, "x", ">= 0.6"),
        report.Figure("copy_ratio", wall / min(run["seconds"] for run in copies), "x"),
        report.Figure("seal_without_files_ratio", wall / min(r["seconds"] for r in bare), "x"),
        # Processor time in SHA-256 passes over the payload; two of them are the two digests. Unlike
        # the ratios above it hardly changes when neighbours keep the machine busy.
        report.Figure("copy_cost", min(r["cpu_seconds"] for r in copies) / passes, "passes"),
        report.Figure("seal_cost", min(r["cpu_seconds"] for r in seals) / passes, "passes"),
        report.Figure("open_cost", min(r["cpu_seconds"] for r in opens) / passes, "passes"),
        report.Figure("seal_peak_rss", max(r["rss_mib"] for r in seals), "MiB", "<= 128"),
        report.Figure("open_peak_rss", max(r["rss_mib"] for r in opens), "MiB", "<= 128"),
    ]
    report.publish("seal", figures, options)


def _prepare(root: Path, size: int) -> None:
    """Write a payload of bf16 tensors without holding it in memory, and the keys."""
    (root / "payload").mkdir()
    entries: list[str] = []
    offset = 0
    while offset < size:
        end = min(size, offset + _TENSOR_BYTES)
        name = f"blocks.{len(entries):04d}.weight"
        shape = (end - offset) // 2
        place = f'"shape":[{shape}],"data_offsets":[{offset},{end}]'
        entries.append(f'"{name}":{{"dtype":"BF16",{place}}}')
        offset = end
    header = ("{" + ",".join(entries) + "}").encode()
    header += b" " * (-len(header) % 8)
    # Exponents are kept below infinity; everything else is noise.
    block = bytes(b & 0x3F if n % 2 else b for n, b in enumerate(_noise()))
    with (root / "payload" / _NAME).open("wb") as sink:
        sink.write(len(header).to_bytes(8, "little") + header)
        for _ in range(size // _BLOCK):
            sink.write(block)
    (part,) = container.list_payload(root / "payload", "organ")
    (root / "part.json").write_text(json.dumps(asdict(part)), encoding="ascii")
    keystore.write_signing_key(root / "signing.pem", SigningKey.generate())
    keystore.write_sealing_key(root / "sealing.key", SealingKey.generate())


def _noise() -> bytes:
    return hashlib.shake_128(b"benchmark").digest(_BLOCK)


def _time_hash(path: Path) -> tuple[float, float]:
    start, cpu_start = time.perf_counter(), time.process_time()
    with path.open("rb") as handle:
        hashlib.file_digest(handle, "sha256")
    return time.perf_counter() - start, time.process_time() - cpu_start


def _run(step: str, root: Path) -> dict[str, float]:
    """Run one step in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.seal", "--step", step, str(root)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def _be_measured(step: str, root: Path) -> None:
    work = {"copy": _copy, "bare": _seal_bare, "seal": _seal, "open": _open}[step]
    start, cpu_start = time.perf_counter(), time.process_time()
    work(root)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    status = Path("/proc/self/status").read_text(encoding="ascii")
    peak_kib = next(int(line.split()[1]) for line in status.splitlines() if "VmHWM" in line)
    figures = {"seconds": seconds, "cpu_seconds": cpu_seconds, "rss_mib": peak_kib / 1024}
    sys.stdout.write(json.dumps(figures))


def _copy(root: Path) -> None:
    """Read and write the payload, and nothing else."""
    with (root / "payload" / _NAME).open("rb") as source, durable_file(root / "copy") as sink:
        shutil.copyfileobj(source, sink, _BLOCK)


class _Memory:
    """As many bytes as the payload has, from one buffer, and a place that forgets."""

    def __init__(self, size: int) -> None:
        self._left = size

    def readinto(self, buffer: memoryview, /) -> int:
        count = min(self._left, len(buffer))
        self._left -= count
        return count

    def write(self, buffer: memoryview, /) -> int:
        return len(buffer)


def _seal_bare(root: Path) -> None:
    """The cipher and the two hashes, and nothing else."""
    memory = _Memory((root / "payload" / _NAME).stat().st_size)
    seal.seal_stream(memory, memory, seal.generate_content_key(), b"")


def _seal(root: Path) -> None:
    """What a donor does; the payload was hashed when it was approved."""
    key = keystore.read_signing_key(root / "signing.pem")
    recipient = keystore.read_sealing_key(root / "sealing.key").public
    fields = json.loads((root / "part.json").read_text(encoding="ascii"))
    parts = (container.PlainPart(fields["name"], fields["size_bytes"], fields["sha256"]),)
    others = [SealingKey.generate().public for _ in range(_RECIPIENTS - 1)]
    names = [f"site-{n}" for n in range(_RECIPIENTS)]
    now = datetime.now(UTC)
    plan = container.SealPlan(
        packet_id="0" * 32,
        dispatch_id="1" * 32,
        donor="donor",
        kind="organ",
        not_after=now + timedelta(days=1),
        statement_digest="a" * 64,
        parts=parts,
        recipients=tuple(
            container.Recipient(name, public)
            for name, public in zip(names, [recipient, *others], strict=True)
        ),
    )
    out = root / "out"
    out.mkdir()
    bundle = oms.sign_bundle([oms.Resource(p.name, p.sha256) for p in parts], key)
    attestations = container.join_attestations([bundle])
    header = container.seal_packet(root / "payload", attestations, plan, out)
    content = (out / HEADER_NAME).read_bytes()
    (out / "dispatch.json").write_bytes(sign_dispatch(header, content, "organ", now, key))


def _open(root: Path) -> None:
    """What a recipient does after it took the files in."""
    out = root / "out"
    keys = [keystore.read_signing_key(root / "signing.pem").public]
    opener = container.Opener("site-0", keystore.read_sealing_key(root / "sealing.key"))
    header, content = container.read_sealed_header(out)
    statement = verify_statement((out / "dispatch.json").read_bytes(), keys, DISPATCH_TYPE)
    dispatch = read_dispatch(statement, header, content)
    attestations = container.open_manifest(out, header, opener)
    (line,) = container.split_attestations(attestations)
    (resource,) = oms.verify_bundle(line, keys)
    size = header.parts[0].plain_bytes
    parts = (container.PlainPart(resource.name, size, resource.sha256),)
    container.open_payload(out, header, dispatch.kind, parts, opener, root / "opened")


if __name__ == "__main__":
    main()
