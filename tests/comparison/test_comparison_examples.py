"""Shares of rows in a metric, against scikit-learn and scipy, against copies of rows, and against simulated truth."""

import numpy as np
import pytest
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from hkft.comparison.bootstrap import Pair, bootstrap
from hkft.comparison.examples import of_records

CLASSES = {2: ["no", "yes"], 4: ["d", "b", "c", "a"]}  # not in order of the alphabet
SCORES = {
    "accuracy": accuracy_score,
    "matthews_correlation": matthews_corrcoef,
    "f1": lambda x, y: (
        f1_score(x, y, average="binary", pos_label="yes")
        if set(x) <= {"no", "yes"}
        else f1_score(x, y, average="macro")
    ),
    "pearson": lambda x, y: pearsonr(x, y)[0],
    "mse": lambda x, y: np.mean((np.array(x) - np.array(y)) ** 2),
}
CASES = [("accuracy", 2), ("matthews_correlation", 2), ("matthews_correlation", 4), ("f1", 2), ("f1", 4)]
CASES += [("pearson", 0), ("mse", 0)]


def rows(classes: int, n: int = 60, seed: int = 0) -> tuple[list, list]:
    """Labels and predictions that agree more often than not."""
    rng = np.random.default_rng(seed)
    if not classes:
        labels = rng.normal(2.5, 1.5, n)
        return labels.tolist(), (labels * 0.7 + rng.normal(0, 1, n)).tolist()
    true = rng.integers(0, classes, n)
    decided = np.where(rng.random(n) < 0.6, true, rng.integers(0, classes, n))
    return [[CLASSES[classes][number] for number in each] for each in (true, decided)]


def records(labels, predictions):
    return [{"id": n, "label": x, "prediction": y} for n, (x, y) in enumerate(zip(labels, predictions, strict=True))]


@pytest.mark.parametrize(("metric", "classes"), CASES)
def test_the_mean_of_the_shares_is_the_metric(metric, classes):
    for seed in range(5):
        labels, predictions = rows(classes, seed=seed)
        found = of_records(records(labels, predictions), metric, CLASSES.get(classes))
        assert found.mean == pytest.approx(SCORES[metric](labels, predictions), abs=1e-12)
        assert found.ids == tuple(range(60))


@pytest.mark.parametrize(("metric", "classes"), CASES)
def test_a_share_is_what_one_more_of_its_row_does(metric, classes):
    """Of 50 copies of the set and one more of row i: (metric there - metric) * rows = share - metric, to first order."""
    labels, predictions = rows(classes)
    found = of_records(records(labels, predictions), metric, CLASSES.get(classes))
    for i in range(0, 60, 7):
        more = SCORES[metric](labels * 50 + [labels[i]], predictions * 50 + [predictions[i]])
        effect = (more - found.mean) * (50 * 60 + 1)
        assert effect == pytest.approx(found.values[i] - found.mean, abs=0.02)
    assert np.ptp(found.values) > 0.1


def test_a_class_that_nobody_names_counts_for_nothing():
    labels, predictions = ["a", "b", "a", "b"], ["a", "b", "b", "b"]
    found = of_records(records(labels, predictions), "f1", CLASSES[4])
    assert found.mean == pytest.approx(f1_score(labels, predictions, average="macro"))
    nobody = of_records(records(["no", "no"], ["no", "no"]), "f1", CLASSES[2])
    assert nobody.values.tolist() == [0, 0]


@pytest.mark.parametrize("metric", ["spearman", "calibration_error", "brier", "bleu"])
def test_metrics_without_shares(metric):
    assert of_records(records(*rows(2)), metric, CLASSES[2]) is None


def test_what_has_no_shares():
    assert of_records([], "accuracy") is None
    assert of_records(records([1.0, 2.0], [3.0, 3.0]), "pearson") is None  # constant: not defined
    assert of_records(records(*rows(2)), "f1") is None  # which class is the second nobody said


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("crossed", [True, False])
def test_a_bootstrap_of_correlations_finds_a_difference_at_its_rate(n, crossed):
    """Two methods of equal true correlation .64; seeds add noise of their own. p < 0.05 in about 5 % of 200 comparisons."""
    rng, N, found = np.random.default_rng(3), 300, 0
    for number in range(200):
        pairs, shared = {}, rng.normal(0, 1, N)
        hard = rng.normal(0, 0.8, N)
        for seed in range(n):
            labels, noise = (shared, hard) if crossed else (rng.normal(0, 1, N), rng.normal(0, 0.8, N))
            both = [
                of_records(records(labels, labels + noise + rng.normal(0, 0.9, N)), "pearson").values for _ in range(2)
            ]
            pairs[seed] = Pair(*both)
        found += bootstrap(pairs, crossed=crossed, draws=300, generator_seed=number).p < 0.05
    assert 1 <= found <= 20  # binomial(200, 0.05): outside with p < 0.002


def test_a_bootstrap_of_correlations_sees_a_true_difference():
    rng, pairs = np.random.default_rng(0), {}
    labels = rng.normal(0, 1, 500)
    for seed in range(5):
        better, worse = (
            of_records(records(labels, labels + rng.normal(0, noise, 500)), "pearson").values for noise in (0.5, 0.9)
        )
        pairs[seed] = Pair(better, worse)
    result = bootstrap(pairs, crossed=True)
    assert 0.1 < result.low < result.high < 0.2  # .894 - .743 = .151
    assert result.p < 0.01
