import math

import pytest

from hkft.view.scale import bounds, runs, tick_label, ticks


@pytest.mark.parametrize(
    ("low", "high", "most", "expected"),
    [
        (0.03, 0.724, 6, [0, 0.2, 0.4, 0.6, 0.8]),
        (0.03, 0.724, 3, [0, 0.5, 1]),
        (0.03, 0.724, 2, [0, 1]),
        (0.773, 0.993, 6, [0.75, 0.8, 0.85, 0.9, 0.95, 1]),
        (0, 378, 8, [0, 100, 200, 300, 400]),
        (-0.3, 0.4, 4, [-0.5, 0, 0.5]),
        (0.5, 0.5, 3, [0, 0.5]),
        (0.0, 0.0, 3, [-1, 0, 1]),
        (1e-6, 3e-6, 3, [1e-6, 2e-6, 3e-6]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(low, high, most, expected):
    assert ticks(low, high, most) == pytest.approx(expected)


def test_ticks_hold_for_any_span():
    for low in (-7.3, 0.0, 0.468, 12345.6):
        for span in (1e-5, 0.3, 1.0, 99.5, 4e6):
            for most in (2, 3, 7):
                marks = ticks(low, low + span, most)
                assert 2 <= len(marks) <= most or (most == 2 and len(marks) == 3 and marks[0] < 0 < marks[-1])
                assert marks[0] <= low + 1e-6 * span
                assert marks[-1] >= low + span - 1e-6 * span


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0, "0"),
        (0.25, "0.25"),
        (-1500.0, "-1500"),
        (0.000012, "1.2e-5"),
        (-5e-10, "-5e-10"),
        (2e6, "2e6"),
        (1e12, "1e12"),
    ],
)
def test_a_mark_is_told_in_few_letters(value, expected):
    assert tick_label(value) == expected


def test_a_line_breaks_where_a_value_is_not_finite():
    points = [(3, 0.3), (1, 0.1), (2, math.nan), (4, math.inf), (5, 0.5)]
    assert runs(points) == [[(1, 0.1)], [(3, 0.3)], [(5, 0.5)]]
    assert bounds([points]) == (0.1, 0.5)
    assert bounds([[(1, math.nan)], []]) is None
