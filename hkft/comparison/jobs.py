"""Cells of a grid in processes of their own, several at a time: each on a GPU of its own, or with its share of the cores."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hkft import errors
from hkft.comparison.grid import Cell, Outcome, Runner, attempt, calls, left_of
from hkft.errors import INTERRUPTED, HkftError, Problem, SetupError
from hkft.events import Event, Finished, Listener, Stage
from hkft.folder import RunFolder, check_place, read_json

Environment = dict[str, str]


def run(grid: Sequence[Cell], output: Path, jobs: int, tell: Listener) -> list[Outcome]:
    """As `grid.run`, up to `jobs` cells at a time. KeyboardInterrupt lets those that run write their checkpoints."""
    check_place(output)
    left, outcomes = left_of(grid, output, tell)
    places: queue.Queue[Environment] = queue.Queue()
    for number in range(jobs):
        places.put(environment(number, jobs))
    lock, done = threading.Lock(), 0

    def heard(event: Event) -> None:
        with lock:
            tell(event)

    def one(cell: Cell, folder: RunFolder) -> None:
        nonlocal done
        place = places.get()
        try:
            outcome = attempt(cell, folder, _runner(place), heard)
        finally:
            places.put(place)
        outcomes[cell.name] = outcome
        done += 1
        if outcome.status == "finished":
            heard(Finished(str(folder.path), read_json(folder.summary)))
        heard(Stage(f"{len(left)} cells, {jobs} at a time", done, len(left)))

    heard(Stage(f"{len(left)} cells, {jobs} at a time", 0, len(left)))
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(one, cell, folder) for cell, folder in left]
        try:
            for future in futures:
                future.result()
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    return [outcomes[cell.name] for cell in grid]


def environment(number: int, jobs: int) -> Environment:
    """What the process of job `number` is told: its GPU, where there are any, else how many threads are its own."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = [each for each in shown.split(",") if each] if shown is not None else _devices()
    if devices:
        return {"CUDA_VISIBLE_DEVICES": devices[number % len(devices)]}
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}


def _devices() -> list[str]:
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def _runner(place: Environment) -> Runner:
    """Trains a cell and looks at its test rows. Raises what the command's exit code and its document stand for."""

    def run(cell: Cell, folder: RunFolder, resume: bool, tell: Listener) -> None:
        for arguments in calls(cell, folder, resume):
            _call(arguments, place)

    return run


def _call(arguments: Sequence[str], place: Environment) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "hkft", *arguments, "--json"],
        env={**os.environ, **place},
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode == INTERRUPTED:
        raise KeyboardInterrupt
    if ended.returncode:
        raise _error(ended)


def _error(ended: subprocess.CompletedProcess[str]) -> HkftError:
    try:
        document = json.loads(ended.stdout)
        kind = getattr(errors, document["error"])
        return kind(problems=[Problem(**problem) for problem in document["problems"]])
    except (ValueError, KeyError, TypeError, AttributeError):
        last = (ended.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return SetupError(f"the process of this cell ended with {ended.returncode}", found=last)
