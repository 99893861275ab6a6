"""Intervals over rows: they cover what they say they cover, and narrow where the rows are paired."""

from __future__ import annotations

import numpy as np
import pytest

from hkft.diagnostics import uncertainty
from hkft.diagnostics.decomposition import Added, net_gain, regret, regularisation
from hkft.diagnostics.uncertainty import Losses, change_interval, gap_interval, rise_p


def losses(values, items=None) -> Losses:
    values = np.asarray(values, dtype=float)
    return Losses(values, np.ones(len(values), dtype=int) if items is None else np.asarray(items))


@pytest.fixture
def fewer_draws(monkeypatch):
    """Of hundreds of intervals: by 300 draws instead of 1,000 the 2.5 percentile is that of 1.6 to 3.4 (a standard error)."""
    monkeypatch.setattr(uncertainty, "DRAWS", 300)


def test_a_loss_is_a_mean_over_items():
    two = losses([6.0, 2.0], [3, 1])
    assert two.mean == 2.0
    assert two.each.tolist() == [2.0, 2.0]


@pytest.mark.usefixtures("fewer_draws")
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


def looks_at(draw, level, rows=100) -> list[Losses]:
    """Rows, some hard, whose losses flicker from look to look while their mean follows `level`."""
    hard = draw.exponential(1.0, rows)
    return [losses(mean * hard * np.exp(0.5 * draw.normal(size=rows) - 0.125)) for mean in level]


@pytest.mark.usefixtures("fewer_draws")
def test_a_rise_is_found_by_luck_no_more_often_than_its_p_says():
    """The lowest of nine looks is low by luck: an interval of the change since then finds a rise much more often."""
    draw, level = np.random.default_rng(2), [0.7, 0.55, 0.5, *[0.45] * 6]
    found = [looks_at(draw, level) for _ in range(150)]
    assert np.mean([rise_p(looks) <= 0.05 for looks in found]) <= 0.05
    naive = [change_interval(min(looks, key=lambda look: look.mean), looks[-1])[0] > 0 for looks in found]
    assert np.mean(naive) > 0.08


@pytest.mark.usefixtures("fewer_draws")
def test_a_rise_that_is_there_is_found():
    draw, level = np.random.default_rng(3), [0.7, 0.55, 0.45, 0.5, 0.55, 0.6, 0.65]
    assert np.mean([rise_p(looks_at(draw, level, rows=300)) <= 0.025 for _ in range(60)]) >= 0.9


def test_the_p_of_a_rise_needs_rows_and_a_rise():
    assert rise_p([losses([0.5]), losses([0.6])]) is None
    rows = losses(np.linspace(0, 1, 40))
    assert rise_p([rows]) == rise_p([rows, rows]) == 1.0


def test_the_parts_of_a_look():
    before, best, now = (
        {"loss": loss, "accuracy": accuracy, "ter": ter}
        for loss, accuracy, ter in ((0.7, 0.5, 90.0), (0.4, 0.8, 70.0), (0.5, 0.75, 60.0))
    )
    assert net_gain(before, now) == pytest.approx({"loss": 0.2, "accuracy": 0.25, "ter": 30.0})
    assert regret([before, best], now) == pytest.approx({"loss": 0.1, "accuracy": 0.05, "ter": 0.0})
    assert regret([], now) == {"loss": 0.0, "accuracy": 0.0, "ter": 0.0}
    parts = regularisation(Added(objective=0.95, task=0.65, consistency=0.3, unsmoothed=0.6), probe=0.5)
    assert parts == pytest.approx({"total": 0.45, "dropout": 0.1, "smoothing": 0.05, "consistency": 0.3})
    assert parts["total"] == pytest.approx(parts["dropout"] + parts["smoothing"] + parts["consistency"])


def test_a_metric_that_was_never_defined_has_no_regret():
    assert np.isnan(regret([{"pearson": float("nan")}], {"pearson": float("nan")})["pearson"])
    assert regret([{"pearson": float("nan")}], {"pearson": 0.5}) == {"pearson": 0.0}
    assert regret([{"pearson": None}], {"pearson": 0.5}) == {"pearson": 0.0}  # type: ignore[list-item]  # as JSON has it


@pytest.mark.usefixtures("fewer_draws")
def test_completions_of_one_prompt_are_drawn_together():
    """Half of what varies is the prompt's: by row the interval would be far too narrow."""
    draw = np.random.default_rng(2)
    covered = {"prompts": 0, "rows": 0}
    for seed in range(150):
        sides = []
        for _ in range(2):
            prompts = np.repeat(draw.normal(size=60), 8)
            sides.append((losses(5 + prompts + draw.normal(size=480)), np.repeat(np.arange(60), 8)))
        for name, (probe, validation) in (
            ("prompts", [rows.grouped(groups) for rows, groups in sides]),
            ("rows", [rows for rows, _ in sides]),
        ):
            low, high = gap_interval(probe, validation, seed) or (0, 0)
            covered[name] += low <= 0 <= high
    assert covered["prompts"] / 150 > 0.9
    assert covered["rows"] / 150 < 0.75


@pytest.mark.usefixtures("fewer_draws")
@pytest.mark.parametrize("rows", [3, 5, 10])
def test_few_rows_have_a_wide_interval(rows):
    draw = np.random.default_rng(rows)
    hits = 0
    for seed in range(300):
        change = change_interval(losses(np.zeros(rows)), losses(draw.normal(size=rows)), seed)
        assert change is not None
        hits += change[0] > 0
    assert hits / 300 < 0.06  # 2.5 in 100, as it should be; by percentiles alone 14 in 100 for three rows


def test_one_row_says_nothing():
    assert gap_interval(losses([1.0]), losses([2.0])) is None
    assert change_interval(losses([1.0]), losses([2.0])) is None
