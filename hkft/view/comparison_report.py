"""`report.html` of a comparison: what may be said, the table, the curves of every method, the runs behind them."""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar
from urllib.parse import quote

from markupsafe import Markup

from hkft.comparison import paper, tables
from hkft.comparison.choice import TUNED
from hkft.comparison.compare import BESIDE, Comparison, Row
from hkft.comparison.statistics import Difference, Sample
from hkft.recipe.schema import CUSTOM
from hkft.view import words
from hkft.view.page import write_page
from hkft.view.report import Chart, Table
from hkft.view.scale import Points, bounds, ticks
from hkft.view.svg import SMALL, WIDTH, Band, Line, Mark, line_chart, scatter, whisker

COLOURS = 8  # of the style sheet
TURNS = 3  # ways of the style sheet to draw a line again in a colour that has been taken
MOST_POINTS = 1_500  # of a chart, over its lines
MOST_DOTS = 240  # of a chart: beyond, its lines have none
MOST_BANDS = 12  # of a chart: beyond, nothing is seen through them
WHISKERED = 4  # lines of a chart of whiskers: more would hide each other
MOST_NAMED = 4  # rows in the page's title

Read = Callable[[Mapping[str, Any]], float]
Item = TypeVar("Item")


def write_comparison_report(path: Path, comparison: Comparison) -> None:
    """Write the report to `path`, whole or not at all. Its links to the runs' own reports are relative to it."""
    styles = _styles(comparison)
    charts = [*_curves(comparison, styles), *_responses(comparison), *_pareto(comparison, styles)]
    table, more = _side_by_side(comparison)
    tried, rows = tables.settings(comparison)
    sections = {
        "side-by-side": ("Side by side", table),
        **{chart.key: (chart.heading, chart) for chart in charts},
        "settings": (
            "Settings tried",
            Table([(title, "" if n else "text") for n, title in enumerate(tried)], rows) if rows else None,
        ),
        "foreign": ("Curves of other tools", tables.foreign(comparison)),
        "warnings": ("Warnings", tables.warned(comparison)),
        "notes": ("How to read it", comparison.notes),
        "runs": ("The runs", [_runs(row, path.parent) for row in comparison.rows]),
    }
    write_page(
        path,
        "comparison.html.j2",
        comparison=comparison,
        names=_names(comparison),
        seeds=len({seed for row in comparison.rows for seed in row.seeds}),
        lead=_lead(comparison),
        sentences=tables.sentences(comparison),
        more=more,
        source=comparison.paper and paper.cell(comparison.paper).source,
        charts=[chart.key for chart in charts],
        sections={key: section for key, section in sections.items() if section[1]},
    )


def mean(seeds: Sequence[Points]) -> Points:
    """The mean at every step that all the seeds have: elsewhere it would jump with who is there."""
    return [(step, fmean(values)) for step, values in _shared(seeds)]


def spread(seeds: Sequence[Points]) -> list[tuple[float, float, float]]:
    """The lowest and the highest seed at every step that all have; not a number where one of them is none."""
    return [
        (step, min(values), max(values)) if all(map(math.isfinite, values)) else (step, math.nan, math.nan)
        for step, values in _shared(seeds)
    ]


def _shared(seeds: Sequence[Points]) -> list[tuple[float, list[float]]]:
    at: dict[float, list[float]] = defaultdict(list)
    for points in seeds:
        for step, value in points:
            at[step].append(value)
    return [(step, values) for step, values in sorted(at.items()) if len(values) == len(seeds)]


def _numbers(comparison: Comparison) -> dict[str, int]:
    """method -> number of its colour: the baseline has the first."""
    base = [row.method for row in comparison.rows if row.label == comparison.baseline]
    return {method: n for n, method in enumerate(dict.fromkeys([*base, *(row.method for row in comparison.rows)]))}


def _styles(comparison: Comparison) -> dict[str, str]:
    """label -> classes of the style sheet, of the rows that are compared: a method's further ones are dashed.

    Rows with sites of their own have only the name "custom" in common: each has a colour.
    """
    numbers, seen = _numbers(comparison), Counter[str]()
    styles = {}
    for row in comparison.compared:
        if row.method == CUSTOM and seen[CUSTOM]:
            numbers[row.label] = len(numbers)
        family = row.label if row.label in numbers else row.method
        styles[row.label] = _style(numbers[family], seen[family])
        seen[row.method] += 1
    return styles


def _style(number: int, turn: int = 0) -> str:
    turn += number // COLOURS
    return f"series-{number % COLOURS}" + (f" turn-{min(turn, TURNS)}" if turn else "")


