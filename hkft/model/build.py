"""Recipe -> base model, tokenizer, LoRA. What goes wrong on the way is said in the user's terms."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hkft.data.sources import package_path
from hkft.dropout import families
from hkft.errors import HkftError, MethodError, RecipeError, SetupError, first_line, nearest
from hkft.model import pickles
from hkft.model.vocabulary import inner_model

if TYPE_CHECKING:
    from peft import PeftModel

    from hkft.recipe import Recipe


def device(name: str) -> torch.device:
    """The device a recipe names; `auto` takes CUDA, then MPS, then the CPU. Raises SetupError where it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind = name.partition(":")[0]
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(kind, False):
        raise SetupError(
            f"there is no {name} device here",
            where="model.device",
            allowed=", ".join(kind for kind, ok in there.items() if ok),
            hint="--set model.device=auto",
        )
    return torch.device(name)


def location(name: str) -> str:
    """What transformers should load: a hub id or folder as it is, a `package:` reference as the folder it names."""
    return str(package_path(name)) if name.startswith("package:") else name


def tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The model's tokenizer, which knows how many positions the model has. Raises SetupError where it is not to be had."""
    with _opening(recipe):
        how = {"revision": recipe.model.revision, "trust_remote_code": False}
        found = AutoTokenizer.from_pretrained(location(recipe.model.name), **how)
        config = AutoConfig.from_pretrained(location(recipe.model.name), **how).get_text_config()
    _check_vocabulary(recipe, found, config)
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        found.model_max_length = min(found.model_max_length, positions)
    return found


