"""Curves of other tools beside runs of hkft's: what they tell of the gap, without seeds, settings and single rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hkft.diagnostics import foreign
from hkft.diagnostics.verdict import verdict
from hkft.errors import HkftError, UsageError
from hkft.folder import RunFolder

WRITTEN = (
    "comparison.json",
    "comparison.md",
    "comparison.tex",
    "comparison.csv",
    "report.html",
)  # beside runs, by a grid


@dataclass(frozen=True)
class Foreign:
    """One curve. Its gap is to the loss that was logged while learning, which is not measured as hkft's is."""

    label: str
    source: str
    best_loss: float
    final_loss: float
    final_gap: float
    verdict: str
    notes: tuple[str, ...]
    points: tuple[dict[str, Any], ...]


def told_apart(places: Sequence[str | Path]) -> tuple[list[Path], list[Foreign]]:
    """The run folders of hkft's among the places, and the curves. Raises UsageError for what is neither."""
    own, curves = [], []
    for place in map(Path, places):
        inside = [each for each in sorted(place.glob("*-s*")) if RunFolder(each).exists] if place.is_dir() else []
        if place.name in WRITTEN:
            continue
        if RunFolder(place).exists or not place.exists():
            own.append(place)
        elif inside:  # the folder of a grid
            own += inside
        else:
            curves.append(_read(place))
    return own, curves


def _read(place: Path) -> Foreign:
    try:
        found = foreign.read(place)
    except HkftError as error:
        if not place.is_dir() or not error.problems[0].message.startswith("no training curve is in this folder"):
            raise
        raise UsageError(
            "this is neither a run folder nor a curve of another tool",
            where=str(place),
            allowed="a folder that `hkft train` or `hkft compare` has written, a trainer_state.json, a table of losses",
        ) from error
    losses = [point.validation_loss for point in found.curve if math.isfinite(point.validation_loss)]
    last = found.curve[-1]
    name = place.parent.name if place.name == "trainer_state.json" and place.parent.name else place.name
    return Foreign(
        label=name,
        source=found.source,
        best_loss=min(losses, default=math.nan),
        final_loss=last.validation_loss,
        final_gap=last.validation_loss - last.train_loss,
        verdict=verdict(found.curve, metric=found.metric).name,
        notes=found.notes,
        points=tuple(
            {
                "step": point.step,
                "train_probe": {"loss": point.train_loss},
                "validation": {"loss": point.validation_loss},
            }
            for point in found.curve
        ),
    )
