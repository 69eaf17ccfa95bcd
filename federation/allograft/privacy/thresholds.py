# SPDX-License-Identifier: Apache-2.0
"""Where an audit stops a packet: versioned numbers, to be calibrated by each site.

The defaults are proposals. A site checks them on null runs (no private data, or under
differential privacy) before it relies on them; protos/spec/audits.md says what each rests on.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields

from allograft.crypto import canonical
from allograft.errors import RejectedError

#: Version of the rules that read these numbers; it is part of each gate's identity.
THRESHOLDS_VERSION = "1"


@dataclass(frozen=True, slots=True)
class AuditThresholds:
    """Numbers by which G1, G3, G4, G5 and G7 judge.

    Attributes:
        max_epsilon: Largest ε of one donation.
        epsilon_tolerance: How far the claimed ε may lie from the recomputed one.
        extraction_p: Chance at which queries are counted.
        extraction_queries: A suffix that comes back within so many queries is extractable.
        extraction_base_factor: ...if the base needs at least so many times more.
        extraction_suffix_tokens: Length of the suffixes that are tried.
        extraction_min_suffixes: Fewest suffixes that could have failed.
        canaries_min: Fewest canaries decided by a coin.
        canaries_p: Chance of a bound on ε that is too high.
        exposure_bits: Bits above the reference's median that one single insertion may not reach.
        exposure_p: Significance at which canaries of one level count as known.
        exposure_min_canaries: Fewest canaries for each number of repeats.
        exposure_min_references: Fewest alternatives for each of them.
        slope_warn_repeats: Warn if the median reaches `exposure_bits` at so few repeats.
        membership_fpr: False-positive rate at which members are recognised.
        membership_confidence: Confidence of intervals.
        membership_min_persons: Fewest persons on each side.
        membership_max_tpr: Without DP, the lower end of the recognised share may not exceed it.
        membership_warn_tpr: Warn above this recognised share.
        membership_warn_auc: Warn above this AUC.
        blind_max_auc: A classifier that never saw the model may tell in from out so well.
        blind_p: ...or better, if chance does so at least this often.
        population_dp: Fewest persons of a run with DP.
        population_measured: Fewest persons of a run without.
    """

    max_epsilon: float = 3.0
    epsilon_tolerance: float = 0.01
    extraction_p: float = 0.5
    extraction_queries: float = 1000.0
    extraction_base_factor: float = 100.0
    extraction_suffix_tokens: int = 16
    extraction_min_suffixes: int = 100
    canaries_min: int = 1000
    canaries_p: float = 0.05
    exposure_bits: float = 10.0
    exposure_p: float = 0.001
    exposure_min_canaries: int = 10
    exposure_min_references: int = 100
    slope_warn_repeats: int = 4
    membership_fpr: float = 0.01
    membership_confidence: float = 0.95
    membership_min_persons: int = 200
    membership_max_tpr: float = 0.10
    membership_warn_tpr: float = 0.03
    membership_warn_auc: float = 0.60
    blind_max_auc: float = 0.55
    blind_p: float = 0.01
    population_dp: int = 500
    population_measured: int = 2000

    def least_persons(self, private: bool) -> int:
        """Fewest persons to train on, with or without differential privacy."""
        return self.population_dp if private else self.population_measured

    def check(self) -> AuditThresholds:
        """Return itself if the numbers can be used.

        Raises:
            RejectedError: AG-IN-003.
        """
        chances = (
            self.extraction_p, self.canaries_p, self.exposure_p, self.membership_fpr,
            self.membership_confidence, self.membership_max_tpr, self.membership_warn_tpr,
            self.blind_p,
        )  # fmt: skip
        counts = (
            self.extraction_suffix_tokens, self.extraction_min_suffixes, self.canaries_min,
            self.exposure_min_canaries, self.slope_warn_repeats, self.membership_min_persons,
            self.population_dp, self.population_measured,
        )  # fmt: skip
        # Written so that NaN refuses.
        in_range = (
            all(0.0 < chance < 1.0 for chance in chances)
            and all(count >= 1 for count in counts)
            and self.exposure_min_references >= 2  # a spread needs two
            and 0.0 < self.max_epsilon < math.inf
            and 0.0 <= self.epsilon_tolerance <= 0.1
            and 1.0 <= self.extraction_queries < math.inf
            and 1.0 <= self.extraction_base_factor < math.inf
            and 0.0 < self.exposure_bits < math.inf
            and 0.5 <= self.membership_warn_auc <= 1.0
            and 0.5 <= self.blind_max_auc <= 1.0
        )
        if not in_range:
            raise RejectedError("AG-IN-003", "a threshold of an audit is out of range")
        return self

    def to_json(self) -> dict[str, canonical.Json]:
        """The thresholds with their version as a JSON object."""
        return {"version": THRESHOLDS_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, value: canonical.Json) -> AuditThresholds:
        """Read thresholds; every field must be there.

        Raises:
            RejectedError: AG-IN-003 if malformed, of another version or out of range.
        """
        defaults = cls()
        names = [field.name for field in fields(cls)]
        given = canonical.as_object(value, {"version", *names})
        if given["version"] != THRESHOLDS_VERSION:
            raise RejectedError("AG-IN-003", "the thresholds are of another version")
        read = {
            name: canonical.as_int(given[name])
            if isinstance(getattr(defaults, name), int)
            else canonical.as_number(given[name])
            for name in names
        }
        return cls(**read).check()  # type: ignore[arg-type]  # typed field by field above
