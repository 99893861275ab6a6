"""The two attention positions, DropKey and DropAttention, on fused kernels.

Legend: B batch, H heads, Q queries, K keys, D head size; R is Q for an element mask and 1 for a column or span mask, which
is the same for every query. Paper symbols: g = scale * q k^T (+ mask), w = softmax(g), m the keep-mask.

    DropKey        w' = softmax(g with -inf where m = 0)
    DropAttention  w'_j = m_j w_j / sg(sum_i m_i w_i), sg: gradient stopped

For one mask both give the same w' (paper Eq. 13); they differ in the gradient. The fused forms below hand the work to
`scaled_dot_product_attention` and never build a [B,H,Q,K] tensor for a column or span mask; `explicit` writes the formulas
out, serves what no fused kernel can express, and is what the tests hold the fused forms against.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import dropout, pad
from torch.nn.functional import scaled_dot_product_attention as sdpa

from hkft.dropout.method import Rescale

Keep = Bool[Tensor, "B H R K"]
AttentionMask = (
    Bool[Tensor, "Bm Hm Qm Km"] | Float[Tensor, "Bm Hm Qm Km"]
)  # bool: True attends; float: added to the logits

BLOCK = 128  # queries at a time, where weights themselves are needed
LANES = 8  # fused kernels want a head size that is a multiple of this
HIDDEN = (
    -64.0
)  # a bias below it hides a key, whatever a family writes there (-100, -10000, the least number): e^-64 is nothing
FAR = -(2.0**15)  # added to a dropped logit: float16 holds it, and its exponential is 0 in every dtype


def allowed(mask: AttentionMask | None) -> Bool[Tensor, "Bm Hm Qm Km"] | None:
    """Which keys a query may attend to. None: all of them (but for causality, which the kernel is told apart)."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    return mask > HIDDEN


def protect(keep: Keep, may: Bool[Tensor, "Bm Hm Qm Km"] | None, causal: bool) -> tuple[Keep, Tensor | None]:
    """See to it that no row loses every key it may attend to, which would be NaN, or attention to the future.

    In causal attention the first attended key is never dropped: every row then keeps one. Elsewhere, and under a sliding
    window, a row that would lose every key keeps all of them. Returns the mask, and for a column mask whose rows differ in
    what they may attend to, the rows to rescue, [B,H,Q,1], which the mask itself cannot express (else None).
    """
    if causal:
        keep = keep | _first_key(may, keep.shape[-1], keep.device)
    if may is not None and _varies_by_row(may) and keep.shape[-2] == 1 and may.shape[1] == 1:
        counts = may[:, 0].float() @ keep[:, :, 0].float().transpose(1, 2)  # [B,Q,H]: keys left, without [B,H,Q,K]
        return keep, (counts < 0.5).transpose(1, 2).unsqueeze(-1)
    left = keep if may is None else keep & _one_row_if_equal(may)
    lost = ~left.any(-1, keepdim=True)
    return (keep | lost if keep.shape[-2] == lost.shape[-2] else keep), (
        lost if lost.shape[-2] > keep.shape[-2] else None
    )


