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
MORE = 4  # runs, one of each method
MOST = 2e6, 80  # bytes and objects that a run may add, many times what it was seen to (3 kB, 5)


@pytest.fixture(scope="module")
def counts(tmp_path_factory):
    """After a warm-up of four runs, and after four more: what one of them leaves is seen, all else stands still."""
    path = tmp_path_factory.mktemp("soak") / "counts.json"
    command = [sys.executable, str(SOAK), "--runs", str(4 + MORE), "--every", "4", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    counts = json.loads(path.read_text())["counts"]
    return counts[0], counts[-1]


@pytest.mark.parametrize("name", SAME)
def test_nothing_is_left(counts, name):
    assert counts[1][name] == counts[0][name]


def test_memory_is_flat(counts):
    assert counts[1]["rss"] - counts[0]["rss"] < MORE * MOST[0]
    assert counts[1]["objects"] - counts[0]["objects"] < MORE * MOST[1]
