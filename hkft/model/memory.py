"""Out of memory: the one error of hkft's for the several that PyTorch and its allocators have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from hkft.errors import OutOfMemoryError
from hkft.recipe import Recipe

SAID = ("not enough memory", "can't allocate memory", "out of memory")  # by a RuntimeError of the CPU's, or a library's


@contextmanager
def out_of_memory(doing: str, hint: str, where: str | None = None, found: str | None = None) -> Iterator[None]:
    """Raise OutOfMemoryError, "out of memory while <doing>" and what to do next, where memory does not suffice within."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(part in str(error) for part in SAID):
            raise
        raise OutOfMemoryError(f"out of memory while {doing}", where=where, found=found, hint=hint) from error


def while_loading(recipe: Recipe) -> AbstractContextManager[None]:
    """For a base model and its adapter."""
    return out_of_memory(
        f"loading {recipe.model.name}",
        "--set model.quantization=4bit, or --set model.dtype=bfloat16; `hkft check` estimates what is needed",
        where="model.name",
    )


def while_training(recipe: Recipe) -> AbstractContextManager[None]:
    """For training steps."""
    batch = recipe.train["per_device_train_batch_size"]
    return out_of_memory(
        "training",
        f"--set train.per_device_train_batch_size={max(1, batch // 2)} --set train.gradient_accumulation_steps=2, "
        f"--set train.{checkpointing()}=true, or --set model.quantization=4bit",
        where="train.per_device_train_batch_size",
        found=str(batch),
    )


def checkpointing() -> str:
    """What the installed transformers calls the setting that computes activations again instead of keeping them."""
    from transformers import TrainingArguments

    names = TrainingArguments.__dataclass_fields__
    return "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"


def while_looking(recipe: Recipe) -> AbstractContextManager[None]:
    """For passes without gradients."""
    batch = recipe.train["per_device_eval_batch_size"]
    return out_of_memory(
        "evaluating",
        f"--set train.per_device_eval_batch_size={max(1, batch // 2)}",
        where="train.per_device_eval_batch_size",
        found=str(batch),
    )
