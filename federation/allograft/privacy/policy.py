# SPDX-License-Identifier: Apache-2.0
"""The site's policy: what may leave, what may come in, what a receipt tells.

Invariant: everything not allowed in the file is forbidden. A missing file, an unknown field or a
wrong type refuses the whole policy, and an absent section allows nothing. The digest covers the
file's bytes, so a dossier names exactly the rules it was judged by. See protos/spec/privacy.md.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from allograft.crypto import canonical
from allograft.errors import RejectedError
from allograft.limits import LIMITS
from allograft.plainfile import read_plain
from allograft.provenance.ancestry import Ancestor

#: Stands for every site of the roster in `recipients` and `donors`.
ANY_SITE = "*"

#: Modes whose policy must be signed.
AUDITED_MODES = frozenset({"measured", "strict"})

_FILE_BYTES = 64 << 10

SiteName = Annotated[str, StringConstraints(pattern=r"^(\*|[a-z0-9][a-z0-9-]{0,62})$")]
Role = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]{0,62}$")]
Kind = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
ModeName = Literal["open", "measured", "strict"]
AuditedModeName = Literal["measured", "strict"]
Permission = Literal["merge", "distil", "redonate"]
Purpose = Annotated[str, StringConstraints(min_length=1, max_length=LIMITS.text_field_chars)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class DonatePolicy(_Section):
    """What may leave this site, and who must agree.

    Attributes:
        modes: Privacy modes under which a packet may be made.
        kinds: Kinds of packets that may be made.
        recipients: Sites a packet may be sealed to; `*` for every site of the roster.
        approvals: Roles that must each approve a packet before it is sealed.
        dispatch: `automatic` seals for every routed recipient this policy allows; `manual`
            waits for an operator.
        max_payload_bytes: Largest payload that may leave.
        wire_dtype: Number format of the tensors that leave. `bf16` with stochastic rounding
            destroys what could hide in the low bits of 32-bit weights; `f32` keeps them.
        redonate_epsilon: Largest epsilon of a donation from a model that holds others' packets.
            One of them may have been made to trap a record of this site (arXiv 2404.00473), and
            a loose epsilon does not keep it in.
    """

    modes: tuple[ModeName, ...] = Field(default=(), strict=False)
    kinds: tuple[Kind, ...] = Field(default=(), strict=False)
    recipients: tuple[SiteName, ...] = Field(default=(), strict=False)
    approvals: tuple[Role, ...] = Field(default=(), strict=False)
    dispatch: Literal["automatic", "manual"] = "manual"
    max_payload_bytes: int = Field(default=4 << 30, ge=0, le=LIMITS.packet_payload_bytes)
    wire_dtype: Literal["bf16", "f32"] = "bf16"
    redonate_epsilon: float = Field(default=1.0, gt=0.0, le=10.0, allow_inf_nan=False)


class ReceivePolicy(_Section):
    """What may be tried and kept at this site.

    Attributes:
        donors: Sites whose packets are accepted; `*` for every site of the roster.
        kinds: Kinds of packets that are accepted.
        modes: Privacy modes under which an accepted packet was made.
        automatic_trial: Try a verified packet without asking an operator.
        automatic_keep: Keep a packet that passed its trial without asking an operator.
        min_gain: The gain (nats per token) that the lower bound of its interval must exceed.
        max_retention_loss: The worsening on retention text (nats per token) that the upper
            bound of its interval may reach.
        licence: Permissions that a packet must grant to be accepted.
        purposes: Purposes that this site pursues, in the donors' words. A restriction like
            `licence`: if any is given, a packet must be for one of them; with none, the donor's
            purpose is recorded and a person's to keep to.
        parents: Whether a packet may have been trained on top of other packets.
    """

    donors: tuple[SiteName, ...] = Field(default=(), strict=False)
    kinds: tuple[Kind, ...] = Field(default=(), strict=False)
    modes: tuple[ModeName, ...] = Field(default=(), strict=False)
    automatic_trial: bool = False
    automatic_keep: bool = False
    min_gain: float = Field(default=0.0, ge=0.0, le=100.0, allow_inf_nan=False)
    max_retention_loss: float = Field(default=0.02, ge=0.0, le=100.0, allow_inf_nan=False)
    licence: tuple[Permission, ...] = Field(default=(), strict=False)
    purposes: tuple[Purpose, ...] = Field(default=(), strict=False)
    parents: Literal["accept", "refuse"] = "refuse"


class ReceiptPolicy(_Section):
    """What a receipt tells the donor beyond the outcome.

    Attributes:
        share_figures: Put gain and retention change into the receipt. They are measured on this
            site's own data, so the default is no.
    """

    share_figures: bool = False


class AuditPolicy(_Section):
    """What the modes `strict` and `measured` ask for; `open` asks for nothing of it.

    Attributes:
        thresholds_version: Version of the audits' thresholds that this site decided on.
        min_population_dp: Fewest persons behind a packet that was made with differential privacy.
        min_population: Fewest persons behind one that was made without.
        donation_epsilon: Largest epsilon of one donation.
        domain_epsilon: Largest epsilon of all donations of a data domain together, for ever.
        max_delta: Largest delta of a donation.
        canaries: Planted texts decided by a coin; about half of them are trained on, beside 210
            repeated ones. A thousand can refute an epsilon of 5, two hundred one of 3.5.
        measured_approvals: Fewest roles that must agree to a packet of mode `measured`. One role
            is one pair of eyes, so there are never fewer than two.
        identifier_list: Modes in which the text gate must know the site's own list of identifiers.
            `measured` has no formal bound behind it, so names that no pattern finds count there.
    """

    # Of those that this software judges by there is one; another must not pass for it.
    thresholds_version: int = Field(default=1, ge=1, le=1)
    min_population_dp: int = Field(default=500, ge=10, le=1 << 40)
    min_population: int = Field(default=2000, ge=10, le=1 << 40)
    # Above ten there is no meaningful formal guarantee (arXiv 2303.00654), so no policy allows it.
    donation_epsilon: float = Field(default=3.0, gt=0.0, le=10.0, allow_inf_nan=False)
    domain_epsilon: float = Field(default=8.0, gt=0.0, le=10.0, allow_inf_nan=False)
    max_delta: float = Field(default=1e-5, gt=0.0, le=1e-4, allow_inf_nan=False)
    canaries: int = Field(default=1000, ge=100, le=100_000)
    measured_approvals: int = Field(default=2, ge=2, le=16)
    identifier_list: tuple[AuditedModeName, ...] = Field(default=("measured",), strict=False)

    @model_validator(mode="after")
    def _check_order(self) -> AuditPolicy:
        if self.donation_epsilon > self.domain_epsilon:
            raise ValueError("donation_epsilon is larger than domain_epsilon")
        if self.min_population_dp > self.min_population:
            raise ValueError("min_population_dp is larger than min_population")
        return self


class _File(_Section):
    version: int = Field(ge=1, le=1)
    donate: DonatePolicy = DonatePolicy()
    receive: ReceivePolicy = ReceivePolicy()
    receipt: ReceiptPolicy = ReceiptPolicy()
    audit: AuditPolicy = AuditPolicy()


@dataclass(frozen=True, slots=True)
class Policy:
    """A site's rules as read, with the SHA-256 (hex) of the file they came from."""

    donate: DonatePolicy
    receive: ReceivePolicy
    receipt: ReceiptPolicy
    audit: AuditPolicy
    digest: str

    @property
    def conditions_digest(self) -> str:
        """SHA-256 (hex) of what gates and approvals of a donation rely on.

        Recipients and dispatch are left out: they are judged afresh at every release, so adding
        a recipient does not void what was approved. The audit section counts where a mode uses it.
        """
        conditions = self.donate.model_dump(mode="json", exclude={"recipients", "dispatch"})
        if not AUDITED_MODES.isdisjoint(self.donate.modes):
            conditions["audit"] = self.audit.model_dump(mode="json")
        return hashlib.sha256(canonical.dumps(conditions)).hexdigest()

    def check_mode(self, mode: str) -> None:
        """Refuse a privacy mode that the site does not use, or whose demands it does not meet.

        Raises:
            RejectedError: AG-PRV-003, or AG-PRV-009 for a mode that needs more than this policy
                asks for.
        """
        if mode not in self.donate.modes:
            raise RejectedError("AG-PRV-003", "the privacy mode is not in donate.modes")
        if mode == "measured":
            self._check_measured()

    def check_donation(self, mode: str, kind: str, payload_bytes: int = 0) -> None:
        """Refuse a donation that the site does not make.

        Raises:
            RejectedError: AG-PRV-003 or AG-PRV-009.
        """
        self.check_mode(mode)
        if kind not in self.donate.kinds:
            raise RejectedError("AG-PRV-003", "the kind is not in donate.kinds")
        if payload_bytes > self.donate.max_payload_bytes:
            raise RejectedError(
                "AG-PRV-003",
                f"payload of {payload_bytes} bytes, donate.max_payload_bytes is "
                f"{self.donate.max_payload_bytes}",
            )

    def _check_measured(self) -> None:
        """Without a formal guarantee, two roles and a list of recipients are what is left."""
        roles = len(set(self.donate.approvals))
        if roles < self.audit.measured_approvals:
            raise RejectedError(
                "AG-PRV-009",
                f"mode measured needs {self.audit.measured_approvals} roles in donate.approvals, "
                f"there are {roles}",
            )
        if ANY_SITE in self.donate.recipients or not self.donate.recipients:
            raise RejectedError("AG-PRV-009", "mode measured needs named donate.recipients, no `*`")

    def check_domain(self, epsilon: float, delta: float) -> None:
        """Refuse a privacy domain under whose limits this policy would let nothing be made.

        Raises:
            RejectedError: AG-PRV-014.
        """
        _check_most("the domain's epsilon", epsilon, "domain_epsilon", self.audit.domain_epsilon)
        _check_most("the domain's delta", delta, "max_delta", self.audit.max_delta)

    def check_cost(self, epsilon: float, delta: float) -> None:
        """Refuse a privacy plan that costs more than this policy allows one donation.

        Raises:
            RejectedError: AG-PRV-014.
        """
        _check_most("the plan's epsilon", epsilon, "donation_epsilon", self.audit.donation_epsilon)
        _check_most("the plan's delta", delta, "max_delta", self.audit.max_delta)

    def check_identifier_list(self, mode: str, has_list: bool) -> None:
        """Refuse a mode that needs the site's identifier list, without one.

        Raises:
            RejectedError: AG-PRV-016.
        """
        if mode in self.audit.identifier_list and not has_list:
            raise RejectedError("AG-PRV-016", f"audit.identifier_list names mode {mode}")

    def check_recipients(self, recipients: Iterable[str]) -> None:
        """Refuse a dispatch to a site that is not named in the policy.

        Raises:
            RejectedError: AG-PRV-004.
        """
        if ANY_SITE in self.donate.recipients:
            return
        for site in recipients:
            if site not in self.donate.recipients:
                raise RejectedError("AG-PRV-004", f"{site[:64]} is not in donate.recipients")

    def check_reception(self, offered: Reception) -> None:
        """Refuse a packet that the site does not take.

        Raises:
            RejectedError: AG-PRV-005.
        """
        rules = self.receive
        if ANY_SITE not in rules.donors and offered.donor not in rules.donors:
            raise RejectedError("AG-PRV-005", "the donor is not in receive.donors")
        if offered.kind not in rules.kinds:
            raise RejectedError("AG-PRV-005", "the kind is not in receive.kinds")
        if offered.mode not in rules.modes:
            raise RejectedError("AG-PRV-005", "the privacy mode is not in receive.modes")
        lacking = sorted(set(rules.licence) - offered.permissions)
        if lacking:
            raise RejectedError("AG-PRV-005", f"the packet does not permit: {', '.join(lacking)}")
        purposes = {_fold(purpose) for purpose in rules.purposes}
        if purposes and _fold(offered.purpose) not in purposes:
            raise RejectedError("AG-PRV-005", "the purpose is not in receive.purposes")
        if offered.parents and rules.parents != "accept":
            raise RejectedError(
                "AG-PRV-005", f"made on top of {offered.parents} packets; see receive.parents"
            )

    def check_redonation(
        self, parents: Iterable[Ancestor], mode: str, epsilon: float | None = None
    ) -> None:
        """Refuse to pass on what was trained on top of others' packets.

        Args:
            parents: Packets inside the model that is trained on; none is always fine.
            mode: Privacy mode of the donation.
            epsilon: What the mode guarantees; None if nothing.

        Raises:
            RejectedError: AG-PRV-015.
        """
        parents = tuple(parents)
        for parent in parents:
            if not parent.licence.redonate:
                raise RejectedError(
                    "AG-PRV-015", f"packet {parent.parent.packet_id[:12]} forbids redonation"
                )
        if not parents:
            return
        most = self.donate.redonate_epsilon
        # Written so that NaN refuses.
        if mode != "strict" or epsilon is None or not 0.0 < epsilon <= most:
            raise RejectedError(
                "AG-PRV-015",
                f"the model holds {len(parents)} packets of others: only mode strict with epsilon "
                f"at most {most:g} may pass on what is trained on it",
            )


