"""Numbers of a few seeds, and what may honestly be said of them. Pure functions; scipy does the tests.

    values      seed -> one number of one run
    interval    95 % t interval of a mean: mean +- t(0.975, n - 1) * std / sqrt(n), std with n - 1 in the denominator
    difference  method - baseline, paired by seed: the same seed gave both the same rows, initial weights and order, and
                what the pair shares cancels. p is of the two-sided paired t test
    Holm        p values of several methods against one baseline, stepped down so that the chance of calling any of them
                different when none is stays below 5 %. The intervals are not corrected
    better      the Holm-corrected p is below 0.05, and the difference has the good sign
    effect      standardised: d_z = mean / std of the differences, times J = 1 - 3 / (4 (n - 1) - 1), as few seeds make it
                too large (Hedges 1981). In standard deviations; the sign is that of method - baseline. None where p is,
                and for 2 seeds, where J = 0: its expectation does not exist
    wins        seeds on which the method is better than the baseline, ties: equal, rounding aside, losses: worse
    needed      seeds at which a difference as large and as steady as the one observed would be found with a chance of
                80 % (noncentral t, at 0.05 / number of methods, the strictest step of Holm). The observed effect is
                itself uncertain, so this is an order of magnitude, not a promise

No p value where there is none to give: one seed; the same difference on every seed, whose spread is then unknown (an
accuracy of few rows takes few values); a metric that is undefined for a seed. A t test of however few pairs can give any
p: it has no least one. Two runs of one seed on the same examples: `mcnemar`, and `comparison.bootstrap`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

CONFIDENCE = 0.95
ALPHA = 0.05
POWER = 0.8
MOST_SEEDS = 1000  # beyond this a number of seeds is no advice
ROUNDING = 1e-9  # two numbers that differ by less, relative to their size, are equal

Word = Literal["better", "worse", "cannot tell"]


@dataclass(frozen=True, slots=True)
class Sample:
    """Values of one method: how many are defined, and where they lie. None: too few to say."""

    n: int
    mean: float | None = None
    std: float | None = None
    median: float | None = None
    low: float | None = None  # of the interval of the mean
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Difference:
    """method - baseline over the seeds that both have, and what it says; `word` is `text` without its reason."""

    n: int
    mean: float | None
    std: float | None
    low: float | None
    high: float | None
    effect: float | None
    wins: int
    ties: int
    losses: int
    p: float | None
    p_holm: float | None
    needed: int | None
    word: Word
    text: str


@dataclass(frozen=True, slots=True)
class McNemar:
    """Examples on which only one of two methods is right, and the two-sided p that each is as likely as the other."""

    only_method: int
    only_baseline: int
    p: float


def describe(values: Sequence[float]) -> Sample:
    """n, mean, standard deviation, median, and the 95 % t interval of the mean. NaN is left out, and not in n."""
    known = np.asarray([value for value in values if not math.isnan(value)], float)
    if not len(known):
        return Sample(0)
    mean, median = float(known.mean()), float(np.median(known))
    if len(known) == 1:
        return Sample(1, mean, None, median)
    std = float(known.std(ddof=1))
    half = half_width(std, len(known))
    return Sample(len(known), mean, std, median, mean - half, mean + half)


def against(
    methods: Mapping[str, Mapping[int, float]], baseline: Mapping[int, float], *, lower_is_better: bool
) -> dict[str, Difference]:
    """Each method against one baseline: see `of_pairs`."""
    return of_pairs({name: (values, baseline) for name, values in methods.items()}, lower_is_better=lower_is_better)


def of_pairs(
    pairs: Mapping[str, tuple[Mapping[int, float], Mapping[int, float]]], *, lower_is_better: bool
) -> dict[str, Difference]:
    """Each method against the baseline beside it, paired by seed, Holm-corrected over all that have a p value."""
    paired = {name: paired_differences(values, baseline) for name, (values, baseline) in pairs.items()}
    raw = {name: _p(differences) for name, differences in paired.items()}
    tested = [name for name, p in raw.items() if p is not None]
    corrected = dict(zip(tested, holm([p for p in raw.values() if p is not None]), strict=True))
    alpha = ALPHA / max(1, len(tested))
    return {
        name: _difference(
            differences, _tally(*pairs[name], lower_is_better), raw[name], corrected.get(name), alpha, lower_is_better
        )
        for name, differences in paired.items()
    }


def paired_differences(values: Mapping[int, float], baseline: Mapping[int, float]) -> dict[int, float]:
    """seed -> value - baseline, of the seeds that both have, in order. NaN where one of them is undefined."""
    return {seed: values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())}


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the i-th smallest (from 0) of m times m - i, never falling, at most 1."""
    corrected, floor = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = floor
    return corrected


def hedges(mean: float, std: float, n: int) -> float | None:
    """Paired standardised effect of n differences: mean / std * (1 - 3 / (4 (n - 1) - 1)) (Hedges 1981).

    None below 3 differences, and where they do not vary.
    """
    return mean / std * (1 - 3 / (4 * (n - 1) - 1)) if n > 2 and std > 0 else None


