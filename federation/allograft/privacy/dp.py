# SPDX-License-Identifier: Apache-2.0
"""The constants of a differentially private run, fixed in public before the data is opened.

The unit is a person: all of a person's records together, of which at most so many windows are
used. Two populations are neighbours if one has one person more. Free of tensor libraries.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from allograft.crypto import canonical
from allograft.errors import RejectedError

#: A constant may have so many significant digits. What follows from the size of a data set needs
#: more, so a plan cannot carry it (Opacus issue 819: q = batch / N tells N apart from N + 1).
SIGNIFICANT_DIGITS = 3

#: Within these a clip norm, and the noise that it scales, are neither lost nor infinite in float32.
CLIP_NORMS = (1e-6, 1e6)

#: People in a step; more than live. Numbers beyond 2**53 are no JSON integers either.
_MOST_DIVISOR = 1e10

_FIELDS = (
    "sampling_rate", "noise_multiplier", "steps", "clip_norm", "divisor", "delta",
    "windows_per_person",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class DpConstants:
    """What a run of the Gaussian mechanism with Poisson sampling is fixed by.

    Attributes:
        sampling_rate: Chance of each person to be in a step, drawn independently.
        noise_multiplier: Standard deviation of the noise, in units of `clip_norm`.
        steps: Updates of the weights; all of them are taken.
        clip_norm: Largest L2 norm of one person's gradient.
        divisor: What every noisy sum is divided by, also when nobody was drawn.
        delta: The δ at which ε is told.
        windows_per_person: Most windows of one person that are ever used.
    """

    sampling_rate: float
    noise_multiplier: float
    steps: int
    clip_norm: float
    divisor: float
    delta: float
    windows_per_person: int

    def check(self) -> DpConstants:
        """Return itself if it can be run.

        Raises:
            RejectedError: AG-PRV-050 for a constant out of range, AG-PRV-051 for one with more
                digits than a public constant has.
        """
        # Written so that NaN refuses.
        in_range = (
            0 < self.sampling_rate <= 0.5
            and 0.3 <= self.noise_multiplier <= 1000
            and 1 <= self.steps <= 1_000_000
            and CLIP_NORMS[0] <= self.clip_norm <= CLIP_NORMS[1]
            and 1 <= self.divisor <= _MOST_DIVISOR
            and 0 < self.delta <= 1e-3
            and 1 <= self.windows_per_person <= 1000
        )
        if not in_range:
            raise RejectedError("AG-PRV-050", "a constant is out of range")
        for name in _FIELDS:
            value = getattr(self, name)
            if float(f"{value:.{SIGNIFICANT_DIGITS}g}") != value:
                raise RejectedError("AG-PRV-051", f"{name} has more than three significant digits")
        return self

    def to_json(self) -> dict[str, canonical.Json]:
        """The constants as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: canonical.Json) -> DpConstants:
        """Read constants.

        Raises:
            RejectedError: AG-IN-003 if malformed, AG-PRV-050 or -051 if unusable.
        """
        fields = canonical.as_object(value, set(_FIELDS))
        return cls(
            sampling_rate=canonical.as_number(fields["sampling_rate"]),
            noise_multiplier=canonical.as_number(fields["noise_multiplier"]),
            steps=canonical.as_int(fields["steps"]),
            clip_norm=canonical.as_number(fields["clip_norm"]),
            divisor=canonical.as_number(fields["divisor"]),
            delta=canonical.as_number(fields["delta"]),
            windows_per_person=canonical.as_int(fields["windows_per_person"]),
        ).check()
