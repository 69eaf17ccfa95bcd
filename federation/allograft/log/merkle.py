# SPDX-License-Identifier: Apache-2.0
"""The RFC 6962 Merkle tree: hashes, proofs made from stored subtrees, proofs checked.

Sans-IO: a log hands in `Node`, its reader of complete subtrees. Verifiers fix a proof's length
before they hash, and refuse what the RFC's loops let pass: a leaf or root that is not 32 bytes,
and consistency from the empty tree, which proves nothing. See protos/spec/log.md, "Tree".
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence

from allograft.errors import RejectedError

HASH_BYTES = 32
EMPTY_ROOT = hashlib.sha256(b"").digest()
MAX_SIZE = 2**63 - 1

#: Reads the hash of the complete subtree over leaves [index << level, (index + 1) << level).
Node = Callable[[int, int], bytes]


def leaf_hash(entry: bytes) -> bytes:
    """Hash of an entry (RFC 6962, 2.1); the prefix keeps a leaf from passing for a node."""
    return hashlib.sha256(b"\x00" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Hash of two subtrees."""
    return hashlib.sha256(b"\x01" + left + right).digest()


def grow(size: int, leaf: bytes, node: Node) -> Iterator[tuple[int, int, bytes]]:
    """The complete subtrees (level, index, hash) that one more leaf finishes, lowest first.

    Args:
        size: Leaves before this one.
        leaf: Its leaf hash.
        node: Reader of the subtrees that exist already.
    """
    level, index, current = 0, size, leaf
    yield level, index, current
    while index & 1:
        current = node_hash(node(level, index - 1), current)
        level, index = level + 1, index >> 1
        yield level, index, current


def root(size: int, node: Node) -> bytes:
    """The root of the tree over the first `size` leaves."""
    return _range_hash(0, size, node) if size else EMPTY_ROOT


def root_of(leaves: Iterable[bytes]) -> bytes:
    """The root over leaf hashes, in one pass with one hash kept per level."""
    peaks: list[bytes] = []
    for count, leaf in enumerate(leaves):
        # Each trailing one bit of the count is a complete left sibling that now merges.
        current, merges = leaf, count
        while merges & 1:
            current = node_hash(peaks.pop(), current)
            merges >>= 1
        peaks.append(current)
    if not peaks:
        return EMPTY_ROOT
    total = peaks.pop()
    while peaks:
        total = node_hash(peaks.pop(), total)
    return total


def inclusion_proof(index: int, size: int, node: Node) -> list[bytes]:
    """The path from leaf `index` to the root of the tree of `size` (RFC 6962, 2.1.1).

    Raises:
        RejectedError: AG-LOG-002 if there is no such leaf.
    """
    if not 0 <= index < size:
        raise RejectedError("AG-LOG-002", "no such leaf in a tree of this size")
    path: list[bytes] = []
    start, end = 0, size
    while end - start > 1:
        middle = start + _split(end - start)
        if index < middle:
            path.append(_range_hash(middle, end, node))
            end = middle
        else:
            path.append(_range_hash(start, middle, node))
            start = middle
    return path[::-1]


def consistency_proof(old: int, new: int, node: Node) -> list[bytes]:
    """What shows that the tree of `old` is a prefix of the tree of `new` (RFC 6962, 2.1.2).

    Raises:
        RejectedError: AG-LOG-002 if `old` is empty or larger than `new`.
    """
    if not 0 < old <= new:
        raise RejectedError("AG-LOG-002", "no consistency proof between these sizes")
    path: list[bytes] = []
    start, end, whole = 0, new, True
    while old != end:
        middle = start + _split(end - start)
        if old <= middle:
            path.append(_range_hash(middle, end, node))
            end = middle
        else:
            path.append(_range_hash(start, middle, node))
            start, whole = middle, False
    if not whole:
        path.append(_range_hash(start, end, node))
    return path[::-1]


