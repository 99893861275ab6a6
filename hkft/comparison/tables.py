"""A comparison as text: rows for a screen, sentences, Markdown, LaTeX, CSV, JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hkft.comparison.compare import Comparison, Row, Score
from hkft.folder import write_text

NOTHING = "-"


@dataclass(frozen=True)
class Column:
    """A column of the tables for people. right: its cells are numbers."""

    title: str
    cell: Callable[[Row], str]
    right: bool = True


def columns(comparison: Comparison) -> list[Column]:
    """What the tables for people show, in this order: the words last, as they are the longest."""
    titles = {measure.key: measure.title for measure in comparison.measures}
    return [
        Column("method", lambda row: row.label, right=False),
        Column("seeds", lambda row: str(len(row.seeds))),
        Column(titles["best"], lambda row: spread(row.scores["best"], 4)),
        Column("median", lambda row: number(row.scores["best"].sample.median, 4)),
        Column(titles["final"], lambda row: spread(row.scores["final"], 4)),
        Column(titles["final_loss"], lambda row: spread(row.scores["final_loss"], 3)),
        Column(titles["best_gap"], lambda row: spread(row.scores["best_gap"], 3)),
        Column(titles["final_gap"], lambda row: spread(row.scores["final_gap"], 3)),
        Column("time", lambda row: NOTHING if row.time_ratio is None else f"{row.time_ratio:.2f} x"),
        Column("memory", lambda row: memory(row.peak_memory_bytes)),
        Column("verdicts", lambda row: counted(row.verdicts), right=False),
        Column(f"{titles['best']} against {comparison.baseline}", lambda row: words(row.scores["best"]), right=False),
    ]


NARROW = ("method", "seeds", "best", "final_loss", "final_gap", "time")  # what fits 80 columns


def narrow(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Titles and cells of a table for a terminal; what does not fit there is in `sentences`."""
    titles = {measure.key: measure.title for measure in comparison.measures}
    shown = [titles.get(name, name) for name in NARROW]
    chosen = [column for column in columns(comparison) if column.title in shown]
    return [column.title for column in chosen], [[column.cell(row) for column in chosen] for row in comparison.rows]


def sentences(comparison: Comparison) -> list[str]:
    """What may be said of each method against the baseline: the main measure, then the loss and the gap at the end."""
    titles = {measure.key: measure.title for measure in comparison.measures}
    said = []
    for key in ("best", "final_loss", "final_gap"):
        for row in comparison.rows:
            if row.label != comparison.baseline:
                against = f"{titles[key]}, {row.label} against {comparison.baseline}"
                said.append(f"{against}: {words(row.scores[key])}{_evidence(row.scores[key])}")
    return said


def markdown(comparison: Comparison) -> str:
    """The whole comparison for a README or an issue."""
    shown = columns(comparison)
    lines = [
        f"# {_heading(comparison)}",
        "",
        _piped([column.title for column in shown]),
        _piped(["---:" if column.right else "---" for column in shown]),
        *(_piped([column.cell(row) for column in shown]) for row in comparison.rows),
    ]
    parts = {
        "In words": sentences(comparison),
        "Warnings": warned(comparison),
        "How to read it": comparison.notes,
    }
    for title, entries in parts.items():
        if entries:
            lines += ["", f"## {title}", "", *(f"- {entry}" for entry in entries)]
    return "\n".join(lines) + "\n"


def latex(comparison: Comparison) -> str:
    r"""A `table` for a paper that has \usepackage{booktabs}. The notes are in its caption."""
    shown = [column for column in columns(comparison) if column.title != "verdicts"]
    rows = [[_tex(column.cell(row)) for column in shown] for row in comparison.rows]
    caption = ". ".join([_heading(comparison), *comparison.notes]) + "."
    lines = [
        *(f"% {warning}" for warning in warned(comparison)),
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{{_tex(caption)}}}",
        rf"  \begin{{tabular}}{{{''.join('r' if column.right else 'l' for column in shown)}}}",
        r"    \toprule",
        f"    {' & '.join(_tex(column.title) for column in shown)} \\\\",
        r"    \midrule",
        *(f"    {' & '.join(row)} \\\\" for row in rows),
        r"    \bottomrule",
        r"  \end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def comma_separated(comparison: Comparison) -> str:
    """A line per row and measure, unrounded, with empty cells where there is no number: for a spreadsheet or pandas."""
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    sample = ("n", "mean", "std", "median", "low", "high")
    difference = ("n", "mean", "std", "low", "high", "p", "p_holm", "needed", "text")
    costs = ("time_ratio", "samples_per_s", "peak_memory_bytes")
    out.writerow(["row", "baseline", "measure", *sample, *(f"difference_{name}" for name in difference), *costs])
    for row in comparison.rows:
        for measure in comparison.measures:
            score = row.scores[measure.key]
            numbers = [getattr(score.sample, name) for name in sample]
            against = [getattr(score.difference, name, None) for name in difference]
            cost = [getattr(row, name) for name in costs]
            out.writerow([row.label, comparison.baseline, measure.title, *numbers, *against, *cost])
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
    sample = score.sample
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
    """`; +0.0030 (-0.0100 to +0.0160), p = 0.43`, as far as there is any."""
    found = score.difference
    if found is None or found.mean is None:
        return ""
    interval = "" if found.low is None else f" ({found.low:+.4f} to {found.high:+.4f})"
    p = "" if found.p_holm is None else ", p < 0.001" if found.p_holm < 0.001 else f", p = {found.p_holm:.2g}"
    return f"; {found.mean:+.4f}{interval}{p}"


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
