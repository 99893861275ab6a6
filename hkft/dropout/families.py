"""Where a model keeps its layers, found by structure, so that a new family needs no line of code here.

- An attention module is one whose forward asks transformers' AttentionInterface for its function: only there can hkft act.
- A layer is the element of a ModuleList that holds one attention module and one feed-forward network.
- The FFN output is the linear map outside all attention that comes back to the width which attention reads, and whose own
  input another such map makes from that width. PEFT's wrappers count as the linear maps they wrap.

What cannot be told apart this way (the FFN of a mixture of experts, attention sinks, attention outside the interface) is refused
with the reason: a method that acts in the wrong place is worse than none.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hkft.errors import MethodError

NOT_FFN = ("attn", "attention", "adapter")  # in a module's name: what is within is no part of the FFN
BEYOND = {  # in an attention's own forward: what hkft's attention would silently leave out
    "sinks": "has attention sinks, which take part in the softmax",
    "s_aux": "has attention sinks, which take part in the softmax",
    "indices=": "chooses the keys of each query itself, in a way that hangs on the name of the attention backend",
}


@dataclass(frozen=True)
class Layer:
    name: str  # qualified name of the block, "encoder.layer.0"
    block: nn.Module
    attention: nn.Module
    ffn_output: nn.Module | None  # None where it is not the output of one linear map, or cannot be told for certain
    why: str | None  # ffn_output is None
    causal: bool


@dataclass(frozen=True)
class Family:
    model: PreTrainedModel
    layers: tuple[Layer, ...]

    @property
    def text(self) -> tuple[Layer, ...]:
        """The layers of the decoder that writes, where the model sees or hears as well; elsewhere all of them."""
        decoder = self.model if self.model.config.is_encoder_decoder else self.model.get_decoder()
        within = {*decoder.modules()}
        return tuple(layer for layer in self.layers if layer.block in within) or self.layers

    def chosen(self, layers: str | tuple[int, ...]) -> list[list[int]]:
        """Indices of the layers that a `Site.layers` names, stack by stack: an encoder and its decoder are two.

        A stack is what has one name up to its first number: the stages of Swin, the groups of ALBERT are one.

        Raises MethodError on a number that is not there.
        """
        count = len(self.layers)
        by_stack: dict[str, list[int]] = {}
        for index, layer in enumerate(self.layers):
            by_stack.setdefault(re.split(r"\.\d+", layer.name, maxsplit=1)[0], []).append(index)
        stacks = list(by_stack.values())
        if isinstance(layers, str):
            causal = [all(self.layers[index].causal for index in stack) for stack in stacks]
            half = [layers == "latter-half" or (layers == "auto" and each) for each in causal]
            return [stack[len(stack) // 2 :] if late else stack for stack, late in zip(stacks, half, strict=True)]
        wrong = [n for n in layers if n not in range(count)]
        if wrong:
            raise MethodError(
                f"{type(self.model).__name__} has {count} layers",
                where="layers",
                found=str(wrong),
                allowed=f"0 to {count - 1}",
            )
        return [own for stack in stacks if (own := [n for n in stack if n in layers])]


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
    for part in [inner.get_encoder(), inner.get_decoder()] if inner.config.is_encoder_decoder else []:
        if not {*part.modules()} & {
            *attentions.values()
        }:  # LongT5: to drop in the decoder alone would be half a method
            raise MethodError(
                f"{type(part).__name__}, a half of {type(inner).__name__}, does not take its attention from transformers' "
                "AttentionInterface"
            )
    layers = [_layer(inner, name, module) for name, module in attentions.items()]
    blocks = [layer.name for layer in layers]
    if len(set(blocks)) != len(blocks):
        raise MethodError(f"{type(inner).__name__} has layers with more than one self-attention")
    return Family(inner, tuple(layers))


def _pretrained(model: nn.Module) -> PreTrainedModel:
    found = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if not found:
        raise MethodError(
            f"there is no transformers model in {type(model).__name__}",
            hint="pass a PreTrainedModel, or a PEFT model around one",
        )
    within = {*found[0].modules()}
    if apart := [type(module).__name__ for module in found if module not in within]:
        raise MethodError(
            f"{type(model).__name__} holds several transformers models: {type(found[0]).__name__}, {apart[0]}",
            hint="attach to each of them",
        )
    return found[0]


def _asks_interface(kind: type[nn.Module]) -> bool:
    """Whether the class's own forward looks its attention function up in the interface."""
    return "ttention" in kind.__name__ and "ALL_ATTENTION_FUNCTIONS" in source(kind)


