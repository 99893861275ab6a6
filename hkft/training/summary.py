"""What is told of a run: where it starts, and the content of summary.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hkft import processes
from hkft.diagnostics.advice import next_steps
from hkft.diagnostics.curve import from_records
from hkft.diagnostics.gap import main_metric
from hkft.diagnostics.verdict import verdict
from hkft.events import Evaluated, Started, as_record
from hkft.folder import SCHEMA_VERSION, RunFolder
from hkft.recipe import Recipe
from hkft.training import environment, looks
from hkft.training.prepare import Material
from hkft.training.trainer import Trainer


def started(
    recipe: Recipe,
    material: Material,
    folder: RunFolder,
    trainer: Trainer,
    watcher: looks.Looks,
    trainable: int,
    total: int,
) -> Started:
    return Started(
        run=str(folder.path),
        recipe=recipe.name,
        method=recipe.method.name,
        model=recipe.model.name,
        task=recipe.task,
        device=environment.device_name(trainer.args.device),
        seed=recipe.seed,
        total_steps=watcher.at[-1],
        epochs=float(trainer.args.num_train_epochs),
        train_rows=len(material.examples["train"]),
        validation_rows=len(material.examples["validation"]),
        probe_rows=len(material.examples["train_probe"]),
        trainable_parameters=trainable,
        total_parameters=total,
        metric=metric(recipe),
    )


def metric(recipe: Recipe) -> str:
    chosen = recipe.diagnostics.metric
    return chosen if chosen and chosen != "loss" else main_metric(recipe.task)


def summarise(
    recipe: Recipe, folder: RunFolder, watcher: looks.Looks, trainer: Trainer, status: str, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of summary.json."""
    curve = watcher.curve
    best, final = watcher.best, curve[-1] if curve else None
    found = verdict(from_records(map(as_record, curve)), metric=metric(recipe))
    begun = watcher.clock.started
    seconds, part = (watcher.clock.seconds(), watcher.clock.part()) if begun else (watcher.clock.before, 0.0)
    samples, tokens = watcher.counters()

    def sets(seen: Evaluated | None) -> dict[str, Any] | None:
        return None if seen is None else {split: dict(getattr(seen, split)) for split in looks.SPLITS}

    return {
        "schema_version": SCHEMA_VERSION,
        "status": status,
        "recipe": recipe.name,
        "recipe_fingerprint": recipe.fingerprint(),
        "method": recipe.method.name,
        "dropout": recipe.method.as_dict(),
        "model": recipe.model.name,
        "seed": recipe.seed,
        "processes": processes.count(),
        "task": recipe.task,
        "metric": metric(recipe),
        "final_step": final.step if final else None,
        "steps": trainer.state.global_step,
        "total_steps": watcher.at[-1],
        "best_step": best.step if best else None,
        "best": sets(best),
        "final": sets(final),
        "gap": {"best": dict(best.gap) if best else None, "final": dict(final.gap) if final else None},
        "verdict": {**found.as_dict(), "next": next_steps(found, recipe, str(folder.path))},
        "sites": trainer.attachment.report(),
        "train_runtime_s": seconds,
        "eval_runtime_s": watcher.clock.looked + watcher.clock.outside,
        "train_samples_per_s": samples / part if part else None,
        "train_tokens_per_s": tokens / part if part else None,
        "peak_memory_bytes": environment.peak_memory(trainer.args.device),
        **facts,
    }
