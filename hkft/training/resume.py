"""Going on with a run: from its last whole checkpoint, under the recipe and the rows it was started with.

A checkpoint counts once it is sealed (`folder.seal`), after everything else of it is written: a run may be killed at any moment.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hkft import processes
from hkft.diagnostics.history import losses_of
from hkft.errors import RecipeError, UsageError
from hkft.events import Evaluated, Listener, Notice
from hkft.folder import SEAL, RunFolder, read_json, read_jsonl, seal, write_jsonl
from hkft.recipe import Recipe, load
from hkft.training import looks

BEGINNING = {"recipe.yaml", "environment.json", "splits.json", ".lock"}  # of a run that was killed before it was one


@dataclass
class Seal(TrainerCallback):
    """Seals every checkpoint, as the last of the callbacks. wait: for what other processes write into it."""

    clock: looks.Clock
    wait: Callable[[], None]

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.wait()
        if state.is_world_process_zero:
            told = {"train_runtime_s": self.clock.seconds(), "eval_runtime_s": self.clock.looked + self.clock.outside}
            seal(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}", {"step": state.global_step, **told})


def is_beginning(folder: RunFolder) -> bool:
    """Whether a folder holds no more than a run leaves that was killed before it had begun."""
    names = {path.name for path in folder.path.iterdir()} if folder.path.is_dir() else set()
    return all(name in BEGINNING or name.endswith(".partial") for name in names)


def changes(folder: RunFolder, recipe: Recipe) -> list[str]:
    """What a recipe has otherwise than the run in `folder`: "train.learning_rate: 0.01, was 0.002". Raises UsageError."""
    try:
        before = load(folder.resolved)
    except RecipeError as error:
        raise UsageError(
            "the recipe of this run cannot be read",
            where=str(folder.resolved),
            found=str(error),
            hint="was it written by another version of hkft?",
        ) from error
    old, new = ({key: value for key, value, _ in each.listed()} for each in (before, recipe))
    absent = "nothing"
    return [
        f"{key}: {new.get(key, absent)}, was {old.get(key, absent)}"
        for key in dict.fromkeys([*new, *old])
        if new.get(key) != old.get(key)
    ]


def check_recipe(folder: RunFolder, recipe: Recipe, force: bool) -> list[str]:
    """The changes, where they are wanted. Raises UsageError where they are not."""
    found = changes(folder, recipe)
    if found and not force:
        raise UsageError(
            "the run in this folder was started with another recipe",
            where=str(folder.resolved),
            found="; ".join(found),
            hint=f"hkft train --recipe {folder.resolved} --output {folder.path} --resume goes on as it was; "
            "--resume --force goes on with what changed",
        )
    return found


def check_rows(folder: RunFolder, fingerprints: Mapping[str, str | None], force: bool) -> list[str]:
    """The sets whose rows are others than when the run was started. Raises UsageError where that is not wanted."""
    before = read_json(folder.environment)["data"]
    found = [name for name in dict.fromkeys([*fingerprints, *before]) if fingerprints.get(name) != before.get(name)]
    if found and not force:
        raise UsageError(
            "the data has changed since this run was started",
            where=str(folder.environment),
            found=f"other rows in: {', '.join(found)}",
            hint="--resume --force goes on with the rows of now",
        )
    return found


def check_processes(folder: RunFolder) -> None:
    """Raise UsageError for another number of processes: steps, and the rows of a step, would be others."""
    began = read_json(folder.environment).get("processes", 1)
    if began != processes.count():
        raise UsageError(
            "this run was started with another number of processes",
            where=str(folder.environment),
            found=str(processes.count()),
            allowed=str(began),
        )


def take_up(folder: RunFolder, watcher: looks.Looks, other_rows: bool, tell: Listener) -> Path | None:
    """Bring the curve back to where the last checkpoint stands, forget what came after it, and return the checkpoint.

    other_rows: what earlier looks found of each row is of others than those of now.
    """
    for torn in folder.torn_checkpoints():
        shutil.rmtree(torn, ignore_errors=True)
        tell(Notice(f"{torn.name} was not written to its end, and is left out", "warning"))
    checkpoint = folder.last_checkpoint()
    step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else -1
    kept = [r for r in folder.records() if r["event"] == "notice" or (r.get("step", -1) <= step and checkpoint)]
    extra = {record["step"] for record in kept if record["event"] == "eval" and record.get("extra")}
    write_jsonl(folder.metrics, [r for r in kept if not (r["event"] == "eval" and r["step"] in extra)])
    for record in folder.records("eval"):
        record.pop("event")
        watcher.curve.append(Evaluated(**record))
    past = [r for r in read_jsonl(folder.history) if r["step"] <= step and r["step"] not in extra and not other_rows]
    write_jsonl(folder.history, past)
    watcher.forgotten = {look.step for look in watcher.curve} != {record["step"] for record in past}
    for record in past:
        right = record["validation"]["right"]
        groups = None if record["groups"] is None else np.array(record["groups"])
        losses = losses_of(record["validation"]).grouped(groups)
        watcher.rows.append(looks.Rows(losses, None if right is None else np.array(right, dtype=bool)))
    if checkpoint:
        told = read_json(checkpoint / SEAL)
        watcher.clock.before, watcher.clock.looked = float(told["train_runtime_s"]), float(told["eval_runtime_s"])
    return checkpoint
