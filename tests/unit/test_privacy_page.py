# SPDX-License-Identifier: Apache-2.0
"""The dossier's page: plain sentences, nothing that loads, nothing that a dossier can inject."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from allograft.crypto import canonical
from allograft.errors import RejectedError
from allograft.privacy.accountant import true_positive_bound
from allograft.privacy.dossier import GateResult, GateVerdict, Software
from allograft.privacy.duties import DUTIES
from allograft.privacy.page import Evidence, Terms, _values, describe, render_page, to_json
from allograft.privacy.report import FullReport, Point
from kit.releases import STRICT, Desk, passed

TERMS = Terms("oakfield", "care", "2026-12-27T08:00:00Z", "2027-11-27T08:00:00Z", (), ("b",))
REPORT = FullReport(
    packet_id="5" * 32,
    salt="0" * 64,
    figures={
        "G3": {"extractable": 0.0, "possible": 21454.0},
        "G5": {"tpr": 0.011, "tpr_low": 0.002, "tpr_high": 0.032},
    },
    exposure=(Point(1, 1.5), Point(16, 3.1)),
    roc=(Point(0.0, 0.0), Point(0.01, 0.011)),
    budget=(Point(1, 2.1), Point(2, 5.0)),
)


def evidence(mode: str = "strict", **changes) -> Evidence:
    desk = Desk() if mode == "open" else Desk.under(mode)
    shown = Evidence(desk.dossier, ("data-owner",), TERMS, None, "signed by a", true_positive_bound)
    return replace(shown, **changes)


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in {"meta", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("mode", ["open", "measured", "strict"])
def test_a_page_is_whole_and_loads_nothing(mode: str) -> None:
    tags = Tags()
    tags.feed(render_page(evidence(mode, report=None if mode == "open" else REPORT)))
    assert tags.open == []
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in tags.seen}
    for _, attributes in tags.seen:
        assert not {"src", "href", "onload", "onclick"} & set(attributes)


def test_everything_from_outside_is_escaped() -> None:
    evil = "<script>alert(1)</script>"
    desk = Desk.under("strict")
    desk.change_dossier(
        gates=(*desk.dossier.gates, GateResult("G9", "1", GateVerdict.FAIL, reason=evil)),
        software=(Software("allograft", evil),),
    )
    terms = replace(TERMS, purpose=evil, donor=evil, recipients=(evil,))
    page = render_page(Evidence(desk.dossier, (evil,), terms, REPORT, evil))
    assert evil not in page
    assert "&lt;script&gt;" in page


def test_people_read_numbers_they_can_weigh() -> None:
    said = " ".join(describe(evidence(report=REPORT)))
    assert "Epsilon is 2.50 for this packet, at a delta of 1e-06." in said
    assert "wrongly accuses 10, the best attack we ran recognises 11" in said
    assert "95 % interval 2 to 32" in said
    assert "0 of 21,454 passages" in said
    bound = re.search(r"no attack whatever recognises more than (\d+)", said)
    assert int(bound[1]) == pytest.approx(1000 * true_positive_bound(2.5, 1e-6), abs=1)


def test_without_the_report_the_page_says_where_it_is() -> None:
    assert any("stay at the donor's site" in line for line in describe(evidence()))
    assert not any("best attack" in line for line in describe(evidence()))


def test_a_measured_packet_is_never_called_private() -> None:
    said = " ".join(describe(evidence("measured", report=REPORT)))
    assert "No bound is promised" in said
    assert "Nothing bounds what this packet tells about a person" in said
    assert "anonymous" not in said


def test_a_domain_without_a_bound_is_said_so() -> None:
    desk = Desk.under("strict")
    desk.change_dossier(privacy=replace(STRICT, epsilon_domain=None))
    assert any("without any bound" in line for line in describe(Evidence(desk.dossier)))


def test_a_gate_that_did_not_pass_shows_its_reason() -> None:
    desk = Desk()
    failed = GateResult("G2", "1", GateVerdict.FAIL, reason="AG-PRV-021: 1 email")
    desk.change_dossier(gates=(passed("G0"), failed, passed("G6")))
    assert "<b>AG-PRV-021: 1 email</b>" in render_page(Evidence(desk.dossier))


def test_who_has_not_agreed_is_shown() -> None:
    page = render_page(evidence())
    assert "<td>data-owner</td><td>agreed</td>" in page
    assert "<td>privacy-officer</td><td>has not agreed</td>" in page


def test_every_duty_points_to_a_field_that_the_page_has() -> None:
    known = _values(evidence())
    for duty in DUTIES:
        assert duty.answers
        assert set(duty.answers) <= set(known), duty


def test_programs_get_the_same(tmp_path) -> None:
    shown = to_json(evidence(report=REPORT))
    assert shown["dossier"]["privacy"]["epsilon"] == 2.5
    assert len(shown["duties"]) == len(DUTIES)
    canonical.dumps(shown)


def test_a_report_survives_being_written_and_its_digest_is_salted() -> None:
    assert FullReport.from_bytes(REPORT.to_bytes()) == REPORT
    assert replace(REPORT, salt="1" * 64).digest != REPORT.digest


@pytest.mark.parametrize(
    "content",
    [b"{}", b"[]", b"no json", REPORT.to_bytes().replace(b"report-v1", b"report-v2"),
     REPORT.to_bytes().replace(b"[1,2.1]", b"[1]")],
)  # fmt: skip
def test_a_malformed_report_is_refused(content: bytes) -> None:
    with pytest.raises(RejectedError) as refused:
        FullReport.from_bytes(content)
    assert refused.value.code == "AG-PRV-030"


def test_warnings_of_the_audits_are_told_in_words_everywhere() -> None:
    shown = evidence("measured")
    warned = replace(passed("G5"), figures=(("tpr", 0.05), ("warn.<b>", 1.0), ("warn.tpr", 0.05)))
    gates = tuple(warned if gate.name == "G5" else gate for gate in shown.dossier.gates)
    shown = replace(shown, dossier=replace(shown.dossier, gates=gates))
    words = "more people than usual are recognised"
    assert f"Warning: {words}" in render_page(shown)
    assert "warn.<b>" not in render_page(shown)
    assert any(line.startswith(f"Warning, G5: {words}") for line in describe(shown))
    assert any(words in text for text in to_json(shown)["warnings"])
