"""The methods that have a name: in recipes, in `hkft methods`, in `hkft compare`. A new one is one entry of `METHODS`.

The paper's own are dropkey to hiddenkey; the others are its controls. Sources: the head of `method`. No torch here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

from hkft.dropout.method import Consistency, Method, Pattern, Site, one_of

_DROPKEY = Site("attention_logits", "column")
_HIDDENCUT = Site("hidden", "element", rescale="inverse_keep")
_LORA_DROPOUT = Site("lora_input", layers="all")

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method([], None, "none", "plain LoRA, no dropout: the baseline"),
        Method(
            [_LORA_DROPOUT],
            name="lora-dropout",
            summary="dropout on the input of LoRA's A matrices, as PEFT's lora_dropout does",
        ),
        Method([_DROPKEY], name="dropkey", summary="whole keys hidden from every query of a head, before the softmax"),
        Method(
            [Site("attention_weights", "column")],
            name="dropattention",
            summary="whole keys' attention weights dropped after the softmax, the rest renormalised",
        ),
        Method(
            [_HIDDENCUT], name="hiddencut", summary="elements of the FFN output dropped, the rest scaled by 1/(1-p)"
        ),
        Method([_DROPKEY, _HIDDENCUT], name="hiddenkey-", summary="column DropKey and element HiddenCut together"),
        Method(
            [_DROPKEY, _HIDDENCUT],
            Consistency("kl"),
            name="hiddenkey",
            summary="HiddenKey- and a KL loss between two passes: the paper's best, about 1.5 x the time",
        ),
        Method(
            [Site("hidden", "span", start="attended")],
            Consistency("js_symmetric", gradient="both"),
            name="hiddencut-span",
            summary="HiddenCut as first published: a span that begins at an attended token, and its JS loss",
        ),
        Method(
            [_LORA_DROPOUT],
            Consistency("kl", gradient="both"),
            name="r-drop",
            summary="R-Drop: LoRA's ordinary dropout, and a KL loss that trains through both passes",
        ),
        Method(
            [Site("lora_input", "column", layers="all"), Site("lora_output", "column", layers="all")],
            name="lora-matrix-dropout",
            summary="Lin et al.'s LoRA Dropout: whole columns of A and rows of B",
        ),
        Method(
            [Site("lora_rank", "column", layers="all")],
            name="droplora",
            summary="whole rank dimensions between A and B",
        ),
    )
}


def find(name: str) -> Method:
    """The named method; `dropkey/span` is a method of one site in another pattern. Raises MethodError with the nearest name."""
    if not isinstance(name, str) or "/" not in name:
        one_of("method", name, METHODS)
        return METHODS[name]
    base, _, pattern = name.partition("/")
    one_of("method of one site", base, [each for each, method in METHODS.items() if len(method.sites) == 1])
    one_of("pattern", pattern, get_args(Pattern))
    method = METHODS[base]
    (site,) = method.sites
    if site.pattern == pattern:
        return method
    changed = [replace(site, pattern=pattern)]
    return Method(changed, method.consistency, name, f"{base} with the pattern {pattern}")
