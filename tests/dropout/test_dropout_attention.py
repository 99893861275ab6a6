"""The fused attention against the explicit formulas in float64, laws 1, 2 and 5, and what is never built in memory."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from hkft.dropout import attention
from hkft.dropout.masks import PATTERNS, uniform
from hkft.dropout.protect import allowed, protect

B, H, L, D = 2, 3, 7, 5
SCALE = D**-0.5
MASKS = [
    "none",
    "causal",
    "causal-right-padded",
    "causal-left-padded",
    "sliding",
    "padded",
    "padded-expanded",
    "float",
    "float-causal",
]
RESCALES = ["normalised", "normalised_with_gradient", "inverse_keep", "none"]
FLASH = "_scaled_dot_product_flash_attention_for_cpu"


@pytest.fixture(params=["cpu", "widened"], autouse=True)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of this twice: the second time as where no kernel takes causality and a mask together, as on a GPU."""
    if request.param == "widened":
        monkeypatch.setattr(attention, "_on_cpu_kernel", lambda *_: False)


def mask_of(kind: str, size: int = L, real: int = 4) -> tuple[Tensor | None, bool]:
    """An attention mask as transformers makes it, and whether attention is causal. The first sample is padded."""
    lower = torch.ones(size, size, dtype=torch.bool).tril()[None, None]
    keys = torch.ones(B, 1, 1, size, dtype=torch.bool)
    keys[0, ..., real:] = False
    bias = torch.linspace(-1, 1, size * size, dtype=torch.float64).view(1, 1, size, size)
    far = torch.finfo(torch.float64).min
    return {
        "none": lambda: (None, False),
        "causal": lambda: (None, True),
        "causal-right-padded": lambda: (lower & keys, True),
        "causal-left-padded": lambda: (lower & keys.flip(-1), True),
        "sliding": lambda: (lower & torch.ones(size, size, dtype=torch.bool).triu(-2), True),
        "padded": lambda: (keys, False),
        "padded-expanded": lambda: (keys.expand(B, 1, size, size), False),
        "float": lambda: (bias.expand(B, 1, size, size).masked_fill(~keys, far), False),
        "float-causal": lambda: (bias.expand(B, 1, size, size).masked_fill(~(lower & keys), far), True),
    }[kind]()


def may_attend(mask: Tensor | None, causal: bool, size: int = L) -> Tensor:
    """[B,1,Q,K], written apart from the code under test."""
    may = torch.ones(B, 1, size, size, dtype=torch.bool)
    if mask is not None:
        may = may & (mask if mask.dtype == torch.bool else mask > -1e30)
    elif causal:
        may = may & torch.ones(size, size, dtype=torch.bool).tril()
    return may


def qkv(size: int = L, dim: int = D, dtype: torch.dtype = torch.float64, spread: float = 1.5) -> list[Tensor]:
    return [(spread * torch.randn(B, H, size, dim, dtype=dtype)).requires_grad_() for _ in range(3)]


def drawn(pattern: str, rate: float, size: int = L) -> Tensor:
    keep = PATTERNS[pattern]((B, H, size, size), (B, H, size), rate, uniform(torch.device("cpu")))
    return keep if pattern == "element" else keep.unsqueeze(2)


def formula(
    q: Tensor, k: Tensor, v: Tensor, kept: Tensor, may: Tensor, bias: Tensor | None, rate: float, rescale: str | None
) -> Tensor:
    """The formulas of the paper once more, naively, as a reference for `explicit` itself. `kept` [B,H,Q,K] or [B,H,1,K]."""
    g = SCALE * torch.einsum("bhqd,bhkd->bhqk", q, k)
    if bias is not None:
        g = g + bias.masked_fill(~may, 0)
    if rescale is None:
        g = g.masked_fill(~(may & kept), float("-inf"))
        return torch.softmax(g, -1) @ v
    w = torch.softmax(g.masked_fill(~may, float("-inf")), -1) * kept
    mass = w.sum(-1, keepdim=True)
    if rescale == "normalised":
        w = w / mass.detach()
    elif rescale == "normalised_with_gradient":
        w = w / mass
    elif rescale == "inverse_keep":
        w = w / (1 - rate)
    return w @ v


def gradients(out: Tensor, inputs: list[Tensor], weight: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad((out * weight).sum(), inputs))


