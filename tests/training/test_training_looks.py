"""What a look tells beside the losses: the parts, the intervals, the rows; and that looking changes nothing."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hkft import api
from hkft.diagnostics.decomposition import Added
from hkft.diagnostics.history import history_of, losses_of
from hkft.events import Event, Notice, TrainStep
from hkft.folder import RunFolder, read_json, read_jsonl
from hkft.recipe import load
from hkft.training import prepare, watcher
from hkft.training.trainer import Trainer


@pytest.fixture
def whole(recipe_file: Path, tmp_path: Path) -> RunFolder:
    return api.train(recipe_file, output=tmp_path / "whole")


def test_the_parts_add_up_and_are_what_their_names_say(whole):
    looks = whole.records("eval")
    assert len(looks) > 3
    for look in looks:
        parts = look["regularisation"]
        assert parts["total"] == pytest.approx(parts["dropout"] + parts["consistency"], abs=3e-6)
        assert parts["consistency"] > 0  # two masks, two outputs
        assert look["net_gain"]["loss"] == pytest.approx(looks[0]["validation"]["loss"] - look["validation"]["loss"])
        assert look["net_gain"]["accuracy"] == pytest.approx(
            look["validation"]["accuracy"] - looks[0]["validation"]["accuracy"]
        )
        so_far = [each["validation"]["loss"] for each in looks if each["step"] <= look["step"]]
        assert look["regret"]["loss"] == pytest.approx(look["validation"]["loss"] - min(so_far))
        low, high = look["gap_interval"]
        assert low < look["gap"]["loss"] < high
        assert look["regret_interval"][0] <= look["regret"]["loss"] + 1e-9
        assert look["regret_interval"][1] >= look["regret"]["loss"] - 1e-9
        assert 0 < look["rise_p"] <= 1


def test_without_dropout_nothing_is_added(recipe_file, tmp_path):
    done = api.train(recipe_file, ["dropout.method=none"], output=tmp_path / "run")
    for look in done.records("eval"):
        assert look["regularisation"] == pytest.approx(
            {"total": 0, "dropout": 0, "smoothing": 0, "consistency": 0}, abs=1e-6
        )


def test_softened_labels_are_told_apart_from_dropout(recipe_file, generation_file, tmp_path):
    for recipe in (recipe_file, generation_file):
        settings = ["dropout.method=none", "train.label_smoothing_factor=0.2"]
        done = api.train(recipe, settings, output=tmp_path / recipe.stem)
        last = done.records("eval")[-1]["regularisation"]
        assert last["dropout"] == pytest.approx(0, abs=1e-5)
        assert abs(last["smoothing"]) > 1e-4
        assert last["total"] == pytest.approx(last["smoothing"], abs=2e-5)


def test_the_weight_of_the_consistency_is_in_it(recipe_file, tmp_path):
    """At step 0, where the two runs are one model: the same masks, and ten times the weight."""
    parts = [
        api.train(
            recipe_file, [f"dropout.weight={weight}", "train.max_steps=1"], output=tmp_path / str(weight)
        ).records("eval")[0]["regularisation"]
        for weight in (0.1, 1.0)
    ]
    assert parts[1]["consistency"] == pytest.approx(10 * parts[0]["consistency"], abs=1e-5)
    assert parts[1]["consistency"] > 1e-4
    assert parts[1]["dropout"] == pytest.approx(parts[0]["dropout"], abs=3e-6)


def test_looking_changes_nothing_of_the_training(recipe_file, tmp_path, whole, monkeypatch):
    monkeypatch.setattr(Trainer, "aside", lambda *_: Added(0.0, 0.0, 0.0, 0.0))
    other = api.train(recipe_file, output=tmp_path / "other")
    told = [[record["objective"] for record in each.records("train")] for each in (whole, other)]
    assert told[0] == told[1]
    assert len(told[0]) == 16
    weights = [load_file(each.adapter / "adapter_model.safetensors") for each in (whole, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert [site["calls"] for site in read_json(whole.summary)["sites"]] == [
        site["calls"] for site in read_json(other.summary)["sites"]
    ]


@pytest.mark.parametrize("kind", ["classification", "generation"])
def test_every_row_s_loss_is_remembered(kind, recipe_file, generation_file, tmp_path):
    done = api.train(recipe_file if kind == "classification" else generation_file, output=tmp_path / "run")
    looks, evals = read_jsonl(done.history), done.records("eval")
    assert [look["step"] for look in looks] == [record["step"] for record in evals]
    splits = read_json(done.splits)
    for split in ("train_probe", "validation"):
        history = history_of(looks, split)
        assert history.losses.shape == (len(looks), len(splits[split]))
        for look, record in zip(looks, evals, strict=True):
            assert losses_of(look[split]).mean == pytest.approx(record[split]["loss"], rel=1e-5)
        if kind == "classification":
            assert history.right is not None
            expected = [record[split]["accuracy"] for record in evals]
            assert history.right.mean(1) == pytest.approx(expected)
        else:
            assert history.right is None
            assert np.array(looks[0][split]["items"]).min() > 1


def test_a_resumed_run_remembers_what_the_whole_one_does(recipe_file, tmp_path, whole):
    def interrupt(event: Event) -> None:
        if isinstance(event, TrainStep) and event.step == 10:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        api.train(recipe_file, output=tmp_path / "run", tell=interrupt)
    done = api.train(recipe_file, output=tmp_path / "run", resume=True)
    for one, other in zip(read_jsonl(done.history), read_jsonl(whole.history), strict=True):
        assert one["step"] == other["step"]
        assert one["validation"]["losses"] == pytest.approx(other["validation"]["losses"], rel=1e-4)
    for one, other in zip(done.records("eval"), whole.records("eval"), strict=True):
        for name in ("gap_interval", "regret_interval", "accuracy_interval"):
            assert one[name] == pytest.approx(other[name], abs=1e-4)
        assert one["rise_p"] == pytest.approx(other["rise_p"], abs=0.005)


def test_loggers_are_given_the_same_numbers_and_the_step_s_own_log_is_left(whole):
    state = json.loads((whole.last_checkpoint() / "trainer_state.json").read_text())["log_history"]  # type: ignore[operator]
    logged = [entry for entry in state if "eval_validation_loss" in entry]
    looks = [record for record in whole.records("eval") if record["step"] > 0]
    assert [entry["step"] for entry in logged if entry["step"]] == [look["step"] for look in looks]
    for entry, look in zip([entry for entry in logged if entry["step"]], looks, strict=True):
        for name in ("train_probe", "validation", "gap", "net_gain", "regret", "regularisation"):
            for key, value in look[name].items():
                assert entry[f"eval_{name}_{key}"] == pytest.approx(value, nan_ok=True)
    assert [entry["step"] for entry in state if "task_loss" in entry] == list(range(1, 17))


def test_what_rows_say_stands_with_their_predictions(whole, reviews):
    texts = set(reviews.read_text().lower().split())
    for split in ("train_probe", "validation"):
        for row in read_jsonl(whole.predictions(split)):
            assert row["text"]
            assert set(row["text"].split()) <= {word.strip('",') for line in texts for word in line.split(",")} | texts


def test_near_duplicates_and_the_adapter_are_in_the_folder(recipe_file, tmp_path, reviews, monkeypatch):
    monkeypatch.setenv("HKFT_CACHE", str(tmp_path / "cache"))
    lines = reviews.read_text().splitlines()
    text, rest = lines[1].split(",", 1)
    train, validation = tmp_path / "train.csv", tmp_path / "validation.csv"
    long = " ".join([text] * 4)
    train.write_text("\n".join([*lines, f"{long},{rest}"]) + "\n")
    validation.write_text("\n".join([*lines[:9], f"{long}!,{rest}"]) + "\n")
    files = [f"data.train={train}", f"data.validation={validation}"]
    done = api.train(recipe_file, files, output=tmp_path / "run")
    near = read_json(done.splits)["near_duplicates"]
    assert near["compared"] == 9
    almost = [pair for pair in near["pairs"] if pair["similarity"] < 1]
    assert any(pair["validation_text"] == f"{long}!" and pair["train_text"] == long for pair in almost)
    assert any("nearly stand in train" in record["text"] for record in done.records("notice"))
    told: list[Event] = []
    monkeypatch.setattr(prepare, "near_duplicates", None)  # they are looked for once
    again = prepare.prepare(load(recipe_file, files), told.append)
    assert again.near_duplicates == near
    assert sum("nearly stand in train" in event.text for event in told if isinstance(event, Notice)) == 1
    modules = read_json(done.summary)["adapter"]
    assert len(modules) == 4
    assert all(0 < each["effective_rank"] <= each["rank"] == 4 for each in modules)
    assert watcher.ASIDE >= 16
