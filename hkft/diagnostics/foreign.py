"""A training curve that another tool has written -> points.

Whatever the file, it becomes rows: one mapping of names to values for each time something was logged. In the rows, the
columns are found by their usual names, in any case. So there is one way from rows to points:

step        of step, global_step, ... the first that holds numbers. Where there is none, or where the steps start anew
            at each epoch, the distinct epochs (and steps) are numbered 1 to n. The last of a step logged twice counts.
validation  eval_loss, val_loss, ... or of several evaluation sets (`eval_<set>_loss`) the first by name. Its metrics
            are the columns that begin as it does; those that tell of time and speed are left out.
train       the mean of the training losses logged since the evaluation before. An evaluation before the first of them
            is left out; where nothing was logged since the evaluation before, the last mean stands.

Evaluations after the end of training (transformers logs a summary there) count only where there are no others: the
model may by then be the best checkpoint again, and the rows may be others.
"""

from __future__ import annotations

import bisect
import csv
import io
import json
import math
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from hkft.diagnostics.curve import Point
from hkft.diagnostics.gap import LOWER_IS_BETTER
from hkft.errors import DataError, UsageError

Row = Mapping[str, Any]

STEPS = (
    *("step", "global_step", "current_steps", "current_step", "iter", "iteration"),
    *("trainer/global_step", "train/global_step", "_step"),
)
TRAIN = ("train_loss", "loss", "train/loss", "training_loss", "train_loss_step", "train_loss_epoch")
VALIDATION = (
    *("eval_loss", "val_loss", "valid_loss", "validation_loss", "eval/loss", "val/loss", "valid/loss"),
    *("validation/loss", "val_loss_epoch"),
)
ONE_OF_SEVERAL = re.compile(r"eval[_/](.+)[_/]loss", re.IGNORECASE)
OURS = re.compile(r"eval_(train_probe|gap|net_gain|regret|regularisation)_")  # hkft's own logs: no evaluation sets
TEST = ("test_loss", "test/loss")
SUMMARY = "train_runtime"

# What a task's metric is called, where higher is better; of any other name it is not known which way is better.
HIGHER_IS_BETTER = tuple(
    "accuracy f1 accuracies acc matthews mcc exact auc pearson pearsonr spearman spearmanr r2 rougel rouge1 rouge2 "
    "bleu sacrebleu chrf meteor".split()
)
OF_DECISIONS = LOWER_IS_BETTER - {"loss", "perplexity", "calibration_error", "brier"}  # these tell the loss once more
NO_METRIC = re.compile(
    r"loss|(^|_)(run)?times?(_|$)|took|per_sec|_s$|throughput|tokens$|memory|(^|_)mem_|step|epoch|(^|_)lr$|learning_rate|grad_norm",
    re.IGNORECASE,
)

READ = (
    "a trainer_state.json or a folder with one, LLaMA-Factory's trainer_log.jsonl, torchtune's log, or JSON lines, csv "
    "or tsv with columns such as step, train_loss and eval_loss"
)
LEARNING = "the training loss is what was logged while learning: dropout on, other rows, a moving model"
NO_VALIDATION = (
    'training without validation cannot be diagnosed: train with eval_strategy="steps" and an eval dataset, or with '
    "what your tool calls these"
)
HUGE = 1e100  # a number beyond it is as good as infinite, and its square would be
LARGEST_STEP = 2**53


@dataclass(frozen=True, slots=True)
class Foreign:
    """A curve of another tool.

    curve: one point per evaluation, by step, none in eval mode; metrics under names without "eval_".
    metric: the one it is best told by, if every point has one whose better direction is known.
    source: what it was read as, for people.
    notes: what the reader should know of it.
    """

    curve: list[Point]
    metric: str | None
    source: str
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Columns:
    step: str | None
    epoch: str | None
    train: str
    validation: str
    metrics: Mapping[str, str]  # column -> name without the prefix