def dropkey(
    q: Float[Tensor, "B H Q D"],
    k: Float[Tensor, "B H K D"],
    v: Float[Tensor, "B H K Dv"],
    keep: Keep,
    *,
    mask: AttentionMask | None,
    causal: bool,
    scale: float,
    rescued: Bool[Tensor, "B H Q 1"] | None = None,
    dropout_p: float = 0.0,
) -> Float[Tensor, "B H Q Dv"]:
    """Attention with dropped logits, w' = softmax(g with -inf where keep is False) (DropKey).

    A column mask without causality is an additive [B,H,1,K] mask. Otherwise the drop travels inside the product: q gets one
    more dimension of value 1 / scale (0 in a rescued row) and k one of value 0 where kept, FAR where dropped. The kernel's
    own causal path and a mask shared by all heads then stay as they are.
    """
    if keep.shape[-2] > 1 or (rescued is None and not causal):
        return sdpa(q, k, v, attn_mask=_and(mask, keep, causal, q.shape[-2]), dropout_p=dropout_p, scale=scale)
    obey = torch.full_like(q[..., :1], 1 / scale)
    if rescued is not None:
        obey = obey.masked_fill(rescued, 0)
    drop = torch.zeros_like(k[..., :1]).masked_fill(~keep.transpose(-1, -2), FAR)
    wide = max(q.shape[-1], v.shape[-1]) + LANES
    q, k = torch.cat([q, obey], -1), torch.cat([k, drop], -1)
    out = sdpa(
        *(pad(x, (0, wide - x.shape[-1])) for x in (q, k, v)),
        attn_mask=mask,
        is_causal=causal and mask is None,
        dropout_p=dropout_p,
        scale=scale,
    )
    return out[..., : v.shape[-1]]


def dropattention(
    q: Float[Tensor, "B H Q D"],
    k: Float[Tensor, "B H K D"],
    v: Float[Tensor, "B H K Dv"],
    keep: Bool[Tensor, "B H 1 K"],
    *,
    mask: AttentionMask | None,
    causal: bool,
    scale: float,
    rate: float,
    rescale: Rescale = "normalised",
    rescued: Bool[Tensor, "B H Q 1"] | None = None,
) -> Float[Tensor, "B H Q Dv"]:
    """Attention with dropped weights, w'_j = m_j w_j / sg(sum_i m_i w_i) (DropAttention), for column and span masks.

    One kernel call on the values [m * v ; m]: its last column is the kept mass Z = sum_i m_i w_i, and the result is
    out / sg(Z). `rescale` as in `Site`; "normalised_with_gradient" is DropKey to the letter, and is computed as such. So
    is a row whose kept mass is too small to divide by: its value is the same (Eq. 13), its gradient DropKey's.
    """
    if rescale == "normalised_with_gradient":
        return dropkey(q, k, v, keep, mask=mask, causal=causal, scale=scale, rescued=rescued)
    size, column = v.shape[-1], keep.transpose(-1, -2).to(v.dtype)
    wide = max(q.shape[-1], size) + LANES
    values = torch.cat([v * column, column], -1)
    is_causal = causal and mask is None
    out = sdpa(
        *(pad(x, (0, wide - x.shape[-1])) for x in (q, k, values)), attn_mask=mask, is_causal=is_causal, scale=scale
    )
    out, mass = out[..., :size], out[..., size : size + 1].detach()
    if rescale == "inverse_keep":
        return out / (1 - rate)
    if rescale == "none":
        return out
    poor = mass < torch.finfo(mass.dtype).tiny ** 0.5
    if rescued is not None:
        poor = poor | rescued
    out = out / mass.masked_fill(poor, 1.0)
    if (may := allowed(mask)) is not None:
        poor = poor & may.any(-1, keepdim=True)  # a padding query attends to nothing: there is nothing to save
    if torch.compiler.is_compiling() or poor.any():  # a compiled graph cannot look, and pays for both
        out = torch.where(poor, dropkey(q, k, v, keep, mask=mask, causal=causal, scale=scale, rescued=rescued), out)
    return out


