# SPDX-License-Identifier: Apache-2.0
"""`allograft-site plan …` and `… ledger …`: what a run will cost, and what has been spent."""

from __future__ import annotations

import secrets
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import click
import typer

from allograft.cli.shell import Format, FormatOption, emit
from allograft.crypto import canonical
from allograft.errors import RejectedError, UnavailableError
from allograft.privacy import accountant
from allograft.privacy.dp import DpConstants
from allograft.privacy.ledger import DEFAULT_ORDER, Account, DomainOpened
from allograft.privacy.modes import Mode
from allograft.privacy.plan import RELATION, SAMPLER, UNIT, PrivacyPlan
from allograft.recipes.documents import group_persons, read_documents
from allograft.recipes.plan import make_recipe_plan
from allograft_client.budget import Budget
from allograft_client.options import (
    DoraOption,
    FrozenOption,
    ModulesOption,
    RankingOption,
    RsloraOption,
    StateOption,
    TargetOption,
    VirtualTokensOption,
    open_state,
)
from allograft_client.plan import DonationPlan
from allograft_client.plan_files import FiledPlan, check_cost, file_draft, find_plan, sign_draft
from allograft_client.site import Site, model_base

plan_app = typer.Typer(
    no_args_is_help=True, help="Privacy plans: fixed and signed before the data is opened."
)
ledger_app = typer.Typer(
    no_args_is_help=True, help="The privacy ledger: what was spent on whom, and what is left."
)

PlanArgument = Annotated[str, typer.Argument(help="Plan id, or the beginning of one.")]

#: Up to which ratio of noise to signal → what a person should expect. Rules of thumb.
_UTILITY = (
    (0.05, "the noise is small beside what the people of a step agree on; expect little loss"),
    (0.2, "the noise is noticeable; expect a weaker packet than without privacy"),
    (1.0, "the noise is heavy; only what most people share will be learnt"),
    (float("inf"), "the noise outweighs the people of a step; expect to learn next to nothing"),
)
#: Up to which ε → what it means (arXiv 2303.00654, tiers).
_STRENGTH = (
    (1.0, "a strong guarantee"),
    (10.0, "a reasonable guarantee"),
    (float("inf"), "no meaningful guarantee"),
)


