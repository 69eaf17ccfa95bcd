# SPDX-License-Identifier: Apache-2.0
"""Two plots of a run: gain against retention with dose as the path, and bytes against gain."""

from __future__ import annotations

from allograft.evaluate.transfer.cell import Role
from allograft.evaluate.transfer.figures import Figures
from allograft.svg import Axes, Series, draw

_WIDTH, _HEIGHT = 640, 360


def plot_doses(figures: Figures) -> str:
    """Each recipe on the donor's own base: what general text loses, what the domain gains."""
    base = figures.zero_shot[0].recipient
    curves = [curve for curve in figures.curves if curve.recipient == base]
    curves.sort(key=lambda curve: -curve.points[-1].gain)
    series = [Series([(p.general, p.gain) for p in curve.points], curve.arm) for curve in curves]
    x, y = "general text worse (bits per byte)", "domain gain (bits per byte), dose along the line"
    return draw(series, Axes(x, y, _WIDTH, _HEIGHT))


def plot_bytes(figures: Figures) -> str:
    """What crosses the border against what it gains on the donor's own base, at full dose."""
    base = figures.zero_shot[0].recipient
    rows = [
        row
        for row in figures.rows
        if row.recipient == base
        and row.role in {Role.ORACLE, Role.RECIPE, Role.BASELINE}
        and row.payload_bytes
        and row.chosen_by != "gate"
    ]
    rows.sort(key=lambda row: -row.gain.value)
    series = [Series([(row.payload_bytes / 1024, row.gain.value)], row.arm) for row in rows]
    x, y = "payload (KiB, logarithmic)", "domain gain (bits per byte)"
    return draw(series, Axes(x, y, _WIDTH, _HEIGHT, log_x=True))
