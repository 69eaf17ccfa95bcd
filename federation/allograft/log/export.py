# SPDX-License-Identifier: Apache-2.0
"""Write a log as a folder that an auditor verifies offline, with no trust in who wrote it.

    checkpoint            the newest witnessed checkpoint, with cosignatures
    policy                log, witnesses and quorum, for other C2SP tools
    tile/…                tlog-tiles: hashes and entries
    roster/DIGEST.json    every roster that the log announces, with all its files
    document/SHA256.json  documents that entries announce and that were kept

The folder is closed: `audit` refuses a file too many, and a missing one of all but `document/`.
Documents may be missing, since a log need not keep them; `audit` counts what it could not check.
Files are gathered in `.partial` and moved in whole, so a failed export is no obstacle to the next.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from allograft.crypto.vkey import WITNESS, read_vkey
from allograft.durable import durable_write, sync_directory
from allograft.errors import RejectedError
from allograft.log.checkpoint import Checkpoint
from allograft.log.event import read_event
from allograft.log.store import LogReader
from allograft.log.tiles import encode_entries, list_tiles
from allograft.roster import bundle
from allograft.roster.client import last_moment, verify_bundle
from allograft.roster.records import Roster, WitnessPolicy

_PARTIAL = ".partial"


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written.

    Attributes:
        entries: Entries in the folder.
        waiting: Newer entries that too few witnesses have seen, and that are not in it.
    """

    origin: str
    entries: int
    waiting: int
    rosters: int
    documents: int


def export_log(log: LogReader, out: Path) -> Exported:
    """Write the log up to its newest witnessed checkpoint.

    Args:
        log: The log.
        out: An empty or absent directory.

    Raises:
        RejectedError: AG-LOG-017 if nothing has a quorum yet, AG-LOG-013 if the directory is in
            use, AG-LOG-016 if the log announces no roster.
        UnavailableError: AG-STO-001.
    """
    if out.exists() and any(path.name != _PARTIAL for path in out.iterdir()):
        raise RejectedError("AG-LOG-013", f"{out.name} is not empty")
    policy = newest_roster(log).witness_policy()
    note = log.witnessed(policy)
    size = Checkpoint.from_text(note.text).size
    entries = [log.entry(index) for index in range(size)]
    rosters, documents = _announced(log, entries)
    with _whole(out) as partial:
        for name, content in rosters.items():
            _write(partial / "roster" / f"{name}.json", content)
        for name, content in documents.items():
            _write(partial / "document" / f"{name}.json", content)
        for tile in list_tiles(size):
            _write(partial / tile.path, tile.encode(log.node))
            if tile.level == 0:
                bundled = encode_entries(entries[tile.start : tile.start + tile.width])
                _write(partial / tile.entries_path, bundled)
        _write(partial / "policy", write_policy(policy).encode())
        _write(partial / "checkpoint", note.to_text().encode())
    return Exported(log.origin, size, log.size - size, len(rosters), len(documents))


def is_witnessed(log: LogReader) -> bool:
    """Whether enough witnesses have seen every entry.

    Raises:
        RejectedError: AG-LOG-016 if the log announces no roster.
    """
    try:
        note = log.witnessed(newest_roster(log).witness_policy())
    except RejectedError as error:
        if error.code != "AG-LOG-017":
            raise
        return False
    return Checkpoint.from_text(note.text).size == log.size


def newest_roster(log: LogReader) -> Roster:
    """The roster that the log announced last, verified back to the root it carries.

    Raises:
        RejectedError: AG-LOG-016 if there is none, or AG-ROS-* if it does not verify.
    """
    for index in range(log.size - 1, -1, -1):
        event = read_event(log.entry(index))
        if event.event == "roster":
            files = bundle.unpack(_roster_content(log, event.document_sha256))
            return verify_bundle(files["1.root.json"], files, last_moment(files))
    raise RejectedError("AG-LOG-016", "the log announces no roster")


def write_policy(policy: WitnessPolicy) -> str:
    """A witness policy as a C2SP tlog-policy file."""
    names = [read_vkey(text, WITNESS).name for text in policy.witness_vkeys]
    lines = [f"log {policy.log_vkey}"]
    lines += [
        f"witness {name} {vkey}" for name, vkey in zip(names, policy.witness_vkeys, strict=True)
    ]
    lines += [f"group sites {policy.quorum} {' '.join(names)}", "quorum sites", ""]
    return "\n".join(lines)


def _announced(
    log: LogReader, entries: Sequence[bytes]
) -> tuple[dict[str, bytes], dict[str, bytes]]:
    rosters: dict[str, bytes] = {}
    documents: dict[str, bytes] = {}
    for entry in entries:
        event = read_event(entry)
        if event.event == "roster":
            rosters[event.document_sha256] = _roster_content(log, event.document_sha256)
            continue
        content = log.document(event.document_sha256)
        if content is not None:
            documents[event.document_sha256] = content
    return rosters, documents


def _roster_content(log: LogReader, digest: str) -> bytes:
    content = log.document(digest)
    if content is None:
        raise RejectedError("AG-LOG-016", "a roster that the log announces was not kept")
    return content


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A directory inside `out` whose content moves up when the block ends without error.

    Inside and not beside it: `out` may be a mount point or the working directory, over which
    nothing can be renamed.
    """
    partial = out / _PARTIAL
    existed = out.exists()
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        # The checkpoint last, so that a folder that was cut short is recognised as none.
        for path in sorted(partial.iterdir(), key=lambda path: path.name == "checkpoint"):
            path.rename(out / path.name)
        sync_directory(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if not existed:
            with suppress(OSError):
                out.rmdir()  # Only if it is empty: nothing was moved.


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    durable_write(path, content, mode=0o644)
