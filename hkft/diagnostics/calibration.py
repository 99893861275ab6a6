"""Are the probabilities of a classifier to be believed? Of the rows it is 80 % sure of, are 80 % right?

The terms:

confidence         of a row: the probability of the class that the model decides for, softmax(logits)[argmax(logits)].
accuracy           of some rows: the share whose decided class is the label.
calibrated         where confidence c is right with frequency c. Fine-tuning to the end makes a model too sure of itself:
                   its decisions stay, its confidence moves to 1, its loss on validation rows rises.
calibration error  ECE: how far confidence and accuracy lie apart, 0 is best. Measured over bins of confidence, so with
                   few rows it is above 0 for a calibrated model too: up to 0.4 * sqrt(bins / rows) on average.
temperature        T in softmax(logits / T). Above 1 it takes confidence back, below 1 it adds to it; no decision
                   changes. The best one tells how much too sure (T > 1) or too timid (T < 1) the model is.
NLL                the mean of -log p(label), nats: the cross-entropy.
Brier score        the mean squared distance between the probabilities and the truth.

Of two equal logits the first class is decided for, as by argmax everywhere in hkft. A number that the rows do not
define is NaN, never 0: every number of no rows and of logits that are not all finite.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]

TEMPERATURES = (0.05, 20.0)
BINS = 15
SEED = 0  # of the halves


@dataclass(frozen=True, slots=True)
class Bin:
    """The rows whose confidence lies in (low, high]: how many, their mean confidence, and the share of them right."""

    low: float
    high: float
    confidence: float
    accuracy: float
    count: int


@dataclass(frozen=True, slots=True)
class Calibration:
    """nll: nats. brier: 0 to 2, see `brier`. calibration_error: 0 to 1, see `expected_calibration_error`.

    bins: from low to high; empty ones are left out.
    temperature: see `temperature`, of all rows.
    calibration_error_after: what is left of the calibration error with a temperature. Honest, not flattered by a fit to
        the rows it is measured on: each half of the rows is scaled with the temperature of the other, and the error is
        measured over both together, so it compares with `calibration_error`. Seeded halves. NaN for fewer than 2 rows.
    """

    nll: float
    brier: float
    calibration_error: float
    bins: tuple[Bin, ...]
    temperature: float
    calibration_error_after: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def calibration(logits: Array, labels: NDArray[np.integer], *, bins: int = BINS) -> Calibration:
    """All of it, from logits [N, C] and labels [N], class indices 0 to C - 1."""
    if not _defined(logits):
        return Calibration(math.nan, math.nan, math.nan, (), math.nan, math.nan)
    table = _bins(logits, labels, bins)
    return Calibration(
        nll=_nll(logits, labels),
        brier=brier(logits, labels),
        calibration_error=_error(table),
        bins=table,
        temperature=temperature(logits, labels),
        calibration_error_after=_error_after(logits, labels, bins),
    )


def expected_calibration_error(logits: Array, labels: NDArray[np.integer], bins: int = BINS) -> float:
    """sum over bins b of n_b / N * |accuracy_b - confidence_b|: Guo et al. 2017, equation 3. 0 to 1.

    logits [N, C], labels [N]. The bins are of equal width, ((b - 1) / B, b / B], over the confidence.
    """
    return _error(_bins(logits, labels, bins)) if _defined(logits) else math.nan


def brier(logits: Array, labels: NDArray[np.integer]) -> float:
    """Mean over rows of the sum over classes of (p - onehot)^2: Brier's own definition (1950), 0 to 2.

    logits [N, C], labels [N]. For two classes it is twice the square of p(second class) less the label, which many
    papers and scikit-learn report for them. Decided by chance among C classes it is 1 - 1 / C.
    """
    from scipy.special import softmax

    if not _defined(logits):
        return math.nan
    distance = softmax(logits.astype(np.float64), axis=1)
    distance[np.arange(len(labels)), labels] -= 1
    return float((distance**2).sum(1).mean())


def temperature(logits: Array, labels: NDArray[np.integer]) -> float:
    """The T between 0.05 and 20 that minimises the NLL of softmax(logits / T): Guo et al. 2017, section 4.2.

    logits [N, C], labels [N]. The NLL is convex in 1 / T, so there is one valley in log T, where it is searched. 1 where
    no T is better than 1; a bound where none is better than it: rows that are all decided rightly want T of 0, rows
    whose logits are no better than chance want it infinite. NaN where the NLL is the same for every T: one class, equal logits,
    or logits so far apart that every row is certain and right at any T.
    """
    from scipy.optimize import minimize_scalar

    if not _defined(logits):
        return math.nan

    def loss(t: float) -> float:
        return _nll(logits.astype(np.float64) / t, labels)

    low, high = TEMPERATURES
    at = {t: loss(t) for t in (1.0, low, high)}
    if len(set(at.values())) == 1:
        return math.nan
    search = minimize_scalar(lambda log_t: loss(math.exp(log_t)), bounds=np.log(TEMPERATURES), method="bounded")
    found = math.exp(search.x)  # pyright: ignore[reportAttributeAccessIssue]
    at.setdefault(found, loss(found))
    return min(at, key=lambda t: at[t])  # of equals the first: 1, then a bound


def _defined(logits: Array) -> bool:
    return bool(logits.size and np.isfinite(logits).all())


def _nll(logits: Array, labels: NDArray[np.integer]) -> float:
    from scipy.special import log_softmax

    of_labels = log_softmax(logits.astype(np.float64), axis=1)[np.arange(len(labels)), labels]
    return abs(float(of_labels.mean()))  # never above 0; abs, so that certainty is 0.0, not -0.0


def _bins(logits: Array, labels: NDArray[np.integer], bins: int) -> tuple[Bin, ...]:
    from scipy.special import softmax

    confidence = softmax(logits.astype(np.float64), axis=1).max(1)
    right = logits.argmax(1) == labels
    edges = np.arange(bins + 1) / bins
    number = np.searchsorted(edges, confidence, side="left") - 1
    return tuple(
        Bin(
            low=float(edges[b]),
            high=float(edges[b + 1]),
            confidence=float(confidence[number == b].mean()),
            accuracy=float(right[number == b].mean()),
            count=int((number == b).sum()),
        )
        for b in np.unique(number)
    )


def _error(table: tuple[Bin, ...]) -> float:
    apart = sum(b.count * abs(b.accuracy - b.confidence) for b in table)
    return apart / sum(b.count for b in table)


def _error_after(logits: Array, labels: NDArray[np.integer], bins: int) -> float:
    if len(labels) < 2:
        return math.nan
    halves = np.array_split(np.random.default_rng(SEED).permutation(len(labels)), 2)
    scaled = logits.astype(np.float64)
    for rows, others in (halves, halves[::-1]):
        fitted = temperature(logits[others], labels[others])
        scaled[rows] /= 1.0 if math.isnan(fitted) else fitted  # NaN: the other half knows no better than to leave it
    return expected_calibration_error(scaled, labels, bins)
