"""The proof that a method acts, in every training pass, and that nobody went between it and its model.

A dropout that never fires is the field's most common fault, and nothing shows it: so every pass of the training itself is watched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from hkft.dropout import families
from hkft.dropout.dropper import DropHook, Dropper
from hkft.errors import MethodError


class ProofHook:
    """Hooks on the model: in every training pass each site must fire in each layer that runs, or the method is a lie.

    A pass without gradients is not judged: it may be a reference, with adapters off. In the first pass what may have changed
    since attaching is looked at again: LoRA put around an FFN output would add its update behind the drop, and
    checkpointing, whenever it comes, would draw other masks from a seed when it replays.
    """

    def __init__(self, family: families.Family, droppers: list[Dropper]) -> None:
        self.family, self.droppers = family, droppers
        self.proven = False  # that nothing was changed since attaching: by the first training pass

    def watch(self, model: nn.Module) -> list[RemovableHandle]:
        """Put the hooks in place: around `model`, and on each layer where something drops."""
        handles = [model.register_forward_pre_hook(self.before), model.register_forward_hook(self)]
        for index, layer in enumerate(self.family.layers):
            if mine := [d for d in self.droppers if d.layer == index]:
                handles.append(layer.block.register_forward_pre_hook(DueHook(mine), prepend=True))
        return handles

    def before(self, module: nn.Module, args: Any) -> None:
        """As a forward pre-hook: nothing has fired yet."""
        if getattr(module, "_is_replica", False):
            raise MethodError(
                "nn.DataParallel runs copies of the model in threads, which would share their masks",
                where="devices",
                hint="one process for each GPU, with `torchrun` or `accelerate launch`, or CUDA_VISIBLE_DEVICES=0",
            )
        for dropper in self.droppers:
            dropper.due = dropper.layer is None
            if dropper.layer is not None:
                dropper.fired = False

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not module.training or not torch.is_grad_enabled():
            return
        family = self.family
        if any(d.seed is not None for d in self.droppers):
            refuse_checkpointing(family.model)
        name, after = type(family.model).__name__, "attach() to the model that is trained, after PEFT has wrapped it"
        silent = [d for d in self.droppers if d.rate and d.due and not d.fired]
        for dropper in self.droppers:
            dropper.fired = False  # not before: an embedding may be looked up before the model is called
        if silent:
            raise MethodError(
                f"{name} went through a training pass without firing {_names(silent)}",
                hint=f"{after}, with all its layers in train mode, and leave its attention implementation as it is",
            )
        if self.proven or torch.compiler.is_compiling():
            return
        hooked = [d for d in self.droppers if d.site.position in ("hidden", "input", "output")]
        now = families.find(family.model) if hooked else family
        moved = [d for d in hooked if not _is_hooked(hooked_module(now, d), d)]
        if moved:
            raise MethodError(f"{name} was wrapped after attaching, outside {_names(moved)}", hint=after)
        self.proven = True


class DueHook:
    """Forward pre-hook on a layer: it runs in this pass, which layer drop or a batch without images may have spared it.

    A layer that is frozen and in eval mode, as a vision tower often is, was put to rest on purpose.
    """

    def __init__(self, droppers: list[Dropper]) -> None:
        self.droppers = droppers

    def __call__(self, module: nn.Module, args: Any) -> None:
        due = module.training or any(parameter.requires_grad for parameter in module.parameters())
        for dropper in self.droppers:
            dropper.due = due


def _names(droppers: list[Dropper]) -> str:
    places = {d.site.position if d.layer is None else f"{d.site.position} of layer {d.layer}" for d in droppers}
    return ", ".join(sorted(places))


def hooked_module(family: families.Family, dropper: Dropper) -> nn.Module | None:
    """The module in whose output a hidden, input or output site drops."""
    if dropper.site.position == "input":
        return family.model.get_input_embeddings()
    return family.layers[-1].block if dropper.layer is None else family.layers[dropper.layer].ffn_output


def _is_hooked(module: nn.Module | None, dropper: Dropper) -> bool:
    return module is not None and any(
        isinstance(hook, DropHook) and hook.dropper is dropper for hook in module._forward_hooks.values()
    )


def refuse_checkpointing(model: nn.Module) -> None:
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise MethodError("gradient checkpointing replays torch's default generator only", hint="attach without a seed")
