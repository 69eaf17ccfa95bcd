# SPDX-License-Identifier: Apache-2.0
"""Private key files: one key per file, mode 0600, never a link, never readable by others.

A site's `keys/` directory holds `signing.pem` (PKCS#8 PEM), `sealing.key` and `witness.key`
(32-byte seeds in hex with a one-word header) and `node` (OpenSSH, for Flower); `signing.public`
holds the public halves of all signing keys that the privacy ledger was ever signed with. A file
that others can read is refused rather than repaired: whoever could read it may have done so.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from allograft.crypto.keys import NodeKey, SealingKey, SigningKey, VerifyKey
from allograft.crypto.notekey import NoteKey
from allograft.durable import durable_write
from allograft.errors import RejectedError, UnavailableError

_MAX_BYTES = 16 << 10
_SEALING = "allograft-sealing-key-v1"
_WITNESS = "allograft-note-key-v1"
_PEM_END = "-----END PUBLIC KEY-----"


def write_private(path: Path, content: bytes) -> None:
    """Write a private file with mode 0600, never replacing one that exists.

    Raises:
        RejectedError: AG-KEY-004 if the path exists: a key overwritten is a key lost.
    """
    if path.exists() or path.is_symlink():
        raise RejectedError("AG-KEY-004", f"{path.name} exists already")
    durable_write(path, content, mode=0o600)


def read_private(path: Path) -> bytes:
    """Read a private file after checking who else could.

    Raises:
        RejectedError: AG-KEY-004 for links, special files, foreign owners and open modes.
        UnavailableError: AG-STO-003 if there is no such file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise UnavailableError("AG-STO-003", f"there is no key file {path.name}") from error
    except OSError as error:
        raise RejectedError("AG-KEY-004", f"{path.name} is a link or cannot be read") from error
    try:
        # The checks are on the open descriptor: the path may change meanwhile.
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise RejectedError("AG-KEY-004", f"{path.name} is not a regular file")
        if status.st_mode & 0o077 or status.st_uid not in {os.geteuid(), 0}:
            raise RejectedError("AG-KEY-004", f"{path.name} can be read by other users")
        content = os.read(descriptor, _MAX_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(content) > _MAX_BYTES:
        raise RejectedError("AG-KEY-001", f"{path.name} is too large to be a key")
    return content


def write_signing_key(path: Path, key: SigningKey) -> None:
    """Write a site's or coordinator's signing key."""
    write_private(path, key.to_pem())


def read_signing_key(path: Path) -> SigningKey:
    """Read a signing key.

    Raises:
        RejectedError: AG-KEY-001 malformed, AG-KEY-004 exposed.
        UnavailableError: AG-STO-003 absent.
    """
    return SigningKey.from_pem(read_private(path))


def add_verify_key(path: Path, key: VerifyKey) -> None:
    """Add a public key to a file of keys that were used here; one that is in it changes nothing.

    Mode 0600 although nothing is secret: whoever may write there decides whose signatures count.

    Raises:
        RejectedError: As `read_verify_keys`.
        UnavailableError: AG-STO-001 when the disk is full.
    """
    keys = read_verify_keys(path)
    if key.key_id not in {known.key_id for known in keys}:
        content = "".join(f"{known.pem.strip()}\n" for known in (*keys, key))
        durable_write(path, content.encode("ascii"), mode=0o600)


def read_verify_keys(path: Path) -> tuple[VerifyKey, ...]:
    """The public keys in a file, in the order in which they were added; none without a file.

    Raises:
        RejectedError: AG-KEY-001 malformed, AG-KEY-004 open to others.
    """
    try:
        text = read_private(path).decode("ascii", "replace")
    except UnavailableError:
        return ()
    blocks = text.split(_PEM_END)
    if blocks[-1].strip():
        raise RejectedError("AG-KEY-001", f"{path.name} holds something else than public keys")
    return tuple(VerifyKey(f"{block.strip()}\n{_PEM_END}\n").check() for block in blocks[:-1])


def write_sealing_key(path: Path, key: SealingKey) -> None:
    """Write a site's sealing key."""
    write_private(path, _seed_line(_SEALING, key.seed))


def read_sealing_key(path: Path) -> SealingKey:
    """Read a sealing key.

    Raises:
        RejectedError: AG-KEY-001 malformed, AG-KEY-004 exposed.
        UnavailableError: AG-STO-003 absent.
    """
    return SealingKey(_read_seed(path, _SEALING))


def write_note_key(path: Path, key: NoteKey) -> None:
    """Write an Ed25519 key of the log, a witness or a roster role."""
    write_private(path, _seed_line(_WITNESS, key.seed))


def read_note_key(path: Path) -> NoteKey:
    """Read an Ed25519 key.

    Raises:
        RejectedError: AG-KEY-001 malformed, AG-KEY-004 exposed.
        UnavailableError: AG-STO-003 absent.
    """
    return NoteKey(_read_seed(path, _WITNESS))


def write_node_key(path: Path, key: NodeKey) -> None:
    """Write the node key file that `flower-supernode` reads."""
    write_private(path, key.to_openssh())


def read_node_key(path: Path) -> NodeKey:
    """Read a node key.

    Raises:
        RejectedError: AG-KEY-001 malformed, AG-KEY-004 exposed.
        UnavailableError: AG-STO-003 absent.
    """
    return NodeKey.from_openssh(read_private(path))


def _seed_line(header: str, seed: bytes) -> bytes:
    return f"{header} {seed.hex()}\n".encode("ascii")


def _read_seed(path: Path, header: str) -> bytes:
    # The header keeps a witness key from being used as a sealing key: both are 32 random bytes.
    words = read_private(path).split()
    if len(words) != 2 or words[0] != header.encode("ascii") or len(words[1]) != 64:
        raise RejectedError("AG-KEY-001", f"{path.name} is not a file of type {header}")
    try:
        return bytes.fromhex(words[1].decode("ascii"))
    except ValueError as error:
        raise RejectedError("AG-KEY-001", f"{path.name} does not hold a key in hex") from error
