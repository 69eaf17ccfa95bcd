# SPDX-License-Identifier: Apache-2.0
"""Merkle proofs, notes, checkpoints, proofs and a witness against the public suites."""

import base64
import hashlib
import json
import re
from datetime import UTC, datetime

import pytest

from allograft.crypto.notekey import NoteKey, NotePublicKey
from allograft.crypto.vkey import LOG, WITNESS, VerifierKey, make_vkey, read_vkey
from allograft.errors import RejectedError
from allograft.log import merkle
from allograft.log.checkpoint import Checkpoint
from allograft.log.cosignature import verify_cosignature
from allograft.log.note import read_line, read_note, verify_note
from allograft.log.proof import Proof
from allograft.log.witness import WitnessState
from kit.shared import shared_path

NOW = datetime(2026, 11, 23, 8, 0, 0, tzinfo=UTC)


def decoded(value):
    return base64.b64decode(value or "")


@pytest.mark.parametrize("kind", ["inclusion", "consistency"])
def test_agrees_with_every_merkle_vector(kind):
    files = sorted(shared_path(f"vectors/transparency-dev-merkle/testdata/{kind}").rglob("*.json"))
    assert len(files) == 98
    for path in files:
        vector = json.loads(path.read_text("utf-8"))
        proof = [decoded(entry) for entry in vector["proof"] or []]
        if vector["wantErr"]:
            with pytest.raises(RejectedError, match="AG-LOG-002"):
                check(kind, vector, proof)
        else:
            check(kind, vector, proof)


def check(kind, vector, proof):
    if kind == "inclusion":
        leaf, root = decoded(vector["leafHash"]), decoded(vector["root"])
        merkle.verify_inclusion(leaf, vector["leafIdx"], vector["treeSize"], proof, root)
    else:
        roots = decoded(vector["root1"]), decoded(vector["root2"])
        merkle.verify_consistency(vector["size1"], vector["size2"], proof, *roots)


def test_hashes_the_reference_trees_of_rfc_6962():
    path = shared_path("vectors/transparency-dev-merkle/rfc6962_reference.json")
    reference = json.loads(path.read_text("utf-8"))
    leaves = [merkle.leaf_hash(bytes.fromhex(leaf)) for leaf in reference["leaf_inputs_hex"]]
    assert [leaf.hex() for leaf in leaves] == reference["node_hashes_by_level"][0]
    nodes = {}
    for index, leaf in enumerate(leaves):
        grown = merkle.grow(index, leaf, lambda level, number: nodes[level, number])
        nodes.update({(level, number): node for level, number, node in list(grown)})
    for size, root in enumerate(reference["root_hashes_by_size"]):
        assert merkle.root_of(leaves[:size]).hex() == root
        assert merkle.root(size, lambda level, number: nodes[level, number]).hex() == root
    for level, hashes in enumerate(reference["node_hashes_by_level"]):
        assert [nodes[level, number].hex() for number in range(len(hashes))] == hashes


def test_reads_the_notes_of_the_go_checksum_database():
    vectors = json.loads(shared_path("vectors/golang-sumdb/note_vectors.json").read_text("utf-8"))
    names = {key: read_vkey(key, LOG) for key in (vectors["keys"][0], vectors["keys"][3])}
    text = vectors["text"]
    note = read_note(text + "\n" + "\n".join(vectors["signature_lines"]) + "\n")
    for key in names.values():
        assert verify_note(note, key) == text
    for key, _ in vectors["bad_keys"]:
        with pytest.raises(RejectedError):
            read_vkey(key, LOG)


@pytest.mark.parametrize("number", range(7))
def test_refuses_the_bad_notes_of_the_go_checksum_database(number):
    vectors = json.loads(shared_path("vectors/golang-sumdb/note_vectors.json").read_text("utf-8"))
    text, peter = vectors["text"], vectors["signature_lines"][1] + "\n"
    # The vectors are Go expressions over these two values.
    bad = [
        text, text + "\n", text + "\n" + peter[:-1], "\x01" + text + "\n" + peter,
        (text + "\n" + peter).encode().replace(b"If", b"\xff", 1),
        text + "\n" + peter.replace("PeterNeumann", "Bad Name"),
        text + "\n" + peter + "Unexpected line.\n",
    ]  # fmt: skip
    assert len(vectors["bad_message_exprs_go"]) == len(bad)
    with pytest.raises(RejectedError) as caught:
        read_note(bad[number])
    assert caught.value.code == "AG-LOG-003"