@plan_app.command("new")
def new(
    model: Annotated[str, typer.Option(help="Model of this site to train on.")],
    domain: Annotated[str, typer.Option(help="Whose data: a domain of the ledger.")],
    kind: Annotated[str, typer.Option(help="Kind of packet, such as lora or organ.")] = "lora",
    mode: Annotated[str, typer.Option(help="strict, or measured without formal bound.")] = "strict",
    target_epsilon: Annotated[
        float | None, typer.Option(help="Epsilon this run may cost; fixes the noise.")
    ] = None,
    delta: Annotated[float, typer.Option(help="Delta; at most 0.1 / people.")] = 1e-6,
    sampling_rate: Annotated[
        float, typer.Option(help="Chance of a person to be in a step.")
    ] = 0.01,
    steps: Annotated[int, typer.Option(min=1, help="Updates of the weights.")] = 500,
    people_at_least: Annotated[
        int, typer.Option(min=1, help="How many people there are at least; a public round number.")
    ] = 1000,
    clip: Annotated[float, typer.Option(help="Largest norm of one person's gradient.")] = 1.0,
    windows: Annotated[int, typer.Option(min=1, help="Most windows of one person.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    batch: Annotated[
        int, typer.Option(min=1, help="Mode measured: windows per forward pass.")
    ] = 16,
    window: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 256,
    blocks: Annotated[int, typer.Option(min=1, help="Organ: how many blocks.")] = 2,
    position: Annotated[int | None, typer.Option(min=0, help="Organ: where they go.")] = None,
    rank: Annotated[int, typer.Option(min=1, help="LoRA: rank.")] = 8,
    alpha: Annotated[float, typer.Option(help="LoRA: scale.")] = 16.0,
    target_module: TargetOption = None,
    rslora: RsloraOption = False,
    dora: DoraOption = False,
    frozen_a: FrozenOption = "",
    modules: ModulesOption = 0,
    ranking: RankingOption = "activation",
    virtual_tokens: VirtualTokensOption = 20,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Less memory, a third more time.")
    ] = False,
    holdout: Annotated[
        float, typer.Option(help="Chance of a person to be held out, for the audits.")
    ] = 0.3,
    person_field: Annotated[
        str, typer.Option(help="JSONL field that says whom a record is about.")
    ] = "person",
    purpose: Annotated[str, typer.Option(help="What the packet is for.")] = (
        "evaluation and local use"
    ),
    state: StateOption = None,
    format: FormatOption = Format.text,
) -> None:
    """Draft a plan: proposes the noise for a target epsilon and tells what it does to the result.

    Nothing here reads data; every number is one that you would say in public.
    """
    site = open_state(state)
    if target_epsilon is None and mode != Mode.MEASURED:
        raise typer.BadParameter("mode strict needs --target-epsilon")
    if mode not in {Mode.STRICT, Mode.MEASURED}:
        raise RejectedError("AG-PRV-053", "a privacy plan is for mode strict or measured")
    if delta * people_at_least > 0.1:
        # Releasing one person in clear by chance would fit a larger one.
        raise typer.BadParameter("--delta is more than a tenth of one in --people-at-least")
    constants = None
    if target_epsilon is not None:
        noise = accountant.propose_noise(target_epsilon, delta, sampling_rate, steps)
        # Fixed by the public minimum, so that it tells nothing about the true number.
        divisor = max(1.0, float(f"{sampling_rate * people_at_least:.3g}"))
        constants = DpConstants(sampling_rate, noise, steps, clip, divisor, delta, windows).check()
    donation = DonationPlan(
        model=model,
        kind=kind,
        data=Path(),
        mode=mode,
        nature="",
        declared_by="",
        domain="",
        steps=steps,
        batch_windows=batch,
        learning_rate=learning_rate,
        window_tokens=window,
        recipe=make_recipe_plan(
            kind,
            blocks=blocks,
            position=position,
            rank=rank,
            alpha=alpha,
            target_modules=tuple(target_module or ()),
            rslora=rslora,
            dora=dora,
            frozen_a=frozen_a,
            modules=modules,
            ranking=ranking,
            virtual_tokens=virtual_tokens,
        ),
        checkpointing=checkpointing,
        holdout=holdout,
        person_field=person_field,
    )
    plan = PrivacyPlan(
        plan_id=secrets.token_hex(16),
        donor=site.name,
        mode=Mode(mode),
        domain=domain,
        kind=kind,
        base_digest=model_base(site.store.model(model)).weights_digest,
        constants=constants,
        training=donation.planned_json(),
        purpose=purpose,
        created=canonical.format_time(site.now()),
    )
    _emit_plan(site, file_draft(site, plan), format)


@plan_app.command("show")
def show(plan: PlanArgument, state: StateOption = None, format: FormatOption = Format.text) -> None:
    """Show a plan as a person reads it, with what it costs."""
    site = open_state(state)
    _emit_plan(site, find_plan(site, plan), format)


@plan_app.command("sign")
def sign(plan: PlanArgument, state: StateOption = None, format: FormatOption = Format.text) -> None:
    """Sign a draft: from here on a run keeps to it or is not made."""
    site = open_state(state)
    _emit_plan(site, sign_draft(site, plan), format)