def explicit(
    q: Float[Tensor, "B H Q D"],
    k: Float[Tensor, "B H K D"],
    v: Float[Tensor, "B H K Dv"],
    keep: Keep,
    *,
    mask: AttentionMask | None,
    causal: bool,
    scale: float,
    rate: float,
    rescale: Rescale | None,
    rescued: Bool[Tensor, "B H Q 1"] | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    tap: Callable[[Tensor, Tensor], None] | None = None,
) -> Float[Tensor, "B H Q Dv"]:
    """Either position, formula by formula, [B,H,Q,K] built in full, in float32 or wider.

    rescale: None for a drop on the logits (DropKey). For element masks on the weights, soft-capped logits (Gemma 2), and
    native attention dropout beside DropAttention. tap(logits, dropped): is shown both, [B,H,Q,K], before the softmax.
    """
    logits = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    kept = keep if rescued is None else keep | rescued
    gone = torch.finfo(logits.dtype).min
    may = allowed(_and(mask, torch.ones_like(keep), causal, q.shape[-2]))
    assert may is not None
    if mask is not None and mask.dtype != torch.bool:
        logits = logits + mask  # a position bias may live in the mask
    if tap is not None:
        tap(logits, may & ~kept)
    log_w = torch.log_softmax(logits.masked_fill(~(may if rescale else may & kept), gone), -1)
    if rescale in ("normalised", "normalised_with_gradient"):  # in logarithms no mass is too small to divide by
        log_w = log_w.masked_fill(~kept, gone)
        log_mass = torch.logsumexp(log_w, -1, keepdim=True)
        log_w = log_w - (log_mass.detach() if rescale == "normalised" else log_mass)
    weights = log_w.exp()
    if rescale in ("inverse_keep", "none"):
        weights = weights * kept / (1 - rate if rescale == "inverse_keep" else 1)
    return dropout(weights.to(v.dtype), dropout_p) @ v


@torch.no_grad()
def most_attended(
    q: Float[Tensor, "B H Q D"],
    k: Float[Tensor, "B H K D"],
    *,
    mask: AttentionMask | None,
    causal: bool,
    scale: float,
    softcap: float | None = None,
    share: float = 0.4,
) -> Bool[Tensor, "B K"]:
    """The `share` of a sample's keys that get the most attention, summed over heads and queries: where HiddenCut cuts.

    Keys that no query may attend to (padding) are not among them. Queries go by in blocks: [B,H,Q,K] is never built.
    """
    place, received = torch.arange(k.shape[2], device=q.device), torch.zeros_like(k[:, 0, :, 0], dtype=torch.float32)
    for first in range(0, q.shape[2], BLOCK):
        rows = slice(first, first + BLOCK)
        logits = (q[:, :, rows] @ k.transpose(-1, -2)).float() * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        part = mask if mask is None or mask.shape[2] == 1 else mask[:, :, rows]
        if part is not None and part.dtype != torch.bool:
            logits = logits + part
        if (may := allowed(part)) is not None:
            logits = logits.masked_fill(~may, torch.finfo(logits.dtype).min)
        elif causal:
            logits = logits.masked_fill(place > place[rows, None], torch.finfo(logits.dtype).min)
        weights = torch.softmax(logits, -1)
        received += (weights if may is None else weights * may).sum((1, 2))
    count = torch.ceil(share * (received > 0).sum(-1, keepdim=True))
    return received.argsort(-1, descending=True).argsort(-1) < count


def _first_key(may: Tensor | None, keys: int, device: torch.device) -> Bool[Tensor, "Bm 1 1 K"]:
    """Where the first attended key stands. The last query sees the most, so its row tells, whatever side is padded."""
    place = torch.arange(keys, device=device)
    if may is None:
        return (place == 0).view(1, 1, 1, -1)
    return place == may[:, :1, -1:, :].to(torch.uint8).argmax(-1, keepdim=True)


def _varies_by_row(mask: Tensor) -> bool:
    return mask.shape[-2] > 1 and mask.stride(-2) != 0


def _one_row_if_equal(mask: Tensor) -> Tensor:
    return mask if _varies_by_row(mask) else mask[..., :1, :]


def _and(mask: Tensor | None, keep: Tensor, causal: bool, queries: int) -> Tensor:
    """The attention mask with the dropped keys taken out, as small as both of them allow."""
    if mask is None:
        if not causal:
            return keep
        return keep & torch.ones(queries, keep.shape[-1], dtype=torch.bool, device=keep.device).tril()
    mask = _one_row_if_equal(mask)
    return mask & keep if mask.dtype == torch.bool else mask.masked_fill(~keep, float("-inf"))
