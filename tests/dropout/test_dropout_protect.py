"""The protective rule of a site: what each of its values leaves to a row, fused and by the formula, and on whole models."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from hkft import Method, Site, attach
from hkft.dropout.dropper import Dropper
from hkft.dropout.interface import _drop
from hkft.dropout.masks import PATTERNS
from hkft.dropout.protect import allowed, given_back, protect
from hkft.errors import MethodError

B, H, L, D = 3, 2, 7, 8
SCALE = D**-0.5
KINDS = ["none", "causal", "causal-mask", "left-padded", "window"]


def mask_of(kind: str) -> tuple[Tensor | None, bool]:
    """(attention mask, whether the layer is causal) as a family hands them over."""
    tril = torch.ones(L, L, dtype=torch.bool).tril()[None, None].repeat(B, 1, 1, 1)
    padded = torch.ones(B, 1, 1, L, dtype=torch.bool)
    padded[0, ..., :3] = False
    return {
        "none": (None, False),
        "causal": (None, True),
        "causal-mask": (tril, True),
        "left-padded": (tril & padded, True),
        "window": (tril & ~tril.tril(-3), True),
    }[kind]


def may_attend(mask: Tensor | None, causal: bool) -> Tensor:
    may = torch.ones(B, 1, L, L, dtype=torch.bool)
    return mask if mask is not None else may.tril() if causal else may


def site(rule: str, pattern: str = "column", position: str = "attention_logits", rate: float = 0.6) -> Site:
    return Site(position, pattern, rate=rate, layers="all", protect=rule)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("rule", ["row", "none"])
def test_by_row_only_rows_that_lose_all_keep_all(kind: str, pattern: str, rule: str) -> None:
    mask, causal = mask_of(kind)
    may, acted = may_attend(mask, causal), 0
    for _ in range(20):
        draw = PATTERNS[pattern]((B, H, L, L), (B, H, L), 0.8, lambda shape: torch.rand(*shape))
        before = draw if pattern == "element" else draw.unsqueeze(2)
        keep, rescued = protect(before, allowed(mask), causal, rule)  # type: ignore[arg-type]
        kept = (keep if rescued is None else keep | rescued) & may
        left = (before & may).any(-1, keepdim=True)
        assert torch.equal(kept, torch.where(left, before & may, may))
        lost = ~left & may.any(-1, keepdim=True)
        assert torch.equal(given_back(before, keep, rescued, allowed(mask), L) & may.any(-1, keepdim=True), lost)
        acted += int(lost.sum())
    assert acted or (pattern, kind) == ("span", "none")  # a span of 0.8 leaves every row a key, where all may be seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("rule", ["row", "none"])
@pytest.mark.parametrize("position", ["attention_logits", "attention_weights"])
def test_what_a_layer_computes_is_the_formula(kind: str, pattern: str, rule: str, position: str) -> None:
    """Forward and, for DropKey, gradients, float64; a row that lost all is as without any drop, or 0."""
    mask, causal = mask_of(kind)
    may, lost_rows = may_attend(mask, causal), 0
    q, k, v = inputs = [torch.randn(B, H, L, D, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    for seed in range(8):
        own, same = (Dropper(site(rule, pattern, position), 0, 0, 0.8, seed) for _ in range(2))
        draw = same.draw((B, H, L, L), (B, H, L), q.device)
        before = draw if pattern == "element" else draw.unsqueeze(2)
        left = (before & may).any(-1, keepdim=True)
        kept = torch.where(left, before & may, may)
        logits = (SCALE * q @ k.transpose(-1, -2)).masked_fill(~kept, -1e300)
        expected = torch.softmax(logits, -1) @ v
        if rule == "none":
            expected = torch.where(left, expected, 0.0)
        real = may.any(-1, keepdim=True)
        out = _drop(own, q, k, v, mask, causal, SCALE, None, 0.0) * real
        torch.testing.assert_close(out, expected * real, atol=1e-9, rtol=1e-9)
        if position == "attention_logits":
            weight = torch.randn_like(out)
            for a, b in zip(
                torch.autograd.grad((out * weight).sum(), inputs),
                torch.autograd.grad((expected * real * weight).sum(), inputs),
                strict=True,
            ):
                torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)
        lost_rows += int((~left & real).sum())
    assert lost_rows or (pattern, kind) == ("span", "none")


@pytest.mark.parametrize("position", ["attention_logits", "attention_weights"])
@pytest.mark.parametrize("rule", ["row", "none"])
def test_law_4_and_5_hold_under_every_rule(zoo: Any, decoder: str, position: str, rule: str) -> None:
    t = 7
    for padding in (None, "left", "right"):
        model, batch = zoo.build(decoder), zoo.inputs(decoder, padding=padding, real=6)
        tokens = batch["input_ids"].clone()
        tokens[:, t] = (tokens[:, t] + 11) % 61 + 3
        for pattern in PATTERNS:
            with torch.no_grad(), attach(model, Method([site(rule, pattern, position, 0.7)])) as attachment:
                before = zoo.run(model, batch, seed=3)
                after = zoo.run(model, {**batch, "input_ids": tokens}, seed=3)
            torch.testing.assert_close(before[1, :t], after[1, :t], atol=1e-5, rtol=1e-5)
            assert not torch.equal(before[1, t:], after[1, t:])
            assert attachment.report()[0]["protected"] > 0
        model, batch = zoo.build(decoder), zoo.inputs(decoder, padding=padding, real=1)
        for pattern in PATTERNS:
            model.zero_grad()
            with attach(model, Method([site(rule, pattern, position, 0.99)])):
                out = zoo.run(model, batch)
                (out**2).mean().backward()
            assert torch.isfinite(out).all(), (padding, pattern)
            assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_without_protection_the_first_key_is_dropped_like_any_other(zoo: Any) -> None:
    """A token whose only key is its own: under "none" its attention gives 0 at the rate; by first_key never."""
    for rule, least, most in (("first_key", 0.0, 0.0), ("row", 0.0, 0.0), ("none", 0.3, 0.7)):
        model, batch = zoo.build("llama"), zoo.inputs("llama")
        seen: list[Tensor] = []
        before = partial(lambda seen, _, args: seen.append(args[0]), seen)
        hook = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(before)
        with torch.no_grad(), attach(model, Method([site(rule, "column", rate=0.5)])):
            for seed in range(40):
                zoo.run(model, batch, seed=seed)
        hook.remove()
        first = torch.stack([x[:, 0].unflatten(-1, (4, -1)) for x in seen])  # [times,B,H,D]
        empty = (first == 0).all(-1).float().mean()
        assert least <= empty <= most, rule


def test_only_rows_of_attention_are_protected() -> None:
    with pytest.raises(MethodError, match="only rows of attention"):
        Site("hidden", protect="none")
    with pytest.raises(MethodError, match="no protect 'off'"):
        Site("attention_logits", protect="off")  # type: ignore[arg-type]
