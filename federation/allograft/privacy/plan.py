# SPDX-License-Identifier: Apache-2.0
"""The privacy plan: everything public about a run, fixed and signed before its data is opened.

An in-toto statement in DSSE by the donor's site. There is no payload yet, so its one subject is
what the run starts from: the base, named by the digest of its weights. A recipient recomputes ε
from the constants and refuses a packet that claims another. See protos/spec/ledger.md.

Invariant: no number of a plan can carry the size of a data set exactly. Every one has at most three
significant digits or is a power of two, as window lengths are.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from allograft.crypto import canonical, dsse
from allograft.crypto.keys import SigningKey, VerifyKey
from allograft.errors import RejectedError
from allograft.limits import LIMITS
from allograft.privacy.accountant import epsilon_of
from allograft.privacy.dossier import STATEMENT_TYPE
from allograft.privacy.dp import SIGNIFICANT_DIGITS, DpConstants
from allograft.privacy.modes import Mode

PLAN_TYPE = "urn:allograft:privacy-plan:v1"

UNIT: Final = "person"
RELATION: Final = "add_or_remove_one"
SAMPLER: Final = "poisson"

_SUBJECT = "base"
_DOMAIN = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_KIND = re.compile(r"[a-z][a-z0-9_]{0,31}")
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_TRAINING_DEPTH = 3
_TRAINING_VALUES = 64


@dataclass(frozen=True, slots=True)
class PrivacyPlan:
    """One run as planned.

    Attributes:
        plan_id: Drawn at random (32 hex).
        donor: The site that will run it.
        mode: `strict` or `measured`.
        domain: The people, by the name of their domain in the ledger.
        kind: Kind of the packet to be made.
        base_digest: Digest of the base's weights (SHA-256, hex).
        constants: What the noise is fixed by; None in mode `measured`, which proves no bound.
        training: Public parameters of the training loop; JSON.
        purpose: What the packet is for, in one line.
        created: When (UTC, whole seconds).
    """

    plan_id: str
    donor: str
    mode: Mode
    domain: str
    kind: str
    base_digest: str
    constants: DpConstants | None
    training: Mapping[str, canonical.Json]
    purpose: str
    created: str

    def check(self) -> PrivacyPlan:
        """Return itself if it can be signed.

        Raises:
            RejectedError: AG-PRV-050 or -051 for a constant, AG-PRV-052 if malformed, AG-PRV-053
                if mode and constants do not fit.
        """
        _check_training(self.training)  # first: what is no JSON number has no statement
        return read_plan(self.to_statement())

    def to_statement(self) -> bytes:
        """The canonical in-toto statement, ready to be signed."""
        return canonical.dumps(
            {
                "_type": STATEMENT_TYPE,
                "subject": [{"name": _SUBJECT, "digest": {"sha256": self.base_digest}}],
                "predicateType": PLAN_TYPE,
                "predicate": {
                    "plan_id": self.plan_id,
                    "donor": self.donor,
                    "mode": str(self.mode),
                    "domain": self.domain,
                    "kind": self.kind,
                    "unit": UNIT,
                    "relation": RELATION,
                    "sampler": SAMPLER,
                    "constants": self.constants.to_json() if self.constants else None,
                    "training": dict(self.training),
                    "purpose": self.purpose,
                    "created": self.created,
                },
            }
        )

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the statement; the ledger's reservation names it."""
        return hashlib.sha256(self.to_statement()).hexdigest()

    def epsilon(self) -> float | None:
        """The ε of this run alone at its δ, by RDP; None without constants."""
        if self.constants is None:
            return None
        return epsilon_of(self.constants)


def sign_plan(plan: PrivacyPlan, key: SigningKey) -> bytes:
    """A plan's envelope.

    Raises:
        RejectedError: AG-PRV-050 to -053 if the plan is not one that would be read.
    """
    return dsse.sign(plan.check().to_statement(), dsse.IN_TOTO, [key]).to_bytes()


def verify_plan(
    envelope: bytes | dsse.Envelope, keys: Sequence[VerifyKey], donor: str
) -> PrivacyPlan:
    """Verify a signed plan and return it.

    Args:
        envelope: As received.
        keys: The donor's signing keys, from the roster.
        donor: Whose plan it must be.

    Raises:
        RejectedError: AG-SIG-* if the signature does not hold, AG-PRV-050 to -053 if the plan does
            not, or is another site's.
    """
    plan = read_plan(dsse.verify(envelope, dsse.IN_TOTO, keys).payload)
    if plan.donor != donor:
        raise RejectedError("AG-PRV-052", "the plan is another site's")
    return plan


