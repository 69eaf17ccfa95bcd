# SPDX-License-Identifier: Apache-2.0
"""Proofs from stored subtrees against the recursive definitions of RFC 6962, 2.1."""

import pytest
from hypothesis import given, strategies as st

from allograft.errors import RejectedError
from allograft.log import merkle
from allograft.log.tiles import (
    decode_entries,
    decode_tile,
    encode_entries,
    list_tiles,
)

LEAVES = [merkle.leaf_hash(b"%d" % number) for number in range(700)]
NODES = {}
for _index, _leaf in enumerate(LEAVES):
    for _level, _number, _hash in list(merkle.grow(_index, _leaf, lambda a, b: NODES[a, b])):
        NODES[_level, _number] = _hash

sizes = st.integers(1, 300)


def node(level, number):
    return NODES[level, number]


def split(count):
    k = 1
    while k * 2 < count:
        k *= 2
    return k


def tree_hash(leaves):
    if len(leaves) == 1:
        return leaves[0]
    k = split(len(leaves))
    return merkle.node_hash(tree_hash(leaves[:k]), tree_hash(leaves[k:]))


def path(index, leaves):
    if len(leaves) == 1:
        return []
    k = split(len(leaves))
    if index < k:
        return [*path(index, leaves[:k]), tree_hash(leaves[k:])]
    return [*path(index - k, leaves[k:]), tree_hash(leaves[:k])]


def subproof(old, leaves, whole):
    if old == len(leaves):
        return [] if whole else [tree_hash(leaves)]
    k = split(len(leaves))
    if old <= k:
        return [*subproof(old, leaves[:k], whole), tree_hash(leaves[k:])]
    return [*subproof(old - k, leaves[k:], False), tree_hash(leaves[:k])]


@given(sizes)
def test_roots_follow_the_definition(size):
    assert merkle.root(size, node) == tree_hash(LEAVES[:size]) == merkle.root_of(LEAVES[:size])


@given(st.data(), sizes)
def test_inclusion_proofs_follow_the_definition_and_verify(data, size):
    index = data.draw(st.integers(0, size - 1))
    proof = merkle.inclusion_proof(index, size, node)
    assert proof == path(index, LEAVES[:size])
    merkle.verify_inclusion(LEAVES[index], index, size, proof, merkle.root(size, node))


@given(st.data(), sizes)
def test_consistency_proofs_follow_the_definition_and_verify(data, new):
    old = data.draw(st.integers(1, new))
    proof = merkle.consistency_proof(old, new, node)
    assert proof == subproof(old, LEAVES[:new], True)
    merkle.verify_consistency(old, new, proof, merkle.root(old, node), merkle.root(new, node))


@given(st.data(), st.integers(2, 300))
def test_no_changed_inclusion_proof_verifies(data, size):
    index = data.draw(st.integers(0, size - 1))
    proof = merkle.inclusion_proof(index, size, node)
    change = data.draw(st.sampled_from(["cut", "extend", "flip", "index", "leaf", "root"]))
    leaf, root = LEAVES[index], merkle.root(size, node)
    if change == "cut":
        proof = proof[:-1]
    elif change == "extend":
        proof = [*proof, bytes(32)]
    elif change == "flip":
        place = data.draw(st.integers(0, len(proof) - 1))
        proof[place] = bytes([proof[place][0] ^ 1]) + proof[place][1:]
    elif change == "index":
        index = data.draw(st.integers(0, size - 1).filter(lambda other: other != index))
    elif change == "leaf":
        leaf = LEAVES[size]
    else:
        root = merkle.root(size + 1, node)
    with pytest.raises(RejectedError) as caught:
        merkle.verify_inclusion(leaf, index, size, proof, root)
    assert caught.value.code == "AG-LOG-002"


@given(st.data(), st.integers(2, 300))
def test_no_consistency_proof_joins_two_histories(data, new):
    old = data.draw(st.integers(1, new - 1))
    place = data.draw(st.integers(0, old - 1))
    forked = LEAVES[:new]
    forked[place] = merkle.leaf_hash(b"fork")
    proof = subproof(old, forked, True)
    with pytest.raises(RejectedError):
        merkle.verify_consistency(old, new, proof, merkle.root(old, node), merkle.root_of(forked))


@given(st.integers(1, 700))
def test_tiles_hold_every_hash_once_and_lead_to_the_root(size):
    tiles = list(list_tiles(size))
    assert len({tile.path for tile in tiles}) == len(tiles)
    leaves = []
    for tile in tiles:
        content = tile.encode(node)
        if tile.level == 0:
            leaves += decode_tile(content, tile.width)
    assert leaves == LEAVES[:size]
    assert sum(tile.width for tile in tiles if tile.level == 1) == size // 256


@given(st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=20))
def test_entry_bundles_round_trip_and_refuse_every_cut(entries):
    content = encode_entries(entries)
    assert decode_entries(content, len(entries)) == tuple(entries)
    with pytest.raises(RejectedError):
        decode_entries(content[:-1], len(entries))
    with pytest.raises(RejectedError):
        decode_entries(content + b"\0", len(entries))
