# SPDX-License-Identifier: Apache-2.0
"""A log that forks, shrinks or lies, against witnesses and recipients."""

import secrets
from datetime import timedelta

import pytest

from allograft.crypto.notekey import NoteKey
from allograft.crypto.vkey import LOG, WITNESS, make_vkey, read_vkey
from allograft.errors import RejectedError
from allograft.log.checkpoint import Checkpoint, sign_checkpoint
from allograft.log.cosignature import cosign, verify_cosignature
from allograft.log.merkle import EMPTY_ROOT, leaf_hash
from allograft.log.note import SignatureLine, read_line, read_note
from allograft.log.proof import Proof, verify_proof
from allograft.log.store import LogStore
from allograft.log.witness import WitnessState
from allograft.roster.records import WitnessPolicy
from kit.logbook import NOW, Logbook

ORIGIN = "allograft/hub"


class Case:
    """A log of some entries, its evil twin with the same key, and one witness."""

    def __init__(self, root):
        self.key = NoteKey.generate()
        self.vkey = make_vkey(ORIGIN, LOG, self.key.public)
        self.log = LogStore(root / "log.db", ORIGIN, self.key)
        self.twin = LogStore(root / "twin.db", ORIGIN, self.key)
        self.log.append([b"a", b"b", b"c"])
        self.twin.append([b"a", b"x", b"c"])
        self.witness = WitnessState(root / "witness", NoteKey.generate(), "ward-a")

    def ask(self, log, old=None):
        old = self.witness.size if old is None else old
        note = log.checkpoint()
        return self.witness.cosign(note, log.consistency(old, log.size), self.vkey, NOW)


@pytest.fixture
def case(tmp_path):
    return Case(tmp_path)


def refused(code, call, *arguments):
    with pytest.raises(RejectedError) as caught:
        call(*arguments)
    assert caught.value.code == code, caught.value


def test_a_witness_follows_a_log_that_grows(case):
    case.ask(case.log)
    case.log.append([b"d", b"e"])
    line = case.ask(case.log)
    text = read_note(case.log.checkpoint()).text
    witness = read_vkey(case.witness.vkey, WITNESS)
    assert verify_cosignature(read_line(line), text, witness).time == NOW
    assert case.witness.size == 5


def test_refuses_a_fork_of_the_same_size(case):
    case.ask(case.log)
    refused("AG-LOG-010", case.ask, case.twin)
    assert case.witness.size == 3


def test_refuses_a_fork_that_grew(case):
    case.ask(case.log)
    case.twin.append([b"d"])
    refused("AG-LOG-010", case.ask, case.twin)
    case.log.append([b"d"])
    case.ask(case.log)


def test_refuses_a_log_that_shrank(case, tmp_path):
    case.ask(case.log)
    shorter = LogStore(tmp_path / "short.db", ORIGIN, case.key)
    shorter.append([b"a", b"b"])
    refused("AG-LOG-009", case.ask, shorter, 0)


def test_refuses_a_restart_from_nothing(case, tmp_path):
    case.ask(case.log)
    empty = sign_checkpoint(Checkpoint(ORIGIN, 0, EMPTY_ROOT), case.key).to_text()
    refused("AG-LOG-009", case.witness.cosign, empty, (), case.vkey, NOW)


def test_remembers_through_a_restart(case, tmp_path):
    case.ask(case.log)
    case.witness = WitnessState(tmp_path / "witness", NoteKey.generate(), "ward-a")
    assert case.witness.size == 3
    refused("AG-LOG-010", case.ask, case.twin)


