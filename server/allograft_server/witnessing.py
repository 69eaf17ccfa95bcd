# SPDX-License-Identifier: Apache-2.0
"""From an event to a proof: entries go into the log, sites witness it, dispatches are released.

A dispatch leaves for its recipients only with a proof that enough witnesses saw it in the log, so
a coordinator cannot deliver what it hides. Every step may be repeated: the log keeps an entry's
place, and a release is one transaction of the store. See protos/spec/log.md.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog

from allograft.errors import AllograftError
from allograft.log.event import read_event
from allograft.log.store import LogStore
from allograft.roster.records import Roster
from allograft_server.post import Post
from allograft_server.store import QueuedEntry, Store


class Witnessing:
    """The log, as the rest of the coordinator sees it.

    Args:
        log: The log; this object is its one writer.
        store: Where entries are queued and dispatches wait.
        post: Sends what has a proof.
        roster: The roster in force; raises RejectedError if there is none.
    """

    def __init__(
        self, log: LogStore, store: Store, post: Post, roster: Callable[[], Roster]
    ) -> None:
        self._log = log
        self._store = store
        self._post = post
        self._roster = roster

    def tick(self) -> None:
        """Log what is queued and release what is witnessed.

        Raises:
            AllograftError: AG-ROS-* without a roster in force, AG-STO-001 on a full disk.
        """
        for number, queued in self._store.queued_entries():
            self._store.place_entry(number, self._append(queued))
        self._release()

    def _append(self, queued: QueuedEntry) -> int:
        if read_event(queued.entry).event == "roster":
            return self._log.append_roster(queued.entry, queued.document_sha256, queued.document)
        return self._log.append([queued.entry], [queued.document])[0]

    def _release(self) -> None:
        waiting = self._store.dispatches("logged")
        if not waiting:
            return
        policy = self._roster().witness_policy()
        for dispatch in waiting:
            place = self._store.place_of(dispatch.dispatch_id)
            proof = None if place is None else self._log.proof(place, policy)
            if proof is not None:
                self._post.release(dispatch, proof)
                structlog.get_logger("log").info("released", dispatch=dispatch.dispatch_id)

    def awaits_witnesses(self) -> bool:
        """Whether a dispatch is held back until sites have cosigned the log."""
        return bool(self._store.dispatches("logged"))

    def checkpoint_for(self, site: str, witnessed_size: int) -> tuple[str, tuple[bytes, ...]]:
        """The checkpoint that a site should cosign now, with its consistency proof, or nothing."""
        try:
            roster = self._roster()
            record = roster.sites.get(site)
            if record is None:
                return "", ()
            return self._log.offer(record.witness_vkey, witnessed_size, roster.witness_policy())
        except AllograftError as error:
            # Polls must go on without: they are what brings the missing roster, say.
            structlog.get_logger("log").warning("no-checkpoint", site=site, code=error.code)
            return "", ()

    def cosigned(self, site: str, cosignature: str) -> None:
        """Keep a site's cosignature.

        Raises:
            RejectedError: AG-LOG-006 if it fits no recent checkpoint, AG-ROS-* for the site.
        """
        record = self._roster().sites.get(site)
        if record is not None:
            size = self._log.collect(cosignature, record.witness_vkey)
            structlog.get_logger("log").info("cosigned", site=site, size=size)
