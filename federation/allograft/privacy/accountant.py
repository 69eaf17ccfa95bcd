# SPDX-License-Identifier: Apache-2.0
"""What a differentially private run costs: RDP, ε, and what they mean to a person.

The arithmetic is dp-accounting's (0.6), loaded when first needed: it takes two seconds and lives in
the extra `site`. Every run is `SelfComposed(PoissonSampled(q, Gaussian(s)), steps)` under the
relation "add or remove one person". Three figures are kept apart, because they promise differently:

- *RDP at one order fixed beforehand* adds up over runs that were chosen after seeing earlier ones
  (fully adaptive composition; Feldman and Zrnic 2020, arXiv 2008.11193). The ledger enforces it.
- *ε by RDP* at the best order is what a plan claims for its own run.
- *ε by PLD* is tighter, by 8 to 16 % at ε 4 to 10 (measured), and holds only if all runs were fixed
  beforehand: stopping by it is no valid filter. It is shown, never enforced, and labelled
  `non-adaptive`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from typing import Any, Protocol

from allograft.crypto import canonical
from allograft.errors import RejectedError
from allograft.privacy.dp import DpConstants

#: Orders of the RDP vector in every ledger entry. Integers, because only there is the RDP of the
#: sampled Gaussian a finite sum: always finite, and the same from every accountant.
ORDERS: tuple[int, ...] = (2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64, 128)

#: What an ε by PLD must be shown with.
NON_ADAPTIVE = "non-adaptive"


def describe_accountant() -> str:
    """What computes ε here, with its version, as claims name it."""
    return f"dp-accounting {version('dp-accounting')} rdp"


_DIGITS = 3  # of a proposed constant; see dp.SIGNIFICANT_DIGITS
_NOISE_RANGE = (0.3, 1000.0)  # what dp.DpConstants admits
_EVENT_VERSION = 1
_RELATION = "add_or_remove_one"
_UNIT = "person"


class SampledGaussian(Protocol):
    """What is accounted: `DpConstants` and `DpEvent` both are."""

    @property
    def sampling_rate(self) -> float:
        """Chance of each person to be in a step."""

    @property
    def noise_multiplier(self) -> float:
        """Standard deviation of the noise, in units of one person's largest contribution."""

    @property
    def steps(self) -> int:
        """How often."""


@dataclass(frozen=True, slots=True)
class DpEvent:
    """One accounted run.

    Attributes:
        sampling_rate: Chance of each person to be in a step, drawn independently; 1 for a
            statistic over everybody.
        noise_multiplier: Standard deviation of the noise, in units of the largest L2 contribution
            of one person.
        steps: How often.
    """

    sampling_rate: float
    noise_multiplier: float
    steps: int

    def check(self) -> DpEvent:
        """Return itself if it can be accounted.

        Raises:
            RejectedError: AG-PRV-050.
        """
        # Written so that NaN refuses.
        in_range = (
            0 < self.sampling_rate <= 1
            and _NOISE_RANGE[0] <= self.noise_multiplier <= _NOISE_RANGE[1]
            and 1 <= self.steps <= 1_000_000
        )
        if not in_range:
            raise RejectedError("AG-PRV-050", "an event's rate, noise or steps are out of range")
        return self

    def to_json(self) -> dict[str, canonical.Json]:
        """The event in the schema of protos/spec/ledger.md, nested as dp-accounting nests it."""
        return {
            "version": _EVENT_VERSION,
            "unit": _UNIT,
            "relation": _RELATION,
            "event": "self_composed",
            "count": self.steps,
            "of": {
                "event": "poisson_sampled",
                "probability": self.sampling_rate,
                "of": {"event": "gaussian", "noise_multiplier": self.noise_multiplier},
            },
        }

    @classmethod
    def from_json(cls, value: canonical.Json) -> DpEvent:
        """Read an event.

        Raises:
            RejectedError: AG-IN-003 if malformed or of another version, AG-PRV-050 if unusable.
        """
        composed = canonical.as_object(
            value, {"version", "unit", "relation", "event", "count", "of"}
        )
        sampled = canonical.as_object(composed["of"], {"event", "probability", "of"})
        gaussian = canonical.as_object(sampled["of"], {"event", "noise_multiplier"})
        found = (
            canonical.as_int(composed["version"]), composed["unit"], composed["relation"],
            composed["event"], sampled["event"], gaussian["event"],
        )  # fmt: skip
        if found != (
            _EVENT_VERSION, _UNIT, _RELATION, "self_composed", "poisson_sampled", "gaussian",
        ):  # fmt: skip
            raise RejectedError("AG-IN-003", "an event of a kind or version that is not accounted")
        return cls(
            sampling_rate=canonical.as_number(sampled["probability"]),
            noise_multiplier=canonical.as_number(gaussian["noise_multiplier"]),
            steps=canonical.as_int(composed["count"]),
        ).check()


