"""Label cells -> class names and indices, or floats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import datasets

from hkft.errors import DataError, nearest
from hkft.events import Listener, Notice

MANY = 10  # more fractional values than this are a scale, not classes
HIDDEN = -1.0  # where every label is this, there are none: so GLUE hides those of its test sets
_ABSENT = {"na", "n/a", "nan", "null", "none", "?", "-"}  # what other tools write for "no value"


def class_texts(cells: Sequence[Any], feature: Any, where: str) -> list[str | None]:
    """Each cell's class as text, None where there is none: empty cells, and -1 where GLUE hides a test set's labels.

    A ClassLabel gives its names. Where all are numbers, 1, 1.0 and "1.0" are the one class "1". Raises DataError for
    cells that hold lists or objects.
    """
    if isinstance(feature, datasets.ClassLabel):
        return [None if cell is None or cell < 0 else feature.names[cell] for cell in cells]
    if nested := [cell for cell in cells if isinstance(cell, list | dict)]:
        raise DataError("a label is one value", where=where, found=repr(nested[0])[:80])
    texts = [None if _missing(cell) else str(cell).strip() for cell in cells]
    numbers = [None if text is None else _number(text) for text in texts]
    if any(number is None and text is not None for number, text in zip(numbers, texts, strict=True)):
        return texts
    if set(numbers) == {HIDDEN}:
        return [None] * len(texts)
    return [None if number is None else _plain(number) for number in numbers]


def class_names(texts: Sequence[str | None], feature: Any, where: str) -> tuple[str, ...]:
    """The classes in the order of their indices: a ClassLabel's own, numbers by size, other text by the alphabet.

    Raises DataError where there is one class only, or what looks like a scale.
    """
    present = {text for text in texts if text is not None}
    if len(present) == 1:
        raise DataError(
            "every row has the same label: there is nothing to learn", where=where, found=repr(present.pop())
        )
    if isinstance(feature, datasets.ClassLabel):
        return tuple(feature.names)
    numbers = {text: _number(text) for text in present}
    if any(number is None for number in numbers.values()):
        return tuple(sorted(present))
    names = tuple(sorted(present, key=lambda text: numbers[text] or 0.0))
    if len(names) > MANY and any(not float(name).is_integer() for name in names):
        raise DataError(
            "the labels are a scale, not classes",
            where=where,
            found=f"{len(names)} values, from {names[0]} to {names[-1]}",
            hint="this looks like `task: regression`",
        )
    return names


def tell_absent(
    texts: Sequence[str | None], counts: Sequence[int], names: Sequence[str], where: str, tell: Listener
) -> None:
    """Say which classes are spelled as other tools spell a missing label: hkft takes them at their word.

    counts: the rows of each text.
    """
    for name in names:
        if name.casefold() not in _ABSENT:
            continue
        if rows := sum(count for text, count in zip(texts, counts, strict=True) if text == name):
            counted = f"{rows:,} row{'s' * (rows != 1)}"
            tell(Notice(f"{where}: {name!r} is a class of {counted}; leave the cell empty where there is no label"))


def class_indices(
    texts: Sequence[str | None],
    feature: Any,
    names: Sequence[str],
    ids: Sequence[int],
    where: str,
    tell: Listener,
) -> list[int | None]:
    """Each row's place in `names`, None where it has no label.

    A ClassLabel whose names are others is read by its numbers where `names` are numbers: the hub's "negative" is the 0
    of a file. Raises DataError for a label outside `names`, with its row.
    """
    place = {name: index for index, name in enumerate(names)}
    if isinstance(feature, datasets.ClassLabel) and not place.keys() & set(feature.names):
        numbers = {name: str(index) for index, name in enumerate(feature.names)}
        if set(numbers.values()) <= place.keys():
            pairs = ", ".join(f"{number} for {name}" for name, number in numbers.items())
            tell(Notice(f"{where}: its labels are read by their numbers: {pairs}"))
            place = {name: place[number] for name, number in numbers.items()}
    for row, text in zip(ids, texts, strict=True):
        if text is not None and text not in place:
            raise DataError(
                f"row {row} (the first is 0) has a label that training does not know",
                where=where,
                found=repr(text),
                allowed=", ".join(names),
                hint=nearest(text, names),
            )
    return [None if text is None else place[text] for text in texts]


def numbers(cells: Sequence[Any], ids: Sequence[int], where: str) -> list[float | None]:
    """Regression targets, None where a cell is empty. Raises DataError, with the row, for text, NaN and inf."""
    found: list[float | None] = []
    for row, cell in zip(ids, cells, strict=True):
        if cell is None or (isinstance(cell, str) and not cell.strip()):
            found.append(None)
            continue
        number = None if isinstance(cell, bool | list | dict) else _number(str(cell))
        if number is None:
            raise DataError(
                f"row {row} (the first is 0) has a label that is no finite number",
                where=where,
                found=repr(cell)[:80],
                hint=None if _is_number(cell) else "labels that are names go with `task: classification`",
            )
        found.append(number)
    return found


def _missing(cell: Any) -> bool:
    """Whether there is no label: null, NaN, blank."""
    return cell is None or (isinstance(cell, float) and math.isnan(cell)) or not str(cell).strip()


def _number(text: str) -> float | None:
    """The finite number a text writes, or None."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) and "_" not in text else None


def _is_number(cell: Any) -> bool:
    try:
        float(cell)
    except (TypeError, ValueError):
        return False
    return True


def _plain(number: float) -> str:
    return str(int(number)) if number.is_integer() else repr(number)
