# SPDX-License-Identifier: Apache-2.0
"""A dossier as a page for the person who must say yes or no: plain sentences, numbers, plots.

One self-contained HTML file without scripts, fonts or links that load anything, which prints to
PDF from any browser. Every text is escaped: a dossier comes from another site. Sentences state what
was measured and what that cannot show; none says that something is safe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from allograft.crypto import canonical
from allograft.privacy.claim import PrivacyClaim
from allograft.privacy.dossier import (
    Dossier,
    GateResult,
    GateVerdict,
    warnings_in,
    warnings_of,
)
from allograft.privacy.duties import DUTIES
from allograft.privacy.modes import Mode
from allograft.privacy.report import FullReport, Point
from allograft.svg import Axes, Series, draw

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1b1f24}
body{max-width:46rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin:0 0 .2rem}h2{font-size:1.1rem;margin:1.8rem 0 .4rem}
table{border-collapse:collapse;width:100%;font-size:.92rem}
td,th{border-bottom:1px solid #d5dae0;padding:.35rem .5rem;text-align:left;vertical-align:top}
.verdict{display:inline-block;min-width:4.2rem;font-weight:600}
.PASS{color:#10622f}.FAIL,.INVALID{color:#9c1c1c}
.note{color:#57606a;font-size:.9rem}code{font-size:.85em;overflow-wrap:anywhere}
figure{margin:.6rem 0;display:inline-block;width:26rem;max-width:100%}figcaption{font-size:.88rem}
svg{width:100%;height:auto}
@media print{body{margin:0;max-width:none}h2{break-after:avoid}table,figure{break-inside:avoid}}
"""

_MODES: Mapping[Mode, str] = {
    Mode.OPEN: "Nothing is promised about privacy: somebody declared that the data needs none.",
    Mode.MEASURED: (
        "No bound is promised. The packet was tried with the attacks below, and left only because "
        "they found little, people agreed, and its recipients are named. A better attack may find "
        "more: treat the packet as personal data."
    ),
    Mode.STRICT: (
        "Differential privacy is promised for every person: whatever anybody learns from the "
        "packet, they would have learnt almost as well without that person's records."
    ),
}

_GATES: Mapping[str, str] = {
    "G0": "The packet is of a known kind and holds nothing else.",
    "G1": "The signed plan, its constants and the claimed epsilon agree.",
    "G2": "No text that leaves looks like a name, number or address of a person.",
    "G3": "No passage that only one person's records hold came back within 1,000 tries.",
    "G4": "Planted texts are not remembered more than was promised.",
    "G5": "The attacks that were run do not recognise who took part more often than allowed.",
    "G6": "Tensors have the allowed names, shapes, sizes and finite values.",
    "G7": "The packet was learnt from enough people.",
}

_CAVEATS = (
    "A recipient can check the arithmetic and the signatures. That the training followed its plan "
    "rests on the donor and its software.",
    "Differential privacy hides each person, not facts about all people of the site, and not what "
    "the base model already knew.",
    "Audits are lower bounds: passing them proves nothing about attacks that were not tried.",
    "The text scan finds known identifiers and patterns; not paraphrase, not rare combinations.",
)


