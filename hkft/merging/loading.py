"""What is to be merged: a run or a PEFT adapter folder -> its base model with the adapter on it, in float32.

hkft switches a model's own dropout off to train it. Here the base is loaded with the rates it came with, which change
nothing in eval mode, so the configuration that is written is the base's own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from hkft.data.tokenise import ensure_padding
from hkft.errors import SetupError, UsageError
from hkft.evaluation.saved import Saved, described, find, load_saved
from hkft.events import Listener, Notice, Stage
from hkft.folder import RunFolder
from hkft.model.build import auto_class, configuration, location, pad_with, padding_id
from hkft.recipe import Recipe
from hkft.recipe import load as load_recipe

# PEFT's task types that can be merged, and the class that loads each. Its `_target_class` opens what is written
AUTO = {
    "SEQ_CLS": peft.AutoPeftModelForSequenceClassification,
    "TOKEN_CLS": peft.AutoPeftModelForTokenClassification,
    "CAUSAL_LM": peft.AutoPeftModelForCausalLM,
    "SEQ_2_SEQ_LM": peft.AutoPeftModelForSeq2SeqLM,
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
AS_IT_CAME = ("model.native_dropout=keep",)
ADAPTER_FILES = ("adapter_config.json", "*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")  # never a pickle
BASE_FILES = ("config.json", "generation_config.json", "*.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class Origin:
    """Which adapter is meant. `run` and `recipe` are None for an adapter that nothing more is known of."""

    run: RunFolder | None
    adapter: Path
    checkpoint: str | None  # "best", "last", or None: an adapter folder named by its path
    recipe: Path | str | None
    overrides: tuple[str, ...]
    base: str  # as the recipe or the adapter names it
    revision: str | None
    quantization: str  # what the base was held in for training: none, 8bit, 4bit

    @property
    def keep(self) -> list[Path]:
        """The local folders that a merge reads and must not touch."""
        base = Path(location(self.base))
        return [self.run.path if self.run else self.adapter, self.adapter, *([base] if base.is_dir() else [])]


@dataclass(frozen=True)
class Adapted:
    """A base model with its adapter, in float32 and eval mode."""

    model: PeftModel
    task_type: str  # PEFT's
    tokenizer: PreTrainedTokenizerBase | None
    saved: Saved | None


@dataclass(frozen=True)
class Target:
    """What is written beside the weights, and how it is opened: known without any weights."""

    task_type: str
    opens: Any  # transformers' Auto class that opens it
    config: PreTrainedConfig
    generation: GenerationConfig | None
    tokenizer: PreTrainedTokenizerBase | None
    dtype: str  # of the base model's files
    recipe: Recipe | None = None
    labels: tuple[str, ...] | None = None


def origin(
    source: str | Path, checkpoint: str = "best", recipe: str | Path | None = None, overrides: Sequence[str] = ()
) -> Origin:
    """Find the adapter that `source` and `checkpoint` name, and its base. An adapter inside a run belongs to that run.

    source: a folder, or the hub id of an adapter. Raises UsageError, RecipeError, SetupError.
    """
    run, adapter = find(_here(source), checkpoint)
    known: str | None = checkpoint if checkpoint in ("best", "last") else None
    if run is None:
        run, known = _run_around(adapter) if recipe is None else None, None
    if run is None and recipe is None:
        if overrides:
            raise UsageError(
                "--set changes a recipe, and this adapter has none", where=str(adapter), hint="--recipe names one"
            )
        config = PeftConfig.from_pretrained(str(adapter))
        if not config.base_model_name_or_path:
            raise UsageError(
                "the adapter does not say which model it belongs to",
                where=f"{adapter / 'adapter_config.json'}: base_model_name_or_path",
                hint="--recipe names a recipe that does",
            )
        return Origin(None, adapter, None, None, (), config.base_model_name_or_path, config.revision, "none")
    chosen = recipe if recipe is not None else run.resolved if run else None
    assert chosen is not None
    model = load_recipe(str(chosen), overrides).model
    return Origin(run, adapter, known, recipe, tuple(overrides), model.name, model.revision, model.quantization)


def load(origin: Origin, tell: Listener, quantised: bool = False) -> Adapted:
    """Load base and adapter, every number in float32. Raises SetupError: no such base, or one that does not fit.

    quantised: the base as it was held in for training.
    """
    adapted = _of_recipe(origin, tell, quantised) if origin.run or origin.recipe else _alone(origin, tell)
    if not quantised:
        adapted.model.float()
    adapted.model.eval()
    return adapted


def describe(origin: Origin, tell: Listener) -> Target:
    """What the merged model will be. Reads no weights. Raises UsageError, SetupError, RecipeError."""
    if origin.run or origin.recipe:
        recipe, labels, tokenizer = described(origin.run, origin.recipe, (*origin.overrides, *AS_IT_CAME), tell)
        kind = "CAUSAL_LM" if recipe.task == "generation" else "SEQ_CLS"
        opens, config = auto_class(recipe.task), configuration(recipe, labels)
    else:
        recipe, labels, tokenizer = None, None, _tokenizer(origin, tell)
        lora, kind = _of_its_own(origin)
        if kind == "SEQ_CLS" and tokenizer and tokenizer.eos_token:
            ensure_padding(tokenizer, tell)
        opens, heads = AUTO[kind]._target_class, kind in ("SEQ_CLS", "TOKEN_CLS")
        count = _labels(origin.adapter, lora) if heads else None
        named = {"num_labels": count} if count else {}
        config = _configuration(origin, **named)
    dtype = _stored_dtype(origin)
    with torch.device("meta"):
        empty = opens.from_config(config)
    if kind == "SEQ_CLS" and tokenizer:
        pad_with(empty, padding_id(tokenizer))
    generation = None
    if empty.can_generate():
        generation = empty.generation_config
        with suppress(OSError):
            generation = GenerationConfig.from_pretrained(location(origin.base), revision=origin.revision or "main")
    empty.config.architectures = [type(empty).__name__]
    return Target(kind, opens, empty.config, generation, tokenizer, dtype, recipe, labels)


def base_folder(origin: Origin) -> Path:
    """The folder of the base model's files, from the hub where it is no folder. Raises SetupError."""
    place = Path(location(origin.base)).expanduser()
    return place if place.is_dir() else _fetched(origin.base, origin.revision, BASE_FILES, "model.name")


