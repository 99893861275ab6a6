"""How far a number of a look may be off because a set has only so many rows: bootstrap over rows.

Percentile intervals (Efron 1979) of 95 %. What another seed or another order of training would change is not in them:
that takes runs, see `hkft compare`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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


def _draws(rows: int) -> int:
    return int(np.clip(10 * NUMBERS // max(rows, 1), FEWEST, DRAWS))


def _means(looks: list[Losses], draws: int, draw: np.random.Generator) -> list[NDArray[np.floating]]:
    """Of each look the mean loss over rows drawn with replacement, [draws]; the same rows for all looks."""
    rows = len(looks[0].sums)
    size = max(1, NUMBERS // rows)
    means: list[list[NDArray[np.floating]]] = [[] for _ in looks]
    for start in range(0, draws, size):
        chosen = draw.integers(0, rows, (min(size, draws - start), rows), dtype=np.int32)
        for found, look in zip(means, looks, strict=True):
            found.append(look.sums[chosen].sum(1) / look.items[chosen].sum(1))
    return [np.concatenate(found) for found in means]


def _interval(drawn: NDArray[np.floating], measured: float, rows: int) -> Interval:
    """The percentiles, set apart from what was measured as Student's t is from the normal: few rows vary too little."""
    from scipy.stats import norm, t

    share = (1 + LEVEL) / 2
    wider = t.ppf(share, rows - 1) / norm.ppf(share) * math.sqrt(rows / (rows - 1))
    low, high = measured + wider * (np.quantile(drawn, [1 - share, share]) - measured)
    return float(low), float(high)
