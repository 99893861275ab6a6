"""The probe of `hkft check`: a few steps of a run, made and forgotten."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from hkft.events import silent
from hkft.folder import RunFolder, read_json
from hkft.recipe import load
from hkft.training import rehearsal, run
from hkft.training.plan import plan
from hkft.training.shelf import Shelf


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "ENOUGH", 0.0)


def losses(folder: RunFolder) -> list[float]:
    return [record["objective"] for record in folder.records("train")]


def test_a_probe_leaves_nothing_and_the_run_after_it_is_the_same(recipe_file, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path / "here")
    recipe = load(recipe_file)
    before = run.train(recipe, tmp_path / "before")
    found = rehearsal.rehearse(recipe, Shelf(), silent)
    assert [*Path().iterdir(), *(tmp_path / "temporary").iterdir()] == []
    after = run.train(recipe, tmp_path / "after")
    assert losses(before) == losses(after)
    assert found["steps_made"] == 2
    assert found["peak_memory_bytes"] > 2**20
    seconds = found["seconds"]
    assert 0 < seconds["looking"] < seconds["total"] == seconds["training"] + seconds["looking"]


@pytest.mark.parametrize("change", ["train.gradient_accumulation_steps=2", "data.train_rows=5", "train.max_steps=3"])
def test_of_any_recipe_that_trains(recipe_file, change):
    found = rehearsal.rehearse(load(recipe_file, [change]), Shelf(), silent)
    assert found["seconds"]["total"] > 0


def test_where_text_is_written_at_the_looks(generation_file):
    found = rehearsal.rehearse(load(generation_file, ["diagnostics.generate=2"]), Shelf(), silent)
    assert found["seconds"]["looking"] > 0


def test_a_plan_s_tokens_are_those_that_a_run_counts(recipe_file, tmp_path):
    recipe = load(recipe_file)
    summary = read_json(run.train(recipe, tmp_path / "run").summary)
    planned = plan(recipe, silent)
    counted = summary["train_tokens_per_s"] * summary["train_runtime_s"]  # each rounded
    assert planned["tokens"]["trained"] == pytest.approx(counted, rel=1e-3)
    assert planned["probe"] is None


def test_padding_counts_among_the_tokens_of_a_step():
    lengths = rehearsal.np.array([3, 5, 2, 2, 7])
    assert rehearsal._tokens(lengths, 2, False) == 2 * 5 + 2 * 2 + 7
    assert rehearsal._tokens(lengths, 2, True) == 19
