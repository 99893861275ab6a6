"""How much memory a run would take at its peak, before any weight is loaded.

    peak = libraries + weights + adapter + optimizer + the larger of a training step and a look

Weights, adapter and optimizer are counted. What a step and a look hold beside them is traced: both run on their batch of the
longest rows, with the method attached, over parameters without numbers (see `hkft.model.ledger`).

What torch's allocator holds in a step is met within a few per cent. Of the resident set that a run on a CPU tells, it is a
lower bound: beside it stand the allocator's gaps, and libraries that only training loads.

Not counted: what kernels and libraries allocate for themselves, text that looks write, and what FSDP, DeepSpeed and
torch.compile change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, TrainingArguments

from hkft.data import tokenise
from hkft.data.sources import column_of
from hkft.dropout.attach import attach
from hkft.dropout.families import linear_sizes
from hkft.model import build
from hkft.model.ledger import Ledger, without_numbers
from hkft.model.vocabulary import Vocabulary
from hkft.recipe import Recipe
from hkft.training.looks import SPLITS
from hkft.training.objective import learns_tokens, objective, token_objective
from hkft.training.prepare import Material

STATES = {
    "sgd": 0,
    "adafactor": 0,
    "lion": 4,
    "rmsprop": 4,
    "adagrad": 4,
}  # bytes of a trained number; else two moments
MOMENTS = 8
SMALL = 4096  # numbers of a tensor whose moments an 8-bit optimizer keeps in 32 bits
BLOCK = 64  # 4-bit weights of one scale


class Sized(NamedTuple):
    """The LoRA model of a recipe on torch's meta device: its shape without its numbers.

    weights: bytes of the base. maps: those of its linear maps that bitsandbytes is to have.
    """

    model: PeftModel
    weights: int
    maps: list[nn.Module]


def sized(recipe: Recipe, material: Material) -> Sized:
    """Raises what building the model would raise."""
    config = build.configuration(recipe, material.labels)
    kind = recipe.model.quantization
    dtype = build.weights_dtype(recipe.model.dtype, config, build.device(recipe.model.device))
    if kind != "none":
        dtype = torch.float32  # what is not quantised is trained with in float32
    with torch.device("meta"):
        base = build.skeleton(recipe, config, dtype)
        build.check_decoder(recipe, base)
        build.pad_with(base, build.padding_id(material.tokenizer))
        maps = quantised_maps(base) if kind != "none" else []
        weights = weight_bytes(base, maps, kind)
        return Sized(build.with_lora(base, recipe.replace("model.quantization=none")), weights, maps)


def quantised_maps(base: PreTrainedModel) -> list[nn.Module]:
    """The linear maps below the head."""
    heads = build.heads(base)
    return [m for name, m in base.named_modules() if linear_sizes(m) and name.partition(".")[0] not in heads]


def weight_bytes(base: nn.Module, maps: Sequence[nn.Module], kind: str) -> int:
    """Of a base model's parameters, where `maps` are of bitsandbytes' "4bit" or "8bit"."""
    packed = {module.weight for module in maps}
    return sum(_quantised(each, kind) if each in packed else each.nbytes for each in base.parameters())


def _quantised(weight: Tensor, kind: str) -> int:
    if kind == "8bit":
        return weight.numel() + 4 * weight.shape[0]
    blocks = math.ceil(weight.numel() / BLOCK)  # a byte each, these quantised in their turn, in blocks of 256
    return math.ceil(weight.numel() / 2) + blocks + 4 * math.ceil(blocks / 256) + 4 * (16 + 256 + 1)


def optimizer_bytes(model: nn.Module, name: str) -> int:
    """What transformers' optimizer of that name keeps of a model's trained parameters."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if name == "adafactor":  # of a matrix its rows and columns
        return sum(4 * (sum(p.shape) if p.ndim > 1 else p.numel()) for p in trained)
    each = next((size for start, size in STATES.items() if name.startswith(start)), MOMENTS)
    small = each // 4 if "8bit" in name else each
    return sum((small if p.numel() >= SMALL else each) * p.numel() for p in trained)