def _check_vocabulary(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Raise SetupError for a tokenizer that knows no words, or tokens that the model has no embeddings for.

    Where there are no files of a tokenizer, transformers makes up an empty one. Special tokens that no text holds, such as
    those that stand for an image, may be beyond the embeddings.
    """
    words, rows = tokenizer.get_vocab(), getattr(config, "vocab_size", None)
    if len(words) <= len(set(tokenizer.all_special_ids)):
        raise SetupError(
            "the model has no tokenizer, or one without words",
            where="model.name",
            found=recipe.model.name,
            hint="its folder holds tokenizer.json, or the files that its kind of tokenizer reads",
        )
    if not isinstance(rows, int) or max(words.values()) < rows:
        return
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    used = {getattr(tokenizer, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "cls", "sep", "unk")}
    beyond = {number: word for word, number in words.items() if number >= rows and number not in special - used}
    if beyond:
        first = min(beyond)
        raise SetupError(
            "the tokenizer has tokens that the model has no embeddings for",
            where="model.name",
            found=f"{beyond[first]!r} is token {first:,}",
            allowed=f"tokens below {rows:,}, as many as the model's vocab_size",
            hint="load the model with transformers, call resize_token_embeddings(len(tokenizer)), and save both",
        )


def auto_class(task: str) -> Any:
    """transformers' Auto class of a task."""
    return AutoModelForCausalLM if task == "generation" else AutoModelForSequenceClassification


def skeleton(recipe: Recipe, config: PreTrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The base model on torch's meta device: its shape without its numbers. Raises SetupError where it cannot be built."""
    try:
        with torch.device("meta"):
            return auto_class(recipe.task).from_config(config, dtype=dtype)
    except Exception as error:  # whatever a configuration makes a foreign model raise
        raise _missing(recipe.model.name, error) from error


def base(recipe: Recipe, labels: Sequence[str] | None, pad_token_id: int | None = None) -> PreTrainedModel:
    """The base model with the head of its task, on the recipe's device, its own dropout at `native_dropout`.

    labels: class names, None for a regression or for generation. pad_token_id: the tokenizer's, see `pad_with`.
    Raises SetupError: no such model, device or package, or no decoder where text is to be generated.
    """
    place = device(recipe.model.device)
    config = configuration(recipe, labels)
    with _opening(recipe):
        dtype = weights_dtype(recipe.model.dtype, config, place)
        quantised = _quantisation(recipe, place, config, dtype)
        torch.manual_seed(recipe.seed)  # the head's initial weights
        model, told = auto_class(recipe.task).from_pretrained(
            location(recipe.model.name),
            config=config,
            revision=recipe.model.revision,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # the head of another task gives way to a new one
            output_loading_info=True,
            **quantised,
        )
    check_decoder(recipe, model)
    _check_whole(recipe, model, told)
    pad_with(model, pad_token_id)
    if not quantised:
        return model.to(place)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes packs a 4-bit weight anew at its first forward pass in eval mode, for a CPU kernel that has no
            # gradient, and does not unpack it for training: a look at the probe would end learning
            module.support_avx512bf16_for_cpu = False
    return model


def _check_whole(recipe: Recipe, model: PreTrainedModel, told: Mapping[str, Any]) -> None:
    """Raise SetupError where the files lack weights of the model: transformers draws them, and training would begin there.

    But for a head, which is new, and BERT's pooler, which leads to it.
    """
    new = () if recipe.task == "generation" else tuple(heads(model))
    shapes = {name: f"{name} {[*there]}, where {[*wanted]} fits" for name, there, wanted in told["mismatched_keys"]}
    lacking = dict.fromkeys(told["missing_keys"]) | shapes
    lacking = {name: said for name, said in lacking.items() if not name.startswith(new) and ".pooler." not in name}
    if lacking:
        name = min(lacking)
        raise SetupError(
            "the model's weights do not fit its configuration",
            where="model.name",
            found=f"{lacking[name] or f'no {name}'}; {len(lacking):,} such",
            hint="config.json and the weights are of one model",
        )


def configuration(recipe: Recipe, labels: Sequence[str] | None) -> PreTrainedConfig:
    """The base model's configuration, for the task.

    Raises SetupError where it cannot be read, for weights that are pickled, and for an encoder that is to generate.
    """
    with _opening(recipe):
        pickles.refuse(location(recipe.model.name))
        config = AutoConfig.from_pretrained(
            location(recipe.model.name), revision=recipe.model.revision, trust_remote_code=False
        )
    set_native_dropout(config, recipe.model.native_dropout)
    if recipe.task == "generation":
        if config.is_encoder_decoder or type(config) not in AutoModelForCausalLM._model_mapping:
            raise _no_decoder(recipe, config)
        return config
    head: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
    if labels is not None:
        head = {
            "num_labels": len(labels),
            "problem_type": "single_label_classification",
            "id2label": dict(enumerate(labels)),
            "label2id": {name: index for index, name in enumerate(labels)},
        }
    for key, value in head.items():
        setattr(config, key, value)
    return config


def weights_dtype(wanted: str, config: PreTrainedConfig, place: torch.device) -> torch.dtype:
    """The dtype of the frozen weights. "auto": float32 on a CPU, where half precision is slow; elsewhere the checkpoint's.

    But for float16: without a loss scaler its gradients underflow, so it is bfloat16 where the device has that.
    """
    if wanted != "auto":
        return getattr(torch, wanted)
    named = config.get_text_config().dtype or config.dtype or torch.float32
    own = named if isinstance(named, torch.dtype) else getattr(torch, named)
    if place.type == "cpu":
        return torch.float32
    if own == torch.float16 and (place.type != "cuda" or torch.cuda.is_bf16_supported()):
        return torch.bfloat16
    return own


def precision(recipe: Recipe) -> torch.dtype | None:
    """What training runs under by autocast, and so every look at what was trained; None: the weights' own."""
    named = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return next((dtype for name, dtype in named.items() if recipe.train.get(name)), None)


def is_decoder(model: nn.Module) -> bool | None:
    """Whether attention looks back only, in every layer that text goes through; None where that cannot be told."""
    try:
        return all(layer.causal for layer in families.find(model).text)
    except MethodError:  # a model that takes no method, trained without one
        return None


def padding_side(model: nn.Module) -> str | None:
    """Where a batch for `model` is padded: decoders on the right, whatever the tokenizer says; None: the tokenizer's side.

    A decoder counts positions from the left, so padding there would move the text. Only generating needs it.
    """
    return "right" if is_decoder(model) else None


def set_native_dropout(config: PreTrainedConfig, rate: float | str) -> None:
    """Set every dropout rate of a model's configuration (hidden_dropout_prob, attn_pdrop, ...); "keep" leaves them.

    The paper's baseline runs without them, and BERT-like models have one right behind the hidden position.
    """
    if rate == "keep":
        return
    for name, value in config.to_dict().items():
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, float):
            setattr(config, name, rate)


def with_lora(model: PreTrainedModel, recipe: Recipe) -> PeftModel:
    """The model wrapped in PEFT's LoRA, built from the recipe's `lora` section. Raises RecipeError where PEFT refuses it."""
    from peft import LoraConfig, TaskType, get_peft_model, prepare_model_for_kbit_training

    from hkft.model.fused import fuse

    highest = max((min(sizes) for module in model.modules() if (sizes := families.linear_sizes(module))), default=None)
    if highest is not None and recipe.lora["r"] > highest:
        raise RecipeError(
            "no matrix of the model has such a rank",
            where="lora.r",
            found=str(recipe.lora["r"]),
            allowed=f"up to {highest}",
        )
    if recipe.model.quantization != "none":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    try:
        kind = TaskType.CAUSAL_LM if recipe.task == "generation" else TaskType.SEQ_CLS
        config = LoraConfig(task_type=kind, **recipe.lora)
        torch.manual_seed(recipe.seed)  # A's initial weights: the same for every method
        wrapped = get_peft_model(model, config)  # type: ignore[arg-type]
        fuse(wrapped)
        return wrapped  # type: ignore[return-value]
    except (ValueError, TypeError, re.error) as error:
        wanted = recipe.lora.get("target_modules")
        names = linear_names(model)
        missing = [name for name in wanted if name not in names] if isinstance(wanted, list) else []
        raise RecipeError(
            f"PEFT refuses the lora section: {error}".split(". Please")[0],
            where="lora.target_modules" if missing else "lora",
            found=str(wanted) if missing else None,
            allowed=", ".join(names) if missing else None,
            hint=nearest(missing[0], names) if missing else None,
        ) from error


def linear_names(model: nn.Module) -> list[str]:
    """Last names of the model's linear layers, what `target_modules` may name."""
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if families.linear_sizes(module)}
    return sorted(names - {""})