def agree(left: list[Tensor], right: list[Tensor], tolerance: float = 1e-9) -> None:
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# --- fused == explicit == the formula ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("rescale", [None, *RESCALES], ids=lambda r: r or "dropkey")
def test_fused_equals_explicit_equals_formula(kind: str, pattern: str, rescale: str | None) -> None:
    """Forward, and gradients of q, k and v; rate 0.8, at which rows lose every key and are rescued."""
    rate = 0.8
    mask, causal = mask_of(kind)
    may = may_attend(mask, causal)
    for _ in range(3):
        inputs = qkv()
        keep, rescued = drawn(pattern, rate), None
        if rescale in (None, "normalised", "normalised_with_gradient"):
            keep, rescued = protect(keep, allowed(mask), causal)
        real = may.any(-1, keepdim=True)  # a padding query with nothing to attend to may come out as anything finite
        weight = torch.randn(B, H, L, D, dtype=torch.float64) * real
        shared: dict[str, Any] = {"mask": mask, "scale": SCALE, "rescued": rescued}
        by_hand = attention.explicit(
            *inputs, keep, **shared, causal=causal and mask is None, rate=rate, rescale=rescale
        )
        if rescale is None:
            fused = attention.dropkey(*inputs, keep, **shared, causal=causal)
        elif pattern == "element":
            fused = by_hand  # there is no fused form
        else:
            fused = attention.dropattention(*inputs, keep, **shared, causal=causal, rate=rate, rescale=rescale)
        kept = keep if rescued is None else keep | rescued
        bias = mask if mask is not None and mask.dtype != torch.bool else None
        naive = formula(*inputs, kept.expand(B, H, L, L) | ~real, may | ~real, bias, rate, rescale)
        expected = [naive * real, *gradients(naive, inputs, weight)]
        for out in [by_hand] if fused is by_hand else [by_hand, fused]:
            assert torch.isfinite(out).all()
            agree([out * real, *gradients(out, inputs, weight)], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1, 33, 300])
def test_causal_columns_in_every_dtype(size: int, dtype: torch.dtype) -> None:
    """Kernels have code of their own for half precision and for blocks of keys."""
    inputs = qkv(size, 16, dtype)
    keep = protect(drawn("column", 0.5, size), None, True)[0]
    shared: dict[str, Any] = {"mask": None, "causal": True, "scale": 0.25}
    weight = torch.randn(B, H, size, 16, dtype=dtype)
    out = attention.dropkey(*inputs, keep, **shared)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    exact = attention.explicit(*wide, keep, **shared, rate=0.5, rescale=None)
    expected = [exact, *gradients(exact, wide, weight.double())]
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 8e-2, torch.float16: 1e-2}[dtype]
    for a, b in zip([out, *gradients(out, inputs, weight)], expected, strict=True):
        a, b = a.detach(), b.detach()
        assert float((a.double() - b).abs().max()) <= tolerance * float(b.abs().max().clamp(min=1))


@pytest.mark.parametrize("dim", [8, 5, 64])
def test_a_value_of_another_size_than_the_key_is_no_trouble(dim: int) -> None:
    q, k, _ = qkv()
    v = torch.randn(B, H, L, dim, dtype=torch.float64)
    keep = protect(drawn("column", 0.5), None, True)[0]
    may = may_attend(None, True)
    out = attention.dropattention(q, k, v, keep, mask=None, causal=True, scale=SCALE, rate=0.5)
    agree([out], [formula(q, k, v, keep.expand(B, H, L, L), may, None, 0.5, "normalised")])
    out = attention.dropkey(q, k, v, keep, mask=None, causal=True, scale=SCALE)
    agree([out], [formula(q, k, v, keep.expand(B, H, L, L), may, None, 0.5, None)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.125, 1 / 256])
def test_a_dropped_key_weighs_nothing_at_any_scale(scale: float, dtype: torch.dtype) -> None:
    """The one dimension more of `dropkey`, for a logit of 300 that is dropped beside others of about 0."""
    q = torch.zeros(1, 1, 4, 8, dtype=dtype)
    q[..., 0] = 300 / scale**0.5
    k = torch.zeros(1, 1, 4, 8, dtype=dtype)
    k[..., 2, 0] = 1 / scale**0.5
    keep = torch.tensor([True, True, False, True]).view(1, 1, 1, 4)
    rescued = torch.tensor([False, False, False, True]).view(1, 1, 4, 1)
    shared: dict[str, Any] = {"mask": None, "causal": False, "scale": scale, "rescued": rescued}
    w = attention.dropkey(q, k, torch.eye(4, dtype=dtype)[None, None], keep, **shared)[0, 0]
    assert not w[:3, 2].any()
    torch.testing.assert_close(w[3], torch.tensor([0, 0, 1, 0], dtype=dtype))  # the rescued row looks at it
    torch.testing.assert_close(w[:3].sum(-1), torch.ones(3, dtype=dtype), atol=1e-2, rtol=0)


