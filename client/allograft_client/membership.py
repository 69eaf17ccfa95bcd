# SPDX-License-Identifier: Apache-2.0
"""How a site comes to be: its keys and its request (`init`), then its place in a roster (`join`).

Invariant: private keys are made in the state directory and never written anywhere else; a roster
is believed only after a person compared the fingerprint of its root.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib import resources
from pathlib import Path

from allograft.crypto import keystore, vkey
from allograft.crypto.keys import NodeKey, SealingKey, SigningKey
from allograft.crypto.notekey import NoteKey
from allograft.durable import durable_write
from allograft.errors import RejectedError
from allograft.limits import LIMITS
from allograft.packet.container import read_document
from allograft.roster.client import RosterClient
from allograft.roster.enrolment import SiteKeys, fingerprint, request_site
from allograft.roster.invitation import Invitation
from allograft.roster.records import DEFAULT_ROLES, Roster, SiteRecord
from allograft_client.settings import Home, check_site_name
from allograft_client.store import Store


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
    """Make keys, settings and an enrolment request.

    Raises:
        RejectedError: AG-SIT-001 for the name, AG-SIT-013 if there is a site already.
        UnavailableError: AG-STO-001 if the disk is full.
    """
    check_site_name(site)
    if home.settings_file.exists():
        raise RejectedError("AG-SIT-013", f"{home.root} holds site {home.settings().site}")
    home.make_directories()
    keys = SiteKeys(SigningKey.generate(), NoteKey.generate(), NodeKey.generate())
    sealing = SealingKey.generate()
    keystore.write_signing_key(home.path("keys", "signing.pem"), keys.signing)
    keystore.write_note_key(home.path("keys", "witness.key"), keys.witness)
    keystore.write_node_key(home.path("keys", "node"), keys.node)
    keystore.write_sealing_key(home.path("keys", "sealing.key"), sealing)
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
    # Last: a site without settings is no site, so an interrupted init can be cleared and repeated.
    durable_write(home.settings_file, _settings_text(site))
    return NewSite(site, home.root, request_file, fingerprint(request))


def read_invitation(path: Path) -> Invitation:
    """Read an invitation file; nothing in it is trusted yet.

    Raises:
        RejectedError: AG-PKT-002 if it is missing, AG-ROS-014 or -008 if malformed.
    """
    return Invitation.from_bytes(read_document(path, 2 * LIMITS.roster_bundle_bytes))


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
    client = RosterClient(home.path("roster"))
    client.trust(invitation.root_json)
    now = datetime.now(UTC)
    roster = client.refresh(invitation.files, now)
    _check_enrolled(home, roster, site, now)
    durable_write(home.invitation_file, invitation.to_bytes())
    return Membership(
        site=site,
        coordinator=roster.coordinator.coordinator_id,
        address=roster.coordinator.address,
        roster_version=roster.version,
        root_fingerprint=client.fingerprint,
        sites=tuple(sorted(roster.sites)),
    )


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
        "# Where models run: auto, cpu, cuda or cuda:N.",
        'device = "auto"',
        "",
    ]
    return "\n".join(lines).encode()