@ledger_app.command("open-domain")
def open_domain(
    domain: Annotated[str, typer.Argument(help="What to call the people: a-z, 0-9, dashes.")],
    declared_by: Annotated[str, typer.Option(help="Role that states who they are; never a name.")],
    epsilon: Annotated[float, typer.Option(help="Epsilon of everything ever released.")] = 8.0,
    delta: Annotated[float, typer.Option(help="At which delta.")] = 1e-6,
    order: Annotated[int, typer.Option(help="Order at which RDP is counted.")] = DEFAULT_ORDER,
    state: StateOption = None,
    format: FormatOption = Format.text,
) -> None:
    """Fix, for ever, how much may be learnt about a set of people; starts the ledger."""
    site = open_state(state)
    limits = DomainOpened(domain, epsilon, delta, order, declared_by)
    account = Budget(site).open_domain(limits).account(domain)
    emit(_describe_account(account, False), format, _render_account)


@ledger_app.command("show")
def show_ledger(
    pld: Annotated[
        bool, typer.Option("--pld/--no-pld", help="Also compute epsilon by PLD (seconds).")
    ] = True,
    state: StateOption = None,
    format: FormatOption = Format.text,
) -> None:
    """Show each domain: cap, spent, left, and what was released; recomputes what each run cost."""
    budget = Budget(open_state(state))
    ledger = budget.ledger()
    value = {
        "without_plan": list(budget.check_plans(ledger)),
        "entries": ledger.head.count,
        "head": ledger.head.to_text(),
        "domains": [
            _describe_account(account, pld) for _, account in sorted(ledger.accounts.items())
        ],
    }
    emit(value, format, _render_ledger)


@ledger_app.command("check-disjoint")
def check_disjoint(
    domains: Annotated[
        list[str] | None, typer.Argument(help="Domains to compare; all of the ledger if none.")
    ] = None,
    state: StateOption = None,
    format: FormatOption = Format.text,
) -> None:
    """Refuse domains that share people: on them the budgets of both would add up."""
    budget = Budget(open_state(state))
    ledger = budget.ledger()
    named = sorted(set(domains or ledger.accounts))
    for domain in named:
        ledger.account(domain)  # refuses a name that is none
    register = budget.population()
    enrolled = register.enrolled_domains()
    compared = [domain for domain in named if domain in enrolled]
    for domain, other in combinations(compared, 2):
        register.check_disjoint(domain, other)
    empty = [domain for domain in named if domain not in enrolled]
    emit({"disjoint": compared, "without_people": empty}, format, _render_disjoint)


@ledger_app.command("find-overlap")
def find_overlap(
    data: Annotated[Path, typer.Option(help="Records as for donate; their people alone are read.")],
    person_field: Annotated[
        str, typer.Option(help="JSONL field that says whom a record is about.")
    ] = "person",
    state: StateOption = None,
    format: FormatOption = Format.text,
) -> None:
    """Name the domains that people of a file belong to; nobody is enrolled, nothing is spent."""
    site = open_state(state)
    if not data.is_file():
        raise UnavailableError("AG-STO-005", f"--data: there is no file {data}")
    ids = group_persons(read_documents(data, person_field))
    found = Budget(site).population().find_overlap(ids)
    emit({"domains": list(found)}, format, _render_overlap)


def _emit_plan(site: Site, filed: FiledPlan, format: Format) -> None:
    emit(_describe_plan(site, filed), format, _render_plan)


def _describe_plan(site: Site, filed: FiledPlan) -> dict[str, Any]:
    plan = filed.plan
    account = Budget(site).ledger().accounts.get(plan.domain)
    value: dict[str, Any] = {
        "plan_id": plan.plan_id,
        "state": "signed" if filed.is_signed else "draft",
        "path": filed.path,
        "digest": plan.digest,
        "donor": plan.donor,
        "mode": str(plan.mode),
        "domain": plan.domain,
        "domain_is_open": account is not None,
        "kind": plan.kind,
        "base_digest": plan.base_digest,
        "unit": UNIT,
        "relation": RELATION,
        "sampler": SAMPLER,
        "training": dict(plan.training),
        "purpose": plan.purpose,
        "created": plan.created,
        "constants": plan.constants.to_json() if plan.constants else None,
    }
    if plan.constants is not None:
        value["cost"] = _describe_cost(plan.constants, account)
    value["warnings"] = _warn_of(site, plan)
    return value


