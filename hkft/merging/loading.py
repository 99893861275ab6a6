"""What is to be merged: a run or a PEFT adapter folder -> its base model with the adapter on it, in float32.

hkft switches a model's own dropout off to train it. Here the base is loaded with the rates it came with, which change
nothing in eval mode, so the configuration that is written is the base's own.
"""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from hkft.data.tokenise import ensure_padding
from hkft.errors import SetupError, UsageError
from hkft.evaluation.saved import Saved, adapted, described, find, load_saved
from hkft.events import Listener, Notice, Stage, silent
from hkft.folder import RunFolder
from hkft.merging import shards, streaming
from hkft.model.build import auto_class, configuration, location, pad_with, padding_id
from hkft.recipe import Recipe
from hkft.recipe import load as load_recipe

# PEFT's task types that can be merged, and the class that opens what is written
AUTO = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
}
HEADS = ("SEQ_CLS", "TOKEN_CLS")
LABELS = 7919  # a number of labels by which the head's last layer is known, for nothing else has so many rows
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
AS_IT_CAME = ("model.native_dropout=keep",)
ADAPTER_FILES = ("adapter_config.json", "*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")  # never a pickle
TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "spiece*", "merges.txt")
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
        config = streaming.configuration(adapter)
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
    found = _of_recipe(origin, tell, quantised) if origin.run or origin.recipe else _alone(origin, tell)
    if not quantised:
        found.model.float()
    found.model.eval()
    return found


def describe(origin: Origin, tell: Listener) -> Target:
    """What the merged model will be. Reads no weights. Raises UsageError, SetupError, RecipeError."""
    if origin.run or origin.recipe:
        recipe, labels, tokenizer = described(origin.run, origin.recipe, (*origin.overrides, *AS_IT_CAME), tell)
        kind = "CAUSAL_LM" if recipe.task == "generation" else "SEQ_CLS"
        opens, config = auto_class(recipe.task), configuration(recipe, labels)
    else:
        recipe, labels, tokenizer = None, None, _tokenizer(origin, tell)
        kind = _of_its_own(origin)
        if kind == "SEQ_CLS" and tokenizer and tokenizer.eos_token:
            ensure_padding(tokenizer, tell)
        opens, config = AUTO[kind], _as_saved(origin, kind)
    dtype = _stored_dtype(origin)
    with torch.device("meta"):
        empty = opens.from_config(config, trust_remote_code=False)
    if kind == "SEQ_CLS" and tokenizer:
        pad_with(empty, padding_id(tokenizer))
    generation = None
    if empty.can_generate():
        generation = empty.generation_config
        with suppress(OSError):
            generation = GenerationConfig.from_pretrained(location(origin.base), revision=origin.revision or "main")
    empty.config.architectures = [type(empty).__name__]
    rows = getattr(empty.get_input_embeddings(), "num_embeddings", None)
    if tokenizer is not None and rows is not None and len(tokenizer) > rows:
        tell(Notice(f"the tokenizer has {len(tokenizer):,} tokens, and the model rows for {rows:,}", "warning"))
    vars(empty.config).pop("auto_map", None)  # it names code that stays behind
    if tokenizer is not None:
        tokenizer.init_kwargs.pop("auto_map", None)
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


def _of_its_own(origin: Origin) -> str:
    """The task of an adapter by its own configuration. Raises UsageError where it says of none that can be merged."""
    config = streaming.configuration(origin.adapter)
    task_type = str(getattr(config.task_type, "value", config.task_type))
    if task_type not in AUTO:
        raise UsageError(
            "adapters of this task cannot be merged",
            where=f"{origin.adapter / 'adapter_config.json'}: task_type",
            found=task_type,
            allowed=", ".join(AUTO),
            hint="--recipe names a recipe that says what it is for",
        )
    return task_type


def check_kind(origin: Origin) -> None:
    """Raise UsageError for an adapter that no weights can hold."""
    config = streaming.configuration(origin.adapter)
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if config.is_prompt_learning or getattr(config, "layer_replication", None):
        raise UsageError(
            "what this adapter does is no change of weights, so it cannot be merged",
            where=str(origin.adapter / "adapter_config.json"),
            found=kind if config.is_prompt_learning else "layer_replication",
        )


