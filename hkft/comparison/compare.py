"""Finished runs -> a Comparison: every method against one baseline, paired by seed, with what it cost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hkft.comparison.fairness import notes, unfair
from hkft.comparison.runs import Group, Run, finished, grouped
from hkft.comparison.statistics import Difference, Sample, against, describe
from hkft.diagnostics.gap import LOWER_IS_BETTER, main_metric
from hkft.errors import HkftError, UsageError, nearest
from hkft.folder import jsonable

SCHEMA_VERSION = 1
PLAIN = "none"  # the method that is the baseline where it is there


@dataclass(frozen=True)
class Measure:
    """A number of a run: its key here, its name for people, and where summary.json has it."""

    key: str
    title: str
    place: tuple[str, str, str]
    lower_is_better: bool

    def of(self, summary: Mapping[str, Any]) -> float:
        """NaN where the run has no such number: the correlation of constant predictions, for one."""
        section, part, name = self.place
        value = ((summary.get(section) or {}).get(part) or {}).get(name)
        return math.nan if value is None else float(value)


def measures(metric: str) -> tuple[Measure, ...]:
    """What is compared, the main one first. A gap is validation minus probe: the smaller, the better."""
    lower = metric in LOWER_IS_BETTER
    return (
        Measure("best", f"best {metric}", ("best", "validation", metric), lower),
        Measure("final", f"final {metric}", ("final", "validation", metric), lower),
        Measure("best_loss", "loss at best", ("best", "validation", "loss"), True),
        Measure("final_loss", "final loss", ("final", "validation", "loss"), True),
        Measure("best_gap", "loss gap at best", ("gap", "best", "loss"), True),
        Measure("final_gap", "final loss gap", ("gap", "final", "loss"), True),
    )


@dataclass(frozen=True)
class Score:
    """One measure of one row. difference: to the baseline; None for the baseline itself."""

    values: Mapping[int, float]  # by seed
    sample: Sample
    difference: Difference | None


@dataclass(frozen=True)
class Row:
    """One method with one setting, over its seeds."""

    label: str
    method: str
    settings: Mapping[str, Any]  # those that vary within the method
    seeds: tuple[int, ...]
    runs: tuple[str, ...]  # folders, in the order of the seeds
    scores: Mapping[str, Score]  # by the measure's key
    verdicts: Mapping[str, int]  # how many runs got each
    seconds: Sample  # of training, looks apart
    time_ratio: float | None  # to the baseline's, over the seeds that both have
    samples_per_s: float | None  # mean
    peak_memory_bytes: int | None  # largest


@dataclass(frozen=True)
class Failure:
    """Why a cell has no finished run, and the exit code that `hkft train` would have ended with."""

    error: str
    exit_code: int

    @classmethod
    def of(cls, cause: HkftError) -> Failure:
        return cls(str(cause), cause.exit_code)


@dataclass(frozen=True)
class Comparison:
    """Rows in the order in which the runs were given.

    notes: how to read the numbers. warnings: runs and seeds left out, pairs that are not fair.
    """

    recipe: str
    task: str
    metric: str
    baseline: str  # a row's label
    measures: tuple[Measure, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    failed: Mapping[str, Failure]  # by cell
    curves: tuple[Mapping[str, Any], ...]  # a run each: label, seed, run, points

    def as_dict(self) -> dict[str, Any]:
        """Everything, in JSON's own types: `comparison.json`, and all that a report needs."""
        return jsonable({"schema_version": SCHEMA_VERSION, **asdict(self)})


