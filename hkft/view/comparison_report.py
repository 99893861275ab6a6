"""`report.html` of a comparison: what may be said, the table, the curves of every method, the runs behind them."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from markupsafe import Markup

from hkft.comparison import tables
from hkft.comparison.compare import Comparison
from hkft.view.page import write_page
from hkft.view.scale import Points
from hkft.view.svg import Line, line_chart

COLOURS = 8  # of the style sheet, by turns

Curve = Mapping[str, Any]


def write_comparison_report(path: Path, comparison: Comparison) -> None:
    """Write the report to `path`, whole or not at all. Its links to the runs' own reports are relative to it."""
    labels = [row.label for row in comparison.rows]
    columns = tables.columns(comparison)[:-1]  # the last is said in the sentences
    write_page(
        path,
        "comparison.html.j2",
        comparison=comparison,
        labels=labels,
        sentences=tables.sentences(comparison),
        warnings=tables.warned(comparison),
        columns=columns,
        charts=_charts(labels, comparison.curves, comparison.metric),
        runs=[_run(curve, path.parent) for curve in comparison.curves],
    )


def _charts(labels: Sequence[str], curves: Sequence[Curve], metric: str) -> list[tuple[str, str, list[Line], Markup]]:
    """Heading, note, lines for the legend and drawing of each chart."""

    def side(name: str, key: str) -> Any:
        return lambda point: _value(point[name].get(key))

    def gap(point: Mapping[str, Any]) -> float:
        return _value(point["validation"]["loss"]) - _value(point["train_probe"]["loss"])

    thin = "bold: the mean over seeds; thin: each seed; eval mode"
    wanted = [
        ("Validation loss", thin, side("validation", "loss")),
        ("Gap of the loss", f"validation minus probe of the training rows; {thin}", gap),
        (f"Validation {metric}", thin, side("validation", metric)),
    ]
    charts = []
    for heading, note, read in wanted:
        legend, lines = [], []
        for number, label in enumerate(labels):
            seeds = [[(p["step"], read(p)) for p in curve["points"]] for curve in curves if curve["label"] == label]
            style = f"series-{number % COLOURS}"
            lines += [Line(label, points, f"{style} seed", dots=False) for points in seeds if len(seeds) > 1]
            legend.append(Line(label, mean(seeds), style))
        told = "; ".join(f"{line.name} ends at {line.points[-1][1]:.3f}" for line in legend if line.points)
        title = f"{heading} by step"
        charts.append((heading, note, legend, line_chart([*lines, *legend], title=title, description=told)))
    return charts


def mean(seeds: Sequence[Points]) -> Points:
    """The mean at every step that all the seeds have: elsewhere it would jump with who is there."""
    at: dict[float, list[float]] = defaultdict(list)
    for points in seeds:
        for step, value in points:
            at[step].append(value)
    return [(step, fmean(values)) for step, values in sorted(at.items()) if len(values) == len(seeds)]


def _run(curve: Curve, folder: Path) -> tuple[str, int, str, str]:
    """Method, seed, name, and the way from the folder to the run's report."""
    run = Path(curve["run"])
    link = Path(os.path.relpath(run.resolve(), folder.resolve())) / "report.html"
    return curve["label"], curve["seed"], run.name, link.as_posix()


def _value(value: float | None) -> float:
    return float("nan") if value is None else float(value)