def memory(recipe: Recipe, material: Material, found: Sized, settings: TrainingArguments) -> dict[str, int | None]:
    """Bytes. `peak` is what a run tells as its peak memory: on a GPU of torch's allocator, on a CPU of the whole process.

    libraries: on a CPU what this process holds by now, without a model. training, looking: beside weights, adapter and
    optimizer; None, as `peak` is then, of a model that cannot be traced. `found.model` has no numbers afterwards, not even fake.
    """
    place = build.device(recipe.model.device)
    held = {
        "libraries": psutil.Process().memory_info().rss if place.type == "cpu" else 0,
        "weights": found.weights,
        "adapter": sum(p.nbytes for p in found.model.parameters() if p.requires_grad),
        "optimizer": optimizer_bytes(found.model, str(getattr(settings.optim, "value", settings.optim))),
    }
    try:
        beside = traced(recipe, material, found, settings)
    except RuntimeError:  # an operation whose shape or way depends on numbers: there are none
        beside = {"training": None, "looking": None}
    most = [size for size in beside.values() if size is not None]
    return {"peak": sum(held.values()) + max(most) if most else None, **held, **beside}


def traced(recipe: Recipe, material: Material, found: Sized, settings: TrainingArguments) -> dict[str, int | None]:
    """Bytes that a training step and a look hold at their peaks beside what is there all the time, gradients included.

    Raises RuntimeError where the model cannot be traced.
    """
    model = found.model
    inputs: list[Tensor] = []
    if recipe.model.quantization == "8bit":  # bitsandbytes keeps for backward what its 8-bit maps are given
        for module in found.maps:
            module.register_forward_pre_hook(lambda _, args: inputs.extend(x for x in args if x.requires_grad))
    attachment = attach(model, recipe.method, padding_free=recipe.data.padding_free)
    without_numbers(model)
    if settings.gradient_checkpointing:
        checkpoint(model, settings)
    side = build.padding_side(model)
    train = tokenise.collator(material.tokenizer, side, recipe.data.padding_free)
    longest = max((material.examples[split] for split in SPLITS), key=lambda rows: max(column_of(rows, "length")))
    size = settings.per_device_eval_batch_size
    batches = {
        "training": train(_longest(material.examples["train"], settings.per_device_train_batch_size)),
        "looking": tokenise.collator(material.tokenizer, side)(_longest(longest, size)),
    }
    precision = build.precision(recipe)
    try:
        with Ledger(model) as ledger, torch.autocast("cpu", precision) if precision else nullcontext():
            model.eval()
            with torch.no_grad():
                _look(model, dict(batches["looking"]))
            looking, ledger.peak = ledger.peak, ledger.held
            model.train()
            passes = 2 if recipe.method.passes == 2 else 1  # in the first of two, `dropout.prefix` shares nothing yet
            for _ in range(passes):
                ledger.peak = ledger.held
                _step(recipe, model, dict(batches["training"]), settings)
                inputs.clear()
    finally:
        attachment.detach()
    return {"training": ledger.peak, "looking": looking}


def checkpoint(model: PeftModel, settings: TrainingArguments) -> None:
    """Let the model compute its activations anew in backward, as Trainer would, by the name that transformers has for it."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{name}_checkpointing_enable")(settings.gradient_checkpointing_kwargs)


def _longest(examples: Any, count: int) -> list[dict[str, Any]]:
    order = np.argsort(-np.asarray(column_of(examples, "length")), kind="stable")[:count]
    return [examples[row] for row in order.tolist()]


def _step(recipe: Recipe, model: PeftModel, batch: dict[str, Any], settings: TrainingArguments) -> None:
    """As `Trainer` makes it, up to the gradients, which are then forgotten."""
    consistency = recipe.method.consistency if recipe.method.passes == 2 else None
    if learns_tokens(model):
        smoothing = settings.label_smoothing_factor
        loss = token_objective(model, Vocabulary(model), batch, consistency, smoothing).loss
    else:

        def forward() -> tuple[Tensor, Any]:
            outputs = model(**batch)
            return outputs["loss"], outputs

        loss = objective(model, forward, consistency, batch["labels"]).loss
    loss.backward()
    model.zero_grad(set_to_none=True)


def _look(model: PeftModel, batch: dict[str, Any]) -> None:
    labels = batch.pop("labels")
    if not learns_tokens(model):
        model(**batch)
        return
    vocabulary = Vocabulary(model)
    states, targets, _ = vocabulary.run(model, batch, labels)
    block = next(iter(vocabulary.blocks(len(targets))))
    logits = vocabulary.logits(states[block]).float()
    cross_entropy(logits, targets[block], reduction="none")
