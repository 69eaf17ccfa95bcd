# SPDX-License-Identifier: Apache-2.0
"""Claims about rosters: who is in, for how long, and what a client goes on trusting."""

from dataclasses import replace
from datetime import timedelta

import pytest
from tuf.ngclient import Updater

from allograft.crypto.keys import SigningKey
from allograft.errors import RejectedError
from allograft.roster import bundle
from allograft.roster.client import RosterClient, root_fingerprint, verify_bundle
from allograft.roster.invitation import Invitation
from allograft.roster.keeper import Keeper, write_published
from allograft.roster.records import CoordinatorRecord, Revocation, SiteRecord
from allograft.roster.timestamp import is_due, renew_timestamp
from kit.logbook import HUB, NOW, Hub, Party

HOUR = timedelta(hours=1)


class World:
    """A keeper with three sites, and a client that joined."""

    def __init__(self, root):
        self.root = root
        self.hub = Hub()
        self.sites = {name: Party(name) for name in ("a", "b", "c")}
        self.keeper = Keeper.create(root / "keeper", self.hub.record, NOW)
        for site in self.sites.values():
            self.keeper.enrol(site.record)
        self.published = self.keeper.publish(NOW)
        self.client = RosterClient(root / "client")
        self.client.trust(self.published.files["1.root.json"])

    def renewed(self, now=NOW, above=0):
        return renew_timestamp(self.published.files, self.hub.timestamp, now, above)


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def refused(code, call, *arguments, **named):
    with pytest.raises(RejectedError) as caught:
        call(*arguments, **named)
    assert caught.value.code == code, caught.value


# --- what a roster says ---


def test_a_roster_says_who_is_in(world):
    roster = world.client.refresh(world.published.files, NOW)
    assert roster.site("a", NOW) == world.sites["a"].record
    assert roster.coordinator == world.hub.record
    assert roster.signing_keys("b", "site", NOW) == (world.sites["b"].signing.public,)
    assert roster.signing_keys(HUB, "coordinator", NOW) == (world.hub.signing.public,)
    assert roster.digest == world.published.digest == bundle.digest(world.published.files)


def test_a_majority_of_witnesses_is_the_quorum(world):
    policy = world.client.refresh(world.published.files, NOW).witness_policy()
    assert policy.quorum == 2
    assert set(policy.witness_vkeys) == {s.record.witness_vkey for s in world.sites.values()}
    assert policy.log_vkey == world.hub.record.log_vkey


def test_unknown_revoked_and_expired_sites_are_told_apart(world):
    world.keeper.revoke("c", "left", NOW)
    roster = world.client.refresh(world.keeper.publish(NOW).files, NOW)
    refused("AG-ROS-002", roster.site, "z", NOW)
    refused("AG-ROS-003", roster.site, "c", NOW)
    refused("AG-ROS-004", roster.site, "a", NOW + timedelta(days=400))
    refused("AG-ROS-004", roster.site, "a", NOW - timedelta(days=2))
    refused("AG-ROS-002", roster.signing_keys, "a", "coordinator", NOW)
    refused("AG-ROS-002", roster.signing_keys, HUB, "site", NOW)
    assert roster.revoked["c"] == Revocation("c", "left", NOW)


def test_a_revoked_site_is_no_witness(world):
    world.keeper.revoke("c", "left", NOW)
    roster = world.client.refresh(world.keeper.publish(NOW).files, NOW)
    assert len(roster.witness_policy().witness_vkeys) == 2


# --- freshness ---


def test_python_tuf_takes_the_time_we_set(world, tmp_path):
    # `client` sets this private attribute: python-tuf has no public way to verify a past roster.
    root = world.published.files["1.root.json"]
    directory = tmp_path / "probe"
    directory.mkdir()
    updater = Updater(str(directory), "x:/", bootstrap=root)
    assert hasattr(updater._trusted_set, "reference_time")
    late = NOW + timedelta(days=8)
    refused("AG-ROS-007", verify_bundle, root, world.published.files, late)
    assert verify_bundle(root, world.published.files, NOW).version == 1


