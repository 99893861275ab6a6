from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from hkft.data.holdout import draw, draw_groups, hold_out, shares
from hkft.data.probe import probe_indices, probe_of_prompts

TRAIN = [0] * 60 + [1] * 30 + [2] * 10


def mix(indices, labels=TRAIN):
    return Counter(labels[index] for index in indices)


def test_the_probe_has_the_size_and_mix_of_validation():
    validation = [0] * 5 + [1] * 10 + [2] * 5
    probe = probe_indices(TRAIN, validation, None, 1, "classification")
    assert mix(probe) == Counter(validation)
    assert probe == sorted(set(probe))
    assert probe == probe_indices(TRAIN, validation, None, 1, "classification")
    assert probe != probe_indices(TRAIN, validation, None, 2, "classification")


def test_a_smaller_probe_keeps_the_mix():
    validation = [0] * 50 + [1] * 25 + [2] * 25
    assert mix(probe_indices(TRAIN, validation, 8, 1, "classification")) == {0: 4, 1: 2, 2: 2}
    assert len(probe_indices(TRAIN, [0] * 10 + [1] * 10, 500, 1, "classification")) == 20


def test_a_class_train_lacks_shortens_the_probe():
    assert mix(probe_indices(TRAIN, [2] * 20 + [0] * 20, None, 1, "classification")) == {0: 20, 2: 10}
    assert probe_indices([0, 1], [2, 2], None, 1, "classification") == []


def test_a_regression_probe_follows_the_validation_labels():
    random = np.random.RandomState(0)
    train, validation = random.uniform(0, 5, 5000), random.beta(2, 5, 500) * 5
    probe = train[probe_indices(train.tolist(), validation.tolist(), None, 1, "regression")]
    assert len(probe) == 500
    levels = np.linspace(0.05, 0.95, 19)
    apart = np.abs(np.quantile(probe, levels) - np.quantile(validation, levels)).max()
    plain = np.abs(np.quantile(train, levels) - np.quantile(validation, levels)).max()
    assert apart < 0.2 < 1 < plain


def test_a_regression_probe_of_equal_labels():
    for seed in range(10):
        assert probe_indices([1.0, 2.0, 1.0, 0.5], [1.0, 1.0], None, seed, "regression") == [0, 2]


def prompts(*sizes: int) -> list[int]:
    """Rows of prompts with so many completions each, in no order."""
    return np.random.RandomState(0).permutation(np.repeat(np.arange(len(sizes)) * 7, sizes)).tolist()


def completions(groups: list[int], rows: list[int]) -> list[int]:
    """How many completions each prompt among `rows` has there; that it has all of them is checked on the way."""
    assert rows == sorted(set(rows))
    found, every = Counter(groups[row] for row in rows), Counter(groups)
    assert all(every[group] == count for group, count in found.items())
    return sorted(found.values())


@pytest.mark.parametrize(
    ("train", "validation", "size", "expected"),
    [
        ([1, 2, 3] * 20, [1, 3, 3], None, [1, 3, 3]),
        ([1] * 90 + [30] * 9, [1] * 10 + [30], None, [1] * 10 + [30]),
        ([1, 2, 3] * 20, [2] * 10, 6, [2, 2, 2]),
        ([1, 2, 3] * 20, [1, 3] * 10, 8, [1, 1, 3, 3]),
        ([1, 2, 3] * 20, [2] * 10, 1, [2]),
        ([1, 2, 3] * 20, [2] * 10, 500, [2] * 10),
        ([1, 2, 3] * 20, [1, 2, 3], 2, [2]),  # the middle
        ([20, 20], [2] * 20, None, [20, 20]),
        ([1, 2, 3] * 2, [9, 1, 9], None, [1, 3]),  # 12 rows are those of two of validation's prompts
        ([3] * 20, [5] * 4, None, [3] * 4),
        ([3] * 20, [1] * 4, None, [3] * 4),
        ([1, 1, 4], [2, 2, 2], None, [1, 1, 4]),
        ([1] * 3, [1] * 9, None, [1] * 3),
        ([5], [1], None, [5]),
    ],
)
def test_a_probe_of_prompts_has_validations_number_of_completions(train, validation, size, expected):
    groups = prompts(*train)
    for seed in range(5):
        assert completions(groups, probe_of_prompts(groups, prompts(*validation), size, seed)) == expected


def test_a_probe_of_prompts_is_drawn_with_the_seed():
    groups, validation = prompts(*[1, 2] * 50), prompts(1, 2, 2)
    first = probe_of_prompts(groups, validation, None, 1)
    assert probe_of_prompts(groups, validation, None, 1) == first
    assert probe_of_prompts(groups, validation, None, 2) != first
    drawn = {groups[row] for seed in range(60) for row in probe_of_prompts(groups, validation, None, seed)}
    assert len(drawn) > 70  # of 100: any prompt can be drawn


@pytest.mark.parametrize(
    ("total", "weights", "parts"),
    [(10, [1, 1, 1], [4, 3, 3]), (2, [1, 9], [0, 2]), (0, [1, 2], [0, 0]), (3, [0, 5], [0, 3])],
)
def test_shares_are_by_largest_remainder(total, weights, parts):
    assert shares(total, np.array(weights)).tolist() == parts


def test_draws_are_nested_sorted_and_fixed_for_good():
    assert draw(100, 5, 1).tolist() == np.sort(np.random.RandomState(1).permutation(100)[:5]).tolist()
    assert set(draw(100, 5, 1)) < set(draw(100, 50, 1))
    assert draw(3, 50, 1).tolist() == [0, 1, 2]


def test_groups_are_drawn_whole_and_nested():
    groups = prompts(*[1, 2, 5] * 10)
    drawn = [draw_groups(groups, wanted, 1).tolist() for wanted in range(5, 81)]
    assert all(completions(groups, rows) for rows in drawn)
    for wanted, rows in enumerate(drawn, 5):
        assert wanted - 5 < len(rows) <= wanted
    assert all(set(fewer) <= set(more) for fewer, more in pairwise(drawn))
    assert drawn[-1] == list(range(80))
    assert draw_groups(groups, 40, 1).tolist() != draw_groups(groups, 40, 2).tolist()
    assert completions(prompts(9, 9), draw_groups(prompts(9, 9), 3, 1).tolist()) == [9]  # one at least


def test_every_class_stays_in_train():
    strata = [0] * 20 + [1]
    held = hold_out(range(21), strata, 0.9, 1)
    assert not held[20]
    assert 17 <= held.sum() <= 19
    assert hold_out(range(5), [0] * 5, 0.01, 1).sum() == 1