def _check_most(what: str, value: float, field: str, most: float) -> None:
    # Written so that NaN refuses.
    if not value <= most:
        raise RejectedError("AG-PRV-014", f"{what} is above audit.{field}, {most:g}")


@dataclass(frozen=True, slots=True)
class Reception:
    """What a recipient's policy wants to know about a packet."""

    donor: str
    kind: str
    mode: str
    permissions: frozenset[str] = frozenset()
    purpose: str = ""
    parents: int = 0


def _fold(purpose: str) -> str:
    return " ".join(purpose.split()).casefold()


def read_policy(path: Path) -> Policy:
    """Read a site's policy file.

    Raises:
        RejectedError: AG-PRV-001 if there is no file, AG-PRV-002 if it cannot be read or holds
            anything but a policy.
    """
    return parse_policy(read_policy_bytes(path))


def read_policy_bytes(path: Path) -> bytes:
    """The bytes of a site's policy file, which is what a signature is over.

    Raises:
        RejectedError: As `read_policy`, for a file that cannot be read.
    """
    try:
        return read_plain(path, _FILE_BYTES)
    except FileNotFoundError as error:
        raise RejectedError("AG-PRV-001", f"{path.name} does not exist") from error
    except OSError as error:
        # Fail closed: a policy that cannot be read is refused, never skipped or retried around.
        raise RejectedError("AG-PRV-002", f"{path.name}: {error.strerror}") from error
    except RejectedError as error:
        raise RejectedError("AG-PRV-002", error.cause) from error


def parse_policy(content: bytes) -> Policy:
    """Read a policy from the bytes of its file.

    Raises:
        RejectedError: AG-PRV-002.
    """
    if len(content) > _FILE_BYTES:
        raise RejectedError("AG-PRV-002", f"the file is larger than {_FILE_BYTES} bytes")
    try:
        fields = tomllib.loads(content.decode("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise RejectedError("AG-PRV-002", f"not UTF-8 TOML: {type(error).__name__}") from error
    try:
        file = _File.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(step)[:64] for step in first["loc"]) or "the file"
        raise RejectedError("AG-PRV-002", f"{where}: {first['msg']}") from error
    digest = hashlib.sha256(content).hexdigest()
    return Policy(file.donate, file.receive, file.receipt, file.audit, digest)
