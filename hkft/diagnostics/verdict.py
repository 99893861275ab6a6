"""What a training curve says about overfitting, in one word and one sentence.

The names, and when each is given. The first that holds, from the top, is the verdict:

    unclear           the last losses are not finite: training diverged
    unclear           fewer than 4 evaluations, unless they are overwhelming: validation loss half as high again as at
                      its lowest, and the train loss halved
    overfitting       validation loss has turned while train loss falls
    loss-overfitting  the same, but the task's metric on validation still rises: the model grows too sure of itself,
                      its decisions still improve
    memorising        probe loss near zero with a wide gap, and validation loss has *not* turned. Eval mode only: never
                      said of a foreign curve, which has no probe
    unclear           both losses fell, and both rise since the turn: training is unstable
    underfitting      train loss itself does not fall
    unclear           noise, or the number of rows, hides whether validation loss has turned
    unclear           train loss falls, and validation loss never came down from where it was before training
    healthy           train loss falls, and validation loss is at its lowest or within noise of it

Why overfitting goes before memorising, where both are true: a turn has a step, so there is something to do at once
(take the checkpoint of that step, train no longer). Memorising without a turn has no better step to go back to: what
helps is dropout, more rows, a lower rank. Where both hold, the sentence says both.

Uncertainty. hkft knows the loss of every row at every look, and so how far a mean over these rows may be off (bootstrap,
95 %, see `uncertainty`). A rise of validation loss that so many rows would show in more than 2.5 % of all cases although
the loss never rises is no turn, whatever the curve looks like: on these rows it cannot be told from luck. A gap whose
interval is wider than half the validation loss lowers the confidence. A curve of another tool has
neither: its confidence is lowered too.

How it is decided. Every rule weighs the size of a change against the noise of its own curve; no single number decides.

noise       standard deviation of a curve about the best fit that falls to its lowest point and rises after it. The
            degrees of freedom are the evaluations less the levels of that fit. At least 2 % of the curve's level,
            because few points always fit well.
level       of the lowest point: the median of it and its two neighbours, so that one lucky evaluation is not a turn. Of
            the end: the median of the last third of the evaluations that follow the lowest.
turned      the end lies 5 % or more above the lowest; no luck of the rows, where they are known (one-sided p <= 0.025, the
            lowest point chosen again in every draw); and either 4 times the noise above it with two or more evaluations
            since, or twice the noise with a rising trend since (Kendall's tau, one-sided p <= 0.05).
falls       the train loss ends 5 % or more, and twice its noise, below its first evaluation; or its trend over all
            evaluations falls (p <= 0.05) and it ends 5 % below.
near zero   the probe loss is at most a tenth of the lowest validation loss: a ratio, as each task has its own unit.
wide        the gap is at least a quarter of the larger of the first two losses.
rises       the metric at the end is above the metric at the turn by more than its noise (for errors, where lower is
            better: below); of an accuracy, whose rows are known, so that the interval of its change lies above 0 too.
confidence  "low" below 4 evaluations; "high" from 6 on where trend and size agree; otherwise "medium". One less for a
            curve that was not measured in eval mode, and one less where the gap is uncertain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from hkft.diagnostics.curve import Point, level_of_end, level_of_lowest, rise
from hkft.diagnostics.gap import LOWER_IS_BETTER

Name = Literal["healthy", "underfitting", "overfitting", "loss-overfitting", "memorising", "unclear"]
Confidence = Literal["low", "medium", "high"]

ENOUGH = 4  # evaluations
MATERIAL = 0.05  # of the level
NOISE_FLOOR = 0.02  # of the level
NEAR_ZERO = 0.1  # of the lowest validation loss
WIDE = 0.25  # of the larger of the first losses
STILL = 1e-3  # of the first train loss
SIGNIFICANT = 0.05
LUCK = 0.025  # the p of a rise of so many rows: one side of an interval of 95 %
UNCERTAIN = 0.5  # of the validation loss: the width of the gap's interval


@dataclass(frozen=True, slots=True)
class Verdict:
    """A name of the module's table, and why.

    since_step: overfitting and loss-overfitting: the step where validation loss was lowest, the turn. Memorising: the
        first evaluation from which on it holds. Otherwise None.
    text: one plain sentence with the numbers.
    cause: what stands behind it, for `advice`: "rate" (training went up instead of down), "still" (it hardly moved), "rows"
        (too few to tell), "nothing" (nothing of what was learned carries over), "gap" (healthy, but for a wide gap); else
        None.
    """

    name: Name
    since_step: int | None
    confidence: Confidence
    text: str
    cause: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def verdict(curve: Sequence[Point], *, metric: str | None = None) -> Verdict:
    """The verdict on a curve, by the rules above.

    metric: the task's metric, which tells confidence from decisions; None leaves it out.
    Evaluations whose losses are not finite do not count, unless they are the last.
    """
    finite = [point for point in curve if math.isfinite(point.train_loss) and math.isfinite(point.validation_loss)]
    if not finite:
        text = "Unclear: there is no evaluation with a finite loss on both sides."
        return Verdict("unclear", None, "low", text, "rate" if curve else None)
    finite.sort(key=lambda point: point.step)
    if finite[-1].step < max(point.step for point in curve):
        return _diverged(finite[-1])
    shape = _Shape(finite, metric)
    if len(finite) < ENOUGH:
        return _of_few(shape)
    if shape.turned and shape.train_keeps_falling:
        return _overfitting(shape)
    if shape.memorised:
        return _memorising(shape)
    if shape.turned and shape.train_fell_until_the_turn:
        return _unstable(shape)
    if not shape.train_falls:
        return _underfitting(shape)
    if shape.hidden_by_noise:
        return _noisy(shape)
    if shape.nothing_carries_over:
        return _nothing(shape)
    return _healthy(shape)


class _Shape:
    """What is measured of a curve of one or more points; the terms are those of the module's docstring."""

    def __init__(self, points: Sequence[Point], metric: str | None) -> None:
        self.points = points
        self.metric = metric
        self.train = np.array([point.train_loss for point in points])
        self.validation = np.array([point.validation_loss for point in points])
        self.turn = int(self.validation.argmin())
        self.eval_mode = all(point.eval_mode for point in points)

    @cached_property
    def noise(self) -> float:
        return _noise(self.validation, self.turn)

    @cached_property
    def rise(self) -> float:
        """Level of the end less level of the lowest validation loss."""
        return rise(self.validation)

    @cached_property
    def trend(self) -> float:
        """One-sided p of a rising validation loss since its lowest."""
        return _rising(self.validation[self.turn :])

    @property
    def material(self) -> bool:
        return self.rise >= MATERIAL * abs(level_of_lowest(self.validation))

    @property
    def turned(self) -> bool:
        since = len(self.points) - 1 - self.turn
        by_size = self.rise >= 4 * self.noise and since >= 2
        by_trend = self.rise >= 2 * self.noise and self.trend <= SIGNIFICANT
        return self.material and self.beyond_luck and (by_size or by_trend)

    @property
    def beyond_luck(self) -> bool:
        """Whether other validation rows would show the rise as well."""
        p = self.points[-1].rise_p
        return p is None or p <= LUCK

    @cached_property
    def train_falls(self) -> bool:
        first, end = self.train[0], level_of_end(self.train, 0)
        fall = first - end
        noise = _noise(self.train, int(self.train.argmin()))
        return fall >= MATERIAL * abs(first) and (fall >= 2 * noise or _rising(-self.train) <= SIGNIFICANT)

    @property
    def train_keeps_falling(self) -> bool:
        """Fell, and has not come up again since the turn by more than its noise."""
        since = level_of_end(self.train, self.turn) - self.train[self.turn]
        return self.train_falls and since <= 2 * _noise(self.train, int(self.train.argmin()))

    @property
    def train_fell_until_the_turn(self) -> bool:
        return bool(self.train[0] - self.train[self.turn] >= MATERIAL * abs(self.train[0]))

    @cached_property
    def memorised_at(self) -> list[bool]:
        near = self.train <= NEAR_ZERO * self.validation.min()
        wide = self.validation - self.train >= WIDE * max(self.train[0], self.validation[0])
        return list(near & wide)

    @property
    def memorised(self) -> bool:
        return self.eval_mode and len(self.points) > 1 and self.memorised_at[-1]

    @property
    def nothing_carries_over(self) -> bool:
        """The curve begins before training, and validation has not come down from there, materially or beyond its noise."""
        fall = self.validation[0] - level_of_lowest(self.validation)
        return self.points[0].step == 0 and (fall < MATERIAL * abs(self.validation[0]) or fall < 2 * self.noise)

    @property
    def wide_gap(self) -> bool:
        """By the rows a gap beyond luck, and a quarter of where the losses began."""
        interval = self.points[-1].gap_interval
        wide = self.validation[-1] - self.train[-1] >= WIDE * max(self.train[0], self.validation[0])
        return bool(wide and interval is not None and interval[0] > 0)

    @property
    def hidden_by_noise(self) -> bool:
        """A material rise without evidence, one lucky evaluation, or noise that drowns rise and fall alike."""
        level = level_of_lowest(self.validation)
        lucky = level_of_end(self.validation, self.turn) - self.validation[self.turn]
        drowned = self.noise > 2 * MATERIAL * abs(level) and self.validation[0] - level < 4 * self.noise
        return self.material or drowned or lucky >= max(4 * self.noise, MATERIAL * abs(level))

    @cached_property
    def metric_change(self) -> tuple[float, float] | None:
        """The metric at the turn and at the end, if it rises between them by more than its noise."""
        if self.metric is None or any(self.metric not in point.metrics for point in self.points):
            return None
        values = np.array([point.metrics[self.metric] for point in self.points])
        if not np.isfinite(values).all():
            return None
        sign = 1 if self.metric in LOWER_IS_BETTER else -1  # the noise is measured about a curve that falls
        noise = _noise(sign * values, int((sign * values).argmin()), floor=NOISE_FLOOR / 4)
        better = -sign * (level_of_end(values, self.turn) - values[self.turn])
        if self.accuracy_may_be_luck:
            return None
        return (values[self.turn], values[-1]) if better > noise else None

    @property
    def accuracy_may_be_luck(self) -> bool:
        """Whether other validation rows might show no change of accuracy since the loss was lowest."""
        interval = self.points[-1].accuracy_interval
        return self.metric == "accuracy" and interval is not None and interval[0] <= 0 <= interval[1]

    @property
    def at(self) -> int:
        return self.points[self.turn].step

    @property
    def rows(self) -> str:
        return "the loss on training rows" if self.eval_mode else "the training loss"

    @property
    def gap(self) -> str:
        """The last one, in words; between which values it lies, where that is known."""
        interval = self.points[-1].gap_interval
        between = f", 95 % {show(interval[0])} to {show(interval[1])}" if interval else ""
        return f"gap {show(self.validation[-1] - self.train[-1])}{between}"

    @property
    def uncertain_gap(self) -> bool:
        interval = self.points[-1].gap_interval
        return interval is not None and interval[1] - interval[0] > UNCERTAIN * abs(self.validation[-1])

    def confidence(self, sure: bool) -> Confidence:
        levels: tuple[Confidence, ...] = ("low", "medium", "high")
        level = 0 if len(self.points) < ENOUGH else 2 if sure and len(self.points) >= 6 else 1
        return levels[max(0, level - (not self.eval_mode) - self.uncertain_gap)]


