"""The difference of two methods over seeds *and* examples: both are drawn again. Numbers only; numpy draws, scipy's Student t.

What is asked of the paired t test of `statistics` is: another seed, the same test set. What is asked here is: another seed
and other examples of the same kind (Dror et al. 2018, "The hitchhiker's guide to testing statistical significance in
NLP"). Of n seeds with N examples each:

    d[s, i]     method - baseline of seed s on example i; w[s, i] its items (1, or the tokens of a completion)
    measured    mean over s of m[s] = sum_i d[s, i] / sum_i w[s, i]
    drawn       the same of n seeds and N examples drawn with replacement (Efron & Tibshirani 1993, ch. 6 and 13), DRAWS times
    crossed     the examples are the same for all seeds (a test set): one draw of examples for all seeds, "pigeonhole
                bootstrap" (Owen 2007). Nested: each seed has its own examples (validation drawn anew), and its own draw.
                Either way a seed that is drawn twice brings the same draw of examples twice

The percentiles of those draws alone mislead: few seeds vary too little when they are drawn again, and drawing both ways
counts the residual, what is left of a number once its seed and its example are accounted for, about three times over. So the draws give the shape, and the spread is set to what n seeds and N examples are known to have:

    variance    nested:   V = A, A = var_s(m[s]) / n, in which the examples of a seed already are
                crossed:  V = A + B, B = max(0, var_i(mean_s u[s, i]) - E) / N: that of the examples, which all seeds share
                          and the spread between seeds therefore lacks. u[s, i] = m[s] + (d[s, i] - m[s] w[s, i]) / mean_i w:
                          d itself where w = 1, else its linearisation. E = what is left of u once its seed's and its
                          example's mean are taken out, squared, / ((n - 1) (N - 1) n)
                one seed: V = var_i(u[i]) / N. Examples alone, and what another seed would do is not in it
    tails       z = (drawn - measured) / std(drawn) -> measured + sqrt(V) (A t_(n-1)(z) + B t_(N-1)(z)) / V, where t_k(z)
                is Student's quantile at the normal's probability of z (weights of Cochran & Cox 1950)
    interval    2.5 and 97.5 percentiles of that
    p           two-sided: 2 (1 + draws beyond 0) / (1 + draws) of the smaller tail, at most 1. Never below 2 / (1 + draws)

Widening by t / z * sqrt(n / (n - 1)) with n seeds, as `diagnostics.uncertainty` does for rows, was measured and left: with
5 seeds and 400 shared examples it put p below 0.05 in 0.0 to 3.7 of 100 comparisons without a true difference, in five of
seven cases never. What is here, lowest and highest of 7 mixtures of seed, example and residual effects (nested: 5), normal
and 0/1, N = 400, 500 comparisons each:

    n seeds                      2             3             5             10
    p < 0.05, crossed, %         1.2 to 6.0    3.0 to 5.6    2.4 to 4.0    5.0 to 5.8
    p < 0.05, nested, %          2.0 to 4.8    1.8 to 5.6    3.6 to 5.4    4.8 to 6.4

One seed: 4.8 to 5.6 % where seeds do nothing. Where they do it is too often, by as much as they do: 17 % in theory where
another seed changes the difference as much as other examples would.

No interval and no p where there is none to give (None): an undefined value (NaN; then no mean either), the same difference
throughout, one example that all seeds share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from hkft.comparison.statistics import CONFIDENCE, ROUNDING

DRAWS = 1_000
NUMBERS = 2_000_000  # drawn at a time: 16 MB of counts

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """Of one seed: a number of each of N examples, the same N for both; 0 or 1 (right), or a loss summed over items."""

    method: ArrayLike  # [N]
    baseline: ArrayLike  # [N]
    items: ArrayLike | None = None  # [N], above 0; None: 1 each


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """method - baseline, in the unit of the examples' numbers (by item, where there are items)."""

    seeds: int  # 1: what another seed would do is not in it
    examples: int  # of each seed; nested, the fewest
    crossed: bool  # the seeds share the examples
    mean: float | None
    low: float | None = None  # of the 95 % interval of the mean
    high: float | None = None
    p: float | None = None  # two-sided, that the true difference is 0


