# SPDX-License-Identifier: Apache-2.0
"""JSON lines for the daemon's log.

Invariant: only fields of an allow-list are written. The coordinator sees no payload, but names of
people may stand in what strangers send, and whatever they send must not end up in a log.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, TextIO

import structlog

#: Everything a log line may say.
FIELDS = frozenset(
    {
        "cause", "child", "code", "count", "dispatch", "event", "exit", "item", "kind", "level",
        "packet", "pid", "port", "restart_in_s", "run", "site", "size", "state", "step", "time",
        "version",
    }
)  # fmt: skip


def _keep_known_fields(
    _logger: object, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    return {name: value for name, value in event.items() if name in FIELDS}


def configure_journal(stream: TextIO) -> None:
    """Write log lines as JSON to a stream."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
            _keep_known_fields,
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(stream),
        cache_logger_on_first_use=False,
    )
