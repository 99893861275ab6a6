"""The positions on representations: hidden (HiddenCut, on the FFN output), input, output, and those within LoRA's update.

Shapes: B batch, L tokens, D size; a mask has size 1 where one decision holds for all: [B,L,1] for tokens, [1,1,D] for features.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from hkft.dropout.method import Rescale


def hiddencut(
    x: Float[Tensor, "*B L D"],
    keep: Bool[Tensor, "*#B #L #D"],
    rate: float,
    rescale: Rescale = "none",
) -> Float[Tensor, "*B L D"]:
    """x where kept, 0 where dropped (the paper's framework); with "inverse_keep" what is kept grows by 1 / (1 - rate).

    The expectation over masks is then x itself, as in ordinary dropout.
    """
    dropped = x * keep
    return dropped.div_(1 - rate) if rescale == "inverse_keep" else dropped
