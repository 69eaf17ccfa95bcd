# SPDX-License-Identifier: Apache-2.0
"""A site that speaks the relay's protocol and nothing else, for tests and benchmarks.

It keeps what it receives on disk and every rule can be broken from outside by replacing `answer`.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import grpc

from allograft.crypto.keys import SigningKey, VerifyKey
from allograft.limits import LIMITS
from allograft.relay.frame import Header, SignedFrame, sign_frame, verify_frame
from allograft.relay.item import Item, check_part, describe_item
from allograft.relay.poll import Announcement, PollAnswer, PollCall, Refusal, Want
from allograft.wire.v1 import relay_pb2, relay_pb2_grpc


class SimulatedSite:
    def __init__(
        self,
        name: str,
        directory: Path,
        coordinator: str,
        coordinator_key: VerifyKey,
        key: SigningKey | None = None,
        utc_now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.name = name
        self.key = key or SigningKey.generate()
        self.coordinator = coordinator
        self._keys = (coordinator_key,)
        self._utc_now = utc_now
        self._inbox = directory / "inbox"
        self._inbox.mkdir(parents=True)
        self.outbox: dict[str, tuple[Item, Path]] = {}
        self.stored: set[str] = set()
        self.refused: dict[str, str] = {}  # ours, by the coordinator
        self.announced: dict[str, Item] = {}  # theirs
        self.present: dict[str, set[int]] = {}
        self.done: set[str] = set()
        self.declined: dict[str, str] = {}  # theirs, by us
        self.calls: list[Header] = []
        self.checkpoints: list[PollCall] = []
        self.roster_version = 0
        self.witnessed_size = 0
        self.cosignature = ""
        self.witness: Callable[[PollCall], tuple[int, str]] | None = None

    def send(self, kind: str, directory: Path, recipient: str | None = None) -> Item:
        """Put the files of a directory into the outbox as one item."""
        files = sorted(directory.iterdir())
        item = describe_item(kind, self.name, recipient or self.coordinator, files)
        self.outbox[item.item_id] = (item, directory)
        return item

    def received(self, item_id: str) -> Path:
        """The directory of an item that arrived."""
        assert item_id in self.done
        return self._inbox / item_id

    def exchange(self, frame: SignedFrame) -> SignedFrame:
        """Answer one call, as the daemon behind a site's courier does."""
        header = verify_frame(frame, self._keys, self.name, self._utc_now())
        assert header.sender == self.coordinator
        self.calls.append(header)
        return self.answer(header, frame.body)

    def answer(self, call: Header, body: bytes) -> SignedFrame:
        if call.method == "poll":
            return self.sign(call, self._answer_poll(PollCall.from_bytes(body)).to_bytes())
        if call.method == "take":
            item, directory = self.outbox[call.item]
            part = item.part(call.part)
            with (directory / part.file.name).open("rb") as handle:
                handle.seek(part.offset)
                return self.sign(call, handle.read(part.size_bytes))
        self._put(call.item, call.part, body)
        return self.sign(call, b"")

    def sign(self, call: Header, body: bytes, /, **changes: object) -> SignedFrame:
        header = replace(
            call, sender=call.recipient, recipient=call.sender, status="ok", time=self._utc_now()
        )
        return sign_frame(replace(header, **changes), body, self.key)  # type: ignore[arg-type]

    def _answer_poll(self, call: PollCall) -> PollAnswer:
        if call.checkpoint:
            self.checkpoints.append(call)
            if self.witness is not None:
                self.witnessed_size, self.cosignature = self.witness(call)
        for item_id in call.stored:
            self.stored.add(item_id)
            self.outbox.pop(item_id, None)
        for refusal in call.refused:
            self.refused[refusal.item_id] = refusal.code
            self.outbox.pop(refusal.item_id, None)
        for entry in call.announced:
            self._take_announcement(entry)
        return PollAnswer(
            outbox=tuple(self._announce(*entry) for entry in list(self.outbox.values())[:16]),
            wants=self._wants(),
            done=tuple(entry.item.item_id for entry in call.announced if self._has(entry.item)),
            refused=tuple(Refusal(item_id, code) for item_id, code in self.declined.items()),
            roster_version=self.roster_version,
            witnessed_size=self.witnessed_size,
            cosignature=self.cosignature,
        )

    def _announce(self, item: Item, directory: Path) -> Announcement:
        if item.size_bytes > LIMITS.inline_bytes:
            return Announcement(item)
        return Announcement(item, {f.name: (directory / f.name).read_bytes() for f in item.files})

    def _take_announcement(self, entry: Announcement) -> None:
        item_id = entry.item.item_id
        if item_id in self.declined:
            return
        self.announced[item_id] = entry.item
        target = self._inbox / item_id
        target.mkdir(exist_ok=True)
        for name, content in entry.inline.items():
            (target / name).write_bytes(content)
        if entry.inline:
            self.done.add(item_id)

    def _has(self, item: Item) -> bool:
        present = self.present.get(item.item_id, set())
        if item.item_id not in self.done and len(present) == item.part_count:
            self.done.add(item.item_id)
        return item.item_id in self.done

    def _wants(self) -> tuple[Want, ...]:
        wants = []
        for item_id, item in self.announced.items():
            present = self.present.get(item_id, set())
            missing = [n for n in range(item.part_count) if n not in present]
            if item_id not in self.done and missing:
                wants.append(Want(item_id, tuple(missing[: LIMITS.parts_in_flight])))
        return tuple(wants)

    def _put(self, item_id: str, number: int, body: bytes) -> None:
        part = self.announced[item_id].part(number)
        check_part(part, body)
        path = self._inbox / item_id / part.file.name
        path.touch()
        with path.open("r+b") as handle:
            handle.seek(part.offset)
            handle.write(body)
        self.present.setdefault(item_id, set()).add(number)


