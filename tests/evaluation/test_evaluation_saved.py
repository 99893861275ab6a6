"""An adapter that does not fit is refused: PEFT would leave what it does not find at its first, random value."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from hkft import api
from hkft.errors import SetupError, UsageError
from hkft.evaluation.saved import load_saved
from hkft.folder import RunFolder


@pytest.fixture
def run(recipe_file: Path, tmp_path: Path) -> RunFolder:
    return api.train(
        recipe_file, ["train.num_train_epochs=1", "diagnostics.evals_per_epoch=1"], output=tmp_path / "run"
    )


@pytest.mark.parametrize(
    ("gone", "found"), [("classifier", "classifier.weight"), ("layer.1.attention", "Found missing adapter keys")]
)
def test_an_adapter_with_weights_missing_is_refused(run, gone, found):
    weights = run.adapter / "adapter_model.safetensors"
    kept = {name: tensor for name, tensor in load_file(weights).items() if gone not in name}
    save_file(kept, weights)
    with pytest.raises(SetupError, match="the adapter does not fit the base model") as caught:
        load_saved(run.path)
    assert found in str(caught.value.problems[0].found)
    assert caught.value.problems[0].where == str(run.adapter)


def test_an_adapter_of_another_size_is_refused(run):
    weights = run.adapter / "adapter_model.safetensors"
    save_file(
        {name: tensor.repeat(1, 2) if "lora_A" in name else tensor for name, tensor in load_file(weights).items()},
        weights,
    )
    with pytest.raises(SetupError, match="the adapter does not fit the base model"):
        load_saved(run.path)


def test_a_damaged_adapter_is_refused(run):
    weights = run.adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(SetupError, match="the adapter does not fit the base model"):
        load_saved(run.path)


def test_an_adapter_alone_needs_a_recipe(run):
    with pytest.raises(UsageError, match="an adapter alone does not say") as caught:
        load_saved(run.adapter)
    assert caught.value.problems[0].hint == "--recipe names the recipe it was trained with, or one like it"
