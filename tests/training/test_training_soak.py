"""Trainings of one process, one after the other, leave nothing behind: the benchmark's counts, in short."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[1] / "benchmarks" / "soak.py"
SAME = [
    "threads", "python threads", "fds", "children", "temporary", "modules", "hooks", "tensors", "weak", "attention",
    "handlers", "at exit", "filters", "log handlers", "environment",
]  # fmt: skip
MOST = 24e6  # bytes that twelve runs may add, a hundred times what they were seen to


@pytest.fixture(scope="module")
def counts(tmp_path_factory):
    """After a warm-up of four runs, and after twelve more."""
    path = tmp_path_factory.mktemp("soak") / "counts.json"
    command = [sys.executable, str(SOAK), "--runs", "16", "--every", "4", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    counts = json.loads(path.read_text())["counts"]
    return counts[0], counts[-1]


@pytest.mark.parametrize("name", SAME)
def test_nothing_is_left(counts, name):
    assert counts[1][name] == counts[0][name]


def test_memory_is_flat(counts):
    assert counts[1]["rss"] - counts[0]["rss"] < MOST
    assert counts[1]["objects"] - counts[0]["objects"] < 1000