def _warn_of(site: Site, plan: PrivacyPlan) -> list[str]:
    """Why a run of this plan would be refused; a draft may wait for another policy."""
    try:
        check_cost(site, plan)
    except RejectedError as error:
        return [str(error)]
    return []


def _describe_cost(constants: DpConstants, account: Account | None) -> dict[str, Any]:
    epsilon = accountant.epsilon_of(constants)
    order = account.limits.order if account else DEFAULT_ORDER
    (rdp,) = accountant.rdp_of(constants, (order,))
    ratio = constants.noise_multiplier / constants.divisor
    return {
        "epsilon_by_rdp": epsilon,
        "epsilon_by_pld": accountant.epsilon_by_pld([constants], constants.delta),
        "epsilon_by_pld_label": accountant.NON_ADAPTIVE,
        "strength": _words(_STRENGTH, epsilon),
        "gaussian_mu": accountant.gaussian_mu(min(epsilon, 700.0), constants.delta),
        "recognised_at_1_percent_false": accountant.true_positive_bound(epsilon, constants.delta),
        "order": order,
        "rdp_at_order": rdp,
        "rdp_left_in_domain": account.left if account else None,
        "expected_people_per_step": constants.divisor,
        "noise_to_signal": ratio,
        "utility": _words(_UTILITY, ratio),
    }


def _describe_account(account: Account, with_pld: bool) -> dict[str, Any]:
    limits = account.limits
    infinite = account.is_nonprivate
    value: dict[str, Any] = {
        "domain": limits.domain,
        "declared_by": limits.declared_by,
        "epsilon_max": limits.epsilon_max,
        "delta_max": limits.delta_max,
        "order": limits.order,
        "rdp_cap": account.cap,
        "rdp_spent": account.spent,
        "rdp_left": account.left,
        "infinite": infinite,
        "epsilon_by_rdp": None if infinite else account.epsilon,
        "epsilon_by_pld": None,
        "epsilon_by_pld_label": accountant.NON_ADAPTIVE,
        "charges": [
            {
                "plan_id": entry.charge.plan_id,
                "kind": str(entry.charge.kind),
                "rdp": entry.rdp[accountant.ORDERS.index(limits.order)],
                "purpose": entry.charge.purpose,
                **_describe_outcome(account, entry.charge.plan_id),
            }
            for entry in account.reserved
        ],
        "nonprivate_releases": [
            {"packet": release.packet, "declared_by": release.declared_by}
            for release in account.nonprivate
        ],
    }
    if with_pld and not infinite and account.reserved:
        value["epsilon_by_pld"] = accountant.epsilon_by_pld(account.events, limits.delta_max)
    return value


def _describe_outcome(account: Account, plan_id: str) -> dict[str, Any]:
    ended = account.outcomes.get(plan_id)
    if ended is None:
        return {"state": "reserved", "packets": [], "reason": ""}
    return {"state": str(ended.outcome), "packets": list(ended.packets), "reason": ended.reason}


def _words(table: tuple[tuple[float, str], ...], value: float) -> str:
    return next(words for limit, words in table if value <= limit)


