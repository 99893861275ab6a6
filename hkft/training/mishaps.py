"""What a machine does to a run: no memory, no room on the disk, a worker that died, a logger that fails.

Each is one error that says what to do next, or, where the run can do without, one warning.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from safetensors import SafetensorError
from transformers import TrainerCallback
from transformers.trainer_callback import DefaultFlowCallback

from hkft.errors import FULL, OutOfMemoryError, SetupError, foreseen
from hkft.events import Listener, Notice
from hkft.folder import RunFolder
from hkft.model import memory
from hkft.recipe import Recipe
from hkft.training import forecast
from hkft.training.prepare import Material, arguments

SAID_OF_DISKS = (
    "PytorchStreamWriter",
    "inline_container",
    "I/O error",
    "No space left",
    "os error",
)  # by torch, safetensors


@contextmanager
def writing(folder: RunFolder) -> Iterator[None]:
    """Raise SetupError where the disk fails within."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise _unwritten(error, folder) from error
    except RuntimeError as error:
        if not any(part in str(error) for part in SAID_OF_DISKS):
            raise
        raise _unwritten(error, folder) from error


@contextmanager
def working(folder: RunFolder, recipe: Recipe, material: Material) -> Iterator[None]:
    """As `writing`; the same where a data worker dies, and where memory runs out the remedies are told."""
    try:
        with writing(folder):
            yield
    except OutOfMemoryError as error:
        (problem,) = error.problems
        better = remedies(recipe, material, folder) if problem.message.endswith("while training") else None
        raise OutOfMemoryError(problems=[replace(problem, hint=better or problem.hint)]) from error
    except RuntimeError as error:
        problem = foreseen(error)
        if problem is None:
            raise
        raise problem from error


def _unwritten(error: Exception, folder: RunFolder) -> SetupError:
    number = error.errno if isinstance(error, OSError) else None
    full = number in FULL or "unexpected pos" in str(error) or any(f"os error {each}" in str(error) for each in FULL)
    named = error.filename if isinstance(error, OSError) else None
    reason = error.strerror if isinstance(error, OSError) else str(error).strip().splitlines()[0]
    hint = "Free some space." if full else "Is there space on the disk, and may it be written to?"
    return SetupError(
        "the run cannot be written: " + ("there is no room left" if full else "the disk refuses"),
        where=str(named or folder.path),
        found=reason,
        hint=f"{hint} Then {'--resume goes on from the last checkpoint' if folder.exists else 'begin again'}.",
    )


def remedies(recipe: Recipe, material: Material, folder: RunFolder) -> str | None:
    """What takes less memory, each with the part that it is forecast to take; None where nothing can be forecast."""
    size, steps = recipe.train["per_device_train_batch_size"], recipe.train.get("gradient_accumulation_steps") or 1
    wanted = [
        *(
            [[f"train.per_device_train_batch_size={size // 2}", f"train.gradient_accumulation_steps={2 * steps}"]]
            * (size > 1)
        ),
        *([[f"train.{memory.checkpointing()}=true"]] * (not recipe.train.get(memory.checkpointing()))),
        *([["model.quantization=4bit"]] * (recipe.model.quantization == "none")),
    ]

    def needed(chosen: Recipe) -> int:
        sized = forecast.sized(chosen, material)
        found = forecast.memory(chosen, material, sized, arguments(chosen, folder))
        peak, libraries = found["peak"], found["libraries"]
        if peak is None:
            raise ValueError("a model that cannot be traced")
        return peak - (libraries or 0)

    with suppress(Exception):  # whatever fails here hides nothing: memory has
        now = needed(recipe)
        told = []
        for overrides in wanted:
            with suppress(Exception):  # a remedy that this model cannot take
                part = needed(recipe.replace(*overrides)) / now
                if part < 1:
                    told.append(f"{' '.join(f'--set {each}' for each in overrides)} (about {part:.0%} of it)")
        if told:
            return f"training holds about {_gigabytes(now)} beside the libraries; less with " + ", or ".join(told)
    return None


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def guard_loggers(callbacks: list[TrainerCallback], own: tuple[type, ...], tell: Listener) -> None:
    """Let no logger of `train.report_to` end a run that has begun: what it raises is told once, and it is left out.

    Where it already fails as training begins, nothing is lost yet: SetupError. own: callbacks that are no loggers.
    """
    for callback in callbacks:
        if isinstance(callback, (DefaultFlowCallback, *own)):
            continue
        for name in [name for name in dir(TrainerCallback) if name.startswith("on_")]:
            setattr(callback, name, _guarded(callback, name, getattr(callback, name), tell))


def _guarded(callback: TrainerCallback, name: str, own: Callable[..., Any], tell: Listener) -> Callable[..., Any]:
    logger = type(callback).__name__.removesuffix("Callback")

    @functools.wraps(own)
    def call(*args: Any, **kwargs: Any) -> Any:
        if vars(callback).get("_hkft_failed"):
            return None
        try:
            return own(*args, **kwargs)
        except Exception as error:
            found = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            if name in ("on_init_end", "on_train_begin"):
                raise SetupError(
                    f"the logger {logger} cannot begin",
                    where="train.report_to",
                    found=found,
                    hint="--set train.report_to=none",
                ) from error
            vars(callback)["_hkft_failed"] = True
            tell(Notice(f"the logger {logger} failed and is left out from here on: {found}", "warning"))
            return None

    return call
