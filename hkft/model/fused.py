"""LoRA's forward and backward in fewer and cheaper products than autograd finds by itself.

y = x W^T + bias + s (x A^T) B^T, x [N,D], A [r,D], B [E,r], s the scaling. The update is added within its product, both gradients
of x meet within theirs, and the gradient of B is taken as ((x A^T)^T g)^T: one of r columns, as autograd has it, is seven times
slower on a CPU. What is computed is PEFT's own, within rounding.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        low = linear(x, a)
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scaling = scaling
        return linear(x, weight, bias).addmm_(low, b.t(), alpha=scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (g,) = grad_outputs
        x, weight, a, b, low = ctx.saved_tensors
        scaled = linear(g, b.t().contiguous()).mul_(ctx.scaling)
        of_x = (g @ weight).addmm_(scaled, a) if ctx.needs_input_grad[0] else None
        of_a = scaled.t() @ x if ctx.needs_input_grad[3] else None
        of_b = (low.t() @ g).mul_(ctx.scaling).t() if ctx.needs_input_grad[4] else None
        return of_x, None, None, of_a, of_b, None


class FusedLinear(Linear):
    """PEFT's LoRA on a linear map, computed as above wherever one adapter acts and nothing else is in its way.

    Another number of adapters, a variant such as DoRA, a dropout at work or a hook within the update, a merged or a trained
    base weight, and compilation: PEFT's own forward.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = self.active_adapters[0] if len(self.active_adapters) == 1 else None
        if args or kwargs or name is None or not self._is_plain(name) or torch.compiler.is_compiling():
            return super().forward(x, *args, **kwargs)
        base, a, b = (cast(nn.Linear, part) for part in (self.base_layer, self.lora_A[name], self.lora_B[name]))
        given = (x, base.weight, base.bias, a.weight, b.weight)
        dtypes = {each.dtype for each in given if each is not None}
        if torch.is_autocast_enabled(x.device.type):
            wanted = torch.get_autocast_dtype(x.device.type)
        elif len(dtypes) > 1:
            return super().forward(x)
        else:
            wanted = x.dtype
        flat = x.to(wanted).reshape(-1, x.shape[-1])
        rest = (None if each is None else each.to(wanted) for each in given[1:])
        out = _Fused.apply(flat, *rest, self.scaling[name])
        assert isinstance(out, Tensor)
        return out.view(*x.shape[:-1], out.shape[-1])

    def _is_plain(self, name: str) -> bool:
        if self.disable_adapters or self.merged or name not in self.lora_A or name in self.lora_variant:
            return False
        base, a, b, dropout = self.base_layer, self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
        if b.bias is not None or any(parameter.requires_grad for parameter in base.parameters()):
            return False
        if dropout.training and not isinstance(dropout, nn.Identity):
            return False
        reached = any(part._forward_hooks or part._forward_pre_hooks for part in (base, a, b, dropout))
        return not reached and all(type(part) is nn.Linear and "forward" not in part.__dict__ for part in (base, a, b))


def fuse(model: nn.Module) -> None:
    """Let every plain LoRA layer over a plain nn.Linear of a model compute as `FusedLinear`. It stays PEFT's in all else."""
    for module in model.modules():
        if type(module) is Linear and type(module.base_layer) is nn.Linear:
            module.__class__ = FusedLinear
