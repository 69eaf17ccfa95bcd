# SPDX-License-Identifier: Apache-2.0
"""The private step: a noisy sum of clipped gradients, one gradient for each person drawn.

DP-SGD (Abadi et al. 2016, arXiv 1607.00133) with the person as unit (user-level sampling, arXiv
2407.07737): every person is drawn by a coin of its own, contributes one gradient of norm at most
C, and the sum gets Gaussian noise of standard deviation sigma C before anything else sees it.

There are two ways to the clipped sum. `PersonLoop` makes one forward and backward pass per person:
it works with gradient checkpointing, tied weights and every kind of layer. `rowwise.RowwiseSum`
takes several persons at once and knows only some layers; it is held against the loop at each start.
At 128 tokens on a CPU it takes 1.1 to 1.2 times the plain step without noise, the loop 1.25 to 1.4;
of 32 windows of at most 40 tokens it takes half as long as the loop. Not measured on a GPU.

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
from allograft.privacy.dp import CLIP_NORMS, DpConstants
from allograft.privacy.noise import RandomBytes, draw_normals, draw_persons

#: Up to so many parameters noise comes from ChaCha20. Measured: 18 million normals per second of a
#: processor, so a LoRA of 40 million over 1,000 steps takes 40 minutes, and an organ of 872 million
#: would take 13 hours.
SECURE_NOISE_PARAMETERS = 64_000_000

#: The clip factor is rounded down by so much, so that rounding never lets a norm exceed C.
_MARGIN = 1e-6

_TOLERANCE = 1e-4  # of the clip norm: float32 sums of a few gradients
_NOISE_SAMPLE = 50_000

#: How far two ways to a sum may differ, in clip norms for each root of a person.
_DISAGREEMENT = 1e-3
#: The same in half precision, where other batch shapes round otherwise. Measured: 0.001 to 0.006 in
#: bfloat16 on a CPU; windows taken for persons are 0.4 apart, and forgotten gains 0.04.
_HALF_DISAGREEMENT = 0.02

#: A person's number to its loss (a scalar that can be differentiated).
PersonLoss = Callable[[int], torch.Tensor]

#: The norm of a person's gradient to what the gradient is multiplied with.
Factor = Callable[[float], float]


class ClippedSum(Protocol):
    """A way to the sum of persons' gradients, each multiplied with its own factor."""

    def add(
        self, persons: Sequence[int], factor: Factor, sums: Sequence[torch.Tensor]
    ) -> list[float]:
        """Add persons' gradients to the sums.

        A person whose norm is not finite adds nothing. An exception would tell of its presence,
        and its NaN would destroy the weights.

        Args:
            persons: Their numbers.
            factor: Asked once for each finite norm.
            sums: One float32 tensor per parameter, changed in place.

        Returns:
            The loss of each person, in any order; not private.
        """


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


class PersonLoop:
    """One forward and one backward pass for each person.

    Args:
        parameters: What learns, float32; nothing else receives a gradient.
        loss_of: The loss of one person, over all of its windows.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], loss_of: PersonLoss) -> None:
        self._parameters = list(parameters)
        self._loss_of = loss_of

    def add(
        self, persons: Sequence[int], factor: Factor, sums: Sequence[torch.Tensor]
    ) -> list[float]:
        """Add persons' gradients to the sums; see `ClippedSum`."""
        return [self._add(person, factor, sums) for person in persons]

    def _add(self, person: int, factor: Factor, sums: Sequence[torch.Tensor]) -> float:
        loss = self._loss_of(person)
        # Asked for explicitly: a parameter that took no part has a gradient of zero, not an error.
        gradients = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        norm = _norm([gradient for gradient in gradients if gradient is not None])
        if math.isfinite(norm):
            scale = factor(norm)
            for total, gradient in zip(sums, gradients, strict=True):
                if gradient is not None:
                    total.add_(gradient, alpha=scale)
        return float(loss.detach())


