"""A dropout method is data: a set of sites, and how two views of one batch are kept consistent.

The framework (paper section 3): *position* x *pattern* x *compensation*.

    position           dropped tensor                                          element     column      span
    attention_logits   g, scaled and masked logits, before the softmax         [B,H,Q,K]   [B,H,1,K]   [B,H,1,K]
    attention_weights  w = softmax(g)                                          [B,H,Q,K]   [B,H,1,K]   [B,H,1,K]
    hidden             FFN output, before the residual                         [B,L,D]     [B,L,1]     [B,L,1]
    input              token embeddings                                        [B,L,D]     [B,L,1]     [B,L,1]
    output             output of the last layer                                [B,L,D]     [B,L,1]     [B,L,1]

and, beyond the paper, on the update B A x that LoRA adds to a linear map:

    lora_input         x; as a column, whole columns of A                      [B,L,in]    [in]
    lora_rank          A x; as a column, whole rank dimensions                 [B,L,r]     [r]
    lora_output        B A x; as a column, whole rows of B                     [B,L,out]   [out]

Compensation is a site's `rescale` and the method's `consistency`. The methods that have a name are in `named`.

Sources: Wang et al., arXiv 2403.00812 (the paper); DropKey, 2208.02646; DropAttention, 1907.11065; HiddenCut, 2106.00149;
R-Drop, 2106.14448; LoRA Dropout, 2404.09610; DropLoRA, 2508.17337. This module imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from hkft.errors import MethodError, nearest

Position = Literal[
    "attention_logits", "attention_weights", "hidden", "input", "output", "lora_input", "lora_rank", "lora_output"
]
Pattern = Literal["element", "column", "span"]
Rescale = Literal["none", "inverse_keep", "normalised", "normalised_with_gradient"]
Schedule = Literal["constant", "linear_up", "linear_down"]
Start = Literal["uniform", "attended"]
Protect = Literal["first_key", "row", "none"]
Kind = Literal["kl", "js", "js_symmetric"]

DEFAULT_RATE = 0.1
LORA = ("lora_input", "lora_rank", "lora_output")
PER_LAYER = ("attention_logits", "attention_weights", "hidden", *LORA)

# What each position may do with what it kept, its own paper's choice first: the default.
RESCALES: dict[Position, tuple[Rescale, ...]] = {
    "attention_logits": ("none",),  # the softmax that follows renormalises
    "attention_weights": ("normalised", "normalised_with_gradient", "inverse_keep", "none"),
    "hidden": ("none", "inverse_keep"),
    "input": ("none", "inverse_keep"),
    "output": ("none", "inverse_keep"),
    "lora_input": ("inverse_keep", "none"),
    "lora_rank": ("inverse_keep", "none"),
    "lora_output": ("inverse_keep", "none"),
}


def check_rate(rate: float, where: str = "rate") -> None:
    """Raise MethodError unless `rate` is a probability below 1."""
    fine = isinstance(rate, int | float) and not isinstance(rate, bool) and 0 <= rate < 1
    _refuse(not fine, "a dropout rate is a probability", where, repr(rate), "0 <= rate < 1")


def one_of(where: str, value: Any, choices: Any) -> None:
    """Raise MethodError unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        hint = nearest(str(value), choices)
        raise MethodError(f"there is no {where} {value!r}", where=where, allowed=", ".join(choices), hint=hint)


@dataclass(frozen=True)
class Site:
    """One place where a model drops.

    position, pattern: a row and a column of the table above.
    rate: probability in [0, 1) that an element, a key or a token is dropped; None takes the method's rate.
    layers: "auto" (all layers of an encoder, the latter half of a decoder, as the paper found best), "all", "latter-half", or
        layer numbers from 0. Ignored by `input` and `output`, which have one place each.
    rescale: "none"; "inverse_keep", kept values times 1/(1-rate); "normalised", weights divided by their kept mass with
        the gradient stopped there (DropAttention), or not ("normalised_with_gradient"). None takes the position's own.
    schedule: "constant", or a rate that falls or grows linearly with depth over the chosen layers, with `rate` as its
        largest value ("linear_down": DropKey's own finding in vision).
    start: where a span of `hidden` begins: "uniform", or at one of the 40 % of tokens that the layer's attention looks at
        most ("attended", as in HiddenCut).
    protect: what an attention row keeps that a mask would leave without any key. "first_key": in causal attention the first
        attended key is never dropped, elsewhere such a row keeps all; "row": such a row keeps all, in causal attention too;
        "none": it attends to nothing, its output is 0. Without a softmax or a division after the drop there is nothing to
        protect ("inverse_keep" and "none" of `attention_weights`).
    Raises MethodError on a value outside these.
    """

    position: Position
    pattern: Pattern = "element"
    rate: float | None = None
    layers: str | Sequence[int] = "auto"
    rescale: Rescale | None = None
    schedule: Schedule = "constant"
    start: Start = "uniform"
    protect: Protect = "first_key"

    def __post_init__(self) -> None:
        named = {"position": Position, "pattern": Pattern, "schedule": Schedule, "start": Start, "protect": Protect}
        for name, choices in named.items():
            one_of(name, getattr(self, name), get_args(choices))
        if self.rate is not None:
            check_rate(self.rate)
        features = f"the features of {self.position} have no order, so a run of them means nothing"
        _refuse(self.position in LORA and self.pattern == "span", features, "pattern", self.pattern, "element, column")
        astray = self.start == "attended" and (self.position, self.pattern) != ("hidden", "span")
        found = f"attended, for {self.position}/{self.pattern}"
        _refuse(astray, "only a span of hidden tokens begins at an attended one", "start", found, "uniform")
        unprotected = self.protect != "first_key" and not self.position.startswith("attention_")
        found = f"{self.protect}, for {self.position}"
        _refuse(unprotected, "only rows of attention are protected", "protect", found, "first_key")
        possible = RESCALES[self.position]
        if self.rescale is None:
            object.__setattr__(self, "rescale", possible[0])
        impossible = f"{self.position} cannot be rescaled this way"
        _refuse(self.rescale not in possible, impossible, "rescale", str(self.rescale), ", ".join(possible))
        if isinstance(self.layers, str):
            one_of("layers", self.layers, ("auto", "all", "latter-half"))
        else:
            object.__setattr__(self, "layers", _numbers(self.layers))

    def rate_at(self, index: int, count: int) -> float:
        """The rate in the `index`-th of the `count` layers chosen, both counted from the input."""
        rate = DEFAULT_RATE if self.rate is None else self.rate
        if self.schedule == "linear_up":
            return rate * (index + 1) / count
        if self.schedule == "linear_down":
            return rate * (count - index) / count
        return rate


