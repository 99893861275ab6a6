import math

import pytest

from hkft.view.chart import Series, chart

PROBE = Series("probe loss", [(63, 0.4), (126, 0.25), (189, 0.1)], "yellow", "p", dotted=True)
VALIDATION = Series("validation loss", [(63, 0.5), (126, 0.45), (189, 0.7)], "cyan", "v")

BRAILLE = [
    "  1 ┤",
    "    │",
    "    │                                ⣀⣀⠤⠤⠒⠒⠉",
    "0.5 ┤             ⠤⠤⠤⠤⠤⠤⢄⣀⣀⣀⣀⣀●⡠⠤⠔⠒⠊⠉",
    "    │             ⠉ ⠒ ⠒ ⠤ ⣀ ⣀",
    "    │                         ⠉⠁⠐⠂⠐⠂⠠⠄⠠⡀⢀⡀",
    "  0 ┤                                     ⠈⠉",
    "    └───────────────────────────────────────",
    "     0                       126    step 189",
    "⠂⠂ probe loss   ⠒⠒ validation loss   ● best",
]
ASCII = [
    "  1 +",
    "    |",
    "    |                                vvvvvvv",
    "0.5 +             vvvvvvvvvvvv@vvvvvv",
    "    |             pp  pp  pp  pp  pp",
    "    |                                 pp  pp",
    "  0 +",
    "    +---------------------------------------",
    "     0                       126    step 189",
    "pp probe loss   vv validation loss   @ best",
]
ONE = [
    "0.5 ┤            ⠁",
    "    │",
    "    │",
    "  0 ┤",
    "    └─────────────────────────",
    "     0                step 100",
    "⠒⠒ loss",
]
LEVEL = [
    "0.5 ┤⠉⠉⠉⠉⠉⠉⠉⠉⠉⠉⠉⠉⠉⠉⠉⠉⠉⠉⠉⠉⠉⠉⠉⠉⠉",
    "    │",
    "    │",
    "  0 ┤",
    "    └─────────────────────────",
    "     0                step 100",
    "⠒⠒ loss",
]


def drawn(*args, **kwargs) -> list[str]:
    return [line.plain for line in chart(*args, **kwargs)]


def test_a_chart_in_braille():
    assert drawn([PROBE, VALIDATION], 44, 10, x_max=189, best=(126, 0.45)) == BRAILLE


def test_a_chart_in_ascii():
    lines = drawn([PROBE, VALIDATION], 44, 10, x_max=189, best=(126, 0.45), ascii_only=True)
    assert lines == ASCII
    assert all(line.isascii() for line in lines)


def test_one_point_is_a_dot_over_its_step():
    assert drawn([Series("loss", [(50, 0.5)])], 30, 7, x_max=100) == ONE


def test_equal_values_are_a_level_line():
    assert drawn([Series("loss", [(0, 0.5), (100, 0.5)])], 30, 7) == LEVEL


def test_a_line_is_broken_at_a_missing_value():
    lines = drawn([Series("loss", [(0, 1), (25, 1), (50, math.nan), (75, 1), (100, 1)])], 30, 7, ascii_only=True)
    assert lines[0] == "  1 +*******           *******"


def test_nothing_to_draw_says_so():
    assert drawn([Series("loss", [(1, math.nan)]), Series("other", [])], 40, 10) == ["no evaluation yet"]


@pytest.mark.parametrize("ascii_only", [False, True])
@pytest.mark.parametrize(("width", "height"), [(24, 6), (33, 7), (60, 12), (99, 20)])
def test_a_chart_has_the_size_asked_for(width, height, ascii_only):
    steep = Series("a name far too long for a narrow terminal", [(1, -1234.5), (9999, 12345.6)])
    lines = chart([VALIDATION, steep], width, height, x_max=12000, best=(11999, 0.7), ascii_only=ascii_only)
    assert len(lines) == height
    assert max(line.cell_len for line in lines) <= width


def test_the_later_series_gives_its_colour_to_a_shared_cell():
    lines = chart([Series("a", [(0, 1), (9, 1)], "red"), Series("b", [(0, 1), (9, 1)], "blue")], 30, 7)
    assert {str(span.style) for span in lines[0].spans} == {"not dim blue"}


@pytest.mark.parametrize("value", [0.5, 0.0, 1e-13])
def test_a_line_that_is_level_but_for_rounding_is_drawn(value):
    lines = chart([Series("a", [(0, value), (1, value * (1 + 1e-15)), (2, value + 1e-13)])], 40, 10)
    assert len(lines) == 10
