# SPDX-License-Identifier: Apache-2.0
"""Who belongs to which privacy domain, without anybody's name.

A person is kept as HMAC-SHA256 of their id under a key that never leaves the site, so the files
tell nothing to whom the key is hidden, and two sites' files cannot be compared. One file for each
domain, `DOMAIN.people`: three header lines (format and domain, key check, HMAC of the body), then
the sorted 32-byte digests.

Invariants: a person is in one domain at most, so the budgets of two domains never add up on anyone;
nobody is ever taken out; raw ids are neither stored, nor logged, nor put into an error, and neither
are counts, because errors travel.

It recognises people by the ids that the site gives them. An id written in two ways is two people,
but for surrounding blanks and Unicode composition: ids are compared in form NFC, as
`recipes.documents` reads them, so that who is one person here is one unit in training.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import unicodedata
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from allograft.durable import durable_write, locked_directory
from allograft.errors import RejectedError
from allograft.limits import LIMITS
from allograft.plainfile import read_plain

KEY_BYTES = 32

_DIGEST_BYTES = 32
_DOMAIN = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_SUFFIX = ".people"
_FORMAT = "allograft-people-v1"


@dataclass(frozen=True, slots=True)
class Population:
    """The register of one site.

    Every method raises RejectedError AG-PRV-067 if a file is damaged or was made with another key.

    Attributes:
        directory: Where the files are; it must exist.
        key: The site's own (32 bytes), used for nothing else.
        domains: The domains that must have a file, as the ledger has people reserved for: a file
            that got lost would make its people look unknown.
    """

    directory: Path
    key: bytes
    domains: Collection[str] = ()

    def enrol_people(self, domain: str, ids: Iterable[str]) -> None:
        """Put people into a domain, before their data is trained on; those in it already stay.

        Raises:
            RejectedError: AG-IN-003 for an unusable id or name, AG-PRV-066 if any of them belongs
                to another domain; nobody is enrolled then.
            UnavailableError: AG-PRV-068 if another process enrols, AG-STO-001 if the disk refuses.
        """
        _check_name(domain)
        people = self._digests(ids)
        with locked_directory(self.directory, "AG-PRV-068"):
            self._refuse_foreign(domain, people)
            known = self._read(domain) if self._path(domain).exists() else frozenset()
            if not people <= known or not self._path(domain).exists():
                durable_write(self._path(domain), self._write(domain, known | people))

    def check_people(self, domain: str, ids: Iterable[str]) -> None:
        """Refuse a domain for people of whom any belongs to another one.

        Raises:
            RejectedError: AG-IN-003 for an unusable id or name, AG-PRV-066.
        """
        _check_name(domain)
        self._refuse_foreign(domain, self._digests(ids))

    def find_overlap(self, ids: Iterable[str]) -> tuple[str, ...]:
        """The domains that any of these people belong to, by name.

        Raises:
            RejectedError: AG-IN-003 for an unusable id.
        """
        people = self._digests(ids)
        return tuple(name for name in self._names() if not people.isdisjoint(self._read(name)))

    def check_disjoint(self, domain: str, other: str) -> None:
        """Refuse two domains that share people.

        Raises:
            RejectedError: AG-PRV-066.
        """
        if not self._read(_check_name(domain)).isdisjoint(self._read(_check_name(other))):
            raise RejectedError("AG-PRV-066", f"domains {domain} and {other} share people")

    def _refuse_foreign(self, domain: str, people: frozenset[bytes]) -> None:
        for name in self._names():
            if name != domain and not people.isdisjoint(self._read(name)):
                raise RejectedError("AG-PRV-066", f"some of them belong to domain {name}")

    def enrolled_domains(self) -> tuple[str, ...]:
        """The domains that people were put into, by name."""
        return tuple(self._names())

    def _names(self) -> list[str]:
        found = {path.name.removesuffix(_SUFFIX) for path in self.directory.glob(f"*{_SUFFIX}")}
        for name in sorted(set(self.domains) - found):
            raise RejectedError("AG-PRV-067", f"the people of domain {name} are not there")
        return sorted(found)

    def _digests(self, ids: Iterable[str]) -> frozenset[bytes]:
        return frozenset(self._digest(person) for person in ids)

    def _digest(self, person: str) -> bytes:
        try:
            written = unicodedata.normalize("NFC", person).strip().encode("utf-8")
        except UnicodeEncodeError as error:
            raise RejectedError("AG-IN-003", "a person's id is not Unicode text") from error
        if not 0 < len(written) <= LIMITS.person_id_bytes:
            raise RejectedError("AG-IN-003", "a person's id is empty or too long")
        return self._mac(b"person", written)

    def _mac(self, purpose: bytes, content: bytes) -> bytes:
        return hmac.new(self.key, purpose + b"\0" + content, hashlib.sha256).digest()

    def _write(self, domain: str, people: frozenset[bytes]) -> bytes:
        body = b"".join(sorted(people))
        return self._header(domain, body) + body

    def _header(self, domain: str, body: bytes) -> bytes:
        # The domain is in the seal, so that a file renamed to another domain is noticed.
        seal = self._mac(b"body", domain.encode() + b"\0" + body).hex()
        return f"{_FORMAT} {domain}\n{self._mac(b'key', b'').hex()}\n{seal}\n".encode()

    def _read(self, domain: str) -> frozenset[bytes]:
        try:
            content = read_plain(self._path(domain), LIMITS.people_bytes, follow_links=False)
        except FileNotFoundError as error:
            raise RejectedError(
                "AG-PRV-067", f"the people of domain {domain} are not there"
            ) from error
        except RejectedError as error:
            raise RejectedError("AG-PRV-067", error.cause) from error
        # An empty body has the shortest header there is.
        body = content[len(self._header(domain, b"")) :]
        if len(body) % _DIGEST_BYTES or not hmac.compare_digest(
            content, self._header(domain, body) + body
        ):
            raise RejectedError("AG-PRV-067", f"the people of domain {domain} do not verify")
        return frozenset(
            body[start : start + _DIGEST_BYTES] for start in range(0, len(body), _DIGEST_BYTES)
        )

    def _path(self, domain: str) -> Path:
        return self.directory / f"{domain}{_SUFFIX}"


def _check_name(domain: str) -> str:
    if not _DOMAIN.fullmatch(domain):
        raise RejectedError("AG-IN-003", "a domain is named by lower-case letters, digits, dashes")
    return domain