class _Door(relay_pb2_grpc.SiteCourierServicer):
    def __init__(self, site: SimulatedSite) -> None:
        self._site = site

    def Exchange(  # noqa: N802
        self, request: relay_pb2.Frame, context: grpc.ServicerContext
    ) -> relay_pb2.Frame:
        answer = self._site.exchange(SignedFrame(request.envelope, request.body))
        return relay_pb2.Frame(envelope=answer.envelope, body=answer.body)


def serve_site(site: SimulatedSite, socket: Path) -> grpc.Server:
    """Serve a simulated site where the real daemon would listen."""
    size = LIMITS.part_bytes + LIMITS.poll_bytes
    server = grpc.server(
        ThreadPoolExecutor(max_workers=1),
        options=(("grpc.max_receive_message_length", size), ("grpc.max_send_message_length", size)),
    )
    relay_pb2_grpc.add_SiteCourierServicer_to_server(_Door(site), server)
    server.add_insecure_port(f"unix:{socket}")
    server.start()
    return server


def main() -> None:
    """Run a simulated site as a process of its own, for benchmarks."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", required=True)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--coordinator", required=True)
    parser.add_argument("--coordinator-key", type=Path, required=True)
    parser.add_argument("--key", type=Path, required=True)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--outbox", type=Path, required=True)
    options = parser.parse_args()
    site = SimulatedSite(
        options.name,
        options.directory,
        options.coordinator,
        VerifyKey(options.coordinator_key.read_text()),
        SigningKey.from_pem(options.key.read_bytes()),
    )
    server = serve_site(site, options.socket)
    parent = os.getppid()
    sent: set[Path] = set()
    while os.getppid() == parent:
        # A directory that appears in the outbox is sent as it is.
        for directory in options.outbox.iterdir():
            if directory not in sent and not directory.name.startswith("."):
                site.send("dispatch", directory)
                sent.add(directory)
        time.sleep(0.2)
    server.stop(0)


if __name__ == "__main__":
    main()