def test_a_timestamp_lives_for_a_day(world):
    roster = world.client.refresh(world.renewed(), NOW)
    assert roster.expires == NOW + 24 * HOUR
    assert world.client.current(NOW + 23 * HOUR) == roster
    refused("AG-ROS-007", world.client.current, NOW + 24 * HOUR)
    assert world.client.latest() == roster


def test_renewal_is_due_at_half_of_its_life(world):
    files = world.renewed()
    assert not is_due(files, NOW + 11 * HOUR)
    assert is_due(files, NOW + 12 * HOUR)


def test_targets_and_root_expire_too(world):
    later = NOW + timedelta(days=91)
    refused("AG-ROS-007", world.client.refresh, world.renewed(later), later)
    later = NOW + timedelta(days=366)
    refused("AG-ROS-007", world.keeper.publish, later)
    world.keeper.renew_root(later)
    files = renew_timestamp(world.keeper.publish(later).files, world.hub.timestamp, later)
    assert world.client.refresh(files, later).version == 3


def test_a_restarted_client_goes_on_where_it_was(world, tmp_path):
    roster = world.client.refresh(world.renewed(above=6), NOW)
    again = RosterClient(tmp_path / "client")
    assert (again.latest(), again.latest().version) == (roster, 7)
    assert again.fingerprint == world.keeper.fingerprint
    refused("AG-ROS-006", again.refresh, world.published.files, NOW)


def test_a_client_without_a_root_trusts_nothing(tmp_path, world):
    empty = RosterClient(tmp_path / "empty")
    refused("AG-ROS-009", empty.refresh, world.published.files, NOW)
    refused("AG-ROS-009", empty.latest)
    refused("AG-ROS-009", lambda: empty.fingerprint)


def test_a_second_root_is_refused(world, tmp_path):
    other = Keeper.create(tmp_path / "other", Hub().record, NOW)
    content = other.publish(NOW).files["1.root.json"]
    refused("AG-ROS-010", world.client.trust, content)
    assert world.client.trust(world.published.files["1.root.json"]) == world.keeper.fingerprint


# --- the keeper ---


def test_keys_are_files_of_their_own_that_nobody_else_reads(world, tmp_path):
    paths = sorted((tmp_path / "keeper" / "keys").iterdir())
    assert [path.name for path in paths] == [
        "root-1.key", "root-2.key", "root-3.key", "targets.key",
    ]  # fmt: skip
    assert {path.stat().st_mode & 0o777 for path in paths} == {0o600}


def test_publishing_needs_no_root_key(world, tmp_path):
    for path in (tmp_path / "keeper" / "keys").glob("root-*"):
        path.unlink()
    assert world.keeper.publish(NOW).version == 2
    refused("AG-ROS-013", world.keeper.renew_root, NOW)


def test_a_new_root_needs_the_threshold(world, tmp_path):
    (tmp_path / "keeper" / "keys" / "root-1.key").unlink()
    assert world.keeper.renew_root(NOW)[0] == 2
    (tmp_path / "keeper" / "keys" / "root-2.key").unlink()
    refused("AG-ROS-013", world.keeper.renew_root, NOW)


def test_publishing_needs_the_targets_key(world, tmp_path):
    (tmp_path / "keeper" / "keys" / "targets.key").unlink()
    refused("AG-ROS-013", world.keeper.publish, NOW)


def test_a_name_is_enrolled_once_and_revoked_for_good(world):
    fresh = Party("a").record
    refused("AG-ROS-012", world.keeper.enrol, fresh)
    world.keeper.enrol(fresh, replace=True)
    assert world.keeper.sites["a"] == fresh
    world.keeper.revoke("a", "left", NOW)
    refused("AG-ROS-012", world.keeper.enrol, fresh, replace=True)
    refused("AG-ROS-002", world.keeper.revoke, "a", "again", NOW)


@pytest.mark.parametrize("field", ["signing_keys", "sealing_key", "node_key"])
def test_no_key_belongs_to_two_sites(world, field):
    fresh = replace(Party("d").record, **{field: getattr(world.sites["a"].record, field)})
    refused("AG-ROS-012", world.keeper.enrol, fresh)


