# SPDX-License-Identifier: Apache-2.0
"""Drawings are well-formed, escape what they are told, and put points where they belong."""

import itertools
import xml.etree.ElementTree as ElementTree

from allograft.svg import Axes, Series, draw

SPACE = "{http://www.w3.org/2000/svg}"


def circles(drawing: str) -> list[tuple[float, float]]:
    found = ElementTree.fromstring(drawing).iter(f"{SPACE}circle")
    return [(float(each.attrib["cx"]), float(each.attrib["cy"])) for each in found]


def test_points_lie_between_zero_and_the_largest() -> None:
    places = circles(draw([Series([(0, 0), (1, 2), (2, 4)])], Axes("x", "y", 200, 100)))
    assert places == [(44.0, 56.0), (100.0, 50.0), (156.0, 44.0)]


def test_negative_values_have_room() -> None:
    above, below = circles(draw([Series([(1, 1), (2, -1)])], Axes("x", "y", 200, 100)))
    assert above[1] == 44.0
    assert below[1] == 56.0


def test_logarithmic_steps_are_even() -> None:
    drawing = draw([Series([(1, 1), (10, 1), (100, 1)])], Axes("x", "y", log_x=True))
    first, second, third = (x for x, _ in circles(drawing))
    assert second - first == third - second


def test_names_and_labels_are_escaped() -> None:
    drawing = draw([Series([(1, 1)], "<script>")], Axes('"x" & more', "<y>"))
    assert "<script>" not in drawing
    words = [each.text for each in ElementTree.fromstring(drawing).iter(f"{SPACE}text")]
    assert {"<script>", '"x" & more', "<y>"} <= set(words)


def test_a_single_value_draws() -> None:
    assert len(circles(draw([Series([(0, 0)])], Axes("x", "y")))) == 1


def test_numbers_name_the_series_and_never_lie_on_each_other() -> None:
    same = [Series([(1, 1)], name) for name in ("one", "two", "three")]
    drawing = ElementTree.fromstring(draw(same, Axes("x", "y")))
    words = {each.text: each for each in drawing.iter(f"{SPACE}text")}
    spots = [(words[n].attrib["x"], float(words[n].attrib["y"])) for n in ("1", "2", "3")]
    assert len({x for x, _ in spots}) == 1
    heights = sorted(y for _, y in spots)
    assert min(b - a for a, b in itertools.pairwise(heights)) >= 10
    assert {"1  one", "2  two", "3  three"} <= set(words)
