"""attach(model, method) -> Attachment: put a method on a model, and take it off again without a trace.

The attention positions go through transformers' AttentionInterface and AttentionMaskInterface; the others are forward hooks.
What a layer drops stands on its own module, so two models with two methods, or a deep copy, never share anything but the
stateless function of the interface. In eval mode everything hands over to the family's own attention.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import create_position_bias_mask, repeat_kv, sdpa_attention_forward

from hkft.dropout import attention, families
from hkft.dropout.hidden import hiddencut
from hkft.dropout.masks import PATTERNS, uniform
from hkft.dropout.method import PER_LAYER, Method, Site, find
from hkft.errors import MethodError

_STATE = "_hkft_site"  # on an attention module: what it drops
_ATTACHMENT = "_hkft_attachment"  # on the transformers model
_BACKENDS = ("sdpa", "eager")  # what hkft can stand in for
_PREFIX = "hkft_"
_MEASURED = 32  # calls whose masks are counted in full; after them every 16th


@dataclass
class Dropper:
    """One site in one layer: draws masks at its rate, and counts what it did."""

    site: Site
    number: int  # of the site in its method
    layer: int | None
    rate: float
    seed: int | None = None
    calls: int = 0
    drawn: int = 0
    dropped: Tensor | None = None
    generators: dict[str, torch.Generator] = field(default_factory=dict)

    def draw(self, full: Sequence[int], units: Sequence[int], device: torch.device) -> Tensor:
        """A keep-mask of the site's pattern: shape `full` for elements, `units` for columns and spans."""
        keep = PATTERNS[self.site.pattern](full, units, self.rate, uniform(device, self._generator(device)))
        self.calls += 1
        if self.calls <= _MEASURED or self.calls % 16 == 0:
            dropped = keep.numel() - torch.count_nonzero(keep)
            self.dropped = dropped if self.dropped is None else self.dropped + dropped  # stays on its device: no wait
            self.drawn += keep.numel()
        return keep

    def _generator(self, device: torch.device) -> torch.Generator | None:
        if self.seed is None:
            return None
        if str(device) not in self.generators:
            self.generators[str(device)] = torch.Generator(device).manual_seed(self.seed)
        return self.generators[str(device)]

    def __getstate__(self) -> dict[str, Any]:
        """For deepcopy and pickle, which cannot take a generator: the copy starts its own from the seed."""
        return {**self.__dict__, "generators": {}}


class HiddenHook:
    """Forward hook: drops in a module's output, a tensor [B,L,D] or a tuple that begins with one."""

    def __init__(self, dropper: Dropper) -> None:
        self.dropper = dropper
        self.batch: int | None = None

    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the layer runs: its batch size, for a family (OPT) whose FFN sees the tokens of all rows as [B*L,D]."""
        x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        self.batch = len(x) if x.dim() > 2 else None

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not module.training or not self.dropper.rate:
            return None
        if isinstance(output, tuple):
            return (self._drop(output[0]), *output[1:])
        return self._drop(output)

    def _drop(self, x: Tensor) -> Tensor:
        site, batch = self.dropper.site, len(x) if x.dim() > 2 else self.batch
        if batch is None and site.pattern == "span":
            raise MethodError(
                "this model has the tokens of all samples in one row, and a span would run across them",
                where=f"pattern of {site.position}",
                found="span",
                allowed="element, column",
            )
        tokens = x.reshape(batch or 1, -1, x.shape[-1])
        keep = self.dropper.draw(tokens.shape, tokens.shape[:-1], x.device)
        if site.pattern != "element":
            keep = keep.unsqueeze(-1)
        assert site.rescale is not None
        return hiddencut(tokens, keep, self.dropper.rate, site.rescale).view(x.shape)


class CountHook:
    """Forward hook on PEFT's own dropout module: counts its calls. PyTorch draws the mask, so its rate is not measured."""

    def __init__(self, dropper: Dropper) -> None:
        self.dropper = dropper

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if module.training:
            self.dropper.calls += 1


class ProofHook:
    """Forward hook on the model: after its first training pass, every site must have fired, or the method is a lie.

    What may have changed since attaching is looked at again: LoRA put around an FFN output would add its update behind
    the drop, and checkpointing, whenever it comes, would draw other masks from a seed when it replays.
    """

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment
        self.proven = False

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not module.training:
            return
        family, droppers = self.attachment.family, self.attachment.droppers
        if any(d.seed is not None for d in droppers):
            _refuse_checkpointing(family.model)
        if self.proven:
            return
        name, after = type(family.model).__name__, "attach() to the model that is trained, after PEFT has wrapped it"
        silent = [d for d in droppers if d.rate and not d.calls]
        if silent and not getattr(family.model.config, "layerdrop", 0):
            raise MethodError(f"{name} went through a training pass without firing {_names(silent)}", hint=after)
        hooked = [d for d in droppers if d.site.position in ("hidden", "input", "output")]
        now = families.find(family.model) if hooked else family
        moved = [d for d in hooked if not _is_hooked(_hooked(now, d), d)]
        if moved:
            raise MethodError(f"{name} was wrapped after attaching, outside {_names(moved)}", hint=after)
        self.proven = True


