"""What a run would be, before it is one: rows, steps, tokens, parameters, memory. No weights are loaded."""

from __future__ import annotations

from typing import Any

from hkft.dropout.attach import attach
from hkft.events import Listener, Stage
from hkft.folder import RunFolder, default_folder
from hkft.model import build
from hkft.recipe import Recipe
from hkft.training import forecast, looks
from hkft.training.prepare import Material, arguments, check_criterion, sample, step_counts
from hkft.training.shelf import Shelf


def plan(recipe: Recipe, tell: Listener, shelf: Shelf | None = None) -> dict[str, Any]:
    """A record of what `hkft train` would do. Raises whatever it would raise before its first step.

    shelf: where the rows are kept for who wants them next.
    """
    material = (shelf or Shelf(keeps=False)).material(recipe, tell)
    check_criterion(recipe, material)
    tell(Stage("sizing the model"))
    build.device(recipe.model.device)
    found = forecast.sized(recipe, material)
    attach(found.model, recipe.method, padding_free=recipe.data.padding_free).detach()
    settings = arguments(recipe, RunFolder(default_folder(recipe)))
    train = material.examples["train"]
    total, per_epoch = step_counts(len(train), settings)
    trainable, parameters = build.parameters(found.model)
    passes = recipe.method.passes
    lengths = train["length"]
    count = len(looks.steps(total, per_epoch, recipe.diagnostics.evals_per_epoch)) + 1
    seen = sum(len(material.examples[split]) for split in looks.SPLITS)
    return {
        "recipe": recipe.name,
        "method": recipe.method.name,
        "output": str(default_folder(recipe)),
        "rows": {name: len(examples) for name, examples in material.examples.items()},
        "prompts": _prompts(recipe, material),
        "labels": list(material.labels) if material.labels else None,
        "example": _example(recipe, material),
        "duplicates": material.duplicates,
        "steps": total,
        "steps_per_epoch": per_epoch,
        "evaluations": count,
        "evaluations_share_estimate": looks.share(
            count, seen, len(train) * total / per_epoch, recipe.method.consistency if passes == 2 else None
        ),
        "passes_per_step": passes,
        "tokens": {
            "longest": max(lengths),
            "mean": sum(lengths) / len(lengths),
            "trained": round(sum(lengths) * total / per_epoch),
        },
        "parameters": {"trainable": trainable, "total": parameters, "share": trainable / parameters},
        "memory_bytes": forecast.memory(recipe, material, found, settings),
        "probe": None,  # made by `rehearsal.rehearse`, on request
    }


def _prompts(recipe: Recipe, material: Material) -> dict[str, int] | None:
    """How many different prompts each set has: text is written once for each."""
    if recipe.task != "generation":
        return None
    return {name: len(set(examples["prompt"])) for name, examples in material.examples.items()}


def _example(recipe: Recipe, material: Material) -> list[dict[str, Any]] | None:
    if recipe.task != "generation":
        return None
    pieces = sample(material.examples["train"], material.tokenizer).pieces
    return [{"text": text, "learned": learned} for text, learned in pieces]