def event_of(run: SampledGaussian) -> DpEvent:
    """The accounted event of a run.

    Raises:
        RejectedError: AG-PRV-050.
    """
    return DpEvent(run.sampling_rate, run.noise_multiplier, run.steps).check()


def rdp_of(run: SampledGaussian, orders: Sequence[float] = ORDERS) -> tuple[float, ...]:
    """The Rényi divergence (nats) that a run spends, at each order.

    Raises:
        RejectedError: AG-PRV-050.
    """
    return _rdp(event_of(run), tuple(float(order) for order in orders))


def epsilon_by_rdp(runs: Sequence[SampledGaussian], delta: float) -> float:
    """The ε of all runs together at δ, by RDP at the best of dp-accounting's 156 orders.

    Raises:
        RejectedError: AG-PRV-050.
    """
    _check_delta(delta)
    return _epsilon_by_rdp(_merge(runs), delta)


def epsilon_of(constants: DpConstants) -> float:
    """The ε of one run at the δ that its own constants name, by RDP.

    Raises:
        RejectedError: AG-PRV-050.
    """
    return epsilon_by_rdp([constants], constants.delta)


def epsilon_by_pld(runs: Sequence[SampledGaussian], delta: float) -> float:
    """The ε of all runs together at δ, by privacy loss distributions; for information only.

    Holds only if every run was fixed before the first one began: show it with `NON_ADAPTIVE`.
    Takes about 1.5 s for each different event (measured).

    Raises:
        RejectedError: AG-PRV-050.
    """
    _check_delta(delta)
    return _epsilon_by_pld(_merge(runs), delta)


def rdp_cap(epsilon_max: float, delta_max: float, order: float) -> float:
    """The RDP at `order` that keeps (ε_max, δ_max), in nats.

    With a the order, r = ε + ln(a/(a-1)) + (ln δ + ln a)/(a-1): the conversion of Canonne, Kamath
    and Steinke (2020, arXiv 2004.00010, proposition 12) solved for r.

    Raises:
        RejectedError: AG-PRV-061 if a figure is out of range or nothing could ever be spent.
    """
    # Written so that NaN refuses.
    if not (0 < epsilon_max <= 100 and 0 < delta_max <= 1e-3 and 1 < order <= ORDERS[-1]):
        raise RejectedError("AG-PRV-061", "epsilon, delta or the order is out of range")
    cap = epsilon_max - _conversion_loss(delta_max, order)
    if cap <= 0:
        raise RejectedError(
            "AG-PRV-061", f"epsilon {epsilon_max:g} at this delta leaves nothing at order {order:g}"
        )
    return cap


def epsilon_at(rdp: float, delta: float, order: float) -> float:
    """The ε that `rdp` nats at one order give at δ; the inverse of `rdp_cap`, 0 for nothing spent.

    Raises:
        RejectedError: AG-PRV-050.
    """
    _check_delta(delta)
    return max(0.0, rdp + _conversion_loss(delta, order)) if rdp > 0 else 0.0


def propose_noise(target_epsilon: float, delta: float, sampling_rate: float, steps: int) -> float:
    """The least noise multiplier of three digits whose ε by RDP does not exceed the target.

    Raises:
        RejectedError: AG-PRV-050 if an input is out of range, AG-PRV-055 if even the largest noise
            is too little.
    """
    _check_delta(delta)
    least, most = _NOISE_RANGE

    def meets(noise: float) -> bool:
        event = DpEvent(sampling_rate, noise, steps).check()
        return epsilon_by_rdp([event], delta) <= target_epsilon

    if not meets(most):
        raise RejectedError(
            "AG-PRV-055", f"no noise up to {most:g} reaches epsilon {target_epsilon:g}"
        )
    if meets(least):
        return least
    # Bisection in the logarithm: each step halves the number of digits still open.
    while most / least > 1.0001:
        middle = math.sqrt(least * most)
        least, most = (least, middle) if meets(middle) else (middle, most)
    # Up, never to nearest: the rounded constant must keep the promise too.
    noise = _round_up(least)
    return noise if meets(noise) else _round_up(most)