def test_remembers_before_it_signs(case, monkeypatch):
    def crash(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("allograft.log.witness.cosignature.cosign", crash)
    with pytest.raises(KeyboardInterrupt):
        case.ask(case.log)
    monkeypatch.undo()
    refused("AG-LOG-010", case.ask, case.twin)


def test_tells_a_lost_answer_from_a_fork(case):
    case.ask(case.log)
    case.log.append([b"d"])
    case.ask(case.log)
    case.log.append([b"e"])
    refused("AG-LOG-011", case.ask, case.log, 3)
    case.ask(case.log)
    assert case.witness.size == 5


def test_refuses_a_checkpoint_of_another_key_or_origin(case):
    other = NoteKey.generate()
    checkpoint = Checkpoint(ORIGIN, 3, case.log.root(3))
    forged = sign_checkpoint(checkpoint, other).to_text()
    refused("AG-LOG-004", case.witness.cosign, forged, (), case.vkey, NOW)
    renamed = sign_checkpoint(Checkpoint("allograft/x", 3, case.log.root(3)), case.key).to_text()
    refused("AG-LOG-004", case.witness.cosign, renamed, (), case.vkey, NOW)
    extended = sign_checkpoint(
        Checkpoint(ORIGIN, 3, case.log.root(3), ("extension",)), case.key
    ).to_text()
    refused("AG-LOG-005", case.witness.cosign, extended, (), case.vkey, NOW)
    assert case.witness.size == 0


@pytest.mark.parametrize("content", [b"", b"{}", b'{"before":"","newest":"x\\n1\\n","v":1}'])
def test_never_guesses_at_a_damaged_memory(case, tmp_path, content):
    (tmp_path / "witness").write_bytes(content)
    with pytest.raises(RejectedError) as caught:
        case.ask(case.log, 0)
    assert caught.value.code == "AG-LOG-012"
    assert (tmp_path / "witness").read_bytes() == content


# --- recipients and proofs ---


@pytest.fixture
def book(tmp_path):
    book = Logbook(tmp_path)
    book.tell_story()
    book.witness()
    return book


def proof_of(book, index=3):
    return book.log.proof(index, book.policy), book.log.entry(index)


def test_a_log_without_witnesses_convinces_nobody(book):
    proof, entry = proof_of(book)
    bare = Proof.from_bytes(proof)
    alone = Proof(bare.index, bare.hashes, read_note(book.log.checkpoint()))
    refused("AG-LOG-007", verify_proof, alone.to_bytes(), entry, book.policy)


def test_a_quorum_of_zero_still_asks_for_one_witness(book):
    proof, entry = proof_of(book)
    bare = Proof.from_bytes(proof)
    alone = Proof(bare.index, bare.hashes, read_note(book.log.checkpoint()))
    policy = WitnessPolicy(book.policy.log_vkey, book.policy.witness_vkeys, 0)
    refused("AG-LOG-007", verify_proof, alone.to_bytes(), entry, policy)


def test_refuses_the_proof_of_another_entry(book):
    proof, _ = proof_of(book)
    refused("AG-LOG-002", verify_proof, proof, book.log.entry(2), book.policy)
    refused("AG-LOG-002", verify_proof, proof, b"never logged", book.policy)


def test_refuses_a_witness_that_nobody_enrolled(book):
    proof, entry = proof_of(book)
    stranger = NoteKey.generate()
    read = Proof.from_bytes(proof)
    lines = [read.note.lines[0]]
    lines += [cosign(read.note.text, f"ghost-{n}", stranger, NOW) for n in range(3)]
    forged = Proof(read.index, read.hashes, type(read.note)(read.note.text, tuple(lines)))
    refused("AG-LOG-007", verify_proof, forged.to_bytes(), entry, book.policy)


def test_refuses_a_made_up_line_of_a_real_witness(book):
    proof, entry = proof_of(book)
    read = Proof.from_bytes(proof)
    real = read.note.lines[1]
    made_up = SignatureLine(real.name, real.key_id, secrets.token_bytes(72))
    note = type(read.note)(read.note.text, (*read.note.lines[:1], made_up, *read.note.lines[2:]))
    forged = Proof(read.index, read.hashes, note).to_bytes()
    with pytest.raises(RejectedError) as caught:
        verify_proof(forged, entry, book.policy)
    assert caught.value.code == "AG-LOG-006"


def test_one_key_under_two_names_counts_once(book):
    proof, entry = proof_of(book)
    read = Proof.from_bytes(proof)
    key = book.sites["ward-a"].witness
    twice = tuple(cosign(read.note.text, name, key, NOW) for name in ("ward-a", "ward-b"))
    vkeys = tuple(make_vkey(name, WITNESS, key.public) for name in ("ward-a", "ward-b"))
    forged = Proof(read.index, read.hashes, type(read.note)(
        read.note.text, (read.note.lines[0], *twice)
    ))  # fmt: skip
    policy = WitnessPolicy(book.policy.log_vkey, vkeys, 2)
    refused("AG-LOG-007", verify_proof, forged.to_bytes(), entry, policy)


def test_a_cosignature_from_another_time_does_not_verify(book):
    note = read_note(book.log.checkpoint())
    site = book.sites["ward-a"]
    line = cosign(note.text, "ward-a", site.witness, NOW)
    later = cosign(note.text, "ward-a", site.witness, NOW + timedelta(seconds=1))
    mixed = SignatureLine(line.name, line.key_id, later.signature[:8] + line.signature[8:])
    witness = read_vkey(site.record.witness_vkey, WITNESS)
    refused("AG-LOG-006", verify_cosignature, mixed, note.text, witness)


def test_every_cut_of_a_proof_is_refused(book):
    proof, entry = proof_of(book)
    lines = proof.split(b"\n")
    for place in range(len(lines) - 1):
        shorter = b"\n".join(lines[:place] + lines[place + 1 :])
        if shorter.count("\N{EM DASH}".encode()) < proof.count("\N{EM DASH}".encode()) == 4:
            continue  # one of three witnesses fewer is still a quorum
        with pytest.raises(RejectedError):
            verify_proof(shorter, entry, book.policy)
    for end in (0, 1, 20, len(proof) // 2, len(proof) - 1):
        with pytest.raises(RejectedError):
            verify_proof(proof[:end], entry, book.policy)


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.replace(b"index 3", b"index 03"),
        lambda p: p.replace(b"index 3", b"index -3"),
        lambda p: p.replace(b"index 3", b"index 99999999999999999999"),
        lambda p: p.replace(b"proof@v1", b"proof@v2"),
        lambda p: p.replace(b"\nindex", b"\nextra !\nindex"),
        lambda p: b"\xff" + p,
        lambda p: p.replace(b"index 3\n", b"index 3\n" + b"A" * 44 + b"\n" * 1) * 200,
        lambda p: p.replace(b"\n\n", b"\n", 1),
    ],
)
def test_refuses_malformed_proofs(book, change):
    proof, entry = proof_of(book)
    with pytest.raises(RejectedError) as caught:
        verify_proof(change(proof), entry, book.policy)
    assert caught.value.code in {"AG-LOG-008", "AG-LOG-003"}


