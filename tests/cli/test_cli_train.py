"""`hkft train` by hand: what it says, what it refuses, and what Ctrl-C leaves."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hkft.errors import INTERRUPTED
from hkft.folder import RunFolder, read_json
from hkft.recipe import load
from hkft.training import run as training

SAID = """\
starting torch and transformers
reading the data
reading reviews.csv
tokenising train
tokenising validation
looking for near-duplicates
loading {model}
tiny: hiddenkey on {model}, classification, cpu (N threads), seed N
N training rows, N validation, N probe; N steps, N epochs; N of N parameters trained (N%)
run folder: {run}
note: the method was checked on N rows in N s: every site acts, eval mode is inert, and where nothing is dropped the model is its own
step N/N, epoch N: loss probe N, validation N, gap N; accuracy probe N, validation N, gap N
step N/N, epoch N: loss probe N, validation N, gap N; accuracy probe N, validation N, gap N
step N/N, epoch N: loss probe N, validation N, gap N; accuracy probe N, validation N, gap N
step N/N, epoch N: loss probe N, validation N, gap N; accuracy probe N, validation N, gap N
step N/N, epoch N: loss probe N, validation N, gap N; accuracy probe N, validation N, gap N
verdict: ...
...
best, step N: validation loss N (gap N), validation accuracy N (gap N)
final, step N: validation loss N (gap N), validation accuracy N (gap N)
training time: N:N
speed: N samples/s, N tokens/s
peak memory: N MiB
trainable parameters: N
dropout attention_logits/column: layers N-N, calls N, rate N, measured N, rescued N%, time x N
dropout hidden/element: layers N-N, calls N, rate N, measured N, time x N
run folder: {run}
next: ...
next: what the verdict rests on: hkft diagnose {run}
"""


def masked(text: str, **names: str | Path) -> str:
    """Names as {name}, numbers as N, and the verdict, which is no part of how it is said, as `...`."""
    for name, value in names.items():
        text = text.replace(str(value), f"{{{name}}}")
    text = re.sub(r"(?<![\w{])[-+]?\d+(,\d{3})*(\.\d+)?(e[-+]\d+)?", "N", text)
    text = text.replace("; best so far", "").replace("GiB", "MiB")
    text = re.sub(r"^verdict: .*\n.*$", "verdict: ...\n...", text, flags=re.MULTILINE)
    return re.sub(r"(^next: (?!what the verdict).*\n)+", "next: ...\n", text, flags=re.MULTILINE)


def test_everything_that_training_says(hkft, tiny, tiny_bert):
    ran = hkft("train", "--recipe", tiny)
    assert (ran.code, ran.out) == (0, "")
    [run] = Path("runs").iterdir()
    assert re.fullmatch(r"tiny-hiddenkey-s1-[0-9a-f]{6}", run.name)
    assert masked(ran.err, model=tiny_bert, run=run) == SAID
    assert ran.err.count("; best so far") >= 1
    verdict = read_json(run / "summary.json")["verdict"]
    assert f"verdict: {verdict['name']} ({verdict['confidence']} confidence)\n{verdict['text']}\n" in ran.err


def test_json_is_the_summary_and_everything_else_goes_to_stderr(hkft, tiny, tiny_bert):
    ran = hkft("train", "--recipe", tiny, "--output", "run", "--json")
    assert ran.code == 0
    assert ran.document == {"run": "run", **read_json(Path("run/summary.json"))}
    assert masked(ran.err, model=tiny_bert) == SAID.format(run="run", model="{model}")


# --- --dry-run --------------------------------------------------------------------------------------------------------


def test_a_dry_run_shows_every_value_and_its_origin_and_does_nothing(hkft, tiny):
    before = sorted(Path().rglob("*"))
    args = ("train", "--recipe", tiny, "--dry-run", "--set", "dropout.rate=0.2", "--set", "seed=7")
    ran = hkft(*args)
    assert (ran.code, ran.err) == (0, "")
    title, head, *rows = ran.out.splitlines()
    assert (title, head.split()) == ("tiny", ["key", "value", "from"])
    shown = {key: (value, origin) for key, value, origin in (re.split("  +", row) for row in rows)}
    assert shown["dropout.rate"] == ("0.2", "--set")
    assert shown["seed"] == ("7", "--set")
    assert shown["data.max_length"] == ("32", "tiny.yaml:3")
    assert shown["lora.target_modules"] == ("[query, value]", "tiny.yaml:4")
    assert shown["model.quantization"] == ("none", "default")
    recipe = load(tiny, ["dropout.rate=0.2", "seed=7"])
    assert {key: origin for key, (_, origin) in shown.items()} == recipe.provenance
    ran = hkft(*args, "--json")
    assert (ran.code, ran.err) == (0, "")
    assert ran.document == {"resolved": recipe.values(), "from": recipe.provenance}
    assert sorted(Path().rglob("*")) == before


# --- runs that exist --------------------------------------------------------------------------------------------------


def content(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (
            ["--output", "run"],
            "error: there is a finished run in this folder already\n"
            "  where    run\n  hint     --output names another folder\n",
        ),
        (
            ["--output", "run", "--resume"],
            "error: this run is finished\n  where    run\n  hint     hkft eval run\n",
        ),
        (
            ["--output", "elsewhere", "--resume"],
            "error: there is no run to resume\n  where    elsewhere\n  hint     leave out --resume\n",
        ),
    ],
)
def test_a_finished_run_is_refused_and_stays_as_it_is(hkft, run, tiny, args, said):
    before = content(run)
    ran = hkft("train", "--recipe", tiny, *args)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == "starting torch and transformers\n" + said
    assert content(run) == before
    assert not Path("elsewhere").exists()


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------


def first_step(metrics: Path, seconds: float = 40) -> bool:
    """Wait until a run has written the line of its first training step."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if metrics.exists() and '"event": "train"' in metrics.read_text(encoding="utf-8"):
            return True
        time.sleep(0.005)
    return False