def true_positive_bound(epsilon: float, delta: float, false_positive_rate: float = 0.01) -> float:
    """The most of the true members that any attack recognises at a rate of false accusations.

    TPR ≤ min(e^ε·FPR + δ, 1 - e^-ε·(1 - δ - FPR)): the region of (ε, δ) for tests of one person's
    membership (Kairouz, Oh and Viswanath, ICML 2015, arXiv 1311.0776, theorem 2.1).

    Raises:
        RejectedError: AG-PRV-050.
    """
    _check_delta(delta)
    if not (epsilon >= 0 and 0 <= false_positive_rate <= 1):
        raise RejectedError("AG-PRV-050", "epsilon or the false positive rate is out of range")
    steep = math.exp(min(epsilon, 700.0)) * false_positive_rate + delta
    flat = 1 - math.exp(-epsilon) * (1 - delta - false_positive_rate)
    return max(0.0, min(1.0, steep, flat))


def gaussian_mu(epsilon: float, delta: float) -> float:
    """The μ of the Gaussian mechanism that has exactly this ε at this δ, for comparison only.

    Solves δ = Φ(-ε/μ + μ/2) - e^ε·Φ(-ε/μ - μ/2) (Dong, Roth and Su, arXiv 1905.02383, corollary
    1). It matches one point of the trade-off curve; a true μ-GDP bound would have to hold on all
    of it (arXiv 2503.10945), so nothing is gated by this figure.

    Raises:
        RejectedError: AG-PRV-050.
    """
    _check_delta(delta)
    if not 0 <= epsilon <= 700:
        raise RejectedError("AG-PRV-050", "epsilon is out of range")

    def delta_of(mu: float) -> float:
        return _normal_cdf(-epsilon / mu + mu / 2) - math.exp(epsilon) * _normal_cdf(
            -epsilon / mu - mu / 2
        )

    low, high = 1e-6, 100.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of(middle) < delta else (low, middle)
    return high


def _conversion_loss(delta: float, order: float) -> float:
    return math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)


def _check_delta(delta: float) -> None:
    if not 0 < delta <= 1e-3:
        raise RejectedError("AG-PRV-050", "delta is out of range")


def _round_up(value: float) -> float:
    rounded = float(f"{value:.{_DIGITS}g}")
    if rounded >= value:
        return rounded
    step = 10.0 ** (math.floor(math.log10(value)) - _DIGITS + 1)
    return float(f"{rounded + step:.{_DIGITS}g}")


def _normal_cdf(x: float) -> float:
    return math.erfc(-x / math.sqrt(2)) / 2


def _merge(runs: Sequence[SampledGaussian]) -> tuple[DpEvent, ...]:
    """The runs with equal mechanisms as one: their steps add up, and PLD costs per event."""
    steps: dict[tuple[float, float], int] = {}
    for run in runs:
        event = event_of(run)
        mechanism = (event.sampling_rate, event.noise_multiplier)
        steps[mechanism] = steps.get(mechanism, 0) + event.steps
    return tuple(DpEvent(q, sigma, count) for (q, sigma), count in sorted(steps.items()))


# --- dp-accounting, and nothing of it elsewhere ---


@lru_cache(maxsize=1024)
def _rdp(event: DpEvent, orders: tuple[float, ...]) -> tuple[float, ...]:
    from dp_accounting import rdp

    accountant = rdp.RdpAccountant(orders)
    accountant.compose(_reference_event(event))
    return tuple(float(value) for value in accountant.rdp)


@lru_cache(maxsize=64)
def _epsilon_by_rdp(events: tuple[DpEvent, ...], delta: float) -> float:
    from dp_accounting import rdp

    accountant = rdp.RdpAccountant()
    for event in events:
        accountant.compose(_reference_event(event))
    return float(accountant.get_epsilon(delta))


@lru_cache(maxsize=64)
def _epsilon_by_pld(events: tuple[DpEvent, ...], delta: float) -> float:
    from dp_accounting import pld

    accountant = pld.PLDAccountant()
    for event in events:
        accountant.compose(_reference_event(event))
    return float(accountant.get_epsilon(delta))


def _reference_event(event: DpEvent) -> Any:
    import dp_accounting

    # It tells on standard error when a fractional order does not converge and is left out. That
    # only makes ε larger, and a person who plans a run can do nothing about it.
    logging.getLogger("absl").setLevel(logging.ERROR)
    step = dp_accounting.PoissonSampledDpEvent(
        event.sampling_rate, dp_accounting.GaussianDpEvent(event.noise_multiplier)
    )
    return dp_accounting.SelfComposedDpEvent(step, event.steps)
