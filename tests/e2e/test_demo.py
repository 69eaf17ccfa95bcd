# SPDX-License-Identifier: Apache-2.0
"""The main job, with real processes: what `make demo` shows must be true."""

import contextlib
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from kit.flower import wait_until
from kit.shared import shared_path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def _program() -> str:
    program = shutil.which("allograft")
    assert program is not None
    return program


@pytest.fixture
def own_dir() -> Iterator[Path]:
    """A directory for temporary files, by which all processes of a demo are known.

    Not below pytest's: sockets lie in it, and their paths may be 107 bytes long.
    """
    with tempfile.TemporaryDirectory(prefix="demo-") as path:
        yield Path(path)


def _environment(own_dir: Path) -> dict[str, str]:
    return {**os.environ, "TMPDIR": str(own_dir)}


def _running(own_dir: Path) -> set[int]:
    """What a demo has started, however far down."""
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("TMPDIR") == str(own_dir):
                found.add(process.pid)
    return found


def _demo(tmp_path: Path, own_dir: Path, *options: str, timeout_s: float = 1400) -> dict:
    report = tmp_path / "report.json"
    outcome = subprocess.run(
        [_program(), "demo", "--report", str(report), *options],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        env=_environment(own_dir),
    )
    assert outcome.returncode == 0, outcome.stdout[-3000:] + outcome.stderr[-3000:]
    return json.loads(report.read_text("utf-8"))


def _write_texts(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path


def _answers(tmp_path: Path) -> Path:
    """Medical answers, shortened to keep trials short."""
    with gzip.open(shared_path("data/medical/medquad.jsonl.gz"), "rt") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(1600), strict=False)]
    return _write_texts(
        tmp_path / "medical.jsonl", [r["answer"][:500] for r in rows if r["answer"]]
    )


def _check(report: dict) -> None:
    """What every demo must have shown, whatever it ran on."""
    sites = report["sites"]
    assert len(sites) == 4
    assert {site["verdict"] for site in sites.values()} == {"own", "exact", "lineage", "refuse"}
    same = next(site for site in sites.values() if site["verdict"] == "exact")
    assert same["state"] == "kept"
    assert same["gain_low"] > 0, "better than zero-shot by more than the bootstrap interval"
    assert abs(same["null_gain"]) < same["gain_low"] / 4, "noise of equal norm does about nothing"
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


def test_demo_tells_the_whole_story_and_leaves_nothing_running(
    tmp_path: Path, own_dir: Path
) -> None:
    _check(_demo(tmp_path, own_dir))
    assert _running(own_dir) == set()


def test_demo_runs_on_a_persons_own_model_and_text(tmp_path: Path, own_dir: Path) -> None:
    stories = shared_path("data/general/tinystories_sample.txt").read_text("utf-8")
    general = [part.strip()[:500] for part in re.split(r"\n\s*\n", stories) if len(part) > 150]
    report = _demo(
        tmp_path,
        own_dir,
        "--base", str(shared_path("data/models/stories260K/hf")),
        "--data", str(_answers(tmp_path)),
        "--general", str(_write_texts(tmp_path / "general.jsonl", general)),
    )  # fmt: skip
    _check(report)


def test_demo_trains_its_base_on_wikitext_and_moves_medical_knowledge(
    tmp_path: Path, own_dir: Path
) -> None:
    pages = shared_path("data/general/wikitext2/valid.txt").read_text("utf-8")
    general = [line.strip()[:1500] for line in pages.split("\n") if len(line) > 200]
    report = _demo(
        tmp_path,
        own_dir,
        "--data", str(_answers(tmp_path)),
        "--general", str(_write_texts(tmp_path / "general.jsonl", general)),
        "--recipe", "lora",
    )  # fmt: skip
    _check(report)


@pytest.mark.timeout(2700)  # four trainings with their audits
def test_privacy_demo_stops_what_leaks_and_lets_the_private_packet_leave(
    tmp_path: Path, own_dir: Path
) -> None:
    report = _demo(tmp_path, own_dir, "--privacy", timeout_s=2600)
    ways = report["ways"]
    assert [way["epsilon"] for way in ways.values()] == [None, None, 8.0, 3.0]
    overfit, private = ways["overfit"], ways["epsilon 3"]
    assert "FAIL" in overfit["gates"].values()
    # A text planted once is known by heart, or not better than one that never was.
    assert overfit["exposure_once"] > 4
    assert private["exposure_once"] < 4
    assert set(private["gates"].values()) == {"PASS"}
    assert 0 < private["gain"] < overfit["gain"]
    # Two hundred canaries could not have refuted an epsilon of 8.
    assert ways["epsilon 8"]["gates"]["G4"] == "INVALID"
    assert [name for name, way in ways.items() if way["left"]] == ["epsilon 3"]
    assert report["recipient"]["state"] in {"kept", "reverted"}
    assert report["audit"]["verified"] is True
    assert _running(own_dir) == set()


def test_an_interrupted_demo_stops_everything_it_started(own_dir: Path) -> None:
    with subprocess.Popen(
        [_program(), "demo"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=_environment(own_dir),
        start_new_session=True,
        # In the background a shell has Ctrl-C ignored, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as demo:
        try:
            # The daemons are up and models are being trained.
            for line in demo.stdout:
                if line.startswith("… Training"):
                    break
            wait_until("the daemons have started Flower", lambda: len(_running(own_dir)) > 10)
            demo.send_signal(signal.SIGINT)
            assert demo.wait(90) == 130
        finally:
            demo.kill()
    assert _running(own_dir) == set()