# --- protect ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_no_row_loses_its_last_key_and_no_other_row_changes(kind: str, pattern: str) -> None:
    mask, causal = mask_of(kind)
    may = may_attend(mask, causal)
    first = may[..., -1, :].to(torch.uint8).argmax(-1)[:, :, None, None]  # [B,1,1,1]: first key of the last query
    for _ in range(20):
        before = drawn(pattern, 0.8)
        keep, rescued = protect(before, allowed(mask), causal)
        kept = (keep if rescued is None else keep | rescued) & may
        assert (kept.any(-1) | ~may.any(-1)).all()
        expected = before | (torch.arange(L) == first) if causal else before
        expected = expected & may
        lost = ~expected.any(-1, keepdim=True)
        assert torch.equal(kept, torch.where(lost, may.expand_as(expected), expected))


def test_the_first_attended_key_is_never_dropped_whatever_side_is_padded() -> None:
    gone = torch.zeros(B, H, 1, L, dtype=torch.bool)
    for kind, first in (("causal", 0), ("causal-right-padded", 0), ("causal-left-padded", 3)):
        mask, causal = mask_of(kind)
        keep, _ = protect(gone, allowed(mask), causal)
        assert keep[0, 0, 0].tolist() == [place == first for place in range(L)]


# --- law 1 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_law_1_dropkey_and_dropattention_of_one_mask_are_the_same_forward(kind: str, pattern: str) -> None:
    """Paper Eq. 13."""
    mask, causal = mask_of(kind)
    inputs = qkv()
    keep, rescued = protect(drawn(pattern, 0.6), allowed(mask), causal)
    shared: dict[str, Any] = {"mask": mask, "scale": SCALE, "rescued": rescued}
    key = attention.dropkey(*inputs, keep, **shared, causal=causal)
    if pattern == "element":
        weights = attention.explicit(
            *inputs, keep, **shared, causal=causal and mask is None, rate=0.6, rescale="normalised"
        )
    else:
        weights = attention.dropattention(*inputs, keep, **shared, causal=causal, rate=0.6)
    real = may_attend(mask, causal).any(-1, keepdim=True)
    agree([key * real], [weights * real])
    # and they are two methods, not one: the gradient differs
    probe = torch.randn_like(key) * real
    assert not torch.allclose(gradients(key, inputs, probe)[0], gradients(weights, inputs, probe)[0])


# --- law 2 ------------------------------------------------------------------------------------------------------------


