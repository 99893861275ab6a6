"""Warm start: a new run that begins with the weights of an adapter, in place of A at random and B at 0. Not a resumed run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors import SafetensorError

from hkft.errors import RecipeError, SetupError
from hkft.events import Listener, Notice
from hkft.folder import RunFolder, read_json
from hkft.model import pickles
from hkft.recipe import Recipe

SAME = ("r", "lora_alpha", "use_rslora", "use_dora", "target_modules", "rank_pattern", "alpha_pattern")


def start_from_adapter(model: PeftModel, recipe: Recipe, labels: Sequence[str] | None, tell: Listener) -> None:
    """Give a model the weights of `model.adapter`, a run (its best adapter) or a PEFT adapter folder; nothing if it is null.

    Raises SetupError where there is no such adapter, or one of other layers or labels; RecipeError where the `lora` section
    makes another update of the same weights.
    """
    if recipe.model.adapter is None:
        return
    place, adapter = source(recipe.model.adapter)
    pickles.refuse(adapter)
    try:
        config = PeftConfig.from_pretrained(str(adapter))
        weights = load_peft_weights(str(adapter), device=str(next(model.parameters()).device))
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise SetupError(
            "there is no adapter to start from",
            where="model.adapter",
            found=f"{adapter}: {str(error).strip().splitlines()[0]}",
            allowed="a run folder, or a folder of a PEFT adapter",
        ) from error
    _same(config, model.peft_config["default"])
    if place.exists and labels is not None and (before := read_json(place.splits)["labels"]) != list(labels):
        raise SetupError(
            "the adapter was trained on other labels",
            where="model.adapter",
            found=", ".join(before or ["none"]),
            allowed=", ".join(labels),
        )
    named = config.base_model_name_or_path
    if named and Path(named).name != Path(recipe.model.name).name:
        tell(Notice(f"the adapter to start from was trained on {named}, not on {recipe.model.name}", "warning"))
    _load(model, weights, adapter)


def source(named: str) -> tuple[RunFolder, Path]:
    """A run, where it is one, and the adapter of a `model.adapter`."""
    path = Path(named).expanduser()
    run = RunFolder(path)
    return run, run.adapter if run.exists else path


def _same(theirs: PeftConfig, mine: PeftConfig) -> None:
    if not isinstance(theirs, LoraConfig):
        raise RecipeError("not an adapter of LoRA's", where="model.adapter", found=str(theirs.peft_type))

    def shown(config: PeftConfig, name: str) -> Any:
        value = getattr(config, name, None)
        return sorted(value) if isinstance(value, set | list | tuple) else value or None

    other = [name for name in SAME if shown(theirs, name) != shown(mine, name)]
    if other:
        raise RecipeError(
            "the adapter to start from has another lora section",
            where="model.adapter",
            found="; ".join(f"{name}: {shown(theirs, name)}, the recipe's {shown(mine, name)}" for name in other),
            hint="set lora as the adapter has it",
        )


def _load(model: PeftModel, weights: dict[str, Any], adapter: Path) -> None:
    wanted = get_peft_model_state_dict(model).keys()
    missing = [name for name in wanted if name not in weights]
    unknown = [name for name in weights if name not in wanted]
    problem = f"no {missing[0]}" if missing else f"{unknown[0]}, which the model has not" if unknown else None
    try:
        if problem is None:
            set_peft_model_state_dict(model, weights)
    except RuntimeError as error:
        problem = str(error).strip().splitlines()[-1].strip()
    if problem:
        raise SetupError(
            "the adapter to start from does not fit the model",
            where=str(adapter),
            found=problem,
            hint="was it trained on another model, or with another number of labels?",
        )
