import math

import numpy as np
import pytest

from hkft.diagnostics.curve import Point, from_records, level_of_end, level_of_lowest, rise, rises
from hkft.errors import DataError
from hkft.events import Evaluated, TrainStep, as_record


def evaluated(step: int, probe: float, validation: float) -> dict:
    return as_record(
        Evaluated(
            step, step / 63, {"loss": probe, "accuracy": 0.9}, {"loss": validation, "accuracy": 0.8}, {}, True, 1.0
        )
    )


def test_the_eval_records_of_a_run_become_points_in_order():
    training = as_record(TrainStep(1, 126, 0.0, 0.7, 0.7, None, 1e-3, 10.0, 100.0))
    assert from_records([training, evaluated(126, 0.2, 0.5), evaluated(63, 0.4, 0.4)]) == [
        Point(63, 0.4, 0.4, {"accuracy": 0.8}),
        Point(126, 0.2, 0.5, {"accuracy": 0.8}),
    ]


def test_a_step_evaluated_again_after_a_resume_counts_once():
    assert [p.validation_loss for p in from_records([evaluated(63, 0.4, 0.4), evaluated(63, 0.4, 0.6)])] == [0.6]


def test_a_null_loss_is_not_a_number():
    record = {"event": "eval", "step": 1, "train_probe": {"loss": None}, "validation": {"loss": 0.5}}
    assert math.isnan(from_records([record])[0].train_loss)


def test_a_record_without_a_loss_says_what_is_there_and_what_is_expected():
    with pytest.raises(DataError) as caught:
        from_records([{"event": "eval", "step": 63, "eval_loss": 0.4}])
    assert str(caught.value) == (
        "eval record at step 63: an evaluation in this file cannot be read\n"
        "  found: event, step, eval_loss\n"
        "  allowed: step, train_probe.loss and validation.loss, as `hkft train` writes them"
    )


def test_the_rises_of_many_curves_are_each_that_of_its_levels():
    draw = np.random.default_rng(0)
    for looks in (1, 2, 3, 4, 9):
        curves = draw.normal(size=(200, looks))
        alone = [level_of_end(each, int(each.argmin())) - level_of_lowest(each) for each in curves]
        assert rises(curves).tolist() == alone == [rise(each) for each in curves]
