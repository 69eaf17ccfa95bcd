# SPDX-License-Identifier: Apache-2.0
"""`header.json`: what everyone may know about a sealed dispatch, and the wraps of its two keys.

The payload and the manifest (the attestations) are sealed under one content key each, so that an
auditor can be given the manifest alone. Sites of the audience hold both wraps, auditors one.
Nothing here is believed before the dispatch statement, which names this file's digest, is verified.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from allograft.crypto import canonical
from allograft.crypto.seal import WRAP_BYTES, sealed_size
from allograft.errors import RejectedError
from allograft.limits import LIMITS

HEADER_NAME = "header.json"
MANIFEST_NAME = "manifest.sealed"

_VERSION = 1
_SUITE = 1  # Cobblestone-256, HPKE X-Wing, ECDSA P-256; there is no other and no negotiation

Role = Literal["payload", "manifest"]


@dataclass(frozen=True, slots=True)
class SealedPart:
    """One sealed payload file; its plain name is in the sealed statement only."""

    name: str
    plain_bytes: int
    sealed_bytes: int
    sealed_sha256: str


@dataclass(frozen=True, slots=True)
class SealedManifest:
    """The sealed attestations."""

    sealed_bytes: int
    sealed_sha256: str


@dataclass(frozen=True, slots=True)
class Wrap:
    """A content key wrapped for one site.

    Attributes:
        role: Which of the two content keys.
        key_id: The sealing key it was wrapped for, as `SealingPublicKey.key_id`.
        wrap: HPKE encapsulation and ciphertext.
    """

    site: str
    role: Role
    key_id: str
    wrap: bytes


@dataclass(frozen=True, slots=True)
class Header:
    """The public description of a sealed dispatch.

    Attributes:
        audience: Sites that may open the payload, in order.
        statement_digest: SHA-256 (hex) of the packet statement's envelope; every seal and wrap is
            bound to it.
    """

    packet_id: str
    dispatch_id: str
    donor: str
    audience: tuple[str, ...]
    not_after: datetime
    statement_digest: str
    parts: tuple[SealedPart, ...]
    manifest: SealedManifest
    wraps: tuple[Wrap, ...]

    @property
    def auditors(self) -> tuple[str, ...]:
        """Sites that may open the manifest only."""
        return tuple(w.site for w in self.wraps if w.site not in self.audience)

    @property
    def sealed_names(self) -> tuple[str, ...]:
        """The sealed files of the dispatch, parts first."""
        return (*(part.name for part in self.parts), MANIFEST_NAME)

    def find_wrap(self, site: str, role: Role) -> Wrap:
        """The wrap for a site.

        Raises:
            RejectedError: AG-PKT-008 if there is none.
        """
        for wrap in self.wraps:
            if wrap.site == site and wrap.role == role:
                return wrap
        raise RejectedError("AG-PKT-008", f"the {role} is not sealed for {site}")

    def to_bytes(self) -> bytes:
        """The header as canonical JSON."""
        return canonical.dumps(
            {
                "v": _VERSION,
                "suite": _SUITE,
                "packet_id": self.packet_id,
                "dispatch_id": self.dispatch_id,
                "donor": self.donor,
                "audience": list(self.audience),
                "not_after": canonical.format_time(self.not_after),
                "statement_digest": self.statement_digest,
                "parts": [
                    {
                        "name": part.name,
                        "plain_bytes": part.plain_bytes,
                        "sealed_bytes": part.sealed_bytes,
                        "sealed_sha256": part.sealed_sha256,
                    }
                    for part in self.parts
                ],
                "manifest": {
                    "sealed_bytes": self.manifest.sealed_bytes,
                    "sealed_sha256": self.manifest.sealed_sha256,
                },
                "wraps": [
                    {
                        "site": wrap.site,
                        "role": wrap.role,
                        "key_id": wrap.key_id,
                        "wrap": base64.b64encode(wrap.wrap).decode("ascii"),
                    }
                    for wrap in self.wraps
                ],
            }
        )

    @classmethod
    def from_bytes(cls, content: bytes) -> Header:
        """Read and check a header.

        Raises:
            RejectedError: AG-PKT-003 if malformed, AG-PKT-005 if over a limit.
        """
        try:
            header = _read_header(canonical.loads(content, LIMITS.header_bytes))
        except RejectedError as error:
            if error.code.startswith("AG-PKT"):
                raise
            raise RejectedError("AG-PKT-003", f"packet header: {error.cause}") from error
        _check_audience(header)
        return header


def part_name(index: int) -> str:
    """The name of the sealed file number `index`."""
    return f"part-{index:03d}.sealed"


def _read_header(value: canonical.Json) -> Header:
    fields = canonical.as_object(
        value,
        {
            "v", "suite", "packet_id", "dispatch_id", "donor", "audience", "not_after",
            "statement_digest", "parts", "manifest", "wraps",
        },
    )  # fmt: skip
    if fields["v"] != _VERSION or fields["suite"] != _SUITE:
        raise RejectedError("AG-PKT-003", "a packet header of an unknown version or suite")
    parts = canonical.as_list(fields["parts"])
    wraps = canonical.as_list(fields["wraps"])
    if not 1 <= len(parts) <= LIMITS.packet_parts:
        raise RejectedError("AG-PKT-005", f"a packet of {len(parts)} parts")
    if len(wraps) > 2 * LIMITS.packet_recipients:
        raise RejectedError("AG-PKT-005", f"a packet header with {len(wraps)} wraps")
    audience = canonical.as_list(fields["audience"])
    return Header(
        packet_id=canonical.as_random_id(fields["packet_id"]),
        dispatch_id=canonical.as_random_id(fields["dispatch_id"]),
        donor=canonical.as_site(fields["donor"]),
        audience=tuple(canonical.as_site(site) for site in audience),
        not_after=canonical.parse_time(canonical.as_text(fields["not_after"])),
        statement_digest=canonical.as_sha256(fields["statement_digest"]),
        parts=tuple(_read_part(index, part) for index, part in enumerate(parts)),
        manifest=_read_manifest(fields["manifest"]),
        wraps=tuple(_read_wrap(wrap) for wrap in wraps),
    )


def _read_part(index: int, value: canonical.Json) -> SealedPart:
    fields = canonical.as_object(value, {"name", "plain_bytes", "sealed_bytes", "sealed_sha256"})
    plain = canonical.as_int(fields["plain_bytes"])
    if fields["name"] != part_name(index):
        raise RejectedError("AG-PKT-003", f"part {index} is not called {part_name(index)}")
    if plain > LIMITS.packet_payload_bytes:
        raise RejectedError("AG-PKT-005", f"a part of {plain} bytes")
    if fields["sealed_bytes"] != sealed_size(plain):
        raise RejectedError("AG-PKT-003", f"part {index} cannot have this sealed size")
    return SealedPart(
        part_name(index), plain, sealed_size(plain), canonical.as_sha256(fields["sealed_sha256"])
    )


def _read_manifest(value: canonical.Json) -> SealedManifest:
    fields = canonical.as_object(value, {"sealed_bytes", "sealed_sha256"})
    size = canonical.as_int(fields["sealed_bytes"])
    if size > sealed_size(LIMITS.manifest_bytes):
        raise RejectedError("AG-PKT-005", f"a sealed manifest of {size} bytes")
    return SealedManifest(size, canonical.as_sha256(fields["sealed_sha256"]))


def _read_wrap(value: canonical.Json) -> Wrap:
    fields = canonical.as_object(value, {"site", "role", "key_id", "wrap"})
    role = canonical.as_text(fields["role"])
    if role not in {"payload", "manifest"}:
        raise RejectedError("AG-PKT-003", "a wrap has an unknown role")
    try:
        wrap = base64.b64decode(canonical.as_text(fields["wrap"]), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RejectedError("AG-PKT-003", "a wrap is not base64") from error
    if len(wrap) != WRAP_BYTES:
        raise RejectedError("AG-PKT-003", f"a wrap has {len(wrap)} bytes, not {WRAP_BYTES}")
    return Wrap(
        site=canonical.as_site(fields["site"]),
        role=role,  # type: ignore[arg-type]  # checked against the literals above
        key_id=canonical.as_sha256(fields["key_id"]),
        wrap=wrap,
    )


def _check_audience(header: Header) -> None:
    """Exactly the audience can open the payload, and nobody is hidden or named twice."""
    if not header.audience or list(header.audience) != sorted(set(header.audience)):
        raise RejectedError("AG-PKT-003", "the audience is empty, unsorted or names a site twice")
    wraps = [(wrap.site, wrap.role) for wrap in header.wraps]
    if len(set(wraps)) != len(wraps):
        raise RejectedError("AG-PKT-003", "a site has two wraps of one role")
    payload = {site for site, role in wraps if role == "payload"}
    manifest = {site for site, role in wraps if role == "manifest"}
    if payload != set(header.audience) or not payload <= manifest:
        raise RejectedError("AG-PKT-003", "the wraps are not those of the audience")
