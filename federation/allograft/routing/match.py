# SPDX-License-Identifier: Apache-2.0
"""Which sites could use an offer, judged by declared facts alone.

The matcher sees digests and shapes, so its best answer for another model of the same shape is
`lineage`: worth sending, and for the recipient to test against the sealed sketch before it opens
any payload. Another seed of the same shape gains nothing and does harm.
"""

from __future__ import annotations

from collections.abc import Iterable

from allograft.packet.kinds import KINDS
from allograft.routing.card import ANY_DONOR, Card, ModelFacts
from allograft.routing.offer import Offer
from allograft.routing.route import Proposal

#: Best first.
_RANKS = {"exact": 0, "lineage": 1, "behavioural": 2, "refuse": 3}


def match_offer(offer: Offer, cards: Iterable[Card]) -> tuple[Proposal, ...]:
    """One proposal for each site with a card, except the donor; sorted by site."""
    others = sorted((card for card in cards if card.site != offer.donor), key=lambda c: c.site)
    return tuple(match_card(offer, card) for card in others)


def match_card(offer: Offer, card: Card) -> Proposal:
    """The verdict for one site: its wishes first, then the best of its models."""
    if unwanted := _unwanted(offer, card):
        return Proposal(card.site, "refuse", unwanted)
    verdicts = [_match_model(offer, card.site, model) for model in card.models]
    if not verdicts:
        return Proposal(card.site, "refuse", "the site declares no model")
    return min(verdicts, key=lambda proposal: _RANKS[proposal.verdict])


def _unwanted(offer: Offer, card: Card) -> str:
    """Why the site's declared wishes exclude the offer; empty if they do not."""
    accepts = card.accepts
    if offer.kind not in accepts.kinds:
        return f"the site accepts no packets of kind {offer.kind}"
    if offer.donor not in accepts.donors and ANY_DONOR not in accepts.donors:
        return f"the site accepts nothing from {offer.donor}"
    if offer.mode not in accepts.modes:
        return f"the site accepts no packets made in mode {offer.mode}"
    return ""


def _match_model(offer: Offer, site: str, model: ModelFacts) -> Proposal:
    kind = KINDS.get(offer.kind)
    if kind is not None and kind.binds == "tokenizer":
        return _match_tokenizer(offer, site, model)
    if model.weights_digest == offer.base.weights_digest:
        if model.tokenizer_digest == offer.base.tokenizer_digest:
            return Proposal(site, "exact", "the same base weights and tokenizer")
        return Proposal(site, "refuse", "the same base weights with another tokenizer")
    found, wanted = model.architecture, offer.base.architecture
    differing = [
        name
        for name, left, right in (
            ("family", found.family, wanted.family),
            ("hidden size", found.hidden, wanted.hidden),
            ("number of layers", found.layers, wanted.layers),
            ("vocabulary size", found.vocab, wanted.vocab),
            ("tokenizer", model.tokenizer_digest, offer.base.tokenizer_digest),
        )
        if left != right
    ]
    if differing:
        return Proposal(site, "refuse", f"another {' and '.join(differing)}")
    return Proposal(
        site, "lineage", "the same shape and tokenizer; descent is for the recipient to test"
    )


def _match_tokenizer(offer: Offer, site: str, model: ModelFacts) -> Proposal:
    ours = model.tokenizer_digest, model.architecture.vocab
    if ours != (offer.base.tokenizer_digest, offer.base.architecture.vocab):
        return Proposal(site, "refuse", "another tokenizer")
    return Proposal(site, "behavioural", "the same tokenizer; it works beside any such model")
