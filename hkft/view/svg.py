"""Charts as inline SVG, from numbers. Colours come from the page's style sheet, by class."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from hkft.view.scale import Points, bounds, runs, tick_label, ticks

WIDTH, SMALL = 720, 360  # of a line chart: over the page, and of two side by side
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 14, 34  # margins, in the viewBox's units; the left one of labels of three letters
LETTER = 13  # what each letter beyond takes, on a phone
NAME = 24  # letters of a point's name; all of it is told where a pointer rests on the point
SQUARE = 320  # width and height of a reliability diagram
LARGEST, SMALLEST = 13.0, 2.5  # radius of its dots


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart. `style`: a class of the style sheet (validation, probe, gap, objective)."""

    name: str
    points: Points
    style: str
    dots: bool = True


@dataclass(frozen=True, slots=True)
class Band:
    """What lies between two values at every step, such as an interval: (step, low, high). `style`: as a line's."""

    edges: Sequence[tuple[float, float, float]]
    style: str

    def side(self, which: int) -> Points:
        """The lower (1) or upper (2) edge; not a number where either edge is not finite, so that both break there."""
        whole = [all(map(math.isfinite, edge)) for edge in self.edges]
        return [(edge[0], edge[which] if there else math.nan) for edge, there in zip(self.edges, whole, strict=True)]


@dataclass(frozen=True, slots=True)
class Mark:
    """A single point. text: what it is. low, high: the ends of its whisker. name: is written beside it. ring: around it."""

    x: float
    y: float
    text: str
    style: str
    low: float = math.nan
    high: float = math.nan
    name: str = ""
    ring: bool = False


