# SPDX-License-Identifier: Apache-2.0
"""Plots as SVG: lines and marks on two axes, drawn without a plotting library.

A drawing loads nothing, holds no script and escapes every text, so it can stand in a page about a
stranger's packet as well as in a file of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_MARGIN = 44
_LEGEND_LINE = 14
_MOST_MARKS = 40
_COLOURS = ("#0b5cad", "#b3541e", "#10622f", "#7a2e8e", "#8a6d00", "#9c1c1c", "#2b7a78", "#57606a")


@dataclass(frozen=True, slots=True)
class Series:
    """Points that belong together; a line runs through two or more in the order given."""

    points: Sequence[tuple[float, float]]
    name: str = ""


@dataclass(frozen=True, slots=True)
class Axes:
    """Labels and size of a drawing. `log_x` needs x above 0.

    A series with a name stands in the legend, under the number beside its last point: colours
    repeat after eight, and not everybody tells them apart.
    """

    x_label: str
    y_label: str
    width: int = 420
    height: int = 220
    log_x: bool = False


def draw(series: Sequence[Series], axes: Axes) -> str:
    """Draw series on common axes, which include zero unless they are logarithmic.

    Returns:
        One `<svg>` element.
    """
    named = [number for number, each in enumerate(series) if each.name]
    bottom = axes.height + _LEGEND_LINE * len(named)
    xs = [_scaled(x, axes.log_x) for each in series for x, _ in each.points]
    ys = [y for each in series for _, y in each.points]
    across, up = _Scale.over(xs, not axes.log_x), _Scale.over(ys, True)
    left, base = _MARGIN, axes.height - _MARGIN

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + (axes.width - 2 * _MARGIN) * across.share(_scaled(x, axes.log_x)),
            base - (axes.height - 2 * _MARGIN) * up.share(y),
        )

    drawn = "".join(
        _draw_line([place(x, y) for x, y in each.points], _colour(number))
        for number, each in enumerate(series)
    )
    zero = base - (axes.height - 2 * _MARGIN) * up.share(0.0)
    low, high = (f"{10**v:.3g}" if axes.log_x else f"{v:.3g}" for v in (across.low, across.high))
    words = [
        _text(left - 4, _MARGIN + 4, f"{up.high:.3g}", "end"),
        _text(left - 4, base, f"{up.low:.3g}", "end"),
        _text(axes.width - _MARGIN, base + 16, high, "end"),
        _text(axes.width // 2, base + 30, axes.x_label, "middle"),
        _text(left, _MARGIN - 12, axes.y_label, "start"),
    ]
    if across.low:
        words.append(_text(left, base + 16, low, "middle"))
    taken: list[tuple[float, float]] = []
    for line, number in enumerate(named):
        y = axes.height + _LEGEND_LINE * line
        words.append(
            f'<rect x="{left}" y="{y - 8}" width="9" height="9" fill="{_colour(number)}"/>'
        )
        name = series[number].name
        if len(named) > 1:
            name = f"{line + 1}  {name}"
            spot = _free_spot(place(*series[number].points[-1]), taken)
            taken.append(spot)
            words.append(_text(*spot, f"{line + 1}", "start"))
        words.append(_text(left + 14, y, name, "start"))
    label = f"{axes.y_label} against {axes.x_label}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {axes.width} {bottom}" '
        f'role="img" aria-label="{escape(label)}">'
        f'<path d="M{left},{_MARGIN} V{base} M{left},{zero:.1f} H{axes.width - _MARGIN}" '
        f'fill="none" stroke="#8c959f"/>{drawn}{"".join(words)}</svg>'
    )


@dataclass(frozen=True, slots=True)
class _Scale:
    low: float
    high: float

    @classmethod
    def over(cls, values: Sequence[float], with_zero: bool) -> _Scale:
        found = [*values, *([0.0] if with_zero else [])]
        low, high = min(found), max(found)
        return cls(low, high if high > low else low + 1.0)

    def share(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low)


def _free_spot(
    point: tuple[float, float], taken: Sequence[tuple[float, float]]
) -> tuple[float, float]:
    """Where a number beside a point covers no other number: above those that are there."""
    x, y = round(point[0] + 5, 1), round(point[1] + 4, 1)
    while any(abs(x - other) < 13 and abs(y - above) < 10 for other, above in taken):
        y = round(y - 10, 1)
    return x, y


def _scaled(x: float, log: bool) -> float:
    return math.log10(x) if log else x


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


def _draw_line(points: Sequence[tuple[float, float]], colour: str) -> str:
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    marks = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>'
        for x, y in points
        if len(points) <= _MOST_MARKS
    )
    path = f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>'
    return (path if len(points) > 1 else "") + marks


def _text(x: float, y: float, words: str, anchor: str) -> str:
    style = 'font-family="system-ui,sans-serif" font-size="11" fill="#57606a"'
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" {style}>{escape(words)}</text>'
