"""Keep-masks: which elements, columns or spans survive one forward pass. True keeps, False drops.

A position offers two shapes (the paper's framework): `full`, every element, and `units`, what a column or a span is made of:

    attention   full [B,H,Q,K]   units [B,H,K]   one unit is a key, gone for every query of a head
    hidden      full [B,L,D]     units [B,L]     one unit is a token
    LoRA        full [B,L,D]     units [D]       one unit is a feature, gone for every token: a row or column of A or B

A new pattern is one function and one line of `PATTERNS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool
from torch import Tensor

Shape = Sequence[int]
Draw = Callable[[Shape], Tensor]  # independent uniform numbers in [0, 1) of the given shape


def uniform(device: torch.device, generator: torch.Generator | None = None) -> Draw:
    """Draws on `device`, from torch's default generator (the one that gradient checkpointing replays) unless another is given.

    In data-parallel training all ranks begin with one seed as a rule, and would drop the same. Here rank r of n turns its
    numbers round the unit circle by r / n: as uniform as before, and never the masks of another rank.
    """
    turn = dist.get_rank() / dist.get_world_size() if dist.is_available() and dist.is_initialized() else 0.0

    def draw(shape: Shape) -> Tensor:
        own: Any = {} if generator is None else {"generator": generator}  # torch.compile cannot take one, nor even None
        numbers = torch.rand(tuple(shape), device=device, dtype=torch.float32, **own)
        return (numbers + turn) % 1 if turn else numbers

    return draw


def element(full: Shape, units: Shape, rate: float, draw: Draw) -> Bool[Tensor, "*full"]:
    """Each element is dropped on its own, with probability `rate`."""
    return draw(full) >= rate


def column(full: Shape, units: Shape, rate: float, draw: Draw) -> Bool[Tensor, "*units"]:
    """Each unit, a key or a token, is dropped as a whole, with probability `rate`."""
    return draw(units) >= rate


def span(
    full: Shape, units: Shape, rate: float, draw: Draw, likely: Bool[Tensor, "*units"] | None = None
) -> Bool[Tensor, "*units"]:
    """One contiguous run of `rate` x N units is dropped, N the last size of `units`, its start drawn uniformly.

    Where rate x N is not whole, the length is rounded up with the probability of its fraction, so that the expected
    share dropped is exactly `rate`. likely: the units one of which begins the run, drawn uniformly among them (HiddenCut);
    a run that would go over the end is moved back to it.
    """
    rows, n = tuple(units[:-1]), units[-1]
    length = torch.floor(n * rate + draw((*rows, 1)))
    if likely is None:
        start = torch.floor(draw((*rows, 1)) * (n - length + 1))
    else:
        start = torch.minimum(draw(units).masked_fill(~likely, -1).argmax(-1, keepdim=True), n - length)
    place = torch.arange(n, device=start.device)
    return (place < start) | (place >= start + length)


PATTERNS: dict[str, Callable[..., Tensor]] = {
    "element": element,
    "column": column,
    "span": span,
}
