"""The gap between training and validation rows, measured the same way at both."""

from __future__ import annotations

import math
from collections.abc import Mapping

LOWER_IS_BETTER = frozenset({"loss", "mse", "rmse", "mae", "perplexity", "calibration_error", "brier", "ter"})
MAIN_METRICS = {"classification": "accuracy", "regression": "pearson", "generation": "token_accuracy"}


def gap(train_probe: Mapping[str, float | None], validation: Mapping[str, float | None]) -> dict[str, float]:
    """How much worse validation is than the probe of the training rows, for every number that both have.

    Losses and errors: validation - probe. Metrics where higher is better: probe - validation. A positive gap is thus
    always a worse validation. The unit is the number's own; NaN where a side has none: a correlation of constants.
    """
    sides = {
        name: (_number(train_probe[name]), _number(validation[name])) for name in train_probe if name in validation
    }
    return {name: other - probe if name in LOWER_IS_BETTER else probe - other for name, (probe, other) in sides.items()}


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def main_metric(task: str) -> str:
    """The one metric a task is told by: accuracy of a classification, Pearson's r of a regression, token accuracy."""
    return MAIN_METRICS[task]
