"""Cells in processes of their own: what a process is told, and what becomes of how it ends; the process is a stand-in."""

import json
import os
import signal
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import pytest

from hkft.comparison import grid, jobs
from hkft.errors import (
    INTERRUPTED,
    DataError,
    DivergedError,
    HkftError,
    MethodError,
    OutOfMemoryError,
    Problem,
    RecipeError,
    SetupError,
    UsageError,
)
from hkft.events import Finished, Notice, Stage
from hkft.folder import RunFolder, read_json, seal, write_json
from hkft.recipe import load


def failing(error: HkftError):
    """What `hkft ... --json` leaves."""
    problems = [{key: getattr(problem, key) for key in Problem.__slots__} for problem in error.problems]
    document = {"error": type(error).__name__, "exit_code": error.exit_code, "problems": problems}
    return subprocess.CompletedProcess([], error.exit_code, json.dumps(document), str(error))


@pytest.fixture
def process(monkeypatch, write_run):
    """Instead of a process: writes a finished run, or ends as `ends` says for a method and a seed. Keeps what it is told."""

    class Process:
        def __init__(self):
            self.calls, self.ends, self.lock, self.now, self.most = [], {}, threading.Lock(), 0, 0
            self.signals = []

        def run(self, command, env):
            with self.lock:
                self.calls.append((command, env))
                self.now += 1
                self.most = max(self.most, self.now)
            try:
                return self.of(command)
            finally:
                with self.lock:
                    self.now -= 1

        def of(self, command):
            if command[3] == "eval":
                folder = RunFolder(Path(command[4]))
                write_json(folder.summary, {**read_json(folder.summary), "test": {"loss": 0.4, "accuracy": 0.7}})
                return subprocess.CompletedProcess(command, 0, "{}", "")
            told = dict(pairwise(command))
            sets = [value for flag, value in pairwise(command) if flag == "--set"]
            recipe = load(told["--recipe"], sets)
            end = self.ends.get((recipe.method.name, recipe.seed))
            if callable(end):
                end = end()
            if end is not None:
                return end
            write_run(Path(told["--output"]), recipe)
            return subprocess.CompletedProcess(command, 0, "{}", "")

    process = Process()

    class Popen:
        returncode = None

        def __init__(self, command, *, env, **_):
            self.command, self.env = command, env

        def communicate(self):
            ended = process.run(self.command, self.env)
            self.returncode = ended.returncode
            return ended.stdout, ended.stderr

        def send_signal(self, number):
            process.signals.append((self.command[3], number))

    monkeypatch.setattr(jobs.subprocess, "Popen", Popen)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return process


def test_every_cell_is_a_command_of_its_own(process, recipe, tmp_path):
    cells, told = grid.cells(recipe, ["none", "dropkey"], 2), []
    outcomes = jobs.run(cells, tmp_path / "g", 2, told.append)
    assert [(outcome.cell, outcome.status, outcome.folder) for outcome in outcomes] == [
        (cell, "finished", tmp_path / "g" / cell.name) for cell in cells
    ]
    of = {command[command.index("--output") + 1]: command for command, _ in process.calls}
    for cell in cells:
        command = of[str(tmp_path / "g" / cell.name)]
        assert command[:6] == [sys.executable, "-m", "hkft", "train", "--recipe", str(recipe.path)]
        assert command[-1] == "--json"
        sets = [value for flag, value in pairwise(command) if flag == "--set"]
        assert load(command[5], sets) == cell.recipe
    assert process.most <= 2
    stages = [event for event in told if isinstance(event, Stage)]
    assert (stages[0].done, stages[-1].done, stages[-1].total) == (0, 4, 4)
    assert sum(isinstance(event, Finished) for event in told) == 4


def test_what_is_done_does_not_run_and_what_lacks_its_test_is_looked_at(process, recipe, tmp_path):
    cells = grid.cells(recipe.replace("data.test=0.2"), ["none", "dropkey"], 1)
    jobs.run(cells, tmp_path, 2, lambda _: None)
    assert sorted(command[3] for command, _ in process.calls) == ["eval", "eval", "train", "train"]
    process.calls.clear()
    assert [each.status for each in jobs.run(cells, tmp_path, 2, lambda _: None)] == ["skipped", "skipped"]
    assert process.calls == []
    folder = cells[0].folder(tmp_path)
    summary = read_json(folder.summary)
    summary.pop("test")
    write_json(folder.summary, summary)
    jobs.run(cells, tmp_path, 2, lambda _: None)
    assert [command[3:] for command, _ in process.calls] == [["eval", str(folder.path), "--split", "test", "--json"]]


def test_a_checkpoint_is_resumed(process, recipe, tmp_path, write_run):
    (cell,) = grid.cells(recipe, ["none"], 1)
    write_run(tmp_path / cell.name, cell.recipe, status="interrupted")
    seal(tmp_path / cell.name / "checkpoints" / "checkpoint-5", {"step": 5})
    jobs.run([cell], tmp_path, 2, lambda _: None)
    ((command, _),) = process.calls
    assert command[-2:] == ["--resume", "--json"]


ENDS = [
    UsageError("no", where="--x", found="y", allowed="z", hint="h"), RecipeError("no", where="a.yaml:1:2"),
    MethodError("no"), DataError("no"), SetupError("no"), OutOfMemoryError("out", where="train"), DivergedError("nan"),
    RecipeError(problems=[Problem("one", "a"), Problem("two", "b", "c", "d", "e")]),
]  # fmt: skip


