"""Several processes over one folder and one cache, started at the same moment: one writer each, and nothing is damaged."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from hkft.errors import UsageError
from hkft.folder import RunFolder, read_json

SERVER = """
import gc, json, os, sys
from hkft.cli.main import main
from hkft import api
from hkft.dropout import selfcheck
from hkft.training import run
from hkft.view import comparison_report, terminal
selfcheck.BUDGET = 0.0  # the methods are timed in one round
api.train(sys.argv[1], ["train.max_steps=1"], output=sys.argv[2])  # loads what a run imports, for every child
gc.freeze()
for line in sys.stdin:
    children, (folder, commands) = [], json.loads(line)
    for number, command in enumerate(commands):
        children.append(os.fork())
        if not children[-1]:
            os.environ["HKFT_CACHE"] = f"{folder}/cache"
            sys.argv = ["hkft", *command]
            for stream, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(f"{folder}/{number}.{name}", os.O_CREAT | os.O_WRONLY), stream)
            main()
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)
"""
SHORT = ["--set", "train.num_train_epochs=1", "--set", "diagnostics.evals_per_epoch=1"]


@pytest.fixture(scope="module")
def server(tmp_path_factory, recipe_text):
    """A process that has loaded everything, and forks for every command that it is told."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "tiny.yaml").write_text(recipe_text, encoding="utf-8")
    command = [sys.executable, "-c", SERVER, folder / "tiny.yaml", folder / "run"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def at_once(server, tmp_path):
    """Runs hkft with each of these arguments at the same moment, in a process each. -> code, document, stderr"""

    def run(*commands):
        server.stdin.write(json.dumps([str(tmp_path), [list(map(str, each)) for each in commands]]) + "\n")
        server.stdin.flush()
        said = [(tmp_path / f"{n}.out", tmp_path / f"{n}.err") for n in range(len(commands))]
        codes = json.loads(server.stdout.readline())
        return [
            (code, json.loads(out.read_text()), err.read_text()) for code, (out, err) in zip(codes, said, strict=True)
        ]

    return run


def whole(folder: RunFolder) -> None:
    """One run wrote this folder, from its first line to its last."""
    summary = read_json(folder.summary)
    assert summary["status"] == "finished"
    steps = [record["step"] for record in folder.records("train")]
    assert steps == list(range(1, summary["steps"] + 1))
    assert len(folder.metrics.read_text().splitlines()) == len(folder.records())
    assert len(folder.records("start")) == len(folder.records("finish")) == 1
    assert not list(folder.path.rglob("*.partial"))
    assert not folder.lock.exists()


def test_of_two_runs_into_one_folder_the_second_is_refused(at_once, recipe_file, tmp_path):
    command = ["train", "--recipe", recipe_file, *SHORT, "--output", tmp_path / "run", "--json"]
    refused, trained = sorted(at_once(command, command), key=lambda ended: -ended[0])
    assert (trained[0], refused[0]) == (0, 2), (trained, refused)
    assert refused[1]["error"] == "UsageError"
    assert refused[1]["problems"][0]["where"] == str(tmp_path / "run")
    whole(RunFolder(tmp_path / "run"))


def test_two_grids_share_one_output_and_one_cache(at_once, recipe_file, tmp_path):
    command = ["compare", "--recipe", recipe_file, *SHORT, "--methods", "none,dropkey", "--seeds", "2", "--json"]
    first, second = at_once(*[[*command, "--output", tmp_path / "grid"]] * 2)
    assert (first[0], second[0]) == (0, 0), (first, second)
    cells = [path for path in (tmp_path / "grid").iterdir() if path.is_dir()]
    assert len(cells) == 4
    for cell in cells:
        whole(RunFolder(cell))
    last = read_json(tmp_path / "grid" / "comparison.json")
    assert [row["seeds"] for row in last["rows"]] == [[1, 2], [1, 2]]  # the last to end has them all
    assert last in (first[1], second[1])
    assert (last["failed"], last["warnings"]) == ({}, [])


def test_two_grids_over_one_cache(at_once, recipe_file, tmp_path):
    command = ["compare", "--recipe", recipe_file, *SHORT, "--methods", "none,dropkey", "--seeds", "1", "--json"]
    ended = at_once(*[[*command, "--output", tmp_path / name] for name in ("one", "other")])
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert "warning" not in ended[0][2] + ended[1][2]
    scores = [[row["scores"]["best"]["values"] for row in document["rows"]] for _, document, _ in ended]
    assert scores[0] == scores[1]
    entries = list((tmp_path / "cache").iterdir())
    assert entries
    for entry in entries:
        assert read_json(entry / "entry.json")["files"].keys() == {p.name for p in entry.iterdir()} - {"entry.json"}


def test_one_that_comes_for_the_lock_while_the_folder_goes_keeps_it_from_going_once_more(tmp_path, monkeypatch):
    folder, own = RunFolder(tmp_path / "run"), os.rmdir

    def late(path, **kwargs):  # the lock was opened by the name that the folder had
        monkeypatch.setattr(os, "rmdir", own)
        (next(tmp_path.glob(".run.*.gone")) / ".lock").touch()
        own(path, **kwargs)

    monkeypatch.setattr(os, "rmdir", late)
    with folder.held():
        folder.remove()
    assert not list(tmp_path.iterdir())


def _writes(path: Path, rounds: int) -> int:
    """Holds the folder and empties it, as runs that begin and end at once do: how often nobody else was inside."""
    folder, times = RunFolder(path), 0
    for number in range(rounds):
        with suppress(UsageError), folder.held():
            inside = path / "inside"
            inside.touch(exist_ok=False)  # FileExistsError: another process is
            times += 1
            if number % 3:
                inside.unlink()
            else:
                folder.remove()
        _ = folder.busy
    return times


def test_a_folder_is_held_by_one_process_at_a_time(tmp_path):
    """The lock's file is removed when it is released, and with the folder: no third process gets in by that."""
    with multiprocessing.get_context("forkserver").Pool(4) as pool:
        times = pool.starmap(_writes, [(tmp_path / "run", 400)] * 4)
    assert sum(times) > 400
