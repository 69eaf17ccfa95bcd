# SPDX-License-Identifier: Apache-2.0
"""Offers are matched by declared digests, shapes and wishes."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from allograft.routing.card import Accepts, Architecture, Card, ModelFacts
from allograft.routing.match import match_card, match_offer
from allograft.routing.offer import Base, Licence, Offer

NOW = datetime(2026, 11, 23, 8, 0, tzinfo=UTC)
SHAPE = Architecture("llama", 64, 5, 512)
SAME = ModelFacts("same", "1" * 64, SHAPE, "2" * 64)
OFFER = Offer(
    "ab" * 16, "3" * 64, "a", "organ", "open", Base("1" * 64, SHAPE, "2" * 64),
    1000, "notes", "en", Licence(merge=True, distil=True, redonate=True), NOW,
)  # fmt: skip
CARD = Card("b", (SAME,), Accepts(("organ",), ("*",), ("open",)), 1, NOW)


def test_the_same_weights_are_an_exact_match() -> None:
    assert match_card(OFFER, CARD).verdict == "exact"


def test_the_same_shape_is_only_a_lineage_candidate() -> None:
    card = replace(CARD, models=(replace(SAME, weights_digest="9" * 64),))
    proposal = match_card(OFFER, card)
    assert proposal.verdict == "lineage"
    assert "for the recipient to test" in proposal.reason


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (replace(SHAPE, family="gpt2"), "another family"),
        (replace(SHAPE, hidden=65), "another hidden size"),
        (replace(SHAPE, layers=6), "another number of layers"),
        (replace(SHAPE, vocab=513), "another vocabulary size"),
    ],
)
def test_another_shape_is_refused_by_name(shape: Architecture, reason: str) -> None:
    model = ModelFacts("other", "9" * 64, shape, "2" * 64)
    proposal = match_card(OFFER, replace(CARD, models=(model,)))
    assert (proposal.verdict, proposal.reason) == ("refuse", reason)


@pytest.mark.parametrize("weights", ["1" * 64, "9" * 64])
def test_another_tokenizer_is_refused_even_for_the_same_weights(weights: str) -> None:
    model = ModelFacts("other", weights, SHAPE, "8" * 64)
    proposal = match_card(OFFER, replace(CARD, models=(model,)))
    assert proposal.verdict == "refuse"
    assert "another tokenizer" in proposal.reason


def test_the_best_model_of_a_site_decides() -> None:
    stranger = ModelFacts("stranger", "9" * 64, replace(SHAPE, hidden=65), "2" * 64)
    descendant = replace(SAME, weights_digest="9" * 64)
    assert match_card(OFFER, replace(CARD, models=(stranger, descendant))).verdict == "lineage"
    assert match_card(OFFER, replace(CARD, models=(stranger, descendant, SAME))).verdict == "exact"


@pytest.mark.parametrize(
    ("accepts", "reason"),
    [
        (Accepts(("lora",), ("*",), ("open",)), "no packets of kind organ"),
        (Accepts(("organ",), ("c",), ("open",)), "nothing from a"),
        (Accepts(("organ",), ("*",), ("strict",)), "made in mode open"),
        (Accepts((), (), ()), "no packets of kind organ"),
    ],
)
def test_a_sites_wishes_come_before_its_models(accepts: Accepts, reason: str) -> None:
    proposal = match_card(OFFER, replace(CARD, accepts=accepts))
    assert proposal.verdict == "refuse"
    assert reason in proposal.reason


def test_a_site_without_models_is_refused() -> None:
    assert match_card(OFFER, replace(CARD, models=())).verdict == "refuse"


def test_every_site_but_the_donor_gets_a_verdict_in_order() -> None:
    cards = [replace(CARD, site=name) for name in ("c", "a", "b")]
    assert [p.site for p in match_offer(OFFER, cards)] == ["b", "c"]


def test_an_expert_needs_the_tokenizer_and_nothing_else() -> None:
    offer = replace(OFFER, kind="expert")
    accepts = replace(CARD.accepts, kinds=("expert",))
    stranger = ModelFacts("other", "9" * 64, Architecture("gpt2", 96, 3, 512), "2" * 64)
    card = replace(CARD, accepts=accepts, models=(stranger,))
    assert match_card(offer, card).verdict == "behavioural"
    for other in (
        replace(stranger, tokenizer_digest="8" * 64),
        replace(stranger, architecture=Architecture("gpt2", 96, 3, 513)),
    ):
        proposal = match_card(offer, replace(card, models=(other,)))
        assert (proposal.verdict, proposal.reason) == ("refuse", "another tokenizer")
