"""A training curve as data: one point per evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkft.errors import DataError


@dataclass(frozen=True, slots=True)
class Point:
    """One evaluation.

    train_loss: with `eval_mode`, of a fixed probe of the training rows, measured as the validation loss is; without it,
        what a training loop logged about the batches it was learning from.
    metrics: the task's metrics on the validation rows, by name.
    gap_interval: of validation less train loss, of 95 %, over the rows (see `uncertainty`); None where the losses of single
        rows are not known, as of the next.
    rise_p: of the rise of the validation loss up to here, over the rows (`uncertainty.rise_p`).
    accuracy_interval: of validation's accuracy less what it was where the loss was lowest; None where there is none.
    """

    step: int
    train_loss: float
    validation_loss: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    eval_mode: bool = True
    gap_interval: tuple[float, float] | None = None
    rise_p: float | None = None
    accuracy_interval: tuple[float, float] | None = None


def from_records(records: Iterable[Mapping[str, Any]]) -> list[Point]:
    """The curve in the lines of a `metrics.jsonl`: its "eval" records, by step; all others are skipped.

    A step that was evaluated twice, as a resumed run may do, counts with its last record. A loss of null is NaN.
    Raises DataError on an "eval" record without a step or a loss.
    """
    points = [_point(record) for record in records if record.get("event") == "eval"]
    by_step = {point.step: point for point in points}
    return [by_step[step] for step in sorted(by_step)]


def level_of_lowest(values: NDArray[np.floating]) -> float:
    """The level of a curve's lowest point: the median of it and its two neighbours, as one evaluation may be lucky."""
    index = int(values.argmin())
    return float(np.median(values[max(index - 1, 0) : index + 2]))


def level_of_end(values: NDArray[np.floating], start: int) -> float:
    """Median of the last third of what follows `start`; the value there if nothing follows."""
    after = values[start + 1 :] if start + 1 < len(values) else values[start:]
    return float(np.median(after[-math.ceil(len(after) / 3) :]))


def rise(values: NDArray[np.floating]) -> float:
    """The level of a curve's end less that of its lowest point."""
    return float(rises(values[None])[0])


def rises(curves: NDArray[np.floating]) -> NDArray[np.floating]:
    """`rise` of each of many curves, [curves, looks]: those whose lowest point is at one place together."""
    lowest, found = curves.argmin(1), np.empty(len(curves))
    for index in np.unique(lowest):
        some = curves[lowest == index]
        after = some[:, index + 1 :] if index + 1 < some.shape[1] else some[:, index:]
        end = np.median(after[:, -math.ceil(after.shape[1] / 3) :], axis=1)
        found[lowest == index] = end - np.median(some[:, max(index - 1, 0) : index + 2], axis=1)
    return found


def _point(record: Mapping[str, Any]) -> Point:
    try:
        probe, validation = record["train_probe"], record["validation"]
        losses = _number(probe["loss"]), _number(validation["loss"])
        metrics = {name: _number(value) for name, value in validation.items() if name != "loss"}
        gap, accuracy = (_interval(record.get(name)) for name in ("gap_interval", "accuracy_interval"))
        return Point(int(record["step"]), *losses, metrics, True, gap, record.get("rise_p"), accuracy)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            "an evaluation in this file cannot be read",
            where=f"eval record at step {record.get('step', '?')}",
            found=", ".join(map(str, record)),
            allowed="step, train_probe.loss and validation.loss, as `hkft train` writes them",
        ) from error


def _interval(value: Any) -> tuple[float, float] | None:
    if value is None:
        return None
    low, high = map(_number, value)
    return low, high


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)
