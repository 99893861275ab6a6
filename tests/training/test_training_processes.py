"""One run in two processes, as torchrun and `accelerate launch` start them, beside the same run in one."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from hkft import api, processes
from hkft.cli.main import app
from hkft.errors import DataError, HkftError, SetupError, UsageError, as_told
from hkft.evaluation.predict import looking
from hkft.folder import RunFolder, read_json, read_jsonl
from hkft.recipe import load
from hkft.training.prepare import arguments

ODD = [
    "train.num_train_epochs=2",
    "data.train_rows=112",
    "data.validation_rows=33",
    "train.per_device_eval_batch_size=7",
]  # 5 batches in a look
NONE = ["dropout.method=none", "dropout.weight=0"]
PARTED = ["diagnostics.evals_per_epoch=1"]

CALLS = """
import json, os, sys, warnings
from pathlib import Path
import torch
from hkft import api, processes
from hkft.errors import DivergedError, HkftError
from hkft.dropout import selfcheck
from hkft.training.trainer import Trainer

selfcheck.BUDGET = 0.0
place, rank = Path(sys.argv[1]), processes.number()
objective = Trainer._objective

def broken(self, model, inputs, logits=False):
    found = objective(self, model, inputs, logits)
    at = rank == 1 and model.training and self.state.global_step == 2
    return type(found)(found.loss * float("nan"), *found[1:]) if at else found

for name, recipe, overrides, resume in json.loads((place / "calls.json").read_text()):
    heard = []
    Trainer._objective = broken if name == "diverged" else objective
    try:
        folder = api.train(recipe, overrides, output=place / name.rstrip("+"), resume=resume, tell=heard.append)
        outcome = json.loads(folder.summary.read_text())["status"]
    except HkftError as error:
        outcome = f"{type(error).__name__}: {error.problems[0].message}"
    (place / f"{name}.{rank}").write_text(json.dumps([outcome, len(heard)]))
