"""What is drawn with the seed: a validation set out of train, and so many rows of a set. Pure numpy.

Draws come from RandomState, whose stream NumPy promises never to change (NEP 19): a split is the same in ten years.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def shares(total: int, weights: np.ndarray) -> np.ndarray:
    """`total` in whole parts in proportion to `weights` [N], by largest remainder: [N] integers of sum `total`."""
    exact = total * weights / weights.sum()
    parts = np.floor(exact).astype(np.int64)
    largest = np.argsort(-(exact - parts), kind="stable")
    parts[largest[: total - parts.sum()]] += 1
    return parts


def draw(count: int, wanted: int, seed: int) -> np.ndarray:
    """`wanted` of the numbers 0..count-1, sorted; all where there are fewer. A larger draw holds the smaller one."""
    return np.sort(np.random.RandomState(seed).permutation(count)[:wanted])


def draw_groups(groups: Sequence[int] | np.ndarray, wanted: int, seed: int) -> np.ndarray:
    """As `draw`, but whole groups: at most `wanted` rows, at least one group. groups: [N], the group of each row."""
    member = np.unique(np.asarray(groups), return_inverse=True)[1]
    order = np.random.RandomState(seed).permutation(member.max() + 1)
    rows = np.cumsum(np.bincount(member)[order])
    taken = order[: max(1, int(np.searchsorted(rows, wanted, side="right")))]
    return np.flatnonzero(np.isin(member, taken))


def hold_out(
    groups: Sequence[int] | np.ndarray, strata: Sequence[int] | np.ndarray, fraction: float, seed: int
) -> np.ndarray:
    """Which rows are validation: [N] booleans, about `fraction` of them true, with the mix of `strata`.

    groups: [N], rows of one group (one text, repeated) stay on one side, so the count can miss by a group's size.
    strata: [N], the class of each row; a group belongs to the stratum of its first row. Every stratum keeps at least
        one group in train, even where the fraction would take all.
    """
    assert 0 < fraction < 1, "a fraction of the rows"
    _, first, member = np.unique(np.asarray(groups), return_index=True, return_inverse=True)
    sizes = np.bincount(member)
    stratum = np.asarray(strata)[first]
    classes, of_group = np.unique(stratum, return_inverse=True)
    rows = np.bincount(of_group, weights=sizes)
    wanted = shares(max(1, round(fraction * len(member))), rows)
    random = np.random.RandomState(seed)
    held = np.zeros(len(sizes), dtype=bool)
    members = np.split(np.argsort(of_group, kind="stable"), np.cumsum(np.bincount(of_group))[:-1])  # of each class
    for index in range(len(classes)):
        candidates = random.permutation(members[index])[1:]
        before = np.cumsum(sizes[candidates]) - sizes[candidates]  # rows held when each group's turn comes
        held[candidates[before < wanted[index]]] = True
    return held[member]
