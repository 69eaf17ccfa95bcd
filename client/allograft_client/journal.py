# SPDX-License-Identifier: Apache-2.0
"""JSON lines for the daemon's log.

Invariant: only fields of an allow-list are written, so neither payload nor key nor training text
can end up in a log by accident, whatever an event was called with.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, TextIO

import structlog

#: Everything a log line may say.
FIELDS = frozenset(
    {
        "app_sha256", "attempt", "bytes", "cause", "code", "dispatch", "event", "item", "job",
        "kind", "level", "model", "name", "network", "packet", "pid", "port", "reason", "seconds",
        "site", "state", "status", "time", "version",
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


def silence_journal() -> None:
    """Write no log lines: a command tells its person what happened, and scripts read its output."""
    structlog.configure(
        processors=[_drop],
        logger_factory=structlog.ReturnLoggerFactory(),
        cache_logger_on_first_use=False,
    )


def _drop(_logger: object, _method: str, _event: MutableMapping[str, Any]) -> str:
    raise structlog.DropEvent