@pytest.fixture
def interrupting() -> Iterator[None]:
    """Ctrl-C into this process as soon as `run` has taken its first step; ignored where it comes too late for it."""

    def press() -> None:
        if first_step(Path("run/metrics.jsonl").absolute()):
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    thread.start()
    yield
    thread.join()
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_leaves_a_checkpoint_and_resume_goes_on_from_it(hkft, tiny):
    args = ["train", "--recipe", str(tiny), "--output", "run", "--set", "train.num_train_epochs=10"]
    args += ["--set", "diagnostics.evals_per_epoch=1"]
    command = [sys.executable, "-m", "hkft", *args]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert first_step(Path("run/metrics.jsonl")), process.communicate(timeout=10)[1]
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, out) == (INTERRUPTED, "")
    assert "Traceback" not in err
    assert "\x1b" not in err
    assert err.endswith("interrupted\n")

    run = RunFolder(Path("run"))
    summary = read_json(run.summary)
    assert summary["status"] == "interrupted"
    assert 0 < summary["steps"] < summary["total_steps"] == 80
    assert run.last_checkpoint() == run.checkpoints / f"checkpoint-{summary['steps']}"
    assert run.report.exists()

    refused = hkft(*args)
    assert refused.code == 2
    assert refused.err.endswith(
        "error: there is an unfinished run in this folder already\n  where    run\n"
        "  hint     --output names another folder, --resume continues this one\n"
    )
    steps_before = [record["step"] for record in run.records("train")]
    resumed = hkft(*args, "--resume", "--json")
    assert resumed.code == 0, resumed.err
    assert (resumed.document["status"], resumed.document["steps"]) == ("finished", 80)
    assert run.status == "finished"
    steps = [record["step"] for record in run.records("train")]
    assert steps == list(range(1, 81))
    assert steps[: len(steps_before)] == steps_before


@pytest.mark.usefixtures("interrupting")
def test_ctrl_c_is_one_json_document_too(hkft, tiny):
    args = ["train", "--recipe", tiny, "--output", "run", "--set", "train.num_train_epochs=25", "--json"]
    ran = hkft(*args)
    assert ran.code == INTERRUPTED
    assert ran.err.endswith("interrupted\n")
    assert ran.document["exit_code"] == INTERRUPTED


