"""csv and tsv as people write them: quoted by the rule, or with tabs and no quoting at all.

Python's csv module and not pandas: it knows the line of every record, leaves "NA", "null" and "nan" the words they are,
and does not fill a short row up in silence.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Generator, Iterator
from itertools import islice
from typing import TextIO

from hkft.errors import DataError

Open = Callable[[], TextIO]
Record = tuple[int, list[str]]  # the line it begins on, counted from 1, and its fields

BATCH = 10_000  # rows at a time
_PROPERLY_QUOTED = re.compile(r'"(?:[^"]|"")*"')
_LONGEST_FIELD = 2**31 - 1  # csv's own limit, 128 KiB, is shorter than a long document


def parse_delimited(opened: Open, where: str, delimiter: str) -> Iterator[dict[str, list[str]]]:
    """Column name -> cells, some rows at a time, from text whose first record is the header.

    Blank lines are skipped. A csv whose header has no comma but another separator, as a spreadsheet set to another
    country writes it, is read by that one. Raises DataError, with the line, for a file without rows, a row of another width than the
    header, a quote that never closes, two columns of one name: once the whole text has been read.

    opened: opens the text anew, with its lines' ends as they are (newline="").
    """
    if delimiter == ",":
        delimiter = _separator(opened)
    limit = csv.field_size_limit(_LONGEST_FIELD)
    try:
        quoted = delimiter != "\t" or _tabs_are_quoted(opened)
        yield from _batches(opened, where, delimiter, quoted)
    except csv.Error as error:
        raise DataError(
            "the quotes of this record do not match",
            where=f"{where}:{error.args[1]}",
            found=str(error.args[0]),
            hint='a quote inside a quoted field is written twice: ""',
        ) from None
    finally:
        csv.field_size_limit(limit)


def _batches(opened: Open, where: str, delimiter: str, quoted: bool) -> Iterator[dict[str, list[str]]]:
    records = _records(opened, delimiter, quoted)
    _, header = next(records, (0, None))
    if header is None:
        raise DataError("the file is empty", where=where)
    fields, ragged, some = len(header), None, False
    names = [name.strip() or f"column_{place}" for place, name in enumerate(header, 1)]  # pandas' index has no name
    while rows := list(islice(records, BATCH)):
        some = True
        ragged = ragged or next((record for record in rows if len(record[1]) != fields), None)
        if ragged is None:  # else the rest is read only for a quote that never closes, which is told first
            yield dict(zip(names, map(list, zip(*(cells for _, cells in rows), strict=True)), strict=True))
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise DataError("two columns have one name", where=f"{where}:1", found=", ".join(repeated))
    if not some:
        raise DataError("the file has a header and no rows", where=where, found=f"columns {', '.join(names)}")
    if ragged:
        raise _uneven(ragged, names, where, delimiter)


def _separator(opened: Open) -> str:
    with opened() as text:
        header = next((part for line in text for part in line.splitlines() if part.strip()), "")
    return next((sign for sign in (",", ";", "\t", "|") if sign in header), ",")


def _records(opened: Open, delimiter: str, quoted: bool = True) -> Iterator[Record]:
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    line = 1
    with opened() as text:
        reader = csv.reader(text, delimiter=delimiter, quoting=quoting, strict=True)
        try:
            for fields in reader:
                if len(fields) > 1 or (fields and fields[0].strip()):
                    yield line, fields
                line = reader.line_num + 1
        except csv.Error as error:
            raise csv.Error(str(error), line) from None


def _tabs_are_quoted(opened: Open) -> bool:
    """Whether quotes of a tsv are syntax.

    GLUE's files quote nothing, and a lone `"` in a sentence must not join rows; files that pandas writes quote by the
    rule. Where every line is as wide as the header, a record is a line, and the quotes are syntax only if every field
    with a quote in it is properly quoted. Where lines differ, quotes hold tabs or newlines, or the file is broken.
    """
    marked, proper, even = False, True, True
    for record in (plain := _even(_records(opened, "\t", quoted=False))):
        if record is None:
            even = False
            break
        for field in record:
            if '"' in field:
                marked, proper = True, proper and bool(_PROPERLY_QUOTED.fullmatch(field))
    plain.close()
    if even:
        return marked and proper
    try:
        return all(record is not None for record in _even(_records(opened, "\t")))
    except csv.Error:
        return False


def _even(records: Iterator[Record]) -> Generator[list[str] | None]:
    """The fields of each record; None for the first that is not as wide as the header, and no more."""
    width = None
    for _, fields in records:
        width = len(fields) if width is None else width
        if len(fields) != width:
            yield None
            return
        yield fields


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
