"""Before training: does the method, on this very model, do what it says? And what does it cost?

    differ      for each site, two training passes under different masks give different losses or gradients
    eval        two passes in eval mode give the same loss and logits
    baseline    at rate 0 in train mode the loss and logits are those of the model's own attention
    path        so are, but for rounding, those of hkft's own path with masks that drop nothing

A check runs in its own random stream and leaves weights, gradients, buffers, modes, counts and generators as they were.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import set_seed

from hkft.dropout import interface
from hkft.dropout.attach import Attachment, attached
from hkft.dropout.dropper import Dropper
from hkft.dropout.modes import modes_kept
from hkft.errors import DivergedError, MethodError

CLOSE = 1e-3  # relative: what two passes over the same numbers may differ by on a GPU, far below what a mask does
NEAR = 5e-2  # relative, in the mean: what another kernel may round otherwise in half precision
CERTAIN = 0.5  # the rate under test, at least: at 0.01 two masks of a short batch may well be equal
NOTHING = -1e-9  # no number is below it: a mask is drawn, and drops nothing
BUDGET = 1.0  # seconds for timing, after one round
REASONS = {
    "differ": "two training passes under different masks of {} gave the same loss and gradients",
    "eval": "two passes in eval mode differ",
    "baseline": "at rate 0 the model differs from itself without the method",
    "path": "with masks that drop nothing the model differs from itself without the method",
}


def self_check(model: nn.Module, batch: Mapping[str, Any], forward: Callable[[], Any] | None = None) -> dict[str, Any]:
    """Prove the attached method on one batch, and time it: {"rows", "seconds", "cost"}, cost by the number of the site.

    model: with a method attached by `attach`, on its device; not DDP's wrapper, whose ranks would wait for one another.
    batch: what the model takes, with labels if it is to have a loss. forward: runs the model on the batch, where that takes
    more than `model(**batch)`, such as autocast.
    cost: time of a training step, forward and backward, with one site alone at its own rate, by that without any; the
    least of several rounds, for as long as a second allows. `Attachment.report` tells it from then on.
    Raises MethodError where nothing is attached, or where one of the four does not hold; DivergedError where the loss is
    NaN or infinite before anything was trained.
    """
    attachment = attached(model)
    if attachment is None:
        raise MethodError("the model has no method attached", hint="hkft.attach(model, method) first")
    began, rows = time.perf_counter(), len(next(value for value in batch.values() if isinstance(value, Tensor)))
    run = forward or (lambda: model(**batch))
    if any(d.rate for d in attachment.droppers):
        with untouched(model, attachment):
            mask = batch.get("attention_mask")
            _prove(model, attachment, run, mask if isinstance(mask, Tensor) else None)
            attachment.costs.update(_time(model, attachment, run))
    return {"rows": rows, "seconds": time.perf_counter() - began, "cost": dict(attachment.costs)}


def _prove(model: nn.Module, attachment: Attachment, run: Callable[[], Any], real: Tensor | None) -> None:
    with torch.no_grad():
        model.eval()
        looks = [_look(run, real, seed) for seed in (0, 1)]
        model.train()
        with _without_native(model), attachment.rates(lambda _: 0.0):
            silent = _look(run, real)
            with _own_attention(attachment):
                plain = _look(run, real)
        with _without_native(model), attachment.rates(lambda d: NOTHING if d.rate else 0.0):
            empty = _look(run, real)
    if not torch.isfinite(plain[0]).all():
        raise DivergedError(
            f"the loss is {plain[0].float().max().item()} before training, with or without the method",
            where="self-check",
            hint="look at the batch (are all labels -100?) and at the precision",
        )
    with _without_native(model):  # it would hide a site that does nothing
        wrong = [REASONS["differ"].format(name) for name in _idle(model, attachment, run)]
    found = {"eval": _close(*looks), "baseline": _close(plain, silent), "path": _near(plain, empty)}
    wrong += [REASONS[name] for name, holds in found.items() if not holds]
    if wrong:
        raise MethodError(
            f"the method does not do on {type(attachment.family.model).__name__} what it says: {'; '.join(wrong)}",
            where="self-check",
            hint="this is a fault of hkft or of an unusual model: please report it with the model's name",
        )


def _idle(model: nn.Module, attachment: Attachment, run: Callable[[], Any]) -> list[str]:
    """The positions of the sites that drop, and yet change nothing."""
    idle = []
    for number in sorted({d.number for d in attachment.droppers if d.rate}):
        with attachment.rates(lambda d, alone=number: max(d.rate, CERTAIN) if d.number == alone and d.rate else 0.0):
            one = _train(model, run, 0)
            others = (_train(model, run, seed) for seed in (1, 2, 3))  # two masks of few tokens may well be equal
            same = all(_close(one, other) for other in others)
        if same:
            idle.append(attachment.method.sites[number].position)
    return idle


def _time(model: nn.Module, attachment: Attachment, run: Callable[[], Any]) -> dict[int, float]:
    """Time of a training step with each site alone, by that of none."""
    model.train()
    numbers = sorted({d.number for d in attachment.droppers})
    best: dict[int | None, float] = {}

    def only(number: int | None) -> Callable[[Dropper], float]:
        return lambda d: d.rate if d.number == number else 0.0

    began = time.perf_counter()
    rounds = 0
    while rounds < 1 or time.perf_counter() - began < BUDGET:
        rounds += 1
        for number in (None, *numbers) if rounds % 2 else (*numbers[::-1], None):
            with attachment.rates(only(number)):
                took = _timed(model, run)
            best[number] = min(best.get(number, took), took)
    return {number: best[number] / best[None] for number in numbers}


def _timed(model: nn.Module, run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    for number in _train(model, run, 0):
        number.max().item()  # waits for the device
    return time.perf_counter() - began


def _train(model: nn.Module, run: Callable[[], Any], seed: int) -> list[Tensor]:
    """Loss and gradients of one training pass."""
    set_seed(seed)
    with torch.enable_grad():
        outputs = run()
        loss = _loss(outputs)
        if loss.requires_grad:
            loss.backward()
    found = [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    model.zero_grad(set_to_none=True)
    return found


def _look(run: Callable[[], Any], real: Tensor | None, seed: int = 0) -> list[Tensor]:
    """Loss and first output of a pass without gradients, the latter where the batch has tokens: `real`, [B,L]."""
    set_seed(seed)
    outputs = run()
    first = _first(outputs)
    if first is None:
        return [_loss(outputs)]
    per_token = real is not None and real.shape == first.shape[:2] and first.ndim > 2
    return [_loss(outputs), first[real.bool()] if real is not None and per_token else first]


def _loss(outputs: Any) -> Tensor:
    """The loss of the model; the mean square of its first output where it gives none."""
    if isinstance(outputs, Mapping) and outputs.get("loss") is not None:
        return outputs["loss"]
    first = _first(outputs)
    assert first is not None, "the model gives no tensor"
    return first.float().square().mean()


def _first(outputs: Any) -> Tensor | None:
    """The first tensor of a model's outputs that is not its loss, or None."""
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping):
        outputs = [value for key, value in outputs.items() if key != "loss"]
    return next((value for value in outputs if isinstance(value, Tensor)), None)


