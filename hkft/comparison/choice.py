"""Which groups stand for a method, and which baseline each is compared with.

tuned     a method's rate and the weight of its consistency, where they vary: one value is chosen, by validation, and
          stands for the method. The others were tried; what they give on reported rows is no result
facets    keys outside of `dropout` that vary within several methods (a rank, a number of rows): methods are compared at
          equal values
variants  any other key that varies within a method (its weight decay, its sites): a row of its own
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from hkft.comparison.runs import Group
from hkft.diagnostics.gap import LOWER_IS_BETTER
from hkft.errors import UsageError, nearest

PLAIN = "none"  # the method that is the baseline where it is there
TUNED = ("dropout.rate", "dropout.weight")


@dataclass(frozen=True)
class Standing:
    """Where a group stands. tried: how many settings of its method it was chosen from, by how many seeds that all of them
    have (by). baseline: a group's label.
    """

    facet: Mapping[str, Any]
    tried: int
    by: int
    chosen: bool
    baseline: str


def standings(groups: Mapping[str, Group], wanted: str | None) -> dict[str, Standing]:
    """Each group's, by label. wanted: the baseline, a label or a method; None: `none` where it is there, else the first.

    Raises UsageError for a baseline that is none of the groups.
    """
    facets = _facets(groups)
    families: dict[str, list[Group]] = {}
    for group in groups.values():
        families.setdefault(f"{group.method} {_settings(group, TUNED)}", []).append(group)
    chosen = {key: _best(members) for key, members in families.items()}
    base = _baseline(groups, wanted, list(chosen.values()))
    chosen = {key: base if base in members else chosen[key] for key, members in families.items()}
    found = {}
    for key, members in families.items():
        for group in members:
            facet = {name: group.first.settings.get(name) for name in facets}
            found[group.label] = Standing(
                facet,
                len(members),
                len(_shared(members)),
                group is chosen[key],
                _at(facet, base, chosen.values()).label,
            )
    return {label: found[label] for label in groups}


def no_baseline(wanted: str, rows: Iterable[str]) -> UsageError:
    rows = list(rows)
    return UsageError(
        f"the baseline {wanted!r} is none of the rows",
        where="--baseline",
        allowed=", ".join(rows),
        hint=nearest(wanted, rows),
    )


def _facets(groups: Mapping[str, Group]) -> list[str]:
    """Keys outside of dropout that take several values within several methods."""
    methods: dict[str, set[str]] = {}
    for group in groups.values():
        for key in group.settings:
            if not key.startswith("dropout."):
                methods.setdefault(key, set()).add(group.method)
    return [key for key, of in methods.items() if len(of) > 1]


def _settings(group: Group, without: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in group.first.settings.items() if not key.startswith(tuple(without))}


def _best(members: Sequence[Group]) -> Group:
    """The one whose runs were best on validation, by the number that chose their checkpoints.

    Over the seeds that all have, where there are any. A run without that number counts as the worst there is.
    """
    shared = _shared(members)
    sign = 1 if members[0].first.criterion in LOWER_IS_BETTER else -1

    def of(group: Group) -> float:
        runs = [run for seed, run in group.runs.items() if seed in shared or not shared]
        values = [sign * _selected(run.summary, run.criterion) for run in runs]
        return fmean(values) if all(map(math.isfinite, values)) else math.inf

    return min(members, key=of)


def _shared(members: Sequence[Group]) -> set[int]:
    return set.intersection(*(set(group.runs) for group in members))


def _selected(summary: Mapping[str, Any], criterion: str) -> float:
    value = ((summary.get("best") or {}).get("validation") or {}).get(criterion)
    return math.nan if value is None else float(value)


def _baseline(groups: Mapping[str, Group], wanted: str | None, chosen: Sequence[Group]) -> Group:
    """The group of that label; else of that method the one that most groups of other methods agree with, dropout aside."""
    if wanted is not None and wanted in groups:
        return groups[wanted]
    methods = [group.method for group in groups.values()]
    method = wanted or (PLAIN if PLAIN in methods else methods[0])
    found = [group for group in chosen if group.method == method]
    if not found:
        raise no_baseline(str(wanted), groups)
    others = [_settings(group, ("dropout.",)) for group in chosen if group.method != method]
    return max(found, key=lambda group: others.count(_settings(group, ("dropout.",))))  # the first of equals


def _at(facet: Mapping[str, Any], base: Group, chosen: Iterable[Group]) -> Group:
    """The baseline with these values of the facets; the baseline itself where it was not run with them."""
    wanted = {**_settings(base, TUNED), **facet}
    same = [group for group in chosen if group.method == base.method and _settings(group, TUNED) == wanted]
    return base if base in same or not same else same[0]
