# SPDX-License-Identifier: Apache-2.0
"""A coordinator that bends the roster, a site that enrols keys it does not hold, a forged root."""

import base64
import json
from dataclasses import replace
from datetime import timedelta

import pytest
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, TargetFile, Targets

from allograft.crypto import canonical
from allograft.crypto.keys import NodeKey, SealingPublicKey, SigningKey
from allograft.crypto.notekey import NoteKey
from allograft.crypto.vkey import WITNESS, make_vkey
from allograft.errors import RejectedError
from allograft.roster import bundle, enrolment
from allograft.roster.client import RosterClient, last_moment, target_name
from allograft.roster.enrolment import SiteKeys, request_site, verify_site_request
from allograft.roster.invitation import Invitation
from allograft.roster.keeper import Keeper
from allograft.roster.records import CoordinatorRecord, Revocation, SiteRecord, read_policy
from allograft.roster.signer import RosterSigner
from allograft.roster.timestamp import make_timestamp, renew_timestamp
from kit.logbook import NOW, Hub, Party

LOW_ORDER = bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05")


class World:
    def __init__(self, root):
        self.hub = Hub()
        self.sites = {name: Party(name) for name in ("a", "b", "c")}
        self.keeper = Keeper.create(root / "keeper", self.hub.record, NOW)
        for site in self.sites.values():
            self.keeper.enrol(site.record)
        self.files = self.renew(self.keeper.publish(NOW).files)
        self.client = RosterClient(root / "client")
        self.client.trust(self.files["1.root.json"])
        self.roster = self.client.refresh(self.files, NOW)

    def renew(self, files, above=0, now=NOW):
        return renew_timestamp(files, self.hub.timestamp, now, above)

    def stamped(self, files, version, snapshot_version, key=None):
        signer = RosterSigner(key or self.hub.timestamp)
        expires = NOW + timedelta(hours=24)
        stamp = make_timestamp(version, snapshot_version, expires, signer)
        return {**files, "timestamp.json": stamp}


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def refused(codes, call, *arguments):
    with pytest.raises(RejectedError) as caught:
        call(*arguments)
    allowed = {codes} if isinstance(codes, str) else codes
    assert caught.value.code in allowed, caught.value


# --- a coordinator with its own, honest timestamp key ---


def test_cannot_roll_the_roster_back(world):
    before = world.files
    world.keeper.revoke("c", "stolen key", NOW)
    world.client.refresh(world.renew(world.keeper.publish(NOW).files, 2), NOW)
    refused("AG-ROS-006", world.client.refresh, before, NOW)
    # Not even under a new timestamp: the older snapshot is refused by its own version.
    again = world.stamped(before, 9, 1)
    refused("AG-ROS-006", world.client.refresh, again, NOW)
    assert "c" in world.client.latest().revoked


def test_cannot_freeze_the_roster_for_longer_than_a_day(world):
    refused("AG-ROS-007", world.client.refresh, world.files, NOW + timedelta(hours=24))
    refused("AG-ROS-007", world.client.current, NOW + timedelta(hours=24))


def test_cannot_enrol_a_site(world):
    own = Party("mallory").record.to_bytes()
    target = TargetFile.from_data("sites/mallory.json", own, ["sha256"])
    targets = Metadata[Targets].from_bytes(world.files["1.targets.json"])
    targets.signed.targets[target.path] = target
    targets.signed.version = 2
    targets.sign(RosterSigner(world.hub.timestamp))
    snapshot = Snapshot(version=2, expires=NOW + timedelta(days=9))
    snapshot.meta["targets.json"] = MetaFile(2)
    signed = Metadata(snapshot)
    signed.sign(RosterSigner(world.hub.timestamp))
    forged = {
        **world.files, "2.targets.json": targets.to_bytes(), "2.snapshot.json": signed.to_bytes(),
        target_name(target): own,
    }  # fmt: skip
    refused("AG-ROS-008", world.client.refresh, world.stamped(forged, 9, 2), NOW)
    assert "mallory" not in world.client.latest().sites


@pytest.mark.parametrize("ending", [".a.json", ".coordinator.json", ".policy.json"])
def test_cannot_change_a_record(world, ending):
    (name,) = [name for name in world.files if name.endswith(ending)]
    changed = {**world.files, name: world.files[name].replace(b'"v":1', b'"v": 1')}
    refused("AG-ROS-008", world.client.refresh, changed, NOW)


