"""What the losses of a look are made of, on fixed rows. Every part is named so that none is taken for another.

    regularisation   what training adds on purpose, on rows of the probe: the objective that the optimizer descends less
                     the loss of the same rows in eval mode. dropout: the task loss in train mode less that loss.
                     smoothing: what softened labels add to it. consistency: weight x KL. They add up to the total.
    gap              validation less probe, both in eval mode: what the model knows of rows only because it saw them
    net gain         validation before training less validation now: what training was worth
    regret           validation now less validation at its best: what training since then has cost

For a metric where higher is better the signs are turned: a positive gap or regret is worse, a positive gain better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from hkft.diagnostics.gap import LOWER_IS_BETTER, gap

Numbers = Mapping[str, float]


def net_gain(before: Numbers, now: Numbers) -> dict[str, float]:
    """How much better validation is now than before training, for every number that both have."""
    return {name: -worse for name, worse in gap(before, now).items()}


def regret(looks: Sequence[Numbers], now: Numbers) -> dict[str, float]:
    """How much worse validation is now than at the best look so far, `now` among them, each number by its own best."""
    return {
        name: gap({name: _best(name, [*(look[name] for look in looks if name in look), value])}, {name: value})[name]
        for name, value in now.items()
    }


def _best(name: str, values: Sequence[float]) -> float:
    finite = [value for value in values if value is not None and math.isfinite(value)]  # JSON has null for NaN
    if not finite:
        return float("nan")
    return min(finite) if name in LOWER_IS_BETTER else max(finite)


class Added(NamedTuple):
    """Of some rows in train mode: the objective; in it the task loss and weight x consistency; that task loss unsmoothed."""

    objective: float
    task: float
    consistency: float
    unsmoothed: float


def regularisation(added: Added, probe: float) -> dict[str, float]:
    """The parts of what training adds to `probe`, the loss of the same rows in eval mode.

    To a millionth: they are differences of numbers in single precision.
    """
    parts = {
        "total": added.objective - probe,
        "dropout": added.unsmoothed - probe,
        "smoothing": added.task - added.unsmoothed,
        "consistency": added.consistency,
    }
    return {name: round(value, 6) + 0.0 for name, value in parts.items()}
