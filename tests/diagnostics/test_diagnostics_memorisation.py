import math
import time

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from hkft.diagnostics.memorisation import History, Row, Share, forgotten, memorised, suspicious, told_apart


def history(*rows: list[float], steps: list[int] | None = None, right: list[str] | None = None) -> History:
    """A history from the losses of each row over the looks; right: a string a row, "+" where decided rightly."""
    losses = np.array(rows, dtype=float).T
    steps = steps or [10 * (look + 1) for look in range(len(losses))]
    decided = None if right is None else np.array([[mark == "+" for mark in row] for row in right]).T
    return History(np.array(steps), losses, decided)


def indices(rows: list[Row]) -> list[int]:
    return [row.index for row in rows]


# --- told_apart -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decimals", [0, 1, 8])
def test_the_share_is_scikit_learns_area_with_ties_too(decimals):
    generator = np.random.default_rng(0)
    train, validation = generator.exponential(1, 80).round(decimals), generator.exponential(1.5, 50).round(decimals)
    area = roc_auc_score(np.repeat([0, 1], [80, 50]), np.concatenate([train, validation]))
    assert told_apart(train, validation).value == pytest.approx(area)


def test_the_share_by_hand():
    assert told_apart(np.array([1.0, 2.0]), np.array([2.0, 3.0, 0.5])).value == pytest.approx((1 + 1 + 0.5 + 1) / 6)


def test_the_interval_is_that_of_resampled_areas():
    """Against scipy's bootstrap of scikit-learn's area: other draws, the same ends but for their own noise."""
    from scipy.stats import bootstrap

    generator = np.random.default_rng(1)
    train, validation = generator.normal(0, 1, 60), generator.normal(0.7, 1, 40)

    def area(x: np.ndarray, y: np.ndarray) -> float:
        return float(roc_auc_score(np.repeat([0, 1], [len(x), len(y)]), np.concatenate([x, y])))

    theirs = bootstrap((train, validation), area, vectorized=False, n_resamples=500, method="percentile", rng=0)
    ours = told_apart(train, validation)
    interval = theirs.confidence_interval
    assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high), abs=0.02)


def test_the_interval_covers_one_half_where_nothing_was_memorised():
    covered = 0
    for seed in range(200):
        generator = np.random.default_rng(seed)
        share = told_apart(generator.exponential(size=60), generator.exponential(size=80), seed)
        covered += share.low <= 0.5 <= share.high
    assert 0.91 <= covered / 200 <= 0.985


def test_rows_learned_by_heart_are_told_apart():
    generator = np.random.default_rng(0)
    share = told_apart(generator.exponential(0.3, 200), generator.exponential(1.0, 200))
    assert 0.5 < share.low < share.value < share.high < 1
    assert share.value == pytest.approx(1 / 1.3, abs=0.05)  # P(exponential of mean 0.3 < one of mean 1)


def test_the_seed_decides_the_interval_and_nothing_else_does():
    generator = np.random.default_rng(0)
    train, validation = generator.normal(size=50), generator.normal(size=50)
    assert told_apart(train, validation, 1) == told_apart(train[::-1][::-1], validation.copy(), 1)
    assert told_apart(train, validation, 1) != told_apart(train, validation, 2)


def test_it_is_fast_on_many_rows():
    generator = np.random.default_rng(0)
    start = time.process_time()
    share = told_apart(generator.normal(size=5000), generator.normal(size=5000))
    assert time.process_time() - start < 3
    assert share.high - share.low == pytest.approx(2 * 1.96 / math.sqrt(6 * 5000), rel=0.1)  # Mann and Whitney's sd


def test_sets_wholly_apart_and_wholly_alike():
    assert told_apart(np.array([0.1, 0.2]), np.array([1.0, 2.0])) == Share(1.0, 1.0, 1.0)
    assert told_apart(np.ones(3), np.ones(4)) == Share(0.5, 0.5, 0.5)


def test_nan_losses_are_left_out_and_infinite_ones_count():
    train, validation = np.array([1.0, 2.0, np.nan]), np.array([np.nan, 1.5, np.inf])
    assert told_apart(train, validation) == told_apart(train[:2], validation[1:])
    assert told_apart(train, validation).value == 0.75
    assert told_apart(np.array([1.0, np.inf]), np.array([2.0])).value == 0.5


@pytest.mark.parametrize(("n", "m"), [(0, 3), (3, 0), (0, 0)])
def test_a_side_without_rows_has_no_share(n, m):
    share = told_apart(np.zeros(n), np.zeros(m))
    assert np.isnan([share.value, share.low, share.high]).all()


def test_a_single_row_has_a_share_and_no_interval():
    share = told_apart(np.array([0.0]), np.array([1.0, 2.0]))
    assert share.value == 1
    assert np.isnan([share.low, share.high]).all()


