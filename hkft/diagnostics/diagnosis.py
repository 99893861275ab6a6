"""A run examined: everything that its folder tells about overfitting, as one record. Without torch, and without the model.

Of hkft's own runs, with the losses of single rows; of a curve that another tool has logged, the verdict and its reasons.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from hkft.diagnostics import foreign
from hkft.diagnostics.advice import next_steps
from hkft.diagnostics.calibration import calibration
from hkft.diagnostics.curve import Point, from_records
from hkft.diagnostics.history import history_of
from hkft.diagnostics.memorisation import Row, forgotten, memorised, suspicious, told_apart
from hkft.diagnostics.verdict import verdict
from hkft.errors import DataError, HkftError
from hkft.folder import RunFolder, read_json, read_jsonl
from hkft.recipe import Recipe, load

ROWS = 10  # of each list
Record = Mapping[str, Any]


def diagnose(path: str | Path) -> dict[str, Any]:
    """The record of a run folder, or of a curve in a file or folder of another tool's: `verdict`, `source`, `curve`, ...

    Raises UsageError where there is nothing, DataError where it is no curve.
    """
    place = Path(path)
    around = [RunFolder(each) for each in (place, *place.parents[:3])]  # its metrics, its checkpoints
    folder = next((each for each in around if each.exists), None)
    return of_file(path) if folder is None or not place.exists() else of_run(folder)


def of_file(path: str | Path) -> dict[str, Any]:
    """The record of a curve that hkft has not measured."""
    found = foreign.read(path)
    told = verdict(found.curve, metric=found.metric)
    return {
        "source": found.source,
        "notes": list(found.notes),
        "curve": [_as_record(point) for point in found.curve],
        "metric": found.metric,
        "verdict": {**told.as_dict(), "next": next_steps(told)},
    }


def of_run(folder: RunFolder) -> dict[str, Any]:
    """The record of a run of hkft's: its keys are those below. A part that the folder does not tell is None.

    calibration: of a classification, at the best step. memorisation: who can be told apart, at the last look and before
    training, and rows that stand out. Raises DataError where the folder holds no curve.
    """
    summary, evals = read_json(folder.summary), folder.records("eval")
    curve = from_records(evals)
    told = verdict(curve, metric=summary["metric"])
    environment, splits = (read_json(each) if each.exists() else {} for each in (folder.environment, folder.splits))
    seconds, training = (summary.get(f"{what}_runtime_s") or 0.0 for what in ("eval", "train"))
    return {
        "source": "a run of hkft's",
        "notes": [],
        "curve": [_as_record(point) for point in curve],
        "metric": summary["metric"],
        "verdict": {**told.as_dict(), "next": next_steps(told, _recipe(folder), str(folder.path))},
        "gap_intervals": [
            {"step": point.step, "low": point.gap_interval[0], "high": point.gap_interval[1]}
            for point in curve
            if point.gap_interval
        ],
        "decomposition": [_decomposed(record) for record in evals if record.get("net_gain")],
        "calibration": _calibration(folder, summary["task"], splits),
        "memorisation": _memorisation(folder, splits, summary.get("best_step")),
        "near_duplicates": splits.get("near_duplicates"),
        "adapter": summary.get("adapter"),
        "overhead": {"seconds": seconds, "share": seconds / (seconds + training)} if seconds + training else None,
        "provenance": environment.get("recipe"),
        "reproduce": _reproduce(environment, folder),
    }


def _as_record(point: Point) -> dict[str, Any]:
    return {key: value for key, value in asdict(point).items() if key != "eval_mode"}


def _decomposed(record: Record) -> dict[str, Any]:
    return {
        "step": record["step"],
        "regularisation": record["regularisation"],
        "gap": record["gap"]["loss"],
        "net_gain": record["net_gain"]["loss"],
        "regret": record["regret"]["loss"],
        "regret_interval": record["regret_interval"],
    }


def _recipe(folder: RunFolder) -> Recipe | None:
    """None where it is gone, of another version, or where peft, whose fields it has, is not installed: it is not needed."""
    try:
        return load(folder.resolved)
    except HkftError:
        return None


def _calibration(folder: RunFolder, task: str, splits: Record) -> dict[str, Any] | None:
    if task != "classification" or "labels" not in splits:
        return None
    found = {}
    for split in ("train_probe", "validation"):
        records = read_jsonl(folder.predictions(split))
        if not records:
            return None
        numbers = {name: number for number, name in enumerate(splits["labels"])}
        if unknown := {str(record["label"]) for record in records} - numbers.keys():
            raise DataError(
                "the labels of this run's rows are not those of its classes",
                where=str(folder.predictions(split)),
                found=", ".join(sorted(unknown)[:3]),
                allowed=", ".join(numbers),
            )
        logits = np.array([record["logits"] for record in records], dtype=np.float64)
        found[split] = calibration(logits, np.array([numbers[record["label"]] for record in records])).as_dict()
    return found


def _memorisation(folder: RunFolder, splits: Record, best_step: int | None) -> dict[str, Any] | None:
    looks = read_jsonl(folder.history)
    if not looks or "train_probe" not in splits:
        return None
    probe, validation = (history_of(looks, split) for split in ("train_probe", "validation"))
    best = next((n for n, look in enumerate(looks) if look["step"] == best_step), len(looks) - 1)
    probe_rows, validation_rows = (
        _named(splits[split], read_jsonl(folder.predictions(split))) for split in ("train_probe", "validation")
    )
    lists = {
        "memorised": (memorised(probe, best, len(probe_rows)), probe_rows),
        "forgotten": (forgotten(validation, len(validation_rows)), validation_rows),
        "suspicious": (suspicious(probe, best, len(probe_rows)), probe_rows),
    }
    auc = told_apart(probe.losses[-1], validation.losses[-1])
    if not auc.low > 0.5:  # rows alone prove nothing where the sets cannot be told apart
        lists["memorised"] = ([], probe_rows)
    return {
        "auc": asdict(auc),
        "auc_before": asdict(told_apart(probe.losses[0], validation.losses[0])) if looks[0]["step"] == 0 else None,
        "counts": {name: len(rows) for name, (rows, _) in lists.items()},
        **{name: _rows(rows[:ROWS], named) for name, (rows, named) in lists.items()},
    }


def _named(ids: Sequence[Any], predictions: Sequence[Record]) -> list[Record]:
    """What is known of the rows of a set, in its order."""
    by_id = {record["id"]: record for record in predictions}
    return [by_id.get(each, {"id": each}) for each in ids]


def _rows(rows: Sequence[Row], named: Sequence[Record]) -> list[dict[str, Any]]:
    return [
        {
            "id": named[row.index]["id"],
            "text": named[row.index].get("text", named[row.index].get("prompt")),
            "label": named[row.index].get("label"),
            **{name: getattr(row, name) for name in ("first", "lowest", "last", "since")},
        }
        for row in rows
    ]


def _reproduce(environment: Record, folder: RunFolder) -> list[str] | None:
    if "versions" not in environment:
        return None
    pins = [
        f"{name}=={version.partition('+')[0]}"
        for name, version in environment["versions"].items()
        if version and name != "python"
    ]
    resolved = shlex.quote(str(folder.resolved))
    return [f"pip install {' '.join(pins)}", f"hkft train --recipe {resolved} --output again"]
