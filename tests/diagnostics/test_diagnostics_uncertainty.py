"""Intervals over rows: they cover what they say they cover, and narrow where the rows are paired."""

from __future__ import annotations

import numpy as np
import pytest

from hkft.diagnostics.decomposition import net_gain, regret, regularisation
from hkft.diagnostics.uncertainty import Losses, change_interval, gap_interval


def losses(values, items=None) -> Losses:
    values = np.asarray(values, dtype=float)
    return Losses(values, np.ones(len(values), dtype=int) if items is None else np.asarray(items))


def test_a_loss_is_a_mean_over_items():
    two = losses([6.0, 2.0], [3, 1])
    assert two.mean == 2.0
    assert two.each.tolist() == [2.0, 2.0]


def test_the_gap_s_interval_covers_the_truth_95_times_in_100():
    draw = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        probe, validation = losses(draw.exponential(0.4, 80)), losses(draw.exponential(0.6, 80))
        low, high = gap_interval(probe, validation, seed)
        covered += low <= 0.2 <= high
    assert 0.90 <= covered / 200 <= 0.98


def test_the_same_rows_at_two_looks_are_drawn_together():
    """A row that is hard stays hard: what it adds to both looks is no uncertainty of the change."""
    draw = np.random.default_rng(1)
    hard = draw.exponential(1.0, 300)
    before, after = losses(hard), losses(hard + 0.05 + 0.01 * draw.normal(size=300))
    low, high = change_interval(before, after)
    assert 0.04 < low < 0.05 < high < 0.06
    apart = gap_interval(before, after)
    assert apart[1] - apart[0] > 10 * (high - low)


def test_rows_with_more_tokens_weigh_more():
    few, many = losses([1.0] * 50, [1] * 50), losses([0.0, 100.0] * 50, [1, 100] * 50)
    assert many.mean == pytest.approx(100 / 101)
    low, high = gap_interval(few, many)
    assert high - low < 0.02  # by row the losses per item are 0 and 1, and would give 0.2


def test_no_change_has_no_interval_and_one_seed_one_answer():
    rows = losses(np.linspace(0, 1, 40))
    assert change_interval(rows, rows) == (0.0, 0.0)
    other = losses(np.linspace(0, 2, 40))
    assert gap_interval(rows, other, 3) == gap_interval(rows, other, 3) != gap_interval(rows, other, 4)


def test_many_rows_take_fewer_draws_and_little_memory():
    rows = losses(np.random.default_rng(0).exponential(1.0, 150_000))
    low, high = gap_interval(rows, rows)
    assert low < 0 < high < 0.02


def test_the_parts_of_a_look():
    before, best, now = (
        {"loss": loss, "accuracy": accuracy, "ter": ter}
        for loss, accuracy, ter in ((0.7, 0.5, 90.0), (0.4, 0.8, 70.0), (0.5, 0.75, 60.0))
    )
    assert net_gain(before, now) == pytest.approx({"loss": 0.2, "accuracy": 0.25, "ter": 30.0})
    assert regret([before, best], now) == pytest.approx({"loss": 0.1, "accuracy": 0.05, "ter": 0.0})
    assert regret([], now) == {"loss": 0.0, "accuracy": 0.0, "ter": 0.0}
    parts = regularisation(objective=0.9, task=0.6, consistency=0.3, probe=0.5)
    assert parts == pytest.approx({"total": 0.4, "dropout": 0.1, "consistency": 0.3})
    assert parts["total"] == pytest.approx(parts["dropout"] + parts["consistency"])


def test_a_metric_that_was_never_defined_has_no_regret():
    assert np.isnan(regret([{"pearson": float("nan")}], {"pearson": float("nan")})["pearson"])
    assert regret([{"pearson": float("nan")}], {"pearson": 0.5}) == {"pearson": 0.0}
