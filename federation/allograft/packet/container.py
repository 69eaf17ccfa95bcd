# SPDX-License-Identifier: Apache-2.0
"""From a payload directory to a sealed dispatch directory, and back.

Every file is streamed; a payload is encrypted once, whatever the number of recipients. Sealed
files and opened payloads appear whole or not at all: they are written under temporary private
names, and what does not verify is deleted before anything could read it.

Invariant: `open_payload` gives back only files whose digests are the signed ones and whose tensors
passed the strict reader; digests and tensors are of the very bytes that were written.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from allograft.crypto import seal
from allograft.crypto.keys import SealingKey, SealingPublicKey
from allograft.durable import durable_file, durable_write, storage_errors, sync_directory
from allograft.errors import RejectedError
from allograft.limits import LIMITS
from allograft.packet import tensors
from allograft.packet.header import (
    HEADER_NAME,
    MANIFEST_NAME,
    Header,
    Role,
    SealedManifest,
    SealedPart,
    Wrap,
    part_name,
)
from allograft.packet.kinds import find_kind
from allograft.plainfile import read_plain

_PAYLOAD_LABEL = b"allograft/payload/v1\0"
_MANIFEST_LABEL = b"allograft/manifest/v1\0"
_WRAP_LABEL = b"allograft/wrap/v1\0"
_ATTESTATIONS = 64  # lines of a manifest


@dataclass(frozen=True, slots=True)
class PlainPart:
    """A payload file as the statement signs it."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Recipient:
    """A site and its sealing key from the roster."""

    site: str
    key: SealingPublicKey


@dataclass(frozen=True, slots=True)
class Opener:
    """Who opens: a site's id and its sealing key."""

    site: str
    key: SealingKey


@dataclass(frozen=True, slots=True)
class SealPlan:
    """What a dispatch is, before it is sealed.

    Attributes:
        parts: The payload files in the order of their names, as the statement signs them.
        recipients: Sites that may open everything.
        auditors: Sites that may open the manifest only.
    """

    packet_id: str
    dispatch_id: str
    donor: str
    kind: str
    not_after: datetime
    statement_digest: str
    parts: tuple[PlainPart, ...]
    recipients: tuple[Recipient, ...]
    auditors: tuple[Recipient, ...] = ()


@dataclass(frozen=True, slots=True)
class OpenedPayload:
    """A payload that was opened and checked.

    Attributes:
        directory: Where its files lie under their plain names; private to this user.
        tensors: What the strict reader found, by file name.
    """

    directory: Path
    tensors: Mapping[str, tensors.CheckedTensors]


def list_payload(directory: Path, kind: str) -> tuple[PlainPart, ...]:
    """Hash the files of a payload directory.

    Raises:
        RejectedError: AG-PKT-001 for an unknown kind, AG-PKT-002 if the directory does not hold
            exactly the kind's files.
    """
    expected = set(find_kind(kind).parts)
    found = {entry.name: entry for entry in os.scandir(directory)}
    if found.keys() != expected:
        raise RejectedError("AG-PKT-002", f"a {kind} has exactly: {', '.join(sorted(expected))}")
    for entry in found.values():
        if not stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode):
            raise RejectedError("AG-PKT-002", f"{entry.name} is not a regular file")
    return tuple(_hash_part(directory / name) for name in sorted(expected))


def join_attestations(attestations: Sequence[bytes]) -> bytes:
    """The content of `attestations.jsonl`: one envelope or bundle per line.

    Raises:
        RejectedError: AG-PKT-005 if there are too many or they are too large.
    """
    content = b"".join(attestation + b"\n" for attestation in attestations)
    if len(content) > LIMITS.manifest_bytes or len(attestations) > _ATTESTATIONS:
        raise RejectedError("AG-PKT-005", f"attestations of {len(content)} bytes")
    return content


