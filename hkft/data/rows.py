"""One source -> canonical rows: `id`, `text`, `text_pair` (pairs only), `label`; for generation see `prompts`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import datasets
import numpy as np
import pyarrow as pa
from datasets.table import InMemoryTable

from hkft.data.labels import HIDDEN, class_indices, class_names, class_texts, numbers, tell_absent
from hkft.data.prompts import PromptSection, columns_of
from hkft.data.sources import NAMELESS, batches_of, cells_of, picked, pieces_of, read
from hkft.errors import DataError, Problem, nearest
from hkft.events import Listener, Notice
from hkft.recipe.template import template


class DataSection(PromptSection, Protocol):
    """What this room reads of a recipe's `data`."""

    @property
    def train(self) -> str: ...
    @property
    def validation(self) -> str | float: ...
    @property
    def test(self) -> str | float | None: ...
    @property
    def filter(self) -> Mapping[str, Any] | None: ...
    @property
    def text(self) -> str | Sequence[str]: ...
    @property
    def label(self) -> str | None: ...
    @property
    def train_rows(self) -> int | None: ...
    @property
    def validation_rows(self) -> int | None: ...


class DataRecipe(Protocol):
    """What this room reads of a recipe."""

    @property
    def data(self) -> DataSection: ...
    @property
    def task(self) -> str: ...
    @property
    def seed(self) -> int: ...


Columns = dict[str, Any]  # of Arrow's, which are in pieces

_LACKING = {"text": "without text", "text_pair": "without text", "messages": "without a prompt"}


@dataclass(frozen=True)
class Rows:
    """Canonical rows, and the class names their labels index; None in regression and where there are no labels."""

    rows: datasets.Dataset
    labels: tuple[str, ...] | None


def rows(
    reference: str,
    recipe: DataRecipe,
    labels: Sequence[str] | None,
    tell: Listener,
    labelled: bool = True,
) -> datasets.Dataset:
    """The canonical rows of any source, under the recipe's columns and filter, and a run's own `labels`.

    Columns: `id`, the row's number in its source, from 0; `text`; `text_pair` for pairs; `label`, an index of `labels`
    or a float; for generation those of `prompts`. With `labelled` False, for prediction, the source needs no labels or
    completions, and there is none. Raises what `read` raises, and DataError for missing columns, labels that cannot be,
    and a source that no row of is left.
    """
    return canonical(read(reference, tell), reference, recipe, labels, tell, labelled).rows


def canonical(
    source: datasets.Dataset,
    reference: str,
    recipe: DataRecipe,
    labels: Sequence[str] | None,
    tell: Listener,
    labelled: bool = True,
) -> Rows:
    """As `rows`, of what was read; where `labels` is None in classification, the classes are those found here."""
    data = recipe.data
    needed = columns_read(recipe, labelled)
    check_columns(source, dict.fromkeys(data.filter or {}, "data.filter") | needed, reference)
    ids = _filtered(source, data.filter or {}, reference)
    names = tuple(labels) if labels is not None else None
    return _canonical(picked(source, ids), ids, recipe, names, reference, tell, labelled)


def canonical_of(source: datasets.Dataset, recipe: DataRecipe, reference: str, tell: Listener) -> datasets.Dataset:
    """As `rows` without labels, of rows at hand, without the recipe's filter; none may be left."""
    return _canonical(source, np.arange(len(source)), recipe, None, reference, tell, False).rows


def _canonical(
    chosen: datasets.Dataset,
    ids: np.ndarray,
    recipe: DataRecipe,
    names: tuple[str, ...] | None,
    reference: str,
    tell: Listener,
    labelled: bool,
) -> Rows:
    data = recipe.data
    columns: Columns = {"id": pa.chunked_array([ids])}
    if recipe.task == "generation":
        columns |= _prompts(chosen, recipe, labelled, reference, ids)
        return Rows(_complete(columns, recipe.task, reference, tell, labelled), None)
    for name, column in zip(("text", "text_pair"), _texts_named(data), strict=False):
        columns[name] = _texts(chosen, column, reference)
    if labelled:
        assert data.label is not None, "the recipe room lets no such recipe through"
        columns["label"], names = _labels(chosen, data.label, recipe.task, names, ids, reference, tell)
    return Rows(_complete(columns, recipe.task, reference, tell, labelled), names)


