"""Any reference -> a dataset, with the columns its author gave it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets.arrow_writer import ArrowWriter
from datasets.table import InMemoryTable

from hkft.data import cache
from hkft.data.files import kind_of, read_file
from hkft.data.hub import read_hub
from hkft.data.quiet import quiet
from hkft.data.references import locate, package_path
from hkft.errors import DataError, scrubbed
from hkft.events import Listener, Stage

__all__ = ["batches_of", "cells_of", "column_of", "locate", "package_path", "picked", "read"]

BATCH = 10_000
LARGE = 2**21  # bytes of sources: below, all that is made of them takes less than a second
NAMELESS = "hkft"  # datasets' own name of the content: to make one up, it would read all of it


def read(reference: str, tell: Listener) -> datasets.Dataset:
    """All rows of `hub:<dataset>[/<config>]#<split>`, of `package:<python package>/<path>`, or of a local file.

    Small local files are read into memory. Large ones, by their content, are read once into the cache, a piece at a time,
    and memory-mapped from there. Hub datasets come through datasets' own cache. Raises UsageError for a malformed
    reference, SetupError for a missing package or an unreachable hub, DataError for everything about the data itself.
    The fingerprint that `content_of` gives is the same wherever the same is read.
    """
    quiet()
    tell(Stage(f"reading {scrubbed(reference)}"))
    path = locate(reference)
    if path is None:
        return read_hub(reference)
    kind = kind_of(path)

    def make(file: Path | None) -> datasets.Dataset:
        tables = read_file(path)
        try:
            return _in_memory(tables) if file is None else written(tables, file)
        except (ValueError, NotImplementedError, TypeError, KeyError) as error:
            found = str(error).splitlines()[0]
            raise DataError(
                "a column has a type or a name that datasets cannot hold", where=str(path), found=found
            ) from None

    rows = make(None) if path.stat().st_size <= LARGE else None
    name = cache.key(source=_checksum(path), ending=kind, pyarrow=pa.__version__)
    found = cache.kept(name, make, tell) if rows is None else rows
    return datasets.Dataset(found.data, info=found.info, fingerprint=name)


def content_of(source: datasets.Dataset) -> str:
    """What stands for all that `read` gave: the checksum of a file, of a hub dataset datasets' own fingerprint."""
    return source._fingerprint


def _in_memory(tables: Iterator[pa.Table]) -> datasets.Dataset:
    return datasets.Dataset(InMemoryTable(pa.concat_tables(tables)), fingerprint=NAMELESS)


def written(tables: Iterator[pa.Table], file: Path) -> datasets.Dataset:
    """The rows of one table or more, memory-mapped from `file`."""
    first = next(tables)
    features = datasets.Features.from_arrow_schema(first.schema)
    with ArrowWriter(path=str(file), features=features) as writer:
        for table in chain([first], tables):
            writer.write_table(table)
        writer.finalize()
    return datasets.Dataset.from_file(str(file))


def _checksum(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError("the file cannot be read", where=str(path), found=error.strerror) from None


def cells_of(source: datasets.Dataset, column: str) -> list[Any]:
    """One column as Python values, without decoding the others."""
    return source.select_columns([column])[:][column]


def batches_of(source: datasets.Dataset, *columns: str) -> Iterator[pa.Table]:
    """The rows of some columns, BATCH or fewer at a time: what is made of them is all that is held.

    Picked rows are taken from their pieces, many at once: `Dataset.iter` cuts them out one by one.
    """
    table = source.data.table.select([*columns])
    if source._indices is None:
        yield from (pa.Table.from_batches([batch]) for batch in table.to_batches(BATCH) if len(batch))
        return
    rows, pieces = source._indices.column(0).to_numpy(), table.to_batches()
    ends = np.cumsum([len(piece) for piece in pieces])
    for start in range(0, len(rows), BATCH):
        some = rows[start : start + BATCH].astype(np.int64)
        place = np.searchsorted(ends, some, side="right")
        cuts = np.flatnonzero(np.diff(place)) + 1
        firsts = place[[0, *cuts]].tolist()
        taken = [
            pieces[first].take(pa.array(part - ends[first] + len(pieces[first])))
            for first, part in zip(firsts, np.split(some, cuts), strict=True)
        ]
        yield pa.Table.from_batches(taken)


def pieces_of(source: datasets.Dataset, *columns: str) -> Iterator[datasets.Dataset]:
    """As `batches_of`, as datasets with the source's features."""
    info = datasets.DatasetInfo(features=datasets.Features({name: source.features[name] for name in columns}))
    for table in batches_of(source, *columns):
        yield datasets.Dataset(InMemoryTable(table), info=info, fingerprint=NAMELESS)


def column_of(source: datasets.Dataset, column: str) -> np.ndarray:
    """A column of numbers or truth values without gaps, [N]."""
    parts = [table.column(0).to_numpy() for table in batches_of(source, column)]
    return np.concatenate(parts) if parts else np.array([])


def picked(source: datasets.Dataset, rows: np.ndarray) -> datasets.Dataset:
    """Some rows, in the order of their numbers `rows`. As `Dataset.select`, which holds a Python object for each."""
    if len(rows) == len(source) and (np.diff(rows) == 1).all():
        return source
    numbers = pa.array(rows, pa.uint64())
    if source._indices is not None:
        numbers = source._indices.column(0).take(numbers)
    table = InMemoryTable(pa.table({"indices": numbers}))
    return datasets.Dataset(source.data, info=source.info, indices_table=table, fingerprint=NAMELESS)