def compare(
    folders: Sequence[str | Path], baseline: str | None = None, *, failed: Mapping[str, Failure] | None = None
) -> Comparison:
    """Compare the finished runs among `folders`.

    baseline: a row's label, or a method that has one row; None takes `none` if it is there, else the first row. failed:
    those of a grid's cells that have no finished run. Raises UsageError where a folder holds no run, where none is
    finished, where their tasks differ, and for a baseline that is no row.
    """
    runs, left_out = finished(folders)
    task, metric = _common(runs)
    groups, repeated = grouped(runs)
    base = groups[_baseline(groups, baseline)]
    compared = measures(metric)
    scores = {measure.key: _scores(groups, base, measure) for measure in compared}
    pairs = [sentence for group in groups.values() if group is not base for sentence in unfair(group, base)]
    return Comparison(
        recipe=", ".join(dict.fromkeys(run.summary["recipe"] for run in runs)),
        task=task,
        metric=metric,
        baseline=base.label,
        measures=compared,
        rows=tuple(_row(group, base, scores) for group in groups.values()),
        notes=tuple(notes(groups, base, metric)),
        warnings=(*left_out, *repeated, *pairs),
        failed=dict(failed or {}),
        curves=tuple(
            _curve(group.label, group.runs[seed], metric) for group in groups.values() for seed in group.seeds
        ),
    )


def _common(runs: Sequence[Run]) -> tuple[str, str]:
    """The one task of the runs, and the metric that all are told by: the task's main one where they differ in it."""
    tasks = list(dict.fromkeys(run.summary["task"] for run in runs))
    if len(tasks) > 1:
        raise UsageError("runs of different tasks cannot be compared", found=", ".join(tasks), allowed="one task")
    metrics = {run.summary["metric"] for run in runs}
    return tasks[0], metrics.pop() if len(metrics) == 1 else main_metric(tasks[0])


def _baseline(groups: Mapping[str, Group], wanted: str | None) -> str:
    if wanted is None:
        return next((label for label, group in groups.items() if group.method == PLAIN), next(iter(groups)))
    found = [wanted] if wanted in groups else [name for name, group in groups.items() if group.method == wanted]
    if len(found) != 1:
        raise UsageError(
            f"the baseline {wanted!r} is {'several rows' if found else 'none of the rows'}",
            where="--baseline",
            allowed=", ".join(groups),
            hint=None if found else nearest(wanted, groups),
        )
    return found[0]


def _scores(groups: Mapping[str, Group], baseline: Group, measure: Measure) -> dict[str, Score]:
    """One measure of every row, by label."""
    values = {
        label: {seed: measure.of(group.runs[seed].summary) for seed in group.seeds} for label, group in groups.items()
    }
    others = {label: found for label, found in values.items() if label != baseline.label}
    differences = against(others, values[baseline.label], lower_is_better=measure.lower_is_better)
    return {name: Score(found, describe(list(found.values())), differences.get(name)) for name, found in values.items()}


def _row(group: Group, baseline: Group, scores: Mapping[str, Mapping[str, Score]]) -> Row:
    runs = [group.runs[seed] for seed in group.seeds]
    shared = [seed for seed in group.seeds if seed in baseline.runs]
    reference = sum(baseline.runs[seed].seconds for seed in shared)
    return Row(
        label=group.label,
        method=group.method,
        settings=group.settings,
        seeds=group.seeds,
        runs=tuple(str(run.folder) for run in runs),
        scores={key: rows[group.label] for key, rows in scores.items()},
        verdicts=dict(Counter(run.summary["verdict"]["name"] for run in runs).most_common()),
        seconds=describe([run.seconds for run in runs]),
        time_ratio=sum(group.runs[seed].seconds for seed in shared) / reference if reference else None,
        samples_per_s=describe([run.summary.get("train_samples_per_s") or math.nan for run in runs]).mean,
        peak_memory_bytes=max(run.summary.get("peak_memory_bytes") or 0 for run in runs) or None,
    )


def _curve(label: str, run: Run, metric: str) -> dict[str, Any]:
    """The looks of a run, for a plot: loss and metric of both sides."""
    sides, names = ("train_probe", "validation"), ("loss", metric)
    points = [
        {
            "step": look["step"],
            "epoch": look["epoch"],
            **{side: {name: look[side].get(name) for name in names} for side in sides},
        }
        for look in run.curve()
    ]
    return {"label": label, "seed": run.seed, "run": str(run.folder), "points": points}