@dataclass(frozen=True)
class Consistency:
    """A second view of the batch, and how far the first may be from it (the paper's framework).

    kind: "kl", the two-way KL of two passes under different masks (the paper's KL, R-Drop's loss); "js", what the paper
        calls JS: KL from the dropped-out pass to the clean one; "js_symmetric", HiddenCut's Jensen-Shannon divergence.
    weight: factor of the term. The term itself is a mean over examples (over completion tokens in generation), so that
        it does not depend on the batch size.
    gradient: "one": through one pass, as in the paper (about half again the time of plain LoRA); "both": as in R-Drop.
    """

    kind: Kind = "kl"
    weight: float = 1.0
    gradient: Literal["one", "both"] = "one"

    def __post_init__(self) -> None:
        one_of("kind", self.kind, get_args(Kind))
        one_of("gradient", self.gradient, ("one", "both"))
        number = isinstance(self.weight, int | float) and not isinstance(self.weight, bool)
        fine = number and 0 <= self.weight < float("inf")
        _refuse(not fine, "weight is a number from 0", "weight", repr(self.weight))


@dataclass(frozen=True)
class Method:
    """Sites and a consistency loss. `Method()` is plain training. summary: one line for `hkft methods`."""

    sites: Sequence[Site] = ()
    consistency: Consistency | None = None
    name: str = "custom"
    summary: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", tuple(self.sites))
        attention = [site.position for site in self.sites if site.position.startswith("attention_")]
        same = "one attention site at a time: DropKey and DropAttention of one mask are the same forward (paper Eq. 13)"
        _refuse(len(attention) > 1, same, "sites", ", ".join(attention))

    @property
    def active(self) -> bool:
        """Whether anything is dropped. If not, two passes are equal, and the consistency term is exactly 0.

        A consistency loss without a site is R-Drop on dropout that the model has of its own: taken as active.
        """
        return any(site.rate != 0 for site in self.sites) or (self.consistency is not None and not self.sites)

    @property
    def passes(self) -> int:
        """Forward passes of a training step."""
        return 2 if self.consistency and self.consistency.weight and self.active else 1

    def with_rate(self, rate: float) -> Method:
        """This method with `rate` at every site that names none of its own."""
        check_rate(rate)
        return replace(self, sites=tuple(s if s.rate is not None else replace(s, rate=rate) for s in self.sites))

    def with_weight(self, weight: float) -> Method:
        """This method with another weight of its consistency loss, where it has one."""
        return replace(self, consistency=self.consistency and replace(self.consistency, weight=weight))

    def as_dict(self) -> dict[str, Any]:
        """The full record, as a recipe's `dropout` section writes it."""
        record = asdict(self)
        del record["summary"]
        record["sites"] = [{**site, "layers": _plain(site["layers"])} for site in record["sites"]]
        return record


def _plain(layers: str | Sequence[int]) -> str | list[int]:
    return layers if isinstance(layers, str) else list(layers)


def _numbers(layers: Any) -> tuple[int, ...]:
    """A list of layers as a tuple. Raises MethodError where one is no whole number from 0, or stands twice."""
    numbers = tuple(layers) if isinstance(layers, Sequence) else ()
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers)
    fine = numbers and whole and len(set(numbers)) == len(numbers)
    found, allowed = repr(list(numbers) or layers), "auto, all, latter-half, or a list such as [0, 1, 2]"
    _refuse(not fine, "layers are different whole numbers from 0", "layers", found, allowed)
    return numbers


def _refuse(wrong: bool, message: str, where: str, found: str, allowed: str | None = None) -> None:
    if wrong:
        raise MethodError(message, where=where, found=found, allowed=allowed)
