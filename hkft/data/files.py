"""One local file -> one table in memory. Nothing is written, beside the file or into a cache.

Python's and pyarrow's own readers and not the builders of datasets: those copy every file into a shared cache on disk,
guess types ("NA" becomes nothing), and report errors without a line.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hkft.data.delimited import parse_delimited
from hkft.data.references import neighbour
from hkft.errors import DataError

KINDS = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")
_NOT_UTF8 = "save it as UTF-8 (in a spreadsheet: 'CSV UTF-8'), or convert it with iconv"


def read_file(path: Path) -> pa.Table:
    """The table in a csv, tsv, json, jsonl or parquet file; all but parquet may be gzipped.

    Cells of csv and tsv are text, "" where empty. Raises DataError for whatever is wrong with the file.
    """
    where = str(path)
    if path.is_dir():
        inside = sorted(entry.name for entry in path.iterdir() if _kind(entry) in KINDS)
        raise DataError(
            "this is a folder, not a file", where=where, found=", ".join(inside[:5]) or "no data file in it"
        )
    if not path.exists():
        here = None if path.is_absolute() else f"a relative path is looked for from {Path.cwd()}"
        raise DataError("there is no such file", where=where, hint=neighbour(path) or here)
    kind = _kind(path)
    if kind not in KINDS:
        allowed = ", ".join(kind.removeprefix(".") for kind in KINDS)
        raise DataError("the file's ending names no format hkft reads", where=where, allowed=f"{allowed} (.gz too)")
    if kind == ".parquet":
        return _parquet(path)
    text = _text(path)
    if kind in (".csv", ".tsv"):
        return pa.table(parse_delimited(text, where, "," if kind == ".csv" else "\t"))
    return _json(text, where, lines=kind != ".json")


def _kind(path: Path) -> str:
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def _bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise DataError("the gzip file is damaged or cut short", where=str(path)) from None
    except OSError as error:
        raise DataError("the file cannot be read", where=str(path), found=error.strerror) from None


def _text(path: Path) -> str:
    data = _bytes(path)
    if not data.strip():
        raise DataError("the file is empty", where=str(path))
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError("this is not UTF-8 text", where=str(path), found="UTF-16", hint=_NOT_UTF8)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{data[error.start]:02x}"
        raise DataError("this is not UTF-8 text", where=f"{path}:{line}", found=found, hint=_NOT_UTF8) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError("this is binary, not text", where=f"{path}:{line}", found="a zero byte")
    return text


def _parquet(path: Path) -> pa.Table:
    try:
        table = pq.ParquetFile(path).read()
    except (pa.ArrowException, OSError) as error:
        found = str(error).splitlines()[0]
        raise DataError("this is not a parquet file that can be read", where=str(path), found=found) from None
    if table.num_rows == 0:
        raise DataError("the file has no rows", where=str(path), found=f"columns {', '.join(table.column_names)}")
    for place, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):  # pandas' categories, which datasets does not read
            table = table.set_column(place, field.name, table.column(place).cast(field.type.value_type))
    return table


def _json(text: str, where: str, lines: bool) -> pa.Table:
    """Objects one a line, or a list of them, or an object with one such list in it, or with a list for each column."""
    document: Any = None
    if not lines:
        try:
            document = json.loads(text)
        except json.JSONDecodeError as error:
            if not error.msg.startswith("Extra data"):
                raise _not_json(error, where, error.lineno) from None
            lines = True  # lines of JSON under the ending of a document
    if lines:
        document = _objects(text, where)
    if isinstance(document, Mapping):
        document = _unwrap(document)
    if not isinstance(document, list):
        raise DataError("this JSON holds no rows", where=where, allowed="a list of objects, or one object a line")
    for place, item in enumerate(document):
        if not isinstance(item, Mapping):
            raise DataError(
                f"row {place} is no object", where=where, found=json.dumps(item)[:80], allowed='{"...": ...}'
            )
    if not document:
        raise DataError("the file has no rows", where=where)
    names = dict.fromkeys(name for item in document for name in item)
    return pa.table({name: _column([item.get(name) for item in document], name, where) for name in names})


def _objects(text: str, where: str) -> list[Any]:
    rows: list[Any] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise _not_json(error, where, number) from None
    return rows


def _not_json(error: json.JSONDecodeError, where: str, line: int) -> DataError:
    return DataError("this is not JSON", where=f"{where}:{line}:{error.colno}", found=error.msg)


def _unwrap(document: Mapping[str, Any]) -> list[Any] | None:
    """The rows inside an object: {"data": [{...}, ...]}, or {"text": [...], "label": [...]}. None: neither."""
    lists = [value for value in document.values() if isinstance(value, list)]
    tables = [value for value in lists if value and all(isinstance(item, Mapping) for item in value)]
    if len(tables) == 1:
        return tables[0]
    if lists and len(lists) == len(document) and len({len(value) for value in lists}) == 1:
        return [dict(zip(document, cells, strict=True)) for cells in zip(*lists, strict=True)]
    return None


def _column(cells: Sequence[Any], name: str, where: str) -> pa.Array:
    """One column; where its cells are of several kinds (1 and "1"), all are written as text."""
    try:
        return pa.array(cells)
    except UnicodeEncodeError:
        raise DataError(
            f"column {name!r} holds text that is not Unicode (half a surrogate pair)", where=where
        ) from None
    except (pa.ArrowException, OverflowError):
        return pa.array([cell if cell is None or isinstance(cell, str) else json.dumps(cell) for cell in cells])
