"""What runs of one process share: a run that takes it is the run that would have loaded it itself, bit for bit."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hkft import api, folder
from hkft.events import Notice
from hkft.folder import RunFolder, read_json, write_json
from hkft.model import build
from hkft.recipe import load
from hkft.training import shelf as shelves
from hkft.training.prepare import prepare
from hkft.training.shelf import Shelf

SHORT = ["train.num_train_epochs=1", "diagnostics.evals_per_epoch=1"]


@pytest.fixture
def train(recipe_file, tmp_path):
    def train(shelf, *settings, name="") -> RunFolder:
        place = tmp_path / f"{name or ('shelf' if shelf else 'own')} {' '.join(settings).replace('/', '-')}"
        return api.train(recipe_file, [*SHORT, *settings], output=place, shelf=shelf)

    return train


def base_of(shelf, recipe, material):
    return shelf.base(recipe, material.labels, build.padding_id(material.tokenizer))


def facts(run: RunFolder):
    """Everything that is not time: the losses of every step, the looks, the rows, and what is predicted of each."""
    timed = ("seconds", "samples_per_s", "tokens_per_s")
    records = [{key: value for key, value in each.items() if key not in timed} for each in run.records("train", "eval")]
    assert {"objective", "validation"} <= {key for record in records for key in record}
    return records, run.splits.read_text(), run.predictions("validation").read_text()


def weights(run: RunFolder):
    return load_file(run.adapter / "adapter_model.safetensors")


def same(one: RunFolder, other: RunFolder) -> None:
    assert facts(one) == facts(other)
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert read_json(one.environment)["data"] == read_json(other.environment)["data"]


def test_runs_that_share_are_those_that_do_not(train):
    shelf = Shelf()
    cells = [("dropout.method=none",), ("dropout.method=hiddenkey",), ("dropout.method=dropkey", "seed=2"),
             ("dropout.method=none", "seed=2")]  # fmt: skip
    shared = [train(shelf, *cell) for cell in cells]
    assert shelf.taken == {"material": 2, "test": 0, "base": 2}
    for cell, run in zip(cells, shared, strict=True):
        torch.rand(3)  # where the process's generators stand is nothing to a run
        same(run, train(None, *cell))
    assert shared[0].splits.read_text() != shared[2].splits.read_text()
    assert any(not torch.equal(weights(shared[0])[name], weights(shared[1])[name]) for name in weights(shared[0]))


def test_looks_at_test_rows_share_too(train):
    shelf = Shelf()
    cells = [(f"dropout.method={method}", "data.test=0.3") for method in ("none", "dropkey")]
    for cell in cells:
        shared, own = train(shelf, *cell), train(None, *cell)
        told, alone = [], []
        api.evaluate_test(shared, told.append, shelf)
        api.evaluate_test(own, alone.append)
        assert shared.predictions("test").read_text() == own.predictions("test").read_text()
        assert read_json(shared.summary)["test"] == read_json(own.summary)["test"]
        assert [each for each in told if isinstance(each, Notice)] == [
            each for each in alone if isinstance(each, Notice)
        ]
    assert shelf.taken == {"material": 1, "test": 1, "base": 3}  # the first run's test rows take its base


def test_a_resumed_run_may_share_too(train, recipe_file, tmp_path, monkeypatch):
    recipe, shelf = load(recipe_file, ["dropout.method=hiddenkey"]), Shelf()
    whole = api.train(recipe, output=tmp_path / "whole")
    cut = shutil.copytree(whole.path, tmp_path / "cut")
    summary = read_json(cut / "summary.json")
    write_json(cut / "summary.json", {**summary, "status": "interrupted"})
    for checkpoint in (cut / "checkpoints").glob("checkpoint-16"):
        shutil.rmtree(checkpoint)
    api.train(load(recipe_file, ["dropout.method=none"]), output=tmp_path / "before", shelf=shelf)
    resumed = api.train(recipe, output=cut, resume=True, shelf=shelf)
    assert shelf.taken == {"material": 1, "test": 0, "base": 1}
    assert [look["validation"] for look in resumed.records("eval")] == [
        look["validation"] for look in whole.records("eval")
    ]
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(resumed).items())


def test_training_leaves_what_is_on_the_shelf_as_it_was(recipe_file, tmp_path):
    shelf, recipe = Shelf(), load(recipe_file, SHORT)
    material = shelf.material(recipe, lambda _: None)
    before = {name: value.clone() for name, value in base_of(shelf, recipe, material).state_dict().items()}
    api.train(recipe, output=tmp_path / "run", shelf=shelf)
    after = base_of(shelf, recipe, material).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert shelf.material(recipe, lambda _: None) is material


def test_a_copy_is_no_alias_and_leaves_the_stream_where_loading_does(recipe_file):
    shelf, recipe = Shelf(), load(recipe_file)
    material = prepare(recipe, lambda _: None)
    one = base_of(shelf, recipe, material)
    stream = torch.rand(4)
    other = base_of(shelf, recipe, material)
    assert torch.equal(torch.rand(4), stream)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.add_(1)
    third = base_of(shelf, recipe, material).state_dict()
    assert all(torch.equal(value, third[name]) for name, value in other.state_dict().items())


@pytest.mark.parametrize(("setting", "material", "base"), [
    ("dropout.method=none", 1, 1), ("train.learning_rate=0.1", 1, 1), ("lora.r=2", 1, 1), ("diagnostics.metric=f1", 1, 1),
    ("diagnostics.probe_size=9", 0, 1), ("data.max_length=9", 0, 1), ("seed=2", 0, 0), ("model.native_dropout=0.3", 0, 0),
])  # fmt: skip
def test_what_another_value_leaves_on_the_shelf(recipe_file, setting, material, base):
    shelf = Shelf()
    for recipe in (load(recipe_file), load(recipe_file, [setting])):
        base_of(shelf, recipe, shelf.material(recipe, lambda _: None))
    assert shelf.taken == {"material": material, "test": 0, "base": base}


@pytest.mark.parametrize("labels", [["positive", "unsure"], ["positive", "negative", "unsure"]])
def test_a_head_is_of_the_labels_of_its_own_data(recipe_file, reviews, tmp_path, labels):
    rows = [line.rpartition(",")[0].rpartition(",") for line in reviews.read_text().splitlines()[1:]]
    other = tmp_path / "other.csv"
    lines = [f"{text},{labels[number % len(labels)]},1" for number, (text, _, _) in enumerate(rows)]
    other.write_text("\n".join(["text,other,label,stars", *lines]) + "\n")
    shelf = Shelf()
    for recipe in (load(recipe_file), load(recipe_file, [f"data.train={other}"])):
        material = shelf.material(recipe, lambda _: None)
        base = base_of(shelf, recipe, material)
        assert base.num_labels == len(material.labels)
        assert tuple(base.config.id2label.values()) == material.labels


def test_quantised_and_large_weights_are_loaded_anew(recipe_file, monkeypatch):
    made = []

    def base(recipe, labels, padding):
        made.append(recipe.model.quantization)
        return torch.nn.Linear(2, 2)

    monkeypatch.setattr(build, "base", base)
    material = prepare(load(recipe_file), lambda _: None)
    for quantization, share, loaded in (("4bit", 0.25, 2), ("8bit", 0.25, 2), ("none", 0.25, 1), ("none", 0.0, 2)):
        made.clear()
        monkeypatch.setattr(shelves, "SHARE", share)
        shelf, recipe = Shelf(), load(recipe_file, [f"model.quantization={quantization}"])
        for _ in range(2):
            base_of(shelf, recipe, material)
        assert made == [quantization] * loaded


def test_a_shelf_that_keeps_nothing(recipe_file):
    shelf, recipe = Shelf(keeps=False), load(recipe_file)
    for _ in range(2):
        base_of(shelf, recipe, shelf.material(recipe, lambda _: None))
    assert (shelf.rows_of, shelf.base_of, shelf.taken) == ({}, None, {"material": 0, "test": 0, "base": 0})


def test_notices_are_told_again(train):
    shelf, few = Shelf(), "data.validation=0.05"  # 8 rows: a warning
    first, again = (
        [record["text"] for record in train(shelf, few, f"dropout.method={method}").records("notice")]
        for method in ("none", "dropkey")
    )
    assert shelf.taken["material"] == 1
    assert sum("only 8 validation rows" in text for text in again) == 1
    assert [text for text in again if "the method was checked" not in text] == first


def test_what_is_told_again_are_notices_in_their_order(recipe_file):
    shelf, recipe = Shelf(), load(recipe_file, ["data.validation=0.05", "data.max_length=8"])
    heard = [[], []]
    for each in heard:
        shelf.material(recipe, each.append)
    first, again = ([event for event in each if isinstance(event, Notice)] for each in heard)
    assert first == again
    assert len(first) >= 2
    assert heard[1] == again  # nothing is read, so no stage is told


def test_rows_that_cannot_be_prepared_leave_the_shelf_as_it_was(recipe_file):
    shelf, recipe = Shelf(), load(recipe_file)
    material = shelf.material(recipe, lambda _: None)
    with pytest.raises(Exception, match="nowhere"):
        shelf.material(load(recipe_file, ["data.train=nowhere.csv"]), lambda _: None)
    assert shelf.material(recipe, lambda _: None) is material


def test_texts_to_be_learned_are_shared_as_well(generation_file, tmp_path):
    settings, runs = ["generation.max_new_tokens=4", "diagnostics.evals_per_epoch=1"], []
    for shelf in (Shelf(), None):
        for method in ("none", "hiddencut"):
            place = Path(tmp_path / f"{method} {bool(shelf)}")
            runs.append(api.train(generation_file, [*settings, f"dropout.method={method}"], output=place, shelf=shelf))
    assert facts(runs[1]) == facts(runs[3])
    assert json.dumps(runs[1].records("sample")) == json.dumps(runs[3].records("sample"))
    assert all(torch.equal(value, weights(runs[3])[name]) for name, value in weights(runs[1]).items())


def test_json_with_arrays_is_written_as_json_with_lists(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "PIECE", 2)
    nested = {"x": [1, {"y": "line\nbreak"}], "z": []}
    content = {"a": np.arange(5), "b": nested, "c": np.array([], int), "d": np.array([0.5, np.nan]), "e": np.float64(2)}
    plain = {"a": [0, 1, 2, 3, 4], "b": nested, "c": [], "d": [0.5, None], "e": 2.0}
    for given, expected in ((content, plain), ({}, {})):
        folder.write_json(tmp_path / "a.json", given)
        assert (tmp_path / "a.json").read_text() == json.dumps(expected, indent=2) + "\n"
