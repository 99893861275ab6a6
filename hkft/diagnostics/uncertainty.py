"""How far a number of a look may be off because a set has only so many rows: bootstrap over rows (Efron 1979).

Percentile intervals of 95 %, and the p of a rise. What another seed or another order of training would change is not in
them: that takes runs, see `hkft compare`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hkft.diagnostics.curve import rise, rises

DRAWS = 1_000
FEWEST = 100  # draws, of a set of very many rows: their interval is narrow
NUMBERS = 2_000_000  # drawn at a time
LEVEL = 0.95

Interval = tuple[float, float]


@dataclass(frozen=True)
class Losses:
    """Of each row of a set its loss, [N], summed over its items, [N]: 1, or the learned tokens of a completion."""

    sums: NDArray[np.floating]
    items: NDArray[np.integer]

    @property
    def mean(self) -> float:
        return float(self.sums.sum() / self.items.sum())

    def grouped(self, groups: NDArray[np.integer] | None) -> Losses:
        """Of each group of rows as of one: completions of one prompt are alike, and are drawn together. groups: [N]."""
        if groups is None:
            return self
        member = np.unique(groups, return_inverse=True)[1]
        return Losses(
            np.bincount(member, self.sums).astype(np.float64), np.bincount(member, self.items).astype(np.int64)
        )

    @property
    def each(self) -> NDArray[np.floating]:
        """[N], of a row by item."""
        return self.sums / self.items


def gap_interval(probe: Losses, validation: Losses, seed: int = 0) -> Interval | None:
    """Of the mean loss of validation minus that of the probe, rows of each drawn anew on their own; None below 2 rows."""
    rows = min(len(probe.sums), len(validation.sums))
    if rows < 2:
        return None
    draw, draws = np.random.default_rng(seed), min(_draws(len(probe.sums)), _draws(len(validation.sums)))
    drawn = _means([validation], draws, draw)[0] - _means([probe], draws, draw)[0]
    return _interval(drawn, validation.mean - probe.mean, rows)


def change_interval(before: Losses, after: Losses, seed: int = 0) -> Interval | None:
    """Of the mean loss of a set after minus that before: the same rows at both looks, so they are drawn together."""
    rows = len(before.sums)
    if rows < 2:
        return None
    earlier, later = _means([before, after], _draws(rows), np.random.default_rng(seed))
    return _interval(later - earlier, after.mean - before.mean, rows)


def rise_p(looks: Sequence[Losses], seed: int = 0) -> float | None:
    """How often a set of so many rows would show as large a `curve.rise` although the loss never rises; None below 2 rows.

    One-sided p, bootstrap under the null: the curve that only falls and fits best (isotonic regression), and about it what
    drawing the rows anew does to the measured one, all looks together. The lowest look is chosen again in every draw, as
    it was in the curve: the lowest of many is low by luck.
    """
    from scipy.optimize import isotonic_regression

    rows = len(looks[0].sums)
    if rows < 2:
        return None
    measured = np.array([look.mean for look in looks])
    drawn = _means(looks, _draws(rows), np.random.default_rng(seed)).T
    level = isotonic_regression(measured, increasing=False).x
    risen = rises(level + _wider(rows) * (drawn - measured))
    return float((1 + (risen >= rise(measured)).sum()) / (1 + len(risen)))


def _draws(rows: int) -> int:
    return int(np.clip(10 * NUMBERS // max(rows, 1), FEWEST, DRAWS))


def _means(looks: Sequence[Losses], draws: int, draw: np.random.Generator) -> NDArray[np.floating]:
    """Of each look the mean loss over rows drawn with replacement, [looks, draws]; the same rows for all looks."""
    rows = len(looks[0].sums)
    size = max(1, NUMBERS // rows)
    sums, items = (np.stack([getattr(look, name) for look in looks]).astype(np.float64) for name in ("sums", "items"))
    means = []
    for start in range(0, draws, size):
        chosen = draw.integers(0, rows, (min(size, draws - start), rows), dtype=np.int32)
        times = np.stack([np.bincount(each, minlength=rows) for each in chosen], axis=1).astype(np.float64)
        means.append((sums @ times) / (items @ times))
    return np.concatenate(means, axis=1)


def _interval(drawn: NDArray[np.floating], measured: float, rows: int) -> Interval:
    """The percentiles, set apart from what was measured by `_wider`."""
    share = (1 + LEVEL) / 2
    low, high = measured + _wider(rows) * (np.quantile(drawn, [1 - share, share]) - measured)
    return float(low), float(high)


def _wider(rows: int) -> float:
    """As Student's t lies farther out than the normal: few rows vary too little when they are drawn again."""
    from scipy.stats import norm, t

    share = (1 + LEVEL) / 2
    return float(t.ppf(share, rows - 1) / norm.ppf(share) * math.sqrt(rows / (rows - 1)))
