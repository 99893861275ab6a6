"""What two passes over one batch have in common, computed once: all that runs before the first mask is drawn.

Where a method drops in the latter half of a decoder, that is half of the second pass; in an encoder, the first layer's
projections. Nothing is assumed about a family: the first two passes under a method run in full, and tell which modules gave
the same before anything dropped, bit for bit. Whatever draws at random by itself is found out so. From then on the second pass
takes the outputs of those modules from the first, with the graph that leads to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from hkft.dropout.dropper import Dropper

Around = Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]]  # (module, its forward) -> another forward


class Prefix:
    """The modules that run before the first drop, and what they gave out in the first of two passes.

    `with prefix.first(gradient): ...`, then `with prefix.second(): ...`, both in train mode and over the same batch.
    """

    def __init__(self, model: nn.Module, droppers: Sequence[Dropper]) -> None:
        self.model, self.droppers = model, droppers
        self._proven: dict[tuple[bool, ...], list[nn.Module]] = {}  # by which droppers are at work
        self._kept: dict[nn.Module, Any] = {}  # since the first pass: outputs, or in the proof what tells them apart
        self._called: set[nn.Module] = set()
        self._before = False  # nothing has dropped yet in this pass

    @property
    def modules(self) -> list[nn.Module] | None:
        """Those that the second pass takes from the first, under the rates of now; None as long as that is not proven."""
        return self._proven.get(tuple(dropper.rate > 0 for dropper in self.droppers))

    @contextmanager
    def first(self, gradient: bool) -> Iterator[None]:
        """Around the first pass. gradient: whether it carries any; what is shared carries that of the second in any case."""
        outer = torch.is_grad_enabled()
        carries, proving = gradient and outer, self.modules is None
        at_first = outer if self.modules else carries
        self._forget()

        def dropped() -> None:
            if self._before:
                self._before = False
                torch.set_grad_enabled(carries)

        self._before = True
        for dropper in self.droppers:
            dropper.begins = dropped
        try:
            with torch.set_grad_enabled(at_first), self._around(partial(self._keep, proving)):
                yield
        except BaseException:
            self._forget()
            raise
        finally:
            self._before = False
            for dropper in self.droppers:
                dropper.begins = None

    @contextmanager
    def second(self) -> Iterator[None]:
        """Around the second pass, in the grad mode in which the first was entered."""
        same: set[nn.Module] = set()
        around = partial(self._compare, same) if self.modules is None else self._give
        try:
            with self._around(around):
                yield
            if self.modules is None:
                key = tuple(dropper.rate > 0 for dropper in self.droppers)
                self._proven[key] = _outermost(self.model, same, self._called - same)
        finally:
            self._forget()

    def _forget(self) -> None:
        self._kept, self._called = {}, set()

    @contextmanager
    def _around(self, around: Around) -> Iterator[None]:
        """For a while, another forward in every module that is shared or may come to be."""
        chosen = list(self.model.modules()) if self.modules is None else self.modules
        own = {module: module.__dict__.get("forward") for module in chosen}
        for module in chosen:
            module.forward = around(module, module.forward)
        try:
            yield
        finally:
            for module, forward in own.items():
                del module.forward
                if forward is not None:
                    module.forward = forward

    def _keep(self, proving: bool, module: nn.Module, own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            output = own(*args, **kwargs)
            if self._before and module not in self._called:
                self._kept[module] = _told_apart(output) if proving else (output, _versions(output))
            else:  # a module that runs twice has not one output
                self._kept.pop(module, None)
            self._called.add(module)
            return output

        return forward

    def _compare(self, same: set[nn.Module], module: nn.Module, own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            output = own(*args, **kwargs)
            if module in self._kept and torch.equal(self._kept[module], _told_apart(output)):
                same.add(module)
            return output

        return forward

    def _give(self, module: nn.Module, own: Callable[..., Any]) -> Callable[..., Any]:
        output, versions = self._kept.get(module, (None, None))
        if versions is None or versions != _versions(output):  # not run, or changed in place since
            return own
        return lambda *args, **kwargs: output


def _outermost(model: nn.Module, same: set[nn.Module], other: set[nn.Module]) -> list[nn.Module]:
    """The outermost modules that gave the same, with all within them: a dropout in front of a B that is still 0 shows not."""
    if model in same and not any(module in other for module in model.modules()):
        return [model]
    return [found for child in model.children() for found in _outermost(child, same, other)]


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _versions(output: Any) -> list[int]:
    return [tensor._version for tensor in _tensors(output)]


def _told_apart(output: Any) -> Tensor:
    """Sums that a dropped number anywhere would change: a few bytes for each output, where a copy would take memory."""
    sums = [torch.stack([x.sum(), x.abs().sum()]) for each in _tensors(output) for x in [each.detach().float()]]
    return torch.cat(sums) if sums else torch.full((1,), torch.nan)  # no tensor: never the same


def is_open(model: nn.Module) -> bool:
    """Whether hkft may reach between the modules of a model: not where it is compiled, checkpointed, or spread over devices."""
    return not any(
        getattr(module, "gradient_checkpointing", False) is True
        or module._compiled_call_impl is not None
        or _is_closed(type(module))
        for module in model.modules()
    )


@cache
def _is_closed(kind: type) -> bool:
    closed = {"OptimizedModule", "FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine"}
    return any(base.__name__ in closed for base in kind.__mro__)
