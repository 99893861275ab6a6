"""Any reference -> a dataset, with the columns its author gave it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import datasets

from hkft.data.files import read_file
from hkft.data.hub import read_hub
from hkft.data.quiet import quiet
from hkft.data.references import locate, package_path
from hkft.errors import DataError
from hkft.events import Listener, Stage

__all__ = ["cells_of", "in_memory", "locate", "package_path", "read"]

Encode = Callable[[Mapping[str, list[Any]]], dict[str, Any]]


def read(reference: str, tell: Listener) -> datasets.Dataset:
    """All rows of `hub:<dataset>[/<config>]#<split>`, of `package:<python package>/<path>`, or of a local file.

    Local files are read into memory, hub datasets through datasets' own cache. Raises UsageError for a malformed
    reference, SetupError for a missing package or an unreachable hub, DataError for everything about the data itself.
    """
    quiet()
    tell(Stage(f"reading {reference}"))
    path = locate(reference)
    if path is None:
        return read_hub(reference)
    table = read_file(path)
    try:
        return datasets.Dataset(table)
    except (ValueError, NotImplementedError, TypeError) as error:
        found = str(error).splitlines()[0]
        raise DataError("a column has a type that datasets cannot hold", where=str(path), found=found) from None


def in_memory(rows: datasets.Dataset, encode: Encode, features: datasets.Features, batch_size: int) -> datasets.Dataset:
    """What `encode` makes of batches of the rows, with the columns of `features` alone, and no file of it on disk."""
    return rows.map(
        encode,
        batched=True,
        batch_size=batch_size,
        remove_columns=rows.column_names,
        features=features,
        keep_in_memory=True,
        load_from_cache_file=False,
        new_fingerprint="tokenised",  # else datasets pickles the tokenizer to name a cache file that is never written
    )


def cells_of(source: datasets.Dataset, column: str) -> list[Any]:
    """One column as Python values, without decoding the others."""
    return source.select_columns([column])[:][column]
