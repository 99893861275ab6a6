"""The bootstrap over seeds and examples against simulated data whose truth is known."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from hkft.comparison.bootstrap import Bootstrap, Pair, _of_examples, _Table, bootstrap
from hkft.comparison.statistics import describe

N = 400


def pairs(differences) -> dict[int, Pair]:
    return {seed: Pair(row, np.zeros(len(row))) for seed, row in enumerate(differences, 1)}


def normal(seeds, *, of_seed, of_example, residual, crossed, mean=0.0):
    """rng -> differences, [seeds, N]: a seed effect, an example effect, and what is left."""

    def draw(rng):
        examples = rng.normal(0, of_example, (1 if crossed else seeds, N))
        return mean + examples + rng.normal(0, of_seed, (seeds, 1)) + rng.normal(0, residual, (seeds, N))

    return draw


def right_or_wrong(seeds, *, crossed, of_seed=0.1, of_example=0.3, residual=0.7, mean=0.0):
    """The same of 0/1 numbers of two methods, each about 75 % right: logits with an effect of each kind."""

    def draw(rng):
        shape = (1 if crossed else seeds, N)
        ease = rng.normal(1.5, 2, shape)
        right = []
        for shift in (mean, 0):
            method = rng.normal(0, of_example, shape) + rng.normal(0, of_seed, (seeds, 1))
            right.append(ease + shift + method + rng.normal(0, residual, (seeds, N)) > 0)
        return right[0].astype(float) - right[1]

    return draw


def share_below(draw, crossed, repeats=200, alpha=0.05):
    """How often p is below alpha. Of 200 draws p = 2 (1 + 4) / 201 is the last below 0.05, so that they are enough."""
    rng = np.random.default_rng(7)
    found = [bootstrap(pairs(draw(rng)), crossed=crossed, draws=200, generator_seed=n) for n in range(repeats)]
    return np.mean([result.p < alpha for result in found])


NO_DIFFERENCE = {
    "crossed, all effects alike": (
        normal(5, of_seed=0.05, of_example=0.05 * 80**0.5, residual=1.0, crossed=True),
        True,
    ),
    "crossed, mostly the examples": (normal(5, of_seed=0.01, of_example=2.0, residual=1.0, crossed=True), True),
    "crossed, no effect but noise": (normal(5, of_seed=0.0, of_example=0.0, residual=1.0, crossed=True), True),
    "crossed, 0/1": (right_or_wrong(5, crossed=True), True),
    "nested, 0/1": (right_or_wrong(5, crossed=False), False),
    "crossed, 3 seeds": (right_or_wrong(3, crossed=True), True),
    "one seed": (normal(1, of_seed=0.0, of_example=1.0, residual=1.0, crossed=True), True),
}


@pytest.mark.parametrize(("draw", "crossed"), NO_DIFFERENCE.values(), ids=NO_DIFFERENCE)
def test_without_a_true_difference_p_is_below_5_percent_in_2_to_8_of_100(draw, crossed):
    assert 0.02 <= share_below(draw, crossed) <= 0.08


@pytest.mark.parametrize("crossed", [True, False])
def test_a_true_difference_is_found(crossed):
    variance = 0.05**2 / 5 + 1 / N / 5 + (0.5**2 / N if crossed else 0)
    of_example = 0.5 if crossed else 0.0
    mean = 3.8 * math.sqrt(variance)  # a t test of 5 pairs has a power of 0.84 there
    draw = normal(5, of_seed=0.05, of_example=of_example, residual=1.0, crossed=crossed, mean=mean)
    assert share_below(draw, crossed, 100) > 0.75


def test_an_interval_of_few_seeds_that_share_examples_is_not_that_of_many():
    """What all seeds share cannot be averaged away: the interval keeps the examples' part."""
    rng = np.random.default_rng(1)
    once = rng.normal(0, 1, N)
    alone, many = bootstrap(pairs([once]), crossed=True), bootstrap(pairs([once] * 20), crossed=True)
    assert (alone.low, alone.high) == pytest.approx((many.low, many.high), abs=0.02)
    half = 1.966 * once.std(ddof=1) / math.sqrt(N)
    assert (alone.high - alone.low) / 2 == pytest.approx(half, rel=0.08)
    fresh = bootstrap(pairs(rng.normal(0, 1, (20, N))), crossed=True)
    assert fresh.high - fresh.low < (many.high - many.low) / 2


