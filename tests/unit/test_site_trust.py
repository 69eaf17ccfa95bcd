# SPDX-License-Identifier: Apache-2.0
"""What the site believes of the log, with the real roster, log format and witnesses."""

import hashlib

import pytest

from allograft.errors import RejectedError
from allograft.log.checkpoint import Checkpoint, sign_checkpoint
from allograft.log.event import Event, sign_event
from allograft.log.merkle import leaf_hash
from allograft.log.note import Note, read_line
from allograft.log.proof import Proof
from allograft.roster import bundle
from allograft_client.settings import Home
from allograft_client.site import open_site
from kit.founding import Founded, run_site_json


@pytest.fixture
def founded(tmp_path):
    return Founded(tmp_path)


@pytest.fixture
def site(founded, tmp_path, capsys):
    state = tmp_path / "site"
    run_site_json(capsys, "init", "--site", "hospital-a", "--state", state)
    founded.enrol(state)
    run_site_json(
        capsys, "join", founded.publish(), "--root-fingerprint", founded.keeper.fingerprint,
        "--state", state,
    )  # fmt: skip
    opened = open_site(Home(state))
    yield opened
    opened.store.close()


def entry_of(site):
    event = Event(
        "dispatch", site.name, "a" * 32, "b" * 32, "", site.now(), "dispatch.json",
        hashlib.sha256(b"x").hexdigest(),
    )  # fmt: skip
    return sign_event(event, site.key)


def checkpoint(founded, *entries):
    root = leaf_hash(entries[0]) if entries else hashlib.sha256(b"").digest()
    return sign_checkpoint(Checkpoint("allograft/consortium", len(entries), root), founded.log_key)


def test_believes_an_entry_that_its_own_witness_saw(founded, site):
    entry = entry_of(site)
    note = checkpoint(founded, entry)
    line = site.trust.witness().cosign(note.to_text(), (), site.now())
    proof = Proof(0, (), Note(note.text, (*note.lines, read_line(line)))).to_bytes()
    assert site.trust.verify_logged(entry, proof, site.now()).packet_id == "a" * 32


def test_refuses_a_proof_without_witnesses(founded, site):
    entry = entry_of(site)
    proof = Proof(0, (), checkpoint(founded, entry)).to_bytes()
    with pytest.raises(RejectedError, match="AG-LOG-007"):
        site.trust.verify_logged(entry, proof, site.now())


def test_the_witness_remembers_across_restarts_and_refuses_a_fork(founded, site):
    first, second = entry_of(site), entry_of(site)
    site.trust.witness().cosign(checkpoint(founded, first).to_text(), (), site.now())
    restarted = open_site(site.home).trust.witness()
    assert restarted.size == 1
    with pytest.raises(RejectedError, match="AG-LOG-010"):
        restarted.cosign(checkpoint(founded, second).to_text(), (), site.now())


def test_takes_a_newer_roster_and_refuses_an_older_one(founded, site):
    old = bundle.pack(site.trust._client.files())
    newer = founded.keeper.publish(founded.now)
    before = site.trust.latest_roster().version
    assert site.trust.take_roster(bundle.pack(newer.files)).version > before
    with pytest.raises(RejectedError, match="AG-ROS-006"):
        site.trust.take_roster(old)
    assert site.trust.roster().version > before


def test_refuses_a_roster_that_is_no_roster(site):
    for content in (b"", b"{}", b'{"files":{}}'):
        with pytest.raises(RejectedError, match="AG-ROS-"):
            site.trust.take_roster(content)
