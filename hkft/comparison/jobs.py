"""Cells of a grid in processes of their own, several at a time: each on a GPU of its own, or with its share of the cores."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

from hkft import errors
from hkft.comparison.grid import Cell, Outcome, Runner, attempt, calls, left_of
from hkft.errors import INTERRUPTED, HkftError, Problem, SetupError, terminable
from hkft.events import Event, Finished, Listener, Stage
from hkft.folder import RunFolder, check_place, read_json

Environment = dict[str, str]


class Processes:
    """Those that run. Once they are stopped, no other one is started."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.running: set[subprocess.Popen[str]] = set()
        self.stopped = False

    def run(self, command: Sequence[str], place: Environment) -> tuple[int, str, str]:
        """Exit code, stdout, stderr. Raises KeyboardInterrupt where the processes were stopped."""
        with self.lock:
            if self.stopped:
                raise KeyboardInterrupt
            process = subprocess.Popen(
                command,
                env={**os.environ, **place},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,  # Ctrl-C is passed on once: a second one would leave no time for a checkpoint
            )
            self.running.add(process)
        try:
            out, err = process.communicate()
        finally:
            self.running.discard(process)
        if process.returncode == INTERRUPTED or self.stopped:
            self.stop()
            raise KeyboardInterrupt
        return process.returncode, out, err

    def stop(self) -> None:
        """Each process writes its checkpoint and ends."""
        with self.lock:
            first, self.stopped = not self.stopped, True
        for process in list(self.running) if first else ():
            process.send_signal(signal.SIGINT)


def run(grid: Sequence[Cell], output: Path, jobs: int, tell: Listener) -> list[Outcome]:
    """As `grid.run`, up to `jobs` cells at a time. KeyboardInterrupt lets those that run write their checkpoints."""
    check_place(output)
    left, outcomes = left_of(grid, output, tell)
    places: queue.Queue[Environment] = queue.Queue()
    for number in range(jobs):
        places.put(environment(number, jobs))
    lock, processes, ended = threading.Lock(), Processes(), 0

    def heard(event: Event) -> None:
        with lock:
            tell(event)

    def one(cell: Cell, folder: RunFolder) -> None:
        nonlocal ended
        place = places.get()
        try:
            outcome = attempt(cell, folder, _runner(processes, place), heard)
        finally:
            places.put(place)
        outcomes[cell.name] = outcome
        ended += 1
        if outcome.status == "finished":
            heard(Finished(str(folder.path), read_json(folder.summary)))
        heard(Stage(f"{len(left)} cells, {jobs} at a time", ended, len(left)))

    heard(Stage(f"{len(left)} cells, {jobs} at a time", 0, len(left)))
    with ThreadPoolExecutor(jobs) as pool, terminable():
        futures = [pool.submit(one, cell, folder) for cell, folder in left]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
            for future in futures:
                if future.done():
                    future.result()
        except BaseException:
            processes.stop()
            pool.shutdown(cancel_futures=True)
            raise
    return [outcomes[cell.name] for cell in grid]


def environment(number: int, jobs: int) -> Environment:
    """What the process of job `number` is told: its GPU, where there are any, and how many threads are its own."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = _devices() if shown is None else [each for each in shown.split(",") if each.strip() not in ("", "-1")]
    place = {"HKFT_JOBS": str(jobs), "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    return {**place, "CUDA_VISIBLE_DEVICES": devices[number % len(devices)]} if devices else place


def _devices() -> list[str]:
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def _runner(processes: Processes, place: Environment) -> Runner:
    """Trains a cell and looks at its test rows. Raises what the command's exit code and its document stand for."""

    def run(cell: Cell, folder: RunFolder, resume: bool, tell: Listener) -> None:
        for arguments in calls(cell, folder, resume):
            code, out, err = processes.run([sys.executable, "-m", "hkft", *arguments, "--json"], place)
            if code:
                raise _error(code, out, err)

    return run


def _error(code: int, out: str, err: str) -> HkftError:
    try:
        document = json.loads(out)
        kind = getattr(errors, document["error"])
        return kind(problems=[Problem(**problem) for problem in document["problems"]])
    except (ValueError, KeyError, TypeError, AttributeError):
        last = (err.strip().splitlines() or ["it said nothing"])[-1]
        return SetupError(f"the process of this cell ended with {code}", found=last)
