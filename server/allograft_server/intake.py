# SPDX-License-Identifier: Apache-2.0
"""What an item may consist of, and whether its documents fit what the coordinator knows. No IO.

Signatures are verified by the codecs of each document; here verified values are compared with each
other: an event with its document, a dispatch with its offer, a receipt with its delivery.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from allograft.errors import RejectedError
from allograft.limits import LIMITS
from allograft.log.event import Event, EventName
from allograft.packet.header import HEADER_NAME, MANIFEST_NAME, Header
from allograft.provenance.dispatch import DISPATCH_NAME, Dispatch
from allograft.relay.item import FROM_SITE, Item, ItemFile
from allograft.routing.receipt import Receipt
from allograft.routing.withdrawal import Withdrawal
from allograft_server.store import DeliveryRow, DispatchRow, ItemRow, PacketRow

#: The files that items of each kind consist of; a dispatch has parts besides.
_FILES: Mapping[str, frozenset[str]] = {
    "card": frozenset({"card.json"}),
    "offer": frozenset({"offer.json", "offer.event.json"}),
    "dispatch": frozenset({HEADER_NAME, DISPATCH_NAME, "dispatch.event.json", MANIFEST_NAME}),
    "receipt": frozenset({"receipt.json", "receipt.event.json"}),
    "withdrawal": frozenset({"withdrawal.json", "withdrawal.event.json"}),
}
_PART = re.compile(r"part-\d{3}\.sealed")


@dataclass(frozen=True, slots=True)
class ExpectedEvent:
    """What the event that accompanies a document must say."""

    event: EventName
    actor: str
    document: bytes
    packet_id: str
    dispatch_id: str = ""
    outcome: str = ""


def check_item(item: Item) -> None:
    """Refuse an item by its description, before any of it is taken.

    Raises:
        RejectedError: AG-RLY-006.
    """
    if item.kind not in FROM_SITE:
        raise RejectedError("AG-RLY-006", f"sites send no items of kind {item.kind[:32]!r}")
    names = {file.name for file in item.files}
    parts = {name for name in names if _PART.fullmatch(name)}
    if names - parts != _FILES[item.kind] or bool(parts) != (item.kind == "dispatch"):
        raise RejectedError("AG-RLY-006", f"not the files of a {item.kind}")
    for file in item.files:
        if file.name.endswith(".json") and file.size_bytes > LIMITS.json_document_bytes:
            raise RejectedError("AG-RLY-006", f"{file.name} has {file.size_bytes} bytes")


def check_author(author: str, row: ItemRow) -> None:
    """Refuse a document that its author did not send itself.

    Raises:
        RejectedError: AG-CRD-003.
    """
    if author != row.site:
        raise RejectedError("AG-CRD-003", f"a document of another site came from {row.site}")


def check_event(event: Event, expected: ExpectedEvent) -> None:
    """Refuse a verified event that is about something else than its document.

    Raises:
        RejectedError: AG-CRD-004.
    """
    found = (
        event.event, event.actor, event.packet_id, event.dispatch_id, event.outcome,
        event.document_name, event.document_sha256,
    )  # fmt: skip
    wanted = (
        expected.event, expected.actor, expected.packet_id, expected.dispatch_id, expected.outcome,
        f"{expected.event}.json", hashlib.sha256(expected.document).hexdigest(),
    )  # fmt: skip
    if found != wanted:
        raise RejectedError("AG-CRD-004", f"the event is not about this {expected.event}")


def check_offered(packet: PacketRow | None, dispatch: Dispatch) -> None:
    """Refuse a dispatch that its donor did not offer, or withdrew.

    Raises:
        RejectedError: AG-CRD-005, AG-CRD-007.
    """
    if packet is None or packet.donor != dispatch.donor:
        raise RejectedError("AG-CRD-005", "a dispatch without an offer by the same donor")
    if packet.state == "withdrawn":
        raise RejectedError("AG-CRD-007", "a dispatch of a withdrawn packet")
    if (packet.kind, packet.statement_digest) != (dispatch.kind, dispatch.statement_digest):
        raise RejectedError("AG-CRD-005", "the dispatch is not of the packet that was offered")


def check_sealed_files(item: Item, header: Header) -> None:
    """Refuse an item whose sealed files are not exactly those that the donor signed.

    Raises:
        RejectedError: AG-CRD-005.
    """
    described = {part.name: (part.sealed_bytes, part.sealed_sha256) for part in header.parts}
    described[MANIFEST_NAME] = (header.manifest.sealed_bytes, header.manifest.sealed_sha256)
    found = {
        file.name: (file.size_bytes, file.sha256)
        for file in item.files
        if file.name.endswith(".sealed")
    }
    if described != found:
        raise RejectedError("AG-CRD-005", "the sealed files are not those of the header")


def check_received(
    dispatch: DispatchRow | None, delivery: DeliveryRow | None, receipt: Receipt
) -> DispatchRow:
    """The dispatch that a receipt answers.

    Raises:
        RejectedError: AG-CRD-006 if nothing of the kind was delivered to that site.
    """
    if dispatch is None or dispatch.packet_id != receipt.packet_id:
        raise RejectedError("AG-CRD-006", "a receipt for an unknown dispatch")
    if delivery is None or delivery.state == "held":
        raise RejectedError("AG-CRD-006", "a receipt for a dispatch that was not delivered")
    # What was put into quarantine may have been changed on its way; what was tried was not.
    tried = receipt.state in {"kept", "reverted"}
    if tried and dispatch.digest != receipt.dispatch_digest:
        raise RejectedError("AG-CRD-006", "a receipt for another dispatch than the logged one")
    return dispatch


def check_withdrawable(packet: PacketRow | None, withdrawal: Withdrawal) -> None:
    """Refuse a withdrawal by anyone but the donor, or of something else.

    Raises:
        RejectedError: AG-CRD-006.
    """
    if packet is None or packet.donor != withdrawal.donor:
        raise RejectedError("AG-CRD-006", "a withdrawal of a packet of someone else")
    if packet.statement_digest != withdrawal.statement_digest:
        raise RejectedError("AG-CRD-006", "a withdrawal of another packet than the offered one")


def describe_bytes(name: str, content: bytes) -> ItemFile:
    """Describe a small file that is in memory."""
    parts = tuple(
        hashlib.sha256(content[start : start + LIMITS.part_bytes]).hexdigest()
        for start in range(0, len(content), LIMITS.part_bytes)
    )
    return ItemFile(name, len(content), hashlib.sha256(content).hexdigest(), parts)