def mcnemar(method_right: ArrayLike, baseline_right: ArrayLike) -> McNemar:
    """Two runs on the same examples (McNemar 1947), exact: of those that only one has right, half are the method's.

    method_right, baseline_right: [N], True or 1 where the run is right. p: two-sided binomial; 1 where the runs never
    differ; at least 2 / 2^k where they differ on k examples. It tells these two runs apart, not their methods: what another
    seed would do is not in it. Raises AssertionError for arrays of unlike length, and for numbers other than 0 and 1.
    """
    method, baseline = np.asarray(method_right), np.asarray(baseline_right)
    assert method.shape == baseline.shape and method.ndim == 1, "the same examples"
    assert np.isin(method, (0, 1)).all() and np.isin(baseline, (0, 1)).all(), "right or wrong"
    ours, theirs = int((method > baseline).sum()), int((method < baseline).sum())
    return McNemar(ours, theirs, float(stats.binomtest(ours, ours + theirs).pvalue) if ours + theirs else 1.0)


def needed_seeds(mean: float, std: float, *, alpha: float = ALPHA, power: float = POWER) -> int | None:
    """Least n at which a two-sided paired t test finds a difference of this mean and spread with this power.

    The normal approximation, always too small, is where the search begins. None where more than MOST_SEEDS are needed.
    """
    effect = abs(mean) / std if std else math.inf
    if effect == 0 or (reach := (stats.norm.isf(alpha / 2) + stats.norm.ppf(power)) / effect) ** 2 > MOST_SEEDS:
        return None
    n = max(2, math.floor(reach**2))
    while paired_power(effect, n, alpha) < power:
        n += 1
    return n if n <= MOST_SEEDS else None


def paired_power(effect: float, n: int, alpha: float = ALPHA) -> float:
    """Chance that a two-sided paired t test of n pairs finds an effect (mean / std of the differences) at `alpha`."""
    critical, shift = stats.t.isf(alpha / 2, n - 1), min(effect * math.sqrt(n), 1e3)
    return float(stats.nct.sf(critical, n - 1, shift))


def critical_t(n: int, alpha: float = ALPHA) -> float:
    """|t| that n pairs must exceed."""
    return float(stats.t.isf(alpha / 2, n - 1))


def half_width(std: float, n: int) -> float:
    """Half of the 95 % t interval of a mean."""
    return critical_t(n, 1 - CONFIDENCE) * std / math.sqrt(n)


def _steady(differences: NDArray[np.floating]) -> bool:
    """The same difference on every seed, rounding aside."""
    return bool(np.ptp(differences) <= ROUNDING * np.abs(differences).max())


def _p(differences: Mapping[int, float]) -> float | None:
    values = np.asarray(list(differences.values()), float)
    if len(values) < 2 or np.isnan(values).any() or _steady(values):
        return None
    return float(stats.ttest_rel(values, np.zeros_like(values)).pvalue)  # type: ignore[attr-defined]


def _tally(values: Mapping[int, float], baseline: Mapping[int, float], lower_is_better: bool) -> tuple[int, int, int]:
    """Seeds on which the method is better, equal, worse. A seed that is undefined for one of them is none of these."""
    wins = ties = losses = 0
    for seed in values.keys() & baseline.keys():
        ours, theirs = values[seed], baseline[seed]
        if math.isnan(ours) or math.isnan(theirs):
            continue
        if math.isclose(ours, theirs, rel_tol=ROUNDING):
            ties += 1
        elif (ours < theirs) == lower_is_better:
            wins += 1
        else:
            losses += 1
    return wins, ties, losses


def _difference(
    differences: Mapping[int, float],
    tally: tuple[int, int, int],
    p: float | None,
    p_holm: float | None,
    alpha: float,
    lower_is_better: bool,
) -> Difference:
    sample = describe(list(differences.values()))
    mean, std = sample.mean, sample.std
    word: Word = "cannot tell"
    effect = needed = None
    if p is not None and p_holm is not None:
        assert mean is not None
        assert std is not None
        effect = hedges(mean, std, sample.n)
        if p_holm < ALPHA:
            word = "better" if (mean < 0) == lower_is_better else "worse"
        else:
            needed = needed_seeds(mean, std, alpha=alpha)
    wins, ties, losses = tally
    return Difference(
        n=len(differences),
        mean=mean,
        std=std,
        low=sample.low,
        high=sample.high,
        effect=effect,
        wins=wins,
        ties=ties,
        losses=losses,
        p=p,
        p_holm=p_holm,
        needed=needed,
        word=word,
        text=word if word != "cannot tell" else _why_not(differences, p, needed),
    )


def _why_not(differences: Mapping[int, float], p: float | None, needed: int | None) -> str:
    """Why nothing can be said, and what would help."""
    n = len(differences)
    undefined = [str(seed) for seed, value in differences.items() if math.isnan(value)]
    if not n:
        return "cannot tell (no seed in common with the baseline)"
    if undefined:
        return f"cannot tell (undefined for seed {', '.join(undefined)})"
    if n == 1:
        return "one seed cannot tell"
    if p is None and not any(differences.values()):
        return f"cannot tell (n = {n} seeds, and no difference on any)"
    if p is None:
        return f"cannot tell (n = {n} seeds, and the same difference on each: its spread is unknown)"
    return (
        f"cannot tell (n = {n} seeds; {f'about {needed}' if needed else f'more than {MOST_SEEDS:,}'} would be needed)"
    )
