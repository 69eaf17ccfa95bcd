# SPDX-License-Identifier: Apache-2.0
"""The site's privacy budget: its ledger, with a second memory of the head, and its people.

Invariants: the ledger's head stands in the site's database as well. Who replaces the ledger's
directory by an older copy, or removes it, is refused; a ledger is started only where none is
remembered. Every key that signs an entry is in `keys/signing.public` before it does, so that the
ledger still verifies after the site was given another signing key. A former key counts as long as
the file names it; the file is the site's own, like the key.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TypeVar

from allograft.crypto import canonical, keystore
from allograft.errors import RejectedError
from allograft.privacy.ledger import (
    EMPTY,
    Charge,
    Committed,
    DomainOpened,
    Head,
    Ledger,
    NonprivateRelease,
    Reserved,
    charge_for,
    check_costs,
)
from allograft.privacy.ledger_file import LedgerFile
from allograft.privacy.plan import PrivacyPlan
from allograft.privacy.population import KEY_BYTES, Population
from allograft.privacy.scan import check_strings
from allograft_client.plan_files import read_signed
from allograft_client.site import Site

#: An entry may be so much later than the end of the roster. A run whose coordinator was away for a
#: while can still be ended; and no wrong clock blocks the ledger for longer than this.
_AFTER_ROSTER = timedelta(days=90)

_HEAD = "privacy-ledger-head"
_KEY_WORD = "allograft-population-key-v1"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Budget:
    """The ledger and the register of people of one site.

    Whoever reads the ledger also has the cost of each reservation recomputed: a signed entry that
    states less than its run costs (AG-PRV-060) would leave budget that is not there.

    Errors are those of `LedgerFile` and `Population`, AG-PRV-064 also for a clock that is far ahead
    of the roster, AG-KEY for `keys/signing.public`, and AG-SIT or AG-STO for the database.
    """

    site: Site

    def ledger(self) -> Ledger:
        """The ledger as it stands; an empty one if none was ever started."""
        known = self._known()
        if known == EMPTY and not self._file.exists():
            return Ledger(self.site.name)
        ledger = self._file.read(known)
        self._remember(ledger.head)
        self._keep_key()
        check_costs(ledger)
        return ledger

    def check_plans(self, ledger: Ledger) -> tuple[str, ...]:
        """Hold every charge against the signed plan that it names.

        Returns:
            Ids of plans that are not here, so that their charges could not be compared.

        Raises:
            RejectedError: AG-PRV-060 if a charge is not what its signed plan costs, AG-PRV-050 to
                -053 or AG-SIG-* if a plan's file was changed.
        """
        missing = []
        former = self._file.former_keys
        for account in ledger.accounts.values():
            for entry in account.reserved:
                charge = entry.charge
                plan = read_signed(self.site, charge.plan_id, former)
                if plan is None:
                    missing.append(charge.plan_id)
                elif charge_for(plan, charge.kind) != charge:
                    cause = f"plan {charge.plan_id[:12]}: the charge is not what its plan costs"
                    raise RejectedError("AG-PRV-060", cause)
        return tuple(missing)

    def signed_plan(self, plan_id: str) -> PrivacyPlan | None:
        """A signed plan of this site, by any key it ever had; None if it is not here.

        Raises:
            RejectedError: AG-PRV-050 to -053 or AG-SIG-* if its file was changed.
        """
        return read_signed(self.site, plan_id, self._file.former_keys)

    def open_domain(self, limits: DomainOpened) -> Ledger:
        """Fix a domain's limits; starts the ledger with the first one.

        Raises:
            RejectedError: AG-PRV-059 for its name or role, AG-PRV-021 if one looks like a person's,
                AG-PRV-061 for limits out of range, AG-PRV-014 for limits above the policy's,
                AG-PRV-001 if there is no policy to hold them against.
        """
        # All of it before the ledger is touched: what is opened can be neither changed nor closed.
        limits.check()
        names: list[canonical.Json] = [limits.domain, limits.declared_by]
        check_strings(names, "the domain's name or role", self.site.matchers)
        self.site.policy().check_domain(limits.epsilon_max, limits.delta_max)
        self._keep_key()
        known = self._known()
        if known == EMPTY and not self._file.is_started():
            self._file.create(known)
        return self._act(lambda now: self._file.open_domain(limits, now, known))

    def reserve(self, charge: Charge) -> Reserved:
        """Spend a charge before its first step."""
        return self._act(lambda now: self._file.reserve(charge, now, self._known()))

    def commit(self, ended: Committed) -> Ledger:
        """Record how a charge ended."""
        return self._act(lambda now: self._file.commit(ended, now, self._known()))

    def record_nonprivate(self, release: NonprivateRelease) -> Ledger:
        """Make a domain's ε infinite, before something without privacy is released."""
        return self._act(lambda now: self._file.record_nonprivate(release, now, self._known()))

    def population(self) -> Population:
        """The register of people; its key is made with the first one.

        Raises:
            RejectedError: AG-PRV-067 if people are registered and the key is lost: under a fresh
                one everybody would look unknown.
        """
        directory = self.site.home.path("privacy", "population")
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        reserved = {name for name, found in self.ledger().accounts.items() if found.reserved}
        path = self.site.home.path("keys", "population.key")
        if not path.exists():
            if reserved or any(directory.glob("*.people")):
                raise RejectedError("AG-PRV-067", "keys/population.key is gone")
            text = f"{_KEY_WORD} {secrets.token_hex(KEY_BYTES)}\n"
            keystore.write_private(path, text.encode("ascii"))
        word, _, digits = keystore.read_private(path).decode("ascii", "replace").partition(" ")
        try:
            key = bytes.fromhex(digits)
        except ValueError:
            key = b""
        if word != _KEY_WORD or len(key) != KEY_BYTES:
            raise RejectedError("AG-PRV-067", "keys/population.key is malformed")
        return Population(directory, key, frozenset(reserved))

    @property
    def _file(self) -> LedgerFile:
        present = self.site.key.public
        known = keystore.read_verify_keys(self._key_file)
        former = [key for key in known if key.key_id != present.key_id]
        directory = self.site.home.path("privacy")
        return LedgerFile(directory, self.site.name, self.site.key, former)

    @property
    def _key_file(self) -> Path:
        return self.site.home.path("keys", "signing.public")

    def _keep_key(self) -> None:
        keystore.add_verify_key(self._key_file, self.site.key.public)

    def _act(self, act: Callable[[datetime], T]) -> T:
        now = self._now()
        self._keep_key()
        result = act(now)
        self._remember(self._file.head())
        return result

    def _now(self) -> datetime:
        """The time of an entry, if the clock cannot have run far ahead.

        An entry of the year 2076 could never be followed before that year, nor taken back. The
        roster is the newest word that others signed about the time.
        """
        now, expires = self.site.now(), self.site.trust.latest_roster().expires
        if now > expires + _AFTER_ROSTER:
            raise RejectedError(
                "AG-PRV-064",
                f"the clock says {canonical.format_time(now)}, the roster expired at "
                f"{canonical.format_time(expires)}",
            )
        return now

    def _known(self) -> Head:
        text = self.site.store.setting(_HEAD)
        return Head.from_text(text) if text else EMPTY

    def _remember(self, head: Head) -> None:
        # Another process may have remembered a later one meanwhile.
        with self.site.store.transaction():
            if head.count > self._known().count:
                self.site.store.set_setting(_HEAD, head.to_text())