def _diverged(last: Point) -> Verdict:
    text = (
        f"Unclear: training diverged, a loss is not finite after step {last.step}, where train was "
        f"{show(last.train_loss)} and validation {show(last.validation_loss)}."
    )
    return Verdict("unclear", None, "high", text, "rate")


def _of_few(shape: _Shape) -> Verdict:
    risen = shape.validation[-1] >= 1.5 * shape.validation.min()
    halved = shape.train[-1] <= 0.5 * shape.train[0]
    if risen and halved and shape.beyond_luck:
        return _overfitting(shape)
    if shape.memorised:
        return _memorising(shape)
    count = f"{len(shape.points)} evaluation{'s' * (len(shape.points) > 1)}"
    text = f"Unclear: {count} cannot show a trend, it takes {ENOUGH} ({shape.gap} at the last)."
    return Verdict("unclear", None, "low", text)


def _overfitting(shape: _Shape) -> Verdict:
    before, after = shape.train[shape.turn], shape.train[-1]
    moved = f"fell from {show(before)} to {show(after)}" if after < before else f"stayed near {show(after)}"
    nearly = ", nearly memorised" if shape.memorised else ""
    losses = f"validation loss rose from {show(shape.validation[shape.turn])} to {show(shape.validation[-1])}"
    confidence = shape.confidence(shape.trend <= SIGNIFICANT and shape.rise >= 3 * shape.noise)
    if shape.metric_change:
        start, end = shape.metric_change
        text = (
            f"Overfitting in the loss since step {shape.at}, not in the decisions: {losses} while validation "
            f"{shape.metric} still improved from {show(start)} to {show(end)} and {shape.rows} {moved}{nearly} "
            f"({shape.gap})."
        )
        return Verdict("loss-overfitting", shape.at, confidence, text)
    text = f"Overfitting since step {shape.at}: {losses} while {shape.rows} {moved}{nearly} ({shape.gap})."
    if shape.accuracy_may_be_luck:
        then, now = (shape.points[n].metrics["accuracy"] for n in (shape.turn, -1))
        text += f" Accuracy, {show(then)} then and {show(now)} now, differs by no more than other rows might give."
    if shape.at == 0:
        text += " No evaluation was better than the model before training."
    return Verdict("overfitting", shape.at, confidence, text)