"""


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]  # on CPUs, too
ACCELERATE += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


def launched(launcher: list[str], *command: str) -> subprocess.Popen[str]:
    """Two processes; nothing but the command is on the path of imports."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(
        [*launcher, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(running: subprocess.Popen[str]) -> tuple[str, str]:
    try:
        return running.communicate(timeout=150)
    finally:
        running.terminate()  # torchrun ends its processes, where they hang


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def recipes(place: Path, tiny_bert: Path, reviews: Path, tiny_llama: Path, meanings: Path) -> dict[str, Path]:
    texts = {
        "tiny": f"""\
model: {{name: {tiny_bert}, device: cpu}}
data: {{train: {reviews}, text: text, label: label, max_length: 32}}
lora: {{r: 4, lora_alpha: 8, target_modules: [query, value]}}
dropout: {{method: hiddenkey, rate: 0.1, weight: 0.5}}
train: {{learning_rate: 1.0e-2, num_train_epochs: 4, per_device_train_batch_size: 8, logging_steps: 1}}
diagnostics: {{evals_per_epoch: 2}}
""",
        "writing": f"""\
model: {{name: {tiny_llama}, device: cpu}}
task: generation
data: {{train: {meanings}, validation: 0.2, prompt: "{{meaning}} ->", completion: " {{reference}}", max_length: 96}}
lora: {{r: 4, lora_alpha: 8, target_modules: [q_proj, v_proj]}}
dropout: {{method: none}}
train: {{learning_rate: 1.0e-2, num_train_epochs: 1, per_device_train_batch_size: 8}}
generation: {{max_new_tokens: 8, metrics: [rouge_l], do_sample: true, batch_size: 1}}
diagnostics: {{evals_per_epoch: 1, generate: 3}}
""",
    }
    for name, text in texts.items():
        (place / f"{name}.yaml").write_text(text, encoding="utf-8")
    return {name: place / f"{name}.yaml" for name in texts}


@pytest.fixture(scope="module")
def stopped(place: Path, recipes: dict[str, Path]) -> tuple[RunFolder, str]:
    """A run that SIGTERM to the launcher has stopped after some steps; and what the terminal showed."""
    folder = RunFolder(place / "stopped")
    command = ["-m", "hkft", "train", "--recipe", str(recipes["tiny"]), "--output", str(folder.path)]
    running = launched(TORCHRUN, *command, *(part for value in PARTED for part in ("--set", value)))
    began = time.monotonic()
    while len(folder.records("eval")) < 2 and running.poll() is None and time.monotonic() - began < 120:
        time.sleep(0.02)
    running.send_signal(signal.SIGTERM)
    out, err = ended(running)
    assert not out
    return folder, err


@pytest.fixture(scope="module")
def outcomes(place: Path, recipes: dict[str, Path], stopped: tuple[RunFolder, str]) -> dict[str, list[Any]]:
    """Of each of `CALLS` what either process says of it, and how much it was told."""
    tiny, writing = str(recipes["tiny"]), str(recipes["writing"])
    calls = [
        ("tiny", tiny, [*NONE, *ODD, "diagnostics.average=0.5"], False),
        ("tiny+", tiny, [*NONE, *ODD, "diagnostics.average=0.5"], False),
        ("diverged", tiny, ODD, False),
        ("writing", writing, [], False),
        ("stopped", tiny, PARTED, True),
    ]
    (place / "calls.json").write_text(json.dumps(calls))
    running = launched(ACCELERATE, "--no_python", sys.executable, "-P", "-c", CALLS, str(place))
    _, err = ended(running)
    assert running.returncode == 0, err
    return {name: [json.loads((place / f"{name}.{rank}").read_text()) for rank in (0, 1)] for name, *_ in calls}


def told(found: list[Any]) -> set[str]:
    return {outcome for outcome, _ in found}


def test_a_signal_stops_both_after_the_same_step(stopped: tuple[RunFolder, str]) -> None:
    folder, shown = stopped
    summary = read_json(folder.summary)
    assert summary["status"] == "interrupted", shown
    assert summary["processes"] == 2
    assert 0 < summary["steps"] < summary["total_steps"]
    checkpoint = folder.last_checkpoint()
    assert checkpoint is not None and checkpoint.name == f"checkpoint-{summary['steps']}"
    for once in ("starting torch", "step 0/", "the method was checked", "terminated"):
        assert shown.count(once) == 1, shown
    assert "Warning" not in shown
    assert not folder.busy


def test_it_goes_on_from_there(outcomes: dict[str, list[Any]], stopped: tuple[RunFolder, str]) -> None:
    folder, _ = stopped
    assert told(outcomes["stopped"]) == {"finished"}
    summary = read_json(folder.summary)
    assert summary["steps"] == summary["total_steps"] == 36
    assert [seen["step"] for seen in folder.records("eval")] == list(range(0, 37, 9))
    assert [seen["step"] for seen in read_jsonl(folder.history)] == list(range(0, 37, 9))


def test_two_processes_train_as_one_does(
    outcomes: dict[str, list[Any]], place: Path, recipes: dict[str, Path], tmp_path: Path
) -> None:
    overrides = [*NONE, *ODD, "diagnostics.average=0.5", "train.per_device_train_batch_size=16"]
    one, two = api.train(recipes["tiny"], overrides, output=tmp_path / "one"), RunFolder(place / "tiny")
    assert told(outcomes["tiny"]) == {"finished"}
    same(one, two, 1e-5)
    names = {path.name for path in one.path.iterdir()}
    assert {path.name for path in two.path.iterdir()} == names
    alone, shared = read_json(one.summary), read_json(two.summary)
    assert [alone["processes"], shared["processes"]] == [1, 2]
    assert read_json(two.environment)["device"].startswith("2 x cpu")
    assert shared["steps"] == alone["steps"] == 14
    rows = shared["train_samples_per_s"] * shared["train_runtime_s"]
    assert rows == pytest.approx(2 * 112, rel=1e-2)  # the clocks were read one after the other


def test_text_is_written_as_by_one(
    outcomes: dict[str, list[Any]], place: Path, recipes: dict[str, Path], tmp_path: Path
) -> None:
    one = api.train(recipes["writing"], ["train.per_device_train_batch_size=16"], output=tmp_path / "one")
    assert told(outcomes["writing"]) == {"finished"}
    same(one, RunFolder(place / "writing"), 1e-4)
    rows = read_jsonl(RunFolder(place / "writing").predictions("train_probe"))
    texts = {row["prompt"]: row["prediction"] for row in rows if row["prediction"] is not None}
    assert len(texts) == 3 and len(set(texts.values())) > 1
    assert [row["prediction"] for row in rows] == [
        row["prediction"] for row in read_jsonl(one.predictions("train_probe"))
    ]


def same(one: RunFolder, two: RunFolder, tolerance: float) -> None:
    """The first look is the same to the last digit that sums keep, what training makes of it within `tolerance`."""
    looks = [folder.records("eval") for folder in (one, two)]
    assert [seen["step"] for seen in looks[0]] == [seen["step"] for seen in looks[1]]
    for number, (ours, theirs) in enumerate(zip(*looks, strict=True)):
        for split in ("train_probe", "validation"):
            assert theirs[split] == pytest.approx(ours[split], rel=tolerance if number else 1e-9)
    for split in ("train_probe", "validation"):
        ours, theirs = (read_jsonl(folder.predictions(split)) for folder in (one, two))
        assert [row["id"] for row in theirs] == [row["id"] for row in ours] == read_json(one.splits)[split]
        losses = [[row["loss"] for row in rows] for rows in (ours, theirs)]
        np.testing.assert_allclose(losses[1], losses[0], rtol=100 * tolerance)


def test_what_the_first_refuses_all_refuse(outcomes: dict[str, list[Any]]) -> None:
    assert told(outcomes["tiny+"]) == {"UsageError: there is a finished run in this folder already"}


def test_one_that_diverges_ends_both(outcomes: dict[str, list[Any]], place: Path) -> None:
    assert told(outcomes["diverged"]) == {"DivergedError: the training loss is nan at step 3"}
    assert read_json(place / "diverged" / "summary.json")["status"] == "failed"


def test_only_the_first_is_told(outcomes: dict[str, list[Any]]) -> None:
    assert all(first > 0 for (said, first), _ in outcomes.values() if said == "finished")
    assert all(second == 0 for _, (_, second) in outcomes.values())


def test_other_numbers_of_processes_cannot_go_on(stopped: tuple[RunFolder, str], recipes: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="another number of processes|this run is finished"):
        api.train(recipes["tiny"], PARTED, output=stopped[0].path, resume=True)


@pytest.mark.parametrize(
    "error", [DataError("no column", where="a.csv", hint="b"), FileNotFoundError(2, "no such file", "a"), KeyError("x")]
)
def test_an_error_travels(error: Exception) -> None:
    here = as_told(error)
    there = pickle.loads(pickle.dumps(here))
    assert (type(there), there.problems, str(there)) == (type(here), here.problems, str(here))
    assert isinstance(there, SetupError if isinstance(error, OSError) else DataError if here is error else HkftError)


@pytest.mark.parametrize(
    ("override", "error", "where"),
    [
        ("train.fsdp=true", SetupError, "train.fsdp"),  # one process, and no GPU
        ("train.deepspeed={zero_optimization: {stage: 2}}", SetupError, "train.deepspeed"),
    ],
)
def test_what_spreads_a_model_is_refused_where_it_cannot(
    override: str, error: type[HkftError], where: str, recipe_file: Path, tmp_path: Path
) -> None:
    if "deepspeed" in override and find_spec("deepspeed"):
        pytest.skip("it is installed")
    with pytest.raises(error) as refused:
        api.train(recipe_file, [override], output=tmp_path / "run")
    assert refused.value.problems[0].where == where
    assert not (tmp_path / "run").exists()


def test_what_spreads_a_model_is_taken_from_the_recipe(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load(recipe_file, ["train.fsdp=true", "train.fsdp_config={transformer_layer_cls_to_wrap: [BertLayer]}"])
    settings = arguments(recipe, RunFolder(tmp_path))
    assert settings.fsdp_plugin_args["fsdp_version"] == 2
    assert settings.fsdp_plugin_args["transformer_cls_names_to_wrap"] == "BertLayer"


@pytest.mark.parametrize(
    "command", [["eval", "run"], ["merge", "run", "--output", "x"], ["compare", "a", "b"], ["doctor"]]
)
def test_everything_else_is_refused_to_several(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 2
    assert "several processes train a run" in shown.stderr
    monkeypatch.setattr(processes, "GRACE", 0.0)
    monkeypatch.setenv("RANK", "1")
    silent = CliRunner().invoke(app, command)
    assert (silent.exit_code, silent.output) == (2, "")


def test_a_look_at_weights_in_parts_lets_them_be_trained_on() -> None:
    """What FSDP gathers in inference mode it cannot change in place later."""
    model = torch.nn.Linear(1, 1)
    with looking(model):
        assert torch.is_inference_mode_enabled()
    model.weight.device_mesh = "of two"
    with looking(model):
        assert not torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
