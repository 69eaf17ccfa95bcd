# SPDX-License-Identifier: Apache-2.0
"""A coordinator that speaks to one site without Flower, and breaks one rule when told to."""

import secrets
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from allograft.crypto.keys import SigningKey
from allograft.errors import RejectedError
from allograft.relay.frame import Header, SignedFrame, check_answer, sign_frame, verify_frame
from allograft.relay.item import Item, describe_item, inline_files
from allograft.relay.poll import Announcement, PollAnswer, PollCall
from allograft_client.exchange import Exchange, Parties
from allograft_client.inbox import Inbox
from allograft_client.outbox import Outbox
from allograft_client.store import Store

NOW = datetime(2026, 11, 23, 8, 0, 0, tzinfo=UTC)
SITE, COORDINATOR = "hospital-a", "consortium"


@dataclass(frozen=True)
class Keyring:
    """A roster reduced to keys by name."""

    keys: dict
    version: int = 3

    def signing_keys(self, name, role, now):
        if name not in self.keys:
            raise RejectedError("AG-SIG-003", f"{name} is not enrolled")
        return (self.keys[name],)


class NoWitness:
    """A witness that has seen nothing."""

    size = 0

    def cosign(self, checkpoint, consistency, now):
        raise AssertionError("no checkpoint is offered in these tests")


class SiteKit:
    """One site's boxes and exchange over a directory; `restart` forgets everything in memory."""

    def __init__(self, root: Path, witness=None, reserve_bytes: int = 0):
        self.root = root
        self.key = SigningKey.generate()
        self.coordinator = SigningKey.generate()
        self.roster = Keyring({SITE: self.key.public, COORDINATOR: self.coordinator.public})
        self.witness = witness or NoWitness()
        self.reserve_bytes = reserve_bytes
        self.alarms: list[tuple[str, str]] = []
        self.now = NOW
        for name in ("outbox", "inbox"):
            (root / name).mkdir(exist_ok=True)
        self.restart()

    def restart(self) -> None:
        self.store = Store.create(self.root / "site.db")
        self.outbox = Outbox(self.root / "outbox", self.store, SITE, COORDINATOR)
        self.inbox = Inbox(self.root / "inbox", self.store, SITE, self.reserve_bytes)
        self.exchange = Exchange(
            Parties(SITE, COORDINATOR, self.key),
            lambda: self.roster,
            self.store,
            (self.outbox, self.inbox),
            self.witness,
            lambda code, cause: self.alarms.append((code, cause)),
            lambda: self.now,
        )

    # --- the coordinator's side ---

    def header(self, method="poll", **changes) -> Header:
        plain = Header(secrets.token_hex(16), method, COORDINATOR, SITE, "call", self.now)
        return replace(plain, **changes)

    def call(self, method="poll", body=b"", **changes) -> tuple[Header, bytes]:
        """Make a call as the coordinator would; return the verified answer."""
        header = self.header(method, **changes)
        answer = self.exchange.answer(sign_frame(header, body, self.coordinator))
        found = verify_frame(answer, (self.key.public,), COORDINATOR, self.now)
        check_answer(header, found)
        return found, answer.body

    def poll(self, **fields) -> PollAnswer:
        header, body = self.call("poll", PollCall(**fields).to_bytes())
        assert header.status == "ok", header.code
        return PollAnswer.from_bytes(body)

    def take(self, item: Item) -> bytes:
        """All bytes of an outgoing item, part by part."""
        parts = []
        for number in range(item.part_count):
            header, body = self.call("take", item=item.item_id, part=number)
            assert header.status == "ok", header.code
            parts.append(body)
        return b"".join(parts)

    def put(self, item: Item, number: int, content: bytes) -> Header:
        return self.call("put", content, item=item.item_id, part=number)[0]


def incoming(directory: Path, kind: str, files: dict[str, bytes], recipient=SITE) -> Announcement:
    """Describe files as an item for the site, with their bytes if they are small."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    item = describe_item(kind, COORDINATOR, recipient, [directory / name for name in files])
    return Announcement(item, inline_files(item, directory))


def part_bytes(directory: Path, item: Item, number: int) -> bytes:
    part = item.part(number)
    with (directory / part.file.name).open("rb") as handle:
        handle.seek(part.offset)
        return handle.read(part.size_bytes)


def forged(frame: SignedFrame, changes: Iterable[tuple[str, bytes]]) -> SignedFrame:
    """The frame with fields replaced after signing."""
    return replace(frame, **dict(changes))


HOUR = timedelta(hours=1)