def _close(one: list[Tensor], two: list[Tensor]) -> bool:
    return all(
        torch.allclose(a, b, rtol=0, atol=CLOSE * _size(a), equal_nan=True) for a, b in zip(one, two, strict=True)
    )


def _near(one: list[Tensor], two: list[Tensor]) -> bool:
    apart = [(a - b).float().abs().nan_to_num(posinf=0.0).mean() for a, b in zip(one, two, strict=True)]
    sizes = [a.float().abs().nan_to_num(posinf=0.0).mean() for a in one]
    return all(distance <= NEAR * size for distance, size in zip(apart, sizes, strict=True))


def _size(numbers: Tensor) -> float:
    """The largest finite absolute value."""
    return float(numbers.float().abs().nan_to_num(posinf=0.0).max())


@contextmanager
def _own_attention(attachment: Attachment) -> Iterator[None]:
    """The model's own attention for a while."""
    here = interface.left(attachment.backends) if attachment.backends else nullcontext()
    with here:
        yield


@contextmanager
def _without_native(model: nn.Module) -> Iterator[None]:
    """The model's own dropout at rate 0 for a while: of modules, and what modules and configurations keep as a number."""
    names = [(m, "p") for m in model.modules() if isinstance(m, nn.Dropout)]
    configs = {id(config): config for m in model.modules() if (config := getattr(m, "config", None)) is not None}
    names += [
        (holder, name) for holder in [*model.modules(), *configs.values()] for name in vars(holder) if "drop" in name
    ]
    before = [(m, name, rate) for m, name in names if isinstance(rate := getattr(m, name), float)]
    for module, name, _ in before:
        setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, rate in before:
            setattr(module, name, rate)


@contextmanager
def untouched(model: nn.Module, attachment: Attachment) -> Iterator[None]:
    """A look aside. Afterwards modes, gradients, buffers, random streams, counts and proof are what they were."""
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    counts = [(d, d.fired, d.calls, d.counts) for d in attachment.droppers]
    states = [(d, {place: g.get_state() for place, g in d.generators.items()}) for d in attachment.droppers]
    norms = [module for module in model.modules() if hasattr(module, "running_mean")]
    buffers = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]
    numbers, more = random.getstate(), np.random.get_state()
    proven = attachment.proof.proven
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    for parameter in gradients:
        parameter.grad = None
    try:
        with torch.random.fork_rng(devices=sorted(devices, key=str)), modes_kept(model):
            yield
    finally:
        random.setstate(numbers)
        np.random.set_state(more)
        attachment.proof.proven = proven
        with torch.no_grad():
            for buffer, saved in buffers:
                buffer.copy_(saved)
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        for d, fired, calls, counted in counts:
            d.fired, d.calls, d.counts, d.likely = fired, calls, counted, None
        for d, state in states:
            d.generators = {place: g for place, g in d.generators.items() if place in state}
            for place, saved in state.items():
                d.generators[place].set_state(saved)
