"""How long a run would take, and how much memory, from a few of its steps and looks, really made and then forgotten.

The steps are two of the run's own: the one with the most tokens and one with as many as half of the steps have, in turns until
`ENOUGH` seconds have passed. What they took grows with their tokens, padding included, as does a look; every other step and
look is taken to be on the line through them.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from hkft.data.sources import column_of, picked
from hkft.evaluation.look import look
from hkft.events import Listener, Stage, silent
from hkft.folder import RunFolder
from hkft.model import build, memory
from hkft.recipe import Recipe
from hkft.training import environment, looks
from hkft.training.prepare import Material, step_counts
from hkft.training.run import trainer_of
from hkft.training.shelf import Shelf
from hkft.training.trainer import Trainer
from hkft.training.watcher import ASIDE

ENOUGH = 5.0  # seconds of steps, after two of them
TURNS = 8  # of both steps at most


def rehearse(recipe: Recipe, shelf: Shelf, tell: Listener) -> dict[str, Any]:
    """Seconds of the whole run, {"training", "looking", "total"} as its summary tells them apart, and bytes of its peak memory.

    Loading, the check of the method and saving are not in them. Leaves nothing on the disk. Raises what a run raises that cannot
    begin, runs out of memory or diverges at once.
    """
    material = shelf.material(recipe, silent)
    recipe = recipe.replace("train.report_to=none")
    with TemporaryDirectory(prefix="hkft-") as place:
        tell(Stage(f"loading {recipe.model.name}"))
        set_seed(recipe.seed)
        with memory.while_loading(recipe):
            base = build.base(recipe, material.labels, build.padding_id(material.tokenizer))
            model = build.with_lora(base, recipe)
        trainer = trainer_of(recipe, material, model, RunFolder(Path(place)), silent)
        total, per_epoch = step_counts(len(material.examples["train"]), trainer.args)
        count = len(looks.steps(total, per_epoch, recipe.diagnostics.evals_per_epoch)) + 1
        try:
            environment.forget_peak(trainer.args.device)
            with memory.while_training(recipe):
                epoch, made = _epoch(recipe, material, trainer, tell)
            training, looking = epoch * total / per_epoch, count * _look(recipe, material, trainer, tell)
        finally:
            trainer.attachment.detach()
        return {
            "seconds": {"training": training, "looking": looking, "total": training + looking},
            "steps_made": made,
            "peak_memory_bytes": environment.peak_memory(trainer.args.device),
        }


def _epoch(recipe: Recipe, material: Material, trainer: Trainer, tell: Listener) -> tuple[float, int]:
    """(seconds of an epoch's steps, steps made to know)."""
    train, settings = material.examples["train"], trainer.args
    size, accumulated = settings.train_batch_size, settings.gradient_accumulation_steps
    order, lengths = np.array(list(trainer._get_train_sampler(train) or ())), np.asarray(column_of(train, "length"))
    steps = np.array_split(order, range(size * accumulated, len(order), size * accumulated))
    tokens = np.array([_tokens(lengths[rows], size, recipe.data.padding_free) for rows in steps])
    by_tokens = np.argsort(tokens, kind="stable")
    chosen = [by_tokens[-1], by_tokens[len(steps) // 2]]
    trainer.find_shared(trainer._prepare_inputs(trainer.data_collator([train[int(row)] for row in steps[0][:size]])))
    took = _made(trainer, picked(train, np.concatenate([steps[n] for n in chosen] * TURNS)), tell)
    counted = list(zip(took, [*chosen] * TURNS, strict=False))[1 if len(took) > 3 else 0 :]  # the first one is slow
    longest, middle = (median(seconds for seconds, step in counted if step == n) for n in chosen)
    apart = tokens[chosen[0]] - tokens[chosen[1]]
    each = max(0.0, longest - middle) / apart if apart else 0.0
    seconds = np.maximum(middle + each * (tokens - tokens[chosen[1]]), 0)
    return float(seconds.sum()), len(took)


def _tokens(lengths: np.ndarray, size: int, padding_free: bool) -> int:
    """Of the batches of `size` rows in turn, padding included."""
    batches = np.array_split(lengths, range(size, len(lengths), size))
    return int(sum(batch.sum() if padding_free else batch.max() * len(batch) for batch in batches))


def _made(trainer: Trainer, rows: Any, tell: Listener) -> list[float]:
    """Train on the rows in their order, at least two steps; the seconds of each."""
    ends = _Ends(trainer.args.device, tell)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ends)
    trainer.train_dataset = rows
    trainer._get_train_sampler = lambda train_dataset=None: SequentialSampler(rows)  # type: ignore[method-assign]
    trainer.args.num_train_epochs, trainer.args.max_steps = 1, -1
    trainer.train()
    return np.diff(ends.at).tolist()


class _Ends(TrainerCallback):
    """Notes when training began and every step ended, and ends it after `ENOUGH`."""

    def __init__(self, device: torch.device, tell: Listener) -> None:
        self.device, self.tell, self.at = device, tell, []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.at.append(_now(self.device))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.at.append(_now(self.device))
        self.tell(Stage("taking steps", state.global_step, state.max_steps))
        if state.global_step > 1 and self.at[-1] - self.at[0] > ENOUGH:
            control.should_training_stop = True


def _now(device: torch.device) -> float:
    """When all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _look(recipe: Recipe, material: Material, trainer: Trainer, tell: Listener) -> float:
    """Seconds of one look at both sets."""
    tell(Stage("looking at a few batches"))
    size = trainer.args.per_device_eval_batch_size
    seconds = 0.0
    for split in looks.SPLITS:
        examples = material.examples[split]
        lengths = np.asarray(column_of(examples, "length"))
        order = np.argsort(-lengths, kind="stable")
        batches = np.array_split(order, range(size, len(order), size))
        _seen(recipe, material, trainer, picked(examples, batches[0]))
        middle = batches[len(batches) // 2]
        took = _seen(recipe, material, trainer, picked(examples, middle))
        seconds += took * _tokens(lengths[order], size, False) / _tokens(lengths[middle], size, False)
        if recipe.task == "generation" and recipe.diagnostics.generate is not None:
            few = picked(examples, middle[: recipe.generation.batch_size])
            more = _seen(recipe, material, trainer, few, write_text=True) - took * len(few) / len(middle)
            prompts = min(recipe.diagnostics.generate, len(set(examples["prompt"])))
            seconds += max(0.0, more) * prompts / len(set(few["prompt"]))
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return seconds
    probe = material.examples["train_probe"]
    began = _now(trainer.args.device)
    trainer.aside([probe[n] for n in range(min(ASIDE, len(probe)))], recipe.seed)
    return seconds + _now(trainer.args.device) - began


def _seen(recipe: Recipe, material: Material, trainer: Trainer, rows: Any, write_text: bool = False) -> float:
    """Seconds of a look at some rows."""
    began = _now(trainer.args.device)
    with memory.while_looking(recipe):
        assert trainer.model is not None
        look(
            trainer.model,
            material.tokenizer,
            rows,
            recipe,
            batch_size=trainer.args.per_device_eval_batch_size,
            write_text=write_text,
            looking="",
            writing="",
        )
    return _now(trainer.args.device) - began
