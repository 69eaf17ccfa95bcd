# SPDX-License-Identifier: Apache-2.0
"""Verify an exported log offline: no network, and no trust in the coordinator that wrote it.

Everything is recomputed from entries and the roster's root: tiles and root hash, each roster, each
entry's signature by the roster in force at its place, the order of events, and the witnesses'
cosignatures on the whole. The first entry at fault is named. See protos/spec/log.md, "Audit".
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from allograft.crypto import canonical, dsse
from allograft.errors import RejectedError, UnavailableError
from allograft.limits import LIMITS
from allograft.log.checkpoint import Checkpoint
from allograft.log.cosignature import Cosignature
from allograft.log.event import Event, read_event, verify_event
from allograft.log.export import write_policy
from allograft.log.merkle import leaf_hash, node_hash, root_of
from allograft.log.note import read_note
from allograft.log.proof import verify_witnessed
from allograft.log.tiles import decode_entries, decode_tile, list_tiles
from allograft.roster import bundle
from allograft.roster.client import root_fingerprint, verify_bundle
from allograft.roster.records import Roster


@dataclass(frozen=True, slots=True)
class Audited:
    """A log that was verified from its first to its last entry.

    Attributes:
        events: Every event, in the log's order.
        missing_documents: Announced documents that the folder does not hold; their entries were
            verified, their content could not be compared.
        unchecked_receipts: Receipts whose dispatch document is missing, so that nothing shows
            that they come from a recipient of that dispatch.
        root_fingerprint: What the auditor compares with the roster's keeper.
    """

    origin: str
    size: int
    root: bytes
    events: tuple[Event, ...]
    cosignatures: tuple[Cosignature, ...]
    quorum: int
    rosters: int
    missing_documents: int
    unchecked_receipts: int
    root_fingerprint: str


@dataclass(frozen=True, slots=True)
class _Dispatched:
    """A dispatch that the log has seen; the audience is known if its document is there."""

    packet_id: str
    audience: frozenset[str] | None


@dataclass(slots=True)
class Replay:
    """The state of the consortium as the entries so far tell it.

    Attributes:
        anchor: The first root of the roster.
        bundles: Rosters by digest.
        documents: Documents by SHA-256.
    """

    anchor: bytes
    bundles: Mapping[str, bundle.Files]
    documents: Mapping[str, bytes]
    roster: Roster | None = None
    rosters: int = 0
    missing_documents: int = 0
    unchecked_receipts: int = 0
    _files: bundle.Files = field(default_factory=dict)
    _offers: dict[str, Event] = field(default_factory=dict)
    _withdrawn: set[str] = field(default_factory=set)
    _dispatches: dict[str, _Dispatched] = field(default_factory=dict)

    def take(self, entry: bytes) -> Event:
        """Verify the next entry and move on.

        Raises:
            RejectedError: AG-LOG-001 or AG-SIG-* the entry itself, AG-ROS-* its author, AG-LOG-015
                order, AG-LOG-016 roster, AG-LOG-014 a document that is not the announced one.
        """
        event = read_event(entry)
        if event.event == "roster":
            self._change_roster(event)
        if self.roster is None:
            raise RejectedError("AG-LOG-016", "the log does not begin with a roster")
        if event.time >= self.roster.expires:
            raise RejectedError("AG-LOG-016", "the roster in force had expired")
        verified = verify_event(entry, self.roster, event.time)
        if event.event != "roster":
            self._check_document(verified)
            self._check_order(verified)
        return verified

    def _change_roster(self, event: Event) -> None:
        files = self.bundles.get(event.document_sha256)
        if files is None:
            raise RejectedError("AG-LOG-016", "a roster that the log announces is missing")
        if bundle.digest(files) != event.document_sha256:
            raise RejectedError("AG-LOG-016", "a roster is not the announced one")
        try:
            self.roster = verify_bundle(self.anchor, files, event.time, self._files)
        except RejectedError as error:
            raise RejectedError("AG-LOG-016", f"{error.code}: {error.cause}") from error
        self._files = files
        self.rosters += 1

    def _check_document(self, event: Event) -> None:
        content = self.documents.get(event.document_sha256)
        if content is None:
            self.missing_documents += 1
        elif hashlib.sha256(content).hexdigest() != event.document_sha256:
            raise RejectedError("AG-LOG-014", "a document is not the announced one")

    def _check_order(self, event: Event) -> None:
        if event.event == "offer":
            earlier = self._offers.setdefault(event.packet_id, event)
            same = (event.actor, event.document_sha256)
            _require((earlier.actor, earlier.document_sha256) == same, "one packet offered twice")
            return
        offer = self._offers.get(event.packet_id)
        if offer is None:
            raise RejectedError("AG-LOG-015", f"a {event.event} of a packet that was not offered")
        if event.event == "receipt":
            self._check_receipt(event)
        elif event.event in {"dispatch", "withdrawal"}:
            _require(event.actor == offer.actor, f"a {event.event} by another site than the donor")
        if event.event == "withdrawal":
            self._withdrawn.add(event.packet_id)
        elif event.event == "dispatch":
            _require(event.packet_id not in self._withdrawn, "a dispatch of a withdrawn packet")
            _require(event.dispatch_id not in self._dispatches, "a dispatch id used twice")
            audience = _read_audience(self.documents.get(event.document_sha256))
            self._dispatches[event.dispatch_id] = _Dispatched(event.packet_id, audience)

    def _check_receipt(self, event: Event) -> None:
        dispatched = self._dispatches.get(event.dispatch_id)
        if dispatched is None:
            raise RejectedError("AG-LOG-015", "a receipt before its dispatch")
        _require(dispatched.packet_id == event.packet_id, "a receipt for another packet")
        audience = dispatched.audience
        if audience is None:
            self.unchecked_receipts += 1
        else:
            _require(event.actor in audience, "a receipt by no recipient")


def audit_folder(folder: Path, expected_root: str = "") -> Audited:
    """Verify an exported log.

    Args:
        folder: What `export_log` wrote.
        expected_root: Fingerprint (hex) of the roster's first root, as its keeper tells it. If
            empty, the root in the folder is taken and its fingerprint reported: then the audit
            shows that the folder is consistent, not whose consortium it is.

    Raises:
        RejectedError: AG-LOG-* as their titles say; the cause names the first entry at fault.
        UnavailableError: AG-STO-003 if there is no export.
    """
    reader = _Folder(folder)
    note = read_note(reader.read("checkpoint", LIMITS.note_bytes))
    claimed = Checkpoint.from_text(note.text)
    entries = _read_entries(reader, claimed.size)
    bundles = _read_bundles(reader)
    anchor = _find_anchor(bundles, entries, expected_root)
    documents = {
        name: reader.read(f"document/{name}.json", LIMITS.json_document_bytes)
        for name in reader.names("document")
    }
    replay = Replay(anchor, bundles, documents)
    events = tuple(_take(replay, index, entry) for index, entry in enumerate(entries))
    roster = replay.roster
    if roster is None:
        raise RejectedError("AG-LOG-016", "the log announces no roster")
    if root_of(leaf_hash(entry) for entry in entries) != claimed.root:
        raise RejectedError("AG-LOG-014", "the entries do not lead to the signed root")
    checkpoint, cosignatures = verify_witnessed(note, roster.witness_policy())
    if checkpoint.origin != roster.coordinator.origin:
        raise RejectedError("AG-LOG-005", "the checkpoint is of another coordinator's log")
    if len(note.lines) != 1 + len(cosignatures):
        raise RejectedError("AG-LOG-013", "the checkpoint carries lines of others")
    _check_policy(reader, roster)
    announced = {event.document_sha256 for event in events}
    reader.check_closed(announced)
    return Audited(
        origin=checkpoint.origin,
        size=checkpoint.size,
        root=checkpoint.root,
        events=events,
        cosignatures=cosignatures,
        quorum=roster.witness_quorum,
        rosters=replay.rosters,
        missing_documents=replay.missing_documents,
        unchecked_receipts=replay.unchecked_receipts,
        root_fingerprint=root_fingerprint(anchor),
    )


class _Folder:
    """Reads files of an export once each, and knows which were read."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "checkpoint").is_file():
            raise UnavailableError("AG-STO-003", f"{folder.name} holds no exported log")
        self._folder = folder
        self._found = {
            path.relative_to(folder).as_posix()
            for path in folder.rglob("*")
            if path.is_symlink() or not path.is_dir()
        }
        self._read: set[str] = set()

    def read(self, name: str, max_bytes: int) -> bytes:
        path = self._folder / name
        if name not in self._found or path.is_symlink() or not path.is_file():
            raise RejectedError("AG-LOG-013", f"{name} is missing or not a plain file")
        if path.stat().st_size > max_bytes:
            raise RejectedError("AG-LOG-013", f"{name} is too large")
        self._read.add(name)
        return path.read_bytes()

    def names(self, kind: str) -> list[str]:
        """Digests that name the files of a sub-folder."""
        prefix = f"{kind}/"
        found = sorted(name for name in self._found if name.startswith(prefix))
        return [name.removeprefix(prefix).removesuffix(".json") for name in found]

    def check_closed(self, announced: set[str]) -> None:
        """Refuse files that no rule asks for: nothing may hide in an export."""
        extra = self._found - self._read
        unannounced = {*self.names("document"), *self.names("roster")} - announced
        if extra or unannounced:
            name = min(extra | unannounced)
            raise RejectedError("AG-LOG-013", f"{name[:100]} does not belong there")


