"""`model.adapter`: a run that begins where another adapter ended."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from hkft import api
from hkft.errors import RecipeError, SetupError
from hkft.events import Notice
from hkft.folder import read_json


@pytest.fixture(scope="module")
def first(tmp_path_factory, recipe_text):
    folder = tmp_path_factory.mktemp("first")
    recipe = folder / "tiny.yaml"
    text = recipe_text.replace("method: hiddenkey, rate: 0.1, weight: 0.5", "method: none")
    recipe.write_text(text.replace("evals_per_epoch: 2", "evals_per_epoch: 1"), encoding="utf-8")
    return recipe, api.train(recipe, output=folder / "run")


@pytest.mark.parametrize("which", ["run", "run/adapter"])
def test_a_warm_start_begins_with_what_the_adapter_knows(first, tmp_path, which):
    recipe, before = first
    place = before.path.parent / which
    warm = api.train(recipe, [f"model.adapter={place}", "dropout.method=hiddenkey"], output=tmp_path / "warm")
    looks, best = warm.records("eval"), read_json(before.summary)["best"]
    assert looks[0]["step"] == 0
    for split in ("validation", "train_probe"):
        assert looks[0][split]["loss"] == pytest.approx(best[split]["loss"], rel=1e-5)
    environment = read_json(warm.environment)["model"]
    assert environment["adapter"] == str(place)
    assert len(environment["adapter_sha256"]) == 64
    assert looks[-1]["validation"] != looks[0]["validation"]


def test_it_is_no_resumed_run(first, tmp_path):
    recipe, before = first
    warm = api.train(recipe, [f"model.adapter={before.path}"], output=tmp_path / "warm")
    summary = read_json(warm.summary)
    assert (summary["steps"], summary["total_steps"]) == (16, 16)
    after = load_file(warm.adapter / "adapter_model.safetensors")
    assert any(
        not torch.equal(value, after[name])
        for name, value in load_file(before.adapter / "adapter_model.safetensors").items()
    )


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["lora.r=2"], "r: 4, the recipe's 2"),
        (["lora.lora_alpha=4"], "lora_alpha: 8, the recipe's 4"),
        (["lora.target_modules=[query]"], "target_modules: ['query', 'value'], the recipe's ['query']"),
    ],
)
def test_another_lora_section_is_refused(first, tmp_path, overrides, text):
    recipe, before = first
    with pytest.raises(RecipeError, match="another lora section") as caught:
        api.train(recipe, [f"model.adapter={before.path}", *overrides], output=tmp_path / "warm")
    assert text in str(caught.value)
    assert not (tmp_path / "warm").exists()


def test_an_adapter_that_is_not_there_is_said(first, tmp_path):
    with pytest.raises(SetupError, match="there is no adapter to start from") as caught:
        api.train(first[0], [f"model.adapter={tmp_path / 'nowhere'}"], output=tmp_path / "warm")
    assert caught.value.problems[0].where == "model.adapter"


def broken(before, place, change):
    shutil.copytree(before.adapter, place)
    weights = change(load_file(place / "adapter_model.safetensors"))
    save_file(weights, place / "adapter_model.safetensors")
    return place


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda weights: dict(list(weights.items())[1:]), "no base_model"),
        (lambda weights: {**weights, "base_model.model.more": torch.ones(2)}, "which the model has not"),
        (
            lambda weights: {
                name: torch.ones(3, 32) if "classifier.weight" in name else value for name, value in weights.items()
            },
            "size mismatch",
        ),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_an_adapter_of_another_model_is_refused(first, tmp_path, change, text):
    recipe, before = first
    place = broken(before, tmp_path / "adapter", change)
    with pytest.raises(SetupError, match="does not fit the model") as caught:
        api.train(recipe, [f"model.adapter={place}"], output=tmp_path / "warm")
    assert text in str(caught.value)


def test_other_labels_are_refused_and_another_base_is_told(first, tmp_path):
    recipe, before = first
    other = shutil.copytree(before.path, tmp_path / "other")
    splits = json.loads((other / "splits.json").read_text())
    (other / "splits.json").write_text(json.dumps({**splits, "labels": ["positive", "negative"]}))
    with pytest.raises(SetupError, match="the adapter was trained on other labels"):
        api.train(recipe, [f"model.adapter={other}"], output=tmp_path / "warm")
    config = json.loads((before.adapter / "adapter_config.json").read_text())
    place = shutil.copytree(before.adapter, tmp_path / "adapter")
    (place / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "some/bert"}))
    heard: list = []
    api.train(recipe, [f"model.adapter={place}"], output=tmp_path / "warm", tell=heard.append)
    assert any("was trained on some/bert" in event.text for event in heard if isinstance(event, Notice))


def test_pickled_weights_are_refused(first, tmp_path):
    recipe, before = first
    place = shutil.copytree(before.adapter, tmp_path / "adapter")
    (place / "adapter_model.safetensors").rename(place / "adapter_model.bin")
    with pytest.raises(SetupError, match="pickled"):
        api.train(recipe, [f"model.adapter={place}"], output=tmp_path / "warm")