def _memorising(shape: _Shape) -> Verdict:
    others = [index for index, holds in enumerate(shape.memorised_at) if not holds]
    since = shape.points[others[-1] + 1 if others else 0].step
    text = (
        f"Memorising since step {since}: the loss on training rows is {show(shape.train[-1])}, near zero, with "
        f"{show(shape.validation[-1])} on validation ({shape.gap}), although validation loss has not turned."
    )
    return Verdict("memorising", since, shape.confidence(sum(shape.memorised_at) >= 2), text)


def _underfitting(shape: _Shape) -> Verdict:
    text = (
        f"Underfitting: {shape.rows} does not fall, {show(shape.train[0])} at step {shape.points[0].step} and "
        f"{show(shape.train[-1])} at step {shape.points[-1].step} ({shape.gap})."
    )
    rises = shape.train[-1] >= shape.train[0]
    worst = int(shape.train.argmax())
    wild = shape.train[worst] >= (1 + MATERIAL) * shape.train[0]
    if wild:
        text += f" It went up to {show(shape.train[worst])} on the way: the learning rate is probably too high."
    still = np.ptp(shape.train) <= STILL * abs(shape.train[0])
    if still:
        text += " It hardly moved: the learning rate is probably far too low."
    sure = bool(rises) or _rising(-shape.train) > 0.2
    return Verdict("underfitting", None, shape.confidence(sure), text, "rate" if wild else "still" if still else None)