def _names(droppers: list[Dropper]) -> str:
    places = {d.site.position if d.layer is None else f"{d.site.position} of layer {d.layer}" for d in droppers}
    return ", ".join(sorted(places))


def _hooked(family: families.Family, dropper: Dropper) -> nn.Module | None:
    """The module in whose output a hidden, input or output site drops."""
    if dropper.site.position == "input":
        return family.model.get_input_embeddings()
    return family.layers[-1].block if dropper.layer is None else family.layers[dropper.layer].ffn_output


def _is_hooked(module: nn.Module | None, dropper: Dropper) -> bool:
    return module is not None and any(
        isinstance(hook, HiddenHook) and hook.dropper is dropper for hook in module._forward_hooks.values()
    )


def _refuse_checkpointing(model: nn.Module) -> None:
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise MethodError("gradient checkpointing replays torch's default generator only", hint="attach without a seed")


class Attachment:
    """A method at work on a model. A context manager: leaving it detaches."""

    def __init__(self, family: families.Family, method: Method, droppers: list[Dropper]) -> None:
        self.family = family
        self.method = method
        self.droppers = droppers
        self.backend: str | None = None  # the attention that was there, while hkft stands in for it
        self._handles: list[RemovableHandle] = []
        self._swapped: list[tuple[nn.ModuleDict, str]] = []

    @property
    def attached(self) -> bool:
        return getattr(self.family.model, _ATTACHMENT, None) is self

    def report(self) -> list[dict[str, Any]]:
        """What fired since attaching, one record a site: position, pattern, rescale, layers, calls (over all layers),
        expected and measured drop rate (means over the layers' masks; measured None before the first training pass, and
        for `lora_input`, whose masks PyTorch draws), and `modules`, how many places drop.

        The measured rate is that of the masks as drawn, before `attention.protect` gives a row back its last key.
        """
        return [self._report_of(number, site) for number, site in enumerate(self.method.sites)]

    def _report_of(self, number: int, site: Site) -> dict[str, Any]:
        mine = [d for d in self.droppers if d.number == number]
        drawn = sum(d.drawn for d in mine)
        dropped = sum(int(d.dropped) for d in mine if d.dropped is not None)
        return {
            "position": site.position,
            "pattern": site.pattern,
            "rescale": site.rescale,
            "layers": sorted({d.layer for d in mine if d.layer is not None}),
            "modules": len(mine),
            "calls": sum(d.calls for d in mine),
            "expected": sum(d.rate for d in mine) / len(mine) if mine else 0.0,
            "measured": dropped / drawn if drawn else None,
        }

    def detach(self) -> None:
        """Take everything off: hooks, state, the interface's entries. Harmless when already done."""
        if not self.attached:
            return
        for handle in self._handles:
            handle.remove()
        for dropouts, name in self._swapped:
            if name in dropouts:  # its adapter may have been deleted since
                dropouts[name] = nn.Identity()
        for layer in self.family.layers:
            layer.attention.__dict__.pop(_STATE, None)
        delattr(self.family.model, _ATTACHMENT)
        _LIVE.discard(self)
        if self.backend:
            _leave_interface(self)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A deep copy or an unpickled model is attached too: it needs the interface's entries for as long as it lives."""
        self.__dict__.update(state)
        _LIVE.add(self)
        if self.backend:
            _register()


_LIVE: weakref.WeakSet[Attachment] = weakref.WeakSet()


def attach(model: nn.Module, method: str | Method, rate: float | None = None, *, seed: int | None = None) -> Attachment:
    """Make `model` drop as `method` says, in train mode only.

    model: any transformers model that takes its attention from the AttentionInterface, bare, in PEFT's wrapper (attach
        after wrapping, so that LoRA's update is inside what is dropped), or inside a module of yours.
    method: a name of `METHODS` or a `Method`. rate: for every site without its own; 0.1 where neither says.
    seed: draw from generators of hkft's own. None, the default: from torch's default generator, which gradient
        checkpointing replays; a seed together with checkpointing is refused.

    A consistency loss is the loop's business: `hkft.Trainer` or `hkft.consistency_loss` add it.
    Raises MethodError: unknown method, a model already attached, a family or an attention backend hkft cannot act on.
    """
    method = method if isinstance(method, Method) else find(method)
    if rate is not None:
        method = method.with_rate(rate)
    family = families.find(model)
    if attached(family.model):
        raise MethodError(f"{type(family.model).__name__} already has a method", hint="detach() it first")
    if seed is not None:
        _refuse_checkpointing(family.model)
    attachment = Attachment(family, method, [])
    setattr(family.model, _ATTACHMENT, attachment)
    try:
        for number, site in enumerate(method.sites):
            _place(attachment, site, number, None if seed is None else seed + 1000 * number)
        if attachment.droppers:
            attachment._handles.append(model.register_forward_hook(ProofHook(attachment)))
        if any(site.position.startswith("attention_") for site in method.sites):
            _enter_interface(attachment)
    except BaseException:
        attachment.detach()
        raise
    _LIVE.add(attachment)
    return attachment