@pytest.mark.parametrize("error", ENDS, ids=lambda error: f"{type(error).__name__}-{len(error.problems)}")
def test_an_error_comes_back_as_what_it_was_and_the_rest_goes_on(process, recipe, tmp_path, error):
    process.ends["none", 1] = failing(error)
    told = []
    outcomes = jobs.run(grid.cells(recipe, ["none", "dropkey"], 2), tmp_path, 2, told.append)
    assert [outcome.status for outcome in outcomes] == ["failed", "finished", "finished", "finished"]
    cause = outcomes[0].cause
    assert (type(cause), cause.problems, cause.exit_code) == (type(error), error.problems, error.exit_code)
    assert Notice(f"none, seed 1 failed: {error}", "warning") in told


@pytest.mark.parametrize(("code", "stdout", "stderr", "found"), [
    (1, "", "Traceback\n  ...\nValueError: ours\n", "ValueError: ours"), (-9, "", "", "it said nothing"),
    (1, '{"error": "os", "problems": []}', "odd", "odd"), (1, '{"error": "DataError"}', "odd", "odd"),
    (1, '{"error": "DataError", "problems": [{"text": 1}]}', "odd", "odd"), (1, "[]", "odd", "odd"),
    (1, '{"error": "Problem", "problems": []}', "odd", "odd"),
])  # fmt: skip
def test_an_end_that_says_nothing_of_hkfts_is_a_setup_error(process, recipe, tmp_path, code, stdout, stderr, found):
    process.ends["none", 1] = subprocess.CompletedProcess([], code, stdout, stderr)
    first, second = jobs.run(grid.cells(recipe, ["none", "dropkey"], 1), tmp_path, 1, lambda _: None)
    assert (first.status, second.status) == ("failed", "finished")
    assert type(first.cause) is SetupError
    (problem,) = first.cause.problems
    assert (problem.message, problem.found) == (f"the process of this cell ended with {code}", found)


def test_an_interrupted_process_ends_the_grid_which_goes_on_later(process, recipe, tmp_path):
    process.ends["dropkey", 1] = subprocess.CompletedProcess([], INTERRUPTED, "{}", "interrupted")
    cells = grid.cells(recipe, ["none", "dropkey"], 3)
    with pytest.raises(KeyboardInterrupt):
        jobs.run(cells, tmp_path, 1, lambda _: None)
    process.ends.clear()
    assert {outcome.status for outcome in jobs.run(cells, tmp_path, 1, lambda _: None)} == {"skipped", "finished"}


def test_after_an_interrupted_process_no_other_begins(process, recipe, tmp_path):
    begun, ended, cells = threading.Event(), threading.Event(), grid.cells(recipe, ["none", "dropkey"], 3)

    def long():  # until all others are through, or half a second after the interrupt
        begun.set()
        ended.wait(5)
        threading.Event().wait(0.5)

    def interrupted():
        begun.wait(5)  # else the one beside it would not begin, either
        ended.set()
        return subprocess.CompletedProcess([], INTERRUPTED, "{}", "")

    process.ends = {("none", 1): long, ("dropkey", 1): interrupted}
    with pytest.raises(KeyboardInterrupt):
        jobs.run(cells, tmp_path, 2, lambda _: None)
    assert len(process.calls) == 2  # the one that runs, and the interrupted one
    assert process.signals == [("train", signal.SIGINT)]  # so that the one that runs writes its checkpoint


def test_a_gpu_each_or_a_share_of_the_cores(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-7a,")
    assert [jobs.environment(n, 3)["CUDA_VISIBLE_DEVICES"] for n in range(3)] == ["3", "GPU-7a", "3"]
    for none in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", none)
        assert [jobs.environment(n, 3) for n in range(3)] == [{"HKFT_JOBS": "3", "OMP_NUM_THREADS": "5"}] * 3
    assert jobs.environment(0, 64) == {"HKFT_JOBS": "64", "OMP_NUM_THREADS": "1"}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [jobs.environment(n, 2)["CUDA_VISIBLE_DEVICES"] for n in range(2)] == ["0", "1"]


def test_jobs_that_run_at_once_have_places_of_their_own(process, recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    monkeypatch.setenv("KEPT", "yes")
    both = threading.Barrier(2, timeout=5)

    def meet() -> None:
        both.wait()

    process.ends = {("none", 1): meet, ("dropkey", 1): meet}
    jobs.run(grid.cells(recipe, ["none", "dropkey"], 1), tmp_path, 2, lambda _: None)
    assert sorted(env["CUDA_VISIBLE_DEVICES"] for _, env in process.calls) == ["4", "5"]
    assert {env["KEPT"] for _, env in process.calls} == {"yes"}
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,5"


def test_print_commands_are_the_same_calls(recipe, tmp_path, write_run):
    cells = grid.cells(recipe.replace("data.test=0.2"), ["none", "dropkey"], 1)
    write_run(tmp_path / cells[0].name, cells[0].recipe)
    looked, whole = grid.commands(cells, tmp_path)
    assert looked == f"hkft eval {tmp_path / cells[0].name} --split test"
    train, look = whole.split(" && ")
    assert train.startswith(f"hkft train --recipe {recipe.path} --set data.test=0.2 --set ")
    assert look == f"hkft eval {tmp_path / cells[1].name} --split test"
