# SPDX-License-Identifier: Apache-2.0
"""When the coordinator was last heard: remembered for people, and told once when it stays away."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from allograft.crypto import canonical
from allograft_client.store import Store

#: A coordinator polls every few seconds; only a part on a slow line takes longer than a minute.
SILENT_AFTER = timedelta(minutes=2)

_SETTING = "coordinator-heard"
_REMEMBER_EVERY = timedelta(seconds=15)  # each time costs a synced write


class Contact:
    """Remembers calls; safe to call for every one of them.

    Args:
        store: The site's database.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._remembered: datetime | None = None

    def hear(self, now: datetime) -> None:
        """Remember that a verified call arrived.

        Raises:
            UnavailableError: AG-STO-001 if it cannot be written.
        """
        # The clock may have been set back.
        if self._remembered is None or abs(now - self._remembered) >= _REMEMBER_EVERY:
            self._store.set_setting(_SETTING, canonical.format_time(now))
            self._remembered = now


class Watch:
    """Tells the log once when the coordinator falls silent, and once when it is back.

    Args:
        store: The site's database.
        log: Where to tell.
        started: When the daemon started; silence before that is not the coordinator's.
    """

    def __init__(self, store: Store, log: Any, started: datetime) -> None:
        self._store = store
        self._log = log
        self._started = started
        self._was_silent = False

    def look(self, now: datetime) -> None:
        """Compare with the last time."""
        since = max(last_heard(self._store) or self._started, self._started)
        silent = is_silent(since, now)
        if silent and not self._was_silent:
            cause = f"not heard since {canonical.format_time(since)}"
            self._log.warning("coordinator-silent", code="AG-SIT-015", cause=cause)
        elif self._was_silent and not silent:
            self._log.info("coordinator-heard")
        self._was_silent = silent


def last_heard(store: Store) -> datetime | None:
    """The last verified call of the coordinator, to about a quarter of a minute."""
    text = store.setting(_SETTING)
    return canonical.parse_time(text) if text else None


def is_silent(heard: datetime | None, now: datetime) -> bool:
    """Whether a coordinator that was last heard then is away."""
    return heard is None or now - heard >= SILENT_AFTER
