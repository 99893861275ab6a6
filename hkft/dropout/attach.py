"""attach(model, method) -> Attachment: put a method on a model, and take it off again without a trace.

Each site becomes a Dropper in every layer chosen. The attention positions go through transformers' AttentionInterface (see
`interface`), the others are forward hooks (see `dropper`). Every training pass proves that they act (see `proof`).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from hkft.dropout import families, interface
from hkft.dropout import padding_free as end_to_end
from hkft.dropout.dropper import CountHook, DropHook, Dropper
from hkft.dropout.method import LORA, PER_LAYER, Method, Site
from hkft.dropout.named import find
from hkft.dropout.prefix import Prefix
from hkft.dropout.proof import ProofHook, hooked_module, refuse_checkpointing
from hkft.errors import MethodError

_ATTACHMENT = "_hkft_attachment"  # on the transformers model


class Attachment:
    """A method at work on a model. A context manager: leaving it detaches."""

    def __init__(self, family: families.Family, method: Method, droppers: list[Dropper]) -> None:
        self.family = family
        self.method = method
        self.droppers = droppers
        self.backends: interface.Backends = []  # the attention that was there, while hkft stands in for it
        self.proof = ProofHook(family, droppers)
        self.prefix = Prefix(family.model, droppers)
        self._handles: list[RemovableHandle] = []
        self._swapped: list[tuple[nn.ModuleDict, str, Dropper]] = []
        self.costs: dict[int, float] = {}  # by the number of the site: see `selfcheck`

    @property
    def attached(self) -> bool:
        return getattr(self.family.model, _ATTACHMENT, None) is self

    def report(self) -> list[dict[str, Any]]:
        """What fired since attaching, one record a site:

        position, pattern, rescale; layers, and modules, how many places drop; calls, over all of them;
        expected and measured: the drop rate, means over the layers' masks, as drawn (None before the first training pass,
        and where PyTorch draws the masks: `lora_input` by element); protected: the share of attention rows in which
        the site's `protect` acted (None where there is nothing to protect);
        cost: time of a training step with this site alone by that without any, as `self_check` measured it, else None.
        Gradient checkpointing runs a layer twice, and counts twice.
        """
        return [self._report_of(number, site) for number, site in enumerate(self.method.sites)]

    def _report_of(self, number: int, site: Site) -> dict[str, Any]:
        mine = [d for d in self.droppers if d.number == number]
        counts = [d.counted() for d in mine]
        total = {name: sum(count[name] for count in counts) for name in (counts[0] if counts else ())}
        return {
            "position": site.position,
            "pattern": site.pattern,
            "rescale": site.rescale,
            "layers": sorted({d.layer for d in mine if d.layer is not None}),
            "modules": len(mine),
            "calls": total["calls"],
            "expected": sum(d.rate for d in mine) / len(mine),
            "measured": total["dropped"] / total["drawn"] if total["drawn"] else None,
            "protected": total["protected"] / total["rows"] if total["rows"] else None,
            "cost": self.costs.get(number),
        }

    @contextmanager
    def rates(self, rate: Callable[[Dropper], float]) -> Iterator[None]:
        """For a while, every dropper has another rate; then all is as it was."""
        before = [d.rate for d in self.droppers]
        self._set([rate(d) for d in self.droppers])
        try:
            yield
        finally:
            self._set(before)

    def _set(self, rates: list[float]) -> None:
        for dropper, rate in zip(self.droppers, rates, strict=True):
            dropper.rate = rate
        for dropouts, name, dropper in self._swapped:
            if name in dropouts:  # its adapter may have been deleted since
                cast(nn.Dropout, dropouts[name]).p = max(0.0, dropper.rate)

    def detach(self) -> None:
        """Take everything off: hooks, state, the interface's entries. Harmless when already done."""
        with _LOCK:
            if self.attached:
                self._detach()

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        for dropouts, name, _ in self._swapped:
            if name in dropouts:
                dropouts[name] = nn.Identity()
        for layer in self.family.layers:
            for name in (interface.SITE, interface.GUIDE, end_to_end.FLAT):
                layer.attention.__dict__.pop(name, None)
        delattr(self.family.model, _ATTACHMENT)
        _LIVE.discard(self)
        users = [other for other in _LIVE if other.backends]
        interface.give_back(self.backends, frozenset(id(config) for other in users for config, _ in other.backends))
        if not users:
            interface.unregister()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A deep copy or an unpickled model is attached too: it needs the interface's entries for as long as it lives."""
        self.__dict__.update(state)
        with _LOCK:
            _LIVE.add(self)
            if self.backends:
                interface.register()


