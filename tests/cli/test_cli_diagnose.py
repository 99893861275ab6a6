"""`hkft diagnose` as a user: on a run of hkft's, on other tools' curves, and without torch."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from hkft.folder import read_json

LOSSES = [(1.2, 1.1), (0.8, 0.9), (0.5, 0.8), (0.3, 0.85), (0.15, 1.0), (0.08, 1.2), (0.04, 1.4)]
CODE = """
import sys

class Gone:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Gone())
from hkft.cli.main import app
app(sys.argv[1:])
"""


def state(losses=LOSSES) -> str:
    """A trainer_state.json as transformers writes it."""
    history = []
    for epoch, (train, validation) in enumerate(losses, 1):
        history.append({"epoch": epoch, "grad_norm": 1.0, "learning_rate": 2e-4, "loss": train, "step": 50 * epoch})
        history.append(
            {"epoch": epoch, "eval_loss": validation, "eval_accuracy": 0.8, "eval_runtime": 2.0, "step": 50 * epoch}
        )
    path = Path("trainer_state.json")
    path.write_text(json.dumps({"log_history": history, "global_step": 350, "max_steps": 350}))
    return str(path)


@pytest.fixture
def run(hkft, tiny) -> Path:
    assert hkft("train", "--recipe", tiny, "--set", "train.num_train_epochs=3", "--output", "run").code == 0
    return Path("run")


def test_a_run_is_told_as_its_summary_has_it(hkft, run):
    found = hkft("diagnose", run, "--json").document
    verdict = read_json(run / "summary.json")["verdict"]
    assert found["verdict"] == verdict
    assert found["source"] == "a run of hkft's"
    assert [point["step"] for point in found["curve"]] == [record["step"] for record in found["decomposition"]]
    assert set(found["calibration"]) == {"train_probe", "validation"}
    assert 0 <= found["memorisation"]["auc"]["low"] <= found["memorisation"]["auc"]["high"] <= 1
    assert {update["rank"] for update in found["adapter"]} == {4}
    for row in [row for name in ("memorised", "forgotten", "suspicious") for row in found["memorisation"][name]]:
        assert row["text"]
        assert row["label"] in ("negative", "positive")
    shown = hkft("diagnose", run)
    assert shown.code == 0
    assert verdict["text"] in shown.out
    assert "validation less probe, both in eval mode" in shown.out
    assert f"next: {verdict['next'][0]['why']}" in shown.out


def test_its_metrics_alone_name_the_run(hkft, run):
    assert hkft("diagnose", run / "metrics.jsonl", "--json").document == hkft("diagnose", run, "--json").document


def test_its_checkpoints_are_told_as_the_run_is(hkft, run):
    whole = hkft("diagnose", run, "--json").document["verdict"]
    newest = max((run / "checkpoints").iterdir())
    for place in (newest, newest / "trainer_state.json"):
        assert hkft("diagnose", place, "--json").document["verdict"] == whole
    alone = Path("elsewhere.json")
    alone.write_text((newest / "trainer_state.json").read_text())
    told = hkft("diagnose", alone, "--json").document["curve"]
    assert [point["validation_loss"] for point in told][-1] == read_json(run / "summary.json")["final"]["validation"][
        "loss"
    ]


def test_a_run_that_has_lost_some_of_its_files_is_told_all_the_same(hkft, run):
    for name in ("resolved.yaml", "environment.json", "splits.json", "predictions/history.jsonl"):
        (run / name).unlink()
        assert hkft("diagnose", run).code == 0


def test_a_table_as_a_notebook_shows_it(hkft):
    Path("nb.csv").write_text("Epoch,Training Loss,Validation Loss\n1,0.9,0.8\n2,0.5,0.7\n3,0.3,0.75\n4,0.1,0.9\n")
    assert len(hkft("diagnose", "nb.csv", "--json").document["curve"]) == 4


def test_a_state_of_transformers_is_told_with_less_confidence_and_why(hkft):
    ran = hkft("diagnose", state())
    assert ran.code == 0
    assert "verdict: overfitting (medium confidence)" in ran.out
    assert "since step 150" in ran.out
    assert "note: the training loss is what was logged" in ran.out
    found = hkft("diagnose", state(), "--json").document
    assert found["metric"] == "accuracy"
    assert all(step["command"] is None for step in found["verdict"]["next"])


def test_a_table_of_losses(hkft):
    lines = ["step,train_loss,val_loss", *(f"{n},{a},{b}" for n, (a, b) in enumerate(LOSSES, 1))]
    Path("log.csv").write_text("\n".join(lines))
    assert hkft("diagnose", "log.csv", "--json").document["verdict"]["name"] == "overfitting"


def test_torch_is_not_needed(run):
    for source in ("run", state()):
        done = subprocess.run([sys.executable, "-c", CODE, "diagnose", source], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert "verdict: " in done.stdout


def test_what_cannot_be_diagnosed(hkft):
    missing = hkft("diagnose", "nowhere")
    assert (missing.code, "nowhere" in missing.err) == (2, True)
    Path("notes.txt").write_text("dear diary")
    told = hkft("diagnose", "notes.txt")
    assert (told.code, "notes.txt" in told.err) == (3, True)
    Path("empty").mkdir()
    assert hkft("diagnose", "empty").code in (2, 3)


def test_on_a_terminal_the_curve_is_drawn(run):
    from rich.console import Console

    from hkft.diagnostics.diagnosis import diagnose
    from hkft.view.diagnosis import show_diagnosis

    for source in (run, state()):
        for width in (60, 80, 120):
            console = Console(force_terminal=True, width=width, height=40, record=True, file=io.StringIO())
            show_diagnosis(diagnose(source), str(source), console)
            text = console.export_text()
            assert "validation loss" in text
            wide = [line for line in text.splitlines() if len(line) > width]
            assert all(line.startswith(("  hkft ", "next  ")) for line in wide)


@pytest.mark.parametrize("losses", [[(1.0, float("nan")), *LOSSES[:4]], [(1.0, float("nan"))] * 3])
def test_a_curve_with_losses_that_are_not_finite_is_drawn_too(hkft, losses):
    from rich.console import Console

    from hkft.diagnostics.diagnosis import diagnose
    from hkft.view.diagnosis import show_diagnosis

    console = Console(force_terminal=True, width=80, height=40, record=True, file=io.StringIO())
    show_diagnosis(diagnose(state(losses)), "a run", console)
    assert "confidence" in console.export_text()