def _unstable(shape: _Shape) -> Verdict:
    text = (
        f"Unclear: both losses rise since step {shape.at}, validation from {show(shape.validation[shape.turn])} to "
        f"{show(shape.validation[-1])} and train from {show(shape.train[shape.turn])} to {show(shape.train[-1])}, "
        f"which is unstable training, not overfitting ({shape.gap})."
    )
    return Verdict("unclear", None, shape.confidence(False), text)


def _noisy(shape: _Shape) -> Verdict:
    p = shape.points[-1].rise_p
    if shape.material and not shape.beyond_luck and p is not None:
        text = (
            f"Unclear: validation loss is {show(shape.validation[-1])} after a lowest of "
            f"{show(shape.validation[shape.turn])} at step {shape.at}, and with so few validation rows that may be luck "
            f"(p = {p:.2g} of such a rise where there is none; {shape.gap})."
        )
        return Verdict("unclear", None, shape.confidence(False), text, "rows")
    text = (
        f"Unclear: validation loss is {show(shape.validation[-1])} after a lowest of "
        f"{show(shape.validation[shape.turn])} at step {shape.at}, too noisy to tell whether it has turned "
        f"({shape.gap})."
    )
    return Verdict("unclear", None, shape.confidence(False), text)


def _nothing(shape: _Shape) -> Verdict:
    text = (
        f"Unclear: {shape.rows} fell from {show(shape.train[0])} to {show(shape.train[-1])}, and nothing of it carries "
        f"over: validation loss is {show(shape.validation[-1])}, and was {show(shape.validation[0])} before training "
        f"({shape.gap})."
    )
    return Verdict("unclear", None, shape.confidence(False), text, "nothing")


def _healthy(shape: _Shape) -> Verdict:
    lowest, last = shape.validation[shape.turn], shape.validation[-1]
    still = "at its lowest" if last == lowest else f"within noise of its lowest, {show(lowest)} at step {shape.at}"
    text = (
        f"Healthy: validation loss is {show(last)}, {still}, while {shape.rows} fell from {show(shape.train[0])} to "
        f"{show(shape.train[-1])} ({shape.gap})."
    )
    wide = shape.wide_gap
    if wide:
        text += " The gap is wide: much of what was learned since is of the training rows alone."
    sure = shape.noise <= MATERIAL * abs(lowest)
    return Verdict("healthy", None, shape.confidence(sure), text, "gap" if wide else None)


def show(number: float) -> str:
    """Three decimals where they say something, three digits elsewhere."""
    return f"{number:.3f}" if number == 0 or 0.001 <= abs(number) < 1000 else f"{number:.3g}"


def _noise(values: np.ndarray, turn: int, floor: float = NOISE_FLOOR) -> float:
    """Standard deviation about the best fit that falls until `turn` and rises after it."""
    from scipy.optimize import isotonic_regression

    falling = isotonic_regression(values[: turn + 1], increasing=False).x
    rising = isotonic_regression(values[turn:]).x
    fit = np.concatenate([falling, rising[1:]])
    freedom = len(values) - len(np.unique(fit))
    deviation = math.sqrt(float(((values - fit) ** 2).sum()) / freedom) if freedom else 0.0
    return max(deviation, floor * abs(float(np.median(values))))


def _rising(values: np.ndarray) -> float:
    """One-sided p of Kendall's tau against time: small where the values rise."""
    from scipy.stats import kendalltau

    if len(values) < 3 or np.ptp(values) == 0:
        return 1.0
    _, p = np.asarray(kendalltau(range(len(values)), values, alternative="greater"))
    return float(p)
