# SPDX-License-Identifier: Apache-2.0
"""The coordinator's face of the roster: applies, renews, publishes and logs it.

The roster is made and signed elsewhere, offline. Here is the one online key, which may say that it
is still the newest. Whoever the roster of this moment does not name is not called and not heard:
unknown, revoked and expired sites alike. See protos/spec/roster.md.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from allograft.crypto.keys import SigningKey, VerifyKey, node_key_pem
from allograft.crypto.notekey import NoteKey
from allograft.durable import durable_write
from allograft.errors import RejectedError, UnavailableError
from allograft.log.event import Event, sign_event
from allograft.roster import bundle
from allograft.roster.client import RosterClient
from allograft.roster.invitation import Invitation
from allograft.roster.records import Roster
from allograft.roster.timestamp import is_due, renew_timestamp
from allograft_server.post import Post
from allograft_server.settings import State
from allograft_server.store import QueuedEntry, Store

_ROSTER = "roster.json"
#: An imported roster that the daemon has not applied yet.
INCOMING = "incoming.json"
_LEAP = 10_000  # versions; two each day for years


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of a coordinator that the roster must name."""

    signing: SigningKey
    timestamp: NoteKey


class RosterFront:
    """The roster in force.

    Args:
        state: The state directory; `roster/` belongs to this object.
        me: The coordinator's id.
        keys: Our keys.
        store: The database: what sites have, what was logged.
        post: Sends the roster to sites.
        utc_now: The clock.
    """

    def __init__(
        self,
        state: State,
        me: str,
        keys: Keys,
        store: Store,
        post: Post,
        utc_now: Callable[[], datetime],
    ) -> None:
        self._directory = state.roster
        self._client = RosterClient(state.roster)
        self._me = me
        self._keys = keys
        self._store = store
        self._post = post
        self._utc_now = utc_now
        self._node_keys: dict[str, str] = {}
        self._nodes: dict[str, str] = {}
        self._nodes_of = ""  # digest of the roster that the map was made from

    # --- what others ask ---

    def current(self) -> Roster:
        """The roster in force.

        Raises:
            RejectedError: AG-ROS-009 if there is none, AG-ROS-007 if it expired.
        """
        return self._client.current(self._utc_now())

    def site_of_node(self, public_key: bytes) -> str | None:
        """The enrolled site that owns a node key, or nothing."""
        try:
            roster = self.current()
            site = self._node_map(roster).get(public_key.decode("ascii", "replace"))
            return None if site is None else roster.site(site, self._utc_now()).site_id
        except RejectedError:
            return None

    def site_keys(self, site: str, now: datetime) -> tuple[VerifyKey, ...]:
        """The signing keys of a site.

        Raises:
            RejectedError: AG-ROS-* if it is not enrolled now.
        """
        return self.current().site(site, now).signing_keys

    def node_keys(self) -> dict[str, str]:
        """Site → node key, for the SuperLink.

        Also of an expired roster, whose sites are not called (`site_of_node`): the SuperLink takes
        no key back that was once taken out, so only a newer roster may take one out.
        """
        with contextlib.suppress(RejectedError):
            sites = self._client.latest().sites.items()
            self._node_keys = {name: record.node_key for name, record in sites}
        return dict(self._node_keys)

    def _node_map(self, roster: Roster) -> dict[str, str]:
        if self._nodes_of != roster.digest:
            sites = roster.sites.items()
            self._nodes = {node_key_pem(record.node_key): name for name, record in sites}
            self._nodes_of = roster.digest
        return self._nodes

    # --- what the daemon does now and then ---

    def tick(self) -> None:
        """Apply an imported roster, renew the timestamp, tell the sites, log changes.

        Raises:
            RejectedError: AG-ROS-* if there is no roster that can be trusted.
        """
        self._apply_incoming()
        files = self._client.files()
        if is_due(files, self._utc_now()):
            self._client.refresh(self._renew(files), self._utc_now())
        roster = self.current()
        self._log(roster)
        self._publish(roster)

    def _apply_incoming(self) -> None:
        path = self._directory / INCOMING
        try:
            files = bundle.unpack(path.read_bytes())
        except FileNotFoundError:
            return
        try:
            self._client.refresh(self._renew(files), self._utc_now())
        finally:
            # Applied or refused: either way it is never tried again, and the old one stays.
            path.unlink()

    def _renew(self, files: bundle.Files) -> dict[str, bytes]:
        version = 0
        with contextlib.suppress(RejectedError):  # the first roster of all
            version = self._client.latest().version
        # Sites may have newer ones than a coordinator that was restored from a backup. One that
        # lies must not be able to use all version numbers up.
        seen = [site.roster_version for site in self._store.sites().values()]
        above = max([version, *(other for other in seen if other < version + _LEAP)])
        now = self._utc_now().replace(microsecond=0)
        return renew_timestamp(files, self._keys.timestamp, now, above=above)

    def _log(self, roster: Roster) -> None:
        subject = f"roster {roster.digest}"
        if self._store.has_entry(subject):
            return
        event = Event(
            event="roster",
            actor=self._me,
            packet_id="",
            dispatch_id="",
            outcome="",
            time=self._utc_now(),
            document_name=_ROSTER,
            document_sha256=roster.digest,
        )
        entry = sign_event(event, self._keys.signing)
        files = bundle.pack(self._client.files())
        self._store.queue_entry(QueuedEntry(entry, roster.digest, files), subject)

    def _publish(self, roster: Roster) -> None:
        """Queue the roster for every site that is known to have an older one, once."""
        subject = f"roster {roster.digest}"
        reported = self._store.sites()
        informed = {row.site for row in self._store.items_of(subject, "roster")}
        content = b""
        for name in roster.sites:
            known = reported[name].roster_version if name in reported else 0
            if known >= roster.version or name in informed:
                continue
            content = content or bundle.pack(self._client.files())
            for row in self._store.items(name, "waiting"):
                if row.item.kind == "roster":
                    self._store.move_item(row.item_id, ("waiting",), "void")
            self._post.send("roster", name, subject, {_ROSTER: content})