def read_plan(statement: bytes) -> PrivacyPlan:
    """Read a plan whose signature was verified, or a draft of this site.

    Raises:
        RejectedError: AG-PRV-050 or -051 for a constant, AG-PRV-052 if malformed, AG-PRV-053 if
            mode and constants do not fit.
    """
    try:
        return _read(statement)
    except RejectedError as error:
        if error.code.startswith("AG-PRV"):
            raise
        raise RejectedError("AG-PRV-052", error.cause) from error


def _read(statement: bytes) -> PrivacyPlan:
    document = canonical.as_object(
        canonical.loads(statement, LIMITS.privacy_plan_bytes),
        {"_type", "subject", "predicateType", "predicate"},
    )
    if document["_type"] != STATEMENT_TYPE or document["predicateType"] != PLAN_TYPE:
        raise RejectedError("AG-PRV-052", f"not a statement of type {PLAN_TYPE}")
    fields = canonical.as_object(
        document["predicate"],
        {
            "plan_id", "donor", "mode", "domain", "kind", "unit", "relation", "sampler",
            "constants", "training", "purpose", "created",
        },
    )  # fmt: skip
    # ε of another unit, relation or sampler is another promise: k notes of a person cost k times.
    if (fields["unit"], fields["relation"], fields["sampler"]) != (UNIT, RELATION, SAMPLER):
        raise RejectedError("AG-PRV-052", "unit, relation or sampler is one that is not accounted")
    mode = canonical.as_text(fields["mode"])
    if mode not in {Mode.STRICT, Mode.MEASURED}:
        raise RejectedError("AG-PRV-053", "a privacy plan is for mode strict or measured")
    constants = fields["constants"]
    if (constants is None) == (mode == Mode.STRICT):
        needs = "needs constants" if mode == Mode.STRICT else "has no constants"
        raise RejectedError("AG-PRV-053", f"mode {mode} {needs}")
    training = canonical.as_mapping(fields["training"])
    _check_training(training)
    return PrivacyPlan(
        plan_id=canonical.as_random_id(fields["plan_id"]),
        donor=canonical.as_site(fields["donor"]),
        mode=Mode(mode),
        domain=_text(fields["domain"], _DOMAIN),
        kind=_text(fields["kind"], _KIND),
        base_digest=_read_subject(document["subject"]),
        constants=None if constants is None else DpConstants.from_json(constants),
        training=training,
        purpose=canonical.as_line(fields["purpose"]),
        created=canonical.format_time(canonical.parse_time(canonical.as_text(fields["created"]))),
    )


def _read_subject(value: canonical.Json) -> str:
    subjects = canonical.as_list(value)
    if len(subjects) != 1:
        raise RejectedError("AG-PRV-052", "a plan has one subject, the base")
    subject = canonical.as_object(subjects[0], {"name", "digest"})
    if subject["name"] != _SUBJECT:
        raise RejectedError("AG-PRV-052", "a plan has one subject, the base")
    return canonical.as_sha256(canonical.as_object(subject["digest"], {"sha256"})["sha256"])


def _check_training(training: Mapping[str, canonical.Json]) -> None:
    if _check_level(training, _TRAINING_DEPTH) > _TRAINING_VALUES:
        raise RejectedError("AG-PRV-052", f"training has more than {_TRAINING_VALUES} values")


def _check_level(level: Mapping[str, canonical.Json], depth: int) -> int:
    """Check one object of the training parameters; returns how many values it holds."""
    if depth == 0:
        raise RejectedError("AG-PRV-052", "training is nested too deeply")
    count = 0
    for name, value in level.items():
        _text(name, _NAME)
        if isinstance(value, dict):
            count += _check_level(value, depth - 1)
            continue
        count += 1
        if isinstance(value, str):
            _text(value, re.compile(r"[A-Za-z0-9._+-]{0,64}"))
        elif isinstance(value, list):
            raise RejectedError("AG-PRV-052", f"training: {name} is a list")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            _check_digits(name, value)
    return count


def _check_digits(name: str, value: float) -> None:
    # Written so that NaN refuses.
    if not abs(value) < 2**53:
        raise RejectedError("AG-PRV-052", f"training: {name} is not a finite number below 2^53")
    is_power_of_two = isinstance(value, int) and value > 0 and value & (value - 1) == 0
    if not is_power_of_two and float(f"{value:.{SIGNIFICANT_DIGITS}g}") != value:
        raise RejectedError("AG-PRV-051", f"training: {name} has more than three digits")


def _text(value: canonical.Json, pattern: re.Pattern[str]) -> str:
    text = canonical.as_text(value)
    if not pattern.fullmatch(text):
        raise RejectedError("AG-PRV-052", "a name in a plan has the wrong form")
    return text
