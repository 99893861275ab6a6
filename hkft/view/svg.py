"""Line charts as inline SVG, from numbers. Colours come from the page's style sheet, by class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from hkft.view.scale import Points, bounds, runs, ticks

WIDTH = 720
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 14, 34  # margins, in the viewBox's units


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart. `style`: a class of the style sheet (validation, probe, gap, objective)."""

    name: str
    points: Points
    style: str
    dots: bool = True


Place = Callable[[float], float]


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    description: str,
    best: tuple[float, float] | None = None,
    height: int = 280,
) -> Markup:
    """An `<svg>` of the lines over steps from 0, with axes, a title and a description for those who cannot see it.

    best: a point to mark. Values that are not finite are left out, and the line breaks there.
    """
    span = bounds(line.points for line in lines)
    head = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}"><title>{}</title><desc>{}</desc>').format(
        WIDTH, height, title, title, description
    )
    if span is None:
        empty = Markup('<text x="{}" y="{}" class="label" text-anchor="middle">nothing was measured</text></svg>')
        return head + empty.format(WIDTH // 2, height // 2)
    marks = ticks(*span, 6)
    end = max(x for line in lines for x, _ in line.points) or 1.0
    steps = [mark for mark in ticks(0, end, 8) if mark <= end]

    def across(x: float) -> float:
        return round(LEFT + x / end * (WIDTH - LEFT - RIGHT), 1)

    def down(y: float) -> float:
        return round(TOP + (marks[-1] - y) / (marks[-1] - marks[0]) * (height - TOP - BOTTOM), 1)

    parts = [head, *_axes(marks, steps, across, down, height), *(_line(line, across, down) for line in lines)]
    if best:
        parts.append(_best(best, across, down, height))
    return Markup("").join([*parts, Markup("</svg>")])


def _axes(marks: Sequence[float], steps: Sequence[float], across: Place, down: Place, height: int) -> list[Markup]:
    grid = Markup('<line x1="{}" x2="{}" y1="{}" y2="{}" class="grid"/>')
    label = Markup('<text x="{}" y="{}" class="label" text-anchor="{}">{}</text>')
    parts = []
    for mark in marks:
        y = down(mark)
        parts += [grid.format(LEFT, WIDTH - RIGHT, y, y), label.format(LEFT - 8, round(y + 4, 1), "end", f"{mark:g}")]
    for step in steps:
        text = "step 0" if step == 0 else f"{step:g}"
        parts.append(label.format(across(step), height - BOTTOM + 20, "middle", text))
    return parts


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


def _best(best: tuple[float, float], across: Place, down: Place, height: int) -> Markup:
    x, y = across(best[0]), down(best[1])
    anchor, side = ("end", -6) if x > WIDTH - 110 else ("start", 6)
    return Markup(
        '<line x1="{x}" x2="{x}" y1="{top}" y2="{bottom}" class="best-line"/>'
        '<circle cx="{x}" cy="{y}" r="5" class="best-dot"/>'
        '<text x="{at}" y="{above}" class="label best" text-anchor="{anchor}">best, step {step}</text>'
    ).format(x=x, y=y, top=TOP, bottom=height - BOTTOM, at=x + side, above=TOP + 16, anchor=anchor, step=f"{best[0]:g}")