def check_ours(roster: Roster, me: str, keys: Keys) -> None:
    """Refuse a roster that names another coordinator or other keys.

    Raises:
        RejectedError: AG-CRD-002.
    """
    record = roster.coordinator
    if record.coordinator_id != me:
        raise RejectedError("AG-CRD-002", f"the roster is that of {record.coordinator_id}")
    if keys.signing.public.key_id not in {key.key_id for key in record.signing_keys}:
        raise RejectedError("AG-CRD-002", "the roster names another signing key")


def import_roster(
    state: State, published: Path, me: str, keys: Keys, now: datetime
) -> tuple[Roster, str]:
    """Verify a published roster and leave it for the daemon, which applies it.

    Args:
        state: The coordinator's state directory.
        published: What `allograft roster publish` wrote.
        me: The coordinator's id.
        keys: The coordinator's keys.
        now: The current time (UTC).

    Returns:
        The roster, and the fingerprint of its root for people to compare.

    Raises:
        RejectedError: AG-ROS-* or AG-CRD-002.
        UnavailableError: AG-STO-003 if there is no invitation in the directory.
    """
    try:
        content = (published / "invitation.json").read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UnavailableError("AG-STO-003", "there is no invitation.json there") from error
    invitation = Invitation.from_bytes(content)
    files = renew_timestamp(invitation.files, keys.timestamp, now)
    with tempfile.TemporaryDirectory() as scratch:
        # Apart from the daemon's own memory, which may be in use at this moment.
        client = RosterClient(Path(scratch))
        fingerprint = client.trust(invitation.root_json)
        roster = client.refresh(files, now)
    check_ours(roster, me, keys)
    RosterClient(state.roster).trust(invitation.root_json)
    durable_write(state.roster / INCOMING, bundle.pack(invitation.files))
    return roster, fingerprint