def _names(comparison: Comparison) -> str:
    labels = [row.label for row in comparison.compared]
    return ", ".join(labels) if len(labels) <= MOST_NAMED else f"{len(labels)} rows"


def _lead(comparison: Comparison) -> str:
    """How many are better and worse, where there are so many that the sentences are long to read."""
    found = [row.scores[comparison.main].difference for row in comparison.compared if row.baseline != row.label]
    counted = Counter(one.word for one in found if one)
    if sum(counted.values()) < 2:
        return ""
    told = ", ".join(f"{counted[word]} {text}" for word, text in _WORDS.items())
    return f"{comparison.measure.title}, {sum(counted.values())} comparisons with the baseline: {told}"


_WORDS = {"better": "better", "worse": "worse", "cannot tell": "cannot be told from it"}


def _side_by_side(comparison: Comparison) -> tuple[Table, Table]:
    """The numbers that matter most, with the differences drawn; and the others."""
    best = tables.best_of(comparison) if comparison.compared[1:] else ()
    main = comparison.measure.title
    known = tables.columns(comparison)
    beside = [one.title for one in comparison.measures if one.key == BESIDE]
    wanted = ("method", "seeds", main, *beside, "paper", "difference", "time", "verdicts")
    first = [one for one in known if one.title in wanted]
    rest = [one for one in known if one.title == "method" or one not in first]
    found = {row.label: row.scores[comparison.main].difference for row in comparison.compared}
    span = bounds([[(0, 0.0), *((0, _number(end)) for one in found.values() if one for end in _ends(one))]])
    low, high = (-1.0, 1.0) if span is None or span[0] == span[1] else span

    def cells(row: Row) -> list[str | Markup]:
        told: list[str | Markup] = []
        for column in first:
            text = column.cell(row)
            if column.title == main and row.label in best:
                told.append(Markup("<b>{}</b> <small>best</small>").format(text))
            elif column.title == "difference":
                told += _difference(text, found[row.label], (low, high))
            else:
                told.append(text)
        return told

    columns = _columns(first)
    place = 1 + [title for title, _ in columns].index("difference")
    others = [[column.cell(row) for column in rest] for row in comparison.compared]
    drawn = [cells(row) for row in comparison.compared]
    return Table([*columns[:place], ("", "bar"), *columns[place:]], drawn), Table(_columns(rest), others)


def _ends(found: Difference) -> tuple[float | None, ...]:
    return found.low, found.mean, found.high


def _difference(text: str, found: Difference | None, span: tuple[float, float]) -> list[str | Markup]:
    """The number above its interval, and both drawn."""
    if found is None or found.mean is None:
        return [text, ""]
    style = {"better": "good", "worse": "bad"}.get(found.word, "open")
    low, middle, high = map(_number, _ends(found))
    drawn = whisker(low, middle, high, span=span, style=style)
    if not _known(low, high):
        return [text, drawn]
    return [Markup("{} <small>{:+.3f} to {:+.3f}</small>").format(text, low, high), drawn]