def read(path: str | Path) -> Foreign:
    """The curve in a file, or in a trainer's output or checkpoint folder.

    Raises UsageError where there is no such path, and DataError for a file that cannot be read, that is no training
    curve, or that lacks steps, training losses or evaluations.
    """
    path = Path(path)
    notes: list[str] = []
    if stat.S_ISDIR(_mode(path)):
        folder, path = path, _file_in(path)
        notes.append(f"read from {path.relative_to(folder).as_posix()}")
    text, where = _text(path), str(path)
    rows, source = _rows(text, where)
    columns = _columns([row for row in rows if not _is_summary(row)], where, notes)
    trained = _while_training(rows, columns, notes)
    curve = _points(_numbered(trained, columns, notes), columns, where, notes)
    return Foreign(curve, _metric(curve), source, (LEARNING, *notes))


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except (OSError, ValueError) as error:
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        raise UsageError(
            "there is no such file or folder" if missing else "the path cannot be looked at",
            where=_plain(str(path), 200),
            found=None if missing else _plain(getattr(error, "strerror", None) or str(error), 80),
            allowed=READ,
        ) from None


def _file_in(folder: Path) -> Path:
    """The trainer_state.json of a folder, else that of its last checkpoint, else its trainer_log.jsonl."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise DataError("the folder cannot be read", where=str(folder), found=error.strerror) from None
    numbers = {entry: re.fullmatch(r"checkpoint-(\d+)", entry.name) for entry in entries}
    checkpoints = sorted((int(match[1]), entry) for entry, match in numbers.items() if match)
    states = [folder, *(entry for _, entry in reversed(checkpoints))]
    candidates = [*(state / "trainer_state.json" for state in states), folder / "trainer_log.jsonl"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise DataError(
        "no training curve is in this folder",
        where=str(folder),
        found=_list([entry.name for entry in entries]) or "an empty folder",
        allowed="trainer_state.json, checkpoint-*/trainer_state.json or trainer_log.jsonl; any other file by its name",
    )


def _text(path: Path) -> str:
    where = str(path)
    if not stat.S_ISREG(_mode(path)):
        raise DataError("this is no ordinary file", where=where, allowed=READ)
    try:
        with path.open("rb") as file:
            data = file.read(8192)
            if b"\0" not in data:  # whoever names a model's weights should not wait for them
                data += file.read()
    except OSError as error:
        raise DataError("the file cannot be read", where=where, found=error.strerror) from None
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError("this is not UTF-8 text", where=where, found="UTF-16", hint="save the file as UTF-8")
    if b"\0" in data:
        raise DataError("this is binary, not text", where=where, found="a zero byte", allowed=READ)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{data[error.start]:02x}"
        raise DataError(
            "this is not UTF-8 text", where=f"{path}:{line}", found=found, hint="save the file as UTF-8"
        ) from None
    if not text.strip():
        raise DataError("the file is empty", where=where, allowed=READ)
    return text


def _rows(text: str, where: str) -> tuple[list[Row], str]:
    """The rows of a text, and what it was read as."""
    if text.lstrip().startswith(("{", "[")):
        return _json_rows(text, where)
    if re.match(r"\s*Step \d+ \|", text):
        return [_torchtune(line) for line in text.split("\n")], "torchtune's log"
    return _delimited(text, where)


def _json_rows(text: str, where: str) -> tuple[list[Row], str]:
    try:
        document = _loads(text, where)
    except json.JSONDecodeError as error:
        if not (error.msg.startswith("Extra data") or where.lower().endswith((".jsonl", ".ndjson"))):
            raise _broken(error, where, error.lineno) from None
        document = _lines(text, where)
    if isinstance(document, Mapping) and "log_history" in document:
        history = document["log_history"]
        if not isinstance(history, list):
            found = _plain(repr(history), 80)
            raise DataError("log_history is no list", where=where, found=found, allowed="what transformers writes")
        if not history:
            raise DataError("nothing was logged", where=where, found="an empty log_history", hint=NO_VALIDATION)
        return _objects(history), "transformers' trainer_state.json"
    rows = _objects(document if isinstance(document, list) else [document])
    return rows, "LLaMA-Factory's trainer_log.jsonl" if any("current_steps" in row for row in rows) else "rows of JSON"


def _lines(text: str, where: str) -> list[Any]:
    rows: list[Any] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(_loads(line, f"{where}:{number}"))
        except json.JSONDecodeError as error:
            raise _broken(error, where, number) from None
    return rows


def _loads(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists
        raise DataError("this JSON cannot be read", where=where, found=_plain(str(error), 80)) from None


def _broken(error: json.JSONDecodeError, where: str, line: int) -> DataError:
    found = _plain(error.doc[error.pos : error.pos + 40].split("\n")[0].strip(), 40)
    return DataError(
        f"this is broken JSON: {error.msg}",
        where=f"{where}:{line}:{error.colno}",
        found=found or "the end of the line",
        hint="the file may be cut short, as while it is being written",
    )


def _objects(items: Iterable[Any]) -> list[Row]:
    return [{_plain(name, 80): value for name, value in item.items()} for item in items if isinstance(item, Mapping)]


def _torchtune(line: str) -> Row:
    """A line of its DiskLogger: `Step 10 | loss:0.81 lr:0.0002 tokens_per_second_per_gpu:9.7`."""
    match = re.match(r"\s*Step (\d{1,16}) \|(.*)", line)
    return {"step": match[1], **dict(re.findall(r"([^\s:]+):(\S+)", match[2]))} if match else {}


def _delimited(text: str, where: str) -> tuple[list[Row], str]:
    header = next(line for line in text.split("\n") if line.strip())
    delimiter = max(",\t;", key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        lines = [line for line in reader if any(map(str.strip, line))]
    except csv.Error as error:
        raise DataError(
            "this table cannot be read", where=f"{where}:{reader.line_num}", found=str(error), allowed=READ
        ) from None
    names = [_plain(name.strip(), 80) for name in (lines[0] if lines else [])]
    rows: list[Row] = [dict(zip(names, line, strict=False)) for line in lines[1:]]
    return rows or [dict.fromkeys(names)], "a tsv table" if delimiter == "\t" else "a csv table"


def _is_summary(row: Row) -> bool:
    return _number(row.get(SUMMARY)) is not None


def _columns(rows: Sequence[Row], where: str, notes: list[str]) -> _Columns:
    names = list(dict.fromkeys(name for row in rows for name in row))
    numbered = [name for name in names if any(_number(row.get(name)) is not None for row in rows)]
    stepped = [name for name in names if any(_step(row.get(name)) is not None for row in rows)]
    train = _first(TRAIN, numbered)
    several = sorted((n for n in numbered if ONE_OF_SEVERAL.fullmatch(n) and not OURS.match(n)), key=str.lower)
    validation = _first(VALIDATION, numbered) or next(iter(several), None) or _first(TEST, numbered)
    if validation in several and len(several) > 1:
        notes.append(f"of several evaluation sets, {validation} is read; the others are {_list(several[1:])}")
    if validation and validation.lower() in TEST:
        notes.append(f"{validation} is read as the validation loss: there is no other")
    step, epoch = _first(STEPS, stepped), _first(("epoch",), numbered)
    if train is None or validation is None or not (step or epoch):
        raise _incomplete(names, train, validation, where)
    return _Columns(step, epoch, train, validation, _metric_columns(numbered, validation, several))


def _first(wanted: Sequence[str], names: Sequence[str]) -> str | None:
    by_lower = {re.sub(r"\s+", "_", name.strip().lower()): name for name in reversed(names)}
    return next((by_lower[name] for name in wanted if name in by_lower), None)


def _incomplete(names: Sequence[str], train: str | None, validation: str | None, where: str) -> DataError:
    found = _list(names) or "nothing that has a name"
    if train is None and validation is None and not _first((*TRAIN, *VALIDATION, *TEST), names):
        return DataError("no training curve is in this file", where=where, found=found, allowed=READ)
    if validation is None:
        empty = _first((*VALIDATION, *TEST), names)
        found = f"{empty} is there, but never a finite number" if empty else found
        allowed = "eval_loss, val_loss, validation_loss and the like"
        return DataError("no evaluation is in this file", where=where, found=found, allowed=allowed, hint=NO_VALIDATION)
    if train is None:
        empty = _first(TRAIN, names)
        return DataError(
            "no training loss is in this file",
            where=where,
            found=f"{empty} is there, but never a finite number" if empty else found,
            allowed="loss, train_loss, training_loss and the like",
            hint="log it at least as often as you evaluate: logging_steps in transformers",
        )
    return DataError(
        "no steps are in this file", where=where, found=found, allowed=f"{', '.join(STEPS)}, or at least epoch"
    )


def _metric_columns(names: Sequence[str], validation: str, several: Sequence[str]) -> dict[str, str]:
    """The columns that begin as the validation loss does and tell of the task -> their names without that beginning."""
    prefix = _prefix(validation)
    others = tuple(_prefix(name) for name in several if name != validation and _prefix(name).startswith(prefix))
    metrics = {name: name[len(prefix) :] for name in names if name.lower().startswith(prefix)}
    own = {name: short for name, short in metrics.items() if not (others and name.lower().startswith(others))}
    return {name: short for name, short in own.items() if short and not NO_METRIC.search(short)}


def _prefix(loss: str) -> str:
    return loss.lower().rsplit("loss", 1)[0]


def _while_training(rows: Sequence[Row], columns: _Columns, notes: list[str]) -> list[Row]:
    """The rows without summaries, and without evaluations after the end, unless there are no others."""
    kept: list[Row] = []
    late: list[Row] = []
    ended = False
    for row in rows:
        learning = not _is_summary(row) and _number(row.get(columns.train)) is not None
        ended = not learning and (ended or _is_summary(row))
        if not _is_summary(row):
            (late if ended else kept).append(row)

    count = sum(_number(row.get(columns.validation)) is not None for row in late)
    if not any(_number(row.get(columns.validation)) is not None for row in kept):
        return kept + late
    if count:
        notes.append(
            f"{_counted(count, 'evaluation')} after the end of training left out: the model may have been the best "
            "checkpoint again, and the rows others"
        )
    return kept


def _numbered(rows: Sequence[Row], columns: _Columns, notes: list[str]) -> list[tuple[int, Row]]:
    """Each row with its step; rows without one are left out."""
    step, epoch = columns.step, columns.epoch
    if step and not _restarts(rows, step, epoch):
        steps = [_step(row.get(step)) for row in rows]
        return [(number, row) for number, row in zip(steps, rows, strict=True) if number is not None]
    if step:
        notes.append(f"{step} starts anew at each epoch: the steps are numbered 1 to n")
    else:
        notes.append("there are no steps, only epochs: the steps are the epochs logged, numbered 1 to n")
    names = [name for name in (epoch, step) if name]
    places = [tuple(_number(row.get(name)) for name in names) for row in rows]
    keyed = [(place, row) for place, row in zip(places, rows, strict=True) if None not in place]
    numbers = {place: number for number, place in enumerate(sorted({place for place, _ in keyed}), 1)}
    return [(numbers[place], row) for place, row in keyed]


def _restarts(rows: Sequence[Row], step: str, epoch: str | None) -> bool:
    """Whether the step ever falls while the epoch rises: a resumed run falls back in both."""
    if epoch is None:
        return False
    places = [(_number(row.get(epoch)), _step(row.get(step))) for row in rows]
    whole = [(e, s) for e, s in places if e is not None and s is not None]
    return any(
        (after > before and t < s) or (after >= before + 1 and t == s) for (before, s), (after, t) in pairwise(whole)
    )


def _points(rows: Sequence[tuple[int, Row]], columns: _Columns, where: str, notes: list[str]) -> list[Point]:
    train = _by_step(rows, columns.train)
    validation = _by_step(rows, columns.validation)
    metrics: dict[int, dict[str, float]] = {}
    for step, row in rows:
        values = {short: _number(row.get(name)) for name, short in columns.metrics.items()}
        metrics.setdefault(step, {}).update({name: value for name, value in values.items() if value is not None})

    points: list[Point] = []
    early = waiting = averaged = 0
    mean: float | None = None
    logged, done = sorted(train), 0
    for step in sorted(validation):
        begun, done = done, bisect.bisect_right(logged, step)
        since = [train[at] for at in logged[begun:done]]
        averaged += len(since) > 1
        waiting += mean is not None and not since
        mean = sum(loss / len(since) for loss in since) if since else mean
        if mean is None:
            early += 1
        else:
            points.append(Point(step, mean, validation[step], metrics.get(step, {}), eval_mode=False))

    if not points:
        raise DataError(
            "no evaluation in this file follows a training loss",
            where=where,
            found=f"training losses at {_steps(train)}, evaluations at {_steps(validation)}",
            hint="log the training loss at least as often as you evaluate: logging_steps in transformers",
        )
    if averaged:
        notes.append("the training loss of an evaluation is the mean of those logged since the evaluation before it")
    if early:
        notes.append(f"{_counted(early, 'evaluation')} before the first training loss left out")
    if waiting:
        notes.append(
            f"{_counted(waiting, 'evaluation')} with no training loss logged since the one before: the last stands"
        )
    if lost := sum(_is_lost(row, columns) for _, row in rows):
        notes.append(f"{_counted(lost, 'loss', 'losses')} left out, not finite: training may have diverged there")
    return points


def _by_step(rows: Sequence[tuple[int, Row]], column: str) -> dict[int, float]:
    numbers = [(step, _number(row.get(column))) for step, row in rows]
    return {step: number for step, number in numbers if number is not None}


def _is_lost(row: Row, columns: _Columns) -> bool:
    """Whether the row's only loss is not finite; next to another loss, a NaN is how some tables write a blank."""
    losses = [_float(row.get(name)) for name in (columns.train, columns.validation)]
    given = [loss for loss in losses if loss is not None]
    return bool(given) and not any(map(_is_finite, given))