def pad_with(model: nn.Module, number: int | None) -> None:
    """Let a model know by which token its batches are padded: the tokenizer's, whatever its configuration says.

    A head on a decoder reads each row at its last token that is not padding, and so must know padding when it sees it. In
    RoBERTa and its kin the configuration's number says where positions begin as well: an encoder that has one keeps it.
    """
    outer = inner_model(model).config
    for config in (outer, outer.get_text_config()):
        if number is not None and (getattr(config, "pad_token_id", None) is None or is_decoder(model)):
            config.pad_token_id = number


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The number of the padding token; None where there is none."""
    number = tokenizer.pad_token_id
    return number if isinstance(number, int) else None


def parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; a 4-bit weight counts as the numbers it stands for."""
    if hasattr(model, "get_nb_trainable_parameters"):
        trainable, total = model.get_nb_trainable_parameters()  # type: ignore[operator]
        return int(trainable), int(total)
    return sum(p.numel() for p in model.parameters() if p.requires_grad), sum(p.numel() for p in model.parameters())


def quantised(model: nn.Module) -> dict[str, Any] | None:
    """What of the model is quantised, and how; None where nothing is. `bytes`: of those weights, block scales apart."""
    linear = ("Linear4bit", "Linear8bitLt")  # bitsandbytes'; PEFT's wrappers of them have the same names
    layers = {n: m for n, m in model.named_modules() if type(m).__name__ in linear and not hasattr(m, "base_layer")}
    if not layers:
        return None
    settings = next(m.config for m in model.modules() if isinstance(m, PreTrainedModel)).quantization_config
    four = settings.load_in_4bit
    weights = [p for m in layers.values() if isinstance(p := getattr(m, "weight", None), torch.Tensor)]
    return {
        "kind": "4bit" if four else "8bit",
        "layers": len(layers),
        "modules": sorted({name.removesuffix(".base_layer").rpartition(".")[2] for name in layers}),
        "kept": list(settings.llm_int8_skip_modules or ()),
        "quant_type": settings.bnb_4bit_quant_type if four else "int8",
        "double_quantisation": bool(four and settings.bnb_4bit_use_double_quant),
        "compute_dtype": str(settings.bnb_4bit_compute_dtype).removeprefix("torch.") if four else "int8",
        "bytes": sum(weight.nbytes for weight in weights),
    }