@pytest.mark.parametrize("crossed", [True, False])
def test_without_anything_shared_it_is_the_t_interval_of_the_seeds(crossed):
    draw = normal(10, of_seed=1.0, of_example=0.0, residual=0.1, crossed=crossed)
    differences = draw(np.random.default_rng(3))
    found = bootstrap(pairs(differences), crossed=crossed, draws=20_000)
    expected = describe(differences.mean(1).tolist())
    assert found.mean == pytest.approx(expected.mean)
    assert found.high - found.low == pytest.approx(expected.high - expected.low, rel=0.05)
    p = stats.ttest_1samp(differences.mean(1), 0).pvalue
    assert found.p == pytest.approx(p, abs=0.05)


@pytest.mark.parametrize("crossed", [True, False])
@pytest.mark.parametrize("with_items", [False, True])
def test_neither_the_order_of_examples_nor_that_of_seeds_matters(crossed, with_items):
    rng = np.random.default_rng(2)
    items = rng.integers(1, 30, 50)
    given = {seed: Pair(rng.random(50), rng.random(50), items if with_items else None) for seed in (3, 1, 2)}
    found = bootstrap(given, crossed=crossed)
    assert bootstrap(dict(sorted(given.items())), crossed=crossed) == found
    order = rng.permutation(50)
    moved = {
        seed: Pair(pair.method[order], pair.baseline[order], items[order] if with_items else None)
        for seed, pair in given.items()
    }
    assert bootstrap(moved, crossed=crossed) == found
    assert bootstrap(given, crossed=crossed, generator_seed=1) != found


def test_mean_by_item_by_hand():
    given = {1: Pair([6.0, 1.0], [2.0, 3.0], [4, 1]), 2: Pair([3.0, 1.0], [3.0, 0.0], [4, 1])}
    found = bootstrap(given, crossed=True)
    assert found.mean == pytest.approx(((4 - 2) / 5 + (0 + 1) / 5) / 2)
    assert (found.seeds, found.examples, found.crossed) == (2, 2, True)


@pytest.mark.parametrize("crossed", [True, False])
def test_two_items_each_change_nothing_but_the_unit(crossed):
    rng = np.random.default_rng(4)
    differences = rng.normal(0.1, 1, (4, 60))
    plain = bootstrap(pairs(differences), crossed=crossed)
    twice = {seed: Pair(2 * p.method, p.baseline, np.full(60, 2)) for seed, p in pairs(differences).items()}
    found = bootstrap(twice, crossed=crossed)
    assert (found.low, found.high, found.p) == pytest.approx((plain.low, plain.high, plain.p))


@pytest.mark.parametrize("seeds", [1, 5])
def test_completions_of_unlike_length_are_a_ratio_whose_interval_holds_the_true_one_in_95_of_100(seeds):
    rng, hits = np.random.default_rng(6), []
    for n in range(150):
        items = rng.integers(1, 60, 100)
        losses = items * (0.2 + rng.normal(0, 0.3, 100) + 0.005 * items)  # longer ones differ by more
        given = {s: Pair(losses + rng.normal(0, 1, 100), np.zeros(100), items) for s in range(seeds)}
        found = bootstrap(given, crossed=True, draws=300, generator_seed=n)
        true = 0.2 + 0.005 * (np.arange(1, 60) ** 2).mean() / 30
        hits.append(found.low < true < found.high)
    assert 0.91 <= np.mean(hits) <= 0.98


def test_a_difference_in_step_with_the_items_is_known_well():
    """Of a ratio only what is not in step with the length varies."""
    rng = np.random.default_rng(13)
    items, noise = rng.integers(1, 60, N), rng.normal(0, 1, N)
    found = bootstrap({1: Pair(2.0 * items + noise, np.zeros(N), items)}, crossed=True)
    expected = 1.966 * noise.std(ddof=1) / math.sqrt(N) / items.mean()
    assert (found.high - found.low) / 2 == pytest.approx(expected, rel=0.1)


def test_seeds_with_examples_of_their_own_draw_them_on_their_own():
    rows = np.random.default_rng(14).normal(0, 1, (3, 200))
    shared = np.corrcoef(_of_examples([_Table.of([*pairs([rows[0]] * 3).values()])], 1000, np.random.default_rng(0)))
    tables = [_Table.of([pair]) for pair in pairs(rows).values()]
    own = np.corrcoef(_of_examples(tables, 1000, np.random.default_rng(0)))
    assert np.abs(own - np.eye(3)).max() < 0.12
    assert shared.min() > 0.999


def test_one_seed_is_said_and_its_p_is_of_the_examples():
    draw = right_or_wrong(1, crossed=True, mean=0.5)
    found = bootstrap(pairs(draw(np.random.default_rng(1))), crossed=True)
    assert found.seeds == 1
    assert found.p < 0.05
    assert found.low > 0
    assert replace(found, crossed=False) == bootstrap(pairs(draw(np.random.default_rng(1))), crossed=False)


