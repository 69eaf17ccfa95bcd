# SPDX-License-Identifier: Apache-2.0
"""Donations of what a snapshot learnt elsewhere: only where no privacy is promised for it."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from allograft.errors import RejectedError
from allograft.provenance.ancestry import Ancestor, write_ancestors
from allograft.provenance.statement import Licence, Parent
from allograft.recipes.plan import LoraPlan, ModuleGraftPlan
from allograft_client.donor import _ancestors
from allograft_client.plan import DonationPlan

PLAN = DonationPlan(
    "base", "module_graft", Path("x"), "open", "public", "data-owner", "letters",
    ModuleGraftPlan(4), tuned="after",
)  # fmt: skip


def test_a_tuned_model_is_for_module_grafts_in_mode_open() -> None:
    assert PLAN.check() is PLAN
    assert DonationPlan.from_json(PLAN.to_json()) == PLAN
    private = replace(PLAN, mode="measured", nature="", declared_by="", privacy_plan="ab" * 16)
    assert replace(private, tuned="").check().is_protected
    for plan in (replace(PLAN, kind="lora", recipe=LoraPlan()), private):
        with pytest.raises(RejectedError, match="AG-RCP-035"):
            plan.check()


def test_packets_inside_the_tuned_model_are_parents_too() -> None:
    """Or else their licences could be evaded by naming the model that holds them `tuned`."""
    one, two = (Ancestor(Parent(c * 32, c * 64), Licence(merge=True)) for c in "ab")
    models = {
        "base": SimpleNamespace(facts={"parents": write_ancestors([one])}),
        "after": SimpleNamespace(facts={"parents": write_ancestors([one, two])}),
    }
    site = SimpleNamespace(store=SimpleNamespace(model=models.__getitem__))
    assert _ancestors(site, PLAN) == (one, two)
    assert _ancestors(site, replace(PLAN, tuned="")) == (one,)
