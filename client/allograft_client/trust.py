# SPDX-License-Identifier: Apache-2.0
"""Whom this site believes: the roster, the log, and its own memory as a witness.

Invariant: every key that a document or frame is verified with comes from a roster that was checked
up to the root this site was told to trust when it joined.
"""

from __future__ import annotations

import threading
from datetime import UTC, datetime

from allograft.crypto import keystore
from allograft.errors import RejectedError
from allograft.log.event import Event, verify_event
from allograft.log.proof import verify_proof
from allograft.log.witness import WitnessState
from allograft.roster import bundle
from allograft.roster.client import RosterClient
from allograft.roster.records import CoordinatorRecord, Roster
from allograft_client.settings import Home


class Trust:
    """The site's view of the consortium.

    Args:
        home: The state directory.
        site: Our name.
    """

    def __init__(self, home: Home, site: str) -> None:
        self._site = site
        self._client = RosterClient(home.path("roster"))
        # TUF keeps files; two threads must not refresh and read them at once.
        self._lock = threading.Lock()
        # The roster may name another coordinator later; this daemon serves the one it began with.
        self._coordinator = self.latest_roster().coordinator
        self._home = home

    @classmethod
    def open(cls, home: Home, site: str) -> Trust:
        """Open what `join` left.

        Raises:
            RejectedError: AG-SIT-008 if the site has not joined, AG-ROS-* if the roster is damaged.
        """
        if not home.invitation_file.exists():
            raise RejectedError("AG-SIT-008", f"{home.root} holds no invitation")
        return cls(home, site)

    @property
    def coordinator(self) -> str:
        """The coordinator's name."""
        return self._coordinator.coordinator_id

    @property
    def coordinator_record(self) -> CoordinatorRecord:
        """The coordinator as the roster describes it."""
        return self._coordinator

    @property
    def superlink_address(self) -> str:
        """HOST:PORT that the SuperNode dials."""
        return self._coordinator.address

    @property
    def authority_pem(self) -> bytes:
        """The consortium's own CA, in PEM."""
        return self._coordinator.tls_ca_pem.encode("ascii")

    def roster(self) -> Roster:
        """The roster, if it is still fresh.

        Raises:
            RejectedError: AG-ROS-007 if it expired: nothing is sealed or opened then.
        """
        roster = self.latest_roster()
        roster.check_fresh(datetime.now(UTC))
        return roster

    def latest_roster(self) -> Roster:
        """The newest verified roster, expired or not.

        Only for relay frames, which must bring a fresh roster to a site whose own one expired.
        """
        with self._lock:
            return self._client.latest()

    def take_roster(self, content: bytes) -> Roster:
        """Verify a roster that arrived, and trust it from now on.

        Raises:
            RejectedError: AG-ROS-* if it is older, expired, incomplete or not signed.
        """
        with self._lock:
            return self._client.refresh(bundle.unpack(content), datetime.now(UTC))

    def verify_logged(self, entry: bytes, proof: bytes, now: datetime) -> Event:
        """The event of an entry that the log holds and enough witnesses saw.

        Raises:
            RejectedError: AG-LOG-* for entry or proof, AG-SIG-* or AG-ROS-* for its author.
        """
        roster = self.roster()
        logged = verify_proof(proof, entry, roster.witness_policy())
        return verify_event(logged.entry, roster, now)

    def witness(self) -> Witness:
        """This site as a witness of the log.

        Raises:
            RejectedError: AG-KEY-* if its key is exposed or damaged.
        """
        key = keystore.read_note_key(self._home.path("keys", "witness.key"))
        return Witness(self, WitnessState(self._home.path("witness.json"), key, self._site))


class Witness:
    """Cosigns checkpoints of the log that the roster names."""

    def __init__(self, trust: Trust, state: WitnessState) -> None:
        self._trust = trust
        self._state = state

    @property
    def size(self) -> int:
        """Tree size of the last checkpoint that was cosigned.

        Raises:
            RejectedError: AG-LOG-012 if the memory is damaged.
        """
        return self._state.size

    def cosign(self, checkpoint: str, consistency: tuple[bytes, ...], now: datetime) -> str:
        """The signature line for a checkpoint that extends what was seen before.

        Raises:
            RejectedError: AG-LOG-* if it does not.
            UnavailableError: AG-STO-001 if it cannot be remembered.
        """
        log_vkey = self._trust.latest_roster().coordinator.log_vkey
        return self._state.cosign(checkpoint, consistency, log_vkey, now)
