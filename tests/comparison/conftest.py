"""Run folders as training leaves them, without the training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hkft.folder import RunFolder, write_json, write_text
from hkft.recipe import Recipe, load

RECIPE = """\
model: {name: tiny}
data: {train: rows.csv, text: text, label: label, max_length: 16}
lora: {r: 4, target_modules: [query, value]}
dropout: {method: hiddenkey, rate: 0.1}
train: {learning_rate: 1.0e-3, num_train_epochs: 2}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return load(path)


def _write_run(
    folder: Path, recipe: Recipe, accuracy: float = 0.8, loss: float = 0.5, gap: float = 0.1, **changes
) -> Path:
    """A finished run of these numbers: at its end the accuracy is 0.01 lower, loss and gap 0.1 higher than at its best.

    changes: `data`, `device`, or any key of summary.json.
    """
    run = RunFolder(folder)
    rows = {"train": f"train {recipe.seed}", "validation": f"validation {recipe.seed}"}
    environment = {"data": changes.pop("data", rows), "device": changes.pop("device", "cuda:0")}
    best = {"train_probe": {"loss": loss - gap, "accuracy": 0.9}, "validation": {"loss": loss, "accuracy": accuracy}}
    final = {
        "train_probe": {"loss": loss - gap, "accuracy": 0.95},
        "validation": {"loss": loss + 0.1, "accuracy": accuracy - 0.01},
    }
    looks = [{"event": "eval", "step": step, "epoch": step / 10, **seen} for step, seen in ((10, best), (20, final))]
    write_text(run.resolved, recipe.resolved())
    write_text(run.recipe, recipe.source)
    write_json(run.environment, environment)
    write_text(run.metrics, "".join(f"{look}\n".replace("'", '"') for look in looks))
    summary = {
        "status": "finished",
        "recipe": recipe.name,
        "recipe_fingerprint": recipe.fingerprint(),
        "method": recipe.method.name,
        "model": recipe.model.name,
        "seed": recipe.seed,
        "task": recipe.task,
        "metric": "accuracy",
        "steps": 20,
        "total_steps": 20,
        "best_step": 10,
        "best": best,
        "final": final,
        "gap": {"best": {"loss": gap}, "final": {"loss": gap + 0.1}},
        "verdict": {"name": "healthy"},
        "train_runtime_s": 10.0,
        "train_samples_per_s": 50.0,
        "peak_memory_bytes": 2**30,
    }
    write_json(run.summary, {**summary, **changes})
    return folder


@pytest.fixture
def write_run() -> Callable[..., Path]:
    return _write_run


class _Stub:
    """Training that writes a finished run, or raises what it is told to for a title."""

    def __init__(self, **errors: BaseException):
        self.errors = errors
        self.calls: list[tuple[str, bool]] = []

    def __call__(self, cell, folder, resume, tell):
        recipe = cell.recipe
        self.calls.append((folder.path.name, resume))
        error = self.errors.get(f"{recipe.method.name.replace('-', '_')}{recipe.seed}")
        if error:
            raise error
        _write_run(folder.path, recipe, accuracy=0.8 + recipe.seed / 100)


@pytest.fixture
def stub() -> type[_Stub]:
    return _Stub
