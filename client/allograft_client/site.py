# SPDX-License-Identifier: Apache-2.0
"""Everything a job needs of one site, opened together.

Invariant: keys are read here, checked, and held in memory by the daemon and the short-lived
commands alone; no Flower process and no worker is given one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from allograft.crypto import keystore
from allograft.crypto.keys import SealingKey, SigningKey
from allograft.log.event import Event, EventName, sign_event
from allograft.privacy.identifiers import IdentifierMatcher
from allograft.privacy.policy import Policy, read_policy
from allograft.privacy.scan import Matcher, check_envelope
from allograft.privacy.signed_policy import check_signed
from allograft.provenance.ancestry import Ancestor, read_ancestors
from allograft.provenance.statement import BaseModel, read_base
from allograft_client.identifiers import open_list
from allograft_client.inbox import Inbox
from allograft_client.outbox import Outbox
from allograft_client.policy_desk import read_signature
from allograft_client.rows import ModelRow
from allograft_client.runner import Runner
from allograft_client.settings import Home, Settings
from allograft_client.store import Store
from allograft_client.trust import Trust

#: Events about documents that consist of ids, digests, names of parties, codes and numbers.
_WITHOUT_TEXT = frozenset({"receipt", "withdrawal"})


@dataclass(frozen=True, slots=True)
class Site:
    """One site's state, keys and rules."""

    home: Home
    settings: Settings
    store: Store
    key: SigningKey
    trust: Trust
    outbox: Outbox
    inbox: Inbox
    runner: Runner

    @property
    def name(self) -> str:
        """The site's name."""
        return self.settings.site

    def now(self) -> datetime:
        """The current time in whole seconds, as documents carry it."""
        return datetime.now(UTC).replace(microsecond=0)

    def policy(self) -> Policy:
        """The policy as it stands in its file now.

        Raises:
            RejectedError: AG-PRV-001 if there is none: nothing leaves and nothing attaches.
        """
        return read_policy(self.home.policy_file)

    @property
    def identifier_list(self) -> IdentifierMatcher | None:
        """The site's own list of identifiers; None if its operator named none.

        Raises:
            RejectedError: AG-PRV-070 or -071 if it cannot be used.
            UnavailableError: AG-STO-005 if it is not there. Nothing is scanned, so nothing leaves.
        """
        path = self.home.identifier_list(self.settings)
        if path is None:
            return None
        roster = self.trust.latest_roster()
        names = {self.name, self.trust.coordinator, *roster.sites, *roster.revoked}
        return open_list(path).excusing(names | {f"urn:allograft:site:{self.name}"})

    @property
    def matchers(self) -> tuple[Matcher, ...]:
        """What every text that leaves is compared with, beyond patterns; raises as the list."""
        listed = self.identifier_list
        return () if listed is None else (listed,)

    def check_signed_policy(self, mode: str, policy: Policy) -> None:
        """Refuse a mode whose policy is not the one that was signed.

        Raises:
            RejectedError: AG-PRV-006 to -008; never for mode `open`.
        """
        check_signed(mode, policy, read_signature(self.home), (self.key.public,))

    def sealing_key(self) -> SealingKey:
        """The key that opens what is sealed for us; read when needed."""
        return keystore.read_sealing_key(self.home.path("keys", "sealing.key"))

    def packet_path(self, packet_id: str, *names: str) -> Path:
        """A path in a packet's private directory."""
        return self.home.path("packets", packet_id, *names)

    def logged(
        self, name: EventName, stem: str, document: bytes, about: Mapping[str, str]
    ) -> dict[str, bytes]:
        """A document and the log event that announces it, as the files of an item.

        Args:
            name: What happened.
            stem: The document's file name without `.json`.
            document: The document's envelope.
            about: `packet_id`, and where they apply `dispatch_id` and `outcome`.

        Raises:
            RejectedError: AG-PRV-021 if a string of the document looks like an identifier: what is
                logged can never be taken back. As `matchers` for the identifier list.
            UnavailableError: As `matchers`.
        """
        # Receipts and withdrawals have no field for text, and a list that is missing must neither
        # keep a recalled packet attached nor stop a donor from taking one back.
        check_envelope(document, stem, () if name in _WITHOUT_TEXT else self.matchers)
        event = Event(
            event=name,
            actor=self.name,
            packet_id=about["packet_id"],
            dispatch_id=about.get("dispatch_id", ""),
            outcome=about.get("outcome", ""),
            time=self.now(),
            document_name=f"{stem}.json",
            document_sha256=hashlib.sha256(document).hexdigest(),
        )
        return {f"{stem}.json": document, f"{stem}.event.json": sign_event(event, self.key)}


def model_base(model: ModelRow) -> BaseModel:
    """What was measured of a model when it was added."""
    return read_base(model.facts["base"])


def model_paths(site: Site) -> dict[str, str]:
    """The site's models by weights digest, for packets that name one of them."""
    return {model_base(model).weights_digest: str(model.path) for model in site.store.models()}


def model_ancestors(model: ModelRow) -> tuple[Ancestor, ...]:
    """The packets inside a model's own weights, as its record said when it was added."""
    return read_ancestors(model.facts.get("parents", []))


def open_site(home: Home, store: Store | None = None) -> Site:
    """Open a site that has joined.

    Raises:
        UnavailableError: AG-STO-003 if `init` has not run, AG-STO-001 for the database.
        RejectedError: AG-SIT-001 settings, AG-SIT-008 not joined, AG-KEY-* keys, AG-ROS-* roster.
    """
    settings = home.settings()
    store = store or Store(home.database)
    trust = Trust.open(home, settings.site)
    return Site(
        home=home,
        settings=settings,
        store=store,
        key=keystore.read_signing_key(home.path("keys", "signing.pem")),
        trust=trust,
        outbox=Outbox(home.path("outbox"), store, settings.site, trust.coordinator),
        inbox=Inbox(home.path("inbox"), store, settings.site, settings.reserve_bytes),
        runner=Runner(home.path("run", "jobs")),
    )
