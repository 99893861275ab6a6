"""How much of a LoRA adapter is used: of how many directions its update is made, and how large it is beside the weight.

LoRA adds s*B*A to a weight W [out,in], with A [r,in], B [out,r] and PEFT's scaling s (`lora_alpha`/r, or over sqrt(r) in
rsLoRA). Effective rank: exp of the entropy of B*A's singular values taken as shares of their sum, Roy and Vetterli 2007,
"The effective rank": r where all r directions count alike, near 1 where one does all. Legend: E experts of a stacked
weight (1 for all others), O out, I in, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

SMALL = 2**20  # numbers in A and B: up to here float64 costs nothing


@dataclass(frozen=True, slots=True)
class Update:
    """One module's update.

    module: its name in the base model. rank: r; of a stack of E experts, E*r. effective_rank: 1 to rank, 0 where B*A = 0.
    update_norm: the Frobenius norm of s*B*A. weight_norm: that of W, dequantised; None where it cannot be read.
    """

    module: str
    rank: int
    effective_rank: float
    update_norm: float
    weight_norm: float | None


def updates(model: nn.Module) -> list[Update]:
    """The update of every module with an active LoRA adapter, in the model's order; of several active ones, the first.

    effective_rank = exp(-sum p_i ln p_i), p_i = sigma_i / sum sigma, of the singular values sigma of B*A (eq. 2 and 3 of
    Roy and Vetterli); update_norm = s * sqrt(sum sigma_i^2). DoRA's magnitudes and biases are not in it. Of an adapter
    that was merged into its weight, W has the update in it. Modules that are trained whole (`modules_to_save`) have no
    update, and those whose A or B lie elsewhere (meta, sharded) or have diverged are left out. Changes nothing in the model
    and draws no random numbers.
    """
    found = []
    with torch.no_grad():
        for name, layer, adapter in _adapted(model):
            a, b = _factors(layer, adapter)
            if not all(_readable(each) and bool(each.isfinite().all()) for each in (a, b)):
                continue
            sigma = singular_values(b, a).flatten()
            norm = abs(layer.scaling[adapter]) * float(torch.linalg.vector_norm(sigma))
            found.append(Update(name, len(sigma), effective_rank(sigma), norm, _weight_norm(layer)))
    return found


def singular_values(b: Tensor, a: Tensor) -> Tensor:
    """The singular values of each B*A, [E,R] largest first, from b [E,O,R] and a [E,R,I]; B*A itself is not built.

    With B = Q1 R1 and A^T = Q2 R2, B*A = Q1 (R1 R2^T) Q2^T has those of R1 R2^T. On the CPU, in float32, or float64 where
    that is cheap. Where O or I is less than R, the last are 0.
    """
    dtype = torch.float64 if a.numel() + b.numel() <= SMALL else torch.float32
    left, right = (torch.linalg.qr(m.to("cpu", dtype), mode="r").R for m in (b, a.mT))
    sigma = torch.linalg.svdvals(left @ right.mT)
    return nn.functional.pad(sigma, (0, a.shape[-2] - sigma.shape[-1]))


def effective_rank(sigma: Tensor) -> float:
    """exp of the entropy of singular values [N] as shares of their sum; 0 where all are 0."""
    total = sigma.sum()
    if total == 0:
        return 0.0
    return math.exp(float(torch.special.entr(sigma / total).sum()))


def _adapted(model: nn.Module) -> Iterator[tuple[str, LoraLayer, str]]:
    """(name in the base model, layer, its first active adapter) of each LoRA layer that the model runs through."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    base = model.get_base_model() if isinstance(model, PeftModel) else model
    for name, layer in base.named_modules():
        parts = [part for part in name.split(".") if part != "base_layer"]
        if not isinstance(layer, LoraLayer):
            continue
        active = [one for one in layer.active_adapters if one in layer.lora_A or one in layer.lora_embedding_A]
        if active:  # `target_parameters` name a parameter of a module, such as one of two stacks of experts
            parameter = getattr(layer, "parameter_name", None)
            yield ".".join(parts if parameter is None else [*parts, parameter]), layer, active[0]


def _factors(layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """A [E,R,I] and B [E,O,R] of an adapter. I is in * kernel in a convolution, and the vocabulary in an embedding."""
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter][None], layer.lora_embedding_B[adapter][None]
    a, b = (side.get_parameter(f"{adapter}.weight").flatten(1) for side in (layer.lora_A, layer.lora_B))
    experts = getattr(layer, "num_experts", 1)  # PEFT's order: [E R, I] and [O, R E]
    if (groups := getattr(layer.lora_B[adapter], "groups", 1)) > 1:
        b = torch.block_diag(*b.chunk(groups))
    return a.unflatten(0, (experts, -1)), b.unflatten(1, (-1, experts)).permute(2, 0, 1)


def _weight_norm(layer: LoraLayer) -> float | None:
    weight = _weight(layer.get_base_layer(), getattr(layer, "parameter_name", "weight"))
    if weight is None or not _readable(weight):
        return None
    return float(torch.linalg.vector_norm(weight.detach(), dtype=torch.float32))


def _weight(module: nn.Module, name: str) -> Tensor | None:
    """A module's weight in floating point; None where it has none, or in a form that only its own kernels read."""
    from peft.utils.integrations import dequantize_bnb_weight, dequantize_module_weight, get_bnb_param_type

    weight = getattr(module, name, None)
    if name != "weight" or not isinstance(weight, nn.Parameter):
        return dequantize_module_weight(module) if hasattr(module, "W_q") else weight
    kind = get_bnb_param_type(weight)
    if not kind:
        return dequantize_module_weight(module)
    # not dequantize_module_weight: on a CPU it puts another parameter in the place of this one
    if kind == "8bit":
        scales = getattr(getattr(module, "state", None), "SCB", None)
        scales = getattr(weight, "SCB", None) if scales is None else scales
        return None if scales is None else dequantize_bnb_weight(weight, state=SimpleNamespace(SCB=scales))
    state = getattr(weight, "quant_state", None)
    packed = state is None or getattr(state, "packing_format_for_cpu", False)  # for the forward pass in eval mode
    return None if packed else dequantize_bnb_weight(weight)


def _readable(tensor: Tensor) -> bool:
    """Whether all the numbers are here: neither on meta, nor sharded (DTensor, ZeRO-3), nor of 8 bits with scales aside."""
    from torch.distributed.tensor import DTensor

    here = not tensor.is_meta and not isinstance(tensor, DTensor) and tensor.numel() > 0
    return here and tensor.is_floating_point() and tensor.itemsize > 1
