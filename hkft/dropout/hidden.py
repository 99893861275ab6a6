"""The positions on representations: hidden (HiddenCut, on the FFN output), input, output, and those within LoRA's update.

Shapes: B batch, L tokens, D size; a mask has size 1 where one decision holds for all: [B,L,1] for tokens, [1,1,D] for features.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hkft.dropout.method import Rescale
from hkft.dropout.protect import AttentionMask, allowed

BLOCK = 128  # queries at a time, where weights themselves are needed


def hiddencut(
    x: Float[Tensor, "*B L D"],
    keep: Bool[Tensor, "*#B #L #D"],
    rate: float,
    rescale: Rescale = "none",
) -> Float[Tensor, "*B L D"]:
    """x where kept, 0 where dropped (the paper's framework); with "inverse_keep" what is kept grows by 1 / (1 - rate).

    The expectation over masks is then x itself, as in ordinary dropout.
    """
    share = keep.to(x.dtype)  # a product with a bool tensor is ten times slower on a CPU
    return x * (share.div_(1 - rate) if rescale == "inverse_keep" else share)


@torch.no_grad()
def most_attended(
    q: Float[Tensor, "B H Q D"],
    k: Float[Tensor, "B H K D"],
    *,
    mask: AttentionMask | None,
    scale: float,
    softcap: float | None = None,
    share: float = 0.4,
) -> Bool[Tensor, "B K"]:
    """The `share` of a sample's keys that get the most attention, summed over heads and queries: where HiddenCut cuts.

    Keys that no query may attend to (padding) are not among them. For encoders: in a decoder later tokens would choose.
    Queries go by in blocks, so that [B,H,Q,K] is never built; not where torch compiles: a loop would be compiled anew for
    each length.
    """
    received = torch.zeros_like(k[:, 0, :, 0], dtype=torch.float32)
    blocks = [slice(None)]
    if not torch.compiler.is_compiling():
        blocks = [slice(first, first + BLOCK) for first in range(0, q.shape[2], BLOCK)]
    for rows in blocks:
        logits = (q[:, :, rows] @ k.transpose(-1, -2)).float() * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        part = mask if mask is None or mask.shape[2] == 1 else mask[:, :, rows]
        if part is not None and part.dtype != torch.bool:
            logits = logits + part
        if (may := allowed(part)) is not None:
            logits = logits.masked_fill(~may, torch.finfo(logits.dtype).min)
        weights = torch.softmax(logits, -1)
        received += (weights if may is None else weights * may).sum((1, 2))
    count = torch.ceil(share * (received > 0).sum(-1, keepdim=True))
    return received.argsort(-1, descending=True).argsort(-1) < count