@dataclass(frozen=True, slots=True)
class Terms:
    """What the packet's statement says about its use; shown where it is at hand."""

    donor: str
    purpose: str
    not_after: str
    retention_until: str
    licence: tuple[str, ...]
    recipients: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything a page shows.

    Attributes:
        dossier: Verified.
        approvals: Roles whose approvals were verified.
        terms: From the packet's statement, if at hand.
        report: The full report, at the donor's own site only.
        signer: Who signed, in words; empty if nobody checked.
        tpr_bound: ε and δ to the most of the true members that an attack at 1 % false accusations
            can recognise.
    """

    dossier: Dossier
    approvals: tuple[str, ...] = ()
    terms: Terms | None = None
    report: FullReport | None = None
    signer: str = ""
    tpr_bound: Callable[[float, float], float] | None = None


def render_page(evidence: Evidence) -> str:
    """The whole page."""
    dossier = evidence.dossier
    parts = [
        f"<h1>Packet {escape(dossier.packet_id[:12])}…</h1>",
        f"<p class=note>{escape(_subtitle(evidence))}</p>",
        "<h2>What is promised</h2>",
        f"<p><b>Mode {escape(str(dossier.mode.mode))}.</b> {_MODES[dossier.mode.mode]}</p>",
        *_declaration(dossier),
        *_claim(evidence),
        "<h2>What was examined</h2>",
        _gate_table(dossier.gates),
        *_findings(evidence),
        *_plots(evidence.report),
        "<h2>Who agreed</h2>",
        _approvals(evidence),
        *_terms(evidence.terms),
        "<h2>What this cannot show</h2>",
        "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in _CAVEATS) + "</ul>",
        "<h2>Where questions of law and standards are answered</h2>",
        "<p class=note>A table to find things by. It does not say that a duty is met.</p>",
        _duty_table(evidence),
        "<h2>To check it</h2>",
        _identity(dossier),
    ]
    body = "\n".join(parts)
    title = f"Dossier of packet {escape(dossier.packet_id[:12])}"
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title>\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'\">\n"
        f"<style>{_STYLE}</style>\n<body>\n{body}\n</body></html>\n"
    )


def describe(evidence: Evidence) -> list[str]:
    """The page's findings as plain sentences, for a terminal."""
    dossier = evidence.dossier
    lines = [f"Mode {dossier.mode.mode}. {_MODES[dossier.mode.mode]}"]
    if dossier.privacy is not None:
        lines += _claim_sentences(dossier.privacy, evidence.tpr_bound)
    for gate in dossier.gates:
        lines.append(
            f"{gate.name} {gate.verdict}: {_GATES.get(gate.name, '')} {gate.reason}".strip()
        )
    lines += [f"Warning, {text}." for text in warnings_in(dossier.gates)]
    lines += _finding_sentences(evidence)
    return lines


def _subtitle(evidence: Evidence) -> str:
    dossier = evidence.dossier
    size = sum(part.size_bytes for part in dossier.parts)
    signed = evidence.signer or "nobody checked the signature"
    return f"{dossier.kind}, {size:,} bytes, dossier of {dossier.created}; {signed}"


def _declaration(dossier: Dossier) -> list[str]:
    declaration = dossier.mode.declaration
    if declaration is None:
        return []
    return [
        f"<p>Declared to be {escape(str(declaration.nature))} data by the role "
        f"<i>{escape(declaration.declared_by)}</i>.</p>"
    ]


def _claim(evidence: Evidence) -> list[str]:
    claim = evidence.dossier.privacy
    if claim is None:
        return []
    sentences = _claim_sentences(claim, evidence.tpr_bound)
    lines = ["<p>" + " ".join(map(escape, sentences)) + "</p>"]
    if claim.constants is not None:
        c = claim.constants
        rows = (
            ("unit and relation", "one person, added or removed"),
            ("sampling", f"every person by a coin of its own, {c.sampling_rate:g} per step"),
            ("steps", f"{c.steps:,}"),
            ("clip norm, noise", f"{c.clip_norm:g}, {c.noise_multiplier:g} times the clip norm"),
            ("divisor", f"{c.divisor:g}"),
            ("windows of one person", f"at most {c.windows_per_person}"),
            ("generator of the noise", claim.noise),
            ("accountant", claim.accountant),
            ("filter", f"Renyi order {claim.filter_order:g}, fixed when the ledger was opened"),
        )
        lines.append(_table((), rows))
    return lines


def _claim_sentences(
    claim: PrivacyClaim, tpr_bound: Callable[[float, float], float] | None
) -> list[str]:
    if claim.constants is None or claim.epsilon is None:
        return [
            "Nothing bounds what this packet tells about a person; from now on nothing bounds what "
            "all packets of these people tell together."
        ]
    delta = claim.constants.delta
    said = [f"Epsilon is {claim.epsilon:.2f} for this packet, at a delta of {delta:g}."]
    if claim.epsilon_domain is None:
        said.append("These people have also been in a packet without any bound.")
    else:
        said.append(
            f"For all packets of the same people so far it is {claim.epsilon_domain:.2f} together."
        )
    if tpr_bound is not None:
        share = 1000 * tpr_bound(claim.epsilon, delta)
        said.append(
            "Out of 1,000 people who took part, at a setting that wrongly accuses 10 of 1,000 who "
            f"did not, no attack whatever recognises more than {math.ceil(share):,}."
        )
    said.append(_tier(claim.epsilon))
    return said


