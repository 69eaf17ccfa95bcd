# SPDX-License-Identifier: Apache-2.0
"""A coordinator that exports a log which is not the one it showed, and auditors who find out."""

import secrets
import shutil
from datetime import timedelta

import pytest

from allograft.durable import durable_write
from allograft.errors import RejectedError, UnavailableError
from allograft.log.audit import audit_folder
from allograft.log.checkpoint import Checkpoint, sign_checkpoint
from allograft.log.cosignature import cosign
from allograft.log.export import export_log
from allograft.log.merkle import leaf_hash, root_of
from allograft.log.note import read_note
from allograft.log.tiles import decode_entries, encode_entries
from allograft.roster import bundle
from kit.logbook import HUB, NOW, Logbook


@pytest.fixture
def book(tmp_path):
    return Logbook(tmp_path)


def refused(folder, code, *parts, root=""):
    with pytest.raises(RejectedError) as caught:
        audit_folder(folder, root)
    assert caught.value.code == code, caught.value
    for part in parts:
        assert part in caught.value.cause


def flip(path, at=-1, bit=1):
    content = bytearray(path.read_bytes())
    content[at] ^= bit
    path.write_bytes(bytes(content))


def entries_of(folder):
    (path,) = (folder / "tile" / "entries" / "000.p").iterdir()
    return path, list(decode_entries(path.read_bytes(), int(path.name)))


def rebuild(book, folder, entries, witnesses=()):
    """Write the tiles and the checkpoint anew over other entries, as the log's key could."""
    shutil.rmtree(folder / "tile")
    for place, content in (
        (f"tile/entries/000.p/{len(entries)}", encode_entries(entries)),
        (f"tile/0/000.p/{len(entries)}", b"".join(leaf_hash(entry) for entry in entries)),
    ):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_bytes(content)
    root = root_of(leaf_hash(entry) for entry in entries)
    note = sign_checkpoint(Checkpoint(book.log.origin, len(entries), root), book.hub.log)
    lines = "".join(
        cosign(note.text, name, book.sites[name].witness, NOW).to_text() for name in witnesses
    )
    (folder / "checkpoint").write_text(note.to_text() + lines, encoding="utf-8")


def test_accepts_an_honest_log(book):
    book.tell_story()
    audited = audit_folder(book.export(), book.keeper.fingerprint)
    assert audited.size == 6
    assert [event.event for event in audited.events] == [
        "roster", "offer", "route", "dispatch", "receipt", "receipt",
    ]  # fmt: skip
    assert {c.witness for c in audited.cosignatures} == set(book.names)
    assert (audited.quorum, audited.rosters, audited.missing_documents) == (2, 1, 3)


def test_accepts_rosters_that_changed_on_the_way(book):
    book.tell_story()
    book.keeper.revoke("ward-c", "left the consortium", NOW)
    book.now += timedelta(hours=20)
    book.publish()
    book.add("withdrawal", "ward-a")
    book.now += timedelta(hours=20)
    book.publish()
    audited = audit_folder(book.export(), book.keeper.fingerprint)
    assert (audited.rosters, audited.size, len(audited.cosignatures)) == (3, 9, 2)