_LIVE: weakref.WeakSet[Attachment] = weakref.WeakSet()
_LOCK = threading.RLock()  # the registries belong to the process


def attach(
    model: nn.Module,
    method: str | Method,
    rate: float | None = None,
    *,
    seed: int | None = None,
    padding_free: bool = False,
) -> Attachment:
    """Make `model` drop as `method` says, in train mode only.

    model: any transformers model that takes its attention from the AttentionInterface, bare, in PEFT's wrapper (attach
        after wrapping, so that LoRA's update is inside what is dropped), or inside a module of yours.
    method: a name of `METHODS` or a `Method`. rate: for every site without its own; 0.1 where neither says.
    seed: draw from generators of hkft's own. None, the default: from torch's default generator, which gradient
        checkpointing replays; a seed together with checkpointing is refused.
    padding_free: batches come as rows laid end to end, [1,T], with `position_ids` that begin anew at each. Attention then
        goes row by row, so that masks are drawn for each and nothing is spent on other rows. For decoders.

    As with any dropout, a pass in train mode drops whether or not gradients are on. A layer that drops gives no attention
    weights to `output_attentions`. Several processes draw different masks from one seed; nn.DataParallel is refused. A
    consistency loss is the loop's business: `hkft.Trainer` or `hkft.consistency_loss` add it.
    Raises MethodError: unknown method, a model already attached, a family or an attention backend hkft cannot act on.
    """
    method = method if isinstance(method, Method) else find(method)
    if rate is not None:
        method = method.with_rate(rate)
    family = families.find(model)
    if attached(family.model):
        raise MethodError(f"{type(family.model).__name__} already has a method", hint="detach() it first")
    if seed is not None:
        refuse_checkpointing(family.model)
    if padding_free:
        end_to_end.refuse(family, method)
    attachment = Attachment(family, method, [])
    setattr(family.model, _ATTACHMENT, attachment)
    try:
        for number, site in enumerate(method.sites):
            _place(attachment, site, number, None if seed is None else seed + 1000 * number)
        if attachment.droppers:
            attachment._handles.extend(attachment.proof.watch(model))
        if padding_free:
            _lay_end_to_end(attachment, model)
        in_attention = any(site.position.startswith("attention_") or site.start == "attended" for site in method.sites)
        if in_attention or padding_free:
            with _LOCK:
                attachment.backends = interface.enter(family)
                _LIVE.add(attachment)
        if padding_free:
            end_to_end.prove(family)
    except BaseException:
        attachment.detach()
        raise
    return attachment


def attached(model: nn.Module) -> Attachment | None:
    """The attachment at work on a model, also on a deep copy of an attached one; None where there is none."""
    return next((found for m in model.modules() if (found := m.__dict__.get(_ATTACHMENT)) is not None), None)


def _place(attachment: Attachment, site: Site, number: int, seed: int | None) -> None:
    """Put one site's droppers where they belong."""
    family = attachment.family
    if _is_pefts(site) and seed is not None:
        raise MethodError(
            "PEFT's dropout draws from torch's default generator: a seed cannot reach it",
            where="lora_input",
            hint="attach without a seed, after torch.manual_seed",
        )
    if site.position not in PER_LAYER:
        _place_once(attachment, Dropper(site, number, None, site.rate_at(0, 1), seed))
        return
    place = {"hidden": _place_hidden, **dict.fromkeys(LORA, _place_lora)}.get(site.position, _place_attention)
    for stack in family.chosen(cast("str | tuple[int, ...]", site.layers)):
        for order, index in enumerate(stack):
            own = None if seed is None else seed + index
            dropper = Dropper(site, number, index, site.rate_at(order, len(stack)), own)
            place(attachment, family.layers[index], dropper)