@dataclass(frozen=True, slots=True)
class _Table:
    """Differences of one seed, or of several over the same examples."""

    differences: Floats  # d: [S, N]
    items: Floats | None  # w: [S, N]

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> _Table:
        """The examples in an order of their own, so that the order they came in changes nothing, to the last bit."""
        method, baseline = _rows([pair.method for pair in pairs]), _rows([pair.baseline for pair in pairs])
        assert method.shape == baseline.shape, "the same examples for both"
        differences = method - baseline
        if all(pair.items is None for pair in pairs):
            return cls(differences[:, np.lexsort(differences)], None)
        ones = np.ones(differences.shape[1])
        items = _rows([ones if pair.items is None else pair.items for pair in pairs])
        assert items.shape == differences.shape and (items > 0).all(), "items of each example, above 0"
        order = np.lexsort(np.concatenate([items, differences]))
        return cls(differences[:, order], items[:, order])

    @property
    def means(self) -> Floats:
        """m: [S]."""
        rows = self.differences.shape[1]
        return self.differences.sum(1) / (rows if self.items is None else self.items.sum(1))

    @property
    def linear(self) -> Floats:
        """u: [S, N]; its mean over examples is m."""
        if self.items is None:
            return self.differences
        means = self.means[:, None]
        return means + (self.differences - means * self.items) / self.items.mean(1, keepdims=True)

    def drawn(self, draws: int, rng: np.random.Generator) -> Floats:
        """Of each seed its mean over examples drawn with replacement, the same for all seeds: [S, draws]."""
        rows = self.differences.shape[1]
        size, found = max(1, NUMBERS // rows), []
        for start in range(0, draws, size):
            chosen = rng.integers(0, rows, (min(size, draws - start), rows), dtype=np.int32)
            times = np.stack([np.bincount(each, minlength=rows) for each in chosen], axis=1).astype(float)
            found.append(self.differences @ times / (rows if self.items is None else self.items @ times))
        return np.concatenate(found, axis=1)


def bootstrap(pairs: Mapping[int, Pair], *, crossed: bool, draws: int = DRAWS, generator_seed: int = 0) -> Bootstrap:
    """Mean difference over `pairs` (seed -> Pair), its interval and p; see the module for what each is.

    crossed: example i is the same for all seeds, and N with it. Otherwise each seed has examples of its own, in any number.
    The same result in any order of seeds and, moved together, of examples. Time and memory: about N * draws numbers drawn,
    NUMBERS at a time. Raises AssertionError for no seed, no example, arrays of unlike length, items that are not above 0.
    """
    assert pairs, "at least one seed"
    given = [pairs[seed] for seed in sorted(pairs)]
    tables = [_Table.of(given)] if crossed else [_Table.of([pair]) for pair in given]
    sizes = [table.differences.shape[1] for table in tables]
    assert min(sizes) > 0, "at least one example"
    linear = [row for table in tables for row in table.linear]
    means = np.concatenate([table.means for table in tables])
    measured = float(means.mean())
    counts = len(given), min(sizes), crossed
    if np.isnan(measured):
        return Bootstrap(*counts, None)
    parts = _parts(linear, means, crossed)
    if not parts:
        return Bootstrap(*counts, measured)
    rng = np.random.default_rng(generator_seed)
    drawn = _of_seeds(_of_examples(tables, draws, rng), rng) - measured
    spread = _spread(drawn, parts)
    low, high = np.quantile(spread, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    beyond = min(int((spread <= -measured).sum()), int((spread >= -measured).sum()))
    return Bootstrap(
        *counts, measured, measured + float(low), measured + float(high), min(1.0, 2 * (1 + beyond) / (1 + draws))
    )


def _rows(given: Sequence[ArrayLike]) -> Floats:
    """[S, N], of S arrays of N numbers."""
    rows = [np.asarray(each, np.float64) for each in given]
    assert {row.shape for row in rows} == {(rows[0].size,)}, "a number of each example, and as many for each seed"
    return np.stack(rows)


def _of_examples(tables: Sequence[_Table], draws: int, rng: np.random.Generator) -> Floats:
    """[S, draws]: of each seed its mean over drawn examples, in the order of the tables.

    Several tables draw on their own. Those of one size share the counts, which cost most of the time, but never in the
    same draw: each takes them in a shuffled order, and draws are independent of each other.
    """
    if len(tables) == 1:
        return tables[0].drawn(draws, rng)
    sizes = np.array([table.differences.shape[1] for table in tables])
    found = np.empty((len(tables), draws))
    for size in np.unique(sizes):
        (alike,) = np.nonzero(sizes == size)
        some = [tables[index] for index in alike.tolist()]
        items = [np.ones((1, size)) if table.items is None else table.items for table in some]
        together = None if all(table.items is None for table in some) else np.concatenate(items)
        drawn = _Table(np.concatenate([table.differences for table in some]), together).drawn(draws, rng)
        found[alike] = rng.permuted(drawn, axis=1)
    return found


def _of_seeds(found: Floats, rng: np.random.Generator) -> Floats:
    """[S, draws] -> [draws]: the mean over seeds drawn with replacement, in each draw anew."""
    seeds, draws = found.shape
    return found[rng.integers(0, seeds, (seeds, draws)), np.arange(draws)].mean(0)


def _parts(linear: Sequence[Floats], means: Floats, crossed: bool) -> list[tuple[float, int]]:
    """What the variance of the mean difference consists of, and the degrees of freedom of each part; empty: not known.

    linear: u, [N] for each of S seeds. means: m, [S]. Seeds whose means are equal by chance (few 0/1 examples take few
    values) have at least the spread that examples alone give them.
    """
    everything, n, rows = np.concatenate(linear), len(means), len(linear[0])
    if _alike(everything, everything) or (crossed and rows == 1):
        return []
    if n == 1:
        return [(float(linear[0].var(ddof=1)) / rows, rows - 1)]
    shared = 0.0
    if crossed:
        u = np.stack(linear)
        columns = u.mean(0)
        rest = float(((u - means[:, None] - columns + means.mean()) ** 2).sum()) / ((n - 1) * (rows - 1) * n)
        shared, least = max(0.0, float(columns.var(ddof=1)) - rest) / rows, rest / rows
    else:
        least = sum(float(row.var(ddof=1)) / len(row) for row in linear if len(row) > 1) / n**2
    between = least if _alike(means, everything) else float(means.var(ddof=1)) / n
    return [(variance, df) for variance, df in ((between, n - 1), (shared, rows - 1)) if variance > 0]


def _spread(drawn: Floats, parts: Sequence[tuple[float, int]]) -> Floats:
    """drawn - measured, [draws], with the variance and the tails of `parts`."""
    total = sum(variance for variance, _ in parts)
    z = drawn / drawn.std()
    tail = stats.norm.sf(np.abs(z))
    student = sum((variance / total * stats.t.isf(tail, df) for variance, df in parts), np.zeros_like(z))
    return np.sign(z) * np.sqrt(total) * student


def _alike(values: Floats, scale: Floats) -> bool:
    """Equal, rounding aside."""
    return bool(np.ptp(values) <= ROUNDING * np.abs(scale).max())
