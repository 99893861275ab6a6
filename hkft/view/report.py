"""`report.html` of a run: what it did, whether it overfits, and what that rests on."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from markupsafe import Markup

from hkft.diagnostics.gap import LOWER_IS_BETTER
from hkft.events import Notice
from hkft.view import words
from hkft.view.page import write_page
from hkft.view.scale import Points
from hkft.view.svg import SMALL, Band, Line, line_chart, meter, reliability

Records = Sequence[Mapping[str, Any]]
MOST_POINTS = 240  # of the objective's line: about three pixels each
MOST_DOTS = 60  # of a line: beyond, its dots would touch
MOST_ROWS = 20  # of a table of examples
MOST_LETTERS = 400  # of an example's text
MOST_MODULES = 12  # told one by one; more are told by kind


@dataclass(frozen=True, slots=True)
class Chart:
    """A section with a drawing. `legend`: its lines and bands, where there is more than one thing to tell apart."""

    key: str
    heading: str
    note: str
    legend: Sequence[Line]
    drawing: Markup


@dataclass(frozen=True, slots=True)
class Table:
    """`columns`: title and class of the style sheet ("": numbers; "text"; "id": on one line; "prose": long texts)."""

    columns: Sequence[tuple[str, str]]
    rows: Sequence[Sequence[str | Markup]]


@dataclass(frozen=True, slots=True)
class Part:
    """One number of the decomposition: what it is at the last look, and what it means."""

    name: str
    style: str
    value: str
    meaning: str


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
    diagnosis: Mapping[str, Any] | None = None,
) -> None:
    """Write the report to `path`, whole or not at all.

    curve, train_records: the "eval" and the "train" records of `metrics.jsonl`. environment: any nesting of mappings.
    diagnosis: what is known beyond the curve, as plain data; a section whose part is missing or None is left out.
    """
    metric, known = words.metric_of(summary), diagnosis or {}
    end = max((record["step"] for record in (*curve, *train_records)), default=0)
    sections = {
        **{chart.key: (chart.heading, chart) for chart in _charts(summary, curve, metric, train_records, known, end)},
        "decomposition": ("Decomposition of the loss", _decomposition(known.get("decomposition") or (), end)),
        "calibration": ("Calibration", _calibration(known.get("calibration") or {})),
        "memorisation": ("Memorisation", _memorisation(known.get("memorisation") or {})),
        "near-duplicates": ("Near-duplicates", _near_duplicates(known.get("near_duplicates"))),
        "dropout": ("What the dropout did", _dropout(sites)),
        "adapter": ("Adapter", _adapter(known.get("adapter") or ())),
        "evaluations": ("Evaluations", _evaluations(curve, metric, summary.get("best_step"))),
        "configuration": ("Configuration", recipe_yaml),
        "environment": ("Environment", _flat(environment)),
        "reproduce": ("How to reproduce", known.get("reproduce")),
        "notices": ("Notices", notices),
    }
    write_page(
        path,
        "run.html.j2",
        summary=summary,
        verdict=_verdict(summary, known),
        figures=[*words.figures(summary), *_overhead(known.get("overhead"))],
        provenance=known.get("provenance"),
        warnings=sum(notice.level == "warning" for notice in notices),
        sections={key: section for key, section in sections.items() if section[1]},
    )


def _verdict(summary: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any] | None:
    """Name, confidence, sentence and next steps; without a diagnosis, what the summary has of them."""
    found = known.get("verdict") or summary.get("verdict")
    if not found:
        return None
    steps = [(step.get("why") or "", step.get("command") or "") for step in found.get("next") or ()]
    told = {name: found.get(name) or "" for name in ("name", "confidence", "text")}
    return {**told, "next": [step for step in steps if any(step)]}


def _overhead(found: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if not found or found.get("seconds") is None:
        return []
    share = "" if found.get("share") is None else f" ({found['share']:.1%} of the run)"
    return [("time for looks", f"{words.duration(found['seconds'])}{share}")]


_SIDES = {"train_probe": "probe", "validation": "validation", "gap": "gap"}


def _charts(
    summary: Mapping[str, Any], curve: Records, metric: str, train_records: Records, known: Mapping[str, Any], end: int
) -> list[Chart]:
    best = summary.get("best_step")
    charts = []
    for key, name in (("loss", "loss"), ("metric", metric)):
        probe, validation = _points(curve, "train_probe", name), _points(curve, "validation", name)
        if not validation:
            continue
        lines = [_curve("probe of the training rows", probe, "probe"), _curve("validation", validation, "validation")]
        text = f"{name} by step, in eval mode, on both sides: " + _told(lines)
        mark = _mark(validation, best)
        drawn = line_chart(lines, title=f"{name} by step", description=text, best=mark, end=end)
        charts.append(Chart(key, name.capitalize(), f"eval mode on both sides; {_better(name)}", lines, drawn))
    if charts and summary["task"] == "generation":
        charts[-1] = replace(charts[-1], drawing=charts[-1].drawing + _scores(curve, metric, best, end))
    charts.append(_gap(curve, known.get("gap_intervals") or (), end))
    points = _thinned([(record["step"], _number(record["objective"])) for record in train_records])
    if points:
        line = Line("objective", points, "objective", dots=False)
        drawn = line_chart([line], title="training objective by step", description=_told([line]), end=end, height=190)
        note = f"train mode, on the batch being learnt, consistency term included: {words.OBJECTIVE}"
        charts.append(Chart("objective", "Training objective", note, (), drawn))
    return charts


def _scores(curve: Records, metric: str, best: int | None, end: int) -> Markup:
    """A small chart of each score of the written texts; empty where no look has any."""
    names = dict.fromkeys(name for record in curve for name in record["validation"])
    drawings = []
    for name in [name for name in names if name not in ("loss", "perplexity", "token_accuracy", metric)]:
        line = _curve("validation", _points(curve, "validation", name), "validation")
        title, mark = f"{name} by step", _mark(line.points, best)
        drawn = line_chart([line], title=title, description=_told([line]), best=mark, end=end, width=SMALL, height=190)
        caption = f"{name}, {_better(name)}"
        drawings.append(Markup("<figure><figcaption>{}</figcaption>{}</figure>").format(caption, drawn))
    head = Markup('<h3>Scores of the written texts</h3><p class="note">validation, by step</p><div class="pair">')
    return head + Markup("").join(drawings) + Markup("</div>") if drawings else Markup("")


def _better(name: str) -> str:
    return "lower is better" if name in LOWER_IS_BETTER else "higher is better"


def _mark(points: Points, best: int | None) -> tuple[float, float] | None:
    return next(((x, y) for x, y in points if x == best and math.isfinite(y)), None)


def _gap(curve: Records, intervals: Records, end: int) -> Chart:
    line = _curve("gap of the loss", _points(curve, "gap", "loss"), "gap")
    told, legend, bands = _told([line]), [line], []
    if edges := _edges((look["step"], look.get("low"), look.get("high")) for look in intervals):
        bands, legend = [Band(edges, "gap")], [line, Line("its 95% interval", (), "gap band")]
        told += f"; its 95% interval at the end: {_between(*edges[-1][1:])}"
    drawn = line_chart([line], title="gap of the loss by step", description=told, end=end, height=220, bands=bands)
    note = "validation loss minus probe loss: how much easier the training rows are for the model"
    if bands:
        note += ". The band: what other rows of the same kind could have given. Above 0, the gap is more than chance"
    return Chart("gap", "Gap", note, legend, drawn)


_PARTS = {
    "regularisation": "objective minus probe loss, on the same rows: what training adds on purpose",
    "gap": "validation minus probe: what the model knows of its training rows and not of others",
    "net_gain": "validation before training minus now: what training has brought on rows it never saw",
    "regret": "validation now minus its best so far: what training past the best look has cost",
}


def _decomposition(looks: Records, end: int) -> tuple[Chart, str, list[Part]] | None:
    """A chart of the parts by step, the last look in words, and its numbers."""
    lines = [_curve(key.replace("_", " "), [(look["step"], _part(look, key)) for look in looks], key) for key in _PARTS]
    lines = [line for line in lines if any(math.isfinite(y) for _, y in line.points)]
    if not lines:
        return None
    edges = _edges((look["step"], *(look.get("regret_interval") or (None, None))) for look in looks)
    bands = [Band(edges, "regret")] if edges else []
    drawn = line_chart(lines, title="parts of the loss by step", description=_told(lines), end=end, bands=bands)
    note = "what the losses of every look are made of, on the same rows throughout"
    parts = [
        Part(line.name, line.style, words.number(line.points[-1][1]), _meaning(line.style, looks[-1])) for line in lines
    ]
    legend = [*lines, *(Line("95% interval of the regret", (), f"{band.style} band") for band in bands)]
    chart = Chart("decomposition", "Decomposition of the loss", note, legend, drawn)
    return chart, f"At the last look, step {looks[-1]['step']}", parts


def _part(look: Mapping[str, Any], key: str) -> float:
    value = look.get(key)
    return _number(value.get("total") if isinstance(value, Mapping) else value)


def _meaning(key: str, look: Mapping[str, Any]) -> str:
    """What a part is, with what of it is known beyond its number."""
    if key == "regularisation" and look.get(key):
        shares = words.added(look[key])
        return f"{_PARTS[key]} ({shares})" if shares else _PARTS[key]
    interval = look.get("regret_interval") if key == "regret" else None
    if not interval or not _known(*interval):
        return _PARTS[key]
    beyond = "above 0, more than chance" if interval[0] > 0 else "it reaches 0, so this may be chance"
    return f"{_PARTS[key]}; 95% interval {_between(*interval)}: {beyond}"


_CALIBRATION = {
    "nll": "negative log-likelihood",
    "brier": "Brier score",
    "calibration_error": "calibration error",
    "temperature": "best temperature",
    "calibration_error_after": "calibration error at that temperature",
}


def _calibration(found: Mapping[str, Any]) -> tuple[list[tuple[str, Markup]], Table, str] | None:
    """A reliability diagram for each side, the numbers, and the temperature in a sentence."""
    sides = {label: found[key] for key, label in list(_SIDES.items())[:2] if found.get(key)}
    if not sides:
        return None
    drawings = [(name, _reliability(name, side)) for name, side in sides.items()]
    columns = [("", "text"), *((name, "") for name in sides)]
    rows = [
        [label, *(words.number(side.get(key)) for side in sides.values())]
        for key, label in _CALIBRATION.items()
        if any(side.get(key) is not None for side in sides.values())
    ]
    return drawings, Table(columns, rows), _temperature(sides.get("validation") or {})


def _reliability(name: str, side: Mapping[str, Any]) -> Markup:
    told = f"accuracy by confidence on the {name} rows; calibration error {words.number(side.get('calibration_error'))}"
    title = f"reliability of {name}"
    return reliability(side.get("bins") or (), title=title, description=told, style=name)


def _temperature(side: Mapping[str, Any]) -> str:
    value, before, after = _numbers(side, "temperature", "calibration_error", "calibration_error_after")
    if not _known(value):
        return ""
    if not 0.05 < value < 20:  # the bounds of the search
        return (
            "On validation rows no temperature makes the probabilities better: they know no more than a coin, or all."
        )
    how = "too sure of itself" if value > 1.05 else "not sure enough" if value < 0.95 else "about as sure as it may be"
    change = (
        f"At the best step, on validation rows, the model is {how}. Dividing its logits by a temperature of {value:.2f}"
    )
    if not _known(before, after):
        return f"{change} would fit them best."
    if after >= before:
        return f"At the best step: calibration error {words.number(before)}, which no temperature makes smaller."
    return f"{change} would take the calibration error from {words.number(before)} to {words.number(after)}."


_KINDS = {
    "memorised": (
        "Learned by heart",
        "training rows whose loss fell by half or more after the best step, when validation gained no more",
    ),
    "forgotten": ("Forgotten", "validation rows that were fitted and right at an earlier look, and wrong at the last"),
    "suspicious": ("Suspicious", "the model stays against the label: look at them, for the label may be wrong"),
}
_EXAMPLE = ("row", "id"), ("text", "prose"), ("label", "text")
_LOSSES = ("first", "lowest", "last")


def _memorisation(found: Mapping[str, Any]) -> tuple[str, list[tuple[str, str, Table]]] | None:
    """What the AUC means, and the rows by kind."""
    tables = [(*_KINDS[kind], _examples(found[kind])) for kind in _KINDS if found.get(kind)]
    told = _auc(found.get("auc") or {})
    return (told, tables) if told or tables else None


def _auc(found: Mapping[str, Any]) -> str:
    value, low, high = _numbers(found, "value", "low", "high")
    if not _known(value):
        return ""
    told, chance = f"AUC {words.number(value)}", ""
    if _known(low, high):
        told += f", 95% interval {_between(low, high)}"
        chance = " The interval lies above 0.5: more than chance." if low > 0.5 else " A coin may do as well."
    return (
        f"Shown a training row and a validation row, one can tell by their losses which is which {value:.0%} of the time "
        f"({told}). 50% is a coin: nothing is memorised.{chance}"
    )


def _examples(rows: Records) -> Table:
    cells = [
        [
            *(_shown(row.get(key)) for key in ("id", "text", "label")),
            *(words.number(row.get(key)) for key in _LOSSES),
            _shown(row.get("since")),
        ]
        for row in rows[:MOST_ROWS]
    ]
    columns = [*_EXAMPLE, ("first loss", ""), ("lowest", ""), ("last", ""), ("since step", "")]
    if not any(row.get("text") for row in rows):
        return Table([columns[0], *columns[2:]], [[row[0], *row[2:]] for row in cells])
    return Table(columns, cells)


def _near_duplicates(found: Mapping[str, Any] | None) -> tuple[str, Table] | None:
    """How many there are, and the nearest pairs."""
    if not found:
        return None
    pairs = sorted(found.get("pairs") or (), key=lambda pair: -_number(pair.get("similarity")))
    compared = "" if found.get("compared") is None else f"{found['compared']:,} validation rows were compared. "
    alike = {0: "No pair of rows is", 1: "One pair is"}.get(len(pairs), f"{len(pairs):,} pairs are")
    told = f"{compared}{alike} nearly the same in training and validation"
    told += f"; the nearest {MOST_ROWS} are shown" if len(pairs) > MOST_ROWS else ""
    keys = ("validation_id", "validation_text", "train_id", "train_text")
    rows = [[words.number(pair.get("similarity")), *(_shown(pair.get(key)) for key in keys)] for pair in pairs]
    names = ("validation", "id"), ("its text", "prose"), ("training", "id"), ("its text", "prose")
    return f"{told}.", Table([("similarity", ""), *names], rows[:MOST_ROWS])


def _dropout(sites: Records) -> Table | None:
    if not sites:
        return None
    columns = [(name, "text" if n < 3 else "") for n, name in enumerate(words.SITE_COLUMNS)]
    return Table(columns, words.site_rows(sites))


def _adapter(modules: Records) -> Table | None:
    """Each module, or each kind of module (its last name) and rank where there are many: mean and range."""
    if not modules:
        return None
    many = len(modules) > MOST_MODULES
    groups: dict[tuple[str, Any], list[Mapping[str, Any]]] = defaultdict(list)
    for module in modules:
        name = str(module.get("module") or "-")
        groups[name.rsplit(".", 1)[-1] if many else name, module.get("rank")].append(module)
    columns = [
        ("module", "id" if many else "prose"),
        ("rank", ""),
        ("effective rank", ""),
        ("", "bar"),
        ("update norm", ""),
    ]
    rows = [_module(name, rank, group) for (name, rank), group in groups.items()]
    return Table([*columns, ("weight norm", ""), ("update by weight", "")], rows)


def _module(name: str, rank: int | None, group: Records) -> list[str | Markup]:
    names = "effective_rank", "update_norm", "weight_norm"
    used, updates, weights = zip(*(_numbers(module, *names) for module in group), strict=True)
    shares = [update / weight if weight else math.nan for update, weight in zip(updates, weights, strict=True)]
    known = [value for value in used if _known(value)]
    bar = meter(sum(known) / len(known) / rank) if rank and known else ""
    title = name if len(group) == 1 else f"{name} x {len(group)}"
    return [title, _shown(rank), _spread(used), bar, _spread(updates), _spread(weights), _spread(shares)]


def _spread(values: Sequence[float]) -> str | Markup:
    """The mean, with lowest and highest below it where there are several."""
    known = [value for value in values if _known(value)]
    if not known:
        return "-"
    mean = words.number(sum(known) / len(known))
    return mean if len(known) == 1 else Markup("{} <small>{}</small>").format(mean, _between(min(known), max(known)))


def _evaluations(curve: Records, metric: str, best_step: int | None) -> tuple[list[str], list[Any]] | None:
    columns = ["step", "epoch", *(f"{name} {side}" for name in ("loss", metric) for side in _SIDES.values())]
    return (columns, [_row(record, metric, best_step) for record in curve]) if curve else None


def _curve(name: str, points: Points, style: str) -> Line:
    return Line(name, points, style, dots=len(points) <= MOST_DOTS)


def _edges(intervals: Iterable[tuple[Any, ...]]) -> list[tuple[float, float, float]]:
    """Step, low and high of the intervals as a band; empty where none is known."""
    edges = [(step, _number(low), _number(high)) for step, low, high in intervals]
    return edges if any(_known(*edge) for edge in edges) else []


def _known(*values: float) -> bool:
    return all(map(math.isfinite, values))


def _numbers(found: Mapping[str, Any], *names: str) -> list[float]:
    return [_number(found.get(name)) for name in names]


def _between(low: float, high: float) -> str:
    return f"{words.number(low)} to {words.number(high)}"


def _shown(value: Any) -> str:
    """An id, a label, a text of the run: floats as numbers, a dash for nothing, the beginning of what is long."""
    if value is None:
        return "-"
    text = words.number(value) if isinstance(value, float) else str(value)
    return text if len(text) <= MOST_LETTERS else f"{text[:MOST_LETTERS]} ..."


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
