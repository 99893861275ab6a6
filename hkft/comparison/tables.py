"""A comparison as text: rows for a screen, sentences, Markdown, LaTeX, CSV, JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hkft.comparison.compare import BESIDE, Comparison, Row, Score
from hkft.comparison.statistics import Difference, Sample
from hkft.folder import write_text

NOTHING = "-"


MARK = "*"  # better or worse, by the Holm-corrected p


@dataclass(frozen=True)
class Column:
    """A column of the tables for people. right: its cells are numbers. rank: the lower, the sooner it is shown."""

    title: str
    cell: Callable[[Row], str]
    rank: int
    right: bool = True


def columns(comparison: Comparison) -> list[Column]:
    """What the tables for people show, in this order. What may be said of it is in `sentences`."""
    titles = {measure.key: measure.title for measure in comparison.measures}
    main = comparison.main

    def change(row: Row) -> str:
        found = row.scores[main].difference
        return NOTHING if found is None or found.mean is None else f"{found.mean:+z.4f}{mark(row.scores[main])}"

    shown = [
        Column("method", lambda row: row.label, 0, right=False),
        Column("seeds", lambda row: str(len(row.seeds)), 1),
        Column(titles[main], lambda row: spread(row.scores[main], 4), 2),
        Column("median", lambda row: number(row.scores[main].sample.median, 4), 8),
        *([Column(titles[BESIDE], lambda row: spread(row.scores[BESIDE], 4), 3)] if BESIDE in titles else []),
        Column("paper", lambda row: number(row.paper, 4), 3),
        Column("difference", change, 4),
        Column(titles["best"], lambda row: spread(row.scores["best"], 4), 10),
        Column(titles["final"], lambda row: spread(row.scores["final"], 4), 12),
        Column(titles["final_loss"], lambda row: spread(row.scores["final_loss"], 3), 7),
        Column("final gap", lambda row: spread(row.scores["final_gap"], 3), 5),
        Column("time", lambda row: NOTHING if row.time_ratio is None else f"{row.time_ratio:.2f} x", 6),
        Column(f"{titles['best']} in equal time", lambda row: _spread(row.equal_time, 4), 13),
        Column("tried", lambda row: str(row.tried), 9),
        Column("memory", lambda row: memory(row.peak_memory_bytes), 14),
        Column("verdicts", lambda row: counted(row.verdicts), 15, right=False),
    ]
    left_out = {
        "paper": comparison.paper is None,
        "tried": all(row.tried == 1 for row in comparison.rows),
    }
    unique = {column.title: column for column in reversed(shown)}  # without tests the main number is the best one
    return [column for column in shown if unique[column.title] is column and not left_out.get(column.title)]


def fitted(comparison: Comparison, width: int) -> tuple[list[str], list[list[str]]]:
    """Titles and cells of the table of the rows that stand for their methods, with the columns that `width` has room for.

    What does not fit there is in `sentences`.
    """
    known = columns(comparison)
    cells = {column.title: [column.cell(row) for row in comparison.compared] for column in known}
    taken: set[str] = set()
    room = width
    for column in sorted(known, key=lambda column: column.rank):
        wide = max(len(column.title) if column.rank < 2 else _wrapped(column.title), *map(len, cells[column.title])) + 2
        if column.rank > 1 and wide > room:
            break
        taken.add(column.title)
        room -= wide
    shown = [column.title for column in known if column.title in taken]
    return shown, [list(row) for row in zip(*(cells[title] for title in shown), strict=True)]


def settings(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Titles and cells of every setting that was tried, where one of several was chosen; no rows where none was."""
    if all(row.chosen for row in comparison.rows):
        return [], []
    titles = {measure.key: measure.title for measure in comparison.measures}
    keys = dict.fromkeys([comparison.main, "best", "best_loss", "final_gap"])
    rows = [
        [row.label, *(spread(row.scores[key], 4) for key in keys), "chosen" if row.chosen and row.tried > 1 else ""]
        for row in comparison.rows
        if row.tried > 1
    ]
    return ["setting", *(titles[key] for key in keys), "by validation"], rows


def sentences(comparison: Comparison) -> list[str]:
    """What may be said of each method: the main number, what a second pass was worth, the loss and the gap at the end."""
    titles = {measure.key: measure.title for measure in comparison.measures}
    others = [row for row in comparison.compared if row.baseline != row.label]

    key = comparison.main
    said = [
        f"{titles[key]}, {row.label} against {row.baseline}: {words(row.scores[key])}{_evidence(row.scores[key])}"
        for row in others
    ]
    for row in comparison.compared:
        if row.single_pass:
            label, found = row.single_pass
            one = next(each for each in comparison.rows if each.label == label)
            cost = (
                f", for {row.time_ratio / one.time_ratio:.2f} x its time" if row.time_ratio and one.time_ratio else ""
            )
            said.append(
                f"{titles[key]}, {row.label} against {label}, which has one pass{cost}: {found.text}{_difference(found)}"
            )
    fronts: dict[str, list[Row]] = {}
    for row in comparison.compared:
        fronts.setdefault(", ".join(f"{key}={value}" for key, value in row.facet.items()), []).append(row)
    for facet, rows in fronts.items():
        front = [row.label for row in rows if row.front]
        if len(rows) > 1 and front:
            at = f" at {facet}" if facet else ""
            said.append(f"no row{at} is both better and faster than these (Pareto): {', '.join(front)}")
    return [*said, *(_by_word(others, key, titles[key]) for key in ("final_loss", "final_gap") if others)]