def test_cannot_leave_a_record_out(world):
    for name in [name for name in world.files if name.startswith("targets/")]:
        fewer = {key: value for key, value in world.files.items() if key != name}
        refused("AG-ROS-008", world.client.refresh, fewer, NOW)


def test_cannot_add_a_file_that_nothing_lists(world):
    more = {**world.files, f"targets/sites/{'0' * 64}.z.json": b"{}"}
    refused("AG-ROS-008", world.client.refresh, more, NOW)


def test_an_incomplete_bundle_does_not_poison_the_client(world, tmp_path):
    world.keeper.revoke("c", "left", NOW)
    newer = world.renew(world.keeper.publish(NOW).files, 2)
    broken = {name: c for name, c in newer.items() if not name.startswith("targets/sites")}
    refused("AG-ROS-008", world.client.refresh, broken, NOW)
    again = RosterClient(tmp_path / "client")
    assert again.current(NOW) == world.roster
    assert again.refresh(newer, NOW).version == 3


def test_a_stolen_timestamp_key_cannot_enrol_and_is_locked_out_by_a_new_root(world):
    thief = world.stamped(world.files, 1_000_000, 1)
    world.client.refresh(thief, NOW)
    successor = Hub()
    world.keeper.renew_root(NOW, successor.record)
    files = renew_timestamp(world.keeper.publish(NOW).files, successor.timestamp, NOW)
    assert world.client.refresh(files, NOW).coordinator == successor.record
    refused({"AG-ROS-006", "AG-ROS-008"}, world.client.refresh, thief, NOW)


def test_a_root_that_was_replaced_never_returns(world, tmp_path):
    world.keeper.renew_root(NOW, Hub().record)
    hub_two = world.keeper.publish(NOW).files
    world.client.refresh(hub_two, NOW)
    old_root = {name: c for name, c in hub_two.items() if name != "2.root.json"}
    forged = world.stamped(old_root, 9, 2)
    refused({"AG-ROS-006", "AG-ROS-008"}, world.client.refresh, forged, NOW)


# --- forged roots ---


def test_one_root_key_does_not_make_a_root(world):
    lone = NoteKey.generate()
    root = Metadata[Root].from_bytes(world.files["1.root.json"])
    root.signed.version = 2
    root.sign(RosterSigner(lone))
    refused(
        "AG-ROS-008", world.client.refresh, {**world.files, "2.root.json": root.to_bytes()}, NOW
    )


def root_with_key(world, **changes):
    root = json.loads(world.files["1.root.json"])
    first = sorted(root["signed"]["keys"])[0]
    key = root["signed"]["keys"][first]
    key.update({k: v for k, v in changes.items() if k != "public"})
    key["keyval"]["public"] = changes.get("public", key["keyval"]["public"])
    return json.dumps(root).encode()


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"public": LOW_ORDER.hex()}, "AG-KEY-003"),
        ({"public": "01" + "00" * 31}, "AG-KEY-003"),
        ({"public": "zz"}, "AG-ROS-008"),
        ({"public": "00"}, "AG-KEY-003"),
        ({"keytype": "rsa", "scheme": "rsassa-pss-sha256"}, "AG-ROS-008"),
    ],
)
def test_keys_of_a_root_are_checked_before_they_count(world, tmp_path, changes, code):
    client = RosterClient(tmp_path / "new")
    refused(code, client.trust, root_with_key(world, **changes))
    forged = {**world.files, "2.root.json": root_with_key(world, **changes)}
    refused(code, world.client.refresh, forged, NOW)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff"])
def test_malformed_roots_are_refused(tmp_path, content):
    refused("AG-ROS-008", RosterClient(tmp_path / "new").trust, content)


def test_another_document_is_no_root(world, tmp_path):
    client = RosterClient(tmp_path / "new")
    refused("AG-ROS-008", client.trust, world.files["1.targets.json"])


# --- malformed files ---


def edited(record, **changes):
    fields = json.loads(record.to_bytes())
    fields.update(changes)
    return canonical.dumps({k: v for k, v in fields.items() if v is not None})


