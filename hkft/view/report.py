"""`report.html` of a run: what it did."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from hkft.diagnostics.gap import LOWER_IS_BETTER
from hkft.events import Notice
from hkft.view import words
from hkft.view.page import write_page
from hkft.view.scale import Points
from hkft.view.svg import Line, line_chart

Records = Sequence[Mapping[str, Any]]
MOST_POINTS = 240  # of the objective's line: about three pixels each


def write_report(
    path: Path,
    *,
    summary: Mapping[str, Any],
    curve: Records,
    train_records: Records,
    recipe_yaml: str,
    environment: Mapping[str, Any],
    sites: Sequence[Mapping[str, Any]] = (),
    notices: Sequence[Notice] = (),
) -> None:
    """Write the report to `path`, whole or not at all.

    curve, train_records: the "eval" and the "train" records of `metrics.jsonl`. environment: any nesting of mappings.
    """
    metric = words.metric_of(summary)
    write_page(
        path,
        "run.html.j2",
        summary=summary,
        verdict=summary.get("verdict"),
        figures=words.figures(summary),
        charts=_charts(summary, curve, metric),
        objective=_objective(train_records),
        columns=["step", "epoch", *(f"{name} {side}" for name in ("loss", metric) for side in _SIDES.values())],
        rows=[_row(record, metric, summary.get("best_step")) for record in curve],
        site_columns=words.SITE_COLUMNS,
        site_rows=words.site_rows(sites),
        recipe_yaml=recipe_yaml,
        environment=_flat(environment),
        notices=notices,
    )


_SIDES = {"train_probe": "probe", "validation": "validation", "gap": "gap"}


def _charts(summary: Mapping[str, Any], curve: Records, metric: str) -> list[tuple[str, str, list[Line], Markup]]:
    """Heading, note, lines (for the legend) and drawing of each chart."""
    best = summary.get("best_step")
    charts = []
    for name in ("loss", metric):
        probe, validation = _points(curve, "train_probe", name), _points(curve, "validation", name)
        if not validation:
            continue
        lines = [Line("probe of the training rows", probe, "probe"), Line("validation", validation, "validation")]
        better = "lower is better" if name in LOWER_IS_BETTER else "higher is better"
        mark = next(((x, y) for x, y in validation if x == best and math.isfinite(y)), None)
        text = f"{name} by step, in eval mode, on both sides: " + _told(lines)
        drawn = line_chart(lines, title=f"{name} by step", description=text, best=mark)
        charts.append((name.capitalize(), f"eval mode on both sides; {better}", lines, drawn))
    gaps = [Line("gap of the loss", _points(curve, "gap", "loss"), "gap")]
    drawn = line_chart(gaps, title="gap of the loss by step", description=_told(gaps), height=200)
    charts.append(
        ("Gap", "validation loss minus probe loss: how much easier the training rows are for the model", gaps, drawn)
    )
    return charts


def _objective(records: Records) -> Markup | None:
    points = _thinned([(record["step"], _number(record["objective"])) for record in records])
    if not points:
        return None
    line = Line("objective", points, "objective", dots=False)
    return line_chart([line], title="training objective by step", description=_told([line]), height=170)


def _points(curve: Records, side: str, name: str) -> Points:
    return [(record["step"], _number(record[side][name])) for record in curve if name in record[side]]


def _thinned(points: Points) -> Points:
    """Means of neighbours, so that at most `MOST_POINTS` are left."""
    size = math.ceil(len(points) / MOST_POINTS) or 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def _told(lines: Sequence[Line]) -> str:
    return "; ".join(
        f"{line.name} from {words.number(line.points[0][1])} to {words.number(line.points[-1][1])}"
        for line in lines
        if line.points
    )


def _row(record: Mapping[str, Any], metric: str, best_step: int | None) -> tuple[bool, list[str]]:
    cells = [
        words.number(_number(record[side][name])) if name in record[side] else "-"
        for name in ("loss", metric)
        for side in _SIDES
    ]
    return record["step"] == best_step, [str(record["step"]), f"{record['epoch']:.2f}", *cells]


def _flat(tree: Mapping[str, Any], above: str = "") -> list[tuple[str, str]]:
    """Nested mappings as pairs of a dotted key and a value."""
    pairs: list[tuple[str, str]] = []
    for key, value in tree.items():
        name = f"{above}{key}"
        pairs += _flat(value, f"{name}.") if isinstance(value, Mapping) else [(name, str(value))]
    return pairs


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)
