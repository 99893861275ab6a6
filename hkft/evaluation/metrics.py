"""The numbers of a task, from logits and labels, by scikit-learn and scipy.

    classification   accuracy, f1 (of the second class where there are two, else macro), matthews_correlation; of its
                     probabilities brier and calibration_error, see `hkft.diagnostics.calibration`
    regression       pearson, spearman, mse

A value that the data does not define (the correlation of constant predictions) is NaN, never 0.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hkft.diagnostics.calibration import brier, expected_calibration_error

Array = NDArray[np.floating]


def score(task: str, logits: Array, labels: NDArray) -> dict[str, float]:
    """logits [N, classes] or [N, 1]; labels [N], class indices or numbers. Returns the task's metrics."""
    return classification(logits, labels) if task == "classification" else regression(logits, labels)


def classification(logits: Array, labels: NDArray) -> dict[str, float]:
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    decided = logits.argmax(1)
    average = "binary" if logits.shape[1] == 2 else "macro"
    return {
        "accuracy": float(accuracy_score(labels, decided)),
        "f1": float(f1_score(labels, decided, average=average, zero_division=0)),  # pyright: ignore[reportArgumentType]
        "matthews_correlation": float(matthews_corrcoef(labels, decided)),
        "brier": brier(logits, labels),
        "calibration_error": expected_calibration_error(logits, labels),
    }


def regression(logits: Array, labels: NDArray) -> dict[str, float]:
    from scipy.stats import rankdata

    predicted = logits[:, 0].astype(np.float64)
    return {
        "pearson": _correlation(predicted, labels),
        "spearman": _correlation(rankdata(predicted), rankdata(labels)),
        "mse": float(np.mean((predicted - labels) ** 2)),
    }


def _correlation(x: Array, y: Array) -> float:
    """Pearson's r; NaN where either side is constant, for which it is not defined."""
    from scipy.stats import pearsonr

    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.asarray(pearsonr(x, y))[0])


def cross_entropy(logits: Array, labels: NDArray) -> Array:
    """Loss of each example, nats, in float64: log sum exp(logits) - logits[label]."""
    from scipy.special import log_softmax

    return -log_softmax(logits.astype(np.float64), axis=1)[np.arange(len(labels)), labels]


def squared_error(logits: Array, labels: NDArray) -> Array:
    """Loss of each example: (prediction - label)^2."""
    return (logits[:, 0].astype(np.float64) - labels) ** 2


LOSSES = {"classification": cross_entropy, "regression": squared_error}