def _render_plan(value: dict[str, Any]) -> str:
    lines = [
        f"Plan {value['plan_id']} ({value['state']}): a {value['kind']} packet in mode "
        f"{value['mode']}, for {value['purpose']}.",
        f"Domain {value['domain']}"
        + (": open." if value["domain_is_open"] else ": not open yet; nothing can be reserved."),
        f"Base: weights {value['base_digest'][:16]}….",
    ]
    constants, cost = value["constants"], value.get("cost")
    if cost is None:
        lines.append("No constants: audits only, and no epsilon may be claimed.")
    else:
        recognised = cost["recognised_at_1_percent_false"]
        left = cost["rdp_left_in_domain"]
        lines += [
            f"Each person is in a step with chance {constants['sampling_rate']:g}, in "
            f"{constants['steps']} steps; noise multiplier {constants['noise_multiplier']:g}.",
            f"Cost: epsilon {cost['epsilon_by_rdp']:.3g} at delta {constants['delta']:g} by RDP "
            f"({cost['epsilon_by_pld']:.3g} by PLD, {cost['epsilon_by_pld_label']}): "
            f"{cost['strength']}.",
            f"In words: at a setting that wrongly accuses 10 of 1,000 people, no attack on this "
            f"run recognises more than {1000 * recognised:.0f} of 1,000 who took part "
            f"(comparable to mu {cost['gaussian_mu']:.2g}).",
            f"Budget: {cost['rdp_at_order']:.3g} nats at order {cost['order']}"
            + (f", {left:.3g} left in the domain." if left is not None else "."),
            f"About {cost['expected_people_per_step']:g} people in a step, noise to signal "
            f"{cost['noise_to_signal']:.2g}: {cost['utility']} (a rule of thumb).",
        ]
    lines += [click.style(f"Warning: {words}", fg="red") for words in value["warnings"]]
    lines.append(f"File: {value['path']}")
    if value["state"] == "draft":
        lines.append(f"Next: allograft-site plan sign {value['plan_id'][:12]}")
    return "\n".join(lines)


def _render_ledger(value: dict[str, Any]) -> str:
    if not value["domains"]:
        return "No privacy domain yet: `allograft-site ledger open-domain`."
    accounts = [_render_account(account) for account in value["domains"]]
    accounts += [f"No signed plan is here for {plan[:12]}." for plan in value["without_plan"]]
    return "\n".join([*accounts, f"{value['entries']} entries, head {value['head'].split()[1]}"])


def _render_disjoint(value: dict[str, Any]) -> str:
    lines = [
        f"No person is in two of: {', '.join(value['disjoint'])}."
        if len(value["disjoint"]) > 1
        else "Fewer than two domains have people; there is nothing to compare."
    ]
    if value["without_people"]:
        lines.append(f"Without people so far: {', '.join(value['without_people'])}.")
    lines.append("People are told apart by their ids: two ids of one person are two people here.")
    return "\n".join(lines)


def _render_overlap(value: dict[str, Any]) -> str:
    if not value["domains"]:
        return "None of these people is in a domain."
    return f"Some of these people belong to: {', '.join(value['domains'])}."


def _render_account(value: dict[str, Any]) -> str:
    lines = [
        f"{value['domain']}: epsilon at most {value['epsilon_max']:g} at delta "
        f"{value['delta_max']:g}, for ever (declared by {value['declared_by']})",
        f"  at order {value['order']}: cap {value['rdp_cap']:.3f} nats, spent "
        f"{value['rdp_spent']:.3f}, left {value['rdp_left']:.3f}",
    ]
    if value["infinite"]:
        words = "epsilon is INFINITE (∞): something was released without privacy"
        lines.append("  " + click.style(words, fg="red", bold=True))
    else:
        by_pld = value["epsilon_by_pld"]
        also = f"; {by_pld:.3g} by PLD, {value['epsilon_by_pld_label']}" if by_pld else ""
        lines.append(f"  epsilon so far {value['epsilon_by_rdp']:.3g} by RDP at this order{also}")
    for charge in value["charges"]:
        ended = f" ({charge['reason']})" if charge["reason"] else ""
        lines.append(
            f"  {charge['plan_id'][:12]} {charge['kind']}: {charge['rdp']:.3f} nats, "
            f"{charge['state']}{ended}: {charge['purpose']}"
        )
    lines += [
        "  " + click.style(f"without privacy: {release['packet'][:16]}…", fg="red")
        for release in value["nonprivate_releases"]
    ]
    return "\n".join(lines)