def _texts_named(data: DataSection) -> list[str]:
    return [data.text] if isinstance(data.text, str) else list(data.text)


def columns_read(recipe: DataRecipe, labelled: bool = False) -> dict[str, str]:
    """The columns that the task reads, and the key that names each."""
    data = recipe.data
    if recipe.task != "generation":
        return dict.fromkeys(_texts_named(data), "data.text") | ({str(data.label): "data.label"} if labelled else {})
    if data.messages is not None:
        return {data.messages: "data.messages"}
    keys = ("prompt", "completion") if labelled else ("prompt",)
    return {column: f"data.{key}" for key in keys for column in template(getattr(data, key)).columns}


def check_columns(source: datasets.Dataset, wanted: Mapping[str, str], reference: str) -> None:
    """Raise DataError with every column of `wanted` (column -> the key that names it) that the source lacks."""
    found = source.column_names
    single = found[0] if len(found) == 1 else ""
    separator = next((sign for sign in (";", "\t", "|", ",") if sign in single), None)

    def hint(name: str) -> str:
        if separator:
            return f"the columns seem to be separated by {separator!r}"
        within = max((column for column in found if column in name), key=len, default=None)
        if within and wanted[name] in ("data.prompt", "data.completion"):
            return f"a template names its columns in braces: {name.replace(within, f'{{{within}}}')!r}"
        return nearest(name, found) or f"{wanted[name]} names it" + (
            "" if reference.endswith(("json", "jsonl", "parquet")) else "; the first line is read as the header"
        )

    problems = [
        Problem(f"there is no column {name!r}", where=reference, found=", ".join(found), hint=hint(name))
        for name in sorted(set(wanted) - set(found))
    ]
    if problems:
        raise DataError(problems=problems)


def _filtered(source: datasets.Dataset, wanted: Mapping[str, Any], reference: str) -> np.ndarray:
    """The numbers of the rows that the filter keeps: in every column the value, or one of the values, it names."""
    kept = np.ones(len(source), bool)
    for column, value in wanted.items():
        allowed = {_spelled(item) for item in (value if isinstance(value, list | tuple) else [value])}
        spelled = (_spelled(cell) for piece in pieces_of(source, column) for cell in _named_cells(piece, column))
        kept &= np.fromiter((cell in allowed for cell in spelled), bool, len(source))
        if not kept.any():
            cells = (cell for piece in pieces_of(source, column) for cell in _named_cells(piece, column))
            values = list(dict.fromkeys(map(_spelled, cells)))
            raise DataError(
                f"no row is left after the filter {column}: {value}",
                where=reference,
                found=", ".join(values[:10]) + (", ..." if len(values) > 10 else ""),
                hint=nearest(str(value), values),
            )
    return np.flatnonzero(kept)


def _named_cells(piece: datasets.Dataset, column: str) -> list[Any]:
    """The cells, with the names of classes for their numbers."""
    cells, feature = cells_of(piece, column), piece.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return [None if cell is None or cell < 0 else feature.names[cell] for cell in cells]
    return cells


