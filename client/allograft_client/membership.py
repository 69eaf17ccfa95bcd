# SPDX-License-Identifier: Apache-2.0
"""How a site comes to be: its keys and its request (`init`), then its place in a roster (`join`).

Invariant: private keys are made in the state directory and never written anywhere else; a roster
is believed only after a person compared the fingerprint of its root.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory

from allograft.crypto import keystore, vkey
from allograft.crypto.keys import NodeKey, SealingKey, SigningKey
from allograft.crypto.notekey import NoteKey
from allograft.durable import durable_write, storage_errors
from allograft.errors import RejectedError, UnavailableError
from allograft.limits import LIMITS
from allograft.plainfile import read_plain
from allograft.privacy.scan import check_strings
from allograft.roster.client import RosterClient
from allograft.roster.enrolment import SiteKeys, fingerprint, request_site
from allograft.roster.invitation import Invitation
from allograft.roster.records import DEFAULT_ROLES, Roster, SiteRecord
from allograft_client.settings import Home, check_site_name
from allograft_client.store import Store

#: Private key file → what makes a fresh one.
_WRITERS: Mapping[str, Callable[[Path], None]] = {
    "signing.pem": lambda path: keystore.write_signing_key(path, SigningKey.generate()),
    "witness.key": lambda path: keystore.write_note_key(path, NoteKey.generate()),
    "node": lambda path: keystore.write_node_key(path, NodeKey.generate()),
    "sealing.key": lambda path: keystore.write_sealing_key(path, SealingKey.generate()),
}


@dataclass(frozen=True, slots=True)
class NewSite:
    """What `init` made."""

    site: str
    state: Path
    request: Path
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Membership:
    """What `join` found."""

    site: str
    coordinator: str
    address: str
    roster_version: int
    root_fingerprint: str
    sites: tuple[str, ...]


def create_site(home: Home, site: str, valid_days: int) -> NewSite:
    """Make keys, settings and an enrolment request; goes on where an interrupted call stopped.

    Raises:
        RejectedError: AG-SIT-001 or AG-PRV-021 for the name, AG-SIT-013 if there is a site already,
            AG-KEY-* if a key that an interrupted call left is exposed or malformed.
        UnavailableError: AG-STO-001 if the disk is full.
    """
    check_site_name(site)
    # The name stands in every document from now on, so it is asked once, here.
    check_strings(site, "the site's name")
    if home.settings_file.exists():
        raise RejectedError("AG-SIT-013", f"{home.root} holds site {home.settings().site}")
    home.make_directories()
    keys, sealing = _make_keys(home)
    now = datetime.now(UTC).replace(microsecond=0)
    record = SiteRecord(
        site_id=site,
        signing_keys=(keys.signing.public,),
        sealing_key=sealing.public,
        witness_vkey=vkey.VerifierKey(site, vkey.WITNESS, keys.witness.public).to_text(),
        node_key=keys.node.public_openssh,
        roles=DEFAULT_ROLES,
        not_before=now,
        not_after=now + timedelta(days=valid_days),
    )
    request = request_site(record, keys)
    request_file = home.path(f"{site}.enrol.json")
    durable_write(request_file, request, mode=0o644)
    example = resources.files("allograft_client").joinpath("data/policy.toml").read_bytes()
    # The example only: a site decides its policy, and until then nothing leaves or attaches.
    durable_write(home.path("policy.toml.example"), example, mode=0o644)
    Store.create(home.database).close()
    # Last: a site without settings is no site, so an interrupted init can be repeated.
    durable_write(home.settings_file, _settings_text(site))
    return NewSite(site, home.root, request_file, fingerprint(request))


def _make_keys(home: Home) -> tuple[SiteKeys, SealingKey]:
    """The site's keys; one that an interrupted call left is used, never replaced."""
    files = {name: home.path("keys", name) for name in _WRITERS}
    for name, write in _WRITERS.items():
        if not files[name].exists():
            write(files[name])
    keys = SiteKeys(
        keystore.read_signing_key(files["signing.pem"]),
        keystore.read_note_key(files["witness.key"]),
        keystore.read_node_key(files["node"]),
    )
    return keys, keystore.read_sealing_key(files["sealing.key"])


def read_invitation(path: Path) -> Invitation:
    """Read an invitation file; nothing in it is trusted yet.

    Raises:
        RejectedError: AG-ROS-014 or -008 if it is malformed, AG-IN-002 if it is too large.
        UnavailableError: AG-STO-005 if there is no such file.
    """
    if not path.is_file():
        raise UnavailableError("AG-STO-005", f"there is no file {path}")
    return Invitation.from_bytes(read_plain(path, 2 * LIMITS.roster_bundle_bytes))


def join_consortium(home: Home, invitation: Invitation, compared: str) -> Membership:
    """Trust an invitation's roster, once its root's fingerprint was compared.

    Args:
        home: An initialised state directory.
        invitation: As read.
        compared: The fingerprint that the roster's keeper told, with or without separators.

    Raises:
        RejectedError: AG-ROS-010 for another root, AG-ROS-* if the roster does not verify or does
            not list this site with its own keys.
    """
    site = home.settings().site
    told = "".join(character for character in compared.lower() if character not in "-: ")
    if told != invitation.root_fingerprint:
        raise RejectedError("AG-ROS-010", "the invitation's root has another fingerprint")
    now = datetime.now(UTC)
    _check_enrolled(home, _verify_roster(invitation, now), site, now)
    client = RosterClient(home.path("roster"))
    client.trust(invitation.root_json)
    roster = client.refresh(invitation.files, now)
    durable_write(home.invitation_file, invitation.to_bytes())
    return Membership(
        site=site,
        coordinator=roster.coordinator.coordinator_id,
        address=roster.coordinator.address,
        roster_version=roster.version,
        root_fingerprint=client.fingerprint,
        sites=tuple(sorted(roster.sites)),
    )


def _verify_roster(invitation: Invitation, now: datetime) -> Roster:
    """The roster of an invitation, without trusting it: a refused one must leave no root behind."""
    with storage_errors("a scratch copy of the roster"), TemporaryDirectory() as scratch:
        client = RosterClient(Path(scratch))
        client.trust(invitation.root_json)
        return client.refresh(invitation.files, now)


def _check_enrolled(home: Home, roster: Roster, site: str, now: datetime) -> None:
    record = roster.site(site, now)
    own = keystore.read_signing_key(home.path("keys", "signing.pem")).public
    if own.key_id not in {key.key_id for key in record.signing_keys}:
        raise RejectedError("AG-ROS-002", f"the roster lists {site} with other keys than ours")


def _settings_text(site: str) -> bytes:
    lines = [
        f"site = {json.dumps(site)}",
        "# Other users that may call the courier socket, if the SuperNode runs as one of them.",
        "courier_uids = []",
        "# Names and numbers of your people, text or CSV from the patient index: looked for in all",
        "# text that leaves. The file stays where it is; let only this user read it.",
        '# identifiers = "/srv/allograft/identifiers.csv"',
        "# Where models run: auto, cpu, cuda or cuda:N.",
        'device = "auto"',
        "",
    ]
    return "\n".join(lines).encode()
