"""One local file -> tables of one schema, some rows at a time; nothing is written beside it.

Python's and pyarrow's own readers and not the builders of datasets: those guess types ("NA" becomes nothing), and report
errors without a line. All but a JSON document, which is one value, is read in pieces, and twice: whether it is text at all
is found before the first row.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from hkft.data.delimited import parse_delimited
from hkft.data.references import neighbour
from hkft.errors import DataError

KINDS = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")
BATCH = 10_000  # rows of JSON lines or parquet at a time
BLOCK = 2**20  # bytes at a time
_NOT_UTF8 = "save it as UTF-8 (in a spreadsheet: 'CSV UTF-8'), or convert it with iconv"


def read_file(path: Path) -> Iterator[pa.Table]:
    """The rows of a csv, tsv, json, jsonl or parquet file; all but parquet may be gzipped.

    Cells of csv and tsv are text, "" where empty. Raises DataError for whatever is wrong with the file, some of it only
    after the last row has been given.
    """
    where = str(path)
    kind = kind_of(path)
    if kind == ".parquet":
        yield from _parquet(path)
        return
    _check_text(path)
    if kind in (".csv", ".tsv"):
        opened = partial(_text, path, "")
        for columns in parse_delimited(opened, where, "," if kind == ".csv" else "\t"):
            yield pa.table(columns)
    else:
        yield from _json(path, where, lines=kind != ".json")


def kind_of(path: Path) -> str:
    """One of KINDS. Raises DataError where there is no file, or none of them."""
    where = str(path)
    try:
        if path.is_dir():
            inside = sorted(entry.name for entry in path.iterdir() if _kind(entry) in KINDS)
            raise DataError(
                "this is a folder, not a file", where=where, found=", ".join(inside[:5]) or "no data file in it"
            )
        if not path.exists():
            here = None if path.is_absolute() else f"a relative path is looked for from {Path.cwd()}"
            raise DataError("there is no such file", where=where, hint=neighbour(path) or here)
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise _unread(where, error) from None
    kind = _kind(path)
    if kind not in KINDS:
        allowed = ", ".join(kind.removeprefix(".") for kind in KINDS)
        raise DataError("the file's ending names no format hkft reads", where=where, allowed=f"{allowed} (.gz too)")
    return kind


def _kind(path: Path) -> str:
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def _opened(path: Path) -> BinaryIO:
    """The file's bytes, decompressed."""
    file = path.open("rb")
    if file.read(2) == b"\x1f\x8b":
        file.close()
        return cast(BinaryIO, gzip.open(path, "rb"))
    file.seek(0)
    return file


