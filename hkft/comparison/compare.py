"""Finished runs -> a Comparison: every method against its baseline, paired by seed, with what it cost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hkft.comparison import paper
from hkft.comparison.bootstrap import Bootstrap, Pair, bootstrap
from hkft.comparison.choice import Standing, standings
from hkft.comparison.examples import Examples
from hkft.comparison.fairness import chosen_by_few, notes, unfair
from hkft.comparison.foreign import Foreign, told_apart
from hkft.comparison.runs import Group, Run, finished, grouped, names_beside
from hkft.comparison.statistics import Difference, McNemar, Sample, describe, mcnemar, of_pairs
from hkft.diagnostics.gap import LOWER_IS_BETTER, main_metric
from hkft.errors import HkftError, UsageError
from hkft.folder import jsonable

SCHEMA_VERSION = 2
BESIDE = "test_as_paper"  # the key of a test metric that is compared since the paper reports it
NO_WORD = "not chosen: another value of this method did better on validation"


@dataclass(frozen=True)
class Measure:
    """A number of a run: its key here, its name for people, and where summary.json has it."""

    key: str
    title: str
    place: tuple[str, ...]
    lower_is_better: bool

    def of(self, summary: Mapping[str, Any]) -> float:
        """NaN where the run has no such number: the correlation of constant predictions, for one."""
        value: Any = summary
        for part in self.place:
            value = (value or {}).get(part)
        return math.nan if value is None else float(value)

    @property
    def split(self) -> str:
        """The rows it was measured on."""
        return "test" if self.place[0] == "test" else "validation"


def measures(metric: str, tested: bool, beside: str | None = None) -> tuple[Measure, ...]:
    """What is compared, the main one first. A gap is validation minus probe: the smaller, the better.

    tested: every run was looked at on test rows, by the checkpoint that validation chose. beside: another metric of theirs,
    that the paper reports.
    """
    lower = metric in LOWER_IS_BETTER
    test = [
        Measure("test", f"test {metric}", ("test", metric), lower),
        Measure("test_loss", "test loss", ("test", "loss"), True),
    ]
    if beside:
        test.insert(1, Measure(BESIDE, f"test {beside}", ("test", beside), beside in LOWER_IS_BETTER))
    return (
        *(test if tested else ()),
        Measure("best", f"{'validation' if tested else 'best'} {metric}", ("best", "validation", metric), lower),
        Measure("final", f"final {metric}", ("final", "validation", metric), lower),
        Measure("best_loss", "loss at best", ("best", "validation", "loss"), True),
        Measure("final_loss", "final loss", ("final", "validation", "loss"), True),
        Measure("best_gap", "loss gap at best", ("gap", "best", "loss"), True),
        Measure("final_gap", "final loss gap", ("gap", "final", "loss"), True),
    )


@dataclass(frozen=True)
class Score:
    """One measure of one row. difference: to the baseline; None for the baseline itself.

    bootstrap, mcnemar: of the main measure, from the predictions on single rows, where they are kept and each has a share in
    it (see `examples`); McNemar's for single runs.
    """

    values: Mapping[int, float]  # by seed
    sample: Sample
    difference: Difference | None
    bootstrap: Bootstrap | None = None
    mcnemar: McNemar | None = None


@dataclass(frozen=True)
class Row:
    """One method with one setting, over its seeds.

    facet, tried, chosen, baseline: see `choice`. equal_time: the metric on validation, at the best look within the time that
    the baseline took. front: no other row is as good and as fast (Pareto). single_pass: of a row with a consistency loss
    the one without it, and the difference to it. paper: what the paper reports.
    """

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
    tokens_per_s: float | None  # mean
    peak_memory_bytes: int | None  # largest
    passes: int
    facet: Mapping[str, Any]
    tried: int
    chosen: bool
    baseline: str
    equal_time: Sample
    front: bool = False
    single_pass: tuple[str, Difference] | None = None
    paper: float | None = None


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

    main: the key of the measure that words are about. notes: how to read the numbers. warnings: runs and seeds left out,
    pairs that are not fair. paper: the paper's table and column beside ours. foreign: curves of other tools.
    """

    recipe: str
    task: str
    metric: str
    main: str
    baseline: str  # a row's label
    measures: tuple[Measure, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    failed: Mapping[str, Failure]  # by cell
    curves: tuple[Mapping[str, Any], ...]  # a run each: label, seed, run, points
    paper: str | None = None
    foreign: tuple[Foreign, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Everything, in JSON's own types: `comparison.json`, and all that a report needs."""
        return jsonable({"schema_version": SCHEMA_VERSION, **asdict(self)})

    @property
    def measure(self) -> Measure:
        """The one that words are about."""
        return next(measure for measure in self.measures if measure.key == self.main)

    @property
    def compared(self) -> tuple[Row, ...]:
        """The rows that stand for their methods: the chosen ones."""
        return tuple(row for row in self.rows if row.chosen)


def compare(
    folders: Sequence[str | Path],
    baseline: str | None = None,
    *,
    failed: Mapping[str, Failure] | None = None,
    paper_cell: str | None = None,
    names: Mapping[Path, str] | None = None,
) -> Comparison:
    """Compare the finished runs among `folders`; curves of other tools are shown beside them.

    baseline: a row's label, or a method; None takes `none` if it is there, else the first. failed: those of a grid's cells
    that have no finished run. paper_cell: see `paper`. names: of rows, by the folders of their runs;
    None: what the grids called them that ran them. Raises UsageError where a folder holds no run, where none is finished,
    where their tasks differ, and for a baseline that is no row.
    """
    own, foreign = told_apart(folders)
    runs, left_out = finished(own)
    task, metric = _common(runs)
    groups, repeated = grouped(runs, names or names_beside(own))
    standing = standings(groups, baseline)
    tested = [bool(run.summary.get("test")) for run in runs]
    reported = paper.cell(paper_cell).metric if paper_cell else metric
    if reported != metric and not all(reported in (run.summary.get("test") or {}) for run in runs):
        left_out.append(
            f"the paper's numbers are left out: they are of test {reported}, which not every run was scored by"
        )
        paper_cell = None
    compared = measures(metric, all(tested), reported if paper_cell and reported != metric else None)
    if any(tested) and not all(tested):
        lacking = [str(run.folder) for run in runs if not run.summary.get("test")]
        left_out.append(
            f"validation is compared, as test rows were not looked at in {', '.join(lacking)}: hkft eval RUN --split test"
        )
    scores = {
        measure.key: _scores(groups, standing, measure, metric if n == 0 else None)
        for n, measure in enumerate(compared)
    }
    rows = [
        _row(group, groups[standing[label].baseline], standing[label], scores, compared[0])
        for label, group in groups.items()
    ]
    base = next(row.baseline for row in rows)
    pairs = [
        sentence
        for label, group in groups.items()
        if standing[label].baseline != label and standing[label].chosen
        for sentence in unfair(group, groups[standing[label].baseline])
    ]
    return Comparison(
        recipe=", ".join(dict.fromkeys(run.summary["recipe"] for run in runs)),
        task=task,
        metric=metric,
        main=compared[0].key,
        baseline=base,
        measures=compared,
        rows=tuple(_finished(rows, groups, compared[0], paper_cell)),
        notes=tuple(notes(groups, standing, metric, compared[0].split)),
        warnings=(*left_out, *repeated, *chosen_by_few(groups, standing), *pairs),
        failed=dict(failed or {}),
        curves=tuple(
            _curve(group.label, group.runs[seed], metric) for group in groups.values() for seed in group.seeds
        ),
        paper=paper_cell,
        foreign=tuple(foreign),
    )


def _common(runs: Sequence[Run]) -> tuple[str, str]:
    """The one task of the runs, and the metric that all are told by: the task's main one where they differ in it."""
    tasks = list(dict.fromkeys(run.summary["task"] for run in runs))
    if len(tasks) > 1:
        raise UsageError("runs of different tasks cannot be compared", found=", ".join(tasks), allowed="one task")
    metrics = {run.summary["metric"] for run in runs}
    return tasks[0], metrics.pop() if len(metrics) == 1 else main_metric(tasks[0])


def _scores(
    groups: Mapping[str, Group], standing: Mapping[str, Standing], measure: Measure, metric: str | None
) -> dict[str, Score]:
    """One measure of every row, by label. metric: of the main measure, whose single rows are compared too."""
    values = {
        label: {seed: measure.of(group.runs[seed].summary) for seed in group.seeds} for label, group in groups.items()
    }
    others = {
        label: (found, values[standing[label].baseline])
        for label, found in values.items()
        if standing[label].baseline != label
    }
    tested = {label: pair for label, pair in others.items() if standing[label].chosen}
    lower = measure.lower_is_better
    differences = of_pairs(tested, lower_is_better=lower)
    for label in others.keys() - tested.keys():
        (one,) = of_pairs({label: others[label]}, lower_is_better=lower).values()
        differences[label] = replace(one, p=None, p_holm=None, needed=None, word="cannot tell", text=NO_WORD)
    found = {}
    for label, each in values.items():
        of_rows = (None, None)
        if metric and label in tested:
            of_rows = _by_example(groups[label], groups[standing[label].baseline], measure.split, metric)
        found[label] = Score(each, describe(list(each.values())), differences.get(label), *of_rows)
    return found


def _by_example(group: Group, baseline: Group, split: str, metric: str) -> tuple[Bootstrap | None, McNemar | None]:
    """What the predictions on single rows tell of the difference; None where they are not kept, or of other rows."""
    pairs: dict[int, tuple[Examples, Examples]] = {}
    seeds = [seed for seed in group.seeds if seed in baseline.runs]
    for seed in seeds:
        one, other = (of.runs[seed].examples(split, metric) for of in (group, baseline))
        if one is None or other is None or one.ids != other.ids:
            return None, None
        pairs[seed] = one, other
    if not pairs:
        return None, None
    rows = [one.ids for one, _ in pairs.values()]
    drawn = bootstrap(
        {seed: Pair(one.sums, other.sums, one.weights) for seed, (one, other) in pairs.items()},
        crossed=all(ids == rows[0] for ids in rows),
    )
    if metric != "accuracy" or len(pairs) > 1:
        return drawn, None
    one, other = pairs[seeds[0]]
    return drawn, mcnemar(one.values, other.values)


def _row(
    group: Group, baseline: Group, standing: Standing, scores: Mapping[str, Mapping[str, Score]], main: Measure
) -> Row:
    runs = [group.runs[seed] for seed in group.seeds]
    shared = [seed for seed in group.seeds if seed in baseline.runs]
    reference = sum(baseline.runs[seed].seconds for seed in shared)

    def mean(key: str) -> float | None:
        return describe([run.summary.get(key) or math.nan for run in runs]).mean

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
        samples_per_s=mean("train_samples_per_s"),
        tokens_per_s=mean("train_tokens_per_s"),
        peak_memory_bytes=max(run.summary.get("peak_memory_bytes") or 0 for run in runs) or None,
        passes=runs[0].passes,
        facet=standing.facet,
        tried=standing.tried,
        chosen=standing.chosen,
        baseline=standing.baseline,
        equal_time=describe(
            [_within(group.runs[seed], baseline.runs[seed].seconds, main.place[-1]) for seed in shared]
        ),
    )


def _within(run: Run, seconds: float, metric: str) -> float:
    """The metric on validation at the best look of the first `seconds` of training, by the run's own criterion.

    Steps are taken to be of one length.
    """
    total = run.summary.get("steps") or 1
    looks = [look for look in run.curve() if 0 < look["step"] <= total * seconds / max(run.seconds, 1e-9) * (1 + 1e-9)]
    known = [look["validation"] for look in looks if look["validation"].get(run.criterion) is not None]
    if not known:
        return math.nan
    sign = 1 if run.criterion in LOWER_IS_BETTER else -1
    value = min(known, key=lambda seen: sign * seen[run.criterion]).get(metric)
    return math.nan if value is None else value


def _finished(rows: Sequence[Row], groups: Mapping[str, Group], main: Measure, cell: str | None) -> list[Row]:
    """The rows with what only all of them together tell."""
    found = []
    for row in rows:
        sibling = _single_pass(row, rows, groups)
        found.append(
            replace(
                row,
                front=row.chosen and not any(_dominates(other, row, main) for other in rows if other.chosen),
                single_pass=sibling and (sibling.label, _difference(row, sibling, main)),
                paper=paper.value(cell, row.method) if cell and _is_the_method(row) else None,
            )
        )
    return found


def _is_the_method(row: Row) -> bool:
    """Whether a row is its method as the recipe has it, at whatever rate: no variant, and at no value of a facet."""
    tuned = row.label.startswith(f"{row.method} ") and row.tried > 1
    return not row.facet and (row.label == row.method or tuned)


def _dominates(other: Row, row: Row, main: Measure) -> bool:
    """Whether another row of the same facet is as good and as fast, and one of the two more so."""
    pairs = [(each.scores[main.key].sample.mean, each.time_ratio) for each in (other, row)]
    if other is row or other.facet != row.facet or any(None in pair for pair in pairs):
        return False
    sign = 1 if main.lower_is_better else -1
    (value, time), (own, own_time) = pairs
    worse, slower = sign * (value - own), time - own_time  # type: ignore[operator]
    return worse <= 0 and slower <= 0 and (worse < 0 or slower < 0)


def _single_pass(row: Row, rows: Sequence[Row], groups: Mapping[str, Group]) -> Row | None:
    """Of a row with a consistency loss, the row that drops the same and has none."""
    if row.passes == 1 or not row.chosen:
        return None
    sites = groups[row.label].first.sites
    return next(
        (
            other
            for other in rows
            if other.passes == 1
            and other.chosen
            and other.facet == row.facet
            and groups[other.label].first.sites == sites
        ),
        None,
    )


def _difference(row: Row, other: Row, measure: Measure) -> Difference:
    pair = (row.scores[measure.key].values, other.scores[measure.key].values)
    return of_pairs({row.label: pair}, lower_is_better=measure.lower_is_better)[row.label]


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
