# SPDX-License-Identifier: Apache-2.0
"""Claims about `allograft audit`: from the coordinator's database to a verdict elsewhere."""

import json
import threading
import time

import pytest

from allograft.cli import shell
from allograft.cli.main import app
from kit.logbook import PACKET, Logbook


@pytest.fixture
def run(capsys):
    def call(*arguments):
        status = shell.invoke(app, "allograft", [str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture
def book(tmp_path):
    book = Logbook(tmp_path)
    book.tell_story()
    return book


@pytest.fixture
def folder(book):
    return book.export()


def test_exports_from_a_state_directory_and_verifies(book, run, tmp_path):
    book.witness()
    out = tmp_path / "out"
    status, text, _ = run("audit", "export", "--state", tmp_path, "--out", out, "--format", "json")
    exported = json.loads(text)
    assert (status, exported["entries"], exported["waiting"]) == (0, 6, 0)
    status, text, _ = run("audit", "verify", out, "--format", "json")
    verdict = json.loads(text)
    assert (status, verdict["entries"], verdict["quorum"]) == (0, 6, 2)
    assert {w["witness"] for w in verdict["witnesses"]} == set(book.names)
    assert verdict["events"] == {"roster": 1, "offer": 1, "route": 1, "dispatch": 1, "receipt": 2}
    assert (verdict["root_compared"], verdict["root_fingerprint"]) == (
        False, book.keeper.fingerprint,
    )  # fmt: skip


def test_the_text_verdict_names_witnesses_and_asks_to_compare_the_root(book, folder, run):
    status, text, _ = run("audit", "verify", folder)
    assert status == 0
    assert all(name in text for name in (*book.names, book.keeper.fingerprint, "Compare"))
    _, text, _ = run("audit", "verify", folder, "--root-fingerprint", book.keeper.fingerprint)
    assert "Compare" not in text


def test_verify_warns_of_what_missing_documents_leave_unchecked(folder, run):
    for path in (folder / "document").iterdir():
        path.unlink()
    status, text, _ = run("audit", "verify", folder)
    warnings = [line for line in text.splitlines() if line.startswith("WARNING: ")]
    assert (status, len(warnings)) == (0, 2)
    assert "5 announced documents" in warnings[0]
    assert "2 receipts" in warnings[1]
    verdict = json.loads(run("audit", "verify", folder, "--format", "json")[1])
    assert (verdict["missing_documents"], verdict["unchecked_receipts"]) == (5, 2)


def test_refuses_another_root(folder, run):
    status, _, err = run("audit", "verify", folder, "--root-fingerprint", "0" * 64)
    assert (status, "AG-ROS-010" in err) == (1, True)


def test_lists_events_and_filters_them(folder, run):
    status, text, _ = run("audit", "list", folder, "--packet", PACKET, "--format", "json")
    lines = json.loads(text)
    assert (status, [line["index"] for line in lines]) == (0, [1, 2, 3, 4, 5])
    _, text, _ = run("audit", "list", folder, "--site", "ward-c")
    assert len(text.strip().splitlines()) == 1
    assert "refused" in text


def test_shows_one_event(folder, run):
    status, text, _ = run("audit", "show", folder, 4)
    assert status == 0
    assert all(word in text for word in ("receipt", "ward-b", "kept", PACKET))
    status, _, err = run("audit", "show", folder, 99)
    assert (status, "AG-LOG-002" in err) == (1, True)


@pytest.mark.parametrize("command", [("verify",), ("list",), ("show", 0)])
def test_nothing_is_shown_of_a_changed_log(folder, run, command):
    path = folder / "tile" / "entries" / "000.p" / "6"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    name, *rest = command
    status, out, err = run("audit", name, folder, *rest)
    assert (status, out) == (1, "")
    assert "AG-LOG-014" in err
    assert "entry 5" in err


def test_export_waits_for_witnesses(book, run, tmp_path):
    book.witness("ward-a")

    def later():
        time.sleep(0.3)
        book.witness("ward-b")

    thread = threading.Thread(target=later)
    thread.start()
    arguments = ("audit", "export", "--state", tmp_path / "log.db", "--out", tmp_path / "out")
    status, text, _ = run(*arguments, "--wait-s", 60)
    thread.join()
    assert (status, "newer" in text) == (0, False)


def test_export_without_witnesses_says_what_is_missing(run, tmp_path, book):
    status, _, err = run("audit", "export", "--state", tmp_path, "--out", tmp_path / "out")
    assert (status, "AG-LOG-017" in err) == (1, True)


def test_export_without_a_log_is_unavailable(run, tmp_path):
    status, _, err = run("audit", "export", "--state", tmp_path / "x", "--out", tmp_path / "out")
    assert (status, "AG-STO-003" in err) == (3, True)
