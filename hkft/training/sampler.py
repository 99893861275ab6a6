"""The order of training rows: batches of like length, hardly padded, in random order, the same for one seed and epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

# Batches among whose rows those of like length are looked for: 2 % of padding on sentences of 5 to 60 tokens.
POOL = 100


class LikeLengthSampler(Sampler[int]):
    """Row numbers such that each `batch_size` of them in turn are of like length.

    Rows are shuffled, sorted by length within pools of `POOL` batches, and cut into batches, which are shuffled in their turn:
    transformers' own sampler hands on each of its pools from the longest batch to the shortest. The batch with the longest row
    comes first, so that memory runs out at once if it does; one that is not full comes last. Only seed and epoch decide, not
    the global generator, whose state at an epoch's beginning a run that is resumed in its middle does not have.

    batch_size: rows of one optimizer step on all devices, so that what is computed side by side is alike, too.
    """

    def __init__(self, batch_size: int, lengths: Sequence[int] | np.ndarray, seed: int) -> None:
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0
        self.lengths = np.asarray(lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        draw = np.random.default_rng([self.seed, self.epoch])
        rows = draw.permutation(len(self.lengths))
        pools = np.arange(len(rows)) // (POOL * self.batch_size)
        rows = rows[np.lexsort((-self.lengths[rows], pools))]
        full = len(rows) // self.batch_size
        batches = draw.permutation(full)
        if full:
            first = int(self.lengths[rows].argmax()) // self.batch_size
            batches = np.concatenate([[first], batches[batches != first]]) if first < full else batches
        for batch in batches:
            yield from rows[batch * self.batch_size : (batch + 1) * self.batch_size].tolist()
        yield from rows[full * self.batch_size :].tolist()