class PrivateGradient:
    """Fills the gradients of some parameters for one step after another.

    Args:
        parameters: What learns, float32; nothing else receives a gradient.
        constants: The public constants of the run.
        persons: How many persons there are.
        way: How their clipped sum is computed, over these parameters in this order.
        random_bytes: Where coins and noise come from; the default is the only sound choice.
        noise: Where noise comes from, if not chosen by size.
    """

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        constants: DpConstants,
        persons: int,
        way: ClippedSum,
        random_bytes: RandomBytes | None = None,
        noise: Noise | None = None,
    ) -> None:
        self._random_bytes = random_bytes or SecureStream().read
        self._parameters = list(parameters)
        self._constants = constants.check()
        self._persons = persons
        self._way = way
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
        told = self._way.add(drawn.tolist(), self._factor, self._sums)
        losses = [loss for loss in told if math.isfinite(loss)]
        deviation = self._constants.noise_multiplier * self._constants.clip_norm
        for parameter, total in zip(self._parameters, self._sums, strict=True):
            noisy = total.add_(self.noise.like(total), alpha=deviation)
            parameter.grad = noisy.div(self._constants.divisor)
            total.zero_()
        return math.fsum(losses) / len(losses) if losses else math.nan

    def sum_clipped(self, persons: Sequence[int]) -> list[torch.Tensor]:
        """The clipped sum of some persons, without noise: for self-tests, never for training."""
        self._way.add(persons, self._factor, self._sums)
        sums = [total.clone() for total in self._sums]
        for total in self._sums:
            total.zero_()
        return sums

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
    way: ClippedSum,
    random_bytes: RandomBytes | None = None,
) -> SelfTest:
    """Try the private step on this model and these persons before it is relied on.

    A correct step must pass and one with a planted defect must not. The clip norm of the test is a
    tenth of a real gradient's norm, because a clip that never acts would hide its absence.

    Raises:
        RejectedError: AG-PRV-080 if the step is not private, or if the test could not have told.
    """
    random_bytes = random_bytes or SecureStream().read
    *population, extra = _choose_persons(persons, random_bytes)
    probe = PrivateGradient(parameters, constants, persons, way, random_bytes)
    tested = _test_constants(parameters, constants, persons, way, extra)
    step = PrivateGradient(parameters, tested, persons, way, random_bytes, probe.noise)
    planted = _UnclippedGradient(parameters, tested, persons, way, random_bytes, probe.noise)
    found = measure_sensitivity(step, population, extra) / tested.clip_norm
    caught = measure_sensitivity(planted, population, extra) / tested.clip_norm
    if not found <= 1 + _TOLERANCE:
        raise RejectedError("AG-PRV-080", f"one person moves the sum by {found:.4f} of the clip")
    if not caught > 1 + _TOLERANCE:
        raise RejectedError("AG-PRV-080", "a planted defect was not noticed")
    deviation = _check_noise(probe.noise, parameters[0].device)
    return SelfTest(found, caught, deviation)


def check_agreement(
    parameters: Sequence[torch.nn.Parameter],
    constants: DpConstants,
    persons: int,
    ways: tuple[ClippedSum, ClippedSum],
    also: Sequence[int] = (),
    random_bytes: RandomBytes | None = None,
) -> float:
    """Compare the sums that two ways find for the same few persons.

    Args:
        parameters: What learns.
        constants: The public constants of the run.
        persons: How many persons there are.
        ways: The one to be relied on, and the one it is held against.
        also: Persons that must be among them, such as one with many windows.
        random_bytes: Where the others are drawn from.

    Returns:
        How far they are apart, in clip norms for each root of a person.

    Raises:
        RejectedError: AG-PRV-080 if they are apart, or if nothing was compared.
    """
    random_bytes = random_bytes or SecureStream().read
    chosen = [*_choose_persons(persons, random_bytes), *also]
    chosen = sorted(set(chosen))
    tested = _test_constants(parameters, constants, persons, ways[1], chosen[-1])
    first, second = (
        PrivateGradient(parameters, tested, persons, way, random_bytes).sum_clipped(chosen)
        for way in ways
    )
    apart = _norm([b - a for a, b in zip(first, second, strict=True)])
    apart /= tested.clip_norm * math.sqrt(len(chosen))
    exact = parameters[0].device.type == "cpu"
    if not apart <= (_DISAGREEMENT if exact else _HALF_DISAGREEMENT):
        raise RejectedError("AG-PRV-080", f"two ways to one sum are {apart:.4f} of the clip apart")
    return apart


def _choose_persons(persons: int, random_bytes: RandomBytes) -> list[int]:
    """Up to eight persons, by their own coins."""
    coins = draw_persons(persons, min(1.0, 8 / persons), random_bytes)
    return [int(person) for person in coins[:8]] or [0]


def _test_constants(
    parameters: Sequence[torch.nn.Parameter],
    constants: DpConstants,
    persons: int,
    way: ClippedSum,
    person: int,
) -> DpConstants:
    """The constants with a clip that certainly acts: a tenth of a person's norm, in its range."""
    free = _UnclippedGradient(parameters, constants, persons, way)
    norm = _norm(free.sum_clipped([person]))
    least, most = CLIP_NORMS
    clip_norm = min(max(float(f"{norm / 10:.2g}"), least), most)
    # Written so that NaN refuses.
    if not norm > clip_norm:
        raise RejectedError("AG-PRV-080", "the self-test's person has no gradient to clip")
    return replace(constants, clip_norm=clip_norm)


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