# --- memorised --------------------------------------------------------------------------------------------------------


def test_memorised_are_the_rows_that_fell_after_the_best_look():
    train = history(
        [2.0, 1.0, 0.3, 0.1],  # since 40: below 0.2, a tenth of its first
        [2.0, 1.9, 0.1, 0.1],  # fell most
        [2.0, 0.1, 0.1, 0.01],  # known at the best look already
        [2.0, 1.0, 0.9, 0.5],  # not below half
        [2.0, 1.8, 0.1, 0.8],  # fell, but is not known by heart at the end
    )
    assert memorised(train, best=1) == [
        Row(1, 2.0, 0.1, 0.1, 30),
        Row(4, 2.0, 0.1, 0.8, None),
        Row(0, 2.0, 0.1, 0.1, 40),
    ]
    assert indices(memorised(train, best=1, count=1)) == [1]


def test_by_heart_counts_from_the_last_time_it_was_not():
    assert memorised(history([1.0, 0.8, 0.05, 0.2, 0.05]), best=1)[0].since == 50


def test_nothing_is_memorised_before_the_best_look():
    assert memorised(history([2.0, 1.0, 0.01]), best=2) == []
    assert memorised(history([2.0]), best=0) == []


def test_equal_rows_are_listed_by_index():
    assert indices(memorised(history(*[[2.0, 1.0, 0.1], [2.0, 1.0, 0.2]] * 50), best=1, count=3)) == [0, 2, 4]


def test_there_is_no_look_beyond_the_last():
    with pytest.raises(AssertionError, match="there is no look 1, there are 1"):
        memorised(history([2.0]), best=1)


# --- forgotten --------------------------------------------------------------------------------------------------------


def test_forgotten_are_the_rows_right_before_and_wrong_at_the_end():
    validation = history(
        [0.7, 0.2, 0.3, 2.0],
        [0.7, 0.6, 0.8, 0.9],
        [0.7, 0.2, 0.9, 0.3],  # forgotten and made good
        [0.7, 0.9, 0.9, 3.0],  # never known
        right=["++++"[:3] + "-", "-+--", "-+-+", "----"],
    )
    assert forgotten(validation) == [Row(0, 0.7, 0.2, 2.0, 30)]  # the second was right, and never fitted


def test_what_a_fresh_head_got_right_was_luck():
    losses, right = [0.9, 0.2, 0.9, 1.5], ["-+--"]
    assert forgotten(history([0.2, 0.9, 0.9, 1.5], steps=[0, 10, 20, 30], right=["+---"])) == []
    assert indices(forgotten(history(losses, steps=[0, 10, 20, 30], right=right))) == [0]


def test_without_decisions_the_loss_must_double_and_rise_beyond_what_it_moves_anyway():
    validation = history(
        [1.0, 0.5, 0.5, 2.0],  # since 30, the last time that it was lowest
        [1.0, 0.001, 0.001, 0.003],  # doubled, but by nothing
        [1.0, 0.9, 0.9, 1.6],  # rose, not doubled
        [1.0, 0.8, 0.6, 0.4],
        [1.0, 0.8, 0.2, 0.6],
    )
    assert forgotten(validation) == [Row(0, 1.0, 0.5, 2.0, 30), Row(4, 1.0, 0.2, 0.6, 30)]


def test_without_decisions_the_look_before_training_does_not_count_either():
    assert forgotten(history([0.1, 1.0, 1.0], [1.0, 0.9, 0.9], steps=[0, 10, 20])) == []


# --- suspicious -------------------------------------------------------------------------------------------------------


def simulated(seed: int, rows: int = 400, noise: float = 0.05, looks: int = 10) -> tuple[History, set[int], int]:
    """Two classes. Margins of true labels grow at each row's own pace; a wrong label is denied until it is learned by
    heart, after the look that is returned as the best."""
    generator = np.random.default_rng(seed)
    wrong = generator.random(rows) < noise
    pace, hard = generator.exponential(1.0, rows), generator.normal(0, 0.5, rows)
    time, best = np.arange(looks)[:, None], 5
    margin = hard + pace * time + generator.normal(0, 0.3, (looks, rows))
    by_heart = 2.0 * np.maximum(time - best, 0)
    margin = np.where(wrong, -margin + 2 * by_heart * pace, margin)
    return History(10 * np.arange(looks), np.log1p(np.exp(-margin)), margin > 0), set(np.flatnonzero(wrong)), best


@pytest.mark.parametrize("seed", range(5))
def test_injected_wrong_labels_are_found(seed):
    train, wrong, best = simulated(seed)
    found = set(indices(suspicious(train, best, count=1000)))
    assert len(found & wrong) >= 0.6 * len(wrong)  # the others are rows the model had not learned with any label
    assert len(found & wrong) >= 0.8 * len(found)
    assert set(indices(suspicious(train, best))) <= wrong


