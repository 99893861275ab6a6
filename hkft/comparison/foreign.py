"""Curves of other tools beside runs of hkft's: what they tell of the gap, without seeds, settings and single rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hkft.diagnostics import foreign
from hkft.diagnostics.verdict import verdict
from hkft.errors import HkftError, UsageError
from hkft.folder import RunFolder


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
        if place.exists() and not RunFolder(place).exists:
            curves.append(_read(place))
        else:
            own.append(place)
    return own, curves


def _read(place: Path) -> Foreign:
    try:
        found = foreign.read(place)
    except HkftError as error:
        if place.is_dir():
            raise UsageError(
                "this is neither a run folder nor a folder with a trainer_state.json",
                where=str(place),
                allowed="a folder that `hkft train` has written, or a curve of another tool",
            ) from error
        raise
    losses = [point.validation_loss for point in found.curve]
    last = found.curve[-1]
    name = place.parent.name if place.name == "trainer_state.json" and place.parent.name else place.name
    return Foreign(
        label=name,
        source=found.source,
        best_loss=min(losses),
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