def test_p_and_interval_agree_and_p_is_never_0():
    rng = np.random.default_rng(5)
    for _ in range(30):
        found = bootstrap(pairs(rng.normal(0.1, 1, (5, 100))), crossed=True)
        if not 0.04 < found.p < 0.06:
            assert (found.p < 0.05) == (not found.low < 0 < found.high)
        assert found.low < found.mean < found.high
    sure = bootstrap(pairs(rng.normal(9, 1, (5, 100))), crossed=True)
    assert sure.p == pytest.approx(2 / 1001)
    assert bootstrap(pairs([[-1.0, 1.0], [1.0, -1.0]]), crossed=True).p == 1.0


def test_method_and_baseline_exchanged():
    rng = np.random.default_rng(8)
    given = {seed: Pair(rng.random(200), rng.random(200)) for seed in range(5)}
    there = bootstrap(given, crossed=True, draws=20_000)
    back = bootstrap({s: Pair(p.baseline, p.method) for s, p in given.items()}, crossed=True, draws=20_000)
    assert (back.mean, back.low, back.high) == pytest.approx((-there.mean, -there.high, -there.low), abs=0.002)
    assert back.p == pytest.approx(there.p, abs=0.03)


UNKNOWN = {
    "no difference": (np.zeros((3, 9)), True, 0.0),
    "the same difference, but for rounding": (np.array([[0.3 - 0.2] * 9, [0.1] * 9]), False, 0.1),
    "the same difference for one seed": (np.ones((1, 9)), True, 1.0),
    "one example that all seeds share": (np.array([[1.0], [2.0], [4.0]]), True, 7 / 3),
    "one seed and one example": (np.ones((1, 1)), False, 1.0),
}


@pytest.mark.parametrize(("differences", "crossed", "mean"), UNKNOWN.values(), ids=UNKNOWN)
def test_no_interval_where_the_spread_is_unknown(differences, crossed, mean):
    found = bootstrap(pairs(differences), crossed=crossed)
    assert found == Bootstrap(*differences.shape, crossed, pytest.approx(mean), None, None, None)


def test_an_undefined_example_leaves_nothing_to_say():
    differences = np.random.default_rng(1).normal(0, 1, (3, 9))
    differences[1, 4] = math.nan
    assert bootstrap(pairs(differences), crossed=True) == Bootstrap(3, 9, True, None)


def test_seeds_of_one_mean_have_the_spread_that_their_examples_give_them():
    """Two seeds of 100 answers each often differ from the baseline by the same number of answers."""
    up = [1.0] * 5 + [0.0] * 95
    equal = bootstrap(pairs([up, up[::-1]]), crossed=False)
    wider = stats.t.ppf(0.975, 1) * math.sqrt(np.var(up, ddof=1) / 100 / 2)
    assert (equal.high - equal.low) / 2 == pytest.approx(wider, rel=0.3)
    assert equal.p > 0.05


def test_seeds_may_have_unlike_numbers_of_examples_of_their_own():
    rng = np.random.default_rng(9)
    sizes = (40, 50, 40, 1)
    found = bootstrap(pairs([rng.normal(1, 1, size) for size in sizes]), crossed=False)
    assert (found.seeds, found.examples) == (4, 1)
    assert found.low < found.mean < found.high


WRONG = {
    "no seed": ({}, True),
    "no example": ({1: Pair([], [])}, True),
    "unlike lengths": ({1: Pair([1.0, 2.0], [1.0])}, True),
    "a number for all": ({1: Pair([1.0, 2.0], 1.0)}, True),
    "unlike seeds of shared examples": ({1: Pair([1.0], [1.0]), 2: Pair([1.0, 2.0], [1.0, 2.0])}, True),
    "no items": ({1: Pair([1.0, 2.0], [1.0, 2.0], [1, 0])}, True),
    "unlike items": ({1: Pair([1.0, 2.0], [1.0, 2.0], [1])}, True),
}


@pytest.mark.parametrize(("given", "crossed"), WRONG.values(), ids=WRONG)
def test_what_is_no_comparison_is_refused(given, crossed):
    with pytest.raises(AssertionError):
        bootstrap(given, crossed=crossed)


def test_many_seeds_of_many_examples_with_items():
    rng = np.random.default_rng(10)
    items = rng.integers(1, 9, 5_000)
    given = {seed: Pair(rng.random(5_000), rng.random(5_000), items) for seed in range(40)}
    assert bootstrap(given, crossed=True, draws=100).seeds == 40  # more sort keys than numpy's 32 of other functions