SITE_EDITS = {
    "extra": {"extra": 1},
    "missing": {"roles": None},
    "version": {"v": 2},
    "version-true": {"v": True},
    "name": {"site": "../etc"},
    "upper": {"site": "A"},
    "no-keys": {"signing_keys": []},
    "pem": {"signing_keys": ["-----BEGIN PUBLIC KEY-----"]},
    "sealing": {"sealing_key": "AAAA"},
    "sealing-base64": {"sealing_key": "!"},
    "sealing-beyond-ascii": {"sealing_key": "é"},
    "vkey": {"witness_vkey": "a+00000000+AAAA"},
    "vkey-name": {"witness_vkey": make_vkey("b", WITNESS, NoteKey.generate().public)},
    "vkey-type": {"witness_vkey": make_vkey("a", 1, NoteKey.generate().public)},
    "node": {"node_key": "ssh-rsa AAAA"},
    "no-roles": {"roles": []},
    "role": {"roles": ["admin"]},
    "role-twice": {"roles": ["donor", "donor"]},
    "time": {"not_after": "tomorrow"},
    "ends-first": {"not_after": "2020-01-01T00:00:00Z"},
}


@pytest.mark.parametrize("name", SITE_EDITS)
def test_malformed_site_records_are_refused(name):
    content = edited(Party("a").record, **SITE_EDITS[name])
    with pytest.raises(RejectedError) as caught:
        SiteRecord.from_bytes(content)
    assert caught.value.code.startswith(("AG-ROS-001", "AG-KEY-00"))


COORDINATOR_EDITS = {
    "vkey-of-another": {"log_vkey": make_vkey("allograft/other", 1, NoteKey.generate().public)},
    "timestamp-point": {"timestamp_key": LOW_ORDER.hex()},
    "timestamp-hex": {"timestamp_key": "zz"},
    "no-keys": {"signing_keys": []},
    "address-lines": {"address": "a\nb"},
    "bidi": {"address": "a‮b"},
}


@pytest.mark.parametrize("name", COORDINATOR_EDITS)
def test_malformed_coordinator_records_are_refused(name):
    with pytest.raises(RejectedError):
        CoordinatorRecord.from_bytes(edited(Hub().record, **COORDINATOR_EDITS[name]))


@pytest.mark.parametrize("content", [b"", b"{}", b'{"v":1,"witness_quorum":0}',
                                     b'{"v":1,"witness_quorum":true}'])  # fmt: skip
def test_malformed_policies_are_refused(content):
    refused("AG-ROS-001", read_policy, content)


def test_a_reason_is_one_printable_line():
    content = Revocation("a", "two\nlines", NOW).to_bytes()
    refused("AG-ROS-001", Revocation.from_bytes, content)


@pytest.mark.parametrize(
    "files",
    [{"../x": b""}, {"0.root.json": b""}, {"x.json": b""}, {"targets/sites/../a.json": b""},
     {"root.json": b""}],
)  # fmt: skip
def test_bundles_name_nothing_else(files):
    refused("AG-ROS-008", bundle.unpack, bundle.pack(files))


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b'{"files":[]}', b'{"files":{"timestamp.json":"!"}}',
     '{"files":{"timestamp.json":"é"}}'.encode()],
)  # fmt: skip
def test_malformed_bundles_are_refused(content):
    refused("AG-ROS-008", bundle.unpack, content)


def test_no_file_of_a_bundle_is_parsed_over_its_limit(world, tmp_path):
    """Empty arrays take twenty-five times their text once parsed, and roots are parsed early."""
    bomb = b"[" + b"[]," * (1 << 20) + b"0]"
    refused("AG-ROS-008", bundle.unpack, bundle.pack({**world.files, "2.root.json": bomb}))
    refused("AG-ROS-008", world.client.refresh, {**world.files, "2.root.json": bomb}, NOW)
    refused("AG-ROS-008", RosterClient(tmp_path / "new").trust, bomb)


@pytest.mark.parametrize("content", [b"{}", b'{"signed":{}}', b'{"signed":[]}', b"[]"])
def test_the_last_moment_of_a_malformed_bundle_is_refused(world, content):
    refused("AG-IN-003", last_moment, {**world.files, "timestamp.json": content})


