"""The vocabulary's end of a decoder, where its memory goes: [B,L,V] logits are not built.

The model runs with its head left out, at the positions whose next token is learned; then the head is applied to a few of
them at a time. Legend: B batch, L tokens, N learned tokens of the batch, D hidden size, V vocabulary.

Where the head is more than one map (a family that caps or scales its logits), is trained, or lies in pieces on several
devices, the model applies it itself: then [B,K,V] logits are built, at the K positions that some row learns.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hkft.data.completions import IGNORED
from hkft.dropout.modes import evaluating

NUMBERS = 2**24  # float32 logits at a time: 64 MiB


class Learned(NamedTuple):
    """What a decoder says at the positions before learned tokens.

    states: [N,D] before the head, or [N,V] logits where the model applied it. targets: [N] tokens. rows: [N], the row of
    the batch that each belongs to.
    """

    states: Tensor
    targets: Tensor
    rows: Tensor


_PROVEN: WeakKeyDictionary[nn.Module, tuple[int, bool]] = WeakKeyDictionary()  # the head, and whether it is plain


class Vocabulary:
    """The head of a decoder. `plain`: it may be left out of the model, and applied afterwards."""

    def __init__(self, model: nn.Module, whole: bool = False) -> None:
        """whole: the model is to apply its head itself, whatever it is like."""
        self.model = inner_model(model)
        head = self.model.get_output_embeddings()
        assert isinstance(head, nn.Module), "a model that generates"
        self.head = head
        self.keeps = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self.plain = not whole and self._is_plain()

    @property
    def size(self) -> int:
        return self.model.config.get_text_config().vocab_size

    def run(self, model: nn.Module, inputs: Mapping[str, Any], labels: Tensor) -> Learned:
        """One pass of `model` (the wrapper that training calls) over a batch without its labels, [B,L] or [1,T]."""
        columns = (labels[:, 1:] != IGNORED).any(0).nonzero().squeeze(1)
        targets = labels[:, 1:][:, columns]
        kept = {"logits_to_keep": columns} if self.keeps else {}
        with self._left_out():
            outputs = model(**inputs, **kept)
        states = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        if not self.keeps:
            states = states[:, columns]
        where = targets != IGNORED
        rows = torch.arange(len(labels), device=labels.device).unsqueeze(1).expand_as(targets)
        return Learned(states[where], targets[where], rows[where])

    def logits(self, states: Tensor) -> Tensor:
        """[n,V] of [n,D] states."""
        return self.head(states) if self.plain else states

    def blocks(self, count: int) -> Iterator[slice]:
        """Slices of N tokens, each with as many as stand for NUMBERS logits."""
        size = max(1, NUMBERS // self.size)
        yield from (slice(start, start + size) for start in range(0, count, size))

    def _is_plain(self) -> bool:
        """Whether the model gives out exactly what its head gives it, at values no trained head is shy of."""
        if any(p.requires_grad or hasattr(p, "ds_id") or hasattr(p, "device_mesh") for p in self.head.parameters()):
            return False
        head, plain = _PROVEN.get(self.model, (None, False))
        if head != id(self.head):
            plain = self._hands_on()
            _PROVEN[self.model] = id(self.head), plain
        return plain

    def _hands_on(self) -> bool:
        """The proof: what a stand-in for the head says comes out of the model as it is, in value and in dtype."""
        said: list[Tensor] = []

        def loud(states: Tensor) -> Tensor:
            said.append(torch.linspace(-100, 100, states.shape[-1]).to(states).expand_as(states))
            return said[-1]

        with evaluating(self.model), torch.no_grad(), self._left_out(loud):
            outputs = self.model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=self.model.device))
        given = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        return len(said) == 1 and given.dtype == said[0].dtype and torch.equal(given, said[0])

    @contextmanager
    def _left_out(self, instead: Callable[[Tensor], Tensor] | None = None) -> Iterator[None]:
        """For a while the head hands on what it is given, or what `instead` makes of it."""
        if instead is None and not self.plain:
            yield
            return
        own = self.head.__dict__.get("forward")
        self.head.forward = instead or _unchanged
        try:
            yield
        finally:
            del self.head.forward
            if own is not None:
                self.head.forward = own


def found_inside(model: nn.Module) -> PreTrainedModel | None:
    """The transformers model inside whatever wraps it, if there is one."""
    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)


def inner_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model that must be inside."""
    found = found_inside(model)
    assert found is not None, "a transformers model"
    return found


def _unchanged(states: Tensor) -> Tensor:
    return states


class SummedInBlocks(torch.autograd.Function):
    """sum of `term(block of states, slice)` over blocks of tokens: a scalar, differentiable in the states.

    The gradient is computed along with the value, block by block, so that nothing of a block's logits outlives it. states:
    tensors [N,...] that the term takes blocks of. `parts` collects what the term tells beside its value.
    """

    @staticmethod
    def forward(ctx: Any, term: Callable[..., Tensor], blocks: list[slice], *states: Tensor) -> Tensor:
        gradients = [torch.zeros_like(each) if ctx.needs_input_grad[n + 2] else None for n, each in enumerate(states)]
        wanted = [n for n, gradient in enumerate(gradients) if gradient is not None]
        total = states[0].new_zeros((), dtype=torch.float32)
        for block in blocks:
            pieces = [each[block].detach().requires_grad_(n in wanted) for n, each in enumerate(states)]
            with torch.set_grad_enabled(bool(wanted)):
                value = term(*pieces, block)
            if wanted:
                for n, found in zip(wanted, torch.autograd.grad(value, [pieces[n] for n in wanted]), strict=True):
                    gradients[n][block] = found  # type: ignore[index]
            total = total + value.detach()
        ctx.gradients = gradients
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Any, ...]:
        return (None, None, *(None if each is None else each * outer[0].to(each.dtype) for each in ctx.gradients))