Place = Callable[[float], float]


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    description: str,
    best: tuple[float, float] | None = None,
    end: float | None = None,
    width: int = WIDTH,
    height: int = 280,
    bands: Sequence[Band] = (),
) -> Markup:
    """An `<svg>` of the lines over steps from 0, with axes, a title and a description for those who cannot see it.

    best: a point to mark. end: the last step of the axis, where the lines may end before it. bands: drawn below the
    lines. Values that are not finite are left out: lines and bands break there.
    """
    span = bounds([*(line.points for line in lines), *(band.side(which) for band in bands for which in (1, 2))])
    head = _head(width, height, title, description, "wide" if width > SMALL else "small")
    if span is None:
        empty = Markup('<text x="{}" y="{}" class="label" text-anchor="middle">nothing was measured</text></svg>')
        return head + empty.format(width // 2, height // 2)
    marks = ticks(*span, 6)
    last = max([end or 0.0, *(x for line in lines for x, _ in line.points)]) or 1.0
    steps = [mark for mark in ticks(0, last, width // 90) if mark <= last]
    left, right = LEFT + LETTER * max(0, max(len(tick_label(mark)) for mark in marks) - 3), width - RIGHT

    def across(x: float) -> float:
        return round(left + x / last * (right - left), 1)

    def down(y: float) -> float:
        return round(TOP + (marks[-1] - y) / (marks[-1] - marks[0]) * (height - TOP - BOTTOM), 1)

    names = [(step, "step 0" if step == 0 else f"{step:g}") for step in steps]
    parts = [head, *_axes(marks, names, across, down, (left, right, height))]
    parts += [_band(band, across, down) for band in bands]
    parts += [_line(line, across, down) for line in lines]
    if best:
        parts.append(_best(best, across, down, width, height))
    return Markup("").join([*parts, Markup("</svg>")])


def scatter(
    marks: Sequence[Mark],
    *,
    names: Sequence[tuple[float, str]],
    ends: tuple[float, float],
    span: tuple[float, float],
    title: str,
    description: str,
    lines: Sequence[Line] = (),
    width: int = WIDTH,
    height: int = 280,
) -> Markup:
    """An `<svg>` of single points with their whiskers, above lines.

    names: what stands below the axis across, and where. ends: of that axis. span: lowest and highest value of the other.
    """
    ys = ticks(*span, 6)
    left, right = LEFT + LETTER * max(0, max(len(tick_label(y)) for y in ys) - 3), width - RIGHT

    def across(x: float) -> float:
        return round(left + (x - ends[0]) / (ends[1] - ends[0]) * (right - left), 1)

    def down(y: float) -> float:
        return round(TOP + (ys[-1] - y) / (ys[-1] - ys[0]) * (height - TOP - BOTTOM), 1)

    parts = [_head(width, height, title, description, "wide" if width > SMALL else "small")]
    parts += _axes(ys, names, across, down, (left, right, height))
    parts += [_line(line, across, down) for line in lines]
    parts += [_mark(mark, across(mark.x), down) for mark in marks]
    named = [(mark.name, across(mark.x), down(mark.y)) for mark in marks if mark.name]
    return Markup("").join([*parts, *_names(named, (left, width), height - BOTTOM), Markup("</svg>")])


def whisker(low: float, mean: float, high: float, *, span: tuple[float, float], style: str) -> Markup:
    """A small dot with its interval and a line at 0, on the scale of `span`: what it tells stands beside it as numbers."""

    def across(x: float) -> float:
        return round(6 + (x - span[0]) / (span[1] - span[0]) * 108, 1)

    parts = [
        Markup('<svg viewBox="0 0 120 16" class="whisker" aria-hidden="true">'),
        Markup('<line x1="{0}" x2="{0}" y1="0" y2="16" class="grid zero"/>').format(across(0)),
    ]
    if math.isfinite(low) and math.isfinite(high):
        bar = Markup('<line x1="{}" x2="{}" y1="8" y2="8" class="stem {}"/>')
        parts.append(bar.format(across(low), across(high), style))
    if math.isfinite(mean):
        parts.append(Markup('<circle cx="{}" cy="8" r="3.5" class="dot {}"/>').format(across(mean), style))
    return Markup("").join([*parts, Markup("</svg>")])


def reliability(bins: Sequence[Mapping[str, Any]], *, title: str, description: str, style: str) -> Markup:
    """A reliability diagram: accuracy over confidence, a dot for each bin that has rows, its area by their number.

    On the diagonal a model is right as often as it says; below it, it is too sure. A stem tells how far a bin is off.
    """
    left, side = 40, SQUARE - 40 - 16  # of the square inside the axes
    head = _head(SQUARE, SQUARE, title, description, "square")
    filled = [found for found in bins if found.get("count") and _is_number(found, "confidence", "accuracy")]
    most = max((found["count"] for found in filled), default=1)

    def across(x: float) -> float:
        return round(left + x * side, 1)

    def down(y: float) -> float:
        return round(14 + (1 - y) * side, 1)

    parts = [head, *_unit_axes(across, down)]
    for found in sorted(filled, key=lambda one: -one["count"]):  # the small ones on top
        x, y = found["confidence"], found["accuracy"]
        radius = round(max(SMALLEST, LARGEST * math.sqrt(found["count"] / most)), 1)
        text = f"confidence {x:.3f}, accuracy {y:.3f}, {found['count']:,} rows"
        parts.append(
            Markup(
                '<line x1="{x}" x2="{x}" y1="{ideal}" y2="{y}" class="stem {style}"/>'
                '<circle cx="{x}" cy="{y}" r="{radius}" class="bin {style}"><title>{text}</title></circle>'
            ).format(x=across(x), y=down(y), ideal=down(x), radius=radius, style=style, text=text)
        )
    return Markup("").join([*parts, Markup("</svg>")])


def meter(share: float) -> Markup:
    """A small bar, filled to `share` of 1: what it tells stands beside it as a number."""
    width = round(100 * min(max(share, 0.0), 1.0), 1)
    bar = '<rect width="{}" height="6" rx="3" class="{}"/>'
    return Markup('<svg viewBox="0 0 100 6" class="meter" aria-hidden="true">' + bar + bar + "</svg>").format(
        100, "all", width, "part"
    )


def _head(width: int, height: int, title: str, description: str, style: str = "wide") -> Markup:
    return Markup(
        '<svg viewBox="0 0 {} {}" class="{}" role="img" aria-label="{}"><title>{}</title><desc>{}</desc>'
    ).format(width, height, style, title, title, description)


def _is_number(found: Mapping[str, Any], *names: str) -> bool:
    return all(found.get(name) is not None and math.isfinite(found[name]) for name in names)


def _unit_axes(across: Place, down: Place) -> list[Markup]:
    """Axes from 0 to 1, their names, and the diagonal."""
    grid = Markup('<line x1="{}" x2="{}" y1="{}" y2="{}" class="grid"/>')
    label = Markup('<text x="{}" y="{}" class="label" text-anchor="{}">{}</text>')
    parts = []
    for mark in (0, 0.25, 0.5, 0.75, 1):
        x, y = across(mark), down(mark)
        parts += [grid.format(across(0), across(1), y, y), grid.format(x, x, down(0), down(1))]
        parts.append(label.format(across(0) - 8, round(y + 4, 1), "end", f"{mark:g}"))
        parts.append(label.format(x, down(0) + 18, "middle", f"{mark:g}"))
    diagonal = Markup('<line x1="{}" x2="{}" y1="{}" y2="{}" class="diagonal"/>')
    parts.append(diagonal.format(across(0), across(1), down(0), down(1)))
    parts.append(label.format(across(0.5), down(0) + 36, "middle", "confidence"))
    return [*parts, label.format(across(0) + 8, down(1) + 16, "start", "accuracy")]


def _axes(
    marks: Sequence[float], names: Sequence[tuple[float, str]], across: Place, down: Place, edges: tuple[int, int, int]
) -> list[Markup]:
    grid = Markup('<line x1="{}" x2="{}" y1="{}" y2="{}" class="{}"/>')
    label = Markup('<text x="{}" y="{}" class="label" text-anchor="{}">{}</text>')
    name = Markup('<text x="{}" y="{}" class="label step" text-anchor="middle">{}</text>')
    left, right, height = edges
    parts = []
    for mark in marks:
        y, style = down(mark), "grid" if mark else "grid zero"
        parts += [
            grid.format(left, right, y, y, style),
            label.format(left - 8, round(y + 4, 1), "end", tick_label(mark)),
        ]
    return parts + [name.format(across(x), height - BOTTOM + 20, text) for x, text in names]


def _band(band: Band, across: Place, down: Place) -> Markup:
    upper, parts = dict(band.side(2)), []
    for piece in runs(band.side(1)):
        edge = [*piece, *((x, upper[x]) for x, _ in reversed(piece))]
        path = " ".join(f"{'L' if n else 'M'}{across(x)} {down(y)}" for n, (x, y) in enumerate(edge))
        parts.append(Markup('<path d="{}Z" class="band {}"/>').format(path, band.style))
    return Markup("").join(parts)


def _line(line: Line, across: Place, down: Place) -> Markup:
    name = escape(line.style)
    parts = []
    for piece in runs(line.points):
        path = " ".join(f"{'L' if n else 'M'}{across(x)} {down(y)}" for n, (x, y) in enumerate(piece))
        parts.append(Markup('<path d="{}" class="line {}"/>').format(path, name))
        if line.dots:
            dot = Markup('<circle cx="{}" cy="{}" r="3" class="dot {}"><title>{}</title></circle>')
            parts += [dot.format(across(x), down(y), name, f"{line.name}, step {x:g}: {y:.4g}") for x, y in piece]
    return Markup("").join(parts)


def _mark(mark: Mark, x: float, down: Place) -> Markup:
    parts, y = [], down(mark.y)
    if math.isfinite(mark.low) and math.isfinite(mark.high):
        stem = Markup('<line x1="{x}" x2="{x}" y1="{}" y2="{}" class="stem {}"/>')
        parts.append(stem.format(down(mark.low), down(mark.high), mark.style, x=x))
    if mark.ring:
        parts.append(Markup('<circle cx="{}" cy="{}" r="8" class="ring {}"/>').format(x, y, mark.style))
    dot = Markup('<circle cx="{}" cy="{}" r="4" class="dot {}"><title>{}</title></circle>')
    return Markup("").join([*parts, dot.format(x, y, mark.style, mark.text)])


def _names(named: Sequence[tuple[str, float, float]], sides: tuple[int, int], bottom: int) -> list[Markup]:
    """Names beside their points, towards the middle; one that would cover something goes to the nearest free place."""
    text = Markup('<text x="{}" y="{}" class="label name" text-anchor="{}">{}</text>')
    taken = [(x - 6, x + 6, y + 4) for _, x, y in named]  # from, to, line
    steps = sorted(range(-len(named), len(named) + 1), key=abs)
    parts = []
    for name, x, y in sorted(named, key=lambda one: one[2]):
        shown = name if len(name) <= NAME else f"{name[: NAME - 1]}…"
        wide = 7 * len(shown)
        right, left = (x + 12, x + 12 + wide), (x - 12 - wide, x - 12)
        places = [
            (*side, y + 4 + 14 * step)
            for step in steps
            for side in ((right, left) if x < sum(sides) / 2 else (left, right))
        ]
        start, end, line = next((place for place in places if _free(place, taken, sides, bottom)), places[0])
        taken.append((start, end, line))
        at, anchor = (start, "start") if start > x else (end, "end")
        parts.append(text.format(round(at, 1), round(line, 1), anchor, shown))
    return parts


def _free(
    place: tuple[float, float, float], taken: Sequence[tuple[float, float, float]], sides: tuple[int, int], bottom: int
) -> bool:
    start, end, line = place
    inside = sides[0] <= start and end <= sides[1] and TOP <= line <= bottom
    return inside and all(start > to or end < since or abs(line - other) >= 13 for since, to, other in taken)


def _best(best: tuple[float, float], across: Place, down: Place, width: int, height: int) -> Markup:
    x, y = across(best[0]), down(best[1])
    anchor, side = ("end", -6) if x > width / 2 else ("start", 6)
    return Markup(
        '<line x1="{x}" x2="{x}" y1="{top}" y2="{bottom}" class="best-line"/>'
        '<circle cx="{x}" cy="{y}" r="5" class="best-dot"/>'
        '<text x="{at}" y="{above}" class="label best" text-anchor="{anchor}">best, step {step}</text>'
    ).format(x=x, y=y, top=TOP, bottom=height - BOTTOM, at=x + side, above=TOP + 16, anchor=anchor, step=f"{best[0]:g}")
