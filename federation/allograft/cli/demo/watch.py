# SPDX-License-Identifier: Apache-2.0
"""Waiting for what sites and coordinator do, as long as something moves."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from allograft.cli.demo.consortium import Consortium, SiteHome
from allograft.cli.demo.processes import Reporter
from allograft.errors import RejectedError, UnavailableError

T = TypeVar("T")

_STILL_S = 180.0
_GLANCE_S = 0.3


def await_state(
    consortium: Consortium,
    site: SiteHome,
    packet_id: str,
    states: set[str],
    note: Callable[[str], None],
) -> Mapping[str, Any]:
    """Wait until a packet is in one of some states at a site.

    Raises:
        RejectedError: AG-DEM-001 if it fails or is refused, unless that is waited for.
        UnavailableError: As `await_that`.
    """
    with site.following(packet_id) as reporter:

        def look() -> tuple[str, bool]:
            seen = _read_glimpse(site, reporter)
            if not seen:
                return f"{site.name}: on its way", False
            if seen["state"] in states:
                return str(seen["state"]), True
            if seen["state"] in {"failed", "refused"}:
                cause = f"{site.name}: {seen['state']}, {seen['code']} {seen['reason']}"
                raise RejectedError("AG-DEM-001", cause)
            return f"{site.name}: {seen['progress'] or seen['state']}", False

        await_that(consortium, look, note, _GLANCE_S)
    return site.packet(packet_id)


def await_receipts(
    consortium: Consortium,
    donor: SiteHome,
    packet_id: str,
    sites: set[str],
    note: Callable[[str], None],
) -> Mapping[str, Any]:
    """Wait until the donor has the receipts of some sites."""
    with donor.following(packet_id) as reporter:

        def look() -> tuple[str, bool]:
            seen = _read_glimpse(donor, reporter)
            missing = sites - {str(receipt["site"]) for receipt in seen.get("receipts", ())}
            words = f"{donor.name}: waits for receipts of {', '.join(sorted(missing))}"
            return words, not missing

        await_that(consortium, look, note, _GLANCE_S)
    return donor.packet(packet_id)


def _read_glimpse(site: SiteHome, reporter: Reporter) -> Mapping[str, Any]:
    """What `packet follow` said last; empty before the packet is there.

    Raises:
        RejectedError: AG-DEM-001 if the command failed.
    """
    seen: Mapping[str, Any] = reporter.last()
    if "error" in seen:
        cause = f"packet follow at {site.name}: {seen['error']['code']}: {seen['error']['cause']}"
        raise RejectedError("AG-DEM-001", cause)
    return seen


def await_that(
    consortium: Consortium,
    look: Callable[[], tuple[str, T | None]],
    note: Callable[[str], None],
    pause_s: float,
) -> T:
    """Call `look` until it finds something, while every daemon is alive and things move.

    There is no limit on the whole: a slow machine is not a failure. What fails is standing still.

    Raises:
        UnavailableError: AG-DEM-002 if nothing changed for `_STILL_S`, AG-DEM-003 if a daemon died.
    """
    last, since_s = "", time.monotonic()
    while time.monotonic() - since_s < _STILL_S:
        consortium.daemons.check()
        words, found = look()
        if found:
            return found
        if words != last:
            last, since_s = words, time.monotonic()
            note(words)
        time.sleep(pause_s)
    raise UnavailableError("AG-DEM-002", f"nothing moved for {_STILL_S:.0f} s; last: {last}")