def _here(source: str | Path) -> str | Path:
    """A folder as it is; `user/name` that is none, from the hub."""
    if Path(source).expanduser().exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        return source
    return _fetched(str(source), None, ADAPTER_FILES, str(source))


def _fetched(name: str, revision: str | None, files: Sequence[str], where: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(files)))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise SetupError(
            "there is no such folder, and no such repository on the hub that can be reached",
            where=where,
            found=str(error).strip().splitlines()[0],
            hint="offline, only what is in the local hub cache can be used",
        ) from error


def _of_recipe(origin: Origin, tell: Listener, quantised: bool) -> Adapted:
    full = () if quantised else ("model.quantization=none",)
    saved = load_saved(
        origin.run.path if origin.run else origin.adapter,
        checkpoint=str(origin.adapter),
        recipe=origin.recipe,
        overrides=(*origin.overrides, *AS_IT_CAME, *full),
        tell=tell,
    )
    kind = "CAUSAL_LM" if saved.recipe.task == "generation" else "SEQ_CLS"
    return Adapted(saved.model, kind, saved.tokenizer, saved)


def _of_its_own(origin: Origin) -> tuple[PeftConfig, str]:
    """An adapter's own configuration, and its task. Raises UsageError where it says of none that can be merged."""
    config = PeftConfig.from_pretrained(str(origin.adapter))
    task_type = str(getattr(config.task_type, "value", config.task_type))
    if task_type not in AUTO:
        raise UsageError(
            "adapters of this task cannot be merged",
            where=f"{origin.adapter / 'adapter_config.json'}: task_type",
            found=task_type,
            allowed=", ".join(AUTO),
            hint="--recipe names a recipe that says what it is for",
        )
    return config, task_type


