"""Keep-masks: which elements, columns or spans survive one forward pass. True keeps, False drops.

A position offers two shapes (the paper's framework): `full`, every element, and `units`, what a column or a span is made of:

    attention   full [B,H,Q,K]   units [B,H,K]   one unit is a key, gone for every query of a head
    hidden      full [B,L,D]     units [B,L]     one unit is a token

A new pattern is one function and one line of `PATTERNS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

Shape = Sequence[int]
Draw = Callable[[Shape], Tensor]  # independent uniform numbers in [0, 1) of the given shape


def uniform(device: torch.device, generator: torch.Generator | None = None) -> Draw:
    """Draws on `device`, from torch's default generator (the one that gradient checkpointing replays) unless another is given."""
    return lambda shape: torch.rand(tuple(shape), device=device, generator=generator)


def element(full: Shape, units: Shape, rate: float, draw: Draw) -> Bool[Tensor, "*full"]:
    """Each element is dropped on its own, with probability `rate`."""
    return draw(full) >= rate


def column(full: Shape, units: Shape, rate: float, draw: Draw) -> Bool[Tensor, "*units"]:
    """Each unit, a key or a token, is dropped as a whole, with probability `rate`."""
    return draw(units) >= rate


def span(full: Shape, units: Shape, rate: float, draw: Draw) -> Bool[Tensor, "*units"]:
    """One contiguous run of `rate` x N units is dropped, N the last size of `units`, its start drawn uniformly.

    Where rate x N is not whole, the length is rounded up with the probability of its fraction, so that the expected
    share dropped is exactly `rate`.
    """
    rows, n = tuple(units[:-1]), units[-1]
    length = torch.floor(n * rate + draw((*rows, 1)))
    start = torch.floor(draw((*rows, 1)) * (n - length + 1))
    place = torch.arange(n, device=start.device)
    return (place < start) | (place >= start + length)


PATTERNS: dict[str, Callable[[Shape, Shape, float, Draw], Tensor]] = {
    "element": element,
    "column": column,
    "span": span,
}
