"""Round numbers along an axis."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

Points = Sequence[tuple[float, float]]


def ticks(low: float, high: float, most: int) -> list[float]:
    """Evenly spaced round numbers around [low, high], 1, 2 or 5 times a power of ten apart.

    At most `most` (two or more); three where zero lies inside and two cannot enclose it. Equal ends are set apart
    first: to 0 and the value, or to -1 and 1 for zero.
    """
    assert most >= 2
    if low == high:
        low, high = (min(low, 0.0), max(high, 0.0)) if low else (-1.0, 1.0)
    for step in _steps(high - low):
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first < most or step > 4 * (high - low):
            return [round(n * step, 12) for n in range(first, last + 1)]
    raise AssertionError("a step four times as large as the span always fits")


def _steps(span: float) -> Iterable[float]:
    power = 10.0 ** math.floor(math.log10(span) - 2)
    while True:
        yield from (power, 2 * power, 5 * power)
        power *= 10


def tick_label(value: float) -> str:
    """A mark of an axis in as few letters as tell it: 0.25, 1.2e-5, 1e6."""
    digits, _, power = f"{value:g}".partition("e")
    return f"{digits}e{int(power)}" if power else digits


def runs(points: Points) -> list[list[tuple[float, float]]]:
    """The points by x, cut where a value is NaN or infinite: a line is drawn through each piece."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in sorted(points, key=lambda point: point[0]):
        if math.isfinite(y):
            pieces[-1].append((x, y))
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def bounds(curves: Iterable[Points]) -> tuple[float, float] | None:
    """Lowest and highest finite value of all curves; None where there is none.

    The same twice where they differ by rounding only: there are no ticks between.
    """
    values = [y for points in curves for _, y in points if math.isfinite(y)]
    if not values:
        return None
    low, high = min(values), max(values)
    return (round(low, 9), round(low, 9)) if math.isclose(low, high, rel_tol=1e-9, abs_tol=1e-9) else (low, high)