def jacobian_of_row(form: str, rescale: str | None, g: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """w' [K] and dw'/dg [K,K] of one row, through attention with logits g: q = (g), k = identity, v = identity."""
    n = g.numel()
    eye = torch.eye(n, dtype=torch.float64)[None, None]
    mask = keep.view(1, 1, 1, n)

    def weights(row: Tensor) -> Tensor:
        q = row.view(1, 1, 1, n)
        shared: dict[str, Any] = {"mask": None, "causal": False, "scale": 1.0}
        if form == "explicit":
            out = attention.explicit(q, eye, eye, mask, **shared, rate=0.5, rescale=rescale)
        elif rescale is None:
            out = attention.dropkey(q, eye, eye, mask, **shared)
        elif form == "fused-extra-dimension":
            rescued = torch.zeros(1, 1, 1, 1, dtype=torch.bool)
            out = attention.dropattention(q, eye, eye, mask, **shared, rate=0.5, rescale=rescale, rescued=rescued)
        else:
            out = attention.dropattention(q, eye, eye, mask, **shared, rate=0.5, rescale=rescale)
        return out.view(n)

    return weights(g), torch.autograd.functional.jacobian(weights, g)


ROW = [0.3, -1.2, 2.0, 0.7, -0.4, 1.1]
KEPT = [True, False, True, True, False, True]


def closed_forms() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    g, keep = torch.tensor(ROW, dtype=torch.float64), torch.tensor(KEPT)
    w = torch.softmax(g, -1)
    dropped = w * keep / (w * keep).sum()
    return g, keep, w, dropped, torch.eye(len(ROW), dtype=torch.float64)


@pytest.mark.parametrize("form", ["explicit", "fused"])
def test_law_2_jacobian_of_dropkey(form: str) -> None:
    g, keep, _, dropped, delta = closed_forms()
    value, jacobian = jacobian_of_row(form, None, g, keep)
    agree([value, jacobian], [dropped, dropped[:, None] * (delta - dropped[None])])
    assert not jacobian[:, ~keep].any()  # a dropped logit gets no gradient at all


@pytest.mark.parametrize("form", ["explicit", "fused", "fused-extra-dimension"])
def test_law_2_jacobian_of_dropattention_with_its_gradient_noise(form: str) -> None:
    g, keep, w, dropped, delta = closed_forms()
    value, jacobian = jacobian_of_row(form, "normalised", g, keep)
    agree([value, jacobian], [dropped, dropped[:, None] * (delta - w[None])])
    noise = jacobian[keep][:, ~keep]  # a dropped logit still gets -w'_i w_j
    agree([noise], [-(dropped[keep][:, None] * w[~keep][None])])
    assert (noise.abs() > 1e-3).all()


@pytest.mark.parametrize("form", ["explicit", "fused"])
def test_law_2_without_the_stop_it_is_dropkey(form: str) -> None:
    g, keep, *_ = closed_forms()
    without, key = (jacobian_of_row(form, rescale, g, keep) for rescale in ("normalised_with_gradient", None))
    agree([*without], [*key])


def test_law_2_the_ratio_on_the_diagonal() -> None:
    g, keep, w, dropped, _ = closed_forms()
    key, weights = (jacobian_of_row("fused", rescale, g, keep)[1] for rescale in (None, "normalised"))
    ratio = (key.diagonal() / weights.diagonal())[keep]
    agree([ratio], [((1 - dropped) / (1 - w))[keep]])
    assert (ratio < 1).all()


@pytest.mark.parametrize("form", ["explicit", "fused"])
@pytest.mark.parametrize(("rescale", "factor"), [("inverse_keep", 2.0), ("none", 1.0)])
def test_jacobian_of_the_plain_rescales(form: str, rescale: str, factor: float) -> None:
    g, keep, w, _, delta = closed_forms()
    scaled = factor * w * keep
    expected = [scaled, scaled[:, None] * (delta - w[None])]
    agree([*jacobian_of_row(form, rescale, g, keep)], expected)


# --- law 5 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
@pytest.mark.parametrize("rescale", [None, *RESCALES], ids=lambda r: r or "dropkey")
@pytest.mark.parametrize("pattern", PATTERNS)
def test_law_5_finite_at_rate_99_with_one_real_token(pattern: str, rescale: str | None, dtype: torch.dtype) -> None:
    for kind in MASKS:
        mask, causal = mask_of(kind, real=1)
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.clamp_min(torch.finfo(dtype).min).to(dtype)
        inputs = qkv(dtype=dtype)
        keep, rescued = drawn(pattern, 0.99), None
        if rescale in (None, "normalised", "normalised_with_gradient"):
            keep, rescued = protect(keep, allowed(mask), causal)
        shared: dict[str, Any] = {"mask": mask, "scale": SCALE, "rescued": rescued}
        if rescale is None:
            out = attention.dropkey(*inputs, keep, **shared, causal=causal)
        elif pattern == "element":
            out = attention.explicit(
                *inputs, keep, **shared, causal=causal and mask is None, rate=0.99, rescale=rescale
            )
        else:
            out = attention.dropattention(*inputs, keep, **shared, causal=causal, rate=0.99, rescale=rescale)
        assert torch.isfinite(out).all(), kind
        assert all(torch.isfinite(g).all() for g in gradients(out, inputs, torch.ones_like(out))), kind


@pytest.mark.parametrize("form", ["explicit", "fused"])
@pytest.mark.parametrize("rescale", [None, "normalised"], ids=["dropkey", "dropattention"])
@pytest.mark.parametrize("gap", [20.0, 60.0, 80.0, 95.0, 300.0])
def test_law_5_finite_where_the_kept_mass_is_all_but_nothing(gap: float, rescale: str | None, form: str) -> None:
    """A sharp head whose one strong key is dropped: kept weights of e^-gap, below what float32 can hold from 88 on."""
    q = torch.tensor([gap, 0.0, 1.0, -1.0]).view(1, 1, 1, 4).requires_grad_()
    k, v = torch.eye(4)[None, None].clone().requires_grad_(), 3 * torch.randn(1, 1, 4, 4)
    v.requires_grad_()
    keep = torch.tensor([False, True, True, True]).view(1, 1, 1, 4)
    shared: dict[str, Any] = {"mask": None, "causal": False, "scale": 1.0}
    if form == "explicit":
        out = attention.explicit(q, k, v, keep, **shared, rate=0.5, rescale=rescale)
    elif rescale is None:
        out = attention.dropkey(q, k, v, keep, **shared)
    else:
        out = attention.dropattention(q, k, v, keep, **shared, rate=0.5, rescale=rescale)
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out.sum(), [q, k, v]))