def _tier(epsilon: float) -> str:
    """Tiers of Ponomareva et al. (2023, arXiv 2303.00654)."""
    if epsilon <= 1:
        return "An epsilon of at most 1 counts as a strong guarantee."
    if epsilon <= 10:
        return "An epsilon of at most 10 counts as a reasonable guarantee."
    return "An epsilon above 10 is no meaningful guarantee by itself."


def _gate_table(gates: Sequence[GateResult]) -> str:
    rows = []
    for gate in gates:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in gate.figures)
        words = escape(_GATES.get(gate.name, ""))
        words += "".join(f"<br><b>Warning: {escape(text)}.</b>" for text in warnings_of(gate))
        if gate.verdict is not GateVerdict.PASS:
            words = f"<b>{escape(gate.reason)}</b>"
        rows.append(
            f"<tr><td><span class='verdict {gate.verdict}'>{gate.verdict}</span></td>"
            f"<td>{escape(gate.name)}</td><td>{words}<br><span class=note>{escape(figures)}</span>"
            "</td></tr>"
        )
    return "<table>" + "".join(rows) + "</table>"


def _findings(evidence: Evidence) -> list[str]:
    sentences = _finding_sentences(evidence)
    return ["<p>" + " ".join(map(escape, sentences)) + "</p>"] if sentences else []


def _finding_sentences(evidence: Evidence) -> list[str]:
    """What the full report found on real people, as numbers that a person can weigh."""
    if evidence.report is None:
        if evidence.dossier.mode.mode is Mode.OPEN:
            return []
        return [
            "The figures on real people stay at the donor's site; the dossier names their hash."
        ]
    return tell_findings(evidence.report)


def tell_findings(report: FullReport) -> list[str]:
    """What audits found on real people, in sentences. For the donor's own eyes."""
    figures = report.figures
    said = []
    membership = figures.get("G5", {})
    if {"tpr", "tpr_low", "tpr_high"} <= membership.keys():
        said.append(
            "Out of 1,000 people, at a setting that wrongly accuses 10, the best attack we ran "
            f"recognises {1000 * membership['tpr']:.0f} "
            f"(95 % interval {1000 * membership['tpr_low']:.0f} to "
            f"{1000 * membership['tpr_high']:.0f})."
        )
    extraction = figures.get("G3", {})
    if {"extractable", "possible"} <= extraction.keys():
        said.append(
            f"{extraction['extractable']:,.0f} of {extraction['possible']:,.0f} passages of one "
            "person's records came back within 1,000 tries."
        )
    if said:
        said.append("These are lower bounds on leakage.")
    return said


def _plots(report: FullReport | None) -> list[str]:
    if report is None:
        return []
    found = []
    if report.exposure:
        found.append(
            _plot(
                report.exposure, "repeats of a planted text", "median exposure, bits",
                "How much better a planted text is known than ones that were never there. Chance "
                "is 1 bit.",
            )
        )  # fmt: skip
    if report.roc:
        found.append(
            _plot(
                report.roc, "wrongly accused", "recognised",
                "The best membership attack at low rates of false accusations. An attack that "
                "knows nothing lies on the diagonal.",
            )
        )  # fmt: skip
    if report.budget:
        found.append(
            _plot(
                report.budget, "entry of the ledger", "epsilon of these people",
                "What has been spent on these people over time.",
            )
        )  # fmt: skip
    return found


def _plot(points: Sequence[Point], x_label: str, y_label: str, caption: str) -> str:
    """A line through some points, with what it shows."""
    line = Series([(point.x, max(0.0, point.y)) for point in points])
    drawing = draw([line], Axes(x_label, y_label))
    return f"<figure>{drawing}<figcaption>{escape(caption)}</figcaption></figure>"


def _approvals(evidence: Evidence) -> str:
    rows = [
        (role, "agreed" if role in evidence.approvals else "has not agreed")
        for role in evidence.dossier.approvals_required
    ]
    if not rows:
        return "<p>The site's policy asks nobody.</p>"
    return _table(("role", ""), rows)


