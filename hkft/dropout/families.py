"""Where a model keeps its layers, found by structure, so that a new family needs no line of code here.

- An attention module is one whose forward asks transformers' AttentionInterface for its function: only there can hkft act.
- A layer is the element of a ModuleList that holds one attention module and one feed-forward network.
- The FFN output is the last linear map of the layer that comes back to the hidden size, fed by another linear map of the
  same layer outside the attention. PEFT's wrappers count as the linear maps they wrap.

What cannot be told apart this way (the FFN of a mixture of experts, attention sinks, attention outside the interface) is refused
with the reason: a method that acts in the wrong place is worse than none.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from torch import nn
from transformers import PreTrainedModel

from hkft.errors import MethodError


@dataclass(frozen=True)
class Layer:
    name: str  # qualified name of the block, "encoder.layer.0"
    block: nn.Module
    attention: nn.Module
    ffn_output: nn.Module | None  # None: a mixture of experts, whose output is not one linear map's
    causal: bool


@dataclass(frozen=True)
class Family:
    model: PreTrainedModel
    layers: tuple[Layer, ...]

    def chosen(self, layers: str | tuple[int, ...]) -> list[int]:
        """Indices of the layers that a `Site.layers` names. Raises MethodError on a number that is not there."""
        count = len(self.layers)
        if layers == "auto":
            layers = "latter-half" if all(layer.causal for layer in self.layers) else "all"
        if layers == "all":
            return list(range(count))
        if layers == "latter-half":
            return list(range(count // 2, count))
        wrong = [n for n in layers if n not in range(count)]
        if wrong:
            raise MethodError(
                f"{type(self.model).__name__} has {count} layers",
                where="layers",
                found=str(wrong),
                allowed=f"0 to {count - 1}",
            )
        return [int(n) for n in layers]


def find(model: nn.Module) -> Family:
    """The family of a model, or of the transformers model inside a PEFT or home-made wrapper.

    Raises MethodError where there is none, or where its layers cannot be told for certain.
    """
    inner = _pretrained(model)
    attentions = {name: module for name, module in inner.named_modules() if _asks_interface(type(module))}
    attentions = {name: module for name, module in attentions.items() if not _is_cross(name)}
    if not attentions:
        raise MethodError(
            f"{type(inner).__name__} does not take its attention from transformers' AttentionInterface",
            hint="hkft acts there; families that write attention out in their own forward cannot be served",
        )
    layers = [_layer(inner, name, module) for name, module in attentions.items()]
    blocks = [layer.name for layer in layers]
    if len(set(blocks)) != len(blocks):
        raise MethodError(f"{type(inner).__name__} has layers with more than one self-attention")
    return Family(inner, tuple(layers))


def _pretrained(model: nn.Module) -> PreTrainedModel:
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise MethodError(
        f"there is no transformers model in {type(model).__name__}",
        hint="pass a PreTrainedModel, or a PEFT model around one",
    )


@cache
def _asks_interface(kind: type[nn.Module]) -> bool:
    """Whether the class's own forward looks its attention function up in the interface."""
    if "ttention" not in kind.__name__:
        return False
    try:
        return "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(kind.forward)
    except (OSError, TypeError):
        return False


def _is_cross(name: str) -> bool:
    return any("cross" in part or part in {"encoder_attn", "EncDecAttention"} for part in name.split("."))


def _layer(model: PreTrainedModel, name: str, attention: nn.Module) -> Layer:
    """The innermost ModuleList element around `attention` that also holds a feed-forward network."""
    if hasattr(attention, "sinks"):
        raise MethodError(f"{type(attention).__name__} has attention sinks, which take part in the softmax", where=name)
    path = name.split(".")
    for depth in range(len(path) - 1, 0, -1):
        parent = model.get_submodule(".".join(path[: depth - 1])) if depth > 1 else model
        if not isinstance(parent, nn.ModuleList):
            continue
        block_name = ".".join(path[:depth])
        block = model.get_submodule(block_name)
        experts, output = _has_experts(block), _ffn_output(block, attention)
        if experts or output is not None:
            causal = bool(getattr(attention, "is_causal", False))
            return Layer(block_name, block, attention, None if experts else output, causal)
    raise MethodError(
        f"no feed-forward network was found beside {name}", hint=f"{type(model).__name__} is not supported"
    )


def _has_experts(block: nn.Module) -> bool:
    return any(part in {"experts", "expert"} for name, _ in block.named_modules() for part in name.split("."))


def _ffn_output(block: nn.Module, attention: nn.Module) -> nn.Module | None:
    """The last linear map back to the hidden size that another linear map feeds; None where the block holds none."""
    linear = list(_linear(block, attention))
    for name, module, size_in, size_out in reversed(linear):
        feeders = [out for other, _, _, out in linear if other != name]
        if any(out in (size_in, 2 * size_in) for out in feeders) and any(into == size_out for _, _, into, _ in linear):
            return module
    return None


def _linear(block: nn.Module, attention: nn.Module) -> Iterator[tuple[str, nn.Module, int, int]]:
    """Outermost linear maps of the block outside its attention, in the order of their registration, with their sizes."""
    inside: list[str] = []
    for name, module in block.named_modules():
        if any(name.startswith(prefix + ".") for prefix in inside):
            continue
        sizes = linear_sizes(module)
        if module is attention or sizes:
            inside.append(name)
        if sizes and module is not attention:
            yield name, module, *sizes


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a Linear, a quantised Linear, GPT-2's Conv1D, or PEFT's wrapper of one; None for anything else."""
    size_in, size_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(size_in, int) and isinstance(size_out, int):
        return size_in, size_out
    if isinstance(getattr(module, "nf", None), int):  # Conv1D
        return int(module.weight.shape[0]), int(module.nf)  # type: ignore[union-attr, arg-type]
    return None
