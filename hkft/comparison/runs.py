"""Run folders -> finished runs -> groups of equal settings.

Two runs are of one group where nothing in their resolved recipes differs but the seed and the device. A group is named
by its method, and by the settings in which it differs from most runs of that method: `dropkey`, `dropkey p=0.2`,
`none lora.r=4`.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hkft.comparison.examples import OF_CLASSES, Examples, of_records
from hkft.errors import HkftError, UsageError
from hkft.folder import RunFolder, open_run, read_json, read_jsonl
from hkft.recipe.text import parse

NOT_SETTINGS = ("seed", "model.device")  # what is repeated, and where it ran
LONGEST = 24  # characters of a value in a label


@dataclass(frozen=True)
class Run:
    """A finished run, as its folder tells it. settings: every resolved value of its recipe, by dotted key."""

    folder: Path
    summary: Mapping[str, Any]
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]

    @property
    def method(self) -> str:
        return self.summary["method"]

    @property
    def seed(self) -> int:
        return self.summary["seed"]

    @property
    def data(self) -> Mapping[str, str]:
        """split -> fingerprint."""
        return self.environment["data"]

    @property
    def device(self) -> str:
        return self.environment["device"]

    @property
    def seconds(self) -> float:
        """Of training, looks apart."""
        return float(self.summary["train_runtime_s"])

    @property
    def criterion(self) -> str:
        """By which the best checkpoint was chosen, on validation."""
        return self.settings.get("diagnostics.metric") or "loss"

    @property
    def passes(self) -> int:
        """Forward passes that a step takes."""
        consistency = (self.summary.get("dropout") or {}).get("consistency") or {}
        return 2 if consistency.get("weight") else 1

    @property
    def sites(self) -> list[Any]:
        return (self.summary.get("dropout") or {}).get("sites") or []

    def curve(self) -> list[dict[str, Any]]:
        """The looks of `metrics.jsonl`."""
        return RunFolder(self.folder).records("eval")

    def examples(self, split: str, name: str) -> Examples | None:
        """Of the best checkpoint, the share in `name` of every row of "validation" or "test": see `examples`.

        None where predictions are not kept, where `name` has no shares, and where they are not what the summary was made of.
        """
        folder = RunFolder(self.folder)
        labels = read_json(folder.splits)["labels"] if name in OF_CLASSES and folder.splits.exists() else None
        found = of_records(read_jsonl(folder.predictions(split)), name, labels)
        told = self.summary.get("test") if split == "test" else (self.summary.get("best") or {}).get("validation")
        number = (told or {}).get(name)
        fits = found is None or number is None or math.isclose(found.mean, number, rel_tol=1e-3, abs_tol=1e-6)
        return found if fits else None


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
    for folder in {Path(folder).resolve(): open_run(folder) for folder in map(Path, folders)}.values():
        if folder.status == "finished":
            runs.append(_read(folder))
        else:
            left_out.append(f"{folder.path} is left out: {folder.status or 'begun'}, not finished")
    if not runs:
        raise UsageError("there is no finished run to compare", found="; ".join(left_out) or None)
    return runs, left_out


def grouped(runs: Sequence[Run], names: Mapping[Path, str] | None = None) -> tuple[dict[str, Group], list[str]]:
    """label -> group, in the order of the runs; and a sentence for each run that repeats another.

    names: of runs by their folders, where a grid has given them: a group whose runs have one name is called so.
    """
    varying = {method: differing([run for run in runs if run.method == method]) for method in {r.method for r in runs}}
    members: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        members.setdefault((run.method, repr([run.settings.get(key) for key in varying[run.method]])), []).append(run)
    usual = {method: _usual([of[0] for (name, _), of in members.items() if name == method], varying[method])
             for method in varying}  # fmt: skip
    groups: dict[str, Group] = {}
    repeated = []
    for (method, _), of in members.items():
        settings = {key: of[0].settings.get(key) for key in varying[method]}
        told = [_setting(key, value) for key, value in settings.items() if (key, repr(value)) not in usual[method]]
        given = {(names or {}).get(run.folder) for run in of}
        named = given.pop() if len(given) == 1 else None
        label = " ".join([method, *told]) if named is None or named in groups else named
        while label in groups:
            label += "'"
        group = Group(label, method, settings)
        groups[group.label] = group
        for run in of:
            if run.seed in group.runs:
                repeated.append(f"{run.folder} is left out: {group.label}, seed {run.seed} is there already")
            group.runs.setdefault(run.seed, run)
    return groups, repeated


def names_beside(folders: Sequence[Path]) -> dict[Path, str]:
    """What the grids called the rows of these runs, by run folder: from the comparison.json beside them."""
    found = {}
    for grid in {folder.parent for folder in folders}:
        with suppress(HkftError):  # none was run there, or its file is damaged
            rows = read_json(grid / "comparison.json").get("rows", [])
            found |= {grid / Path(run).name: row["label"] for row in rows for run in row["runs"]}
    return found


def differing(runs: Sequence[Run]) -> list[str]:
    """The settings in which these runs differ."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    return [key for key in keys if any(run.settings.get(key) != runs[0].settings.get(key) for run in runs)]


def _usual(groups: Sequence[Run], keys: Sequence[str]) -> set[tuple[str, str]]:
    """The value of each key that most groups of a method have, where there is one: it goes without saying."""
    usual = set()
    for key in keys:
        (value, most), *others = Counter(repr(run.settings.get(key)) for run in groups).most_common(2)
        if not others or most > others[0][1]:
            usual.add((key, value))
    return usual


def _read(folder: RunFolder) -> Run:
    resolved = parse(folder.resolved.read_text(encoding="utf-8"), str(folder.resolved)).value
    settings = {key: value for key, value in _flat(resolved) if key not in NOT_SETTINGS}
    return Run(folder.path, read_json(folder.summary), settings, read_json(folder.environment))


def _flat(section: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _setting(key: str, value: Any) -> str:
    """`p=0.2`, `lora.r=4`; a long value by a hash of it: all of it is in the group's settings."""
    short = f"{value:g}" if isinstance(value, float) else str(value)
    text = short if not isinstance(value, float) or float(short) == value else str(value)
    if len(text) > LONGEST:
        text = "#" + hashlib.sha256(text.encode()).hexdigest()[:6]
    return f"p={text}" if key == "dropout.rate" else f"{key}={text}"