def _alone(origin: Origin, tell: Listener) -> Adapted:
    """An adapter without a run or a recipe: its own configuration says what it is, as far as it says it."""
    config, task_type = _of_its_own(origin)
    tell(Stage(f"loading {origin.base}"))
    tokenizer = _tokenizer(origin, tell)
    if task_type == "SEQ_CLS" and tokenizer and tokenizer.eos_token:
        ensure_padding(tokenizer, tell)
    labels = _labels(origin.adapter, config) if task_type in ("SEQ_CLS", "TOKEN_CLS") else None
    try:
        model = AUTO[task_type].from_pretrained(
            str(origin.adapter), dtype=torch.float32, use_safetensors=True, **({"num_labels": labels} if labels else {})
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise SetupError(
            "the adapter and the base model it names could not be loaded",
            where=str(origin.adapter),
            found=f"no {error}" if isinstance(error, KeyError) else str(error).strip().splitlines()[0],
            hint=f"base_model_name_or_path in adapter_config.json is {origin.base!r}",
        ) from error
    if task_type == "SEQ_CLS" and tokenizer:
        pad_with(model, padding_id(tokenizer))
    return Adapted(model, task_type, tokenizer, None)


def _run_around(adapter: Path) -> RunFolder | None:
    """The run whose adapter/ or checkpoints/checkpoint-n/ this is."""
    path = adapter.resolve()
    around = {"adapter": path.parent, "checkpoints": path.parents[1]}
    folder = RunFolder(around.get(path.name) or around.get(path.parent.name) or path)
    return folder if folder.exists else None


def _configuration(origin: Origin, **changed: Any) -> PreTrainedConfig:
    """The base model's own. Raises SetupError."""
    try:
        return AutoConfig.from_pretrained(location(origin.base), revision=origin.revision, **changed)
    except (OSError, ValueError, KeyError) as error:
        raise SetupError(
            "the adapter's base model could not be loaded",
            where=str(origin.adapter),
            found=str(error).strip().splitlines()[0],
            hint=f"base_model_name_or_path in adapter_config.json is {origin.base!r}",
        ) from error


def _stored_dtype(origin: Origin) -> str:
    """The dtype of the base model's files; float32 for one that a merged model cannot have.

    transformers resolves it as it would to load the model; on the meta device it reads no weights.
    """
    source, config = location(origin.base), _configuration(origin)
    if getattr(config, "quantization_config", None):
        raise SetupError(
            "the base model's files are quantised already: an adapter is merged onto full-precision weights",
            where=origin.base,
            hint="--recipe and --set model.name=... name the model it was quantised from",
        )
    model = AutoModel.from_pretrained(
        source, config=config, revision=origin.revision, dtype="auto", device_map="meta", use_safetensors=True
    )
    return next((name for name, dtype in DTYPES.items() if dtype == model.dtype), "float32")


def _tokenizer(origin: Origin, tell: Listener) -> PreTrainedTokenizerBase | None:
    """The adapter's own tokenizer, else the base's; None, said aloud, where neither has one."""
    own = (origin.adapter / "tokenizer_config.json").exists()
    try:
        if own:
            return AutoTokenizer.from_pretrained(str(origin.adapter))
        return AutoTokenizer.from_pretrained(origin.base, revision=origin.revision)
    except (OSError, ValueError, KeyError, json.JSONDecodeError):
        tell(Notice("neither the adapter nor its base has a tokenizer: none is written", "warning"))
        return None


def _labels(adapter: Path, config: PeftConfig) -> int | None:
    """How many labels the saved head has: the fewest rows of any of its matrices. None where no head was saved."""
    weights, heads = adapter / "adapter_model.safetensors", getattr(config, "modules_to_save", None) or ()
    if not weights.exists():
        return None
    with safe_open(weights, "pt") as file:
        names = [n for n in file.keys() if "lora_" not in n and any(f".{head}." in n for head in heads)]  # noqa: SIM118
        shapes = [file.get_slice(name).get_shape() for name in names]
    return min((shape[0] for shape in shapes if len(shape) == 2), default=None)
