# SPDX-License-Identifier: Apache-2.0
"""The private step: a noisy sum of clipped gradients, one gradient for each person drawn.

DP-SGD (Abadi et al. 2016, arXiv 1607.00133) with the person as unit (user-level sampling, arXiv
2407.07737): every person is drawn by a coin of its own, contributes one gradient of norm at most
C, and the sum gets Gaussian noise of standard deviation sigma C before anything else sees it.

One forward and backward pass per person, instead of hooks for per-row gradients: it is the only way
that works with gradient checkpointing, tied weights, every kind of layer and several records of
one person at once (measured: 1.1 to 1.5 times the plain step on a CPU at 128 tokens).

Invariant: what leaves `fill` differs between neighbouring populations by at most C before noise.
Nobody drawn, or a gradient that is not finite, gives the same kind of step as any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from allograft.crypto.stream import SecureStream
from allograft.errors import RejectedError
from allograft.privacy.dp import DpConstants
from allograft.privacy.noise import RandomBytes, draw_normals, draw_persons

#: Up to so many parameters noise comes from ChaCha20. Measured: 18 million normals per second of a
#: processor, so a LoRA of 40 million over 1,000 steps takes 40 minutes, and an organ of 872 million
#: would take 13 hours.
SECURE_NOISE_PARAMETERS = 64_000_000

#: The clip factor is rounded down by so much, so that rounding never lets a norm exceed C.
_MARGIN = 1e-6

_TOLERANCE = 1e-4  # of the clip norm: float32 sums of a few gradients
_NOISE_SAMPLE = 50_000

#: A person's number to its loss (a scalar that can be differentiated).
PersonLoss = Callable[[int], torch.Tensor]


@dataclass(frozen=True, slots=True)
class SelfTest:
    """What `check_step` found, for the site alone: the figures depend on its data.

    Attributes:
        sensitivity: How far one more person moved the sum, in units of the clip norm.
        planted: The same with a planted defect.
        noise_deviation: Standard deviation of a sample of the noise, in units of sigma C.
    """

    sensitivity: float
    planted: float
    noise_deviation: float


class Noise(Protocol):
    """Standard normals in the shape of a tensor."""

    name: str

    def like(self, value: torch.Tensor) -> torch.Tensor:
        """Fresh normals of a tensor's shape, float32, on its device."""


class SecureNoise:
    """Noise from a cryptographic generator."""

    name = "chacha20"

    def __init__(self, random_bytes: RandomBytes) -> None:
        self._random_bytes = random_bytes

    def like(self, value: torch.Tensor) -> torch.Tensor:
        """Fresh normals of a tensor's shape, float32, on its device."""
        normals = torch.from_numpy(draw_normals(value.numel(), self._random_bytes))
        return normals.view(value.shape).to(value.device)


class SeededNoise:
    """Noise from torch's own generator, seeded by the operating system for every tensor.

    Neither Mersenne twister (CPU) nor Philox (CUDA) is cryptographic: a weaker assumption, which
    the dossier states.
    """

    name = "os-seeded-prng"

    def __init__(self, random_bytes: RandomBytes) -> None:
        self._random_bytes = random_bytes

    def like(self, value: torch.Tensor) -> torch.Tensor:
        """Fresh normals of a tensor's shape, float32, on its device."""
        generator = torch.Generator(value.device)
        generator.manual_seed(int.from_bytes(self._random_bytes(8), "little") >> 1)
        return torch.randn(
            value.shape, generator=generator, dtype=torch.float32, device=value.device
        )


def choose_noise(parameters: int, random_bytes: RandomBytes) -> Noise:
    """The noise that a run of so many parameters can afford."""
    secure = parameters <= SECURE_NOISE_PARAMETERS
    return SecureNoise(random_bytes) if secure else SeededNoise(random_bytes)