def split_attestations(content: bytes) -> tuple[bytes, ...]:
    """The lines of `attestations.jsonl`.

    Raises:
        RejectedError: AG-PKT-006 if it is not a sequence of non-empty lines.
    """
    lines = content.split(b"\n")
    if lines.pop() != b"" or not lines or not all(lines) or len(lines) > _ATTESTATIONS:
        raise RejectedError("AG-PKT-006", "the attestations are not a sequence of lines")
    return tuple(lines)


def seal_packet(payload: Path, attestations: bytes, plan: SealPlan, out: Path) -> Header:
    """Seal a payload and its attestations into a dispatch directory.

    Args:
        payload: The payload directory.
        attestations: The content of `attestations.jsonl`.
        plan: What to seal for whom.
        out: An existing directory; receives the header and the sealed files.

    Raises:
        RejectedError: AG-PKT-002 or -004 if the payload is not the signed one, AG-PKT-005 over a
            limit, AG-KEY-001 for a malformed recipient key.
        UnavailableError: AG-STO-001 when the disk is full.
    """
    _check_plan(plan)
    payload_key, manifest_key = seal.generate_content_key(), seal.generate_content_key()
    wraps = _wrap_keys(plan, payload_key, manifest_key)
    parts = tuple(
        _seal_part(payload / part.name, part, out / part_name(index), payload_key,
                   _part_context(plan.packet_id, plan.statement_digest, index))
        for index, part in enumerate(plan.parts)
    )  # fmt: skip
    context = _manifest_context(plan.packet_id, plan.statement_digest)
    sealed = seal.seal_bytes(attestations, manifest_key, context)
    durable_write(out / MANIFEST_NAME, sealed)
    header = Header(
        packet_id=plan.packet_id,
        dispatch_id=plan.dispatch_id,
        donor=plan.donor,
        audience=tuple(sorted(recipient.site for recipient in plan.recipients)),
        not_after=plan.not_after,
        statement_digest=plan.statement_digest,
        parts=parts,
        manifest=SealedManifest(len(sealed), hashlib.sha256(sealed).hexdigest()),
        wraps=wraps,
    )
    content = header.to_bytes()
    # The reader's own rules decide whether what was written is a header.
    checked = Header.from_bytes(content)
    durable_write(out / HEADER_NAME, content)
    return checked


def read_sealed_header(directory: Path) -> tuple[Header, bytes]:
    """The header of a dispatch directory and its bytes; nothing in it is verified.

    Raises:
        RejectedError: AG-PKT-002 if missing, AG-PKT-003 or -005 if malformed.
    """
    content = read_document(directory / HEADER_NAME, LIMITS.header_bytes)
    return Header.from_bytes(content), content


def read_document(path: Path, max_bytes: int) -> bytes:
    """The content of a small file of a dispatch directory.

    Raises:
        RejectedError: AG-PKT-002 if missing or no regular file, AG-IN-002 if too large.
    """
    try:
        return read_plain(path, max_bytes, follow_links=False)
    except OSError as error:
        cause = f"{path.name} is missing, a link or no regular file"
        raise RejectedError("AG-PKT-002", cause) from error


def check_sealed_files(directory: Path, header: Header) -> None:
    """Compare the sealed files of a dispatch with its header, sizes first.

    Raises:
        RejectedError: AG-PKT-002 if a file is missing or no regular file, AG-PKT-004 if it is not
            the announced one.
    """
    sizes = [(part.name, part.sealed_bytes, part.sealed_sha256) for part in header.parts]
    sizes.append((MANIFEST_NAME, header.manifest.sealed_bytes, header.manifest.sealed_sha256))
    for name, size, _ in sizes:
        _check_size(directory / name, size)
    for name, _, digest in sizes:
        if _hash_part(directory / name).sha256 != digest:
            raise RejectedError("AG-PKT-004", f"{name} is not the file that was signed")


def check_closed(directory: Path, header: Header, companions: Set[str]) -> None:
    """Refuse files that no rule asks for: a verdict on a directory covers all that is in it.

    Args:
        directory: The dispatch directory.
        header: Its header.
        companions: Names of the signed documents that travel beside the sealed files.

    Raises:
        RejectedError: AG-PKT-002.
    """
    expected = {HEADER_NAME, MANIFEST_NAME, *companions, *(part.name for part in header.parts)}
    extra = sorted({entry.name for entry in os.scandir(directory)} - expected)
    if extra:
        raise RejectedError("AG-PKT-002", f"{extra[0][:80]!a} does not belong there")


