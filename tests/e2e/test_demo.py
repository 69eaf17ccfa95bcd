# SPDX-License-Identifier: Apache-2.0
"""The main job, with real processes: what `make demo` shows must be true."""

import json
import shutil
import subprocess
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def _demo(tmp_path: Path, *options: str) -> dict:
    program = shutil.which("allograft")
    assert program is not None
    report = tmp_path / "report.json"
    outcome = subprocess.run(
        [program, "demo", "--report", str(report), *options],
        capture_output=True,
        text=True,
        timeout=1400,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stdout[-3000:] + outcome.stderr[-3000:]
    return json.loads(report.read_text("utf-8"))


def _ours() -> set[int]:
    marks = ("allograft", "flower-", "flwr")
    return {
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if any(mark in part for part in process.info["cmdline"] or () for mark in marks)
    }


def test_demo_tells_the_whole_story_and_leaves_nothing_running(tmp_path: Path) -> None:
    before = _ours()
    report = _demo(tmp_path)
    sites = report["sites"]
    kept = [site for site in sites.values() if site["state"] == "kept"]
    assert len(sites) == 4
    assert kept
    assert all(site["gain"] > 0 for site in kept)
    assert {site["verdict"] for site in sites.values()} >= {"exact", "lineage", "refuse"}
    refused = next(site for site in sites.values() if site["verdict"] == "refuse")
    assert refused["state"] == "refused"
    assert refused["gain"] is None, "a refused packet is never opened, so nothing was measured"
    assert report["tampered"]["state"] == "quarantined"
    assert report["tampered"]["error"].startswith("AG-")
    assert report["foreign"]["error"].startswith("AG-")
    assert report["revert"]["bit_exact"] is True
    assert report["audit"]["verified"] is True
    assert report["audit"]["entries"] >= 6
    assert report["audit"]["witnesses"] >= 2
    assert report["packet"]["sealed_bytes"] > report["packet"]["payload_bytes"] > 0
    assert _ours() <= before