def markdown(comparison: Comparison) -> str:
    """The whole comparison for a README or an issue."""
    shown = columns(comparison)
    lines = [
        f"# {_heading(comparison)}",
        "",
        _piped([column.title for column in shown]),
        _piped(["---:" if column.right else "---" for column in shown]),
        *(_piped([column.cell(row) for column in shown]) for row in comparison.compared),
    ]
    titles, rows = settings(comparison)
    if rows:
        lines += [
            "",
            "## Settings tried",
            "",
            _piped(titles),
            _piped(["---", *("---:" for _ in titles[1:])]),
            *map(_piped, rows),
        ]
    parts = {
        "In words": sentences(comparison),
        "Curves of other tools": foreign(comparison),
        "Warnings": warned(comparison),
        "How to read it": comparison.notes,
    }
    for title, entries in parts.items():
        if entries:
            lines += ["", f"## {title}", "", *(f"- {entry}" for entry in entries)]
    return "\n".join(lines) + "\n"


def latex(comparison: Comparison) -> str:
    r"""A `table` for a paper that has \usepackage{booktabs}: the best number in bold, a star where a difference is significant.

    The notes are in its caption.
    """
    left_out = ("verdicts", "memory", "tried")
    shown = [column for column in columns(comparison) if column.title not in left_out]
    measure = comparison.measure
    best = best_of(comparison)

    def cell(column: Column, row: Row) -> str:
        text = _tex(column.cell(row))
        if column.title == "difference":
            return text.replace(MARK, "$^{*}$")
        return rf"\textbf{{{text}}}" if column.title == measure.title and row.label in best else text

    significant = any(mark(row.scores[comparison.main]) for row in comparison.compared)
    stars = [f"{MARK}: p < 0.05, Holm-corrected"] if significant else []
    caption = ". ".join([_heading(comparison), *stars, *comparison.notes]) + "."
    lines = [
        *(f"% {warning}" for warning in warned(comparison)),
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{{_tex(caption)}}}",
        rf"  \begin{{tabular}}{{{''.join('r' if column.right else 'l' for column in shown)}}}",
        r"    \toprule",
        f"    {' & '.join(_tex(column.title) for column in shown)} \\\\",
        r"    \midrule",
        *(f"    {' & '.join(cell(column, row) for column in shown)} \\\\" for row in comparison.compared),
        r"    \bottomrule",
        r"  \end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def best_of(comparison: Comparison) -> set[str]:
    """The rows whose mean of the main number is best."""
    measure = comparison.measure
    means = {row.label: row.scores[measure.key].sample.mean for row in comparison.compared}
    known = {label: mean for label, mean in means.items() if mean is not None}
    if not known:
        return set()
    best = min(known.values()) if measure.lower_is_better else max(known.values())
    return {label for label, mean in known.items() if mean == best}


def foreign(comparison: Comparison) -> list[str]:
    """A sentence for each curve of another tool."""
    return [
        f"{curve.label} ({curve.source}): {curve.verdict}; validation loss {curve.final_loss:.3f} at the end, {curve.best_loss:.3f} "
        f"at its lowest; {curve.final_gap:.3f} above the loss logged while learning"
        for curve in comparison.foreign
    ]


def comma_separated(comparison: Comparison) -> str:
    """A line per row and measure, unrounded, with empty cells where there is no number: for a spreadsheet or pandas."""
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    sample = ("n", "mean", "std", "median", "low", "high")
    difference = (
        "n",
        "mean",
        "std",
        "low",
        "high",
        "effect",
        "wins",
        "ties",
        "losses",
        "p",
        "p_holm",
        "needed",
        "text",
    )
    costs = ("time_ratio", "samples_per_s", "tokens_per_s", "peak_memory_bytes", "passes", "tried", "chosen", "paper")
    out.writerow(["row", "baseline", "measure", *sample, *(f"difference_{name}" for name in difference), *costs])
    for row in comparison.rows:
        for measure in comparison.measures:
            score = row.scores[measure.key]
            numbers = [getattr(score.sample, name) for name in sample]
            against = [getattr(score.difference, name, None) for name in difference]
            cost = [getattr(row, name) for name in costs]
            out.writerow([row.label, row.baseline, measure.title, *numbers, *against, *cost])
    return text.getvalue()


def json_text(comparison: Comparison) -> str:
    return json.dumps(comparison.as_dict(), indent=2) + "\n"