def test_a_new_coordinator_takes_over(world):
    successor = Hub("hub-two")
    world.client.refresh(world.renewed(), NOW)
    world.keeper.renew_root(NOW, successor.record)
    published = world.keeper.publish(NOW).files
    refused("AG-ROS-015", renew_timestamp, published, world.hub.timestamp, NOW)
    files = renew_timestamp(published, successor.timestamp, NOW, 9)
    assert world.client.refresh(files, NOW).coordinator == successor.record


def test_a_fixed_quorum_replaces_the_majority(world):
    world.keeper.fix_quorum(3)
    roster = world.client.refresh(world.keeper.publish(NOW).files, NOW)
    assert roster.witness_quorum == 3
    refused("AG-ROS-001", world.keeper.fix_quorum, 0)


@pytest.mark.parametrize(("keys", "threshold"), [(0, 0), (2, 3), (3, 0), (10, 2)])
def test_refuses_thresholds_that_make_no_sense(tmp_path, keys, threshold):
    place = tmp_path / "k"
    refused("AG-ROS-016", Keeper.create, place, Hub().record, NOW, keys, threshold)


def test_refuses_directories_that_are_in_use_or_empty(world, tmp_path):
    refused("AG-ROS-016", Keeper.create, tmp_path / "keeper", Hub().record, NOW)
    refused("AG-ROS-016", Keeper, tmp_path)


@pytest.mark.parametrize("content", [b"", b"\xff", b"{}", b"[]", b"[" * 100_000, None])
def test_a_damaged_first_root_is_no_roster(world, tmp_path, content):
    root = tmp_path / "keeper" / "metadata" / "1.root.json"
    root.unlink() if content is None else root.write_bytes(content)
    refused("AG-ROS-016", Keeper, tmp_path / "keeper")


def test_another_document_in_place_of_a_later_root_is_refused(world, tmp_path):
    world.keeper.renew_root(NOW)
    for content in (b"{}", world.published.files["1.targets.json"]):
        (tmp_path / "keeper" / "metadata" / "2.root.json").write_bytes(content)
        refused("AG-ROS-008", world.keeper.renew_root, NOW)


def test_a_missing_coordinator_record_is_named(world, tmp_path):
    (tmp_path / "keeper" / "coordinator.json").unlink()
    refused("AG-ROS-016", lambda: world.keeper.coordinator)
    refused("AG-ROS-016", world.keeper.publish, NOW)


def test_what_is_published_is_a_directory_that_clients_read(world, tmp_path):
    write_published(world.published, tmp_path / "out")
    roster = RosterClient(tmp_path / "out").current(NOW)
    assert roster.digest == world.published.digest
    invitation = Invitation.from_bytes((tmp_path / "out" / "invitation.json").read_bytes())
    assert invitation == world.published.invitation
    assert invitation.root_fingerprint == root_fingerprint(invitation.root_json)


# --- records and bundles ---


def test_records_round_trip(world):
    record = world.sites["a"].record
    assert SiteRecord.from_bytes(record.to_bytes()) == record
    assert CoordinatorRecord.from_bytes(world.hub.record.to_bytes()) == world.hub.record


def test_bundles_round_trip(world):
    files = world.published.files
    assert bundle.unpack(bundle.pack(files)) == files


def test_a_digest_follows_every_metadata_file(world):
    files = dict(world.published.files)
    digests = {bundle.digest(files)}
    for name in ("1.root.json", "timestamp.json", "1.snapshot.json", "1.targets.json"):
        digests.add(bundle.digest({**files, name: files[name] + b" "}))
    assert len(digests) == 5


def test_a_second_signing_key_is_accepted_in_a_record(world):
    record = world.sites["a"].record
    both = replace(record, signing_keys=(*record.signing_keys, SigningKey.generate().public))
    assert len(SiteRecord.from_bytes(both.to_bytes()).signing_keys) == 2
    doubled = replace(record, signing_keys=record.signing_keys * 2)
    refused("AG-ROS-001", SiteRecord.from_bytes, doubled.to_bytes())
