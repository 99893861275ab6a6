"""What the rows of a set have to do with a metric on them: of each row a share, the mean of which is the metric.

Accuracy, a loss and a squared error are means over rows as they are. Of the others a share tells to first order what more or
less of its row would do to the metric (infinitesimal jackknife: Jaeckel 1972; Efron 1982, "The jackknife, the bootstrap and
other resampling plans", ch. 6), so that a bootstrap over rows takes them all alike:

    pearson, matthews_correlation   labels x and predictions y, centred: numbers, or one-hot classes; r = c / sqrt(a b) of
                                    a = mean |x|^2, b = mean |y|^2, c = mean x.y
                                    share = r + x.y / sqrt(a b) - r (|x|^2 / a + |y|^2 / b) / 2
    f1                              F = mean t / mean s, t = 2 where class and prediction are the class asked for, s = 1 for each
                                    share = F + (t - F s) / mean s; of more than two classes the mean over them

Both are exact in the mean. No share of spearman, whose ranks every row moves, nor of a calibration error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
OF_CLASSES = ("f1", "matthews_correlation")


@dataclass(frozen=True)
class Examples:
    """Of each row of a set: which it is, its share, and how much that weighs in the mean (a completion's tokens)."""

    ids: tuple[Any, ...]
    values: NDArray[np.floating]
    weights: NDArray[np.integer]

    @property
    def sums(self) -> NDArray[np.floating]:
        return self.values * self.weights

    @property
    def mean(self) -> float:
        return float(self.sums.sum() / self.weights.sum())


def of_records(
    records: Sequence[Mapping[str, Any]], metric: str, classes: Sequence[str] | None = None
) -> Examples | None:
    """Shares of the rows of `predictions/*.jsonl`; None for a metric that has none. classes: in the order of the head."""
    if not records:
        return None
    written = "tokens" in records[0]  # completions
    ones = np.ones(len(records), dtype=np.int64)
    labels, predictions = ([record.get(side) for record in records] for side in ("label", "prediction"))
    if metric == "loss":
        values = np.array([record["loss"] for record in records], dtype=np.float64)
        ones = np.array([record.get("tokens", 1) for record in records])
    elif written:
        return None
    elif metric == "accuracy":
        values = _equal(labels, predictions).astype(np.float64)
    elif metric == "mse":
        values = (np.array(predictions, dtype=np.float64) - np.array(labels, dtype=np.float64)) ** 2
    elif metric == "pearson":
        values = correlation(
            np.array(labels, dtype=np.float64)[:, None], np.array(predictions, dtype=np.float64)[:, None]
        )
    elif metric in OF_CLASSES and classes:
        x, y = _one_hot(labels, classes), _one_hot(predictions, classes)
        values = f1(x, y) if metric == "f1" else correlation(x, y)
    else:
        return None
    undefined = metric != "loss" and np.isnan(values).any()
    return None if undefined else Examples(tuple(record["id"] for record in records), values, ones)


def correlation(x: Floats, y: Floats) -> Floats:
    """Shares in the correlation of x and y, [N,D] both: Pearson's for D = 1, Matthews' for one-hot classes (Gorodkin 2004).

    Returns [N]; NaN where a side is constant.
    """
    x, y = x - x.mean(0), y - y.mean(0)
    xx, yy, xy = ((one * other).sum(1) for one, other in ((x, x), (y, y), (x, y)))
    scale = np.sqrt(xx.mean() * yy.mean())
    if not scale:
        return np.full(len(x), np.nan)
    r = xy.mean() / scale
    return r + xy / scale - r / 2 * (xx / xx.mean() + yy / yy.mean())


def f1(x: Floats, y: Floats) -> Floats:
    """Shares in F1 of one-hot labels x and predictions y, [N,C] both: of the second of two classes, else of all, macro."""
    if x.shape[1] == 2:
        x, y = x[:, 1:], y[:, 1:]
    else:
        occurring = (x + y).any(0)
        x, y = x[:, occurring], y[:, occurring]
    both, either = 2 * x * y, x + y
    size = either.mean(0)
    if not size.all():
        return np.zeros(len(x))  # the class occurs nowhere: 0 by convention
    score = both.mean(0) / size
    return (score + (both - score * either) / size).mean(1)


def _equal(labels: Sequence[Any], predictions: Sequence[Any]) -> NDArray[np.bool_]:
    return np.array([label == prediction for label, prediction in zip(labels, predictions, strict=True)])


def _one_hot(values: Sequence[Any], classes: Sequence[str]) -> Floats:
    number = {name: place for place, name in enumerate(classes)}
    return np.eye(len(classes))[[number[value] for value in values]]
