# SPDX-License-Identifier: Apache-2.0
"""A consortium on paper: real keys, a real roster and a real witnessed log, without processes.

Everything is public and replaceable, so a test breaks one rule in one line.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from allograft.crypto import dsse, vkey
from allograft.crypto.keys import NodeKey, SealingKey, SigningKey
from allograft.crypto.notekey import NoteKey
from allograft.crypto.vkey import make_vkey
from allograft.log.event import Event, sign_event
from allograft.log.export import export_log
from allograft.log.store import LogStore
from allograft.log.witness import WitnessState
from allograft.provenance.intoto import Statement, Subject
from allograft.roster import bundle
from allograft.roster.client import verify_bundle
from allograft.roster.enrolment import CoordinatorKeys, SiteKeys
from allograft.roster.keeper import Keeper
from allograft.roster.records import (
    DEFAULT_ROLES,
    CoordinatorRecord,
    Roster,
    SiteRecord,
    WitnessPolicy,
    log_origin,
)
from allograft.roster.timestamp import renew_timestamp

NOW = datetime(2026, 11, 23, 8, 0, 0, tzinfo=UTC)
HUB = "hub"
PACKET = "a" * 32


class Party:
    """A site with all its keys."""

    def __init__(self, name: str, now: datetime = NOW) -> None:
        self.name = name
        self.signing = SigningKey.generate()
        self.sealing = SealingKey.generate()
        self.witness = NoteKey.generate()
        self.node = NodeKey.generate()
        self.record = SiteRecord(
            site_id=name,
            signing_keys=(self.signing.public,),
            sealing_key=self.sealing.public,
            witness_vkey=make_vkey(name, vkey.WITNESS, self.witness.public),
            node_key=self.node.public_openssh,
            roles=DEFAULT_ROLES,
            not_before=now - timedelta(days=1),
            not_after=now + timedelta(days=300),
        )

    @property
    def keys(self) -> SiteKeys:
        return SiteKeys(self.signing, self.witness, self.node)


class Hub:
    """A coordinator with all its keys."""

    def __init__(self, name: str = HUB) -> None:
        self.signing = SigningKey.generate()
        self.log = NoteKey.generate()
        self.timestamp = NoteKey.generate()
        self.record = CoordinatorRecord(
            coordinator_id=name,
            signing_keys=(self.signing.public,),
            log_vkey=make_vkey(log_origin(name), vkey.LOG, self.log.public),
            timestamp_key=self.timestamp.public.raw,
            address="127.0.0.1:9092",
            tls_ca_pem="-----BEGIN CERTIFICATE-----\n",
        )

    @property
    def keys(self) -> CoordinatorKeys:
        return CoordinatorKeys(self.signing, self.log, self.timestamp)


@dataclass
class Logbook:
    """A roster of three sites, and a log that they witness."""

    root: Path
    now: datetime = NOW
    names: tuple[str, ...] = ("ward-a", "ward-b", "ward-c")
    files: dict[str, bytes] = field(default_factory=dict)
    version: int = 0

    def __post_init__(self) -> None:
        self.hub = Hub()
        self.sites = {name: Party(name, self.now) for name in self.names}
        self.keeper = Keeper.create(self.root / "keeper", self.hub.record, self.now)
        for site in self.sites.values():
            self.keeper.enrol(site.record)
        self.log = LogStore(self.root / "log.db", log_origin(HUB), self.hub.log)
        self.witnesses = {
            name: WitnessState(self.root / f"{name}.witness", site.witness, name)
            for name, site in self.sites.items()
        }
        self.publish()

    # --- roster ---

    def publish(self) -> None:
        """Publish the keeper's roster, renew its timestamp, and log it."""
        published = self.keeper.publish(self.now).files
        self.files = renew_timestamp(published, self.hub.timestamp, self.now, self.version)
        self.roster = verify_bundle(self.files["1.root.json"], self.files, self.now)
        self.version = self.roster.version
        self.log_roster()

    def log_roster(self) -> int:
        digest = bundle.digest(self.files)
        event = self.event("roster", HUB, packet_id="", document_sha256=digest)
        entry = sign_event(event, self.hub.signing)
        return self.log.append_roster(entry, digest, bundle.pack(self.files))

    @property
    def policy(self) -> WitnessPolicy:
        return self.roster.witness_policy()

    # --- entries ---

    def event(self, kind: str, actor: str, **changes: object) -> Event:
        plain = Event(
            event=kind,  # type: ignore[arg-type]
            actor=actor,
            packet_id=PACKET,
            dispatch_id="",
            outcome="",
            time=self.now,
            document_name=f"{kind}.json",
            document_sha256=secrets.token_hex(32),
        )
        return replace(plain, **changes)  # type: ignore[arg-type]

    def entry(self, kind: str, signer: str, **changes: object) -> bytes:
        """An entry that the signer makes, in its own name unless `actor` says otherwise."""
        key = self.hub.signing if signer == HUB else self.sites[signer].signing
        event = self.event(kind, signer)
        return sign_event(replace(event, **changes), key)  # type: ignore[arg-type]

    def add(self, kind: str, actor: str, **changes: object) -> int:
        """Sign and append an event; `document` is kept with it."""
        document = changes.pop("document", b"")
        assert isinstance(document, bytes)
        if document:
            changes["document_sha256"] = hashlib.sha256(document).hexdigest()
        entry = self.entry(kind, actor, **changes)
        return self.log.append([entry], [document] if document else [])[0]

    def dispatch_document(self, donor: str, *audience: str) -> bytes:
        """A dispatch as far as auditors read it."""
        predicate = {"audience": list(audience), "donor": donor}
        statement = Statement((Subject("header.json", "0" * 64),), "urn:x", predicate)
        signing = self.sites[donor].signing
        return dsse.sign(statement.to_bytes(), dsse.IN_TOTO, [signing]).to_bytes()

    def tell_story(self) -> None:
        """Offer, route, dispatch to ward-b and ward-c, a receipt of each."""
        self.add("offer", "ward-a", document=b"{}")
        self.add("route", HUB)
        document = self.dispatch_document("ward-a", "ward-b", "ward-c")
        self.add("dispatch", "ward-a", dispatch_id="d" * 32, document=document)
        self.add("receipt", "ward-b", dispatch_id="d" * 32, outcome="kept")
        self.add("receipt", "ward-c", dispatch_id="d" * 32, outcome="refused")

    # --- witnesses ---

    def witness(self, *names: str) -> None:
        """Let these sites (or all) cosign what the log offers them."""
        for name in names or self.names:
            state = self.witnesses[name]
            note, consistency = self.log.offer(state.vkey, state.size, self.policy)
            if note:
                line = state.cosign(note, consistency, self.log.vkey, self.now)
                self.log.collect(line, state.vkey)

    def export(self, name: str = "export") -> Path:
        """Witness everything and write it out."""
        self.witness()
        self.witness()
        folder = self.root / name
        export_log(self.log, folder)
        return folder


def other_roster(roster: Roster, **changes: object) -> Roster:
    """The roster with fields replaced."""
    return replace(roster, **changes)  # type: ignore[arg-type]