def test_ctrl_c_before_the_first_step_leaves_nothing(hkft, tiny, monkeypatch):
    def pressed(*_: object, **__: object) -> None:
        Path("run/checkpoints").mkdir(parents=True)  # as transformers does
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(training, "Trainer", pressed)  # moving a large model to its device takes seconds
        ran = hkft("train", "--recipe", tiny, "--output", "run")
    assert ran.code == INTERRUPTED
    assert ran.err.endswith("interrupted\n")
    assert not Path("run").exists()
    assert hkft("train", "--recipe", tiny, "--output", "run", "--set", "train.max_steps=1").code == 0


def test_no_step_is_no_run(hkft, tiny):
    ran = hkft("train", "--recipe", tiny, "--output", "run", "--set", "train.num_train_epochs=0")
    assert ran.code == 2
    assert "there is no step to train\n  where    train.num_train_epochs\n" in ran.err
    assert not Path("run").exists()


def test_few_validation_rows_are_said_to_be_few(hkft, tiny):
    few = ["--set", "data.validation_rows=6", "--set", "train.max_steps=1"]
    ran = hkft("train", "--recipe", tiny, "--output", "run", *few)
    assert "warning: only 6 validation rows: what is measured on them is mostly noise\n" in ran.err


def test_a_correlation_that_is_none_is_no_traceback(hkft, tiny):
    """All validation rows have one number: Pearson's r of it is undefined."""
    lines = Path("reviews.csv").read_text(encoding="utf-8").splitlines()
    stars = lines[1].rpartition(",")[2]  # of a training row, for the probe
    Path("same.csv").write_text("\n".join([lines[0], *(f"a film {n},b,positive,{stars}" for n in range(20))]) + "\n")
    settings = ["task=regression", "data.label=stars", "data.validation=same.csv", "train.max_steps=2"]
    ran = hkft("train", "--recipe", tiny, "--output", "run", *(word for one in settings for word in ("--set", one)))
    assert ran.code == 0, ran.err
    assert "validation pearson - (gap -)" in ran.err
    assert {"report.html", "README.md"} <= {path.name for path in Path("run").iterdir()}
    assert hkft("eval", "run").code == 0
    assert hkft("compare", "run").code == 0


@pytest.mark.usefixtures("interrupting")
def test_an_interrupted_run_names_the_command_that_goes_on_and_keeps_its_name(hkft, tiny):
    ran = hkft("train", "--recipe", tiny, "--output", "run", "--set", "train.num_train_epochs=4")
    assert ran.code == INTERRUPTED
    resume = "hkft train --recipe run/resolved.yaml --output run --resume"
    assert f"next: go on from here: {resume}\n" in ran.err


def test_a_dry_run_shows_the_values_of_a_full_record(hkft, tiny):
    sites = "dropout.sites=[{position: hidden, pattern: span}, {position: input}]"
    ran = hkft("train", "--recipe", tiny, "--dry-run", "--set", sites)
    shown = {line.split()[0]: line.split()[1] for line in ran.out.splitlines() if line.startswith("dropout.sites.")}
    assert shown["dropout.sites.0.position"] == "hidden"
    assert shown["dropout.sites.0.pattern"] == "span"
    assert shown["dropout.sites.1.position"] == "input"
    assert shown["dropout.sites.1.layers"] == "auto"


def test_ctrl_c_within_an_import_is_ctrl_c(hkft, tiny, monkeypatch):
    """Python 3.11 wraps what is raised while a class is made: seen in the imports of PEFT."""

    def importing(*_: object, **__: object) -> None:
        raise RuntimeError("Error calling __set_name__ on 'Field' instance 'r'") from KeyboardInterrupt()

    monkeypatch.setattr("hkft.api.train", importing)
    assert hkft("train", "--recipe", tiny, "--output", "run").code == INTERRUPTED


def test_a_validation_set_unlike_any_training_row_is_refused(hkft, tiny):
    Path("far.csv").write_text("text,stars\n" + "".join(f"a film {n},{90 + n}\n" for n in range(20)))
    settings = ["task=regression", "data.label=stars", "data.validation=far.csv"]
    ran = hkft("train", "--recipe", tiny, "--output", "run", *(word for one in settings for word in ("--set", one)))
    assert ran.code == 3
    assert "error: no training row has a label like those of validation" in ran.err
    assert not Path("run").exists()
