"""Before training: does the method, on this very model, do what it says? And what does it cost?

    differ      two training passes under different masks give different losses or gradients
    eval        two passes in eval mode give the same loss and logits
    baseline    at rate 0 in train mode the loss and logits are those of the model's own attention

A check runs in its own random stream and leaves weights, gradients, modes, counts and generators as they were.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hkft.dropout import interface
from hkft.dropout.attach import Attachment, attached
from hkft.errors import MethodError

CLOSE = 1e-3  # relative: what two passes over the same numbers may differ by on a GPU, far below what a mask does
CERTAIN = 0.5  # the rate under test, at least: at 0.01 two masks of a short batch may well be equal
BUDGET = 1.0  # seconds for timing, after one round
REASONS = {
    "differ": "two training passes under different masks gave the same loss and gradients",
    "eval": "two passes in eval mode differ",
    "baseline": "at rate 0 the model differs from itself without the method",
}


def self_check(model: nn.Module, batch: Mapping[str, Any], forward: Callable[[], Any] | None = None) -> dict[str, Any]:
    """Prove the attached method on one batch, and time it: {"rows", "seconds", "cost"}, cost by the number of the site.

    model: with a method attached by `attach`, on its device. batch: what the model takes, with labels if it is to have a
    loss. forward: runs the model on the batch, where that takes more than `model(**batch)`, such as autocast.
    cost: time of a training step, forward and backward, with one site alone at its own rate, by that without any; the
    least of several rounds, for as long as a second allows. `Attachment.report` tells it from then on.
    Raises MethodError where nothing is attached, or where one of the three does not hold.
    """
    attachment = attached(model)
    if attachment is None:
        raise MethodError("the model has no method attached", hint="hkft.attach(model, method) first")
    began, rows = time.perf_counter(), len(next(value for value in batch.values() if isinstance(value, Tensor)))
    run = forward or (lambda: model(**batch))
    own = {d.number: d.rate for d in attachment.droppers}
    if any(d.rate for d in attachment.droppers):
        with _untouched(model, attachment):
            _prove(model, attachment, run, {n: max(rate, CERTAIN) for n, rate in own.items()})
            attachment.costs.update(_time(model, attachment, run))
    return {"rows": rows, "seconds": time.perf_counter() - began, "cost": dict(attachment.costs)}


def _prove(model: nn.Module, attachment: Attachment, run: Callable[[], Any], rates: Mapping[int, float]) -> None:
    model.train()
    with attachment.rates(rates):
        one, two = (_train(model, run, seed) for seed in (0, 1))
    with attachment.rates({}), torch.no_grad():
        silent = _look(run)
        with _own_attention(attachment):
            plain = _look(run)
    model.eval()
    with torch.no_grad():
        looks = [_look(run, seed) for seed in (0, 1)]
    found = {"differ": not _close(one, two), "eval": _close(*looks), "baseline": _close(silent, plain)}
    wrong = [REASONS[name] for name, holds in found.items() if not holds]
    if wrong:
        raise MethodError(
            f"the method does not do on {type(attachment.family.model).__name__} what it says: {'; '.join(wrong)}",
            where="self-check",
            hint="this is a fault of hkft or of an unusual model: please report it with the model's name",
        )


def _time(model: nn.Module, attachment: Attachment, run: Callable[[], Any]) -> dict[int, float]:
    """Time of a training step with each site alone, by that of none."""
    model.train()
    numbers = sorted({d.number for d in attachment.droppers})
    best: dict[int | None, float] = {}
    began = time.perf_counter()
    rounds = 0
    while rounds < 1 or time.perf_counter() - began < BUDGET:
        rounds += 1
        for number in (None, *numbers) if rounds % 2 else (*numbers[::-1], None):
            rate = {d.number: d.rate for d in attachment.droppers if d.number == number}
            with attachment.rates(rate):
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
    torch.manual_seed(seed)
    with torch.enable_grad():
        loss = _loss(run())
        if loss.requires_grad:
            loss.backward()
    found = [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    model.zero_grad(set_to_none=True)
    return found


def _look(run: Callable[[], Any], seed: int = 0) -> list[Tensor]:
    """Loss and first output of a pass without gradients."""
    torch.manual_seed(seed)
    outputs = run()
    return [_loss(outputs), _first(outputs)]


def _loss(outputs: Any) -> Tensor:
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
    return _first(outputs).float().square().mean() if loss is None else loss


def _first(outputs: Any) -> Tensor:
    if isinstance(outputs, Mapping):
        outputs = [value for key, value in outputs.items() if key != "loss"]
    return next(value for value in outputs if isinstance(value, Tensor))


def _close(one: list[Tensor], two: list[Tensor]) -> bool:
    return all((a - b).abs().max() <= CLOSE * a.abs().max() for a, b in zip(one, two, strict=True))


@contextmanager
def _own_attention(attachment: Attachment) -> Iterator[None]:
    """The model's own attention for a while."""
    if attachment.backend is None:
        yield
        return
    with interface.left(attachment.family.model, attachment.backend):
        yield


@contextmanager
def _untouched(model: nn.Module, attachment: Attachment) -> Iterator[None]:
    """Afterwards modes, gradients, random streams and counts are what they were."""
    modes = {module: module.training for module in model.modules()}
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    counts = [(d, d.fired, d.calls, d.counts) for d in attachment.droppers]
    states = [(d, {place: g.get_state() for place, g in d.generators.items()}) for d in attachment.droppers]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    for d in attachment.droppers:
        d.counts = None  # it would be counted on in place
    for parameter in gradients:
        parameter.grad = None
    try:
        with torch.random.fork_rng(devices=sorted(devices, key=str)):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        for d, fired, calls, counted in counts:
            d.fired, d.calls, d.counts, d.likely = fired, calls, counted, None
        for d, state in states:
            d.generators = {place: g for place, g in d.generators.items() if place in state}
            for place, saved in state.items():
                d.generators[place].set_state(saved)