class PrivateGradient:
    """Fills the gradients of some parameters for one step after another.

    Args:
        parameters: What learns, float32; nothing else receives a gradient.
        constants: The public constants of the run.
        persons: How many persons there are.
        loss_of: The loss of one person, over all of its windows.
        random_bytes: Where coins and noise come from; the default is the only sound choice.
        noise: Where noise comes from, if not chosen by size.
    """

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        constants: DpConstants,
        persons: int,
        loss_of: PersonLoss,
        random_bytes: RandomBytes | None = None,
        noise: Noise | None = None,
    ) -> None:
        self._random_bytes = random_bytes or SecureStream().read
        self._parameters = list(parameters)
        self._constants = constants.check()
        self._persons = persons
        self._loss_of = loss_of
        size = sum(parameter.numel() for parameter in self._parameters)
        self.noise = noise or choose_noise(size, self._random_bytes)
        self._sums = [torch.zeros_like(p, dtype=torch.float32) for p in self._parameters]

    def fill(self) -> float:
        """Draw persons, and set every parameter's gradient to their noisy, divided sum.

        Returns:
            The mean loss of who was drawn, NaN if nobody was. It is not private: it is for the
            site's own progress bar and must not leave.
        """
        drawn = draw_persons(self._persons, self._constants.sampling_rate, self._random_bytes)
        losses = [loss for person in drawn if math.isfinite(loss := self._add(int(person)))]
        deviation = self._constants.noise_multiplier * self._constants.clip_norm
        for parameter, total in zip(self._parameters, self._sums, strict=True):
            noisy = total.add_(self.noise.like(total), alpha=deviation)
            parameter.grad = noisy.div(self._constants.divisor)
            total.zero_()
        return math.fsum(losses) / len(losses) if losses else math.nan

    def sum_clipped(self, persons: Sequence[int]) -> list[torch.Tensor]:
        """The clipped sum of some persons, without noise: for self-tests, never for training."""
        for person in persons:
            self._add(person)
        sums = [total.clone() for total in self._sums]
        for total in self._sums:
            total.zero_()
        return sums

    def _add(self, person: int) -> float:
        """Add one person's clipped gradient to the sums; returns its loss."""
        loss = self._loss_of(person)
        # Asked for explicitly: a parameter that took no part has a gradient of zero, not an error.
        gradients = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        norm = _norm([gradient for gradient in gradients if gradient is not None])
        if math.isfinite(norm):
            # A record that overflows contributes nothing. An exception would tell of its presence,
            # and its NaN would destroy the weights.
            factor = self._factor(norm)
            for total, gradient in zip(self._sums, gradients, strict=True):
                if gradient is not None:
                    total.add_(gradient, alpha=factor)
        return float(loss.detach())

    def _factor(self, norm: float) -> float:
        """What a gradient of a norm is multiplied with, so that its norm is at most C."""
        return min(1.0, self._constants.clip_norm / (norm * (1 + _MARGIN) + 1e-12))


class _UnclippedGradient(PrivateGradient):
    """A step with a planted defect; a self-test that does not catch it proves nothing."""

    def _factor(self, norm: float) -> float:
        return 1.0


def check_step(
    parameters: Sequence[torch.nn.Parameter],
    constants: DpConstants,
    persons: int,
    loss_of: PersonLoss,
    random_bytes: RandomBytes | None = None,
) -> SelfTest:
    """Try the private step on this model and these persons before it is relied on.

    A correct step must pass and one with a planted defect must not. The clip norm of the test is a
    tenth of a real gradient's norm, because a clip that never acts would hide its absence.

    Raises:
        RejectedError: AG-PRV-080 if the step is not private, or if the test could not have told.
    """
    random_bytes = random_bytes or SecureStream().read
    coins = draw_persons(persons, min(1.0, 8 / persons), random_bytes)
    chosen = [int(person) for person in coins[:8]] or [0]
    *population, extra = chosen
    probe = PrivateGradient(parameters, constants, persons, loss_of, random_bytes)
    free = _UnclippedGradient(parameters, constants, persons, loss_of, random_bytes)
    norm = _norm(free.sum_clipped([extra]))
    if not norm > 0:
        raise RejectedError("AG-PRV-080", "the self-test's person has no gradient to clip")
    tested = replace(constants, clip_norm=float(f"{norm / 10:.2g}"))
    step = PrivateGradient(parameters, tested, persons, loss_of, random_bytes, probe.noise)
    planted = _UnclippedGradient(parameters, tested, persons, loss_of, random_bytes, probe.noise)
    found = measure_sensitivity(step, population, extra) / tested.clip_norm
    caught = measure_sensitivity(planted, population, extra) / tested.clip_norm
    if not found <= 1 + _TOLERANCE:
        raise RejectedError("AG-PRV-080", f"one person moves the sum by {found:.4f} of the clip")
    if not caught > 1 + _TOLERANCE:
        raise RejectedError("AG-PRV-080", "a planted defect was not noticed")
    deviation = _check_noise(probe.noise, parameters[0].device)
    return SelfTest(found, caught, deviation)


def _check_noise(noise: Noise, device: torch.device) -> float:
    """The standard deviation of a sample of the noise, which must be 1, and fresh each time."""
    shape = torch.empty(_NOISE_SAMPLE, device=device)
    first, second = noise.like(shape), noise.like(shape)
    deviation = float(torch.cat([first, second]).double().std())
    # Six standard errors: a correct source fails once in 500 million runs.
    if abs(deviation - 1) > 6 / math.sqrt(4 * _NOISE_SAMPLE) or bool((first == second).all()):
        raise RejectedError("AG-PRV-080", f"the noise has a deviation of {deviation:.4f}, not 1")
    return deviation


def measure_sensitivity(gradient: PrivateGradient, population: Sequence[int], extra: int) -> float:
    """How far one more person moves the sum before noise; at most C if the step is correct.

    The replay on a neighbouring population of Cebere et al. (PETS 2026, arXiv 2602.17454).

    Args:
        gradient: The step under test.
        population: Persons of the smaller population.
        extra: The person that the larger one has besides.
    """
    without = gradient.sum_clipped(population)
    with_extra = gradient.sum_clipped([*population, extra])
    return _norm([b - a for a, b in zip(without, with_extra, strict=True)])


def _norm(tensors: Sequence[torch.Tensor]) -> float:
    """The L2 norm over several tensors, summed in double precision, with one wait for a GPU."""
    if not tensors:
        return 0.0
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors]
    return float(torch.stack(norms).square().sum().sqrt())
