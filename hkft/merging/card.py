"""The README.md of a merged model: what it was made from, how, and how well it does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from hkft.data.references import HUB, PACKAGE
from hkft.recipe import Recipe

PIPELINES = {"SEQ_CLS": "text-classification", "TOKEN_CLS": "token-classification", "CAUSAL_LM": "text-generation"}


def card(
    *,
    name: str,
    base: str,
    dtype: str,
    task_type: str,
    opens: str,
    recipe: Recipe | None,
    recipe_name: str | None,
    labels: tuple[str, ...] | None,
    metrics: Mapping[str, float] | None,
    verification: Mapping[str, Any] | None,
    sources: Sequence[str] = (),
    dequantised: bool = False,
) -> str:
    """The card as Markdown with the hub's header. metrics: of the validation set, as training measured them.

    A local path is told by its last name only: the folder is made to be given away.
    """
    made = f"`{shown(base)}`, fine-tuned" + (
        f" with LoRA and the dropout method `{recipe.method.name}`" if recipe else ""
    )
    rows = {"Base model": f"`{shown(base)}`", "Weights": dtype}
    if dequantised:
        rows["Base weights"] = "as training had them: quantised, and back to numbers"
    if len(sources) > 1:
        rows["Average of"] = ", ".join(f"`{source}`" for source in sources)
    if recipe is not None:
        rows |= {"Recipe": f"`{recipe_name or recipe.name}`, seed {recipe.seed}"} | _of_recipe(recipe)
    if labels:
        rows["Labels"] = ", ".join(labels)
    sections = [
        f"---\n{_header(base, task_type, recipe)}\n---\n\n# {name}\n",
        f"{made[0].upper()}{made[1:]}, the adapter merged into its weights: plain transformers opens it.\n",
        f'```python\nfrom transformers import AutoTokenizer, {opens}\n\nmodel = {opens}.from_pretrained("{name}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n```\n',
        "| | |\n|---|---|\n" + "".join(f"| {key} | {_cell(value)} |\n" for key, value in rows.items()),
    ]
    if metrics:
        numbers = "".join(f"| {key} | {value:.4f} |\n" for key, value in metrics.items() if value is not None)
        sections.append(f"Validation set, as measured in training:\n\n| | |\n|---|---|\n{numbers}")
    sections.append(_checked(verification))
    return "\n".join(sections)


def shown(reference: str) -> str:
    """A model or data reference as others may read it: a hub id or a package whole, of a path the last name."""
    if reference.startswith((HUB, PACKAGE)):
        return reference
    path = Path(reference).expanduser()
    return path.name if path.exists() or path.is_absolute() else reference


def _header(base: str, task_type: str, recipe: Recipe | None) -> str:
    references = [recipe.data.train, recipe.data.validation] if recipe else []
    hub = {ref[len(HUB) :].partition("#")[0] for ref in references if isinstance(ref, str) and ref.startswith(HUB)}
    plain = shown(base) == base and not base.startswith(PACKAGE)
    return ModelCardData(
        library_name="transformers",
        base_model=base if plain else None,
        pipeline_tag=PIPELINES.get(task_type),
        datasets=sorted(hub) or None,
        tags=["lora", "merged"],
    ).to_yaml()


def _of_recipe(recipe: Recipe) -> dict[str, str]:
    data = recipe.data
    validation = data.validation
    lora = ", ".join(f"{key} {recipe.lora[key]}" for key in ("r", "lora_alpha", "target_modules") if key in recipe.lora)
    return {
        "Task": recipe.task,
        "LoRA": lora,
        "Dropout": f"`{recipe.method.name}`, rate {recipe.dropout.rate}",
        "Training data": f"`{shown(data.train)}`",
        "Validation data": f"`{shown(validation)}`"
        if isinstance(validation, str)
        else f"{validation} of the training data",
    }


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _checked(verification: Mapping[str, Any] | None) -> str:
    if verification is None:
        return "Not compared with the adapted model.\n"
    if not verification["passed"]:
        return "**This model does not agree with the adapted one: the check of the merge failed.**\n"
    agreement = verification["agreement"]
    same = "" if agreement is None else f", the same decision on {agreement:.1%}"
    rows, found = f"{verification['rows']} rows ({verification['on']})", verification["max_logit_difference"]
    return (
        f"Compared with the base model and its adapter on {rows}: logits differ by at most {found:.2g} "
        f"(allowed: {verification['tolerance']:.2g}){same}.\n"
    )
