"""transformers' attention registries: how a layer's attention comes to hkft, and what it does with it there.

A function stands in AttentionInterface and its mask function in AttentionMaskInterface, under hkft's own names, for as long
as any attachment lives. Both are stateless: what a layer drops stands on its own attention module, so two models with two
methods, or a deep copy, share nothing. In eval mode everything hands over to the family's own attention.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import create_position_bias_mask, repeat_kv, sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from hkft.dropout import attention
from hkft.dropout.dropper import Dropper
from hkft.dropout.families import Family, Layer, source
from hkft.dropout.hidden import most_attended
from hkft.dropout.padding_free import FLAT, row_lengths, rows
from hkft.dropout.protect import allowed, given_back, protect
from hkft.errors import MethodError

SITE = "_hkft_site"  # on an attention module: the Dropper of its own position
GUIDE = "_hkft_guide"  # on an attention module: the Dropper whose spans begin at tokens that this attention looks at
_BACKENDS = ("sdpa", "eager")  # what hkft can stand in for
PREFIX = "hkft_"

Backends = list[tuple[PreTrainedConfig, str | None]]


def enter(family: Family) -> Backends:
    """Route the model's attention through hkft, prove that it goes there, and return the backends that were there.

    Raises MethodError for a backend that would bypass the method, or a model that does not let its attention be set.
    """
    model, before = family.model, _backends(family.model)
    for layer in family.layers:
        _refuse_backend(layer)
    register()
    model.set_attn_implementation(PREFIX + (implementation(family.layers[0].attention) or "eager").removeprefix(PREFIX))
    if is_hkfts(model.config._attn_implementation):  # else the model does not let it be set
        _write([(config, _hkfts(backend)) for config, backend in before])
    wrong = [layer.name for layer in family.layers if not is_hkfts(implementation(layer.attention))]
    if wrong:
        give_back(before)
        raise MethodError(
            f"{type(model).__name__} does not let its attention be set",
            where=", ".join(wrong[:3]),
            hint="it does not follow transformers' AttentionInterface",
        )
    return before


def give_back(before: Backends, shared: frozenset[int] = frozenset()) -> None:
    """The backends that were there, wherever hkft's is still named: what somebody set since is theirs.

    shared: identities of configurations that another model with a method has, too.
    """
    now = [(config, config._attn_implementation) for config, _ in before]
    ours = [is_hkfts(backend) and id(config) not in shared for config, backend in now]
    _write([own if mine else there for own, there, mine in zip(before, now, ours, strict=True)])


@contextmanager
def left(before: Backends) -> Iterator[None]:
    """For a while the model's own attention, then what was there again."""
    now = [(config, config._attn_implementation) for config, _ in before]
    give_back(before)
    try:
        yield
    finally:
        _write(now)


def is_hkfts(backend: str | None) -> bool:
    return (backend or "").startswith(PREFIX)


def _write(backends: Backends) -> None:
    """Outer configurations first: each hands its backend on to those within, which then get their own."""
    for config, backend in backends:
        config._attn_implementation = backend


def unregister() -> None:
    """Take hkft's names out of both registries."""
    for backend in _BACKENDS:
        AttentionInterface._global_mapping.pop(PREFIX + backend, None)
        AttentionMaskInterface._global_mapping.pop(PREFIX + backend, None)


def register() -> None:
    """Enter both registries: an attention function without its mask function would see no mask at all."""
    for backend, function in (("sdpa", _attend_sdpa), ("eager", _attend_eager)):
        AttentionInterface.register(PREFIX + backend, function)
        own = AttentionMaskInterface()[backend]
        AttentionMaskInterface.register(PREFIX + backend, partial(_one_row, own))


def _one_row(own: Callable[..., Any], *args: Any, mask_function: Any = causal_mask_function, **kwargs: Any) -> Any:
    """The backend's own mask; of an encoder's padding [B,1,Q,K], one row is stored that all queries share (stride 0)."""
    if mask_function is bidirectional_mask_function:
        mask_function = _any_key
    return own(*args, mask_function=mask_function, **kwargs)


