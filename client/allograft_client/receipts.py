# SPDX-License-Identifier: Apache-2.0
"""Receipts: what this site tells, signed and logged, about each packet that reached it.

Invariant: a receipt is announced in the transaction that records the state it reports. Figures
measured on this site's own data are in it only where the policy shares them.
"""

from __future__ import annotations

from allograft.errors import AllograftError
from allograft.packet.header import Header
from allograft.routing.receipt import Figures, Receipt, State, sign_receipt
from allograft_client.rows import PacketRow
from allograft_client.site import Site


def answer(site: Site, row: PacketRow, state: State, code: str = "") -> None:
    """A receipt for a packet whose dispatch was verified; call inside the state's transaction."""
    fresh = site.store.packet(row.packet_id)
    trial = fresh.facts.get("trial")
    figures = None
    if trial and state in {"kept", "reverted"} and _shares_figures(site):
        # Receipts count both figures alike: loss without minus loss with.
        figures = Figures(trial["gain"], -trial["retention_change"], trial["dose"])
    receipt = Receipt(
        packet_id=row.packet_id,
        dispatch_id=fresh.dispatch_id,
        dispatch_digest=str(fresh.facts["dispatch_sha256"]),
        site=site.name,
        state=state,
        code=code,
        time=site.now(),
        figures=figures,
    )
    _announce(site, receipt)


def _shares_figures(site: Site) -> bool:
    try:
        return site.policy().receipt.share_figures
    except AllograftError:
        return False


def turn_away(site: Site, header: Header, dispatch_sha256: str, state: State, code: str) -> None:
    """A receipt for a packet that was turned away, by the ids it claimed."""
    receipt = Receipt(
        packet_id=header.packet_id,
        dispatch_id=header.dispatch_id,
        dispatch_digest=dispatch_sha256,
        site=site.name,
        state=state,
        code=code,
        time=site.now(),
    )
    _announce(site, receipt)


def _announce(site: Site, receipt: Receipt) -> None:
    about = {
        "packet_id": receipt.packet_id,
        "dispatch_id": receipt.dispatch_id,
        "outcome": receipt.state,
    }
    files = site.logged("receipt", "receipt", sign_receipt(receipt, site.key), about)
    site.outbox.add("receipt", files, receipt.packet_id)
