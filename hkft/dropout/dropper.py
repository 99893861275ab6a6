"""One site in one layer: it draws masks, applies them from a hook, and counts what it did.

The attention positions call their Dropper from `interface`; all others are forward hooks on the module whose output (for
`lora_input`, whose input) is dropped in. A hook acts in train mode only, and at a rate above 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hkft.dropout.hidden import hiddencut
from hkft.dropout.masks import PATTERNS, uniform
from hkft.dropout.method import LORA, Site
from hkft.errors import MethodError

_MEASURED = 32  # calls whose masks are counted in full; after them every 16th


@dataclass
class Dropper:
    """Draws masks at its rate. `counts`: compiled calls, elements drawn and dropped, rows and protected rows."""

    site: Site
    number: int  # of the site in its method
    layer: int | None
    rate: float
    seed: int | None = None
    due: bool = False  # its layer ran in this pass of the model
    fired: bool = False  # and it drew a mask
    calls: int = 0
    counts: Tensor | None = None
    tap: Callable[[Tensor, Tensor], None] | None = None  # is shown the logits and which are dropped: see `noise`
    likely: Tensor | None = None  # [B,L], where a span may start: what the layer's attention told, once for each pass
    generators: dict[str, torch.Generator] = field(default_factory=dict)
    begins: Callable[[], None] | None = None  # is called before a mask is drawn: see `prefix`

    def draw(self, full: Sequence[int], units: Sequence[int], device: torch.device) -> Tensor:
        """A keep-mask of the site's pattern: shape `full` for elements, `units` for columns and spans."""
        if self.begins:
            self.begins()
        draw, pattern = uniform(device, self._generator(device)), PATTERNS[self.site.pattern]
        if self.site.start == "uniform":
            return pattern(full, units, self.rate, draw)
        if self.likely is None:
            raise MethodError(
                "the layer's attention told nothing of where a span may start",
                where=f"layer {self.layer}",
                hint="attention and FFN are both to be in train mode, and to run once each",
            )
        likely, self.likely = self.likely[..., -units[-1] :], None  # a prefix has keys, and no tokens
        return pattern(full, units, self.rate, draw, likely)

    def count(self, keep: Tensor, protected: Callable[[], Tensor] | None = None) -> None:
        """Note one call, its mask as drawn, and, at an attention position, in which of all rows the protective rule acted."""
        self.fired = True
        compiled = torch.compiler.is_compiling()  # a number of Python's that changes would be compiled anew each time
        if not compiled:
            self.calls += 1
            if self.calls > _MEASURED and self.calls % 16:
                return
        dropped = keep.numel() - torch.count_nonzero(keep)
        rows = None if protected is None else protected()
        of_rows = [0, 0] if rows is None else [torch.count_nonzero(rows), rows.numel()]
        numbers = [int(compiled), keep.numel(), dropped, *of_rows]
        # `full`, since `as_tensor` would bake the sizes of this batch into what is compiled
        kind = {"dtype": torch.int64, "device": keep.device}
        now = torch.stack([n.to(**kind) if isinstance(n, Tensor) else torch.full((), n, **kind) for n in numbers])
        self.counts = now if self.counts is None else self.counts.to(now.device) + now  # stays there: no wait

    def counted(self) -> dict[str, int]:
        """The counts so far, by name."""
        compiled, *rest = [0] * 5 if self.counts is None else self.counts.tolist()
        return dict(
            zip(("calls", "drawn", "dropped", "protected", "rows"), (self.calls + compiled, *rest), strict=True)
        )

    def _generator(self, device: torch.device) -> torch.Generator | None:
        if self.seed is None:
            return None
        if str(device) not in self.generators:
            self.generators[str(device)] = torch.Generator(device).manual_seed(self.seed)
        return self.generators[str(device)]

    def __getstate__(self) -> dict[str, Any]:
        """For deepcopy and pickle, which cannot take a generator: the copy starts its own from the seed."""
        return {**self.__dict__, "generators": {}}


class DropHook:
    """Forward hook: drops in a module's output, a tensor [..., D] or a tuple that begins with one.

    A unit of `hidden`, `input` and `output` is a token; a unit of the LoRA positions is a feature, the same for all tokens.
    """

    def __init__(self, dropper: Dropper) -> None:
        self.dropper = dropper
        self.batch: int | None = None

    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the layer runs: its batch size, for a family (OPT) whose FFN sees the tokens of all rows as [B*L,D]."""
        x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        self.batch = len(x) if x.dim() > 2 else None

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """As a forward pre-hook: drops in the first argument instead."""
        if not module.training or not self.dropper.rate:
            return None
        return (self._drop(args[0]), *args[1:])

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not module.training or not self.dropper.rate:
            return None
        if isinstance(output, tuple):
            return (self._drop(output[0]), *output[1:])
        return self._drop(output)

    def _drop(self, x: Tensor) -> Tensor:
        site = self.dropper.site
        assert site.rescale is not None
        if site.position in LORA:
            keep = self.dropper.draw(x.shape, x.shape[-1:], x.device)
            self.dropper.count(keep)
            keep = keep.view(*([1] * (x.dim() - keep.dim())), *keep.shape)
            return hiddencut(x, keep, self.dropper.rate, site.rescale)
        batch = len(x) if x.dim() > 2 else self.batch
        if batch is None and site.pattern == "span":
            raise MethodError(
                "this model has the tokens of all samples in one row, and a span would run across them",
                where=f"pattern of {site.position}",
                found="span",
                allowed="element, column",
            )
        tokens = x.reshape(batch or 1, -1, x.shape[-1])
        keep = self.dropper.draw(tokens.shape, tokens.shape[:-1], x.device)
        self.dropper.count(keep)
        if site.pattern != "element":
            keep = keep.unsqueeze(-1)
        return hiddencut(tokens, keep, self.dropper.rate, site.rescale).view(x.shape)


class CountHook:
    """Forward hook on PEFT's own dropout module: counts its calls. PyTorch draws the mask, so its rate is not measured."""

    def __init__(self, dropper: Dropper) -> None:
        self.dropper = dropper

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not module.training or not self.dropper.rate:
            return
        if self.dropper.begins:
            self.dropper.begins()
        self.dropper.count(output.new_empty(0, dtype=torch.bool))
