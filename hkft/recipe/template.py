"""`data.prompt` and `data.completion`: the name of a column, or a text with columns in it.

"human_reference"                   the column
"{meaning_representation} ->"       a template: every {column} is replaced by its cell; {{ and }} are braces
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Any

LISTED = " | "  # between the items of a cell that holds a list


@dataclass(frozen=True)
class Template:
    """Pieces of text, each followed by a column's cell, or by nothing."""

    pieces: tuple[tuple[str, str | None], ...]

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(column for _, column in self.pieces if column is not None))

    def fill(self, cells: Mapping[str, Any]) -> str | None:
        """The text of one row; None where every cell it asks for is empty. One empty beside others adds nothing."""
        texts = {column: _text(cells[column]) for column in self.columns}
        if not any(text.strip() for text in texts.values()):
            return None
        return "".join(before + ("" if column is None else texts[column]) for before, column in self.pieces)


def template(text: str) -> Template:
    """A column's name where there is no brace in it, else a template. Raises ValueError, with what is wrong."""
    if "{" not in text and "}" not in text:
        return Template((("", text),))
    pieces = []
    for before, column, form, conversion in Formatter().parse(text):  # raises ValueError for a single brace
        if column == "":
            raise ValueError("{} names no column")
        if form or conversion:
            raise ValueError(f"{{{column}}} takes no format: a column's name stands alone between the braces")
        pieces.append((before, column))
    found = Template(tuple(pieces))
    if not found.columns:
        raise ValueError("no column stands in it, so it would be the same for every row")
    return found


def _text(cell: Any) -> str:
    if cell is None:
        return ""
    if isinstance(cell, list | tuple) and all(isinstance(item, str) for item in cell):
        return LISTED.join(cell)
    return str(cell)