def _quantisation(recipe: Recipe, place: torch.device, config: PreTrainedConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of from_pretrained for a quantised base, whose head is trained, or is the vocabulary's, and so stays as it is.

    bitsandbytes is imported here and nowhere else.
    """
    kind = recipe.model.quantization
    if kind == "none":
        return {}
    from transformers import BitsAndBytesConfig

    settings = {
        "8bit": {"load_in_8bit": True},
        "4bit": {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.bfloat16 if place.type == "cuda" and dtype != torch.float16 else dtype,
        },
    }
    try:
        return {
            "quantization_config": BitsAndBytesConfig(
                llm_int8_skip_modules=heads(skeleton(recipe, config)), **settings[kind]
            ),
            "device_map": {"": place},
        }
    except ImportError as error:
        raise SetupError(
            f"{kind} needs bitsandbytes", where="model.quantization", hint="pip install bitsandbytes"
        ) from error


def heads(base: PreTrainedModel) -> list[str]:
    """Names of what lies on top of the base model: never quantised."""
    return [name for name, _ in base.named_children() if name != base.base_model_prefix]


def check_decoder(recipe: Recipe, model: PreTrainedModel) -> None:
    """Raise SetupError for an encoder that is to generate: each of its tokens would see the next, and learn nothing."""
    if recipe.task == "generation" and is_decoder(model) is False:
        raise _no_decoder(recipe, model.config)


def _no_decoder(recipe: Recipe, config: PreTrainedConfig) -> SetupError:
    return SetupError(
        f"{config.model_type} is no causal language model",
        where="model.name",
        found=recipe.model.name,
        allowed="a decoder, such as GPT-2, Llama or Qwen, for task generation",
    )


@contextmanager
def _opening(recipe: Recipe) -> Iterator[None]:
    """The border to a foreign library: whatever it raises, but for want of memory, is about the model that it opens."""
    try:
        yield
    except (HkftError, RuntimeError, MemoryError):
        raise
    except Exception as error:
        raise _missing(recipe.model.name, error) from error


def _missing(name: str, error: Exception) -> SetupError:
    """transformers takes a folder that is not there for a hub id, and says that it is none."""
    folder = Path(location(name)).expanduser()
    empty = folder.is_dir() and not (folder / "config.json").exists()
    path = name.startswith((".", "/", "~")) and not Path(name).exists()
    return SetupError(
        f"the model {name!r} could not be loaded",
        where="model.name",
        found="there is no such folder"
        if path
        else "a folder without config.json"
        if empty
        else "it needs code of its own"
        if "remote_code" in str(error)
        else first_line(error),
        allowed="a hub id, a local folder, or package:<python package>/<path inside it>",
        hint="offline, only models in the local hub cache or in a folder can be used; no code of a model's own is run",
    )
