"""Which rows were learned by heart, forgotten, or never believed, from the loss of every row at every look.

The terms:

look              one evaluation of all rows of a set, in eval mode. Looks are counted from 0; each has its step.
best              the look where validation was best. What a model learns of training rows after it does not generalise.
before training   a look at step 0. What a fresh head decides rightly there is luck, so `forgotten` and `suspicious`
                  leave it out.
by heart          a row is known by heart from a step on if its loss stays below a tenth of its loss at the first look.
confidence        of a row at a look, for a classification: exp(-loss), the probability of its label.

A row whose loss is not finite at some look is in no list and in no quantile. The lists are sorted by the number that
each names, equal ones by index, and hold `count` rows at most: none where nothing was found, never a filler.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]

RESAMPLES = 1000
WITHIN = (0.025, 0.975)
CELLS = 1_000_000  # rows of resamples held at once
BY_HEART = 0.1  # of the first loss
HALVED = 0.5
DOUBLED = 2.0
DENIED = 1 / 3  # of the set's median confidence
FAR = 8.0  # distances from the median to the upper quartile
OUTER = 0.95  # quantile


@dataclass(frozen=True, slots=True, eq=False)
class History:
    """A set of N rows at S looks.

    steps [S], rising; losses [S, N], of each row at each look in eval mode, rows in the set's order; right [S, N], for a
    classification: whether the row was decided rightly.
    """

    steps: NDArray[np.integer]
    losses: Array
    right: NDArray[np.bool_] | None = None


@dataclass(frozen=True, slots=True)
class Share:
    """A share, and the 95 % interval about it. NaN where it is not defined."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the set: its loss at the first look, its lowest at any, and at the last.

    since: a step, or None: `memorised` and `suspicious`: known by heart from it on, None if it is not at the last look;
        `forgotten`: the last look at which it was known.
    """

    index: int
    first: float
    lowest: float
    last: float
    since: int | None


def told_apart(train: Array, validation: Array, seed: int = 0) -> Share:
    """How well the loss alone tells a training row from a validation row: 0.5 not at all, 1 without a fault.

    train [N], validation [M]: losses of rows at one look, in eval mode. The value is the area under the ROC curve,
    P(loss of a training row < loss of a validation row) + P(equal) / 2: membership inference by a threshold on the loss
    (Yeom et al. 2018), over all thresholds. It means memorising only if both sets were drawn alike: at the look before
    training it should be 0.5, and what it is there is the sets' own difference.

    The interval is the percentile bootstrap over rows of both sets, 1,000 resamples, seeded. NaN with fewer than two
    rows on a side, where resampling says nothing. Of sets wholly apart it has no width: read that as "near 1".
    NaN losses are left out; infinite ones count. Cost: one sort, and each resample is linear in the rows.
    """
    train, validation = train[~np.isnan(train)], validation[~np.isnan(validation)]
    n, m = len(train), len(validation)
    if not n or not m:
        return Share(math.nan, math.nan, math.nan)
    levels, level = np.unique(np.concatenate([train, validation]), return_inverse=True)
    below, above = level[:n], level[n:]
    value = float(_area(_table(below[None], len(levels)), _table(above[None], len(levels)))[0])
    if min(n, m) < 2:
        return Share(value, math.nan, math.nan)
    generator, at_once = np.random.default_rng(seed), max(1, CELLS // (n + m))
    areas = [
        _area(
            *(_table(side[generator.integers(len(side), size=(k, len(side)))], len(levels)) for side in (below, above))
        )
        for k in (min(at_once, RESAMPLES - start) for start in range(0, RESAMPLES, at_once))
    ]
    low, high = np.quantile(np.concatenate(areas), WITHIN)
    return Share(value, float(low), float(high))


def memorised(history: History, best: int, count: int = 10) -> list[Row]:
    """Training rows learned after there was nothing left to learn that generalises, by the fall of their loss since.

    A row is listed if its last loss is below half of that at `best`, and it was not known already: its loss at `best`
    is at least a tenth of its first. Sorted by the loss at `best` less the last loss, the largest first.
    Empty where `best` is the last look: all that was learned until then may generalise, and a list of what fell since
    the first look would be a list of what was learned at all.
    """
    losses, rows = _finite(history)
    then, last = losses[_look(history, best)], losses[-1]
    chosen = (last < HALVED * then) & (then >= BY_HEART * losses[0])
    return _listed(losses[:, chosen], rows[chosen], (then - last)[chosen], _by_heart(history, rows[chosen]), count)


def forgotten(history: History, count: int = 10) -> list[Row]:
    """Validation rows that were known and no longer are, by the rise of their loss. Looks before training do not count.

    Only rows that were fitted: their lowest loss is at most half of their first, so that a model that flips between
    constant answers forgets nothing.
    With `right`: rows decided rightly at an earlier look and wrongly at the last: "forgetting events" of Toneva et al.
    2019, those that were not made good. since: the last look at which it was right.
    Without: rows whose last loss is at least twice their lowest, and above it by more than the median change of a loss
    from one look to the next, |difference|, over rows and looks: what a loss moves anyway is not forgetting. since: the
    (last) look at which it was lowest.
    Sorted by the last loss less the lowest, the largest first. Empty for a single look.
    """
    losses, rows = _finite(history)
    looks = np.flatnonzero(history.steps > 0)
    if len(looks) < 2 or not len(rows):
        return []
    counted = losses[looks]
    last, lowest = counted[-1], counted.min(0)
    if history.right is None:
        known = counted == lowest
        chosen = (last >= DOUBLED * lowest) & (last - lowest > np.median(np.abs(np.diff(counted, axis=0))))
    else:
        known = history.right[np.ix_(looks, rows)]
        chosen = known.any(0) & ~known[-1]
    chosen = chosen & (lowest <= HALVED * losses[0])
    since = history.steps[looks[_last(known[:, chosen])]]
    return _listed(losses[:, chosen], rows[chosen], (last - lowest)[chosen], since.tolist(), count)


def suspicious(history: History, best: int, count: int = 10) -> list[Row]:
    """Training rows that look mislabelled: the model denies their label while it has learned the others.

    Looked at: the looks after step 0 up to and including `best`. After it a model learns wrong labels by heart, which
    hides them; `since` tells whether and when it did.

    With `right`: rows decided wrongly at `best` and at more than half of these looks, whose mean confidence over them is
    below a third of the set's median: the bottom of "hard-to-learn" in the dataset cartography of Swayamdipta et al.
    2020. A row that the model is only unsure of stays above it.
    Empty unless more than half of the rows are right at `best`. Sorted by the mean confidence, the lowest first.
    Without: rows whose mean loss over these looks is above the set's 95 % quantile, and farther above its median than 8
    times the distance from the median to the upper quartile. By the first alone every set would have its 5 %; the
    second is robust while fewer than a quarter of the rows are wrong, and takes under 1 % of clean squared errors.
    Sorted by the mean loss, the highest first.
    """
    losses, rows = _finite(history)
    looks = np.flatnonzero(history.steps[: _look(history, best) + 1] > 0)
    if not len(looks) or not len(rows):
        return []
    if history.right is None:
        by = losses[looks].mean(0)
        middle, upper, outer = np.quantile(by, [0.5, 0.75, OUTER])
        chosen = (by > outer) & (by - middle > FAR * (upper - middle))
    else:
        right, confidence = history.right[np.ix_(looks, rows)], np.exp(-losses[looks]).mean(0)
        by = -confidence
        chosen = ~right[-1] & (right.mean(0) < 0.5) & (confidence < DENIED * np.median(confidence))
        chosen &= right[-1].mean() > 0.5
    return _listed(losses[:, chosen], rows[chosen], by[chosen], _by_heart(history, rows[chosen]), count)


def _table(drawn: NDArray[np.integer], levels: int) -> NDArray[np.integer]:
    """How often each level was drawn in each resample: [R, n] of level numbers to [R, levels]."""
    start = levels * np.arange(len(drawn))[:, None]
    return np.bincount((drawn + start).ravel(), minlength=levels * len(drawn)).reshape(len(drawn), levels)


def _area(below: NDArray[np.integer], above: NDArray[np.integer]) -> Array:
    """P(below < above) + P(equal) / 2 of each resample, from their tables [R, levels]: Mann and Whitney's U / (n m)."""
    lower = below.cumsum(1) - below / 2  # of each level: rows below it, and half of those on it
    return (lower * above).sum(1) / (below.sum(1) * above.sum(1))


