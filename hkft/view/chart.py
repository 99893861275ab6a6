"""A line chart in text: braille dots, two by four to a character, or plain ASCII. Pure, from numbers to lines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from rich.text import Text

from hkft.view.scale import Points, bounds, runs, tick_label, ticks

BRAILLE = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # bit of the dot at [x][y], from the top left
AXES = {False: "┤│└─", True: "+|+-"}
BEST = {False: "●", True: "@"}
SMALLEST = (24, 6)  # columns, lines

Projection = Callable[[float, float], tuple[int, int]]  # a point to its dot, from the top left


@dataclass(frozen=True, slots=True)
class Series:
    """A line: its points (x, y) in any order, and how it looks. `letter` draws it where braille cannot be shown."""

    name: str
    points: Points
    style: str = ""
    letter: str = "*"
    dotted: bool = False


@dataclass(slots=True)
class _Canvas:
    columns: int
    rows: int
    dots: tuple[int, int]  # to a character, across and down
    cells: dict[tuple[int, int], tuple[int, Series]] = field(default_factory=dict)

    def plot(self, x: int, y: int, series: Series) -> None:
        """Set the dot at column x from the left and row y from the top; the last series to come gives the colour."""
        (column, dx), (row, dy) = divmod(x, self.dots[0]), divmod(y, self.dots[1])
        bits, _ = self.cells.get((column, row), (0, series))
        self.cells[column, row] = (bits | BRAILLE[dx][dy], series)


def chart(
    series: Sequence[Series],
    width: int,
    height: int,
    *,
    x_max: float | None = None,
    best: tuple[float, float] | None = None,
    ascii_only: bool = False,
) -> list[Text]:
    """The series over x from 0 to `x_max`, in `height` lines no wider than `width`, axes and legend included.

    best: the point to mark. x_max: the end of the x axis where it is known before the points reach it. Values that are
    not finite are left out, and the line breaks there; with no finite value at all, one line says so.
    """
    assert width >= SMALLEST[0]
    assert height >= SMALLEST[1]
    span = bounds(one.points for one in series)
    if span is None:
        return [Text("no evaluation yet", style="dim")]
    rows = height - 3
    marks = ticks(*span, max(2, rows // 2 + 1))
    labels = [tick_label(mark) for mark in marks]
    margin = max(map(len, labels))
    columns = width - margin - 2
    end = max([x for one in series for x, _ in one.points] + ([x_max] if x_max else [])) or 1.0

    canvas = _Canvas(columns, rows, (1, 1) if ascii_only else (2, 4))
    at = _projection(canvas, end, marks[0], marks[-1])
    for one in series:
        _draw(canvas, one, at)
    spot = _cell(canvas, at(*best)) if best else None
    sides = {round((rows - 1) * (1 - n / (len(marks) - 1))): label for n, label in enumerate(labels)}
    lines = [_row(canvas, row, sides.get(row), margin, spot, ascii_only) for row in range(rows)]
    return [*lines, *_foot(margin, columns, end, best, spot, ascii_only), _legend(series, best, width, ascii_only)]


def _projection(canvas: _Canvas, end: float, low: float, high: float) -> Projection:
    across, down = canvas.columns * canvas.dots[0] - 1, canvas.rows * canvas.dots[1] - 1
    return lambda x, y: (round(x / end * across), round((high - y) / (high - low) * down))


def _cell(canvas: _Canvas, dot: tuple[int, int]) -> tuple[int, int]:
    return dot[0] // canvas.dots[0], dot[1] // canvas.dots[1]


def _draw(canvas: _Canvas, series: Series, at: Projection) -> None:
    for piece in runs(series.points):
        spots = [at(x, y) for x, y in piece]
        for (x, y), (next_x, next_y) in pairwise(spots):
            length = max(abs(next_x - x), abs(next_y - y), 1)
            for n in range(length + 1):
                if not series.dotted or n % 4 < 2:
                    canvas.plot(x + round(n * (next_x - x) / length), y + round(n * (next_y - y) / length), series)
        for x, y in spots:
            canvas.plot(x, y, series)


def _row(
    canvas: _Canvas, row: int, label: str | None, margin: int, spot: tuple[int, int] | None, ascii_only: bool
) -> Text:
    tick, bar = AXES[ascii_only][:2]
    line = Text(f"{label or '':>{margin}} {tick if label else bar}", style="dim", no_wrap=True)
    for column in range(canvas.columns):
        bits, series = canvas.cells.get((column, row), (0, None))
        if (column, row) == spot:
            line.append(BEST[ascii_only], style="not dim bold green")
        elif series is None:
            line.append(" ")
        else:
            line.append(series.letter if ascii_only else chr(0x2800 + bits), style=f"not dim {series.style}")
    line.rstrip()
    return line


def _foot(
    margin: int,
    columns: int,
    end: float,
    best: tuple[float, float] | None,
    spot: tuple[int, int] | None,
    ascii_only: bool,
) -> list[Text]:
    """The x axis, and below it 0, the step of the best, and the end, each where there is room."""
    corner, line = AXES[ascii_only][2:]
    left, right = "0", f"step {end:g}"
    numbers = left + " " * (columns - len(left) - len(right)) + right
    if best and spot:
        label = f"{best[0]:g}"
        start = min(max(spot[0] - len(label) // 2, 0), columns - len(label))
        room = numbers[max(start - 1, 0) : start + len(label) + 1]
        if not room.strip():
            numbers = numbers[:start] + label + numbers[start + len(label) :]
    indent = " " * (margin + 1)
    axis = Text(indent + corner + line * columns, style="dim", no_wrap=True)
    return [axis, Text(f"{indent} {numbers}".rstrip(), style="dim", no_wrap=True)]


def _legend(series: Sequence[Series], best: tuple[float, float] | None, width: int, ascii_only: bool) -> Text:
    parts = []
    for one in series:
        sample = one.letter * 2 if ascii_only else ("⠒⠒" if not one.dotted else "⠂⠂")
        parts.append(Text.assemble((sample, one.style), f" {one.name}"))
    if best:
        parts.append(Text.assemble((BEST[ascii_only], "bold green"), " best"))
    line = Text(no_wrap=True)
    for part in parts:
        if line.cell_len + part.cell_len + 3 <= width:
            line.append(Text("   " if line else "") + part)
    return line