@pytest.mark.parametrize("gap", [20.0, 60.0, 95.0, 300.0])
def test_law_2_of_the_explicit_form_where_the_kept_mass_is_all_but_nothing(gap: float) -> None:
    g = torch.tensor([gap, 0.0, 1.0, -1.0], dtype=torch.float64)
    keep = torch.tensor([False, True, True, True])
    dropped = torch.softmax(g.masked_fill(~keep, float("-inf")), -1)
    value, jacobian = jacobian_of_row("explicit", "normalised", g, keep)
    agree([value, jacobian], [dropped, dropped[:, None] * (torch.eye(4) - torch.softmax(g, -1)[None])])


def calls_of_the_kernel(monkeypatch: pytest.MonkeyPatch, gap: float, mask: Tensor | None) -> int:
    calls: list[None] = []
    real = attention.sdpa
    monkeypatch.setattr(attention, "sdpa", lambda *args, **kwargs: calls.append(None) or real(*args, **kwargs))
    q, k, v = (torch.eye(4)[None, None] for _ in range(3))
    keep = torch.tensor([True, False, True, True]).view(1, 1, 1, 4)
    out = attention.dropattention(gap * q, k, v, keep, mask=mask, causal=False, scale=1.0, rate=0.5)
    assert torch.isfinite(out).all()
    return len(calls)


def test_the_second_kernel_runs_for_a_small_mass_only(monkeypatch: pytest.MonkeyPatch) -> None:
    padding_queries = torch.tensor([False, False, True, True]).view(1, 1, 4, 1).expand(1, 1, 4, 4).clone()
    assert calls_of_the_kernel(monkeypatch, 1.0, None) == 1
    assert calls_of_the_kernel(monkeypatch, 1.0, padding_queries) == 1  # they attend to nothing, and have no mass
    assert calls_of_the_kernel(monkeypatch, 300.0, None) == 2


# --- what is built, and which kernel runs -----------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """The kernels called, and the largest tensor that any of them but attention's own gave back."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: set[str] = set()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().split("::")[-1]
        self.kernels.add(name)
        if "scaled_dot_product" not in name:
            sizes = [t.numel() for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, Tensor)]
            self.largest = max([self.largest, *sizes])
        return out


@pytest.mark.parametrize(
    "kind", ["none", "causal", "causal-right-padded", "causal-left-padded", "sliding", "padded", "padded-expanded"]
)
@pytest.mark.parametrize("rescale", [None, "normalised"], ids=["dropkey", "dropattention"])
@pytest.mark.parametrize("pattern", ["column", "span"])
def test_no_tensor_of_heads_by_queries_by_keys(pattern: str, rescale: str | None, kind: str) -> None:
    """At 128 keys, forward and backward: nothing that grows with Q x K x H, and the flash kernel does the work."""
    size = 128
    mask, causal = mask_of(kind, size, real=100)
    inputs = qkv(size, 16, torch.float32)
    with Recorder() as record:
        keep, rescued = protect(drawn(pattern, 0.3, size), allowed(mask), causal)
        shared: dict[str, Any] = {"mask": mask, "causal": causal, "scale": 0.25, "rescued": rescued}
        if rescale is None:
            out = attention.dropkey(*inputs, keep, **shared)
        else:
            out = attention.dropattention(*inputs, keep, **shared, rate=0.3)
        out.sum().backward()
    assert any(FLASH in kernel for kernel in record.kernels), sorted(record.kernels)
    assert any(FLASH + "_backward" in kernel for kernel in record.kernels), sorted(record.kernels)
    assert record.largest < B * H * size * size
    if mask is None or kind == "padded":
        assert record.largest <= B * H * size * (16 + attention.LANES) * 2