def _text(path: Path, newline: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(_opened(path), encoding="utf-8-sig", newline=newline)


def _check_text(path: Path) -> None:
    """Raise DataError where the file cannot be read, is blank, or is no text in UTF-8."""
    try:
        with _opened(path) as file:
            _check_blocks(path, iter(lambda: file.read(BLOCK), b""))
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise DataError("the gzip file is damaged or cut short", where=str(path)) from None
    except OSError as error:
        raise _unread(str(path), error) from None


def _unread(where: str, error: OSError) -> DataError:
    return DataError("the file cannot be read", where=where, found=error.strerror)


def _check_blocks(path: Path, blocks: Iterator[bytes]) -> None:
    decoder, lines, blank, zero = codecs.getincrementaldecoder("utf-8")(), 1, True, None
    first = next(blocks, b"")
    if first.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError("this is not UTF-8 text", where=str(path), found="UTF-16", hint=_NOT_UTF8)
    try:
        for block in chain([first], blocks, [b""]):
            blank = blank and not block.strip()
            text = decoder.decode(block, final=not block)
            if zero is None and "\0" in text:
                zero = lines + text.count("\n", 0, text.index("\0"))
            lines += text.count("\n")
    except UnicodeDecodeError as error:
        line, found = lines + error.object.count(b"\n", 0, error.start), f"byte 0x{error.object[error.start]:02x}"
        raise DataError("this is not UTF-8 text", where=f"{path}:{line}", found=found, hint=_NOT_UTF8) from None
    if blank:
        raise DataError("the file is empty", where=str(path))
    if zero is not None:
        raise DataError("this is binary, not text", where=f"{path}:{zero}", found="a zero byte")


def _parquet(path: Path) -> Iterator[pa.Table]:
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            if file.metadata.num_rows == 0:
                raise DataError("the file has no rows", where=str(path), found=f"columns {', '.join(schema.names)}")
            if repeated := sorted({name for name in schema.names if schema.names.count(name) > 1}):
                raise DataError("two columns have one name", where=str(path), found=", ".join(repeated))
            for batch in file.iter_batches(BATCH):
                batch.validate(full=True)  # pyarrow takes a text's bytes as they come
                yield _without_categories(pa.Table.from_batches([batch]).replace_schema_metadata(schema.metadata))
    except (pa.ArrowException, OSError) as error:
        found = str(error).splitlines()[0]
        raise DataError("this is not a parquet file that can be read", where=str(path), found=found) from None


def _without_categories(table: pa.Table) -> pa.Table:
    """pandas' categories, which datasets does not read, as what they stand for."""
    for place, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            table = table.set_column(place, field.name, table.column(place).cast(field.type.value_type))
    return table


def _json(path: Path, where: str, lines: bool) -> Iterator[pa.Table]:
    """Objects one a line, or a list of them, or an object with one such list in it, or with a list for each column."""
    document: Any = None
    if not lines:
        try:
            with _text(path, "\n") as file:
                document = json.load(file)
        except (ValueError, RecursionError) as error:
            if not (isinstance(error, json.JSONDecodeError) and error.msg.startswith("Extra data")):
                raise _not_json(error, where, getattr(error, "lineno", 1)) from None
            lines = True  # lines of JSON under the ending of a document
    if lines:
        objects = partial(_objects, path, where)
        document = list(islice(objects(), BATCH + 1))
        if len(document) > BATCH:
            del document
            yield from _of_many(objects, where)
            return
    if isinstance(document, Mapping):
        document = _unwrap(document)
    if not isinstance(document, list):
        raise DataError("this JSON holds no rows", where=where, allowed="a list of objects, or one object a line")
    if not document:
        raise DataError("the file has no rows", where=where)
    _check_objects(document, 0, where)
    yield _json_of_rows(document, where)


def _json_of_rows(rows: Sequence[Mapping[str, Any]], where: str) -> pa.Table:
    names = _names(rows, where)
    return pa.table({name: _column([row.get(name) for row in rows], name, where) for name in names})


def _names(rows: Sequence[Mapping[str, Any]], where: str) -> list[str]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise _not_unicode(name, where) from None
    return names


def _check_objects(items: Sequence[Any], before: int, where: str) -> None:
    for place, item in enumerate(items, before):
        if not isinstance(item, Mapping):
            raise DataError(
                f"row {place} is no object", where=where, found=json.dumps(item)[:80], allowed='{"...": ...}'
            )


def _of_many(objects: Callable[[], Iterator[Any]], where: str) -> Iterator[pa.Table]:
    """Tables of objects that are read anew each time: first for what kinds of cells they have, then for the rows."""
    kinds = _kinds(objects, where)
    for items in _batched(objects()):
        cells = {name: [item.get(name) for item in items] for name in kinds}
        yield pa.table(
            {
                name: _as_text(cells[name]) if kind is None else pa.array(cells[name], kind)
                for name, kind in kinds.items()
            }
        )


def _kinds(objects: Callable[[], Iterator[Any]], where: str) -> dict[str, pa.DataType | None]:
    """The Arrow type of each name's cells; None where they are of several kinds."""
    found: dict[str, dict[pa.DataType | None, None]] = {}  # of each name the types, in the order of their first rows
    done, problem = 0, None
    for items in _batched(objects()):
        try:
            _check_objects(items, done, where)
            for name in _names(items, where):
                found.setdefault(name, {})[_kind_of([item.get(name) for item in items], name, where)] = None
        except DataError as error:
            problem = problem or error  # a line that is no JSON is told first
        done += len(items)
    if problem:
        raise problem
    kinds = {name: _common([*several]) for name, several in found.items()}
    unsure = [
        name for name, several in found.items() if kinds[name] is not None and len(several.keys() - {pa.null()}) > 1
    ]
    for items in _batched(objects()) if unsure else ():
        for name in unsure:
            try:
                pa.array([item.get(name) for item in items], kinds[name])
            except (pa.ArrowException, OverflowError):
                kinds[name] = None
    return kinds


def _kind_of(cells: list[Any], name: str, where: str) -> pa.DataType | None:
    try:
        return pa.array(cells).type
    except UnicodeEncodeError:
        raise _not_unicode(name, where) from None
    except (pa.ArrowException, OverflowError):
        return None


def _common(kinds: Sequence[pa.DataType | None]) -> pa.DataType | None:
    """The type that holds cells of all these; None where only text does."""
    schemas = [pa.schema([("cell", kind)]) for kind in kinds if kind is not None]
    try:
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type if None not in kinds else None
    except pa.ArrowException:
        return None


def _batched(objects: Iterator[Any]) -> Iterator[list[Any]]:
    return iter(lambda: list(islice(objects, BATCH)), [])


def _objects(path: Path, where: str) -> Iterator[Any]:
    with _text(path, "\n") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield json.loads(line.removesuffix("\n"))
            except (ValueError, RecursionError) as error:
                raise _not_json(error, where, number) from None


def _not_json(error: Exception, where: str, line: int) -> DataError:
    """Of a text that is no JSON, or that Python does not read: nested too deeply, a number of thousands of digits."""
    if isinstance(error, json.JSONDecodeError):
        return DataError("this is not JSON", where=f"{where}:{line}:{error.colno}", found=error.msg)
    found = "lists or objects nested too deeply" if isinstance(error, RecursionError) else "a number of too many digits"
    return DataError("this JSON cannot be read", where=f"{where}:{line}", found=found)


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
        raise _not_unicode(name, where) from None
    except (pa.ArrowException, OverflowError):
        return _as_text(cells)


def _as_text(cells: Sequence[Any]) -> pa.Array:
    texts = [cell if cell is None or isinstance(cell, str) else json.dumps(cell) for cell in cells]
    return pa.array(texts, pa.string())


def _not_unicode(name: str, where: str) -> DataError:
    return DataError(f"column {name!r} holds text that is not Unicode (half a surrogate pair)", where=where)
