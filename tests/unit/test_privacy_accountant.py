# SPDX-License-Identifier: Apache-2.0
"""What a run costs, against an independent computation and two other accountants."""

import importlib.util
import math
import subprocess
import sys

import pytest

from allograft.errors import RejectedError
from allograft.privacy import accountant
from allograft.privacy.accountant import (
    ORDERS,
    DpEvent,
    epsilon_at,
    epsilon_by_pld,
    epsilon_by_rdp,
    event_of,
    gaussian_mu,
    propose_noise,
    rdp_cap,
    rdp_of,
    true_positive_bound,
)
from allograft.privacy.dp import DpConstants

DELTA = 1e-6
GRID = [
    (q, sigma, steps)
    for q in (0.001, 0.01, 0.1)
    for sigma in (0.5, 0.8, 1.1, 4.0)
    for steps in (300, 5000)
]
EXAMPLE = DpEvent(0.01, 0.8, 1000)


def independent_rdp(q: float, sigma: float, steps: int, order: int) -> float:
    """RDP of the Poisson-sampled Gaussian at an integer order, from the definition.

    The mean over N(0, s²) of ((1-q) + q·e^((2x-1)/2s²))^order, expanded by the binomial theorem
    (Mironov, Talwar and Zhang, arXiv 1908.10530, section 3.3).
    """
    terms = []
    for k in range(order + 1):
        term = math.lgamma(order + 1) - math.lgamma(k + 1) - math.lgamma(order - k + 1)
        if k:
            term += k * math.log(q)
        if order - k:
            term += (order - k) * math.log1p(-q)
        terms.append(term + k * (k - 1) / (2 * sigma**2))
    largest = max(terms)
    total = largest + math.log(math.fsum(math.exp(term - largest) for term in terms))
    return steps * total / (order - 1)


def independent_epsilon(q: float, sigma: float, steps: int, delta: float) -> float:
    """ε by RDP over integer orders 2 to 63 (arXiv 2004.00010, proposition 12)."""
    best = math.inf
    for order in range(2, 64):
        rdp = independent_rdp(q, sigma, steps, order)
        loss = math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)
        best = min(best, rdp + loss)
    return max(0.0, best)


