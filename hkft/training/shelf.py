"""What runs of one process share: rows that are read and tokenised already, and the base model as it was loaded.

A run takes from the shelf what it would have made itself, bit for bit: the rows of one seed, a copy of the weights, and the
random stream where loading left it. So does the look at its test rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from hkft.evaluation.saved import Saved, examples_of
from hkft.events import Event, Listener, Notice, Sample
from hkft.model import build
from hkft.recipe import Recipe
from hkft.training.prepare import Material, prepare

SHARE = 0.25  # of the host's memory that is free, which a second copy of the weights may take


@dataclass
class Shelf:
    """Keeps the last of each kind: a grid goes seed by seed, and its rows are drawn with the seed. keeps: whether it does."""

    keeps: bool = True
    rows_of: dict[str, tuple[Hashable, Any, list[Event]]] = field(default_factory=dict)  # by kind
    base_of: tuple[Hashable, PreTrainedModel, Any] | None = None
    taken: dict[str, int] = field(
        default_factory=lambda: {"material": 0, "test": 0, "base": 0}
    )  # how often it was there

    def material(self, recipe: Recipe, tell: Listener) -> Material:
        """As `prepare`, with the notices told again."""
        key = _key(recipe, "task", "data", "model", "generation", "diagnostics.probe_size", "seed")
        return self._rows("material", key, lambda heard: prepare(recipe, heard), tell)

    def test_rows(self, saved: Saved, tell: Listener) -> Any:
        """As `examples_of(saved, "test")`."""
        key = (_key(saved.recipe, "task", "data", "model", "generation", "seed"), saved.labels)
        return self._rows("test", key, lambda heard: examples_of(saved, "test", heard), tell)

    def _rows(self, kind: str, key: Hashable, make: Callable[[Listener], Any], tell: Listener) -> Any:
        if kind in self.rows_of and self.rows_of[kind][0] == key:
            _, made, told = self.rows_of[kind]
            self.taken[kind] += 1
            for event in told:
                tell(event)
            return made
        told = []

        def heard(event: Event) -> None:
            if isinstance(event, Notice | Sample):
                told.append(event)
            tell(event)

        made = make(heard)
        if self.keeps:
            self.rows_of[kind] = (key, made, told)
        return made

    def base(self, recipe: Recipe, labels: Sequence[str] | None, pad_token_id: int | None = None) -> PreTrainedModel:
        """As `build.base`. Quantised weights, and those that free memory would not hold twice, are loaded anew."""
        key = (_key(recipe, "task", "model", "seed"), labels, pad_token_id)
        if self.base_of and self.base_of[0] == key:
            self.taken["base"] += 1
            torch.set_rng_state(self.base_of[2])
            return copy.deepcopy(self.base_of[1]).to(build.device(recipe.model.device))  # type: ignore[arg-type]
        self.base_of = None
        made = build.base(recipe, labels, pad_token_id)
        if self.keeps and recipe.model.quantization == "none" and _fits_twice(made):
            self.base_of = (key, copy.deepcopy(made).cpu(), torch.get_rng_state())
        return made


def _key(recipe: Recipe, *wanted: str) -> Hashable:
    values = recipe.values()
    found = []
    for name in wanted:
        section, _, key = name.partition(".")
        found.append(repr(values[section][key] if key else values[section]))
    return tuple(found)


def _fits_twice(model: PreTrainedModel) -> bool:
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return size <= SHARE * psutil.virtual_memory().available
