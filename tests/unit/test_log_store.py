# SPDX-License-Identifier: Apache-2.0
"""Claims about the log's storage, its events and what it offers to witnesses."""

import sqlite3

import pytest

from allograft.crypto.notekey import NoteKey
from allograft.errors import RejectedError, UnavailableError
from allograft.limits import LIMITS
from allograft.log import merkle
from allograft.log.checkpoint import Checkpoint
from allograft.log.event import read_event, verify_event
from allograft.log.note import read_note
from allograft.log.proof import verify_proof
from allograft.log.store import LogReader, LogStore
from kit.logbook import HUB, NOW, Logbook


@pytest.fixture
def book(tmp_path):
    return Logbook(tmp_path)


def size_of(note):
    return Checkpoint.from_text(read_note(note).text).size


def code_of(call):
    with pytest.raises(RejectedError) as caught:
        call()
    return caught.value.code


def test_appends_in_order_and_reads_back(book):
    entries = [b"one", b"two", b"three"]
    assert book.log.append(entries) == (1, 2, 3)
    assert [book.log.entry(index) for index in (1, 2, 3)] == entries
    assert book.log.size == 4
    assert code_of(lambda: book.log.entry(4)) == "AG-LOG-002"


def test_an_entry_that_is_in_keeps_its_index(book):
    assert book.log.append([b"one", b"two", b"one"]) == (1, 2, 1)
    assert book.log.append([b"two"]) == (2,)
    assert (book.log.size, book.log.find(b"two"), book.log.find(b"three")) == (3, 2, None)


@pytest.mark.parametrize("entry", [b"", bytes(LIMITS.entry_bytes + 1)])
def test_refuses_entries_that_tiles_cannot_carry(book, entry):
    assert code_of(lambda: book.log.append([b"fine", entry])) == "AG-LOG-001"
    assert book.log.size == 1


def test_a_failing_batch_leaves_nothing(book, monkeypatch):
    before = book.log.checkpoint()
    calls = iter(range(10))

    def fail_late(*arguments):
        if next(calls) == 2:
            raise sqlite3.OperationalError("disk full")
        return merkle.leaf_hash(*arguments)

    monkeypatch.setattr("allograft.log.store.merkle.leaf_hash", fail_late)
    with pytest.raises(UnavailableError) as caught:
        book.log.append([b"one", b"two"])
    assert caught.value.code == "AG-STO-001"
    monkeypatch.undo()
    assert (book.log.size, book.log.checkpoint()) == (1, before)


def test_signs_one_checkpoint_per_size(book):
    first = book.log.checkpoint()
    assert book.log.checkpoint() == first
    book.log.append([b"one"])
    second = book.log.checkpoint()
    assert (size_of(first), size_of(second)) == (1, 2)


def test_survives_a_restart(book, tmp_path):
    book.log.append([b"one", b"two"])
    note = book.log.checkpoint()
    book.log.close()
    again = LogStore(tmp_path / "log.db", book.log.origin, book.hub.log)
    assert (again.size, again.checkpoint(), again.entry(2)) == (3, note, b"two")
    assert again.append([b"three"]) == (3,)
    assert merkle.root_of(merkle.leaf_hash(again.entry(i)) for i in range(4)) == again.root(4)
    again.close()


def test_refuses_the_database_of_another_log(book, tmp_path):
    path = tmp_path / "log.db"
    assert code_of(lambda: LogStore(path, book.log.origin, NoteKey.generate())) == "AG-LOG-012"
    assert code_of(lambda: LogStore(path, "allograft/other", book.hub.log)) == "AG-LOG-012"


def test_refuses_a_file_that_is_no_log(tmp_path):
    (tmp_path / "log.db").write_bytes(b"not a database" * 100)
    assert code_of(lambda: LogReader(tmp_path / "log.db")) == "AG-LOG-012"
    with pytest.raises(UnavailableError):
        LogReader(tmp_path / "absent.db")


def test_refuses_a_log_of_a_newer_version(book, tmp_path):
    book.log.close()
    connection = sqlite3.connect(tmp_path / "log.db")
    connection.execute("PRAGMA user_version = 9")
    connection.close()
    assert code_of(lambda: LogReader(tmp_path / "log.db")) == "AG-LOG-012"


def test_a_proof_exists_only_with_a_quorum(book):
    index = book.add("offer", "ward-a")
    assert book.log.proof(index, book.policy) is None
    book.witness("ward-a")
    assert book.log.proof(index, book.policy) is None
    book.witness("ward-b")
    proof = book.log.proof(index, book.policy)
    logged = verify_proof(proof, book.log.entry(index), book.policy)
    assert (logged.index, {c.witness for c in logged.cosignatures}) == (1, {"ward-a", "ward-b"})