@pytest.mark.parametrize("seed", range(5))
def test_of_clean_rows_hardly_any_is_suspicious(seed):
    train, _, best = simulated(seed, noise=0.0)
    assert len(suspicious(train, best, count=1000)) <= 0.01 * 400


def test_the_most_denied_row_is_first_and_says_when_it_was_learned_by_heart():
    known = [[0.7, 0.1, 0.1, 0.1]] * 4
    train = history(
        *known,
        [0.7, 2.0, 2.5, 2.0],
        [0.7, 3.0, 3.0, 0.01],
        steps=[0, 10, 20, 30],
        right=["++++"] * 4 + ["+---", "---+"],
    )
    assert suspicious(train, best=2) == [Row(5, 0.7, 0.01, 0.01, 30), Row(4, 0.7, 0.7, 2.5 - 0.5, None)]


def test_a_row_right_at_the_best_look_or_at_most_looks_is_not_suspicious():
    known = [[0.1] * 4] * 4
    losses = [3.0] * 4
    for marks, listed in [("---+", 0), ("++--", 0), ("+---", 1), ("----", 1)]:
        assert len(suspicious(history(*known, losses, right=["++++"] * 4 + [marks]), best=3)) == listed


def test_a_row_a_little_unsure_of_is_not_suspicious():
    assert suspicious(history([0.6], [0.6], [0.6], [0.8], right=["+", "+", "+", "-"]), best=0) == []


def test_while_most_rows_are_wrong_none_is_suspicious():
    rows = [[0.1], [0.1], [3.0], [3.0]]
    assert suspicious(history(*rows, right=["+", "+", "-", "-"]), best=0) == []
    assert len(suspicious(history(*rows, [0.1], right=["+", "+", "-", "-", "+"]), best=0)) == 2


def test_before_training_nothing_is_suspicious():
    known = [[0.1, 0.1]] * 4
    train = history(*known, [3.0, 3.0], steps=[0, 10], right=["++"] * 4 + ["--"])
    assert suspicious(train, best=0) == []
    assert indices(suspicious(train, best=1)) == [4]


def test_without_decisions_outliers_are_found_and_a_clean_set_has_next_to_none():
    generator = np.random.default_rng(0)
    clean = np.repeat(generator.normal(size=(1, 2000)) ** 2, 3, axis=0)
    steps = np.array([10, 20, 30])
    assert len(suspicious(History(steps, clean), 2, count=2000)) <= 20
    spoilt = clean.copy()
    spoilt[:, :40] += 25
    found = indices(suspicious(History(steps, spoilt), 2, count=40))
    assert set(found) == set(range(40))
    means = spoilt.mean(0)[found]
    assert (np.diff(means) <= 0).all()


def test_without_decisions_a_fifth_of_the_rows_are_no_outliers_however_alike_the_others():
    assert suspicious(history(*[[1.0]] * 80, *[[1.1]] * 20), best=0) == []
    assert len(suspicious(history(*[[1.0]] * 97, *[[1.1]] * 3), best=0)) == 3


def test_without_decisions_only_looks_up_to_the_best_count():
    rows = [[1.0, 1.1, 1.0]] * 20 + [[1.0, 1.0, 90.0]]
    assert suspicious(history(*rows), best=1) == []
    assert indices(suspicious(history(*rows), best=2)) == [20]


# --- the edges of all -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decided", [True, False])
def test_no_rows_one_look_and_equal_losses_have_no_lists(decided):
    for losses in (np.zeros((3, 0)), np.ones((1, 4)), np.ones((3, 4)), np.zeros((3, 4))):
        right = np.ones(losses.shape, bool) if decided else None
        one = History(10 * np.arange(1, len(losses) + 1), losses, right)
        assert memorised(one, 0) == forgotten(one) == suspicious(one, 0) == []


def test_a_row_without_a_number_is_in_no_list():
    rows = [[0.5, 0.5, 0.5]] * 20
    for bad in (np.nan, np.inf):
        train = history(*rows, [9.0, 9.0, 0.1], [bad, 9.0, 0.1], [9.0, bad, 0.1], [9.0, 9.0, bad])
        assert indices(memorised(train, 1)) == [20]
        assert indices(suspicious(train, 1)) == [20]
        validation = history(*rows, [0.9, 0.2, 0.9], [bad, 0.2, 0.9], [0.9, 0.2, bad])
        assert indices(forgotten(validation)) == [20]


def test_single_precision_is_as_good():
    train, _, best = simulated(0)
    single = History(train.steps, train.losses.astype(np.float32), train.right)
    assert indices(memorised(single, best)) == indices(memorised(train, best))
    assert indices(suspicious(single, best)) == indices(suspicious(train, best))
    assert len(memorised(train, best)) == 10
