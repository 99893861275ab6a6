"""csv and tsv as people write them: quoted by the rule, or with tabs and no quoting at all.

Python's csv module and not pandas: it knows the line of every record, leaves "NA", "null" and "nan" the words they are,
and does not fill a short row up in silence.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator

from hkft.errors import DataError

Record = tuple[int, list[str]]  # the line it begins on, counted from 1, and its fields

_PROPERLY_QUOTED = re.compile(r'"(?:[^"]|"")*"')
_LONGEST_FIELD = 2**31 - 1  # csv's own limit, 128 KiB, is shorter than a long document


def parse_delimited(text: str, where: str, delimiter: str) -> dict[str, list[str]]:
    """Column name -> cells, from text whose first record is the header.

    Blank lines are skipped. A csv whose header has no comma but another separator, as a spreadsheet set to another
    country writes it, is read by that one. Raises DataError, with the line, for a file without rows, a row of another width than the
    header, a quote that never closes, two columns of one name.
    """
    if delimiter == ",":
        delimiter = _separator(text)
    limit = csv.field_size_limit(_LONGEST_FIELD)
    try:
        records = _tabbed(text) if delimiter == "\t" else list(_records(text, delimiter))
    except csv.Error as error:
        raise DataError(
            "the quotes of this record do not match",
            where=f"{where}:{error.args[1]}",
            found=str(error.args[0]),
            hint='a quote inside a quoted field is written twice: ""',
        ) from None
    finally:
        csv.field_size_limit(limit)
    if not records:
        raise DataError("the file is empty", where=where)
    (_, header), rows = records[0], records[1:]
    names = _names(header, where)
    if not rows:
        raise DataError("the file has a header and no rows", where=where, found=f"columns {', '.join(names)}")
    if ragged := _ragged(records):
        raise _uneven(ragged, names, where, delimiter)
    return dict(zip(names, map(list, zip(*(fields for _, fields in rows), strict=True)), strict=True))


def _separator(text: str) -> str:
    header = next((line for line in text.splitlines() if line.strip()), "")
    return next((sign for sign in (",", ";", "\t", "|") if sign in header), ",")


def _records(text: str, delimiter: str, quoted: bool = True) -> Iterator[Record]:
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    line = 1
    try:
        for fields in reader:
            if len(fields) > 1 or (fields and fields[0].strip()):
                yield line, fields
            line = reader.line_num + 1
    except csv.Error as error:
        raise csv.Error(str(error), line) from None


def _tabbed(text: str) -> list[Record]:
    """The records of a tsv, quoted or not.

    GLUE's files quote nothing, and a lone `"` in a sentence must not join rows; files that pandas writes quote by the
    rule. Where every line is as wide as the header, a record is a line, and the quotes are syntax only if every field
    with a quote in it is properly quoted. Where lines differ, quotes hold tabs or newlines, or the file is broken.
    """
    plain = list(_records(text, "\t", quoted=False))
    if not _ragged(plain):
        marked = [field for _, fields in plain for field in fields if '"' in field]
        syntax = bool(marked) and all(map(_PROPERLY_QUOTED.fullmatch, marked))
        return list(_records(text, "\t")) if syntax else plain
    try:
        quoted = list(_records(text, "\t"))
    except csv.Error:
        return plain
    return plain if _ragged(quoted) else quoted


def _ragged(records: list[Record]) -> Record | None:
    """The first record that is not as wide as the header."""
    return next((record for record in records if len(record[1]) != len(records[0][1])), None)


def _names(header: list[str], where: str) -> list[str]:
    """The header's names; one without a name, as pandas writes its index, is called by its place."""
    names = [name.strip() or f"column_{place}" for place, name in enumerate(header, 1)]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise DataError("two columns have one name", where=f"{where}:1", found=", ".join(repeated))
    return names


def _uneven(record: Record, names: list[str], where: str, delimiter: str) -> DataError:
    line, fields = record
    row = delimiter.join(fields)
    sign = "tab" if delimiter == "\t" else f"{delimiter!r}"
    return DataError(
        f"{len(fields)} fields in a file of {len(names)} columns",
        where=f"{where}:{line}",
        found=row if len(row) <= 80 else f"{row[:77]}...",
        allowed=f"one field each for {', '.join(names)}",
        hint=f'text that holds a {sign} stands in double quotes: "..."',
    )
