"""The moving average of the adapter: what is looked at and kept; training itself does not know of it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from hkft import api
from hkft.errors import RecipeError
from hkft.evaluation import saved
from hkft.events import Event, TrainStep
from hkft.folder import RunFolder, read_json
from hkft.recipe import load
from hkft.training import run

DECAY = 0.9
AVERAGE = [f"diagnostics.average={DECAY}", "diagnostics.evals_per_epoch=1", "train.learning_rate=0.01"]


class Seen(TrainerCallback):
    """The trained parameters before training and after every step."""

    def __init__(self, model) -> None:
        self.model = model
        self.steps: list[dict[str, torch.Tensor]] = []

    def _keep(self, *_, **__) -> None:
        self.steps.append({n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad})

    on_train_begin = on_step_end = _keep


def plain_of(name: str) -> str:
    return name.replace(".default", "").replace("modules_to_save.", "")


def average_of(steps: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """As the recipe's words have it, written out."""
    average = dict(steps[0])
    for t, step in enumerate(steps[1:], 1):
        decay = min(DECAY, (1 + t) / (10 + t))
        average = {name: decay * average[name] + (1 - decay) * step[name] for name in average}
    return average


def test_the_average_is_kept_and_training_does_not_know_of_it(recipe_file: Path, tmp_path: Path):
    begun = run.begin(load(recipe_file, [*AVERAGE, "diagnostics.metric=loss"]), tmp_path / "run")
    seen = Seen(begun.trainer.model)
    begun.trainer.add_callback(seen)
    begun.fit()
    best = read_json(begun.folder.summary)["best_step"]
    kept, wanted = load_file(begun.folder.adapter / "adapter_model.safetensors"), average_of(seen.steps[: best + 1])
    for name, value in wanted.items():
        torch.testing.assert_close(kept[plain_of(name)], value, rtol=1e-5, atol=1e-7)
    assert any((kept[plain_of(name)] - seen.steps[best][name]).abs().max() > 1e-4 for name in wanted)

    plain = api.train(recipe_file, [*AVERAGE[1:]], output=tmp_path / "plain")
    logged = [[r["objective"] for r in folder.records("train")] for folder in (begun.folder, plain)]
    assert logged[0] == logged[1]
    last = load_file(begun.folder.last_checkpoint() / "adapter_model.safetensors")  # what training goes on from
    assert all(torch.equal(last[plain_of(name)], value) for name, value in seen.steps[-1].items())


def test_what_was_kept_gives_the_look_s_own_numbers(recipe_file: Path, tmp_path: Path):
    done = api.train(recipe_file, AVERAGE, output=tmp_path / "run")
    found = saved.evaluate(saved.load_saved(done.path)).metrics()
    best = read_json(done.summary)["best"]["validation"]
    assert found["loss"] == pytest.approx(best["loss"], rel=1e-5)


def test_a_resumed_run_goes_on_with_its_average(recipe_file: Path, tmp_path: Path):
    def interrupt(event: Event) -> None:
        if isinstance(event, TrainStep) and event.step == 10:
            os.kill(os.getpid(), signal.SIGINT)

    whole = api.train(recipe_file, AVERAGE, output=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        api.train(recipe_file, AVERAGE, output=tmp_path / "run", tell=interrupt)
    done: RunFolder = api.train(recipe_file, AVERAGE, output=tmp_path / "run", resume=True)
    for one, other in zip(done.records("eval"), whole.records("eval"), strict=True):
        assert one["validation"]["loss"] == pytest.approx(other["validation"]["loss"], rel=1e-6)


@pytest.mark.parametrize("decay", [0, 1, 1.5, "much"])
def test_a_decay_lies_between_0_and_1(recipe_file: Path, decay):
    with pytest.raises(RecipeError, match=r"diagnostics\.average"):
        load(recipe_file, [f"diagnostics.average={decay}"])