def _curves(comparison: Comparison, styles: Mapping[str, str]) -> list[Chart]:
    """Losses, metric and gap of the loss by step: of a method the mean over its seeds, and how far these lie apart."""

    def of(side: str, key: str) -> Read:
        return lambda point: _number(point[side].get(key))

    def gap(point: Mapping[str, Any]) -> float:
        return _number(point["validation"].get("loss")) - _number(point["train_probe"].get("loss"))

    metric = comparison.metric
    wanted = [
        ("loss", "Validation loss", "eval mode", of("validation", "loss"), comparison.foreign),
        ("metric", f"Validation {metric}", "eval mode", of("validation", metric), ()),
        ("gap", "Gap of the loss", "validation minus probe of the training rows, in eval mode", gap, ()),
    ]
    charts = []
    for key, heading, note, read, others in wanted:
        seeds = {row.label: _seeds(comparison.curves, row.label, read) for row in comparison.compared}
        most = max(10, MOST_POINTS // max(1, len(seeds) + len(others)))
        lines = [Line(label, _thinned(mean(found), most), styles[label]) for label, found in seeds.items()]
        for number, one in enumerate(others, len({row.method for row in comparison.rows})):
            points = [(point["step"], read(point)) for point in one.points]
            lines.append(Line(f"{one.label} ({one.source})", _thinned(points, most), f"foreign {_style(number)}"))
        lines = [line for line in lines if any(_known(y) for _, y in line.points)]
        bands = [Band(_thinned(spread(found), most), styles[label]) for label, found in seeds.items() if found[1:]]
        note += "; the mean over seeds" if bands else ""
        bands = bands if len(bands) <= MOST_BANDS else []
        note += "; the band: from the lowest seed to the highest" if bands else ""
        note += "; long dashes: other tools" if others else ""
        if lines:
            charts.append(_by_step(key, heading, note, lines, bands))
    return charts


def _by_step(key: str, heading: str, note: str, lines: Sequence[Line], bands: Sequence[Band]) -> Chart:
    dots = sum(len(line.points) for line in lines) <= MOST_DOTS
    lines = [Line(line.name, line.points, line.style, dots) for line in lines]
    told = "; ".join(f"{line.name} ends at {words.number(line.points[-1][1])}" for line in lines)
    drawn = line_chart(lines, title=f"{heading} by step", description=told, bands=bands, height=340)
    return Chart(key, heading, note, lines, drawn)


def _seeds(curves: Iterable[Mapping[str, Any]], label: str, read: Read) -> list[Points]:
    """The curves of a row's seeds that have any point."""
    found = [[(point["step"], read(point)) for point in curve["points"]] for curve in curves if curve["label"] == label]
    return [points for points in found if points]


def _thinned(points: Sequence[Item], most: int) -> Sequence[Item]:
    """Every n-th, and the last, so that at most about `most` are left."""
    return points[:: -(math.ceil(len(points) / most) or 1)][::-1]


def _responses(comparison: Comparison) -> list[Chart]:
    """The main number by every setting that varies and is a number: a rate, a rank."""
    keys = dict.fromkeys(key for row in comparison.rows for key, value in row.settings.items() if _is_number(value))
    found = [(key, families) for key in keys if (families := _families(comparison, key))]
    return [_response(comparison, key, families) for key, families in found]


def _families(comparison: Comparison, key: str) -> list[tuple[str, dict[str, list[Row]]]]:
    """Rows that differ in this setting, in its order, by method, for the charts of one value of all other settings each.

    What dropout is tuned by is no such other setting of a rank: it is chosen anew at every one.
    """
    tuned = key.startswith(TUNED)
    found: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    rows = [row for row in comparison.rows if _is_number(row.settings.get(key)) and _mean(row, comparison) is not None]
    for row in sorted(rows, key=lambda row: row.settings[key]):
        others = {name: value for name, value in row.settings.items() if name != key}
        rest = ", ".join(f"{name}={value}" for name, value in others.items() if tuned or not name.startswith(TUNED))
        if tuned or row.chosen:
            found[rest][row.method].append(row)
    charts = []
    for rest, methods in found.items():
        names = [name for name in _numbers(comparison) if len({row.settings[key] for row in methods.get(name, ())}) > 1]
        for start in range(0, len(names), WHISKERED):
            charts.append((rest, {name: methods[name] for name in names[start : start + WHISKERED]}))
    return charts


def _response(comparison: Comparison, key: str, charts: Sequence[tuple[str, Mapping[str, Sequence[Row]]]]) -> Chart:
    """A chart, or several of one scale. Baselines that are none of the points are drawn as levels."""
    rows = [row for _, families in charts for members in families.values() for row in members]
    values = sorted({row.settings[key] for row in rows})
    levels = [_levels(comparison, families, len(values)) for _, families in charts]
    samples = [row.scores[comparison.main].sample for row in rows]
    points = [(0, _number(end)) for one in samples for end in (one.low, one.mean, one.high)]
    span = bounds([points, *(line.points for some in levels for line in some)]) or (0.0, 0.0)
    short, every = key.rsplit(".", 1)[-1], math.ceil(len(values) / (10 if len(charts) == 1 else 5))
    drawings, legend = [], {}
    for (rest, families), some in zip(charts, levels, strict=True):
        marks, lines = _family_marks(comparison, key, families, values)
        told = [*(mark.text for mark in marks), *(f"{line.name}: {line.points[0][1]:.4f}" for line in some)]
        drawn = scatter(
            marks,
            names=[(n, f"{value:g}" if n else f"{short} {value:g}") for n, value in enumerate(values)][::every],
            ends=(-0.5, len(values) - 0.5),
            span=span,
            title=f"{comparison.measure.title} by {key}" + (f", {rest}" if rest else ""),
            description="; ".join(told),
            lines=[*some, *lines],
            width=WIDTH if len(charts) == 1 else SMALL,
        )
        legend |= {line.name: line for line in [*lines, *some]}
        caption = Markup("<figcaption>{}</figcaption>").format(rest or ", ".join(families))
        drawings.append(drawn if len(charts) == 1 else Markup("<figure>{}{}</figure>").format(caption, drawn))
    note = (
        f"mean of {comparison.measure.title} with its 95 % interval, {_better(comparison)}; values at equal distances"
    )
    note += "; ringed: chosen by validation" if key.startswith(TUNED) else ""
    drawing = Markup("").join(drawings)
    pair = drawing if len(charts) == 1 else Markup('<div class="pair">{}</div>').format(drawing)
    return Chart(key.replace(".", "-"), f"Response to {key}", note, list(legend.values()), pair)


def _levels(comparison: Comparison, families: Mapping[str, Sequence[Row]], values: int) -> list[Line]:
    rows = [row for members in families.values() for row in members]
    wanted = {row.baseline for row in rows} - {row.label for row in rows}
    return [
        Line(f"{row.method} (baseline)", [(x, value) for x in (-0.5, values - 0.5)], "level", dots=False)
        for row in comparison.rows
        if row.label in wanted and (value := _mean(row, comparison)) is not None
    ]


def _family_marks(
    comparison: Comparison, key: str, families: Mapping[str, Sequence[Row]], values: Sequence[float]
) -> tuple[list[Mark], list[Line]]:
    """The points of each method, a little beside those of the others, and a line through them."""
    marks, lines, numbers = [], [], _numbers(comparison)
    for place, (method, rows) in enumerate(families.items()):
        shift = 0.1 * (place - (len(families) - 1) / 2)
        style, points = _style(numbers[method]), []
        for row in rows:
            sample, value = row.scores[comparison.main].sample, row.settings[key]
            x, y = values.index(value) + shift, _number(sample.mean)
            points.append((x, y))
            ring = row.chosen and key.startswith(TUNED)
            text = f"{method}, {key}={value:g}: {_interval(sample)}{', chosen by validation' if ring else ''}"
            marks.append(Mark(x, y, text, style, _number(sample.low), _number(sample.high), ring=ring))
        lines.append(Line(method, points, style, dots=False))
    return marks, lines


def _interval(sample: Sample) -> str:
    told = f"{_number(sample.mean):.4f}"
    return told if sample.low is None else f"{told} ({sample.low:.4f} to {sample.high:.4f})"


def _pareto(comparison: Comparison, styles: Mapping[str, str]) -> list[Chart]:
    """The main number by the time it took: one chart, or none where there is nothing to weigh."""
    placed = [
        (row, row.time_ratio, value)
        for row in comparison.compared
        if row.time_ratio is not None and _known(row.time_ratio) and (value := _mean(row, comparison)) is not None
    ]
    if len(placed) < 2:
        return []
    marks, fronts = [], defaultdict(list)
    for row, time, value in placed:
        text = f"{row.label}: {value:.4f} in {time:.2f} x the time{', on the front' if row.front else ''}"
        marks.append(Mark(time, value, text, styles[row.label], name=row.label, ring=row.front))
        if row.front:
            fronts[repr(row.facet)].append((time, value))
    times = ticks(min(mark.x for mark in marks), max(mark.x for mark in marks), 7)
    beyond = (times[-1] - times[0]) / 20
    drawn = scatter(
        marks,
        names=[(time, f"{time:g} x" if n else f"time {time:g} x") for n, time in enumerate(times)],
        ends=(times[0] - beyond, times[-1] + beyond),
        span=bounds([[(mark.x, mark.y) for mark in marks]]) or (0.0, 0.0),
        title=f"{comparison.measure.title} by time",
        description="; ".join(mark.text for mark in marks),
        lines=[Line("front", sorted(points), "front", dots=False) for points in fronts.values()],
        height=360,
    )
    note = (
        f"mean of {comparison.measure.title}, {_better(comparison)}; time of training by the baseline's, looks apart. "
        "Ringed and joined: no other is both better and faster"
    )
    legend = [Line(row.label, (), styles[row.label]) for row, _, _ in placed]
    return [Chart("pareto", "What it costs", note, legend, drawn)]


def _runs(row: Row, folder: Path) -> tuple[str, list[tuple[int, str, str]]]:
    """The row, and of each seed the way from the folder to the run's report, and the run's name."""
    links = []
    for seed, run in zip(row.seeds, map(Path, row.runs), strict=True):
        link = Path(os.path.relpath(run.resolve(), folder.resolve())) / "report.html"
        links.append((seed, quote(link.as_posix()), run.name))
    return row.label, links


def _columns(columns: Sequence[tables.Column]) -> list[tuple[str, str]]:
    return [(column.title, "" if column.right else "text") for column in columns]


def _better(comparison: Comparison) -> str:
    return "lower is better" if comparison.measure.lower_is_better else "higher is better"


def _mean(row: Row, comparison: Comparison) -> float | None:
    value = row.scores[comparison.main].sample.mean
    return value if value is not None and math.isfinite(value) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _known(*values: float) -> bool:
    return all(map(math.isfinite, values))


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