def attached(model: nn.Module) -> Attachment | None:
    """The attachment at work on a model, also on a deep copy of an attached one; None where there is none."""
    return next((found for m in model.modules() if (found := m.__dict__.get(_ATTACHMENT)) is not None), None)


def _place(attachment: Attachment, site: Site, number: int, seed: int | None) -> None:
    """Put one site's droppers where they belong."""
    family = attachment.family
    if site.position == "lora_input" and seed is not None:
        raise MethodError(
            "PEFT's dropout draws from torch's default generator: a seed cannot reach it",
            where="lora_input",
            hint="attach without a seed, after torch.manual_seed",
        )
    if site.position == "input" and family.model.config.is_encoder_decoder:
        raise MethodError(
            "an encoder-decoder embeds its inputs in two places", where="input", hint="use another position"
        )
    if site.position not in PER_LAYER:
        dropper = Dropper(site, number, None, site.rate_at(0, 1), seed)
        place = _hooked(family, dropper)
        assert place is not None
        if isinstance(place, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            raise MethodError(
                f"{type(family.model).__name__} embeds its inputs by a convolution, whose output is not [B,L,D]",
                where="input",
                hint="use another position",
            )
        attachment.droppers.append(dropper)
        attachment._handles.append(place.register_forward_hook(HiddenHook(dropper)))
        return
    chosen = family.chosen(cast("str | tuple[int, ...]", site.layers))
    for order, index in enumerate(chosen):
        layer = family.layers[index]
        own = None if seed is None else seed + index
        dropper = Dropper(site, number, index, site.rate_at(order, len(chosen)), own)
        if site.position == "hidden":
            if layer.ffn_output is None:
                raise MethodError(
                    f"the FFN output of {layer.name} is not certain to be that of one linear map: {layer.why}",
                    where="hidden",
                    hint="the attention positions work on this model",
                )
            hook = HiddenHook(dropper)
            attachment._handles.append(layer.ffn_output.register_forward_hook(hook))
            attachment._handles.append(layer.block.register_forward_pre_hook(hook.see, with_kwargs=True))
        elif site.position == "lora_input":
            _place_lora(attachment, layer, dropper)
            continue
        else:
            layer.attention.__dict__[_STATE] = dropper
        attachment.droppers.append(dropper)


def _place_lora(attachment: Attachment, layer: families.Layer, dropper: Dropper) -> None:
    """Set the rate of PEFT's own dropout in front of every A of a layer, exactly as `lora_dropout` would have."""
    found = False
    for module in layer.block.modules():
        dropouts = getattr(module, "lora_dropout", None)
        if not isinstance(dropouts, nn.ModuleDict):
            continue
        for name, current in dropouts.items():
            if not isinstance(current, nn.Identity):
                raise MethodError(
                    "the adapter already has a lora_dropout of its own",
                    hint="build it with lora_dropout=0.0, and let the method set the rate",
                )
            found = True
            own = replace(dropper, generators={})
            dropouts[name] = nn.Dropout(own.rate).train(module.training)
            attachment._swapped.append((dropouts, name))
            attachment.droppers.append(own)
            dropouts[name].register_forward_hook(CountHook(own))
    if not found:
        raise MethodError(
            f"lora_input drops in front of LoRA's A matrices, and {layer.name} has none",
            hint="wrap the model with peft.get_peft_model first",
        )


# --- transformers' two registries -------------------------------------------------------------------------------------


def _enter_interface(attachment: Attachment) -> None:
    """Route the model's attention through hkft, and prove that it goes there."""
    model = attachment.family.model
    current = model.config._attn_implementation or "eager"
    backend = current.removeprefix(_PREFIX)  # another model may share the configuration object
    if backend not in _BACKENDS:
        raise MethodError(
            f"the {backend} attention would bypass the method",
            where="attn_implementation",
            found=backend,
            allowed=", ".join(_BACKENDS),
            hint="model.set_attn_implementation('sdpa'), or load it with attn_implementation='sdpa'",
        )
    _register()
    attachment.backend = backend
    model.set_attn_implementation(_PREFIX + backend)
    wrong = [layer.name for layer in attachment.family.layers if _implementation(layer.attention) != _PREFIX + backend]
    if model.config._attn_implementation != _PREFIX + backend or wrong:
        raise MethodError(
            f"{type(model).__name__} does not let its attention be set",
            where=", ".join(wrong[:3]) or None,
            hint="it does not follow transformers' AttentionInterface",
        )


def _leave_interface(attachment: Attachment) -> None:
    assert attachment.backend is not None
    model = attachment.family.model
    if not any(other.family.model.config is model.config for other in _LIVE if other.backend):
        model.set_attn_implementation(attachment.backend)
    if not any(other.backend for other in _LIVE):
        for backend in _BACKENDS:
            AttentionInterface._global_mapping.pop(_PREFIX + backend, None)
            AttentionMaskInterface._global_mapping.pop(_PREFIX + backend, None)


def _register() -> None:
    """Enter both registries: an attention function without its mask function would see no mask at all."""
    for backend, function in (("sdpa", _attend_sdpa), ("eager", _attend_eager)):
        AttentionInterface.register(_PREFIX + backend, function)
        AttentionMaskInterface.register(_PREFIX + backend, AttentionMaskInterface()[backend])


def _implementation(module: nn.Module) -> str | None:
    config = getattr(module, "config", None)
    return getattr(config, "_attn_implementation", None)


def _attend_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> Any:
    return _attend(sdpa_attention_forward, module, query, key, value, attention_mask, **kwargs)


def _attend_eager(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> Any:
    return _attend(_eager(type(module)), module, query, key, value, attention_mask, **kwargs)


def _eager(kind: type[nn.Module]) -> Callable[..., Any]:
    """The family's own eager attention: the function of that name in the file that defines the attention class."""
    for base in kind.__mro__:
        found = getattr(sys.modules.get(base.__module__), "eager_attention_forward", None)
        if found is not None:
            return found
    raise MethodError(
        f"{kind.__name__} has no eager attention to fall back on", hint="load with attn_implementation='sdpa'"
    )


def _attend(
    own: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What the interface calls. query [B,H,Q,D], key and value [B,Hkv,K,D]; returns [B,Q,H,D], as the interface wants it.

    In eval mode, in a layer without a site, or at rate 0: the family's own attention, untouched.
    """
    dropper = module.__dict__.get(_STATE)
    if dropper is None or not module.training or not dropper.rate:
        return own(module, query, key, value, attention_mask, **kwargs)
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    causal = kwargs.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
    queries = query.shape[2]
    if attention_mask is None and causal and key.shape[2] > queries > 1:
        key, value = key[:, :, :queries], value[:, :, :queries]
    if (bias := kwargs.get("position_bias")) is not None:
        bias = bias[..., : key.shape[2]]
        attention_mask = create_position_bias_mask(bias, attention_mask, causal and queries > 1, query, key)
    elif attention_mask is not None:
        attention_mask = attention_mask[..., : key.shape[2]]
    out = _drop(dropper, query, key, value, attention_mask, causal and queries > 1, kwargs)
    return out.transpose(1, 2).contiguous(), None


def _drop(
    dropper: Dropper, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, kwargs: dict[str, Any]
) -> Tensor:
    """Draw a mask for this call, protect its rows, and take the cheapest form that computes the site exactly."""
    site, (B, H, Q, K) = dropper.site, (*q.shape[:3], k.shape[2])
    keep = dropper.draw((B, H, Q, K), (B, H, K), q.device)
    keep = keep if site.pattern == "element" else keep.unsqueeze(2)
    logits = site.position == "attention_logits" or site.rescale == "normalised_with_gradient"  # the same to the letter
    rescued = None
    if logits or site.rescale == "normalised":
        keep, rescued = attention.protect(keep, attention.allowed(mask), causal)
    scale, softcap, native = kwargs.get("scaling"), kwargs.get("softcap"), float(kwargs.get("dropout") or 0.0)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if logits and softcap is None:
        return attention.dropkey(
            q, k, v, keep, mask=mask, causal=causal, scale=scale, rescued=rescued, dropout_p=native
        )
    rescale = None if logits else site.rescale
    if softcap is None and rescale and keep.shape[2] == 1 and not native:
        return attention.dropattention(
            q, k, v, keep, mask=mask, causal=causal, scale=scale, rate=dropper.rate, rescale=rescale, rescued=rescued
        )
    return attention.explicit(
        q, k, v, keep, mask=mask, causal=causal and mask is None, scale=scale, rate=dropper.rate, rescale=rescale,
        rescued=rescued, softcap=softcap, dropout_p=native,
    )  # fmt: skip