def _finite(history: History) -> tuple[Array, NDArray[np.integer]]:
    """The losses [S, K] of the rows that are finite at all looks, and their indices [K]."""
    rows = np.flatnonzero(np.isfinite(history.losses).all(0))
    return history.losses[:, rows], rows


def _look(history: History, best: int) -> int:
    assert 0 <= best < len(history.steps), f"there is no look {best}, there are {len(history.steps)}"
    return best


def _last(holds: NDArray[np.bool_]) -> NDArray[np.integer]:
    """[S, K] to [K]: the last look at which it holds, for rows where it holds at one or more."""
    return len(holds) - 1 - holds[::-1].argmax(0)


def _by_heart(history: History, rows: NDArray[np.integer]) -> list[int | None]:
    losses = history.losses[:, rows]
    start = _last(losses >= BY_HEART * losses[0]) + 1  # at the first look it holds, as no loss is below 0
    return [int(history.steps[look]) if look < len(losses) else None for look in start]


def _listed(losses: Array, rows: NDArray[np.integer], by: Array, since: Sequence[int | None], count: int) -> list[Row]:
    """The `count` rows with the largest `by`, of losses [S, K], rows [K], by [K], since [K]."""
    first, lowest, last = losses[0], losses.min(0), losses[-1]
    return [
        Row(int(rows[k]), float(first[k]), float(lowest[k]), float(last[k]), since[k])
        for k in np.argsort(-by, kind="stable")[:count]
    ]
