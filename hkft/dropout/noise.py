"""How noisy a method's gradient is: the paper's reason to prefer DropKey over DropAttention, measured.

DropAttention divides by the kept mass with the gradient stopped, so a logit whose weight was dropped still gets the
gradient -w'_i w_j; DropKey's is 0. For the same masks their forward values agree (paper Eq. 13), so
whatever differs here comes of the gradient alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hkft.dropout.attach import attach
from hkft.dropout.method import Method
from hkft.dropout.modes import modes_kept


@dataclass(frozen=True)
class GradientNoise:
    """Of one method on one batch, over `draws` masks. g is the gradient of all trainable parameters together.

    rate: mean over the layers. loss: mean. norm: ||mean g||. variance: of g, E ||g - mean g||^2, unbiased. noise: variance / norm^2, how far one
    step's gradient is from the mean one. dropped_share: of the sum of |dL/dlogit|, the part at dropped logits; None
    without an attention site.
    """

    method: str
    rate: float
    draws: int
    loss: float
    norm: float
    variance: float
    noise: float
    dropped_share: float | None


def gradient_noise(
    model: nn.Module,
    batch: Mapping[str, Any],
    methods: Sequence[str | Method] = ("dropkey", "dropattention"),
    *,
    rate: float = 0.1,
    draws: int = 32,
    seed: int = 0,
) -> list[GradientNoise]:
    """Measure each method on `batch` under the same `draws` streams of masks.

    model: nothing attached, with trainable parameters; dropout of its own counts as noise, so switch it off. batch: with
    labels. Attention is computed by the explicit formula, [B,H,Q,K] in full. Raises MethodError as `attach` does, and
    ValueError below 2 draws.
    """
    if draws < 2:
        raise ValueError("a variance takes at least 2 draws")
    with modes_kept(model):
        model.train()
        return [_measure(model, batch, method, rate, draws, seed) for method in methods]


def _measure(
    model: nn.Module, batch: Mapping[str, Any], method: str | Method, rate: float, draws: int, seed: int
) -> GradientNoise:
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
    squares, losses, reached = 0.0, 0.0, {"dropped": 0.0, "all": 0.0}
    if not parameters:
        raise ValueError("the model has no trainable parameter: there is no gradient")
    with attach(model, method, rate) as attachment, torch.random.fork_rng():
        sites = [d for d in attachment.droppers if d.site.position.startswith("attention_")]
        for dropper in sites:
            dropper.tap = partial(_tap, reached)
        for draw in range(draws):
            torch.manual_seed(seed + draw)
            loss = model(**batch)["loss"]
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            for summed, gradient in zip(total, found, strict=True):
                if gradient is not None:
                    summed += gradient
                    squares += gradient.double().square().sum().item()
            losses += loss.item()
        name, rates = attachment.method.name, [d.rate for d in sites or attachment.droppers]
    mean = sum(summed.square().sum().item() for summed in total) / draws**2
    variance = max(0.0, (squares - draws * mean) / (draws - 1))
    return GradientNoise(
        method=name,
        rate=sum(rates) / len(rates) if rates else 0.0,
        draws=draws,
        loss=losses / draws,
        norm=mean**0.5,
        variance=variance,
        noise=variance / mean if mean else float("nan"),
        dropped_share=reached["dropped"] / reached["all"] if sites and reached["all"] else None,
    )


def _tap(reached: dict[str, float], logits: Tensor, dropped: Tensor) -> None:
    """Add up |gradient| over the logits, and over the dropped ones, when it comes back."""
    if not logits.requires_grad:
        return

    def add(gradient: Tensor) -> None:
        size = gradient.detach().abs().double()
        reached["all"] += size.sum().item()
        reached["dropped"] += (size * dropped).sum().item()

    logits.register_hook(add)
