import json
import math

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, log_loss

from hkft.diagnostics.calibration import Bin, brier, calibration, expected_calibration_error, temperature

BOUNDS = (0.05, 20.0)


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def calibrated(n: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels drawn from their own probabilities."""
    generator = np.random.default_rng(seed)
    logits = 2 * generator.normal(size=(n, classes))
    labels = (softmax(logits).cumsum(1)[:, :-1] < generator.random((n, 1))).sum(1)
    return logits, labels


def of(*probabilities: float) -> np.ndarray:
    """Logits of two classes with these probabilities of the second."""
    p = np.array(probabilities)
    return np.stack([np.log1p(-p), np.log(p)], axis=1)


def test_the_losses_are_those_of_scikit_learn():
    logits, labels = calibrated(500, 4)
    ours = calibration(logits, labels)
    assert ours.nll == pytest.approx(log_loss(labels, softmax(logits), labels=range(4)))
    two, which = calibrated(500, 2)
    assert brier(two, which) == pytest.approx(2 * brier_score_loss(which, softmax(two)[:, 1]))
    assert calibration(two, which).brier == brier(two, which)


def test_brier_of_three_classes_by_hand():
    logits = np.log([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]])
    assert brier(logits, np.array([0, 2])) == pytest.approx((0.25 + 0.09 + 0.04 + 0.01 + 0.64 + 0.81) / 2)


def test_brier_runs_from_0_to_2_and_chance_is_one_less_a_class():
    sure = np.eye(3) * 1e4
    assert brier(sure, np.arange(3)) == 0
    assert brier(sure, np.array([1, 2, 0])) == 2
    assert brier(np.zeros((5, 3)), np.arange(5) % 3) == pytest.approx(1 - 1 / 3)


def test_the_bins_and_the_error_by_hand():
    logits = of(0.9, 0.95, 0.3, 0.2)  # confidence 0.9, 0.95, 0.7, 0.8
    labels = np.array([1, 0, 0, 0])
    ours = calibration(logits, labels, bins=5)
    low, high = ours.bins
    assert (low.low, low.high, low.count, low.accuracy) == (0.6, 0.8, 2, 1.0)
    assert (high.low, high.high, high.count, high.accuracy) == (0.8, 1.0, 2, 0.5)
    assert (low.confidence, high.confidence) == pytest.approx((0.75, 0.925))
    assert ours.calibration_error == pytest.approx((2 * 0.25 + 2 * 0.425) / 4)
    assert expected_calibration_error(logits, labels, bins=5) == ours.calibration_error


def test_an_edge_belongs_to_the_bin_below_it_and_a_tie_to_the_first_class():
    ours = calibration(np.zeros((4, 2)), np.array([0, 0, 0, 1]), bins=2)
    assert ours.bins == (Bin(0.0, 0.5, 0.5, 0.75, 4),)
    assert ours.calibration_error == 0.25


def test_every_row_is_in_one_bin():
    ours = calibration(*calibrated(1000, 3), bins=7)
    assert sum(b.count for b in ours.bins) == 1000
    assert all(b.low < b.confidence <= b.high and b.count for b in ours.bins)


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_logits_of_a_calibrated_model_times_a_factor_have_that_temperature(classes, factor):
    logits, labels = calibrated(20_000, classes)
    ours = calibration(logits * factor, labels)
    assert ours.temperature == pytest.approx(factor, rel=0.03)
    assert ours.calibration_error_after < 0.015
    assert (ours.calibration_error < 0.015) == (factor == 1)


def test_no_temperature_nearby_is_better():
    logits, labels = calibrated(300, 3)
    best = temperature(3 * logits, labels)
    losses = [log_loss(labels, softmax(3 * logits / (best * change))) for change in (0.99, 1, 1.01)]
    assert losses[1] == min(losses)


def test_the_error_after_is_not_measured_on_the_rows_of_the_fit():
    """One row right, one wrong, both sure of it: each half's fit goes to its bound, which is wrong for the other."""
    logits, labels = of(0.9, 0.9), np.array([1, 0])
    assert expected_calibration_error(logits / temperature(logits, labels), labels) < 0.03
    timid = softmax(logits[:1] / BOUNDS[1]).max()  # of the right row, scaled as the wrong one wants it
    assert calibration(logits, labels).calibration_error_after == pytest.approx(((1 - timid) + 1) / 2)


def test_the_halves_are_drawn_by_a_seed_not_by_the_order_of_the_rows():
    """Rows sorted by their true temperature: drawn halves both have some of each, halves in order would not."""
    logits, labels = calibrated(4000, 2)
    logits[:2000] *= 3
    ours = calibration(logits, labels)
    assert ours == calibration(logits, labels)
    best = expected_calibration_error(logits / ours.temperature, labels)
    assert ours.calibration_error_after == pytest.approx(best, abs=0.01)


def test_a_temperature_at_the_bound_where_none_inside_is_better():
    logits, labels = 4 * np.eye(3), np.arange(3)
    assert temperature(logits, labels) == BOUNDS[0]
    assert temperature(logits, np.array([1, 2, 0])) == BOUNDS[1]


def test_a_temperature_of_1_where_none_is_better():
    assert temperature(400 * np.eye(3), np.arange(3)) == 1


@pytest.mark.parametrize(
    ("logits", "labels", "nll", "error"),
    [
        (np.array([[3.0], [-2.0]]), np.array([0, 0]), 0.0, 0.0),
        (np.zeros((4, 2)), np.array([0, 1, 0, 1]), math.log(2), 0.0),
        (1e4 * np.eye(2), np.arange(2), 0.0, 0.0),
    ],
    ids=["one class", "equal logits", "certain and right"],
)
def test_a_temperature_that_changes_no_loss_is_not_a_number(logits, labels, nll, error):
    ours = calibration(logits, labels)
    assert math.isnan(ours.temperature)
    assert math.copysign(1, ours.nll) == 1  # 0.0, not -0.0
    assert (ours.nll, ours.calibration_error, ours.calibration_error_after) == pytest.approx((nll, error, error))


def test_certain_and_wrong():
    ours = calibration(np.array([[1e4, 0.0]] * 4), np.ones(4, int))
    assert (ours.nll, ours.brier, ours.calibration_error, ours.temperature) == (1e4, 2.0, 1.0, BOUNDS[1])


def test_one_row_has_no_halves():
    ours = calibration(of(0.8), np.array([1]))
    assert ours.calibration_error == pytest.approx(0.2)
    assert math.isnan(ours.calibration_error_after)


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        (np.zeros((0, 2)), np.zeros(0, int)),
        (np.array([[np.inf, 0.0]]), np.array([0])),
        (of(0.5) * np.nan, np.array([0])),
    ],
    ids=["no rows", "inf", "nan"],
)
def test_nothing_is_said_of_no_rows_and_of_logits_that_are_no_numbers(logits, labels):
    ours = calibration(logits, labels)
    numbers = [ours.nll, ours.brier, ours.calibration_error, ours.temperature, ours.calibration_error_after]
    alone = [brier(logits, labels), expected_calibration_error(logits, labels), temperature(logits, labels)]
    assert np.isnan([*numbers, *alone]).all()
    assert ours.bins == ()


def test_half_precision_and_the_callers_logits_stay_as_they_are():
    logits, labels = calibrated(200, 3)
    half = logits.astype(np.float16)
    before = half.copy()
    assert calibration(half, labels) == calibration(half.astype(np.float64), labels)
    assert (half == before).all()


def test_as_a_dict_it_is_json():
    ours = calibration(*calibrated(50, 3))
    read = json.loads(json.dumps(ours.as_dict()))
    assert read["temperature"] == ours.temperature
    assert [Bin(**b) for b in read["bins"]] == list(ours.bins)
