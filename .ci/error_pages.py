# SPDX-License-Identifier: Apache-2.0
"""Write docs/errors/ from the error registry, so that page and code cannot differ."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from allograft.errors import CODES, ErrorCode

AREAS = {
    "AG-IN": "documents and arguments",
    "AG-STO": "local storage",
    "AG-KEY": "keys",
    "AG-SIG": "signed envelopes",
    "AG-SEA": "sealing and opening",
    "AG-PKT": "packets and tensors",
    "AG-PRO": "provenance",
    "AG-ROS": "roster",
    "AG-LOG": "log and audit",
    "AG-RLY": "relay",
    "AG-RTE": "cards, offers, routes, receipts and withdrawals",
    "AG-RCP": "recipes and training",
    "AG-EVA": "evaluation",
    "AG-PRV": "privacy and release",
    "AG-SIT": "site daemon",
    "AG-CRD": "coordinator",
    "AG-CLI": "command line",
    "AG-DEM": "demo",
}


def pages() -> dict[str, str]:
    """File name to content, one page per area and an index."""
    areas: dict[str, dict[str, ErrorCode]] = defaultdict(dict)
    for code, entry in CODES.items():
        areas[code.rsplit("-", 1)[0]][code] = entry
    index = [
        "# Errors",
        "",
        "Every failure has a stable code. Exit status: 1 rejected (trying again changes nothing), "
        "2 usage, 3 unavailable (try again later).",
        "",
    ]
    written = {}
    for area, title in AREAS.items():
        if not areas[area]:
            continue
        lines = [f"# {area}: {title}", ""]
        for code, entry in sorted(areas[area].items()):
            lines += [f"## {code}", "", f"**What happened:** {entry.title}.", "", entry.fix, ""]
        written[f"{area}.md"] = "\n".join(lines)
        index.append(f"- [{area}]({area}.md): {title} ({len(areas[area])} codes)")
    written["README.md"] = "\n".join(index) + "\n"
    return written


if __name__ == "__main__":
    folder = Path(__file__).resolve().parents[1] / "docs" / "errors"
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in pages().items():
        (folder / name).write_text(content, encoding="utf-8")
