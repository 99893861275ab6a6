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
from torch.nn.attention import SDPBackend
from torch.nn.functional import dropout, pad
from torch.nn.functional import scaled_dot_product_attention as sdpa

from hkft.dropout.method import Rescale
from hkft.dropout.protect import AttentionMask, Keep, allowed, one_row_if_equal

LANES = 8  # fused kernels want a head size that is a multiple of this
FAR = -(2.0**15)  # added to a dropped logit: float16 holds it, and its exponential is 0 in every dtype


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

    A column mask without causality is an additive [B,H,1,K] mask, and so it is beside the causality of PyTorch's own kernel on
    the CPU. Otherwise the drop travels inside the product: q gets one more dimension of value 1 / scale (0 in a rescued
    row) and k one of value 0 where kept, FAR where dropped. The kernel's own causal path and a mask shared by all heads
    then stay as they are.
    """
    plain = keep.shape[-2] == 1 and rescued is None and not dropout_p
    if causal and mask is None and plain and _on_cpu_kernel(q, k, v, scale):
        column = torch.zeros_like(keep, dtype=q.dtype).masked_fill(~keep, float("-inf"))
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return kernel(q, k, v, is_causal=True, attn_mask=column, scale=scale)[0]
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


def _on_cpu_kernel(q: Tensor, k: Tensor, v: Tensor, scale: float) -> bool:
    """Whether PyTorch would take its CPU flash kernel here. That takes causality and a mask together; `sdpa` refuses both."""
    if q.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return torch.ops.aten._fused_sdp_choice(q, k, v, is_causal=True, scale=scale) == SDPBackend.FLASH_ATTENTION.value


def _and(mask: Tensor | None, keep: Tensor, causal: bool, queries: int) -> Tensor:
    """The attention mask with the dropped keys taken out, as small as both of them allow."""
    if mask is None:
        if not causal:
            return keep
        return keep & torch.ones(queries, keep.shape[-1], dtype=torch.bool, device=keep.device).tril()
    mask = one_row_if_equal(mask)
    return mask & keep if mask.dtype == torch.bool else mask.masked_fill(~keep, float("-inf"))
