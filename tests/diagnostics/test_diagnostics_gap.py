import pytest

from hkft.diagnostics.gap import gap, main_metric


def test_a_positive_gap_is_always_a_worse_validation():
    probe = {"loss": 0.03, "accuracy": 0.993, "perplexity": 1.5, "mae": 0.1}
    validation = {"loss": 0.724, "accuracy": 0.773, "perplexity": 2.5, "mae": 0.4}
    assert gap(probe, validation) == pytest.approx({"loss": 0.694, "accuracy": 0.22, "perplexity": 1.0, "mae": 0.3})


def test_only_what_both_sides_have_is_compared():
    assert gap({"loss": 1.0, "f1": 0.5}, {"loss": 1.5, "accuracy": 0.9}) == {"loss": 0.5}


def test_each_task_has_one_main_metric():
    assert [main_metric(task) for task in ("classification", "regression")] == ["accuracy", "pearson"]
