"""`hkft predict`: records in, records out, in their order and as they come, with what the model says of each.

Every record is handed on whole, and `prediction` added: the class (with `probabilities`), the number, or the text. It is
null where the record has no text to read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import datasets
from scipy.special import softmax

from hkft.data import tokenise
from hkft.data.rows import canonical_of, columns_read
from hkft.errors import DataError
from hkft.evaluation.generate import generate
from hkft.evaluation.predict import predict
from hkft.evaluation.saved import Saved
from hkft.events import Event, Listener, Notice, Stage
from hkft.model import build, memory

Record = dict[str, Any]


def records(lines: Iterable[str], where: str) -> Iterator[Record]:
    """The objects of JSON lines, blank ones passed over. Raises DataError with the line's number."""
    for number, line in enumerate(_texts(lines, where), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                "not a line of JSON", where=f"{where}:{number}", found=f"{line.strip()[:80]}: {error}"
            ) from None
        if not isinstance(record, dict):
            raise DataError("a line is one object", where=f"{where}:{number}", found=line.strip()[:80], allowed="{...}")
        yield record


def _texts(lines: Iterable[str], where: str) -> Iterator[str]:
    try:
        yield from lines
    except UnicodeDecodeError as error:
        found = f"byte 0x{error.object[error.start]:02x}"
        raise DataError("this is not UTF-8 text", where=where, found=found) from None


def predictions(saved: Saved, given: Iterable[Record], where: str, tell: Listener) -> Iterator[Record]:
    """Each record with its prediction. As many are read ahead as one batch holds. Raises DataError, with the record."""
    recipe, done = saved.recipe, 0
    size = recipe.generation.batch_size if recipe.task == "generation" else recipe.train["per_device_eval_batch_size"]
    source, broken = iter(given), None
    while broken is None:
        batch, broken = _taken(source, size)
        if batch:
            with memory.while_looking(recipe):
                found = _of_batch(saved, batch, done, where, tell)
            for number, record in enumerate(batch):
                yield {**record, **found.get(number, {"prediction": None})}
            done += len(batch)
            tell(Stage("predicting", done))
        elif broken is None:
            return
    raise broken


def _taken(source: Iterator[Record], size: int) -> tuple[list[Record], DataError | None]:
    """The next records, and what was wrong with the one after them: those before a broken line are still answered."""
    batch: list[Record] = []
    try:
        for record in islice(source, size):
            batch.append(record)
    except DataError as error:
        return batch, error
    return batch, None


def _of_batch(saved: Saved, batch: list[Record], before: int, where: str, tell: Listener) -> dict[int, Record]:
    """What is added to each record, by its place in the batch; records without text are left out."""
    recipe = saved.recipe
    columns: dict[str, list[Any]] = {}
    for column, key in columns_read(recipe).items():
        missing = next((n for n, record in enumerate(batch) if column not in record), None)
        if missing is not None:
            found = ", ".join(batch[missing]) or "nothing"
            raise DataError(
                f"record {before + missing + 1} has no {column!r}", where=where, found=found, hint=f"{key} names it"
            )
        columns[column] = [_cell(record[column]) for record in batch]
    rows = canonical_of(datasets.Dataset.from_dict(columns), recipe, where, tell)
    if not len(rows):
        return {}

    def told(event: Event) -> None:  # a batch's own stages would only flicker
        if isinstance(event, Notice):
            tell(event)

    examples = tokenise.tokenise(rows, saved.tokenizer, recipe.data.max_length, told, name="records")
    precision = build.precision(recipe)
    if recipe.task == "generation":
        settings: dict[str, Any] = {
            "chats": recipe.data.messages is not None,
            "seed": recipe.seed,
            "precision": precision,
        }
        written = generate(saved.model, saved.tokenizer, examples["input_ids"], recipe.generation, **settings)
        return {row: {"prediction": text} for row, text in zip(rows["id"], written, strict=True)}
    collate = tokenise.collator(saved.tokenizer, build.padding_side(saved.model))
    seen = predict(saved.model, examples, collate, task=recipe.task, batch_size=len(examples), precision=precision)
    if saved.labels is None:
        return {row: {"prediction": float(value)} for row, value in zip(rows["id"], seen.logits[:, 0], strict=True)}
    labels = saved.labels
    shares = softmax(seen.logits.astype("float64"), axis=1)
    return {
        row: {
            "prediction": labels[int(share.argmax())],
            "probabilities": {label: float(p) for label, p in zip(labels, share, strict=True)},
        }
        for row, share in zip(rows["id"], shares, strict=True)
    }


def _cell(value: Any) -> Any:
    """One kind for each column: a column of records may hold text here and a number there."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value) if isinstance(value, list | dict) else str(value)