def _place_once(attachment: Attachment, dropper: Dropper) -> None:
    """Drop in the token embeddings, or in the output of the last layer."""
    model, where = attachment.family.model, dropper.site.position
    if where == "input" and model.config.is_encoder_decoder:
        raise MethodError(
            "an encoder-decoder embeds its inputs in two places", where=where, hint="use another position"
        )
    place = hooked_module(attachment.family, dropper)
    assert place is not None
    if isinstance(place, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        raise MethodError(
            f"{type(model).__name__} embeds its inputs by a convolution, whose output is not [B,L,D]",
            where=where,
            hint="use another position",
        )
    attachment.droppers.append(dropper)
    attachment._handles.append(place.register_forward_hook(DropHook(dropper)))


def _place_attention(attachment: Attachment, layer: families.Layer, dropper: Dropper) -> None:
    """Leave the dropper where `interface` looks for it."""
    layer.attention.__dict__[interface.SITE] = dropper
    attachment.droppers.append(dropper)


def _place_hidden(attachment: Attachment, layer: families.Layer, dropper: Dropper) -> None:
    """Drop in the FFN output of a layer."""
    if layer.ffn_output is None:
        raise MethodError(
            f"the FFN output of {layer.name} is not certain to be that of one linear map: {layer.why}",
            where="hidden",
            hint="the attention positions work on this model",
        )
    _refuse_span(attachment.family, layer, dropper.site)
    hook = DropHook(dropper)
    attachment._handles.append(layer.ffn_output.register_forward_hook(hook))
    attachment._handles.append(layer.block.register_forward_pre_hook(hook.see, with_kwargs=True))
    if dropper.site.start == "attended":
        layer.attention.__dict__[interface.GUIDE] = dropper
    attachment.droppers.append(dropper)


def _lay_end_to_end(attachment: Attachment, model: nn.Module) -> None:
    """Let attention go row by row, and nothing be cached. PEFT's wrapper calls `forward` of what it wraps: hooks see it not."""
    family = attachment.family
    for layer in family.layers:
        layer.attention.__dict__[end_to_end.FLAT] = True
    called = {model, family.model, family.model.base_model}
    for each in called:
        if isinstance(each, PreTrainedModel) or hasattr(each, "peft_config"):
            handle = each.register_forward_pre_hook(end_to_end.without_cache, with_kwargs=True)
            attachment._handles.append(handle)


def _refuse_span(family: families.Family, layer: families.Layer, site: Site) -> None:
    """Raise MethodError for a span of tokens that cannot be one on this model."""
    if site.start == "attended" and layer.causal:
        raise MethodError(
            "where a decoder's tokens are cut must not hang on tokens that come after them",
            where="start",
            found="attended",
            allowed="uniform",
        )
    if site.pattern == "span" and getattr(family.model.config, "chunk_size_feed_forward", 0):
        raise MethodError(
            "the FFN sees the tokens in chunks, and a span would be cut in each",
            where="chunk_size_feed_forward",
            found=str(family.model.config.chunk_size_feed_forward),
            allowed="0",
        )


def _is_pefts(site: Site) -> bool:
    """Whether the site is what `lora_dropout` does, and so is left to PEFT."""
    return (site.position, site.pattern, site.rescale) == ("lora_input", "element", "inverse_keep")


def _place_lora(attachment: Attachment, layer: families.Layer, dropper: Dropper) -> None:
    """Drop in the update of every active LoRA adapter of a layer."""
    found = 0
    for module in layer.block.modules():
        parts = [getattr(module, name, None) for name in ("lora_A", "lora_B", "lora_dropout")]
        lora_a, lora_b, dropouts = (part if isinstance(part, nn.ModuleDict) else nn.ModuleDict() for part in parts)
        active = getattr(module, "active_adapters", lora_a)
        for name in [name for name in lora_a if name in active]:
            seed = None if dropper.seed is None else dropper.seed + 100_000 * (found + 1)
            own = replace(dropper, seed=seed, generators={})
            found += 1
            attachment.droppers.append(own)
            if _is_pefts(dropper.site):
                _swap_dropout(attachment, dropouts, name, own)
                continue
            if getattr(module, "lora_variant", {}).get(name) or getattr(module, "use_dora", {}).get(name):
                raise MethodError(
                    "a variant of LoRA, such as DoRA, uses A and B in other ways than one after the other",
                    where=dropper.site.position,
                    hint="lora_dropout's own place works: lora_input by element",
                )
            hook, position = DropHook(own), dropper.site.position
            attachment._handles.append(
                lora_a[name].register_forward_pre_hook(hook.before)
                if position == "lora_input"
                else (lora_a if position == "lora_rank" else lora_b)[name].register_forward_hook(hook)
            )
    if not found:
        raise MethodError(
            f"{dropper.site.position} drops in LoRA's update, and {layer.name} has none",
            hint="wrap the model with peft.get_peft_model first; adapters such as AdaLoRA keep A and B in other modules",
        )


def _swap_dropout(attachment: Attachment, dropouts: nn.ModuleDict, name: str, dropper: Dropper) -> None:
    """Set the rate of PEFT's own dropout in front of A, exactly as `lora_dropout` would have."""
    current = dropouts[name]
    if not isinstance(current, nn.Identity):
        raise MethodError(
            "the adapter already has a lora_dropout of its own",
            hint="build it with lora_dropout=0.0, and let the method set the rate",
        )
    dropouts[name] = nn.Dropout(dropper.rate).train(current.training)
    attachment._swapped.append((dropouts, name, dropper))
    dropouts[name].register_forward_hook(CountHook(dropper))