def test_an_element_mask_does_build_it() -> None:
    """The recorder can see such a tensor: the test above can fail."""
    inputs = qkv(128, 16, torch.float32)
    with Recorder() as record:
        attention.dropkey(*inputs, drawn("element", 0.3, 128), mask=None, causal=False, scale=0.25)
    assert record.largest >= B * H * 128 * 128


@pytest.mark.parametrize("dim", [16, 64, 80])
def test_the_widened_head_size_stays_a_multiple_of_eight(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash kernels on a GPU refuse any other."""
    seen: list[tuple[int, ...]] = []
    real = attention.sdpa

    def spy(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
        seen.append((q.shape[-1], k.shape[-1], v.shape[-1]))
        return real(q, k, v, **kwargs)

    monkeypatch.setattr(attention, "sdpa", spy)
    monkeypatch.setattr(attention, "_on_cpu_kernel", lambda *_: False)
    inputs, keep = qkv(L, dim), protect(drawn("column", 0.3), None, True)[0]
    attention.dropkey(*inputs, keep, mask=None, causal=True, scale=1.0)
    attention.dropattention(*inputs, keep, mask=None, causal=True, scale=1.0, rate=0.3)
    assert seen == [(dim + 8,) * 3] * 2


@pytest.mark.parametrize("rescale", [None, "normalised"], ids=["dropkey", "dropattention"])
def test_the_math_kernel_gives_the_same(rescale: str | None) -> None:
    """Where no fused kernel is at hand PyTorch falls back: nothing may hang on which one runs."""
    inputs, keep = qkv(), protect(drawn("column", 0.5), None, True)[0]

    def out() -> Tensor:
        if rescale is None:
            return attention.dropkey(*inputs, keep, mask=None, causal=True, scale=SCALE)
        return attention.dropattention(*inputs, keep, mask=None, causal=True, scale=SCALE, rate=0.5)

    flash = out()
    with sdpa_kernel(SDPBackend.MATH), Recorder() as record:
        agree([flash], [out()])
    assert not any(FLASH in name for name in record.kernels), sorted(record.kernels)


def test_soft_cap_of_the_explicit_form() -> None:
    """Gemma 2: g = c tanh(g / c), before mask and drop."""
    cap = 1.5
    q, k, v = (x.detach() for x in qkv())
    keep = protect(drawn("column", 0.5), None, True)[0]
    out = attention.explicit(q, k, v, keep, mask=None, causal=True, scale=SCALE, rate=0.5, rescale=None, softcap=cap)
    for b, h, row in itertools.product(range(B), range(H), range(L)):
        g = [cap * math.tanh(SCALE * float(q[b, h, row] @ k[b, h, j]) / cap) for j in range(row + 1)]
        e = [math.exp(x) * float(keep[b, h, 0, j]) for j, x in enumerate(g)]
        expected = sum(x * v[b, h, j] for j, x in enumerate(e)) / sum(e)
        torch.testing.assert_close(out[b, h, row], expected, atol=1e-9, rtol=1e-9)


def test_law_1_in_float16_where_the_kept_mass_is_small() -> None:
    """A head that looks at one token with weight 0.99999, as attention sinks do, and that token dropped."""
    q = torch.tensor([12.0, 0.0, 1.0, -1.0], dtype=torch.float16).view(1, 1, 1, 4)
    k, v = torch.eye(4, dtype=torch.float16)[None, None], torch.ones(1, 1, 4, 4, dtype=torch.float16)
    keep = torch.tensor([False, True, True, True]).view(1, 1, 1, 4)
    shared: dict[str, Any] = {"mask": None, "causal": False, "scale": 1.0}
    key = attention.dropkey(q, k, v, keep, **shared)
    weights = attention.dropattention(q, k, v, keep, **shared, rate=0.5)
    torch.testing.assert_close(key, torch.ones_like(key))
    torch.testing.assert_close(weights, key, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("kind", ["causal", "causal-left-padded"])
def test_explicit_computes_in_float64_what_comes_in_float64(kind: str) -> None:
    mask, causal = mask_of(kind)
    inputs = qkv()
    keep, rescued = protect(drawn("column", 0.5), allowed(mask), causal)
    shared: dict[str, Any] = {"mask": mask, "scale": SCALE, "rescued": rescued}
    out = attention.explicit(*inputs, keep, **shared, causal=causal and mask is None, rate=0.5, rescale=None)
    real = may_attend(mask, causal).any(-1, keepdim=True)
    agree([out * real], [attention.dropkey(*inputs, keep, **shared, causal=causal) * real])
