"""Which groups stand for a method, and which baseline each is compared with.

tuned     keys of `dropout` that vary within a method (its rate, its weight): one value is chosen, by validation, and
          stands for the method. The others were tried; what they give on reported rows is no result
facets    other keys that vary within several methods (a rank, a number of rows): methods are compared at equal values
controls  other keys that vary within one method (its weight decay): a row of its own, compared with the baseline
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
    """Where a group stands. tried: how many settings of its method it was chosen from. baseline: a group's label."""

    facet: Mapping[str, Any]
    tried: int
    chosen: bool
    baseline: str


def standings(groups: Mapping[str, Group], wanted: str | None) -> dict[str, Standing]:
    """Each group's, by label. wanted: the baseline, a label or a method; None: `none` where it is there, else the first.

    Raises UsageError for a baseline that is none of the groups, or several of them.
    """
    facets = _facets(groups)
    families: dict[tuple[str, str], list[Group]] = {}
    for group in groups.values():
        families.setdefault((group.method, repr(_apart(group))), []).append(group)
    chosen = {key: _best(members) for key, members in families.items()}
    base = _baseline(groups, facets, wanted, [group.label for group in chosen.values()])
    found = {}
    for members in families.values():
        for group in members:
            facet = {key: group.settings[key] for key in facets if key in group.settings}
            found[group.label] = Standing(
                facet=facet,
                tried=len(members),
                chosen=any(group is each for each in chosen.values()),
                baseline=_at(facet, base, [chosen[key] for key in chosen if key[0] == base.method], facets).label,
            )
    return found


def _facets(groups: Mapping[str, Group]) -> list[str]:
    """Keys that take several values within several methods."""
    methods: dict[str, set[str]] = {}
    for group in groups.values():
        for key in group.settings:
            if not key.startswith("dropout."):
                methods.setdefault(key, set()).add(group.method)
    return [key for key, of in methods.items() if len(of) > 1]


def _apart(group: Group) -> list[tuple[str, Any]]:
    """The settings of a group that are not tuned."""
    return [(key, value) for key, value in group.settings.items() if key not in TUNED]


def _best(members: Sequence[Group]) -> Group:
    """The one whose runs were best on validation, by the number that chose their checkpoints; over seeds that all have."""
    if len(members) == 1:
        return members[0]
    shared = set.intersection(*(set(group.runs) for group in members)) or set(members[0].runs)
    lower = members[0].first.criterion in LOWER_IS_BETTER

    def of(group: Group) -> float:
        values = [_selected(run.summary, run.criterion) for seed, run in group.runs.items() if seed in shared]
        known = [value for value in values if math.isfinite(value)]
        return (fmean(known) if known else math.inf) * (1 if lower or not known else -1)

    return min(members, key=of)


def _selected(summary: Mapping[str, Any], criterion: str) -> float:
    value = ((summary.get("best") or {}).get("validation") or {}).get(criterion)
    return math.nan if value is None else float(value)


def _baseline(groups: Mapping[str, Group], facets: Sequence[str], wanted: str | None, chosen: Sequence[str]) -> Group:
    """One group of the baseline; where there are facets, `_at` finds those of the others."""
    if wanted is not None and wanted in groups:
        return groups[wanted]
    method = wanted or (
        PLAIN if any(g.method == PLAIN for g in groups.values()) else next(iter(groups.values())).method
    )
    found = [label for label in chosen if groups[label].method == method]
    plain = [label for label in found if not set(groups[label].settings) - set(facets) or wanted is None]
    if not found or (wanted is not None and len(plain or found) > 1 and not facets):
        raise UsageError(
            f"the baseline {wanted!r} is {'several rows' if found else 'none of the rows'}",
            where="--baseline",
            allowed=", ".join(groups),
            hint=None if found else nearest(str(wanted), groups),
        )
    return groups[min(plain or found, key=len)]  # the one with the fewest settings of its own


def _at(facet: Mapping[str, Any], base: Group, candidates: Sequence[Group], facets: Sequence[str]) -> Group:
    """The baseline's group with these values of the facets, and its other settings; the baseline where there is none."""

    def rest(group: Group) -> list[tuple[str, Any]]:
        return [(key, value) for key, value in _apart(group) if key not in facets]

    same = [
        group
        for group in candidates
        if rest(group) == rest(base) and all(group.settings.get(key) == value for key, value in facet.items())
    ]
    return same[0] if same and facet else base
