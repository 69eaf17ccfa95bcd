# SPDX-License-Identifier: Apache-2.0
"""Canonical JSON (RFC 8785) for what we create, and strict JSON for what we receive.

Received documents are never re-serialised to be verified: signatures cover the received bytes.
Reading refuses what two parsers could understand differently: duplicate names, NaN, infinities,
integers that a double cannot hold, deep nesting and lone surrogates. What a document can hold is
counted before it is parsed: parsed values take some twenty-five times their text.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, TypeAlias

import rfc8785

from allograft.errors import RejectedError
from allograft.limits import LIMITS

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

_TIME = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_RANDOM_ID = re.compile(r"[0-9a-f]{32}")
_SITE = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_SAFE_INTEGER = 2**53 - 1


def dumps(value: Any) -> bytes:
    """Serialise a JSON value to its RFC 8785 form.

    Raises:
        ValueError: The value cannot be written (a bug of the caller, not of a peer).
    """
    _check_written(value)
    content: bytes = rfc8785.dumps(value)
    return content


def _check_written(value: Any) -> None:
    """Refuse floats that RFC 8785 writes as integers too large for `loads`."""
    if isinstance(value, float) and _SAFE_INTEGER < abs(value) < 1e21:
        raise ValueError("a number between 2**53 and 1e21 would read as an unsafe integer")
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for entry in value:
            _check_written(entry)


def loads(content: bytes, max_bytes: int = LIMITS.json_document_bytes) -> Json:
    """Read one JSON document strictly.

    Raises:
        RejectedError: AG-IN-002 if larger than `max_bytes` or of too many values, AG-IN-001 if
            malformed.
    """
    if len(content) > max_bytes:
        raise RejectedError("AG-IN-002", f"document of {len(content)} bytes, limit {max_bytes}")
    # Marks inside strings count too; no document of ours comes near the limit with them.
    marks = sum(content.count(mark) for mark in (b",", b"[", b"{"))
    if marks > LIMITS.json_values:
        raise RejectedError("AG-IN-002", f"document of more than {LIMITS.json_values} values")
    try:
        text = content.decode("utf-8", errors="strict")
        value: Json = json.loads(
            text,
            object_pairs_hook=_refuse_duplicates,
            parse_constant=_refuse_constant,
            parse_int=_read_integer,
            parse_float=_read_float,
        )
    except RejectedError:
        raise
    except (ValueError, RecursionError) as error:
        raise RejectedError("AG-IN-001", f"not strict JSON: {type(error).__name__}") from error
    _check_depth(value, LIMITS.json_depth)
    return value


def _refuse_duplicates(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        raise RejectedError("AG-IN-001", "an object has the same name twice")
    return dict(pairs)


def _refuse_constant(name: str) -> Json:
    raise RejectedError("AG-IN-001", f"{name} is not JSON")


def _read_integer(digits: str) -> int:
    # Twenty characters hold every 64-bit integer; int() of a long run of digits is quadratic.
    if len(digits) > 20 or abs(int(digits)) > _SAFE_INTEGER:
        raise RejectedError("AG-IN-001", "an integer is beyond 2**53")
    return int(digits)


def _read_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise RejectedError("AG-IN-001", "a number is beyond a double")
    return value


def _check_depth(value: Json, left: int) -> None:
    if left == 0:
        raise RejectedError("AG-IN-001", "nested too deeply")
    if isinstance(value, str):
        _check_text(value)
    elif isinstance(value, list):
        for entry in value:
            _check_depth(entry, left - 1)
    elif isinstance(value, dict):
        for name, entry in value.items():
            _check_text(name)
            _check_depth(entry, left - 1)


def _check_text(value: str) -> None:
    # The first test costs nothing; the second takes seconds on the base64 of a large roster.
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise RejectedError("AG-IN-001", "a string holds a lone surrogate")


def as_object(value: Json, names: Iterable[str], optional: Iterable[str] = ()) -> dict[str, Json]:
    """The value as an object with exactly these names (and possibly the optional ones).

    Raises:
        RejectedError: AG-IN-003.
    """
    mapping = as_mapping(value)
    required = set(names)
    missing = required - mapping.keys()
    unknown = mapping.keys() - required - set(optional)
    if missing or unknown:
        named = sorted(missing)[:3] or [name[:40] for name in sorted(unknown)[:3]]
        state = "missing" if missing else "unknown"
        raise RejectedError("AG-IN-003", f"{state} field: {', '.join(named)}")
    return mapping


def as_mapping(value: Json) -> dict[str, Json]:
    """The value as an object with any names."""
    if not isinstance(value, dict):
        raise RejectedError("AG-IN-003", "expected an object")
    return value


def as_list(value: Json) -> list[Json]:
    """The value as an array."""
    if not isinstance(value, list):
        raise RejectedError("AG-IN-003", "expected an array")
    return value


def as_text(value: Json) -> str:
    """The value as a string."""
    if not isinstance(value, str):
        raise RejectedError("AG-IN-003", "expected a string")
    return value


def as_int(value: Json) -> int:
    """The value as a non-negative integer; `true` is not 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise RejectedError("AG-IN-003", "expected a non-negative integer")
    return value


def as_number(value: Json) -> float:
    """The value as a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300:
        raise RejectedError("AG-IN-003", "expected a number")
    return float(value)


def as_bool(value: Json) -> bool:
    """The value as a boolean."""
    if not isinstance(value, bool):
        raise RejectedError("AG-IN-003", "expected true or false")
    return value


def as_sha256(value: Json) -> str:
    """The value as a SHA-256 digest in lower-case hex."""
    text = as_text(value)
    if not _SHA256.fullmatch(text):
        raise RejectedError("AG-IN-003", "expected a SHA-256 digest in hex")
    return text


def as_base64(value: Json) -> bytes:
    """The bytes of a string in padded standard base64."""
    text = as_text(value)
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:  # binascii.Error is one; text beyond ASCII raises the plain one
        raise RejectedError("AG-IN-003", "expected base64") from error


def as_random_id(value: Json) -> str:
    """The value as a packet, dispatch or call id: 32 lower-case hex digits."""
    text = as_text(value)
    if not _RANDOM_ID.fullmatch(text):
        raise RejectedError("AG-IN-003", "expected an id of 32 hex digits")
    return text


def as_site(value: Json) -> str:
    """The value as the id of a site or coordinator."""
    text = as_text(value)
    if not _SITE.fullmatch(text):
        raise RejectedError("AG-IN-003", "expected a site id: lower-case letters, digits, dashes")
    return text


def as_line(value: Json) -> str:
    """The value as one short line of printable text.

    Control and formatting characters (such as bidirectional overrides) are refused: such text is
    shown to people who decide by it.
    """
    text = as_text(value)
    if len(text) > LIMITS.text_field_chars or not text.isprintable():
        raise RejectedError("AG-IN-003", "expected one short line of printable text")
    return text


def format_time(moment: datetime) -> str:
    """A UTC time as `2026-11-23T08:00:00Z`, the only form our documents use."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_time(text: str) -> datetime:
    """Read `2026-11-23T08:00:00Z`.

    Raises:
        RejectedError: AG-IN-003 for any other form.
    """
    if not _TIME.fullmatch(text):
        raise RejectedError("AG-IN-003", "a time is not of the form 2026-11-23T08:00:00Z")
    try:
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    except ValueError as error:
        raise RejectedError("AG-IN-003", "a time names no real date") from error
