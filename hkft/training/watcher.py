"""What `training.looks` is told of a run: how to look at its model, what to keep of the best, what to remember of every row."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import cache
from typing import Any

from peft import PeftModel
from torch.distributed.tensor import DTensor

from hkft import processes
from hkft.data.tokenise import texts_of
from hkft.diagnostics.decomposition import Added
from hkft.evaluation.completions import Completions
from hkft.evaluation.look import look
from hkft.evaluation.predict import Predictions
from hkft.events import Listener
from hkft.folder import RunFolder, move_files, write_jsonl
from hkft.model import memory
from hkft.recipe import Recipe
from hkft.training import looks
from hkft.training.prepare import Material, step_counts
from hkft.training.trainer import Trainer

ASIDE = 32  # rows of the probe of which, at every look, the objective is measured in train mode


def watcher_of(
    recipe: Recipe,
    material: Material,
    folder: RunFolder,
    trainer: Trainer,
    tell: Listener,
) -> looks.Looks:
    settings, model = trainer.args, adapted(trainer)

    def look_at(split: str) -> Predictions | Completions:
        name = {"train_probe": "the probe", "validation": "validation"}[split]
        with memory.while_looking(recipe):
            return look(
                model,
                material.tokenizer,
                material.examples[split],
                recipe,
                batch_size=settings.per_device_eval_batch_size,
                write_text=recipe.diagnostics.generate is not None,
                limit=recipe.diagnostics.generate,
                tell=tell,
                looking=f"looking at {name}",
                writing=f"writing for {name}",
                share=processes.WHOLE if is_spread(trainer) else processes.share(),  # a model spread over all needs all
            )

    def remember(step: int, seen: Mapping[str, Predictions | Completions]) -> None:
        rows = {split: _of_rows(found) for split, found in seen.items()}
        groups = seen["validation"].groups
        folder.remember({"step": step, **rows, "groups": None if groups is None else groups.tolist()})

    def aside() -> tuple[Added, int] | None:
        if is_spread(trainer):
            return None
        count = min(ASIDE, len(material.examples["train_probe"]))
        rows = [material.examples["train_probe"][n] for n in range(count)]
        return trainer.aside(rows, recipe.seed), count

    @cache
    def texts(split: str) -> list[str] | None:
        return texts_of(material.examples[split], material.tokenizer)

    def keep(seen: Mapping[str, Predictions | Completions]) -> None:
        weights = _whole(trainer)
        if not processes.first():
            return
        beside = folder.adapter.with_name(".adapter.partial")
        shutil.rmtree(beside, ignore_errors=True)
        model.save_pretrained(str(beside), state_dict=weights)
        material.tokenizer.save_pretrained(str(beside))
        move_files(beside, folder.adapter)
        for split, predictions in seen.items():
            write_jsonl(folder.predictions(split), predictions.records(material.labels, texts(split)))

    total, per_epoch = step_counts(len(material.examples["train"]), settings)
    return looks.Looks(
        look=look_at,
        keep=keep,
        remember=remember,
        aside=aside,
        log=trainer.log,
        tell=tell,
        at=looks.steps(total, per_epoch, recipe.diagnostics.evals_per_epoch),
        criterion=recipe.diagnostics.metric or "loss",
        patience=recipe.diagnostics.patience,
        counters=lambda: (int(trainer.samples_seen), int(trainer.tokens_seen)),
    )


def adapted(trainer: Trainer) -> PeftModel:
    assert isinstance(trainer.model, PeftModel)
    return trainer.model


def is_spread(trainer: Trainer) -> bool:
    """Whether a model is in parts on several devices."""
    return trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled


def _whole(trainer: Trainer) -> dict[str, Any] | None:
    """The trained weights of a model that is in parts, which its processes put together; None: they are whole."""
    if not is_spread(trainer):
        return None
    if not trainer.accelerator.is_fsdp2:
        return trainer.accelerator.get_state_dict(trainer.model_wrapped)
    trained = {name: each.detach() for name, each in adapted(trainer).named_parameters() if each.requires_grad}
    return {name: (each.full_tensor() if isinstance(each, DTensor) else each).clone() for name, each in trained.items()}


def _of_rows(seen: Predictions | Completions) -> dict[str, Any]:
    """What is remembered of a set at a look: of each row its loss, its items where a row has several, and if it was right."""
    rows, right = seen.by_row, seen.right
    return {
        "losses": [float(f"{loss:.6g}") for loss in rows.each],
        "items": None if (rows.items == 1).all() else rows.items.tolist(),
        "right": None if right is None else right.astype(int).tolist(),
    }