def _metric(curve: Sequence[Point]) -> str | None:
    """The task metric that every point has: by its whole name, else by a word in it, else an error such as mse."""
    names = [name for name in curve[0].metrics if all(name in point.metrics for point in curve)]
    words = {name: set(re.split(r"[^a-z0-9]+", name.lower())) for name in names}
    whole = (name for word in HIGHER_IS_BETTER for name in names if name.lower() == word)
    partly = (name for word in HIGHER_IS_BETTER for name in sorted(names) if word in words[name])
    errors = (name for name in sorted(names) if name in OF_DECISIONS)
    return next((name for found in (whole, partly, errors) for name in found), None)


def _step(value: Any) -> int | None:
    number = _number(value)
    return int(number) if number is not None and number.is_integer() and 0 <= number <= LARGEST_STEP else None


def _number(value: Any) -> float | None:
    number = _float(value)
    return number if number is not None and _is_finite(number) else None


def _is_finite(number: float) -> bool:
    return abs(number) <= HUGE


def _float(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None
    except OverflowError:
        return math.inf


def _counted(count: int, one: str, many: str | None = None) -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"


def _steps(losses: Iterable[int]) -> str:
    steps = sorted(losses)
    return "no step" if not steps else f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"


def _list(names: Sequence[str]) -> str:
    return ", ".join(_plain(name, 40) for name in names[:12]) + (", ..." if len(names) > 12 else "")


def _plain(text: str, longest: int) -> str:
    """Text that any console can show."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in text[: longest + 1])
    return shown if len(shown) <= longest else shown[: longest - 3] + "..."
