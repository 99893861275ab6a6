"""Run folders -> finished runs -> groups of equal settings.

Two runs are of one group where nothing in their resolved recipes differs but the seed and the device. A group is named
by its method, and by the settings that vary among the runs of that method: `dropkey`, `dropkey p=0.2`, `none lora.r=4`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hkft.errors import UsageError
from hkft.folder import RunFolder, open_run, read_json
from hkft.recipe.text import parse

NOT_SETTINGS = ("seed", "model.device")  # what is repeated, and where it ran
LONGEST = 24  # characters of a value in a label


@dataclass(frozen=True)
class Run:
    """A finished run, as its folder tells it. settings: every resolved value of its recipe, by dotted key."""

    folder: Path
    summary: Mapping[str, Any]
    settings: Mapping[str, Any]
    data: Mapping[str, str]  # split -> fingerprint
    device: str

    @property
    def method(self) -> str:
        return self.summary["method"]

    @property
    def seed(self) -> int:
        return self.summary["seed"]

    @property
    def seconds(self) -> float:
        """Of training, looks apart."""
        return float(self.summary["train_runtime_s"])

    def curve(self) -> list[dict[str, Any]]:
        """The looks of `metrics.jsonl`."""
        return RunFolder(self.folder).records("eval")


@dataclass(frozen=True)
class Group:
    """Runs of one method with one setting, by seed. settings: those that vary among the runs of the method."""

    label: str
    method: str
    settings: Mapping[str, Any]
    runs: dict[int, Run] = field(default_factory=dict)

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(sorted(self.runs))

    @property
    def first(self) -> Run:
        return self.runs[self.seeds[0]]


def finished(folders: Sequence[str | Path]) -> tuple[list[Run], list[str]]:
    """The finished runs among the folders, and a sentence for each of the others.

    Raises UsageError where a folder holds no run, and where none is finished.
    """
    runs, left_out = [], []
    for folder in {Path(folder).resolve(): open_run(folder) for folder in folders}.values():
        if folder.status == "finished":
            runs.append(_read(folder))
        else:
            left_out.append(f"{folder.path} is left out: {folder.status or 'begun'}, not finished")
    if not runs:
        raise UsageError("there is no finished run to compare", found="; ".join(left_out) or None)
    return runs, left_out


def grouped(runs: Sequence[Run]) -> tuple[dict[str, Group], list[str]]:
    """label -> group, in the order of the runs; and a sentence for each run that repeats another."""
    varying = {method: differing([run for run in runs if run.method == method]) for method in {r.method for r in runs}}
    groups: dict[str, Group] = {}
    repeated = []
    for run in runs:
        settings = {key: run.settings.get(key) for key in varying[run.method]}
        label = " ".join([run.method, *(_setting(key, value) for key, value in settings.items())])
        group = groups.setdefault(label, Group(label, run.method, settings))
        if run.seed in group.runs:
            repeated.append(f"{run.folder} is left out: {label}, seed {run.seed} is there already")
        group.runs.setdefault(run.seed, run)
    return groups, repeated


def differing(runs: Sequence[Run]) -> list[str]:
    """The settings in which these runs differ."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    return [key for key in keys if any(run.settings.get(key) != runs[0].settings.get(key) for run in runs)]


def _read(folder: RunFolder) -> Run:
    environment = read_json(folder.environment)
    resolved = parse(folder.resolved.read_text(encoding="utf-8"), str(folder.resolved)).value
    settings = {key: value for key, value in _flat(resolved) if key not in NOT_SETTINGS}
    return Run(folder.path, read_json(folder.summary), settings, environment["data"], environment["device"])


def _flat(section: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _setting(key: str, value: Any) -> str:
    """`p=0.2`, `lora.r=4`; a long value by a hash of it: all of it is in the group's settings."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    if len(text) > LONGEST:
        text = "#" + hashlib.sha256(text.encode()).hexdigest()[:6]
    return f"p={text}" if key == "dropout.rate" else f"{key}={text}"
