"""A training curve that another tool has written -> points.

Whatever the file, it becomes rows: one mapping of names to values for each time something was logged. In the rows, the
columns are found by their usual names, in any case. So there is one way from rows to points:

step        of step, global_step, ... the first that holds numbers. Where there is none, or where the steps start anew
            at each epoch, the distinct epochs (and steps) are numbered 1 to n. The last of a step logged twice counts.
validation  eval_loss, val_loss, ... or of several evaluation sets (`eval_<set>_loss`) the first by name. Its metrics
            are the columns that begin as it does; those that tell of time and speed are left out.
train       the mean of the training losses logged since the evaluation before. An evaluation before the first of them
            is left out; where nothing was logged since the evaluation before, the last mean stands.

A loss that is not finite is NaN in the curve: training diverged there. A NaN next to the row's other loss is how some
tables write a blank. What is no number is left out, and told; what may be read in two ways is an error.

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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from hkft.diagnostics.curve import Point
from hkft.diagnostics.gap import LOWER_IS_BETTER
from hkft.errors import DataError, UsageError

# As `_usual` has names: train_loss is also "Train Loss", "train/loss" and "sunny-sea-1 - train/loss".
STEPS = (
    *("step", "global_step", "current_steps", "current_step", "iter", "iteration"),
    *("trainer_global_step", "train_global_step", "_step"),
)
TRAIN = ("train_loss", "loss", "training_loss", "train_loss_step", "train_loss_epoch")
VALIDATION = ("eval_loss", "val_loss", "valid_loss", "validation_loss", "val_loss_epoch")
ONE_OF_SEVERAL = re.compile(r"eval[_/](.+)[_/]loss", re.IGNORECASE)
OURS = re.compile(r"eval_(train_probe|gap|net_gain|regret|regularisation)_")  # hkft's own logs: no evaluation sets
TEST = ("test_loss",)
LOSSES = (*TRAIN, *VALIDATION, *TEST)
SUMMARY = "train_runtime"

WITH_POINT = re.compile(r"[+-]?\d*\.\d+(e[+-]?\d+)?", re.IGNORECASE)
WITH_COMMA = re.compile(r"[+-]?\d*,\d+(e[+-]?\d+)?", re.IGNORECASE)
GROUPED = re.compile(r"[+-]?\d[\d.,]*,[\d.,]*(e[+-]?\d+)?", re.IGNORECASE)  # or with a comma for a point

# What a task's metric is called, where higher is better; of any other name it is not known which way is better.
HIGHER_IS_BETTER = tuple(
    "accuracy f1 accuracies acc matthews mcc exact auc pearson pearsonr spearman spearmanr r2 rougel rouge1 rouge2 "
    "bleu sacrebleu chrf meteor".split()
)
OF_DECISIONS = LOWER_IS_BETTER - {"loss", "perplexity", "calibration_error", "brier"}  # these tell the loss once more
NO_METRIC = re.compile(
    r"loss|(^|_)(run)?times?(_|$)|took|per_sec|_s$|throughput|tokens$|memory|(^|_)mem_"
    r"|step|epoch|(^|_)lr$|learning_rate|grad_norm|__m(in|ax)$",
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
ONE_BY_ONE = "curves exported one by one, as TensorBoard and W&B do, go in one table: step, train_loss, eval_loss"
BLANKS = ("", "nan", "null", "none")
HUGE = 1e100  # a number beyond it is as good as infinite, and its square would be
LARGEST_STEP = 2**53


@dataclass(frozen=True, slots=True)
class Foreign:
    """A curve of another tool.

    curve: one point per evaluation, by step, none in eval mode; metrics under names without "eval_". A loss that is not
        finite is NaN.
    metric: the one it is best told by, if every point has one whose better direction is known.
    source: what it was read as, for people.
    notes: what the reader should know of it.
    """

    curve: list[Point]
    metric: str | None
    source: str
    notes: tuple[str, ...]


class Row(dict[str, Any]):
    """What was logged at once, by name. place: where in the file, as in "on line 7"."""

    def __init__(self, place: str, values: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> None:
        super().__init__(values)
        self.place = place


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
    _tell_unread(rows, columns, notes)
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
        return [_torchtune(number, line) for number, line in enumerate(text.split("\n"), 1)], "torchtune's log"
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
        hint="JSON has double quotes; what a trainer prints is no JSON, but it writes the same to a trainer_state.json"
        if found.startswith("'")
        else "the file may be cut short, as while it is being written",
    )


def _objects(items: Iterable[Any]) -> list[Row]:
    return [
        Row(f"in entry {number}", ((_plain(name, 80), value) for name, value in item.items()))
        for number, item in enumerate(items, 1)
        if isinstance(item, Mapping)
    ]


def _torchtune(number: int, line: str) -> Row:
    """A line of its DiskLogger: `Step 10 | loss:0.81 lr:0.0002 tokens_per_second_per_gpu:9.7`."""
    match = re.match(r"\s*Step (\d{1,16}) \|(.*)", line)
    pairs = [("step", match[1]), *re.findall(r"([^\s:]+):(\S+)", match[2])] if match else []
    return Row(f"on line {number}", pairs)


def _delimited(text: str, where: str) -> tuple[list[Row], str]:
    header = next(line for line in text.split("\n") if line.strip())
    delimiter = max(",\t;", key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        lines = [(reader.line_num, [cell.strip() for cell in line]) for line in reader if any(map(str.strip, line))]
    except csv.Error as error:
        raise DataError(
            "this table cannot be read", where=f"{where}:{reader.line_num}", found=str(error), allowed=READ
        ) from None
    names = [_plain(name, 80) for name in (lines[0][1] if lines else [])]
    cells = [cell for _, line in lines[1:] for cell in line]
    source = "a tsv table" if delimiter == "\t" else "a csv table"
    if any(map(WITH_COMMA.fullmatch, cells)) and not any(map(WITH_POINT.fullmatch, cells)):
        source += " with decimal commas"
        lines = [
            (n, [cell.replace(",", ".") if WITH_COMMA.fullmatch(cell) else cell for cell in line]) for n, line in lines
        ]
    for number, line in lines[1:]:
        _check_cells(names, line, f"{where}:{number}")
    rows = [Row(f"on line {number}", zip(names, line, strict=False)) for number, line in lines[1:]]
    return rows or [Row("", dict.fromkeys(names))], source


def _check_cells(names: Sequence[str], cells: Sequence[str], where: str) -> None:
    """Raise DataError where this line of a table of losses may be read in two ways."""
    if not _first(LOSSES, names):
        return
    if any(cells[len(names) :]):
        raise DataError(
            f"this line has {len(cells)} cells, and the header {len(names)}",
            where=where,
            found=_list(cells),
            hint="where numbers have decimal commas, part the cells by semicolons or tabs",
        )
    for name, cell in zip(names, cells, strict=False):
        if _usual(name) in (*STEPS, *LOSSES, "epoch") and GROUPED.fullmatch(cell):
            raise DataError(
                "this comma may be a decimal comma, or part thousands: other numbers have a point",
                where=where,
                found=f"{_plain(cell, 40)} under {name}",
                hint="write every number with a decimal point, and nothing between thousands",
            )


def _is_summary(row: Row) -> bool:
    return _number(row.get(SUMMARY)) is not None


def _columns(rows: Sequence[Row], where: str, notes: list[str]) -> _Columns:
    names = list(dict.fromkeys(name for row in rows for name in row))
    finite = [name for name in names if any(_number(row.get(name)) is not None for row in rows)]
    stepped = [name for name in names if any(_step(row.get(name)) is not None for row in rows)]
    bare = [row for row in rows if not any(_usual(name) in LOSSES and _number(row[name]) is not None for name in row)]
    lost = [name for name in names if any(_float(row.get(name)) is not None for row in bare)]
    _check_one_run([*finite, *lost], where)
    several = sorted((n for n in finite if ONE_OF_SEVERAL.fullmatch(n) and not OURS.match(n)), key=str.lower)
    train = _first(TRAIN, finite) or _first(TRAIN, lost)
    test = _first(TEST, finite)
    validation = _first(VALIDATION, finite) or next(iter(several), None) or test or _first(VALIDATION, lost)
    step, epoch = _first(STEPS, stepped), _first(("epoch",), finite)
    if train is None or validation is None or not (step or epoch):
        raise _incomplete(rows, names, train, validation, where)
    if validation in several and len(several) > 1:
        notes.append(f"of several evaluation sets, {validation} is read; the others are {_list(several[1:])}")
    if validation == test:
        notes.append(f"{validation} is read as the validation loss: there is no other")
    return _Columns(step, epoch, train, validation, _metric_columns(finite, validation, several))


def _check_one_run(names: Sequence[str], where: str) -> None:
    runs = list(dict.fromkeys(name.rpartition(" - ")[0] for name in names if _usual(name) in LOSSES))
    if len(runs) > 1:
        hint = "keep the columns of one run"
        raise DataError("several runs are in this table", where=where, found=_list(runs), hint=hint)


def _first(wanted: Sequence[str], names: Sequence[str]) -> str | None:
    by_usual = {_usual(name): name for name in reversed(names)}
    return next((by_usual[name] for name in wanted if name in by_usual), None)


def _usual(name: str) -> str:
    """A name as the lists above have it; W&B writes that of the run before it."""
    return re.sub(r"[\s/]+", "_", name.rpartition(" - ")[2].strip().lower())


def _incomplete(
    rows: Sequence[Row], names: Sequence[str], train: str | None, validation: str | None, where: str
) -> DataError:
    found = _list(names) or "nothing that has a name"
    hint = ONE_BY_ONE if any(" - " in name or _usual(name) == "value" for name in names) else None
    if not _first(LOSSES, names) and validation is None:
        return DataError("no training curve is in this file", where=where, found=found, allowed=READ, hint=hint)
    if empty := _first((*VALIDATION, *TEST) if validation is None else () if train else TRAIN, names):
        found = f"{empty} is there, but never a finite number" + "".join(
            f": {each}" for each in _unread(rows, empty, _float)[:1]
        )
    if validation is None:
        allowed = "eval_loss, val_loss, validation_loss and the like"
        hint = hint or NO_VALIDATION
        return DataError("no evaluation is in this file", where=where, found=found, allowed=allowed, hint=hint)
    if train is None:
        allowed = "loss, train_loss, training_loss and the like"
        hint = hint or "log it at least as often as you evaluate: logging_steps in transformers"
        return DataError("no training loss is in this file", where=where, found=found, allowed=allowed, hint=hint)
    allowed = f"{', '.join(STEPS)}, or at least epoch"
    return DataError("no steps are in this file", where=where, found=found, allowed=allowed)


def _tell_unread(rows: Sequence[Row], columns: _Columns, notes: list[str]) -> None:
    """A note for each column that holds what is no number."""
    for name in (columns.step or columns.epoch, columns.train, columns.validation, *columns.metrics):
        if name and (unread := _unread(rows, name, _step if name == columns.step else _float)):
            notes.append(f"{_counted(len(unread), 'value')} of {name} could not be read, the first {unread[0]}")


def _unread(rows: Sequence[Row], name: str, read: Callable[[Any], float | None]) -> list[str]:
    """Where each value stands that is neither a number nor a blank, and what it is."""
    return [
        f"{row.place}: {_plain(repr(value), 40) if isinstance(value, str | int | float) else 'no single value'}"
        for row in rows
        if (value := row.get(name)) is not None and str(value).strip().lower() not in BLANKS and read(value) is None
    ]


def _metric_columns(names: Sequence[str], validation: str, several: Sequence[str]) -> dict[str, str]:
    """The columns that begin as the validation loss does and tell of the task -> their names without that beginning."""
    prefix = _prefix(validation)
    others = tuple(_prefix(name) for name in several if name != validation and _prefix(name).startswith(prefix))
    metrics = {name: name[len(prefix) :] for name in names if name.lower().startswith(prefix)}
    own = {name: short for name, short in metrics.items() if not (others and name.lower().startswith(others))}
    return {name: short for name, short in own.items() if short and not NO_METRIC.search(short)}


def _prefix(loss: str) -> str:
    return loss.lower().rsplit("loss", 1)[0]


def _losses(row: Row, columns: _Columns) -> tuple[float | None, float | None]:
    """Training and validation loss of a row, where it has them; NaN where one is not finite."""
    read = [_float(row.get(name)) for name in (columns.train, columns.validation)]
    blank = any(loss is not None and _is_finite(loss) for loss in read)
    train, validation = (
        None if loss is None or (blank and math.isnan(loss)) else loss if _is_finite(loss) else math.nan
        for loss in read
    )
    return train, validation


def _while_training(rows: Sequence[Row], columns: _Columns, notes: list[str]) -> list[Row]:
    """The rows without summaries, and without evaluations after the end, unless there are no others."""
    kept: list[Row] = []
    late: list[Row] = []
    ended = False
    for row in rows:
        learning = not _is_summary(row) and _losses(row, columns)[0] is not None
        ended = not learning and (ended or _is_summary(row))
        if not _is_summary(row):
            (late if ended else kept).append(row)

    count, others = (sum(_losses(row, columns)[1] is not None for row in part) for part in (late, kept))
    if not others:
        return kept + late
    if count:
        notes.append(
            f"{_counted(count, 'evaluation')} after the end of training left out: the model may have been the best "
            "checkpoint again, and the rows others"
        )
    return kept


def _numbered(rows: Sequence[Row], columns: _Columns, notes: list[str]) -> list[tuple[int, Row]]:
    """Each row with its step; rows without one are left out, and told where they have a loss."""
    step, epoch = columns.step, columns.epoch
    if step and not _restarts(rows, step, epoch):
        steps = [_step(row.get(step)) for row in rows]
    else:
        if step:
            notes.append(f"{step} starts anew at each epoch: the steps are numbered 1 to n")
        else:
            notes.append("there are no steps, only epochs: the steps are the epochs logged, numbered 1 to n")
        names = [name for name in (epoch, step) if name]
        places = [tuple(_number(row.get(name)) for name in names) for row in rows]
        whole = sorted({place for place in places if None not in place})
        steps = [{place: number for number, place in enumerate(whole, 1)}.get(place) for place in places]
    pairs = list(zip(steps, rows, strict=True))
    if missing := sum(number is None and _losses(row, columns) != (None, None) for number, row in pairs):
        notes.append(f"{_counted(missing, 'row')} with a loss but without a step left out")
    return [(number, row) for number, row in pairs if number is not None]


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
    losses = [(step, _losses(row, columns)) for step, row in rows]
    train, validation = (_by_step((step, pair[side]) for step, pair in losses) for side in (0, 1))
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
        mean = _mean(since) if since else mean
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
    if lost := [step for side in (train, validation) for step, loss in side.items() if math.isnan(loss)]:
        are = "loss is" if len(lost) == 1 else "losses are"
        notes.append(f"{len(lost)} {are} not finite, the first at step {min(lost)}: training may have diverged there")
    return points


def _by_step(losses: Iterable[tuple[int, float | None]]) -> dict[int, float]:
    """The last loss of each step; a finite one goes before others, for a NaN may be a blank."""
    found: dict[int, float] = {}
    for step, loss in losses:
        if loss is not None and (step not in found or not math.isnan(loss)):
            found[step] = loss
    return found


def _mean(losses: Sequence[float]) -> float:
    """Of those that are finite: a single overflow is no divergence. NaN where the last is."""
    finite = [loss for loss in losses if not math.isnan(loss)]
    return math.nan if math.isnan(losses[-1]) else sum(loss / len(finite) for loss in finite)


def _metric(curve: Sequence[Point]) -> str | None:
    """The task metric that every point has: by its whole name, else by a word in it, else an error such as mse."""
    curve = [point for point in curve if not math.isnan(point.validation_loss)] or curve
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


def _counted(count: int, one: str) -> str:
    return f"{count} {one if count == 1 else one + 's'}"


def _steps(losses: Iterable[int]) -> str:
    steps = sorted(losses)
    return "no step" if not steps else f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"


def _list(names: Sequence[str]) -> str:
    return ", ".join(_plain(name, 40) for name in names[:12]) + (", ..." if len(names) > 12 else "")


def _plain(text: str, longest: int) -> str:
    """Text that any console can show."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in text[: longest + 1])
    return shown if len(shown) <= longest else shown[: longest - 3] + "..."