def test_one_checkpoint_is_offered_until_it_has_a_quorum(book):
    book.log.append([b"one"])
    first, _ = book.log.offer(book.witnesses["ward-a"].vkey, 0, book.policy)
    book.witness("ward-a")
    book.log.append([b"two"])
    assert book.log.offer(book.witnesses["ward-b"].vkey, 0, book.policy)[0] == first
    assert book.log.offer(book.witnesses["ward-a"].vkey, size_of(first), book.policy) == ("", ())
    book.witness("ward-b")
    second, proof = book.log.offer(book.witnesses["ward-a"].vkey, size_of(first), book.policy)
    assert size_of(second) == 3
    assert proof == tuple(book.log.consistency(2, 3)) != ()


def test_offers_again_what_a_witness_signed_but_we_never_heard(book):
    state = book.witnesses["ward-a"]
    note, proof = book.log.offer(state.vkey, 0, book.policy)
    lost = state.cosign(note, proof, book.log.vkey, NOW)
    again = book.log.offer(state.vkey, state.size, book.policy)
    assert again == (note, ())
    assert state.cosign(*again, book.log.vkey, NOW) == lost


def test_offers_nothing_to_strangers_and_to_witnesses_that_are_ahead(book):
    stranger = Logbook(book.root / "other").witnesses["ward-a"]
    assert book.log.offer(stranger.vkey, 0, book.policy) == ("", ())
    assert book.log.offer(book.witnesses["ward-a"].vkey, 99, book.policy) == ("", ())


def test_a_forged_cosignature_is_refused_and_does_no_harm(book):
    first, second = book.witnesses["ward-a"], book.witnesses["ward-b"]
    note, proof = book.log.offer(first.vkey, 0, book.policy)
    line = first.cosign(note, proof, book.log.vkey, NOW)
    assert code_of(lambda: book.log.collect(line, second.vkey)) == "AG-LOG-006"
    assert code_of(lambda: book.log.add_cosignature(1, line, second.vkey)) == "AG-LOG-006"
    assert code_of(lambda: book.log.add_cosignature(7, line, first.vkey)) == "AG-LOG-002"
    assert code_of(lambda: book.log.collect("nonsense\n", first.vkey)) == "AG-LOG-003"
    book.witness()
    assert verify_proof(book.log.proof(0, book.policy), book.log.entry(0), book.policy)


def test_proofs_leave_out_witnesses_that_were_taken_out(book):
    book.add("offer", "ward-a")
    book.witness()
    book.keeper.revoke("ward-c", "left", NOW)
    book.publish()
    logged = verify_proof(book.log.proof(1, book.policy), book.log.entry(1), book.policy)
    assert {c.witness for c in logged.cosignatures} == {"ward-a", "ward-b"}


def test_keeps_documents_by_their_digest(book):
    book.tell_story()
    announced = read_event(book.log.entry(1)).document_sha256
    assert book.log.document(announced) == b"{}"
    assert book.log.document("0" * 64) is None


def test_reads_beside_the_writer(book, tmp_path):
    reader = LogReader(tmp_path / "log.db")
    book.log.append([b"one"])
    assert (reader.size, reader.entry(1), reader.vkey) == (2, b"one", book.log.vkey)
    reader.close()


def test_refuses_sizes_that_the_log_does_not_have(book):
    assert code_of(lambda: book.log.inclusion(0, 2)) == "AG-LOG-002"
    assert code_of(lambda: book.log.consistency(1, 2)) == "AG-LOG-002"
    assert code_of(lambda: book.log.root(2)) == "AG-LOG-002"


# --- events ---


def test_an_event_round_trips_and_names_its_author(book):
    entry = book.entry("receipt", "ward-b", dispatch_id="d" * 32, outcome="kept")
    event = verify_event(entry, book.roster, NOW)
    assert (event.event, event.actor, event.outcome, event.time) == (
        "receipt", "ward-b", "kept", NOW,
    )  # fmt: skip
    assert read_event(entry) == event


@pytest.mark.parametrize(
    ("kind", "signer", "changes"),
    [
        ("receipt", "ward-b", {"dispatch_id": "d" * 32, "outcome": "free text!"}),
        ("receipt", "ward-b", {"outcome": "kept"}),
        ("offer", "ward-b", {"outcome": "kept"}),
        ("offer", "ward-b", {"dispatch_id": "d" * 32}),
        ("offer", "ward-b", {"packet_id": ""}),
        ("offer", "ward-b", {"document_name": "../../x"}),
        ("roster", HUB, {}),
    ],
)
def test_refuses_to_sign_what_readers_refuse(book, kind, signer, changes):
    assert code_of(lambda: book.entry(kind, signer, **changes)).startswith("AG-")


@pytest.mark.parametrize("at", [0, 10, 100, -2])
def test_refuses_an_entry_of_another_spelling(book, at):
    entry = book.entry("offer", "ward-a")
    spaced = entry[:at] + b" " + entry[at:]
    with pytest.raises(RejectedError):
        verify_event(spaced, book.roster, NOW)


def test_refuses_a_route_by_a_site(book):
    entry = book.entry("route", "ward-a")
    assert code_of(lambda: verify_event(entry, book.roster, NOW)) == "AG-ROS-002"