FORMS: dict[str, Callable[[Comparison], str]] = {
    "json": json_text,
    "md": markdown,
    "tex": latex,
    "csv": comma_separated,
}


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """`comparison.json`, `.md`, `.tex` and `.csv` in the grid's folder, each whole or not at all."""
    paths = [folder / f"comparison.{ending}" for ending in FORMS]
    for path, form in zip(paths, FORMS.values(), strict=True):
        write_text(path, form(comparison))
    return paths


def number(value: float | None, digits: int) -> str:
    return NOTHING if value is None else f"{value:.{digits}f}"


def spread(score: Score, digits: int) -> str:
    """`mean ± std`, or the one value of one seed."""
    return _spread(score.sample, digits)


def mark(score: Score) -> str:
    """A star where the difference is significant after Holm."""
    found = score.difference
    return MARK if found is not None and found.word != "cannot tell" else ""


def _spread(sample: Sample, digits: int) -> str:
    if sample.std is None:
        return number(sample.mean, digits)
    return f"{number(sample.mean, digits)} ± {number(sample.std, digits)}"


def memory(size: int | None) -> str:
    return NOTHING if size is None else f"{size / 2**30:.2f} GiB"


def counted(verdicts: Mapping[str, int]) -> str:
    """`3 healthy, 2 overfitting`."""
    return ", ".join(f"{count} {name}" for name, count in verdicts.items())


def warned(comparison: Comparison) -> list[str]:
    """The cells that failed, each with the first line of its error, and the comparison's warnings."""
    failures = [f"{cell} failed: {failure.error.splitlines()[0]}" for cell, failure in comparison.failed.items()]
    return [*failures, *comparison.warnings]


def words(score: Score) -> str:
    return "baseline" if score.difference is None else score.difference.text


def _evidence(score: Score) -> str:
    """What the words rest on, as far as there is any: over seeds, then over seeds and rows."""
    told = _difference(score.difference) if score.difference else ""
    drawn, single = score.bootstrap, score.mcnemar
    if drawn and drawn.mean is not None and drawn.p is not None and drawn.seeds != 2:  # two say next to nothing
        over = "other rows" if drawn.seeds == 1 else "other seeds and other rows"
        told += f"; with {over} {drawn.low:+z.4f} to {drawn.high:+z.4f}, p = {drawn.p:.2g} (bootstrap)"
    if single:
        told += f"; only it is right on {single.only_method} rows, only the baseline on {single.only_baseline}"
        told += f" (McNemar p = {single.p:.2g}, of these two runs alone)"
    return told


def _by_word(rows: Sequence[Row], key: str, title: str) -> str:
    """`final loss against none: better dropkey (-0.0967, p = 0.0012); cannot tell hiddencut`."""
    found: dict[str, list[str]] = {}
    for row in rows:
        difference = row.scores[key].difference
        if difference is not None:
            sure = difference.word != "cannot tell" and difference.mean is not None and difference.p_holm is not None
            told = f" ({difference.mean:+z.3f}, p = {difference.p_holm:.2g})" if sure else ""
            found.setdefault(difference.word, []).append(row.label + told)
    bases = " or ".join(dict.fromkeys(row.baseline for row in rows))
    said = {"better": "better", "worse": "worse", "cannot tell": "cannot tell for"}
    return f"{title} against {bases}: " + "; ".join(f"{said[word]} {', '.join(each)}" for word, each in found.items())


def _difference(found: Difference) -> str:
    """`; +0.0030 (-0.0100 to +0.0160), p = 0.43, effect 0.6, won 3 of 5 seeds, tied 1`."""
    if found.mean is None:
        return ""
    interval = "" if found.low is None else f" ({found.low:+z.4f} to {found.high:+z.4f})"
    p = "" if found.p_holm is None else ", p < 0.001" if found.p_holm < 0.001 else f", p = {found.p_holm:.2g}"
    effect = "" if found.effect is None else f", effect {found.effect:+z.1f}"
    seeds = (
        "" if found.n < 2 else f", won {found.wins} of {found.n} seeds" + (f", tied {found.ties}" if found.ties else "")
    )
    return f"; {found.mean:+z.4f}{interval}{p}{effect}{seeds}"


def _wrapped(title: str) -> int:
    """How wide a title is that may be broken between its words."""
    return max(map(len, title.split()))


def _heading(comparison: Comparison) -> str:
    seeds = {seed for row in comparison.rows for seed in row.seeds}
    rows = ", ".join(row.label for row in comparison.rows)
    return f"{comparison.recipe}: {rows}; {len(seeds)} seed{'s' * (len(seeds) != 1)}; baseline {comparison.baseline}"


def _piped(cells: Sequence[str]) -> str:
    escaped = [cell.replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


_TEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    "±": r"$\pm$",
}


def _tex(text: str) -> str:
    """Text in LaTeX: what it would read as a command, a comment or another letter, written out."""
    return "".join(_TEX.get(character, character) for character in text)