def open_manifest(directory: Path, header: Header, opener: Opener) -> bytes:
    """Open the attestations of a dispatch.

    Raises:
        RejectedError: AG-PKT-008 if not sealed for this site, AG-SEA-* if it does not open,
            AG-PKT-004 if the file is not the announced one.
    """
    content_key = _unwrap(header, opener, "manifest")
    path = directory / MANIFEST_NAME
    _check_size(path, header.manifest.sealed_bytes)
    sealed = path.read_bytes()
    if hashlib.sha256(sealed).hexdigest() != header.manifest.sealed_sha256:
        raise RejectedError("AG-PKT-004", f"{MANIFEST_NAME} is not the file that was signed")
    context = _manifest_context(header.packet_id, header.statement_digest)
    return seal.open_bytes(sealed, content_key, context)


def open_payload(
    directory: Path,
    header: Header,
    kind: str,
    parts: tuple[PlainPart, ...],
    opener: Opener,
    target: Path,
) -> OpenedPayload:
    """Open the payload of a dispatch into a new private directory.

    Digests and tensors are checked while the files are opened, in the same pass. Findings are told
    in the order seal, digests, tensors: what is wrong with tensors counts once they are known to be
    the donor's.

    Args:
        directory: The dispatch directory.
        header: Its verified header.
        kind: The packet's kind from the verified statement.
        parts: The payload files from the verified statement.
        opener: Our own id and sealing key.
        target: The directory to create; it must not exist.

    Raises:
        RejectedError: AG-PKT-002, -004 or -008, AG-SEA-*, or AG-PKT-010 to -026 for the tensors.
        UnavailableError: AG-STO-001 when the disk is full.
    """
    if target.exists() or target.is_symlink():
        raise RejectedError("AG-PKT-002", f"{target.name} exists already")
    # Names become paths below, so they are the kind's own and never merely the donor's.
    _check_names(kind, parts)
    if [p.size_bytes for p in parts] != [p.plain_bytes for p in header.parts]:
        raise RejectedError("AG-PKT-004", "header and statement disagree about the parts")
    content_key = _unwrap(header, opener, "payload")
    with storage_errors(target.name):
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        temporary.mkdir(mode=0o700)
        try:
            checked = {}
            for index, (part, sealed) in enumerate(zip(parts, header.parts, strict=True)):
                context = _part_context(header.packet_id, header.statement_digest, index)
                source = directory / sealed.name
                plain = temporary / part.name
                checker = tensors.TensorChecker(part.size_bytes, find_kind(kind).rules)
                checked[part.name] = _open_part(
                    source, sealed, plain, part, content_key, context, checker
                )
            sync_directory(temporary)
            os.rename(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_directory(target.parent)
    return OpenedPayload(target, checked)


def _check_plan(plan: SealPlan) -> None:
    _check_names(plan.kind, plan.parts)
    if sum(part.size_bytes for part in plan.parts) > LIMITS.packet_payload_bytes:
        raise RejectedError("AG-PKT-005", "the payload is over the limit")
    if len(plan.recipients) + len(plan.auditors) > LIMITS.packet_recipients:
        raise RejectedError("AG-PKT-005", "the dispatch has too many recipients")


def _check_names(kind: str, parts: Sequence[PlainPart]) -> None:
    if [part.name for part in parts] != sorted(find_kind(kind).parts):
        raise RejectedError("AG-PKT-002", f"the parts are not those of a {kind}")


def _wrap_keys(plan: SealPlan, payload_key: bytes, manifest_key: bytes) -> tuple[Wrap, ...]:
    def wrap(recipient: Recipient, role: Role, key: bytes) -> Wrap:
        info = _wrap_info(
            plan.packet_id, plan.dispatch_id, plan.statement_digest, recipient.site, role
        )
        wrapped = seal.wrap_key(key, recipient.key, info)
        return Wrap(recipient.site, role, recipient.key.key_id, wrapped)

    by_site = sorted(plan.recipients, key=lambda recipient: recipient.site)
    readers = sorted((*plan.recipients, *plan.auditors), key=lambda recipient: recipient.site)
    return (
        *(wrap(recipient, "manifest", manifest_key) for recipient in readers),
        *(wrap(recipient, "payload", payload_key) for recipient in by_site),
    )


def _unwrap(header: Header, opener: Opener, role: Role) -> bytes:
    site = opener.site
    wrap = header.find_wrap(site, role)
    if wrap.key_id != opener.key.public.key_id:
        raise RejectedError("AG-SEA-002", "the packet is sealed for another key of this site")
    info = _wrap_info(header.packet_id, header.dispatch_id, header.statement_digest, site, role)
    return seal.unwrap_key(wrap.wrap, opener.key, info)


def _seal_part(
    source: Path, part: PlainPart, target: Path, key: bytes, context: bytes
) -> SealedPart:
    descriptor = os.open(source, os.O_RDONLY | os.O_NOFOLLOW)
    with os.fdopen(descriptor, "rb") as plain, durable_file(target) as sealed:
        result = seal.seal_stream(plain, sealed, key, context)
        if (result.plain_bytes, result.plain_sha256) != (part.size_bytes, part.sha256):
            raise RejectedError("AG-PKT-004", f"{part.name} changed after it was signed")
    return SealedPart(target.name, part.size_bytes, result.sealed_bytes, result.sealed_sha256)


def _open_part(
    source: Path,
    sealed: SealedPart,
    target: Path,
    part: PlainPart,
    key: bytes,
    context: bytes,
    checker: tensors.TensorChecker,
) -> tensors.CheckedTensors:
    _check_size(source, sealed.sealed_bytes)
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as plain, source.open("rb") as ciphertext:
        result = seal.open_stream(ciphertext, plain, key, context, part.size_bytes, checker.feed)
        if result.sealed_sha256 != sealed.sealed_sha256:
            raise RejectedError("AG-PKT-004", f"{sealed.name} is not the file that was signed")
        if (result.plain_bytes, result.plain_sha256) != (part.size_bytes, part.sha256):
            raise RejectedError("AG-PKT-004", f"{part.name} is not the file that was signed")
        # Only now: every recipient holds the content key, so a block's tag does not say that the
        # donor wrote it, and a receipt would blame the donor for what another one put there.
        checked = checker.finish()
        plain.flush()
        os.fsync(plain.fileno())
    return checked


def _check_size(path: Path, size_bytes: int) -> None:
    try:
        status = path.lstat()
    except FileNotFoundError as error:
        raise RejectedError("AG-PKT-002", f"{path.name} is missing") from error
    if not stat.S_ISREG(status.st_mode):
        raise RejectedError("AG-PKT-002", f"{path.name} is not a regular file")
    if status.st_size != size_bytes:
        raise RejectedError("AG-PKT-004", f"{path.name} has another size than announced")


def _hash_part(path: Path) -> PlainPart:
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
        return PlainPart(path.name, handle.tell(), digest)


def _bound(packet_id: str, statement_digest: str) -> bytes:
    # Fixed lengths: 16 and 32 bytes.
    return bytes.fromhex(packet_id) + bytes.fromhex(statement_digest)


def _part_context(packet_id: str, statement_digest: str, index: int) -> bytes:
    return _PAYLOAD_LABEL + _bound(packet_id, statement_digest) + index.to_bytes(4, "big")


def _manifest_context(packet_id: str, statement_digest: str) -> bytes:
    return _MANIFEST_LABEL + _bound(packet_id, statement_digest)


def _wrap_info(
    packet_id: str, dispatch_id: str, statement_digest: str, site: str, role: Role
) -> bytes:
    bound = _bound(packet_id, statement_digest) + bytes.fromhex(dispatch_id)
    return _WRAP_LABEL + bound + role.encode("ascii") + b"\0" + site.encode("ascii")
