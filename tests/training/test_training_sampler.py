"""Batches of like length: every row once, hardly padded, in random order, the same for one seed and epoch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hkft.training.sampler import POOL, LikeLengthSampler

LENGTHS = np.random.default_rng(0).integers(5, 60, 1000)


def batches(sampler: LikeLengthSampler) -> list[list[int]]:
    rows = list(sampler)
    return [rows[start : start + sampler.batch_size] for start in range(0, len(rows), sampler.batch_size)]


@pytest.mark.parametrize("count", [1, 5, 8, 9, 1000])
@pytest.mark.parametrize("size", [1, 8, 2000])
def test_every_row_comes_once(count, size):
    sampler = LikeLengthSampler(size, LENGTHS[:count].tolist(), seed=1)
    assert sorted(sampler) == list(range(count))
    assert len(sampler) == count
    assert all(type(row) is int for row in sampler)


def test_a_batch_s_rows_are_of_like_length():
    found = batches(LikeLengthSampler(16, LENGTHS.tolist(), seed=1))
    padded = sum(LENGTHS[rows].max() * len(rows) for rows in found)
    rng = np.random.default_rng(1).permutation(1000)
    random = sum(LENGTHS[rng[start : start + 16]].max() * len(rng[start : start + 16]) for start in range(0, 1000, 16))
    assert padded < 1.03 * LENGTHS.sum() < 0.6 * random * 1.03


def test_the_longest_comes_first_and_what_is_not_full_last():
    found = batches(LikeLengthSampler(16, LENGTHS.tolist(), seed=4))
    assert LENGTHS[found[0]].max() == LENGTHS.max()
    assert [len(rows) for rows in found] == [16] * 62 + [8]


def test_batches_come_in_random_order():
    longest = [LENGTHS[rows].max() for rows in batches(LikeLengthSampler(16, LENGTHS.tolist(), seed=4))][1:-1]
    falls = np.mean(np.diff(longest) < 0)
    assert 0.3 < falls < 0.7


def test_seed_and_epoch_decide_and_nothing_else():
    def rows(seed: int, epoch: int) -> list[int]:
        torch.manual_seed(np.random.randint(1000))
        sampler = LikeLengthSampler(16, LENGTHS.tolist(), seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert rows(1, 2) == rows(1, 2)
    assert rows(1, 2) != rows(1, 3)
    assert rows(1, 2) != rows(2, 2)


def test_rows_of_one_length_are_mixed_anew_in_every_epoch():
    sampler = LikeLengthSampler(10, [7] * 100, seed=1)
    first = batches(sampler)
    sampler.set_epoch(1)
    assert {frozenset(rows) for rows in first}.isdisjoint(frozenset(rows) for rows in batches(sampler))


def test_many_rows_are_sorted_in_pools_alone():
    """Else a large set's batches would be the same in every epoch, ties aside."""
    size = 4
    lengths = np.arange(4 * POOL * size)
    found = batches(LikeLengthSampler(size, lengths.tolist(), seed=1))
    assert np.median([np.ptp(lengths[rows]) for rows in found]) > 2 * size
