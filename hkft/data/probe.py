"""The probe: fixed training rows that stand beside the validation set, so that the gap compares like with like."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hkft.data.holdout import shares

BINS = 20  # of a regression target: twentieths of the validation set, by label


def probe_indices(
    train_labels: Sequence[float],
    validation_labels: Sequence[float],
    size: int | None,
    seed: int,
    task: str,
) -> list[int]:
    """Indices into the training rows, sorted: as many as the validation set has, with its mix of labels.

    size: fewer than that; None, or a number larger than either set, gives the smaller set's size.
    task: "classification" matches the share of every class, "regression" that of every twentieth of the validation
        labels, and leaves out what lies beyond their range.
    Where train has too few rows of a class or twentieth, all of them are taken and no other stands in: the probe is
    then shorter than asked (compare its length), for a filled-up one would not have the validation set's mix.
    """
    train, validation = np.asarray(train_labels), np.asarray(validation_labels)
    assert min(len(train), len(validation)) > 0, "two sets with rows in them"
    if task == "regression":
        edges = np.unique(np.quantile(validation, np.linspace(0, 1, BINS + 1)))
        train, validation = _bins(train, edges), _bins(validation, edges)
    wanted = min(len(train), len(validation), size or len(validation))
    classes, counts = np.unique(validation, return_counts=True)
    random = np.random.RandomState(seed)
    chosen = [
        random.permutation(np.flatnonzero(train == name))[:part]
        for name, part in zip(classes, shares(wanted, counts), strict=True)
    ]
    return sorted(int(index) for index in np.concatenate(chosen))


def _bins(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The bin of each value [N], the last one closed on both sides; -1 beyond the edges."""
    bins = np.minimum(np.searchsorted(edges, values, side="right") - 1, max(len(edges) - 2, 0))
    return np.where(values > edges[-1], -1, bins)
