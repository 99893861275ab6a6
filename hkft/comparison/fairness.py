"""What stands between a table and a fair comparison: sentences, from groups of runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hkft.comparison.choice import Standing
from hkft.comparison.runs import Group, Run, differing
from hkft.comparison.statistics import critical_t

OPTIMISTIC = "selected and reported on the same validation rows: optimistic"
SMALL = 5  # seeds below which the reach of a t test is worth a sentence

# What a fair pair shares, seed by seed: a fraction of train as validation is drawn anew with every seed.
SHARED: dict[str, Callable[[Run], Any]] = {
    "training rows": lambda run: run.data.get("train"),
    "validation rows": lambda run: run.data.get("validation"),
    "number of steps": lambda run: run.summary["total_steps"],
    "test rows": lambda run: run.summary.get("test_rows"),
    "model": lambda run: run.summary["model"],
    "revision of the model": lambda run: (run.environment.get("model") or {}).get("revision"),
    "versions": lambda run: _versions(run),
    "tokenizer": lambda run: run.environment.get("tokenizer"),
    "device, so that their times cannot be compared": lambda run: run.device,
}


def unfair(group: Group, baseline: Group) -> list[str]:
    """Why the two are no fair pair, a sentence each; and the seeds that only one of them has."""
    pair = f"{group.label} and {baseline.label}"
    shared = [seed for seed in group.seeds if seed in baseline.runs]
    sentences = []
    for name, read in SHARED.items():
        seeds = [seed for seed in shared if read(group.runs[seed]) != read(baseline.runs[seed])]
        if seeds:
            found = " and ".join(_show(read(of.runs[seeds[0]])) for of in (group, baseline))
            sentences.append(f"{pair} are no fair pair: other {name} ({_seeds(seeds)}: {found})")
    variant = set(group.settings) if group.method == baseline.method else set()  # what it is there to differ in
    for key in differing([group.first, baseline.first]):
        if not key.startswith("dropout.") and key != "model.name" and key not in variant:
            found = " and ".join(_show(of.first.settings.get(key)) for of in (group, baseline))
            sentences.append(f"{pair} differ in more than dropout: {key} is {found}")
    alone = [(a.label, [seed for seed in a.seeds if seed not in b.runs]) for a, b in _both(group, baseline)]
    only = [f"only {label} has {_seeds(seeds)}" for label, seeds in alone if seeds]
    if only:
        sentences.append(f"{pair} are paired over {len(shared)} seed{'s' * (len(shared) != 1)}: {'; '.join(only)}")
    return sentences


def notes(groups: Mapping[str, Group], standing: Mapping[str, Standing], metric: str, split: str) -> list[str]:
    """How to read the numbers. split: the rows that the main number is of, "test" or "validation"."""
    runs = [run for group in groups.values() for run in group.runs.values()]
    criterion = " or ".join(dict.fromkeys(run.criterion for run in runs))
    chosen = f"is that of the checkpoint with the best validation {criterion}"
    sentences = [
        f"test {metric} {chosen}: chosen on other rows than it is reported on"
        if split == "test"
        else f"best {metric} {chosen}, {OPTIMISTIC}"
    ]
    sentences += _tuning(groups, standing, split)
    bases = {each.baseline for each in standing.values()}
    compared = [label for label, each in standing.items() if each.chosen and each.baseline != label]
    most = max(len(group.runs) for group in groups.values())
    if compared and most == 1:
        sentences.append(f"differences are to {' or '.join(sorted(bases))}; one seed has no p over seeds")
    elif compared:
        corrected = f", Holm-corrected over {len(compared)} comparisons (the intervals are not)" if compared[1:] else ""
        sentences.append(
            f"differences are to {' or '.join(sorted(bases))}, paired by seed, with 95 % intervals; "
            f"p is of the paired t test{corrected}"
        )
    fewest = min(len(group.runs) for group in groups.values())
    if compared and 1 < fewest < SMALL:
        sentences.append(f"with {fewest} seeds a paired t test needs |t| > {critical_t(fewest):.2f}")
    sentences += _rows(groups, split)
    jobs = max(run.environment.get("jobs") or 1 for run in runs)
    if jobs > 1:
        sentences.append(
            f"{jobs} cells ran at a time: their times, and what follows from them, are of a shared machine"
        )
    if any(run.device.startswith("cpu") for run in runs):
        sentences.append("on a CPU peak memory is the process's: within one grid a later run never shows less")
    return sentences


def chosen_by_few(groups: Mapping[str, Group], standing: Mapping[str, Standing]) -> list[str]:
    """A sentence for each choice among settings of which some lack seeds."""
    return [
        f"{label} was chosen by {each.by} seed{'s' * (each.by != 1)}, as not all {each.tried} settings tried have the same"
        for label, each in standing.items()
        if each.chosen and each.tried > 1 and each.by < max(len(groups[other].runs) for other in groups)
    ]


def _tuning(groups: Mapping[str, Group], standing: Mapping[str, Standing], split: str) -> list[str]:
    """How many settings of each method were tried, where that is more than one of any."""
    tried: dict[str, int] = {}
    for label, each in standing.items():
        tried[groups[label].method] = max(each.tried, tried.get(groups[label].method, 1))
    if max(tried.values(), default=1) == 1:
        return []
    budget = ", ".join(f"{method} {count}" for method, count in tried.items())
    told = f"settings tried: {budget}; of each method the one that was best on validation stands for it"
    return [
        told + ("" if split == "test" else ", on the rows that are reported: its number and its p are optimistic too")
    ]


def _rows(groups: Mapping[str, Group], split: str) -> list[str]:
    """Whether the seeds share the rows that are reported."""
    for group in groups.values():
        if len(group.runs) > 1 and split == "test":
            return ["all seeds share the test rows; the interval of the bootstrap tells what other rows would show"]
        if len(group.runs) > 1:
            anew = len({run.data.get("validation") for run in group.runs.values()}) > 1
            return [
                "each seed drew its own rows: the spread is that of rows, initial weights and order together"
                if anew
                else "all seeds share the validation rows: the spread does not tell what other rows would show"
            ]
    return []


def _both(group: Group, baseline: Group) -> list[tuple[Group, Group]]:
    return [(group, baseline), (baseline, group)]


def _versions(run: Run) -> str:
    """Of what computes: other ones may give other numbers."""
    found = run.environment.get("versions") or {}
    return ", ".join(f"{name} {found[name]}" for name in ("hkft", "torch", "transformers", "peft") if name in found)


def _show(value: Any) -> str:
    """A value in a sentence; a fingerprint by its beginning."""
    return value[:8] if isinstance(value, str) and len(value) == 64 else str(value)


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