def _take(replay: Replay, index: int, entry: bytes) -> Event:
    try:
        return replay.take(entry)
    except RejectedError as error:
        raise RejectedError(error.code, f"entry {index}: {error.cause}") from error


def _read_entries(reader: _Folder, size: int) -> tuple[bytes, ...]:
    """All entries, after every tile was compared with what they hash to."""
    entries: list[bytes] = []
    below: list[bytes] = []
    level, hashes = 0, below
    for tile in list_tiles(size):
        if tile.level != level:
            level, below, hashes = tile.level, hashes, []
        content = reader.read(tile.path, 1 << 20)
        found = decode_tile(content, tile.width)
        if tile.level == 0:
            bundled = reader.read(tile.entries_path, tile.width * (LIMITS.entry_bytes + 2))
            decoded = decode_entries(bundled, tile.width)
            expected = [leaf_hash(entry) for entry in decoded]
            entries += decoded
        else:
            expected = [
                _subtree(below[256 * place : 256 * place + 256])
                for place in range(tile.start, tile.start + tile.width)
            ]
        _compare(tile.level, tile.start, expected, found)
        hashes += expected
    return tuple(entries)


def _compare(level: int, start: int, expected: Sequence[bytes], found: Sequence[bytes]) -> None:
    for place, (ours, theirs) in enumerate(zip(expected, found, strict=True), start):
        if ours != theirs:
            what = f"entry {place}" if level == 0 else f"hash {place} of level {level}"
            raise RejectedError("AG-LOG-014", f"{what} is not the one in its tile")