def _terms(terms: Terms | None) -> list[str]:
    if terms is None:
        return []
    rows = (
        ("donor", terms.donor),
        ("recipients", ", ".join(terms.recipients) or "none yet"),
        ("purpose", terms.purpose),
        ("may be opened until", terms.not_after),
        ("may be kept until", terms.retention_until),
        ("may also be used to", ", ".join(terms.licence) or "nothing further"),
    )
    return ["<h2>What it may be used for</h2>", _table((), rows)]


def _duty_table(evidence: Evidence) -> str:
    values = _values(evidence)
    rows = []
    for duty in DUTIES:
        answers = "<br>".join(
            f"<span class=note>{escape(name)}:</span> {escape(values.get(name, 'not at hand'))}"
            for name in duty.answers
        )
        rows.append(
            f"<tr><td>{escape(duty.source)}<br><span class=note>{escape(duty.clause)}</span></td>"
            f"<td>{escape(duty.question)}</td><td>{answers}</td></tr>"
        )
    head = "<tr><th>source</th><th>question</th><th>answer in this dossier</th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def _values(evidence: Evidence) -> dict[str, str]:
    """Every field that the table of duties may name, as text."""
    dossier, claim, terms = evidence.dossier, evidence.dossier.privacy, evidence.terms
    values = {
        "packet_id": dossier.packet_id,
        "kind": dossier.kind,
        "mode": str(dossier.mode.mode),
        "created": dossier.created,
        "policy_digest": dossier.policy_digest[:16] + "…",
        "report_digest": dossier.report_digest[:16] + "…" if dossier.report_digest else "none",
        "approvals_required": ", ".join(dossier.approvals_required) or "none",
        "software": ", ".join(f"{s.name} {s.version}" for s in dossier.software),
        "gates": ", ".join(f"{gate.name} {gate.verdict}" for gate in dossier.gates),
        "caveats": "see above, What this cannot show",
        "privacy": "no claim",
    }
    values |= {
        f"gates.{name}": next((str(g.verdict) for g in dossier.gates if g.name == name), "not run")
        for name in _GATES
    }
    if claim is not None:
        bound = "none" if claim.epsilon is None else f"{claim.epsilon:.2f}"
        together = "none" if claim.epsilon_domain is None else f"{claim.epsilon_domain:.2f}"
        values |= {
            "privacy": f"epsilon {bound}",
            "privacy.epsilon": bound,
            "privacy.epsilon_domain": together,
            "privacy.plan_digest": claim.plan_digest[:16] + "…",
            "privacy.ledger_head": claim.ledger_head[:16] + "…",
            "privacy.accountant": claim.accountant,
            "privacy.noise": claim.noise or "none",
            "privacy.unit": "one person, added or removed",
        }
        if claim.constants is not None:
            values["privacy.delta"] = f"{claim.constants.delta:g}"
            values["privacy.mechanism"] = "Gaussian on clipped sums, Poisson sampling of persons"
    if terms is not None:
        values |= {
            "purpose": terms.purpose,
            "not_after": terms.not_after,
            "retention_until": terms.retention_until,
            "recipients": ", ".join(terms.recipients) or "none yet",
        }
    return values


def _identity(dossier: Dossier) -> str:
    rows = [
        ("packet", dossier.packet_id),
        ("SHA-256 of the dossier", dossier.digest),
        *((f"SHA-256 of {part.name}", part.sha256) for part in dossier.parts),
    ]
    return _table((), rows)


def _table(head: Iterable[str], rows: Iterable[tuple[str, str]]) -> str:
    first = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table>{f'<tr>{first}</tr>' if first else ''}{lines}</table>"


def to_json(evidence: Evidence) -> dict[str, canonical.Json]:
    """What the page shows, for programs."""
    dossier, values = evidence.dossier, _values(evidence)
    statement = canonical.as_mapping(canonical.loads(dossier.to_statement()))
    return {
        "dossier": dict(canonical.as_mapping(statement["predicate"])),
        "approved_by": list(evidence.approvals),
        "warnings": list(warnings_in(dossier.gates)),
        "sentences": list(describe(evidence)),
        "signer": evidence.signer,
        "duties": [
            {
                "source": duty.source,
                "clause": duty.clause,
                "question": duty.question,
                "answers": {name: values.get(name, "") for name in duty.answers},
            }
            for duty in DUTIES
        ],
    }
