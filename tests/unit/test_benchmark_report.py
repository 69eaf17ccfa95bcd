# SPDX-License-Identifier: Apache-2.0
"""Claims about how benchmarks tell their figures."""

import json

from benchmarks import report

FIGURES = [report.Figure("seal", 0.8, "x", ">= 0.6"), report.Figure("rows", 12000, "")]


def test_full_run_keeps_its_figures_and_appends_a_row(tmp_path, capsys):
    options = report.parse_options("", ["--json"])
    for _ in range(2):
        report.publish("sample", FIGURES, options, tmp_path)
    kept = json.loads((tmp_path / "results" / "sample.json").read_text())
    assert kept["figures"][0] == {"name": "seal", "value": 0.8, "unit": "x", "target": ">= 0.6"}
    assert json.loads(capsys.readouterr().out.split("\n}\n")[0] + "\n}") == kept
    rows = (tmp_path / "RESULTS.md").read_text().splitlines()
    assert len([row for row in rows if "| sample |" in row]) == 2
    assert "seal 0.8 x (target >= 0.6); rows 12,000" in rows[-1]


def test_a_row_goes_into_the_table_and_not_below_the_words_about_it(tmp_path):
    options = report.parse_options("", ["--json"])
    report.publish("sample", FIGURES, options, tmp_path)
    with (tmp_path / "RESULTS.md").open("a") as handle:
        handle.write("\nWords about the rows.\n\n| with | a table |\n")
    report.publish("other", FIGURES, options, tmp_path)
    lines = (tmp_path / "RESULTS.md").read_text().splitlines()
    assert "| other |" in lines[-5]
    assert lines[-4:] == ["", "Words about the rows.", "", "| with | a table |"]


def test_quick_run_prints_and_keeps_nothing(tmp_path, capsys):
    report.publish("sample", FIGURES, report.parse_options("", ["--quick"]), tmp_path)
    assert capsys.readouterr().out == "seal 0.8 x (target >= 0.6)\nrows 12,000\n"
    assert list(tmp_path.iterdir()) == []