def _subtree(hashes: Sequence[bytes]) -> bytes:
    """The root over 256 hashes."""
    while len(hashes) > 1:
        hashes = [node_hash(*hashes[at : at + 2]) for at in range(0, len(hashes), 2)]
    return hashes[0]


def _read_bundles(reader: _Folder) -> dict[str, bundle.Files]:
    bundles: dict[str, bundle.Files] = {}
    for name in reader.names("roster"):
        content = reader.read(f"roster/{name}.json", LIMITS.roster_bundle_bytes)
        bundles[name] = bundle.unpack(content)
        if bundle.pack(bundles[name]) != content:
            raise RejectedError("AG-LOG-013", "a roster is not in its one canonical form")
    return bundles


def _find_anchor(
    bundles: Mapping[str, bundle.Files], entries: Sequence[bytes], expected_root: str
) -> bytes:
    """The first root of the first roster, if it is the one that the auditor expects."""
    if not entries:
        raise RejectedError("AG-LOG-016", "the log is empty")
    first = bundles.get(read_event(entries[0]).document_sha256)
    if first is None or "1.root.json" not in first:
        raise RejectedError("AG-LOG-016", "entry 0: the log does not begin with a roster")
    anchor = first["1.root.json"]
    told = "".join(c for c in expected_root.lower() if c not in "-: ")
    if told and told != root_fingerprint(anchor):
        raise RejectedError("AG-ROS-010", "the export is anchored in another root")
    return anchor


def _check_policy(reader: _Folder, roster: Roster) -> None:
    expected = write_policy(roster.witness_policy()).encode()
    if reader.read("policy", LIMITS.roster_file_bytes) != expected:
        raise RejectedError("AG-LOG-013", "the policy file is not what the roster says")


def _read_audience(dispatch: bytes | None) -> frozenset[str] | None:
    """Who a dispatch is for, if the document is there; its bytes are those the donor logged."""
    if dispatch is None:
        return None
    try:
        payload = canonical.loads(dsse.Envelope.from_bytes(dispatch).payload)
        predicate = canonical.as_mapping(canonical.as_mapping(payload)["predicate"])
        return frozenset(
            canonical.as_site(site) for site in canonical.as_list(predicate["audience"])
        )
    except (RejectedError, KeyError) as error:
        raise RejectedError("AG-LOG-014", "a dispatch document is malformed") from error


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise RejectedError("AG-LOG-015", otherwise)
