"""Drawings of a comparison: where points and whiskers lie. Lines, bands and diagrams: see test_view_report.py."""

from __future__ import annotations

import math
import re

from hkft.view.svg import Line, Mark, scatter, whisker


def numbers(pattern: str, drawn: str) -> list[tuple[float, ...]]:
    return [tuple(map(float, found.groups())) for found in re.finditer(pattern, drawn)]


def test_points_whiskers_and_lines_lie_on_one_scale():
    marks = [Mark(0, 0.5, "a <b>", "s"), Mark(2, 1.0, "c", "s", low=0.0, high=1.0, ring=True)]
    drawn = scatter(
        marks,
        names=[(0, "rate 0.1"), (2, "0.2")],
        ends=(0, 2),
        span=(0.0, 1.0),
        title="t <u>",
        description="d",
        lines=[Line("l", [(0, 0.5), (2, 1.0)], "s", dots=False)],
    )
    dots = numbers(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="4"', drawn)
    assert dots == [(52.0, 130.0), (704.0, 14.0)]  # half of the height, and the top right corner
    assert numbers(r"M([\d.]+) ([\d.]+) L([\d.]+) ([\d.]+)", drawn) == [dots[0] + dots[1]]
    assert numbers(r'y1="([\d.]+)" y2="([\d.]+)" class="stem s"', drawn) == [(246.0, 14.0)]
    assert drawn.count('class="ring s"') == 1
    assert "<title>t &lt;u&gt;</title>" in drawn
    assert "<title>a &lt;b&gt;</title>" in drawn
    assert [text in drawn for text in (">rate 0.1</text>", ">0.2</text>")] == [True, True]


def test_one_value_throughout_is_drawn():
    drawn = scatter([Mark(1, 0.8, "a", "s")], names=[], ends=(0, 2), span=(0.8, 0.8), title="t", description="d")
    assert numbers(r'<circle cx="([\d.]+)"', drawn) == [(378.0,)]


def test_a_name_is_cut_where_it_is_long_and_kept_inside():
    marks = [Mark(x, 1.0, "n" * 99, "s", name="n" * 99) for x in (0, 2)]
    drawn = scatter(marks, names=[], ends=(0, 2), span=(0.0, 1.0), title="t", description="d")
    assert re.findall(r'text-anchor="(\w+)">(n+…)<', drawn) == [("start", "n" * 23 + "…"), ("end", "n" * 23 + "…")]


def test_a_small_whisker_has_a_line_at_zero_and_what_is_known():
    drawn = whisker(-1.0, 0.5, 1.0, span=(-1.0, 1.0), style="good")
    assert numbers(r'x1="([\d.]+)" x2="([\d.]+)"', drawn) == [(60.0, 60.0), (6.0, 114.0)]
    assert numbers(r'cx="([\d.]+)"', drawn) == [(87.0,)]
    one_seed = whisker(math.nan, 0.5, math.nan, span=(-1.0, 1.0), style="open")
    assert "stem" not in one_seed
    assert "circle" in one_seed
    assert "circle" not in whisker(math.nan, math.nan, math.nan, span=(-1.0, 1.0), style="open")
