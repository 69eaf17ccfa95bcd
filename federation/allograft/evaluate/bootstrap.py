# SPDX-License-Identifier: Apache-2.0
"""Paired bootstrap over documents: how sure a difference of two measurements is.

The document is the unit that is drawn, because tokens of one document are not independent. The
effect is a ratio of sums (nats saved per token), so long documents weigh by their tokens. Both
measurements use the same draw: what is hard for one is hard for the other and cancels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from allograft.errors import RejectedError

#: Resamples drawn at a time: bounds memory at 256 x documents numbers.
_BLOCK = 256


@dataclass(frozen=True, slots=True, eq=False)
class Losses:
    """Held-out loss of a model, one entry per document.

    Attributes:
        nats: Negative log-likelihood of the document's predicted tokens, summed (float64).
        tokens: How many tokens were predicted (int64).
        text_bytes: UTF-8 bytes of the document (int64).
    """

    nats: npt.NDArray[np.float64]
    tokens: npt.NDArray[np.int64]
    text_bytes: npt.NDArray[np.int64]

    @property
    def documents(self) -> int:
        """How many documents were measured."""
        return len(self.nats)

    @property
    def nats_per_token(self) -> float:
        """Mean loss, weighted by tokens."""
        return float(self.nats.sum() / self.tokens.sum())

    @property
    def bits_per_byte(self) -> float:
        """Mean loss in bits per byte: comparable across tokenizers."""
        return float(self.nats.sum() / np.log(2) / self.text_bytes.sum())


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and its two-sided confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Resampling:
    """How an interval is computed; the same plan gives the same interval on every machine."""

    resamples: int = 2000
    confidence: float = 0.95
    seed: int = 0


def paired_gain(before: Losses, after: Losses, plan: Resampling | None = None) -> Interval:
    """How many nats per token `after` saves against `before`; positive is better.

    Args:
        before: Loss without the change.
        after: Loss of the same documents with it.
        plan: Resamples, confidence and seed.

    Raises:
        RejectedError: AG-EVA-001 if there is no document, AG-EVA-002 if a loss is not finite.
    """
    _check_pair(before, after)
    return _ratio(before.nats - after.nats, before.tokens.astype(np.float64), plan)


def paired_bits(before: Losses, after: Losses, plan: Resampling | None = None) -> Interval:
    """How many bits per byte `after` saves: comparable across tokenizers; positive is better.

    Args:
        before: Loss without the change.
        after: Loss of the same documents with it.
        plan: Resamples, confidence and seed.

    Raises:
        RejectedError: As `paired_gain`.
    """
    _check_pair(before, after)
    saved = (before.nats - after.nats) / np.log(2)
    return _ratio(saved, before.text_bytes.astype(np.float64), plan)


def paired_recovery(
    before: Losses, after: Losses, oracle: Losses, plan: Resampling | None = None
) -> Interval:
    """What share of the oracle's gain `after` has; 1 is all of it, below 0 is harm.

    The interval means little where the oracle's own gain is not certain.

    Args:
        before: Loss without any change.
        after: Loss of the same documents with the change.
        oracle: Loss of the same documents with the best that was possible.
        plan: Resamples, confidence and seed.

    Raises:
        RejectedError: As `paired_gain`.
    """
    _check_pair(before, after)
    _check_pair(before, oracle)
    return _ratio(before.nats - after.nats, before.nats - oracle.nats, plan)


def mean_interval(values: npt.NDArray[np.float64], plan: Resampling | None = None) -> Interval:
    """The mean of one value per document, with its interval."""
    return _ratio(values, np.ones_like(values), plan)


def _check_pair(before: Losses, after: Losses) -> None:
    if before.documents == 0:
        raise RejectedError("AG-EVA-001", "no document was measured")
    if not np.array_equal(before.tokens, after.tokens):
        raise ValueError("the two measurements are not of the same documents")
    if not (np.isfinite(before.nats).all() and np.isfinite(after.nats).all()):
        raise RejectedError("AG-EVA-002", "a document has a loss that is not a finite number")


def _ratio(
    effect: npt.NDArray[np.float64], weight: npt.NDArray[np.float64], plan: Resampling | None
) -> Interval:
    """A ratio of sums over documents, with its interval."""
    plan = plan or Resampling()
    drawn = _resample(effect, weight, plan)
    tail = (1.0 - plan.confidence) / 2.0
    low, high = np.quantile(drawn, [tail, 1.0 - tail])
    return Interval(float(effect.sum() / weight.sum()), float(low), float(high))


def _resample(
    effect: npt.NDArray[np.float64], weight: npt.NDArray[np.float64], plan: Resampling
) -> npt.NDArray[np.float64]:
    generator = np.random.Generator(np.random.PCG64(plan.seed))
    count = len(effect)
    effects = []
    for start in range(0, plan.resamples, _BLOCK):
        size = min(_BLOCK, plan.resamples - start)
        drawn = generator.integers(0, count, size=(size, count))
        effects.append(effect[drawn].sum(axis=1) / weight[drawn].sum(axis=1))
    return np.concatenate(effects)
