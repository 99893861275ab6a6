"""The last layer of an encoder whose head reads the first token alone: after its attention, only that token is computed.

In BERT that spares nine of the last layer's twelve products of tokens with matrices, forward and backward. Nothing is assumed of a family. On
two rows of a model's first batch it is proven, once, that the logits do not hang on any other token from that place on: there
they become NaN, and the logits stay the same, bit for bit. A model that reads more (the mean, the last token, every token),
or whose residual goes around the place (layer norm before the attention), computes all, as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hkft.dropout import families
from hkft.dropout.attach import attached
from hkft.dropout.modes import evaluating
from hkft.dropout.prefix import is_open
from hkft.errors import MethodError

CLOSE = 1e-3  # relative: another number of rows is another order of adding up

_places: WeakKeyDictionary[nn.Module, nn.Module | None] = (
    WeakKeyDictionary()
)  # where each model may go on with one token


@contextmanager
def first_token(model: nn.Module, batch: Mapping[str, Any]) -> Iterator[None]:
    """While inside, the model's passes over batches like this one compute no more of the last layer than the logits need.

    The logits are the same within rounding; the last hidden states are [B,1,D]. A method that drops spans of tokens there,
    and a model that is compiled, checkpointed or spread over devices, have all of them.
    """
    place = _place(model, batch) if is_open(model) and not _drops_spans(model) else None
    if place is None:
        yield
        return
    with _given(place, _first):
        yield


def _place(model: nn.Module, batch: Mapping[str, Any]) -> nn.Module | None:
    if model not in _places:
        few = {name: value[:2] for name, value in batch.items() if isinstance(value, Tensor) and name != "labels"}
        if "input_ids" not in few or few["input_ids"].ndim != 2 or few["input_ids"].shape[1] < 2:
            return None  # shows nothing, whatever the model
        with evaluating(model), torch.no_grad():
            _places[model] = _find(model, few)
    return _places[model]


def _find(model: nn.Module, batch: dict[str, Tensor]) -> nn.Module | None:
    """The first module after the last attention from which on the first token is enough; None where there is none."""
    try:
        last = families.find(model).layers[-1]
    except MethodError:  # no attention that hkft knows
        return None
    if last.causal:
        return None
    after: list[nn.Module] = []
    seen = [last.attention.register_forward_hook(lambda *_: after.clear())]
    seen += [
        part.register_forward_pre_hook(lambda module, _: after.append(module)) for part in set(last.block.modules())
    ]
    try:
        logits = _logits(model, batch)
    finally:
        for handle in seen:
            handle.remove()
    if logits is None or not torch.isfinite(logits).all():
        return None
    lengths: list[int] = []
    measure = last.block.register_forward_hook(lambda _, __, output: lengths.append(_state(output).shape[1]))
    try:
        for place in after:
            with _given(place, _nothing_but_first):
                blind = _logits(model, batch)
            lengths.clear()
            with _given(place, _first):
                short = _logits(model, batch)
            if lengths == [1] and blind is not None and short is not None and torch.equal(blind, logits):
                near = CLOSE * logits.float().abs().max()
                return place if ((short - logits).float().abs() <= near).all() else None
    except (RuntimeError, ValueError, IndexError):  # what is not made for one token says so
        pass
    finally:
        measure.remove()
    return None


def _logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor | None:
    outputs = model(**batch)
    return outputs.get("logits") if isinstance(outputs, Mapping) else None


def _state(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@contextmanager
def _given(place: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """For a while, another [B,L,D] into a module, by whatever name."""

    def changed(each: Any) -> Any:
        return change(each) if isinstance(each, Tensor) and each.ndim == 3 else each

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(map(changed, args)), {name: changed(each) for name, each in kwargs.items()}

    handle = place.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _first(states: Tensor) -> Tensor:
    return states[:, :1].contiguous()  # of rows that lie apart, the products' last bits hang on where the memory begins


def _nothing_but_first(states: Tensor) -> Tensor:
    return torch.cat([states[:, :1], torch.full_like(states[:, 1:], torch.nan)], 1)


def _drops_spans(model: nn.Module) -> bool:
    """Whether the attached method drops runs of tokens in the last layer, which have to be there for it."""
    attachment = attached(model)
    if attachment is None:
        return False
    there = {("hidden", len(attachment.family.layers) - 1), ("output", None)}
    return any(d.site.pattern == "span" and (d.site.position, d.layer) in there for d in attachment.droppers)
