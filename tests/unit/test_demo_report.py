# SPDX-License-Identifier: Apache-2.0
"""The demo's closing words: what a person reads fits a terminal, what a script reads is whole."""

import io
import json
from dataclasses import replace

from rich.console import Console

from allograft.cli.demo.privacy_report import PrivacyReport, WayOutcome, print_privacy_report
from allograft.cli.demo.report import (
    Audit,
    Foreign,
    PacketFigures,
    Report,
    Revert,
    SiteOutcome,
    Tampered,
    print_report,
)

REPORT = Report(
    seconds=301.2,
    packet=PacketFigures("ab" * 16, "organ", 611_968, 639_577),
    sites={
        "oakfield": SiteOutcome("own", "dispatched", "made, gated and sealed it here"),
        "rivermead": SiteOutcome(
            "exact", "kept", "attached to ward at dose 0.5", 0.594, 0.55, 0.001, 0.015, 0.5
        ),
        "hillcrest": SiteOutcome(
            "lineage",
            "quarantined",
            "attached to ward at dose 0.25",
            0.613,
            0.57,
            -0.01,
            0.047,
            0.25,
        ),
        "farshore": SiteOutcome("refuse", "refused", "AG-RCP-013: same shape, other lineage"),
    },
    tampered=Tampered("quarantined", "AG-PKT-004"),
    foreign=Foreign("AG-PKT-008"),
    revert=Revert(bit_exact=True),
    audit=Audit(entries=7, verified=True, witnesses=4),
)


def printed(report: Report) -> list[str]:
    sink = io.StringIO()
    print_report(report, Console(file=sink, width=80))
    return sink.getvalue().splitlines()


def test_every_site_is_one_line_of_a_terminal_and_every_reason_is_told() -> None:
    lines = printed(REPORT)
    (row,) = [line for line in lines if "rivermead" in line and "│" in line]
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells == ["rivermead", "exact", "kept", "-0.594", "-0.001", "+0.015", "0.5"]
    assert "  farshore: AG-RCP-013: same shape, other lineage" in lines


def test_what_went_wrong_is_not_told_as_success() -> None:
    broken = Report(
        REPORT.seconds, REPORT.packet, REPORT.sites, REPORT.tampered, REPORT.foreign,
        Revert(bit_exact=False), Audit(entries=7, verified=False, witnesses=0),
    )  # fmt: skip
    text = "\n".join(printed(broken))
    assert "NOT restored" in text
    assert "NOT verified" in text


def test_the_file_for_scripts_has_the_promised_fields() -> None:
    report = json.loads(json.dumps(REPORT.to_json()))
    assert set(report) == {
        "seconds", "packet", "sites", "tampered", "foreign", "revert", "audit",
    }  # fmt: skip
    assert set(report["packet"]) == {"id", "kind", "payload_bytes", "sealed_bytes"}
    assert set(report["sites"]["rivermead"]) >= {
        "verdict", "state", "reason", "gain", "retention_change", "dose",
    }  # fmt: skip
    assert report["tampered"] == {"state": "quarantined", "error": "AG-PKT-004"}
    assert report["foreign"] == {"error": "AG-PKT-008"}
    assert report["revert"] == {"bit_exact": True}
    assert report["audit"] == {"entries": 7, "verified": True, "witnesses": 4}


PASSED = dict.fromkeys(("G0", "G2", "G3", "G4", "G5", "G6", "G7"), "PASS")
OVERFIT = WayOutcome(
    "ab" * 16, None, 0.41, -0.2, 0.163, 0.12, 37.0, 6.2, 31.0,
    PASSED | {"G3": "FAIL", "G4": "FAIL", "G5": "FAIL"}, left=False,
)  # fmt: skip
PRIVATE = WayOutcome("cd" * 16, 2.99, 0.05, -0.01, 0.009, 0.004, 0.0, 1.1, 0.9, PASSED, left=True)
PRIVACY = PrivacyReport(
    612.0,
    1022,
    {
        "overfit": OVERFIT,
        "ordinary": replace(OVERFIT, gates=PASSED),
        "epsilon 8": replace(PRIVATE, gates=PASSED | {"G4": "INVALID"}, left=False),
        "epsilon 3": PRIVATE,
    },
    SiteOutcome("exact", "kept", "attached to ward at dose 1"),
    Audit(entries=5, verified=True, witnesses=2),
    "",
)


def test_utility_and_leakage_of_each_way_stand_in_one_line_of_a_terminal() -> None:
    sink = io.StringIO()
    print_privacy_report(PRIVACY, Console(file=sink, width=80))
    lines = sink.getvalue().splitlines()
    rows = {
        cells[0]: cells[1:]
        for line in lines
        if "│" in line and (cells := [cell.strip() for cell in line.strip("│").split("│")])
    }
    assert rows["overfit"] == ["-0.410", "163", "37", "6.2", "31.0", "FAIL G3 G4 G5"]
    assert rows["ordinary"][-1] == "nobody agreed"
    assert rows["epsilon 8"][-1] == "INVALID G4"
    assert rows["epsilon 3"] == ["-0.050", "9", "0", "1.1", "0.9", "left"]
    assert any(line.startswith("  epsilon 8: INVALID proves no leak") for line in lines)
    assert not any(line.startswith("  overfit: INVALID") for line in lines)


def test_the_file_for_scripts_names_no_patient() -> None:
    written = json.dumps(PRIVACY.to_json())
    assert set(json.loads(written)) == {
        "seconds", "patients", "ways", "recipient", "audit", "page",
    }  # fmt: skip
    assert "patient-" not in written
