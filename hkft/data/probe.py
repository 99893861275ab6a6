"""The probe: fixed training rows that stand beside the validation set, so that the gap compares like with like."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np

from hkft.data.holdout import shares

BINS = 20  # of a regression target: twentieths of the validation set, by label


def probe_indices(
    train_labels: Sequence[float] | np.ndarray,
    validation_labels: Sequence[float] | np.ndarray,
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
    order = np.argsort(train, kind="stable")  # rows of one class together, in their order
    first, last = (np.searchsorted(train[order], classes, side=side) for side in ("left", "right"))
    chosen = [
        random.permutation(order[start:end])[:part]
        for start, end, part in zip(first, last, shares(wanted, counts), strict=True)
    ]
    return sorted(int(index) for index in np.concatenate(chosen))


def probe_of_prompts(
    train_groups: Sequence[int] | np.ndarray,
    validation_groups: Sequence[int] | np.ndarray,
    size: int | None,
    seed: int,
) -> list[int]:
    """Indices into the training rows of generation, sorted: whole prompts, with every completion they have.

    A score of generated text rises with the number of its references, so there are as many prompts as validation has,
    each with as many completions, or as near to it as the training prompts come. groups: [N], the number of each row's
    prompt. size: rows, as in `probe_indices`; here so many prompts as have them in validation.
    """
    member = np.unique(np.asarray(train_groups), return_inverse=True)[1]
    counts, wanted = np.bincount(member), np.sort(np.unique(np.asarray(validation_groups), return_counts=True)[1])
    rows = min(len(member), len(validation_groups), size or len(validation_groups))
    prompts = min(len(counts), max(1, round(rows / wanted.mean())))
    random = np.random.RandomState(seed)
    left = {count: random.permutation(np.flatnonzero(counts == count)).tolist() for count in np.unique(counts).tolist()}
    chosen = []
    at = sorted(left)  # counts of which a prompt is left
    for target in wanted[((np.arange(prompts) + 0.5) * len(wanted) / prompts).astype(int)].tolist():  # evenly spread
        place = bisect_left(at, target)
        near = at[max(place - 1, 0) : place + 1]
        count = min(near, key=lambda count: (abs(count - target), -count))
        chosen.append(left[count].pop())
        if not left[count]:
            at.remove(count)
    return [int(row) for row in np.flatnonzero(np.isin(member, chosen))]


def _bins(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The bin of each value [N], the last one closed on both sides; -1 beyond the edges."""
    bins = np.minimum(np.searchsorted(edges, values, side="right") - 1, max(len(edges) - 2, 0))
    return np.where(values > edges[-1], -1, bins)