def _any_key(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return key >= 0


def implementation(module: nn.Module) -> str | None:
    """The attention backend that a module's configuration names."""
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


def _backends(model: PreTrainedModel) -> Backends:
    """Every configuration of the model, an outer one before those within it, and its backend without hkft."""
    waiting = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    found: dict[int, PreTrainedConfig] = {}
    for config in waiting:
        if id(config) not in found:
            found[id(config)] = config
            inner = [getattr(config, key, None) for key in config.sub_configs]
            waiting.extend(each for each in inner if each is not None)
    backends = [(config, config._attn_implementation) for config in found.values()]
    # another model may share a configuration, and have brought hkft there
    return [(config, backend and backend.removeprefix(PREFIX)) for config, backend in backends]


def _hkfts(backend: str | None) -> str | None:
    """hkft's name in the place of a backend that it can stand in for; another stays as it is."""
    return PREFIX + (backend or "eager") if (backend or "eager") in _BACKENDS else backend


def _refuse_backend(layer: Layer) -> None:
    backend = (implementation(layer.attention) or "eager").removeprefix(PREFIX)
    if backend not in _BACKENDS:
        raise MethodError(
            f"the {backend} attention would bypass the method",
            where="attn_implementation",
            found=backend,
            allowed=", ".join(_BACKENDS),
            hint="model.set_attn_implementation('sdpa'), or load it with attn_implementation='sdpa'",
        )
    if backend == "eager" and getattr(layer.attention, "reorder_and_upcast_attn", False):
        raise MethodError(
            "eager attention in float32 (reorder_and_upcast_attn) is not computed as the model's own",
            where=layer.name,
            hint="model.set_attn_implementation('sdpa')",
        )


def _attend_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> Any:
    lengths = row_lengths(query, key, attention_mask, kwargs) if FLAT in module.__dict__ else None
    if lengths is None:
        return _attend(sdpa_attention_forward, module, query, key, value, attention_mask, **kwargs)
    q, k, v = (rows(x, lengths) for x in (query, key, value))
    out, _ = _attend(sdpa_attention_forward, module, q, k, v, None, **kwargs)
    return torch.cat([row[:length] for row, length in zip(out, lengths, strict=True)]).unsqueeze(0), None


def _attend_eager(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> Any:
    if attention_mask is None:  # an eager decoder is always given a mask, and eager attention reads nothing else
        kwargs["is_causal"] = False
    return _attend(_eager(type(module)), module, query, key, value, attention_mask, **kwargs)


def _eager(kind: type[nn.Module]) -> Callable[..., Any]:
    """The family's own eager attention: the function that the attention's forward names, from the file of the class."""
    named = re.search(r"\w*eager_attention_forward", source(kind))
    for base in kind.__mro__:
        found = getattr(sys.modules.get(base.__module__), named[0] if named else "eager_attention_forward", None)
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
) -> tuple[Tensor, Tensor | None]:
    """What the interface calls. query [B,H,Q,D], key and value [B,Hkv,K,D]; returns [B,Q,H,D], as the interface wants it.

    In eval mode, in a layer without a site, or at rate 0: the family's own attention, untouched.
    """
    dropper, guide = (module.__dict__.get(name) for name in (SITE, GUIDE))
    if not module.training or not any(each and each.rate for each in (dropper, guide)):
        return own(module, query, key, value, attention_mask, **kwargs)
    if (
        dropper
        and dropper.site.pattern == "span"
        and FLAT in module.__dict__
        and len(query) == 1
        and attention_mask is not None
    ):
        raise MethodError(
            "this model's attention does not tell rows laid end to end apart, and a span would run across them",
            where=f"pattern of {dropper.site.position}",
            found="span",
            allowed="element, column",
        )
    groups = query.shape[1] // key.shape[1]
    q, k, v, mask = query, repeat_kv(key, groups), repeat_kv(value, groups), attention_mask
    causal = kwargs.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
    queries = q.shape[2]
    if mask is None and causal and k.shape[2] > queries > 1:
        k, v = k[:, :, :queries], v[:, :, :queries]
    causal = causal and queries > 1
    if (bias := kwargs.get("position_bias")) is not None:
        mask = create_position_bias_mask(bias[..., : k.shape[2]], mask, causal, q, k)
    elif mask is not None:
        mask = mask[..., : k.shape[2]]
    scale = kwargs.get("scaling")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if guide and guide.rate:
        if guide.begins:
            guide.begins()  # what is told here is told in every pass
        guide.likely = most_attended(q, k, mask=mask, scale=scale, softcap=kwargs.get("softcap"))
    if not dropper or not dropper.rate:
        return own(module, query, key, value, attention_mask, **kwargs)
    native = float(kwargs.get("dropout") or 0.0)
    out = _drop(dropper, q, k, v, mask, causal, scale, kwargs.get("softcap"), native)
    return out.transpose(1, 2).contiguous(), None


def _drop(
    dropper: Dropper,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float | None,
    native: float,
) -> Tensor:
    """Draw a mask for this call, protect its rows, and take the cheapest form that computes the site exactly."""
    site, (B, H, Q, K) = dropper.site, (*q.shape[:3], k.shape[2])
    drawn = dropper.draw((B, H, Q, K), (B, H, K), q.device)
    drawn = keep = drawn if site.pattern == "element" else drawn.unsqueeze(2)
    logits = site.position == "attention_logits" or site.rescale == "normalised_with_gradient"  # the same to the letter
    rescued, acted = None, None
    if logits or site.rescale == "normalised":
        may = allowed(mask)
        keep, rescued = protect(drawn, may, causal, site.protect)
        acted = partial(given_back, drawn, keep, rescued, may, Q)
    dropper.count(drawn, acted)
    rescale = None if logits else site.rescale
    given = {"mask": mask, "causal": causal, "scale": scale, "rescued": rescued}
    if logits and softcap is None and not dropper.tap:
        out = attention.dropkey(q, k, v, keep, **given, dropout_p=native)
    elif softcap is None and rescale and keep.shape[2] == 1 and not native and not dropper.tap:
        out = attention.dropattention(q, k, v, keep, **given, rate=dropper.rate, rescale=rescale)
    else:
        given["causal"] = causal and mask is None
        out = attention.explicit(
            q, k, v, keep, **given, rate=dropper.rate, rescale=rescale, softcap=softcap, dropout_p=native, tap=dropper.tap
        )  # fmt: skip
    if acted and site.protect == "none":
        return out.masked_fill(acted(), 0)  # a row that lost every key attends to nothing
    return out
