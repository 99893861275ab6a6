"""The statistics against simulated data whose truth is known, and against numbers worked out by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from hkft.comparison.statistics import (
    Difference,
    Sample,
    against,
    critical_t,
    describe,
    holm,
    needed_seeds,
    paired_power,
)


def by_seed(values):
    return {seed: float(value) for seed, value in enumerate(values, 1)}


def one(values, baseline, lower_is_better=False) -> Difference:
    return against({"method": by_seed(values)}, by_seed(baseline), lower_is_better=lower_is_better)["method"]


def test_a_sample_by_hand():
    found = describe([1.0, 2.0, 6.0])
    assert (found.n, found.mean, found.median) == (3, 3.0, 2.0)
    assert found.std == pytest.approx(math.sqrt(7))
    assert found.high == pytest.approx(3 + 4.302653 * math.sqrt(7 / 3), rel=1e-6)
    assert found.low == pytest.approx(3 - 4.302653 * math.sqrt(7 / 3), rel=1e-6)


def test_one_value_has_no_spread_and_an_undefined_one_is_not_counted():
    assert describe([0.5]) == Sample(1, 0.5, None, 0.5)
    assert describe([math.nan, 0.5]) == Sample(1, 0.5, None, 0.5)
    assert describe([math.nan]) == Sample(0)


def test_the_interval_holds_the_true_mean_in_95_of_100_samples():
    drawn = np.random.default_rng(1).normal(3.0, 2.0, (2000, 4))
    found = [describe(values.tolist()) for values in drawn]
    assert np.mean([s.low < 3.0 < s.high for s in found]) == pytest.approx(0.95, abs=0.015)


def test_the_difference_is_scipys_paired_test_and_its_interval():
    method, baseline = [0.81, 0.84, 0.80, 0.86], [0.80, 0.81, 0.80, 0.82]
    expected = stats.ttest_rel(method, baseline)
    low, high = expected.confidence_interval(0.95)
    found = one(method, baseline)
    assert (found.n, found.mean) == (4, pytest.approx(0.02))
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert found.p_holm == found.p


@pytest.mark.parametrize(("lower_is_better", "word"), [(False, "better"), (True, "worse")])
def test_better_and_worse_follow_the_direction_of_the_measure(lower_is_better, word):
    found = one([0.90, 0.91, 0.93, 0.92], [0.80, 0.80, 0.82, 0.81], lower_is_better)
    assert (found.word, found.text, found.needed) == (word, word, None)
    mirrored = one([0.80, 0.80, 0.82, 0.81], [0.90, 0.91, 0.93, 0.92], lower_is_better)
    assert mirrored.word == ("worse" if word == "better" else "better")


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_without_a_true_difference_better_or_worse_is_said_of_about_5_in_100_grids(seeds):
    rng = np.random.default_rng(seeds)
    shared = rng.normal(0.8, 0.02, (1000, seeds))
    grids = [(s + rng.normal(0, 0.01, seeds), s + rng.normal(0, 0.01, seeds)) for s in shared]
    said = [one(method, baseline).word for method, baseline in grids]
    rate = np.mean([word != "cannot tell" for word in said])
    assert 0.035 <= rate <= 0.065  # 2.2 standard errors about 0.05
    assert 0.3 < np.mean([word == "better" for word in said]) / rate < 0.7


def test_accuracies_of_few_rows_do_not_raise_that_rate():
    rng = np.random.default_rng(3)
    drawn = rng.binomial(100, 0.8, (1000, 2, 3)) / 100
    assert np.mean([one(method, baseline).word != "cannot tell" for method, baseline in drawn]) <= 0.06


def test_with_six_methods_any_of_them_is_called_different_in_at_most_5_in_100_grids():
    rng = np.random.default_rng(6)
    wrong = uncorrected = 0
    for _ in range(1000):
        baseline = by_seed(rng.normal(0.8, 0.02, 5))
        methods = {str(n): by_seed(rng.normal(0.8, 0.02, 5)) for n in range(6)}
        found = against(methods, baseline, lower_is_better=False).values()
        wrong += any(difference.word != "cannot tell" for difference in found)
        uncorrected += any(difference.p < 0.05 for difference in found)
    assert wrong / 1000 <= 0.06
    assert uncorrected / 1000 > 0.12


def test_pairing_finds_what_seeds_of_unlike_rows_would_hide():
    rng = np.random.default_rng(4)
    paired = unpaired = 0
    for _ in range(200):
        shared = rng.normal(0.8, 0.03, 5)
        method, baseline = shared + 0.01 + rng.normal(0, 0.004, 5), shared + rng.normal(0, 0.004, 5)
        paired += one(method, baseline).word == "better"
        unpaired += stats.ttest_ind(method, baseline).pvalue < 0.05
    assert paired > 150
    assert unpaired < 20


def test_holm_by_hand():
    # 0.01 x 4, 0.02 x 3, then 0.03 x 2 = 0.06 below which 0.04 x 1 must not fall
    assert holm([0.01, 0.04, 0.03, 0.02]) == pytest.approx([0.04, 0.06, 0.06, 0.06])
    assert holm([0.005, 0.2, 0.7]) == pytest.approx([0.015, 0.4, 0.7])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(("effect", "seeds"), [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10)])
def test_needed_seeds_are_those_of_the_published_power_tables(effect, seeds):
    assert needed_seeds(effect, 1.0) == seeds
    assert paired_power(effect, seeds - 1) < 0.8 <= paired_power(effect, seeds)


def test_with_the_needed_seeds_the_difference_is_found_four_times_in_five():
    needed = needed_seeds(0.9, 1.0)
    assert needed is not None
    drawn = np.random.default_rng(9).normal(0.9, 1.0, (2000, needed))
    found = np.mean(stats.ttest_1samp(drawn, 0, axis=1).pvalue < 0.05)
    assert 0.78 < found < 0.87  # the power of the next whole seed


def test_needed_seeds_know_their_limits():
    assert needed_seeds(0.0, 1.0) is None
    assert needed_seeds(0.05, 1.0) is None
    assert needed_seeds(50.0, 1.0) == 2
    assert needed_seeds(0.5, 1.0, alpha=0.05 / 6) > needed_seeds(0.5, 1.0)


def test_what_cannot_be_told_needs_more_seeds_than_there_are():
    rng = np.random.default_rng(8)
    for _ in range(200):
        count = int(rng.integers(2, 8))
        methods = {str(n): by_seed(rng.normal(0.01, 0.01, count)) for n in range(int(rng.integers(1, 7)))}
        for found in against(methods, by_seed(rng.normal(0, 0.01, count)), lower_is_better=False).values():
            assert found.word != "cannot tell" or found.needed is None or found.needed > count


WORDS = {
    "one seed": ([0.9], [0.8], "one seed cannot tell"),
    "few seeds": ([0.81, 0.80, 0.83], [0.80, 0.805, 0.81], "cannot tell (n = 3 seeds; about 20 would be needed)"),
    "a tiny difference": (
        [0.810001, 0.799, 0.821],
        [0.81, 0.80, 0.82],
        "cannot tell (n = 3 seeds; more than 1,000 would be needed)",
    ),
    "equal runs": ([0.8, 0.7], [0.8, 0.7], "cannot tell (n = 2 seeds, and no difference on any)"),
    "equal differences": (
        [0.81, 0.79],  # 0.01 twice, but for the last bit: a t test would find p = 1e-15
        [0.80, 0.78],
        "cannot tell (n = 2 seeds, and the same difference on each: its spread is unknown)",
    ),
    "undefined": ([0.9, math.nan, 0.9], [0.8, 0.8, 0.7], "cannot tell (undefined for seed 2)"),
}


@pytest.mark.parametrize(("method", "baseline", "text"), WORDS.values(), ids=WORDS)
def test_words(method, baseline, text):
    found = one(method, baseline)
    assert (found.word, found.text) == ("cannot tell", text)
    assert (found.p is None) == ("needed" not in text)


def test_seeds_that_only_one_has_are_not_compared():
    found = against({"m": {1: 0.9, 2: 0.7}}, {2: 0.8, 3: 0.1}, lower_is_better=False)["m"]
    assert (found.n, found.mean) == (1, pytest.approx(-0.1))
    alone = against({"m": {1: 0.9}}, {2: 0.8}, lower_is_better=False)["m"]
    assert (alone.n, alone.mean, alone.text) == (0, None, "cannot tell (no seed in common with the baseline)")


def test_five_percent_of_t():
    assert critical_t(3) == pytest.approx(4.3027, abs=1e-4)