@cache
def source(kind: type[nn.Module]) -> str:
    try:
        return inspect.getsource(kind.forward)
    except (OSError, TypeError):
        return ""


def _is_cross(name: str) -> bool:
    return any("cross" in part or part in {"encoder_attn", "EncDecAttention"} for part in name.split("."))


def _layer(model: PreTrainedModel, name: str, attention: nn.Module) -> Layer:
    """The innermost ModuleList element around `attention` that also holds a feed-forward network."""
    for sign, reason in BEYOND.items():
        if sign in source(type(attention)):
            raise MethodError(f"{type(attention).__name__} {reason}", where=name)
    path = name.split(".")
    for depth in range(len(path) - 1, 0, -1):
        parent = model.get_submodule(".".join(path[: depth - 1])) if depth > 1 else model
        if not isinstance(parent, nn.ModuleList):
            continue
        block_name = ".".join(path[:depth])
        block = model.get_submodule(block_name)
        experts, outputs = _has_experts(block), _ffn_outputs(model, block, attention)
        if experts or any(_linear(block, attention)):
            certain = not experts and len(outputs) == 1
            output = next(iter(outputs.values())) if certain else None
            why = "it is a mixture of experts" if experts else f"it may be {' or '.join(outputs) or 'none that it has'}"
            causal = bool(getattr(attention, "is_causal", False))
            return Layer(block_name, block, attention, output, None if certain else why, causal)
    raise MethodError(
        f"no feed-forward network was found beside {name}", hint=f"{type(model).__name__} is not supported"
    )


def _has_experts(block: nn.Module) -> bool:
    return any(part in {"experts", "expert"} for name, _ in block.named_modules() for part in name.split("."))


def _ffn_outputs(model: PreTrainedModel, block: nn.Module, attention: nn.Module) -> dict[str, nn.Module]:
    """By name, the linear maps back to the width that attention reads, fed by another linear map from it.

    Where there are several (per-layer embeddings look like an FFN), those as wide inside as the configuration says.
    """
    width = next((sizes[0] for module in attention.modules() if (sizes := linear_sizes(module))), None)
    linear = list(_linear(block, attention))
    found = [
        (name, module, inner)
        for name, module, inner, out in linear
        if out == width and any(i == width and o in (inner, 2 * inner) for n, _, i, o in linear if n != name)
    ]
    sizes = _intermediate_sizes(model)
    as_told = [entry for entry in found if entry[2] in sizes]
    return {name: module for name, module, _ in (as_told if len(found) > 1 and as_told else found)}


def _intermediate_sizes(model: PreTrainedModel) -> set[int]:
    """What the configuration, or one within it, gives as the inner width of the FFN."""
    parts = [model.config, *(part for part in vars(model.config).values() if isinstance(part, PreTrainedConfig))]
    names = ("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim", "n_inner", "d_ff")
    sizes = (getattr(part, name, None) for part in parts for name in names)
    return {each for size in sizes for each in (size if isinstance(size, list) else [size]) if isinstance(each, int)}


def _linear(block: nn.Module, attention: nn.Module) -> Iterator[tuple[str, nn.Module, int, int]]:
    """Outermost linear maps of the block outside all attention, in the order of their registration, with their sizes."""
    inside: list[str] = []
    for name, module in block.named_modules():
        if any(name.startswith(prefix + ".") for prefix in inside):
            continue
        sizes = linear_sizes(module)
        other = module is attention or any(part in name.rpartition(".")[2].lower() for part in NOT_FFN)
        if other or sizes:
            inside.append(name)
        if sizes and not other:
            yield name, module, *sizes


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a Linear, a quantised Linear, GPT-2's Conv1D, or PEFT's wrapper of one; None for anything else."""
    size_in, size_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(size_in, int) and isinstance(size_out, int):
        return size_in, size_out
    if isinstance(getattr(module, "nf", None), int):  # Conv1D
        return int(module.weight.shape[0]), int(module.nf)  # type: ignore[union-attr, arg-type]
    return None