@pytest.mark.parametrize(
    "text",
    ["", "a\n1\n", "a\n01\nAAAA\n", "a\n1\nAAAA\n", "a\n-1\n" + "A" * 43 + "=\n", "\n1\nx\n",
     "a\n1\n" + "A" * 42 + "B=\n", "a\n9223372036854775808\n" + "A" * 43 + "=\n"],
)  # fmt: skip
def test_refuses_malformed_checkpoints(text):
    refused("AG-LOG-005", Checkpoint.from_text, text)


@pytest.mark.parametrize(
    "note",
    ["", "text\n", "text\n\n", "text\n\n\N{EM DASH} name AAAA\n", "text\n\n- name AAAAAAAA\n",
     "a\x00b\n\n\N{EM DASH} name AAAAAAAA\n", "text\n\n\N{EM DASH} na+me AAAAAAAA\n",
     "text\n\n\N{EM DASH}  AAAAAAAA\n", "text\n\n\N{EM DASH} n AAAAAAAAAA=\n",
     "t\n\n" + "\N{EM DASH} n AAAAAAAA\n" * 300],
)  # fmt: skip
def test_refuses_malformed_notes(note):
    refused("AG-LOG-003", read_note, note)


def test_a_leaf_never_passes_for_a_node(book):
    proof, _ = proof_of(book, 0)
    read = Proof.from_bytes(proof)
    pair = leaf_hash(book.log.entry(0)) + leaf_hash(book.log.entry(1))
    shifted = Proof(0, read.hashes[1:], read.note)
    refused("AG-LOG-002", verify_proof, shifted.to_bytes(), pair, book.policy)