@pytest.mark.parametrize("place", ["tile/entries", "tile/0", "checkpoint", "policy", "roster"])
def test_refuses_a_flipped_bit_in_any_file(book, place):
    book.tell_story()
    folder = book.export()
    found = folder / place
    paths = [found] if found.is_file() else [p for p in found.rglob("*") if p.is_file()]
    for path in paths:
        flip(path, at=len(path.read_bytes()) // 2)
    with pytest.raises(RejectedError):
        audit_folder(folder)


def test_every_bit_of_a_small_export_counts(book):
    book.add("offer", "ward-a", document=b"{}")
    folder = book.export()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        whole = path.read_bytes()
        for at in range(0, len(whole), max(1, len(whole) // 12)):
            flip(path, at, bit=1 << secrets.randbelow(7))
            with pytest.raises(RejectedError):
                audit_folder(folder)
            path.write_bytes(whole)
    assert audit_folder(folder).size == 2


def test_names_the_first_entry_that_was_swapped(book):
    book.tell_story()
    folder = book.export()
    path, entries = entries_of(folder)
    entries[3] = book.entry("dispatch", "ward-a", dispatch_id="e" * 32)
    path.write_bytes(encode_entries(entries))
    refused(folder, "AG-LOG-014", "entry 3")


def test_refuses_entries_that_were_dropped_and_signed_anew(book):
    book.tell_story()
    folder = book.export()
    rebuild(book, folder, entries_of(folder)[1][:-1])
    refused(folder, "AG-LOG-007")


def test_refuses_cosignatures_of_another_history(book):
    book.tell_story()
    folder = book.export()
    lines = read_note((folder / "checkpoint").read_bytes()).lines[1:]
    _, entries = entries_of(folder)
    rebuild(book, folder, entries[:4])
    forged = (folder / "checkpoint").read_text("utf-8") + "".join(line.to_text() for line in lines)
    (folder / "checkpoint").write_text(forged, encoding="utf-8")
    refused(folder, "AG-LOG-006")


def test_counts_each_witness_once(book):
    book.tell_story()
    folder = book.export()
    _, entries = entries_of(folder)
    rebuild(book, folder, entries, ["ward-a", "ward-a"])
    refused(folder, "AG-LOG-007", "1 of 2")


def tampered(book, entries_from, witnesses=("ward-a", "ward-b")):
    """An export whose entries break a rule although enough witnesses cosigned it."""
    folder = book.export()
    _, entries = entries_of(folder)
    rebuild(book, folder, entries_from(entries), witnesses)
    return folder


def test_refuses_an_entry_by_a_revoked_site(book):
    book.tell_story()
    book.keeper.revoke("ward-c", "lost key", NOW)
    book.publish()
    late = book.add("receipt", "ward-c", dispatch_id="d" * 32, outcome="kept")
    refused(book.export(), "AG-ROS-003", f"entry {late}")


def test_refuses_an_entry_by_a_stranger(book):
    book.tell_story()
    book.log.append([book.entry("offer", "ward-a", actor="ward-z", packet_id="b" * 32)])
    refused(book.export(), "AG-ROS-002", "entry 6")


def test_refuses_an_entry_that_its_author_did_not_sign(book):
    book.tell_story()
    book.log.append([book.entry("offer", "ward-a", actor="ward-b", packet_id="b" * 32)])
    refused(book.export(), "AG-SIG-003", "entry 6")


def test_refuses_a_dispatch_before_its_offer(book):
    book.add("dispatch", "ward-a", dispatch_id="d" * 32)
    refused(book.export(), "AG-LOG-015", "entry 1", "not offered")


def test_refuses_a_receipt_before_its_dispatch(book):
    book.add("offer", "ward-a")
    book.add("receipt", "ward-b", dispatch_id="d" * 32, outcome="kept")
    refused(book.export(), "AG-LOG-015", "entry 2")


def test_refuses_a_receipt_by_a_site_that_was_not_addressed(book):
    book.add("offer", "ward-a")
    document = book.dispatch_document("ward-a", "ward-b")
    book.add("dispatch", "ward-a", dispatch_id="d" * 32, document=document)
    book.add("receipt", "ward-c", dispatch_id="d" * 32, outcome="kept")
    refused(book.export(), "AG-LOG-015", "entry 3", "no recipient")


def test_counts_what_a_missing_document_leaves_unchecked(book):
    book.tell_story()
    folder = book.export()
    assert audit_folder(folder).unchecked_receipts == 0
    for path in (folder / "document").iterdir():
        path.unlink()
    audited = audit_folder(folder)
    assert (audited.missing_documents, audited.unchecked_receipts) == (5, 2)


def test_refuses_a_dispatch_by_another_site_than_the_donor(book):
    book.add("offer", "ward-a")
    book.add("dispatch", "ward-b", dispatch_id="d" * 32)
    refused(book.export(), "AG-LOG-015", "entry 2")


def test_refuses_a_dispatch_id_used_twice(book):
    book.add("offer", "ward-a")
    book.add("dispatch", "ward-a", dispatch_id="d" * 32)
    book.add("dispatch", "ward-a", dispatch_id="d" * 32)
    refused(book.export(), "AG-LOG-015", "entry 3", "twice")


def test_refuses_a_dispatch_after_the_withdrawal(book):
    book.add("offer", "ward-a")
    book.add("withdrawal", "ward-a")
    book.add("dispatch", "ward-a", dispatch_id="d" * 32)
    refused(book.export(), "AG-LOG-015", "entry 3", "withdrawn")


def test_refuses_one_packet_offered_by_two_sites(book):
    book.add("offer", "ward-a")
    book.add("offer", "ward-b")
    refused(book.export(), "AG-LOG-015", "entry 2")


def test_refuses_a_receipt_for_another_packet(book):
    book.add("offer", "ward-a")
    book.add("offer", "ward-a", packet_id="b" * 32)
    book.add("dispatch", "ward-a", dispatch_id="d" * 32)
    book.add("receipt", "ward-b", dispatch_id="d" * 32, packet_id="b" * 32, outcome="kept")
    refused(book.export(), "AG-LOG-015", "entry 4")


def test_refuses_a_document_that_is_not_the_announced_one(book):
    book.tell_story()
    folder = book.export()
    for path in (folder / "document").iterdir():
        path.write_bytes(b"[]")
    refused(folder, "AG-LOG-014", "entry 1")


def test_refuses_entries_under_an_expired_roster(book):
    book.now += timedelta(hours=25)
    book.add("offer", "ward-a")
    refused(book.export(), "AG-LOG-016", "entry 1", "expired")


def test_refuses_a_log_that_does_not_begin_with_a_roster(book):
    book.tell_story()
    refused(tampered(book, lambda entries: entries[1:]), "AG-LOG-016", "entry 0")


def test_refuses_a_roster_that_is_older_than_the_one_before(book):
    first = dict(book.files)
    book.now += timedelta(hours=1)
    book.publish()
    book.files = first
    book.log_roster()
    refused(book.export(), "AG-LOG-016", "entry 2", "AG-ROS-006")


def test_refuses_a_roster_under_another_name(book):
    folder = book.export()
    book.now += timedelta(hours=1)
    book.publish()
    (path,) = (folder / "roster").iterdir()
    path.write_bytes(bundle.pack(book.files))
    refused(folder, "AG-LOG-016", "entry 0")


def test_refuses_a_missing_roster(book):
    folder = book.export()
    (path,) = (folder / "roster").iterdir()
    path.unlink()
    refused(folder, "AG-LOG-016")


def test_refuses_a_roster_event_by_a_site(book):
    event = book.event("roster", HUB, packet_id="")
    book.log.append([book.entry("offer", "ward-a", **{
        "event": "roster", "packet_id": "", "document_sha256": bundle.digest(book.files),
        "time": event.time,
    })])  # fmt: skip
    refused(book.export(), "AG-ROS-002", "entry 1")


def test_refuses_an_export_of_another_consortium(book):
    refused(book.export(), "AG-ROS-010", root="0" * 64)


@pytest.mark.parametrize(
    "name", ["notes.txt", "tile/1/000.p/1", "roster/x.json", "document/y.json"]
)
def test_refuses_a_file_too_many(book, name):
    book.tell_story()
    folder = book.export()
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b'{"files": {}}')
    with pytest.raises(RejectedError) as caught:
        audit_folder(folder)
    assert caught.value.code in {"AG-LOG-013", "AG-ROS-008"}


def test_refuses_a_link_in_place_of_a_file(book, tmp_path):
    folder = book.export()
    moved = tmp_path / "elsewhere"
    (folder / "policy").rename(moved)
    (folder / "policy").symlink_to(moved)
    refused(folder, "AG-LOG-013")


@pytest.mark.parametrize("name", ["policy", "tile/0/000.p/6", "tile/entries/000.p/6"])
def test_refuses_a_file_too_few(book, name):
    book.tell_story()
    folder = book.export()
    (folder / name).unlink()
    refused(folder, "AG-LOG-013")


def test_says_so_when_there_is_no_export(tmp_path):
    with pytest.raises(UnavailableError) as caught:
        audit_folder(tmp_path)
    assert caught.value.code == "AG-STO-003"


def test_does_not_export_what_nobody_witnessed(book, tmp_path):
    with pytest.raises(RejectedError) as caught:
        export_log(book.log, tmp_path / "out")
    assert caught.value.code == "AG-LOG-017"
    assert not (tmp_path / "out").exists()


def test_leaves_out_entries_that_too_few_witnessed(book, tmp_path):
    book.witness()
    book.tell_story()
    book.witness("ward-a")
    exported = export_log(book.log, tmp_path / "out")
    assert (exported.entries, exported.waiting) == (1, 5)
    assert audit_folder(tmp_path / "out").size == 1


def test_does_not_write_into_a_folder_in_use(book, tmp_path):
    book.witness()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").touch()
    with pytest.raises(RejectedError) as caught:
        export_log(book.log, tmp_path / "out")
    assert caught.value.code == "AG-LOG-013"


@pytest.mark.parametrize("is_there", [False, True])
def test_an_export_that_failed_half_way_can_be_repeated(book, tmp_path, monkeypatch, is_there):
    book.tell_story()
    book.witness()
    out = tmp_path / "out"
    if is_there:
        out.mkdir()
    written = []

    def fill_up(path, content, mode):
        written.append(path)
        if len(written) == 4:
            raise UnavailableError("AG-STO-001", "full")
        durable_write(path, content, mode)

    with monkeypatch.context() as patch:
        patch.setattr("allograft.log.export.durable_write", fill_up)
        with pytest.raises(UnavailableError):
            export_log(book.log, out)
    assert (out.exists(), len(written)) == (is_there, 4)
    export_log(book.log, out)
    assert audit_folder(out).size == 6


def test_what_a_killed_export_left_is_no_obstacle(book, tmp_path):
    book.tell_story()
    book.witness()
    left = tmp_path / "out" / ".partial" / "roster"
    left.mkdir(parents=True)
    (left / "x.json").write_bytes(b"cut sho")
    with pytest.raises(UnavailableError):
        audit_folder(tmp_path / "out")
    export_log(book.log, tmp_path / "out")
    assert audit_folder(tmp_path / "out").size == 6


@pytest.mark.parametrize("entries", [255, 256, 257, 600])
def test_audits_logs_of_several_tiles(book, entries):
    offers = [
        book.entry("offer", "ward-a", packet_id=f"{number:032x}") for number in range(entries - 1)
    ]
    book.log.append(offers)
    folder = book.export()
    assert audit_folder(folder).size == entries
    flip(folder / "tile" / "0" / ("000.p/255" if entries == 255 else "000"), at=32 * 200)
    refused(folder, "AG-LOG-014", "entry 200")