def test_reads_checkpoints_at_least_as_strictly_as_the_formats_suite():
    path = shared_path("vectors/tlog-formats/formats_vectors.json")
    root = base64.b64encode(bytes(32)).decode()
    for vector in json.loads(path.read_text("utf-8"))["checkpoint_unmarshal"]:
        body = vector["checkpoint_body"]
        if vector["wantErr"]:
            with pytest.raises(RejectedError):
                Checkpoint.from_text(body)
            continue
        # The suite's roots are words; ours have 32 bytes. Empty extension lines break the spec.
        with pytest.raises(RejectedError):
            Checkpoint.from_text(body)
        lines = body.rstrip("\n").split("\n")
        lines[2] = root
        read = Checkpoint.from_text("\n".join(lines) + "\n")
        assert (read.origin, str(read.size), list(read.extensions)) == (
            lines[0], lines[1], lines[3:],
        )  # fmt: skip


def test_refuses_the_bad_proofs_of_the_formats_suite():
    path = shared_path("vectors/tlog-formats/formats_vectors.json")
    vectors = json.loads(path.read_text("utf-8"))["tlog_proof_unmarshal_errors"]
    assert len(vectors) == 6
    for vector in vectors:
        with pytest.raises(RejectedError) as caught:
            Proof.from_bytes(vector["proof"].encode())
        assert caught.value.code == "AG-LOG-008", vector["name"]


def test_verifies_the_example_of_the_signed_note_specification():
    page = shared_path("vectors/c2sp-spec/signed-note.md").read_text("utf-8")
    key = read_vkey("example.com/foo+530d903a+AekyeRrm56hApGFkyQR4ZCbV54Id2LKaANYcrnKv3U2k", LOG)
    (example,) = re.findall(r"```\n(This is an example.*?)```", page, re.DOTALL)
    assert verify_note(read_note(example), key) == "This is an example message.\n"


def test_reads_the_example_of_the_cosignature_specification():
    page = shared_path("vectors/c2sp-spec/tlog-cosignature.md").read_text("utf-8")
    example = page.split("```\n")[1]
    note = read_note(example)
    assert Checkpoint.from_text(note.text).size == 20852163
    line = note.lines[1]
    assert len(line.signature) == 72
    stranger = VerifierKey(line.name, WITNESS, NoteKey.generate().public)
    with pytest.raises(RejectedError):
        verify_cosignature(line, note.text, stranger)


def add_checkpoint_calls():
    path = "vectors/torchwood-witness/cmd/litewitness/testdata/litewitness.txt"
    page = shared_path(path).read_text("utf-8").split("-- add-checkpoint.hurl --")[1]
    for body, status in re.findall(r"```\n(.*?)```\nHTTP (\d+)", page, re.DOTALL):
        head, _, note = body.partition("\n\n")
        proof = [base64.b64decode(line) for line in head.split("\n")[1:] if line]
        yield note, proof, int(status)


def test_answers_the_witness_script_of_torchwood(tmp_path):
    raw = bytes.fromhex("ffdc2d4d98e4124d3feaf788c0c2f9abfd796083d1f0495437f302ec79cf100f")
    origin = f"sigsum.org/v1/tree/{hashlib.sha256(raw).hexdigest()}"
    log = make_vkey(origin, LOG, NotePublicKey(raw))
    key = NoteKey.generate()
    witness = WitnessState(tmp_path / "state", key, "example.com/witness")
    codes = []
    for note, proof, status in add_checkpoint_calls():
        try:
            line = witness.cosign(note, proof, log, NOW)
        except RejectedError as error:
            codes.append((status, error.code))
            continue
        verify_cosignature(read_line(line), read_note(note).text, read_vkey(witness.vkey, WITNESS))
        codes.append((status, ""))
    assert codes == [
        (200, ""),
        (403, "AG-LOG-003"),  # a signature whose base64 has stray bits
        (403, "AG-LOG-004"),
        (422, "AG-LOG-011"),  # no proof at all: as if we had seen nothing
        (422, "AG-LOG-010"),
        (200, ""),
        (409, "AG-LOG-011"),
        (200, ""),
        (409, ""),  # the same checkpoint again; the relay has no `old` to contradict us with
    ]
    assert witness.size == 5