def test_malformed_invitations_are_refused(world):
    whole = json.loads(world.keeper.publish(NOW).invitation.to_bytes())
    for name in whole:
        fewer = {key: value for key, value in whole.items() if key != name}
        refused("AG-ROS-014", Invitation.from_bytes, canonical.dumps(fewer))
    refused("AG-ROS-014", Invitation.from_bytes, canonical.dumps({**whole, "v": 2}))
    # What a site joins by is in the signed roster; a field beside it could say something else.
    for name in ("address", "coordinator", "tls_ca_pem"):
        more = canonical.dumps({**whole, name: "elsewhere"})
        refused("AG-ROS-014", Invitation.from_bytes, more)
    for name in ("root", "roster"):
        for text in ("!", "é"):
            changed = canonical.dumps({**whole, name: text})
            refused("AG-ROS-014", Invitation.from_bytes, changed)


# --- enrolment ---


def test_a_request_proves_every_key_and_has_one_fingerprint():
    party = Party("a")
    request = request_site(party.record, party.keys)
    assert verify_site_request(request) == party.record
    spoken = enrolment.fingerprint(request)
    enrolment.check_fingerprint(request, spoken.upper().replace("-", " "))
    refused("AG-ROS-011", enrolment.check_fingerprint, request, spoken[:-1] + "x")
    refused("AG-ROS-011", enrolment.check_fingerprint, request, "")


@pytest.mark.parametrize("stolen", ["signing", "witness", "node"])
def test_nobody_enrols_a_key_of_another(stolen):
    party, other = Party("a"), Party("b")
    keys = {"signing": party.signing, "witness": party.witness, "node": party.node}
    keys[stolen] = getattr(other, stolen)
    refused("AG-ROS-005", request_site, party.record, SiteKeys(**keys))


def test_a_proof_counts_for_its_own_request_only():
    party = Party("a")
    first = json.loads(request_site(party.record, party.keys))
    longer = replace(party.record, not_after=NOW + timedelta(days=999))
    second = json.loads(request_site(longer, party.keys))
    mixed = canonical.dumps({**second, "proofs": first["proofs"]})
    refused("AG-ROS-005", verify_site_request, mixed)


@pytest.mark.parametrize("text", ["!", "é", "AAAA"])
@pytest.mark.parametrize("purpose", ["witness", "node"])
def test_a_proof_that_is_no_signature_is_refused(purpose, text):
    party = Party("a")
    request = json.loads(request_site(party.record, party.keys))
    request["proofs"][purpose] = text
    refused("AG-ROS-005", verify_site_request, canonical.dumps(request))


def test_a_low_order_witness_key_is_never_enrolled():
    party = Party("a")
    material = base64.b64encode(bytes([4]) + LOW_ORDER).decode()
    record = replace(party.record, witness_vkey=f"a+00000000+{material}")
    refused("AG-KEY-003", request_site, record, party.keys)


def test_requests_of_sites_and_coordinators_are_told_apart():
    hub, party = Hub(), Party("a")
    asked = enrolment.request_coordinator(hub.record, hub.keys)
    assert enrolment.verify_coordinator_request(asked) == hub.record
    refused("AG-ROS-005", verify_site_request, asked)
    site_request = request_site(party.record, party.keys)
    refused("AG-ROS-005", enrolment.verify_coordinator_request, site_request)


def test_a_coordinator_needs_different_keys_for_log_and_timestamp():
    hub = Hub()
    hub.timestamp = hub.log
    record = replace(hub.record, timestamp_key=hub.log.public.raw)
    refused("AG-ROS-005", enrolment.request_coordinator, record, hub.keys)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"v":1}', b'{"envelope":{},"proofs":{},"v":1}'])
def test_malformed_requests_are_refused(content):
    refused("AG-ROS-005", verify_site_request, content)
    refused("AG-ROS-005", enrolment.fingerprint, content)


def test_a_record_with_two_signing_keys_needs_both_to_ask():
    party = Party("a")
    both = (*party.record.signing_keys, SigningKey.generate().public)
    refused("AG-ROS-005", request_site, replace(party.record, signing_keys=both), party.keys)


def test_a_sealing_key_that_is_none_is_refused():
    party = Party("a")
    record = replace(party.record, sealing_key=SealingPublicKey(b"\xff" * 1216))
    with pytest.raises(RejectedError) as caught:
        request_site(record, party.keys)
    assert caught.value.code == "AG-KEY-001"


def test_a_node_key_of_another_kind_is_refused():
    party = Party("a")
    record = replace(party.record, node_key="ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIA==")
    refused("AG-KEY-001", request_site, record, party.keys)
    assert NodeKey.generate().public_openssh.startswith("ecdsa")
