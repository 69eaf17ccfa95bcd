# SPDX-License-Identifier: Apache-2.0
"""Which evidence in a dossier answers which question of a law or standard.

A table for the person who must decide, not legal advice: it says where to look, never that a duty
is met. `answers` are fields of the dossier and of the packet's statement, as the page names them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Duty:
    """One question, and where its answer stands.

    Attributes:
        source: Law, opinion or standard.
        clause: Which part of it.
        question: What it asks, in our words.
        answers: Fields that answer it.
    """

    source: str
    clause: str
    question: str
    answers: tuple[str, ...]


DUTIES: tuple[Duty, ...] = (
    Duty(
        "GDPR", "Art. 5(1)(b), (e)", "For what purpose, and for how long?",
        ("purpose", "retention_until", "not_after"),
    ),
    Duty(
        "GDPR", "Art. 17, 19", "How is something taken back, and who is told?",
        ("packet_id", "recipients"),
    ),
    Duty(
        "GDPR", "Art. 30", "What was disclosed, to whom, and when?",
        ("kind", "recipients", "created"),
    ),
    Duty(
        "GDPR", "Art. 32, 35", "Which measures reduce the risk to people, and how was it assessed?",
        ("mode", "privacy", "gates", "approvals_required"),
    ),
    Duty(
        "EDPB Opinion 28/2024", "anonymity of models",
        "Can data of a person be extracted, or be obtained by queries, by means likely to be used?",
        ("gates.G3", "gates.G4", "gates.G5", "privacy.epsilon"),
    ),
    Duty(
        "EDPB Opinion 28/2024", "documentation",
        "Which tests were run, and with what result?",
        ("gates", "report_digest", "policy_digest"),
    ),
    Duty(
        "HIPAA", "45 CFR 164.514(b)(1)",
        "By which methods was the risk of identification found to be very small?",
        ("privacy", "gates.G3", "gates.G4", "gates.G5", "gates.G7"),
    ),
    Duty(
        "SATRE", "3.3.07", "Was a model examined for disclosure risk before it left?",
        ("gates", "approvals_required"),
    ),
    Duty(
        "EU AI Act", "Art. 10", "How was the training data governed?",
        ("mode", "privacy.plan_digest", "gates.G7"),
    ),
    Duty(
        "EU AI Act", "Art. 11, 12, 18, 19; Annex IV",
        "Which documentation and records are kept?",
        ("software", "policy_digest", "report_digest", "privacy.ledger_head"),
    ),
    Duty(
        "NIST SP 800-226", "the guarantee", "Which unit, epsilon, delta and relation?",
        ("privacy.unit", "privacy.epsilon", "privacy.delta", "privacy.epsilon_domain"),
    ),
    Duty(
        "NIST SP 800-226", "algorithm and implementation",
        "Which mechanism, sampler, noise and accountant, and how were they tested?",
        ("privacy.mechanism", "privacy.noise", "privacy.accountant", "gates.G1", "gates.G4"),
    ),
    Duty(
        "NIST SP 800-226", "trust model, data exposure",
        "Who could see the data, and what is assumed?",
        ("software", "caveats"),
    ),
)  # fmt: skip
