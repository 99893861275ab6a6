"""The command line as a user has it: an empty folder to stand in, a tiny recipe, one finished run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hkft.cli.main import app

LOOKS = ("NO_COLOR", "CI", "GITHUB_ACTIONS", "FORCE_COLOR", "PY_COLORS", "COLUMNS", "TERMINAL_WIDTH")

RECIPE = """\
# tiny: a test
model: {{name: {model}, device: cpu}}
data: {{train: {rows}, validation: 0.25, text: text, label: label, max_length: 32}}
lora: {{r: 4, lora_alpha: 8, target_modules: [query, value]}}
dropout: {{method: hiddenkey, rate: 0.1, weight: 0.5}}
train: {{learning_rate: 1.0e-2, num_train_epochs: 2, per_device_train_batch_size: 16, logging_steps: 1}}
diagnostics: {{evals_per_epoch: 2}}
"""


@dataclass(frozen=True)
class Ran:
    """What a command left on the two streams, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """Stdout, all of it, as one JSON document."""
        return json.loads(self.out)


Command = Callable[..., Ran]


def in_process(*args: str | Path) -> Ran:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Ran(result.exit_code, result.stdout, result.stderr)


@pytest.fixture
def hkft() -> Command:
    """`hkft("train", "--recipe", path)`, within this process: torch is loaded once for all tests."""
    return in_process


@pytest.fixture
def shell() -> Command:
    """The same as a process of its own, for what only a process shows."""

    def run(*args: str | Path, **environ: str) -> Ran:
        command = [sys.executable, "-m", "hkft", *map(str, args)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **environ})
        return Ran(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder and an empty cache, an environment that asks for no particular looks, one thread a process."""
    for name in LOOKS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HKFT_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def tiny(here: Path, tiny_bert: Path, reviews: Path) -> Path:
    """`tiny.yaml` in the working folder, with its rows beside it: a second of training."""
    shutil.copy(reviews, "reviews.csv")
    path = Path("tiny.yaml")
    path.write_text(RECIPE.format(model=tiny_bert, rows="reviews.csv"), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, reviews: Path) -> Path:
    """A run that `hkft train` finished. Look at it only: `run` is a copy to change."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = folder / "tiny.yaml"
    recipe.write_text(RECIPE.format(model=tiny_bert, rows=reviews), encoding="utf-8")
    ran = in_process("train", "--recipe", recipe, "--output", folder / "run")
    assert ran.code == 0, ran.err
    return folder / "run"


@pytest.fixture
def run(trained: Path, here: Path) -> Path:
    """A finished run, as `run` in the working folder."""
    return Path(shutil.copytree(trained, "run"))
