"""Curve shapes and their verdicts, then the error rates of the verdict under known noise."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from hkft.diagnostics.curve import Point
from hkft.diagnostics.verdict import Verdict, show, verdict

NAN = float("nan")
LORA_TRAIN = [0.405, 0.256, 0.171, 0.095, 0.035, 0.030]  # plain LoRA on Rotten Tomatoes, epochs 1 to 6
LORA_VALIDATION = [0.475, 0.468, 0.506, 0.691, 0.692, 0.724]
LORA_ACCURACY = [0.792, 0.797, 0.788, 0.777, 0.778, 0.773]


def curve(train, validation, metric=None, eval_mode=True, name="accuracy"):
    values = [{name: value} for value in metric] if metric is not None else [{}] * len(train)
    rows = zip(train, validation, values, strict=True)
    return [Point(63 * (n + 1), float(t), float(v), m, eval_mode) for n, (t, v, m) in enumerate(rows)]


def test_plain_lora_overfits_and_the_sentence_also_says_that_it_memorised():
    assert verdict(curve(LORA_TRAIN, LORA_VALIDATION, LORA_ACCURACY), metric="accuracy") == Verdict(
        "overfitting",
        126,
        "high",
        "Overfitting since step 126: validation loss rose from 0.468 to 0.724 while the loss on training rows fell "
        "from 0.256 to 0.030, nearly memorised (gap 0.694).",
    )


def test_hiddenkey_on_the_same_rows_is_healthy():
    train, validation = [0.55, 0.43, 0.35, 0.29, 0.26, 0.241], [0.53, 0.49, 0.48, 0.478, 0.474, 0.476]
    assert verdict(curve(train, validation), metric=None).as_dict() == {
        "name": "healthy",
        "since_step": None,
        "confidence": "high",
        "text": "Healthy: validation loss is 0.476, within noise of its lowest, 0.474 at step 315, while the loss on "
        "training rows fell from 0.550 to 0.241 (gap 0.235).",
        "cause": None,
    }


FALLING = [0.6, 0.5, 0.4, 0.3, 0.25, 0.2]
SHAPES = {
    "still falling": (FALLING, [0.7, 0.6, 0.52, 0.48, 0.46, 0.45], "healthy", None),
    "falls, then a plateau": (FALLING, [0.7, 0.55, 0.5, 0.5, 0.5, 0.5], "healthy", None),
    "a plateau from the first evaluation": (FALLING, [0.5] * 6, "healthy", None),
    "a rise of 2 %": (FALLING, [0.55, 0.5, 0.5, 0.505, 0.505, 0.51], "healthy", None),
    "a large scale": ([600.0, 500, 400, 300, 250, 200], [700.0, 600, 520, 480, 460, 450], "healthy", None),
    "rises from the first evaluation": (FALLING, [0.5, 0.55, 0.6, 0.7, 0.8, 0.9], "overfitting", 63),
    "a late turn": (FALLING, [0.7, 0.5, 0.4, 0.39, 0.45, 0.52], "overfitting", 252),
    "train rests, validation rises": (
        [0.6, 0.2, 0.2, 0.2, 0.2],
        [0.5, 0.4, 0.5, 0.6, 0.7],
        "overfitting",
        126,
    ),
    "four evaluations": ([0.4, 0.26, 0.17, 0.1], [0.47, 0.46, 0.51, 0.69], "overfitting", 126),
    "memorised without a turn": ([0.5, 0.2, 0.05, 0.01, 0.01], [0.5, 0.45, 0.45, 0.45, 0.45], "memorising", 252),
    "memorised before the first look": ([0.02, 0.01, 0.01, 0.01], [0.7, 0.7, 0.7, 0.7], "memorising", 63),
    "near zero on both sides": ([0.5, 0.1, 0.01, 0.001, 0.001], [0.5, 0.11, 0.03, 0.012, 0.012], "healthy", None),
    "neither moves": ([0.69] * 6, [0.69] * 6, "underfitting", None),
    "both rise from the start": ([0.5, 0.6, 0.7, 0.8], [0.5, 0.6, 0.7, 0.8], "underfitting", None),
    "both fall, then both rise": ([0.5, 0.3, 0.2, 0.4, 0.6, 0.8], [0.5, 0.4, 0.35, 0.5, 0.7, 0.9], "unclear", None),
    "one lucky evaluation": ([0.9, 0.4, 0.2, 0.15], [0.9, 0.4, 0.9, 0.9], "unclear", None),
    "two evaluations": ([0.5, 0.4], [0.5, 0.55], "unclear", None),
    "three evaluations, falling": ([0.5, 0.4, 0.3], [0.5, 0.45, 0.4], "unclear", None),
    "three evaluations, overwhelming": ([0.6, 0.3, 0.1], [0.5, 0.7, 1.0], "overfitting", 63),
    "an evaluation without a loss": ([0.6, NAN, *FALLING[1:]], [0.7, NAN, 0.6, 0.5, 0.47, 0.46, 0.45], "healthy", None),
}


@pytest.mark.parametrize(("train", "validation", "name", "since"), SHAPES.values(), ids=SHAPES)
def test_a_shape_has_its_name(train, validation, name, since):
    found = verdict(curve(train, validation), metric=None)
    assert (found.name, found.since_step) == (name, since), found.text


@pytest.mark.parametrize(("points", "cause"), [([], None), ([Point(1, NAN, 0.5)], "rate")])
def test_nothing_finite_is_unclear(points, cause):
    text = "Unclear: there is no evaluation with a finite loss on both sides."
    assert verdict(points, metric=None) == Verdict("unclear", None, "low", text, cause)


def test_one_evaluation_is_counted_as_one():
    text = "Unclear: 1 evaluation cannot show a trend, it takes 4 (gap 0.100 at the last)."
    assert verdict(curve([0.4], [0.5]), metric=None).text == text


def test_the_loss_overfits_while_decisions_improve():
    found = verdict(curve(LORA_TRAIN, LORA_VALIDATION, [0.78, 0.797, 0.80, 0.81, 0.815, 0.82]), metric="accuracy")
    assert (found.name, found.since_step) == ("loss-overfitting", 126)
    assert "not in the decisions" in found.text
    assert "validation accuracy still improved from 0.797 to 0.820" in found.text


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("mse", [0.5, 0.45, 0.42, 0.4, 0.38, 0.36], "loss-overfitting"),  # an error that falls improves
        ("mse", [0.5, 0.45, 0.5, 0.55, 0.6, 0.7], "overfitting"),
        ("accuracy", [0.797] * 6, "overfitting"),  # flat is not rising
        ("accuracy", [0.79, 0.80, NAN, 0.82, 0.83, 0.84], "overfitting"),
    ],
)
def test_the_metric_counts_in_its_own_direction(name, values, expected):
    found = verdict(curve(LORA_TRAIN, LORA_VALIDATION, values, name=name), metric=name)
    assert found.name == expected


def test_a_foreign_curve_is_never_said_to_memorise():
    train, validation, _, _ = SHAPES["memorised without a turn"]
    found = verdict(curve(train, validation, eval_mode=False), metric=None)
    assert found.name == "healthy"
    assert "the training loss fell" in found.text
    assert "memoris" not in verdict(curve(LORA_TRAIN, LORA_VALIDATION, eval_mode=False), metric=None).text


def test_the_order_of_the_points_does_not_matter():
    points = curve(LORA_TRAIN, LORA_VALIDATION)
    assert verdict(points[::-1], metric=None) == verdict(points, metric=None)


def names(train, validation, noise, count=100):
    """How often each name is given when both curves of 20 evaluations carry relative normal noise."""
    rng = np.random.default_rng(20)
    tries = range(count)
    shaken = [
        (train * (1 + noise / 2 * rng.normal(size=20)), validation * (1 + noise * rng.normal(size=20))) for _ in tries
    ]
    return Counter(verdict(curve(*pair), metric=None).name for pair in shaken)


STEPS = np.arange(20)
LEARNS = 0.05 + 0.5 * np.exp(-STEPS / 5)


@pytest.mark.parametrize("noise", [0.01, 0.03, 0.06])
def test_noise_alone_is_rarely_called_overfitting(noise):
    assert names(LEARNS + 0.15, np.full(20, 0.5), noise)["overfitting"] <= 8  # of 100
    assert names(LEARNS + 0.15, 0.4 + LEARNS / 2, noise)["overfitting"] <= 5


@pytest.mark.parametrize("noise", [0.01, 0.03, 0.06])
def test_a_clear_turn_is_found_through_noise(noise):
    assert names(LEARNS, 0.5 + 0.02 * np.abs(STEPS - 6), noise)["overfitting"] >= 98


def test_a_turn_lost_in_noise_is_unclear_rather_than_healthy():
    found = names(LEARNS + 0.05, 0.5 + 0.005 * np.maximum(0, STEPS - 6), 0.1)
    assert found["unclear"] > found["healthy"]


def test_flat_noisy_training_is_underfitting():
    assert names(np.full(20, 0.69), np.full(20, 0.69), 0.03)["underfitting"] >= 98


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.468, "0.468"), (0.0, "0.000"), (0.00012345, "0.000123"), (12345.0, "1.23e+04"), (NAN, "nan")],
)
def test_numbers_keep_three_digits_at_any_scale(number, text):
    assert show(number) == text


# --- what the rows allow to be said -----------------------------------------------------------------------------------


def measured(train, validation, gap=None, p=None, eval_mode=True):
    points = curve(train, validation, eval_mode=eval_mode)
    return [*points[:-1], replace(points[-1], gap_interval=gap, rise_p=p)]


def test_a_rise_that_other_rows_might_not_show_is_no_turn():
    late = [0.7, 0.5, 0.4, 0.39, 0.45, 0.52]
    assert verdict(measured(FALLING, late, p=0.02)).name == "overfitting"
    luck = verdict(measured(FALLING, late, p=0.03))
    assert luck.name == "unclear"
    assert luck.cause == "rows"
    assert "with so few validation rows that may be luck" in luck.text


def test_overwhelming_needs_the_rows_too():
    points = curve([1.0, 0.5, 0.3], [1.0, 0.8, 1.3])
    assert verdict(points).name == "overfitting"
    assert verdict([*points[:-1], replace(points[-1], rise_p=0.2)]).name == "unclear"


@pytest.mark.parametrize("lost", [NAN, float("inf")])
def test_a_curve_that_ends_without_a_finite_loss_has_diverged(lost):
    found = verdict(curve([0.69, 0.5, 0.4, 0.3, lost, lost], [0.69, 0.6, 0.55, 0.5, 0.6, lost]))
    assert (found.name, found.cause) == ("unclear", "rate")
    assert found.text.startswith("Unclear: training diverged, a loss is not finite after step 252")
    assert verdict(curve([0.69, 0.5, lost, 0.3, 0.2, 0.1], [0.69, 0.6, lost, 0.5, 0.45, 0.4])).name == "healthy"


def test_a_run_that_only_made_the_model_worse_is_told_so():
    points = curve([0.5, 0.3, 0.2, 0.1, 0.05, 0.02], [0.5, 0.6, 0.8, 1.0, 1.2, 1.4])
    worse = verdict([replace(point, step=63 * n) for n, point in enumerate(points)])
    assert (worse.name, worse.since_step) == ("overfitting", 0)
    assert worse.text.endswith("No evaluation was better than the model before training.")
    assert "before training" not in verdict(points).text  # of which nothing is known


def test_training_that_went_up_is_told_to_have_too_high_a_rate():
    found = verdict(curve([0.69, 0.76, 1.03, 0.70, 0.72, 0.69], [0.69, 0.75, 1.0, 0.69, 0.71, 0.69]))
    assert (found.name, found.cause) == ("underfitting", "rate")
    assert "the learning rate is probably too high" in found.text


def test_training_that_hardly_moved_is_told_to_have_too_low_a_rate():
    still = verdict(curve([0.69310, 0.69305, 0.69309, 0.69302, 0.69300], [0.6931] * 5))
    assert (still.name, still.cause) == ("underfitting", "still")
    assert still.text.endswith("It hardly moved: the learning rate is probably far too low.")
    assert verdict(curve([0.693, 0.690, 0.689, 0.688, 0.686], [0.693] * 5)).cause is None
    assert verdict(curve([NAN, NAN], [NAN, 0.5])).cause == "rate"


def test_what_does_not_carry_over_is_not_healthy():
    train, validation = [0.69, 0.5, 0.3, 0.2, 0.15, 0.12], [0.69, 0.69, 0.692, 0.688, 0.69, 0.69]
    before = [replace(point, step=63 * n) for n, point in enumerate(curve(train, validation))]
    found = verdict(before)
    assert (found.name, found.cause) == ("unclear", "nothing")
    assert "nothing of it carries over" in found.text
    assert verdict(curve(train, validation)).name == "healthy"  # what it was before training is not known


def test_a_wide_gap_is_said_of_a_healthy_run():
    train, validation = [0.69, 0.5, 0.4, 0.3, 0.2, 0.125], [0.69, 0.55, 0.5, 0.48, 0.476, 0.476]
    found = verdict(measured(train, validation, gap=(0.24, 0.47)))
    assert (found.name, found.cause) == ("healthy", "gap")
    assert "The gap is wide" in found.text
    assert verdict(measured(train, validation, gap=(-0.1, 0.8))).cause is None


def test_the_gap_is_told_with_its_interval():
    found = verdict(measured(LORA_TRAIN, LORA_VALIDATION, gap=(0.61, 0.78), p=0.001))
    assert found.text.endswith("(gap 0.694, 95 % 0.610 to 0.780).")


@pytest.mark.parametrize(
    ("gap", "eval_mode", "confidence"),
    [
        (None, True, "high"),
        ((0.6, 0.8), True, "high"),
        ((0.4, 1.0), True, "medium"),  # a dozen rows
        (None, False, "medium"),
        ((0.4, 1.0), False, "low"),
    ],
)
def test_confidence_is_lower_with_few_rows_and_without_a_probe(gap, eval_mode, confidence):
    assert verdict(measured(LORA_TRAIN, LORA_VALIDATION, gap=gap, eval_mode=eval_mode)).confidence == confidence


def test_an_accuracy_that_rises_within_luck_is_no_reprieve():
    """The loss has turned; whether the decisions still improve cannot be told from so few rows."""
    points = curve(LORA_TRAIN, LORA_VALIDATION, [0.70, 0.72, 0.74, 0.76, 0.78, 0.80])
    assert verdict(points, metric="accuracy").name == "loss-overfitting"
    for interval, name in (((0.02, 0.14), "loss-overfitting"), ((-0.02, 0.18), "overfitting")):
        found = verdict([*points[:-1], replace(points[-1], accuracy_interval=interval)], metric="accuracy")
        assert found.name == name
    assert found.text.endswith("Accuracy, 0.720 then and 0.800 now, differs by no more than other rows might give.")