def test_loading_the_module_loads_no_accountant() -> None:
    program = (
        "import sys, allograft.privacy.accountant; "
        "print([name for name in ('dp_accounting', 'scipy', 'torch') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.stdout.strip() == "[]", found.stderr


@pytest.mark.parametrize(("q", "sigma", "steps"), GRID)
def test_agrees_with_an_independent_computation_at_every_order(q, sigma, steps) -> None:
    found = rdp_of(DpEvent(q, sigma, steps))
    expected = [independent_rdp(q, sigma, steps, order) for order in ORDERS]
    # Where q is tiny, 1 + x loses digits in every implementation: an absolute floor of 1e-9 nats.
    assert found == pytest.approx(expected, rel=1e-6, abs=steps * 1e-12)


@pytest.mark.parametrize(("q", "sigma", "steps"), GRID)
def test_epsilon_agrees_with_an_independent_computation(q, sigma, steps) -> None:
    event = DpEvent(q, sigma, steps)
    orders = range(2, 64)
    at_integers = min(
        epsilon_at(rdp, DELTA, order)
        for order, rdp in zip(orders, rdp_of(event, tuple(orders)), strict=True)
    )
    assert at_integers == pytest.approx(independent_epsilon(q, sigma, steps, DELTA), rel=0.01)
    # Ours also tries fractions, so it may be lower; opacus checks those below.
    assert epsilon_by_rdp([event], DELTA) <= at_integers * 1.01


@pytest.mark.parametrize(("q", "sigma", "steps"), GRID)
def test_agrees_with_the_accountant_of_opacus(q, sigma, steps) -> None:
    # By its path: the package would load torch.
    package = importlib.util.find_spec("opacus")
    assert package is not None
    assert package.submodule_search_locations
    path = f"{package.submodule_search_locations[0]}/accountants/analysis/rdp.py"
    spec = importlib.util.spec_from_file_location("opacus_rdp", path)
    assert spec is not None
    assert spec.loader is not None
    opacus = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(opacus)
    event = DpEvent(q, sigma, steps)
    theirs = opacus.compute_rdp(q=q, noise_multiplier=sigma, steps=steps, orders=list(ORDERS))
    assert rdp_of(event) == pytest.approx(list(theirs), rel=0.01, abs=steps * 1e-12)
    # At fractions dp-accounting only bounds from above what opacus sums up (2.2 times it at order
    # 1.2, rate 0.1): on the safe side, and a reason for whole orders in the ledger.
    fractions = [1.2, 1.5, 2.5, 3.3, 5.5]
    theirs = opacus.compute_rdp(q=q, noise_multiplier=sigma, steps=steps, orders=fractions)
    for ours, other in zip(rdp_of(event, fractions), theirs, strict=True):
        assert ours >= other * (1 - 1e-6)


@pytest.mark.parametrize(
    ("q", "sigma", "steps"), [(0.01, 0.8, 1000), (0.02, 1.1, 500), (0.005, 1.0, 300)]
)
def test_lies_between_or_above_the_bounds_of_a_third_accountant(q, sigma, steps) -> None:
    import prv_accountant

    mechanism = prv_accountant.PoissonSubsampledGaussianMechanism(
        sampling_probability=q, noise_multiplier=sigma
    )
    third = prv_accountant.PRVAccountant(
        prvs=[mechanism], max_self_compositions=[steps], eps_error=0.05, delta_error=DELTA / 1000
    )
    low, _, high = third.compute_epsilon(delta=DELTA, num_self_compositions=[steps])
    event = DpEvent(q, sigma, steps)
    assert low <= epsilon_by_pld([event], DELTA) <= high
    # RDP is an upper bound: 16 % looser at epsilon 4, 77 % at 0.7 (measured).
    assert low <= epsilon_by_rdp([event], DELTA) <= 2 * high


@pytest.mark.parametrize(
    ("count", "by_rdp", "by_pld"), [(1, 4.29, 3.71), (2, 5.53, 4.95), (4, 7.53, 6.88)]
)
def test_runs_on_the_same_people_add_up_as_measured_before(count, by_rdp, by_pld) -> None:
    assert epsilon_by_rdp([EXAMPLE] * count, DELTA) == pytest.approx(by_rdp, abs=0.006)
    assert epsilon_by_pld([EXAMPLE] * count, DELTA) == pytest.approx(by_pld, abs=0.006)


def test_different_runs_add_up_at_every_order() -> None:
    other = DpEvent(0.02, 1.1, 500)
    both = epsilon_by_rdp([EXAMPLE, other], DELTA)
    at_orders = [
        epsilon_at(a + b, DELTA, order)
        for a, b, order in zip(rdp_of(EXAMPLE), rdp_of(other), ORDERS, strict=True)
    ]
    assert max(epsilon_by_rdp([run], DELTA) for run in (EXAMPLE, other)) < both
    assert both <= min(at_orders)


def test_an_order_alone_is_where_dp_accounting_has_it() -> None:
    """The contract with dp-accounting: `rdp` is public, in the order of the orders given."""
    from dp_accounting import rdp

    assert isinstance(rdp.RdpAccountant.rdp, property)
    assert rdp_of(EXAMPLE, (64, 4)) == (rdp_of(EXAMPLE, (64,)) + rdp_of(EXAMPLE, (4,)))


def test_the_cap_is_what_the_notes_computed_and_inverts_the_conversion() -> None:
    assert rdp_cap(8, 1e-6, 4) == pytest.approx(4.145, abs=1e-3)
    assert epsilon_at(rdp_cap(8, 1e-6, 4), 1e-6, 4) == pytest.approx(8)
    assert epsilon_at(0.0, 1e-6, 4) == 0.0
    (spent,) = rdp_of(EXAMPLE, (4,))
    from dp_accounting import rdp

    assert epsilon_at(spent, DELTA, 4) == pytest.approx(rdp.compute_epsilon([4], [spent], DELTA)[0])


@pytest.mark.parametrize(
    ("epsilon", "delta", "order"),
    [(0, 1e-6, 4), (math.nan, 1e-6, 4), (101, 1e-6, 4), (8, 0, 4), (8, 0.1, 4), (8, 1e-6, 1),
     (1, 1e-6, 4), (8, math.nan, 4), (8, 1e-6, 1e9)],
)  # fmt: skip
def test_refuses_a_cap_that_promises_nothing_or_admits_nothing(epsilon, delta, order) -> None:
    with pytest.raises(RejectedError, match="AG-PRV-061"):
        rdp_cap(epsilon, delta, order)


@pytest.mark.parametrize("target", [0.5, 1.0, 3.0, 8.0])
@pytest.mark.parametrize(("q", "steps"), [(0.01, 1000), (0.1, 200), (0.001, 10_000)])
def test_proposed_noise_keeps_the_promise_and_hardly_more(target, q, steps) -> None:
    noise = propose_noise(target, DELTA, q, steps)
    assert float(f"{noise:.3g}") == noise
    assert epsilon_by_rdp([DpEvent(q, noise, steps)], DELTA) <= target
    if noise > 0.31:
        assert epsilon_by_rdp([DpEvent(q, noise * 0.985, steps)], DELTA) > target


def test_refuses_to_propose_noise_that_does_not_exist() -> None:
    with pytest.raises(RejectedError, match="AG-PRV-055"):
        propose_noise(1e-6, DELTA, 0.5, 1_000_000)
    with pytest.raises(RejectedError, match="AG-PRV-050"):
        propose_noise(1.0, DELTA, 0.0, 10)


@pytest.mark.parametrize(
    ("value", "up"), [(0.8001, 0.801), (0.8, 0.8), (9.991, 10.0), (123.4, 124)]
)
def test_rounds_up_to_three_digits(value, up) -> None:
    assert accountant._round_up(value) == up


def test_the_recognition_bound_is_the_region_of_the_guarantee() -> None:
    assert true_positive_bound(0, 1e-6) == pytest.approx(0.01, abs=1e-5)
    assert true_positive_bound(1, 1e-6) == pytest.approx(math.e * 0.01, abs=1e-5)
    assert true_positive_bound(8, 1e-6) == pytest.approx(1 - math.exp(-8) * 0.99, abs=1e-6)
    assert true_positive_bound(1e6, 1e-6) == 1.0


def test_mu_gives_back_the_point_it_was_made_from() -> None:
    # The Gaussian mechanism with noise 1/mu is mu-GDP (arXiv 1905.02383).
    from dp_accounting.gaussian_mechanism import get_sigma_gaussian

    for epsilon in (0.5, 1.0, 4.0, 8.0):
        sigma = get_sigma_gaussian(epsilon, DELTA)
        assert gaussian_mu(epsilon, DELTA) == pytest.approx(1 / sigma, rel=1e-3)


def test_an_event_survives_its_json() -> None:
    assert DpEvent.from_json(EXAMPLE.to_json()) == EXAMPLE
    constants = DpConstants(0.01, 0.8, 1000, 0.5, 10.0, 1e-6, 4)
    assert event_of(constants) == EXAMPLE
    assert rdp_of(constants) == rdp_of(EXAMPLE)


@pytest.mark.parametrize(
    "change",
    [{"version": 2}, {"relation": "replace_one"}, {"unit": "record"}, {"event": "composed"},
     {"extra": 1}, {"count": 0}, {"count": 2_000_000},
     {"of": {"event": "without_replacement", "probability": 0.1,
             "of": {"event": "gaussian", "noise_multiplier": 1.0}}},
     {"of": {"event": "poisson_sampled", "probability": 1.5,
             "of": {"event": "gaussian", "noise_multiplier": 1.0}}}],
)  # fmt: skip
def test_refuses_an_event_that_is_not_accounted(change) -> None:
    with pytest.raises(RejectedError, match=r"AG-IN-003|AG-PRV-050"):
        DpEvent.from_json({**EXAMPLE.to_json(), **change})
