# SPDX-License-Identifier: Apache-2.0
"""The demo's closing words: what a person reads fits a terminal, what a script reads is whole."""

import io
import json

from rich.console import Console

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