def _alone(origin: Origin, tell: Listener) -> Adapted:
    """An adapter without a run or a recipe: its own configuration says what it is, as far as it says it."""
    target = describe(origin, silent)
    tell(Stage(f"loading {origin.base}"))
    try:
        base = target.opens.from_pretrained(
            location(origin.base),
            config=copy.deepcopy(target.config),
            revision=origin.revision,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # a head of the base's own, a vocabulary that has grown: the adapter brings them
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise _no_base(origin, error) from error
    return Adapted(adapted(base, origin.adapter), target.task_type, target.tokenizer, None)


def _run_around(adapter: Path) -> RunFolder | None:
    """The run whose adapter/ or checkpoints/checkpoint-n/ this is."""
    path = adapter.resolve()
    around = {"adapter": path.parent, "checkpoints": path.parents[1]}
    folder = RunFolder(around.get(path.name) or around.get(path.parent.name) or path)
    return folder if folder.exists else None


def _configuration(origin: Origin) -> PreTrainedConfig:
    """The base model's own. Raises SetupError."""
    try:
        return AutoConfig.from_pretrained(location(origin.base), revision=origin.revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise _no_base(origin, error) from error


def _no_base(origin: Origin, error: Exception) -> SetupError:
    path = origin.base.startswith((".", "/", "~")) and not Path(origin.base).expanduser().exists()
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return SetupError(
        "the adapter's base model could not be loaded",
        where=str(origin.adapter),
        found="there is no such folder"
        if path
        else "it needs code of its own"
        if "remote_code" in str(error)
        else first,
        hint=f"base_model_name_or_path in adapter_config.json is {origin.base!r}; no code of a model's own is run",
    )


def _as_saved(origin: Origin, kind: str) -> PreTrainedConfig:
    """The base model's configuration, with as many labels and tokens as the head and the embeddings in the adapter have."""
    config, stored = _configuration(origin), shards.adapter(origin.adapter)
    shapes = {
        name.removeprefix(streaming.PREFIX).replace(".base_layer.", "."): one.shape for name, one in stored.items()
    }
    marked = copy.deepcopy(config)
    if kind in HEADS:
        marked.num_labels = LABELS
    with torch.device("meta"):
        empty = AUTO[kind].from_config(marked, trust_remote_code=False)
    parameters = {name: tuple(parameter.shape) for name, parameter in empty.named_parameters(remove_duplicate=False)}
    counts = [shapes[name][0] for name, shape in parameters.items() if shape[:1] == (LABELS,) and name in shapes]
    if counts and config.num_labels != counts[0]:
        config.num_labels = counts[0]
    modules = {id(module): name for name, module in empty.named_modules()}
    both = [empty.get_input_embeddings(), empty.get_output_embeddings()]
    names = [f"{modules[id(module)]}.weight" for module in both if module is not None and id(module) in modules]
    if rows := [shapes[name][0] for name in names if name in shapes]:
        config.get_text_config().vocab_size = rows[0]
    return config


def _stored_dtype(origin: Origin) -> str:
    """The dtype of most numbers in the base model's files; float32 for one that a merged model cannot have."""
    if getattr(_configuration(origin), "quantization_config", None):
        raise SetupError(
            "the base model's files are quantised already: an adapter is merged onto full-precision weights",
            where=origin.base,
            hint="--recipe and --set model.name=... name the model it was quantised from",
        )
    sizes: Counter[str] = Counter()
    for one in shards.checkpoint(base_folder(origin)).values():
        if one.dtype in shards.FLOATING:
            sizes[one.dtype] += one.bytes
    most = shards.FLOATING[sizes.most_common(1)[0][0]] if sizes else torch.float32
    return next((name for name, dtype in DTYPES.items() if dtype == most), "float32")


def _tokenizer(origin: Origin, tell: Listener) -> PreTrainedTokenizerBase | None:
    """The adapter's own tokenizer, else the base's; None, said aloud, where neither has one."""
    own = (origin.adapter / "tokenizer_config.json").exists()
    base = Path(location(origin.base)).expanduser()
    there = own or not base.is_dir() or any(path for name in TOKENIZERS for path in base.glob(name))
    try:
        if own:
            return AutoTokenizer.from_pretrained(str(origin.adapter), trust_remote_code=False)
        if there:  # else transformers would make up an empty one
            return AutoTokenizer.from_pretrained(
                location(origin.base), revision=origin.revision, trust_remote_code=False
            )
    except (OSError, ValueError, KeyError, json.JSONDecodeError):
        there = False
    tell(Notice("neither the adapter nor its base has a tokenizer: none is written", "warning"))
    return None