def verify_inclusion(
    leaf: bytes, index: int, size: int, proof: Sequence[bytes], root_hash: bytes
) -> None:
    """Check that a leaf hash stands at `index` in the tree of `size` with this root.

    Raises:
        RejectedError: AG-LOG-002.
    """
    _check_hashes([leaf, root_hash, *proof])
    if not 0 <= index < size <= MAX_SIZE:
        raise RejectedError("AG-LOG-002", "an index beyond the size of its tree")
    inner, border = _decompose(index, size)
    if len(proof) != inner + border:
        raise RejectedError("AG-LOG-002", f"an inclusion proof of {len(proof)} hashes")
    found = _climb(leaf, proof[:inner], index)
    if _climb_border(found, proof[inner:]) != root_hash:
        raise RejectedError("AG-LOG-002", "an inclusion proof does not lead to the root")


def verify_consistency(
    old: int, new: int, proof: Sequence[bytes], old_root: bytes, new_root: bytes
) -> None:
    """Check that the tree of `old` is a prefix of the tree of `new`.

    Raises:
        RejectedError: AG-LOG-002, also for `old` 0: a caller that saw nothing has nothing to
            compare, and must say so itself.
    """
    if not 0 < old <= new <= MAX_SIZE:
        raise RejectedError("AG-LOG-002", "no consistency between these sizes can be shown")
    if old == new:
        if proof or old_root != new_root:
            raise RejectedError("AG-LOG-002", "two different trees of one size")
        return
    _check_hashes([old_root, new_root, *proof])
    shift = (old & -old).bit_length() - 1
    inner, border = _decompose(old - 1, new)
    inner -= shift
    # A tree of 2**n leaves is itself a node of the larger one, so its root needs no repeating.
    seeds = [old_root] if old == 1 << shift else list(proof[:1])
    path = proof[1 - (old == 1 << shift) :]
    if not seeds or len(path) != inner + border:
        raise RejectedError("AG-LOG-002", f"a consistency proof of {len(proof)} hashes")
    mask = (old - 1) >> shift
    lefts = [sibling for level, sibling in enumerate(path[:inner]) if mask >> level & 1]
    old_found = _climb_border(_climb_border(seeds[0], lefts), path[inner:])
    new_found = _climb_border(_climb(seeds[0], path[:inner], mask), path[inner:])
    if old_found != old_root or new_found != new_root:
        raise RejectedError("AG-LOG-002", "a consistency proof does not lead to both roots")


def _split(leaves: int) -> int:
    """The largest power of two below a number of leaves (above 1)."""
    return 1 << (leaves - 1).bit_length() - 1


def _range_hash(start: int, end: int, node: Node) -> bytes:
    """The hash over leaves [start, end), where `start` is a multiple of the first subtree."""
    leaves = end - start
    if leaves & (leaves - 1) == 0:
        level = leaves.bit_length() - 1
        return node(level, start >> level)
    middle = start + _split(leaves)
    return node_hash(_range_hash(start, middle, node), _range_hash(middle, end, node))


def _decompose(index: int, size: int) -> tuple[int, int]:
    """Path lengths: up to where the path meets the tree's right border, and along the border."""
    inner = (index ^ (size - 1)).bit_length()
    return inner, (index >> inner).bit_count()


def _climb(current: bytes, siblings: Sequence[bytes], index: int) -> bytes:
    for level, sibling in enumerate(siblings):
        pair = (sibling, current) if index >> level & 1 else (current, sibling)
        current = node_hash(*pair)
    return current


def _climb_border(current: bytes, siblings: Sequence[bytes]) -> bytes:
    for sibling in siblings:
        current = node_hash(sibling, current)
    return current


def _check_hashes(hashes: Sequence[bytes]) -> None:
    if any(len(entry) != HASH_BYTES for entry in hashes):
        raise RejectedError("AG-LOG-002", "a hash of a proof does not have 32 bytes")
