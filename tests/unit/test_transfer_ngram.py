# SPDX-License-Identifier: Apache-2.0
"""Counting baselines against values worked out by hand."""

import math

import numpy as np
import pytest

from allograft.evaluate.transfer.ngram import NgramModel, mix


def test_bigrams_are_those_of_the_formula() -> None:
    model = NgramModel([[0, 1, 0, 1, 2]], order=2, vocabulary=3)
    # Unigrams: counts 2, 2, 1 of 5, three distinct, over a uniform third.
    assert model.probability([], 0) == pytest.approx(3 / 8)
    assert model.probability([], 2) == pytest.approx(2 / 8)
    # After 0 came 1 twice; after 1 came 0 and 2 once each; nothing came after 2.
    assert model.probability([0], 1) == pytest.approx(19 / 24)
    assert model.probability([0], 2) == pytest.approx(1 / 12)
    assert model.probability([1], 0) == pytest.approx(7 / 16)
    assert model.probability([2], 0) == pytest.approx(3 / 8)
    assert model.entries == 3 + 3


def test_every_context_has_a_distribution() -> None:
    rows = [[0, 1, 2, 3, 0, 1, 3], [3, 2, 1, 0, 1]]
    model = NgramModel(rows, order=5, vocabulary=6)
    for context in ([], [0], [0, 1], [5, 5], [2, 3, 0, 1], [9, 2, 3, 0, 1]):
        total = sum(model.probability(context, token) for token in range(6))
        assert total == pytest.approx(1.0)


def test_contexts_do_not_cross_documents() -> None:
    apart = NgramModel([[0, 1], [2, 3]], order=2, vocabulary=4)
    joined = NgramModel([[0, 1, 2, 3]], order=2, vocabulary=4)
    assert apart.probability([1], 2) == apart.probability([], 2)
    assert joined.probability([1], 2) > joined.probability([], 2)


def test_a_document_is_scored_from_its_second_token() -> None:
    model = NgramModel([[0, 1, 0, 1, 2]], order=2, vocabulary=3)
    np.testing.assert_allclose(model.probabilities([0, 1, 0]), [19 / 24, 7 / 16])


def test_longer_order_knows_a_passage_better() -> None:
    rows = [[0, 1, 2, 0, 1, 3, 0, 2, 1]]
    chances = [NgramModel(rows, order, 4).probability([2, 0, 1], 3) for order in (1, 2, 4)]
    assert chances[0] < chances[1] < chances[2]


def test_mixture_is_of_probabilities() -> None:
    nats = np.array([math.log(4), 0.0])
    np.testing.assert_allclose(
        mix(nats, np.array([0.75, 0.5]), 0.5), [-math.log(0.5), -math.log(0.75)]
    )
    np.testing.assert_allclose(mix(nats, np.array([0.1, 0.1]), 0.0), nats)
