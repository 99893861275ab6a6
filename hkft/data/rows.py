"""One source -> canonical rows: `id`, `text`, `text_pair` (pairs only), `label`; for generation see `prompts`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import datasets

from hkft.data.labels import class_indices, class_names, class_texts, numbers, tell_absent
from hkft.data.prompts import PromptSection, columns_of
from hkft.data.sources import cells_of, read
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
    return canonical(reference, recipe, labels, tell, labelled).rows


def canonical(
    reference: str,
    recipe: DataRecipe,
    labels: Sequence[str] | None,
    tell: Listener,
    labelled: bool = True,
) -> Rows:
    """As `rows`; where `labels` is None in classification, the classes are those found here."""
    data = recipe.data
    source = read(reference, tell)
    needed = columns_read(recipe, labelled)
    check_columns(source, dict.fromkeys(data.filter or {}, "data.filter") | needed, reference)
    ids = _filtered(source, data.filter or {}, reference)
    chosen = source if len(ids) == len(source) else source.select(ids)
    names = tuple(labels) if labels is not None else None
    return _canonical(chosen, ids, recipe, names, reference, tell, labelled)


def canonical_of(source: datasets.Dataset, recipe: DataRecipe, reference: str, tell: Listener) -> datasets.Dataset:
    """As `rows` without labels, of rows at hand, without the recipe's filter; none may be left."""
    return _canonical(source, list(range(len(source))), recipe, None, reference, tell, False).rows


def _canonical(
    chosen: datasets.Dataset,
    ids: list[int],
    recipe: DataRecipe,
    names: tuple[str, ...] | None,
    reference: str,
    tell: Listener,
    labelled: bool,
) -> Rows:
    data = recipe.data
    columns: dict[str, list[Any]] = {"id": ids}
    if recipe.task == "generation":
        columns |= columns_of(chosen, data, labelled, reference, ids)
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


def _filtered(source: datasets.Dataset, wanted: Mapping[str, Any], reference: str) -> list[int]:
    """The numbers of the rows that the filter keeps: in every column the value, or one of the values, it names."""
    ids = list(range(len(source)))
    for column, value in wanted.items():
        cells, feature = cells_of(source, column), source.features[column]
        if isinstance(feature, datasets.ClassLabel):
            cells = [None if cell is None or cell < 0 else feature.names[cell] for cell in cells]
        allowed = {_spelled(item) for item in (value if isinstance(value, list | tuple) else [value])}
        ids = [row for row in ids if _spelled(cells[row]) in allowed]
        if not ids:
            values = list(dict.fromkeys(_spelled(cell) for cell in cells))
            raise DataError(
                f"no row is left after the filter {column}: {value}",
                where=reference,
                found=", ".join(values[:10]) + (", ..." if len(values) > 10 else ""),
                hint=nearest(str(value), values),
            )
    return ids


def _spelled(value: Any) -> str:
    """A cell's or a recipe's value in one spelling: a csv's "1", 1 and 1.0 are the same, and so are null and ""."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _texts(source: datasets.Dataset, column: str, reference: str) -> list[str | None]:
    """The cells as text, None where blank."""
    cells = cells_of(source, column)
    if nested := [cell for cell in cells if isinstance(cell, list | dict | bytes)]:
        raise DataError(f"column {column!r} holds no text", where=reference, found=repr(nested[0])[:80])
    return [None if cell is None or not str(cell).strip() else str(cell) for cell in cells]


def _labels(
    source: datasets.Dataset,
    column: str,
    task: str,
    names: tuple[str, ...] | None,
    ids: list[int],
    reference: str,
    tell: Listener,
) -> tuple[list[Any], tuple[str, ...] | None]:
    cells, feature, where = cells_of(source, column), source.features[column], f"{reference}: {column}"
    values: list[Any]
    if task == "regression":
        values, names = numbers(cells, ids, where), None
    else:
        values = class_texts(cells, feature, where)
    if all(value is None for value in values):
        raise DataError(
            "no row has a label",
            where=where,
            hint="some test sets hide theirs: they can be predicted on, not trained or evaluated on",
        )
    if task == "classification":
        if names is None:
            names = class_names(values, feature, where)
            if not isinstance(feature, datasets.ClassLabel):  # whoever declared its names meant them
                tell_absent(values, names, where, tell)
        values = class_indices(values, feature, names, ids, where, tell)
    return values, names


def _complete(
    columns: dict[str, list[Any]], task: str, reference: str, tell: Listener, labelled: bool
) -> datasets.Dataset:
    """The rows without a gap in them, the others counted aloud."""
    total = len(columns["id"])
    gaps: dict[int, str] = {}  # row -> what it lacks, the first that it does
    for name, cells in columns.items():
        reason = _LACKING.get(name, f"without a {name}")
        gaps |= {row: reason for row, cell in enumerate(cells) if cell is None and row not in gaps}
    if gaps:
        reasons = Counter(gaps.values())
        counted = ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items(), reverse=True))
        if len(gaps) == total and labelled:
            raise DataError("no row is whole", where=reference, found=f"{counted} of {total:,}")
        told = f"{len(gaps):,} of {total:,} rows left out ({counted})" if labelled else f"{counted}: not predicted"
        tell(Notice(f"{reference}: {told}", level="warning"))
        columns = {name: [v for row, v in enumerate(cells) if row not in gaps] for name, cells in columns.items()}
    label = datasets.Value("float64" if task == "regression" else "int64")
    kinds = {"id": datasets.Value("int64"), "label": label}
    features = datasets.Features({name: kinds.get(name, datasets.Value("string")) for name in columns})
    return datasets.Dataset.from_dict(columns, features=features)