def _spelled(value: Any) -> str:
    """A cell's or a recipe's value in one spelling: a csv's "1", 1 and 1.0 are the same, and so are null and ""."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _texts(source: datasets.Dataset, column: str, reference: str) -> pa.ChunkedArray:
    """The cells as text, None where blank. Those that are text already stay where they are, in memory or on disk."""
    chunks: list[pa.Array] = []
    for table in batches_of(source, column):
        cells = table.column(0).to_pylist()
        if nested := [cell for cell in cells if isinstance(cell, list | dict | bytes)]:
            raise DataError(f"column {column!r} holds no text", where=reference, found=repr(nested[0])[:80])
        texts = [None if cell is None or not str(cell).strip() else str(cell) for cell in cells]
        same = pa.types.is_string(table.column(0).type) and texts == cells
        chunks += table.column(0).chunks if same else [pa.array(texts, pa.string())]
    return pa.chunked_array(chunks, pa.string())


def _prompts(source: datasets.Dataset, recipe: DataRecipe, labelled: bool, reference: str, ids: np.ndarray) -> Columns:
    """The columns of generation."""
    chunks: dict[str, list[pa.Array]] = {}
    done = 0
    for piece in pieces_of(source, *columns_read(recipe, labelled)):
        numbers = ids[done : done + len(piece)].tolist()
        for name, cells in columns_of(piece, recipe.data, labelled, reference, numbers).items():
            chunks.setdefault(name, []).append(pa.array(cells, pa.string()))
        done += len(piece)
    return {name: pa.chunked_array(found) for name, found in chunks.items()}


def _labels(
    source: datasets.Dataset,
    column: str,
    task: str,
    names: tuple[str, ...] | None,
    ids: np.ndarray,
    reference: str,
    tell: Listener,
) -> tuple[pa.ChunkedArray, tuple[str, ...] | None]:
    where = f"{reference}: {column}"
    if task == "regression":
        values, names = _targets(source, column, ids, where), None
    else:
        values, names = _classes(source, column, names, ids, where, tell)
    return pa.chunked_array([values]), names


def _targets(source: datasets.Dataset, column: str, ids: np.ndarray, where: str) -> pa.Array:
    """Regression targets, null where there is none."""
    parts, done = [], 0
    for piece in pieces_of(source, column):
        cells = cells_of(piece, column)
        parts.append(pa.array(numbers(cells, ids[done : done + len(cells)].tolist(), where), pa.float64()))
        done += len(cells)
    values = pa.concat_arrays(parts) if parts else pa.array([], pa.float64())
    if not values.null_count and (values.to_numpy() == HIDDEN).all():
        values = pa.nulls(len(values), pa.float64())
    if values.null_count == len(values):
        raise _no_label(where)
    return values


def _classes(
    source: datasets.Dataset, column: str, names: tuple[str, ...] | None, ids: np.ndarray, where: str, tell: Listener
) -> tuple[pa.Array, tuple[str, ...]]:
    """Each row's place among the classes, null where there is none, and the names of the classes.

    Everything about labels is asked of the different ones, in the order of their first rows.
    """
    feature = source.features[column]
    cells, place = _different(source, column)
    texts = class_texts(cells, feature, where)
    if all(text is None for text in texts):
        raise _no_label(where)
    if names is None:
        names = class_names(texts, feature, where)
        if not isinstance(feature, datasets.ClassLabel):  # whoever declared its names meant them
            tell_absent(texts, np.bincount(place, minlength=len(texts)).tolist(), names, where, tell)
    firsts = np.unique(place, return_index=True)[1]
    indices = class_indices(texts, feature, names, ids[firsts].tolist(), where, tell)
    return pa.array(indices, pa.int64()).take(pa.array(place)), names


def _different(source: datasets.Dataset, column: str) -> tuple[list[Any], np.ndarray]:
    """The different cells of a column, in the order of their first rows, and [N], the place of each row's among them."""
    places: dict[tuple[str, Any], int] = {}
    found: list[Any] = []
    rows = np.empty(len(source), np.int64)
    done = 0
    for piece in pieces_of(source, column):
        for cell in cells_of(piece, column):
            sign = (type(cell).__name__, repr(cell) if isinstance(cell, float | list | dict) else cell)
            place = places.setdefault(sign, len(places))
            if place == len(found):
                found.append(cell)
            rows[done] = place
            done += 1
    return found, rows


def _no_label(where: str) -> DataError:
    return DataError(
        "no row has a label",
        where=where,
        hint="some test sets hide theirs: they can be predicted on, not trained or evaluated on",
    )


def _complete(columns: Columns, task: str, reference: str, tell: Listener, labelled: bool) -> datasets.Dataset:
    """The rows without a gap in them, the others counted aloud."""
    total = len(columns["id"])
    lacking = np.zeros(total, bool)
    reasons: Counter[str] = Counter()  # a row counts where it lacks something first
    for name, cells in columns.items():
        fresh = (np.asarray(cells.is_null()) if cells.null_count else np.zeros(total, bool)) & ~lacking
        if fresh.any():
            reasons[_LACKING.get(name, f"without a {name}")] += int(fresh.sum())
            lacking |= fresh
    if reasons:
        count = int(lacking.sum())
        counted = ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items(), reverse=True))
        if count == total and labelled:
            raise DataError("no row is whole", where=reference, found=f"{counted} of {total:,}")
        told = f"{count:,} of {total:,} rows left out ({counted})" if labelled else f"{counted}: not predicted"
        tell(Notice(f"{reference}: {told}", level="warning"))
    table = InMemoryTable(pa.table(columns))
    return picked(datasets.Dataset(table, fingerprint=NAMELESS), np.flatnonzero(~lacking))
