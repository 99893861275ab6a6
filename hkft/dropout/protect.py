"""The protective rule: an attention row never loses every key it may attend to.

Such a row would be NaN, or, with an additive mask, attend to the future and to padding. What a row may attend to is read from
the attention mask that the model was given, whatever its form.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hkft.dropout.method import Protect

Keep = Bool[Tensor, "B H R K"]
Allowed = Bool[Tensor, "Bm Hm Qm Km"]
AttentionMask = Allowed | Float[Tensor, "Bm Hm Qm Km"]  # bool: True attends; float: added to the logits

# a bias below it hides a key, whatever a family writes there (-100, -10000, the least number): e^-64 is nothing
HIDDEN = -64.0


def allowed(mask: AttentionMask | None) -> Allowed | None:
    """Which keys a query may attend to. None: all of them (but for causality, which the kernel is told apart)."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    return mask > HIDDEN


def protect(
    keep: Keep, may: Allowed | None, causal: bool, rule: Protect = "first_key"
) -> tuple[Keep, Bool[Tensor, "B H Q 1"] | None]:
    """See to it that no row loses every key it may attend to, which would be NaN, or attention to the future.

    rule: "first_key", in causal attention the first attended key is never dropped: every row then keeps one. Elsewhere, and
    under a sliding window, a row that would lose every key keeps all of them; with "row" that is so everywhere. With "none"
    too, for no kernel computes an empty row: the caller takes out what those rows gave. Returns the mask, and for a column mask whose rows differ in what they may attend to, the rows to rescue, which
    the mask itself cannot express (else None).
    """
    if causal and rule == "first_key":
        keep = keep | _first_key(may, keep.shape[-1], keep.device)
    elif causal and may is None:  # what causality alone leaves to a row: the keys up to its own
        if keep.shape[-2] > 1:
            return keep | ~keep.tril().any(-1, keepdim=True), None
        return keep, (keep.cumsum(-1) == 0).transpose(-1, -2)
    if may is not None and _varies_by_row(may) and keep.shape[-2] == 1 and may.shape[1] == 1:
        counts = may[:, 0].float() @ keep[:, :, 0].float().transpose(1, 2)  # [B,Q,H]: keys left, without [B,H,Q,K]
        return keep, (counts < 0.5).transpose(1, 2).unsqueeze(-1)
    left = keep if may is None else keep & one_row_if_equal(may)
    lost = ~left.any(-1, keepdim=True)
    if lost.shape[-2] > keep.shape[-2]:
        return keep, lost
    return keep | lost, None


def given_back(
    drawn: Keep, keep: Keep, rescued: Tensor | None, may: Allowed | None, queries: int
) -> Bool[Tensor, "B H Q 1"]:
    """The rows in which `protect` gave back a key that the row may attend to. Under "row" and "none": those that lost all."""
    changed = keep & ~drawn
    if may is None:
        acted = changed.any(-1, keepdim=True)
    elif changed.shape[-2] == 1 and may.shape[1] == 1:  # without [B,H,Q,K]
        acted = (may[:, 0].float() @ changed[:, :, 0].float().transpose(1, 2) > 0.5).transpose(1, 2).unsqueeze(-1)
    else:
        acted = (changed & may).any(-1, keepdim=True)
    if rescued is not None:
        acted = acted | (rescued if may is None else rescued & may.any(-1, keepdim=True))
    return acted.expand(*drawn.shape[:2], queries, 1)


def _first_key(may: Tensor | None, keys: int, device: torch.device) -> Bool[Tensor, "Bm 1 1 K"]:
    """Where the first attended key stands. The last query sees the most, so its row tells, whatever side is padded.

    Of rows laid end to end each has a first key of its own: one that its own query sees, and the key before it not. Under a
    sliding window the last query's first key is none of those.
    """
    place = torch.arange(keys, device=device)
    if may is None:
        return (place == 0).view(1, 1, 1, -1)
    first = place == may[:, :1, -1:, :].to(torch.uint8).argmax(-1, keepdim=True)
    if may.shape[-2] != keys or not _varies_by_row(may):
        return first
    own = may[:, :1].diagonal(dim1=-2, dim2=-1)
    before = torch.nn.functional.pad(may[:, :1].diagonal(-1, -2, -1), (1, 0))
    begins = (own & ~before).unsqueeze(-2)
    return first | (begins & (first & begins).any(-1, keepdim=True))


def _varies_by_row(mask: Tensor) -> bool:
    return mask.shape[-2] > 1 and mask.stride(-2) != 0


def one_row_if_equal(mask: Tensor) -> Tensor:
    return mask if _varies_by_row(mask) else mask[..., :1, :]
