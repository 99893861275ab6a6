"""Tables on the terminal: aligned text in a log file, rich's where there is a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hkft.dropout.named import METHODS
from hkft.view.console import is_plain, output, say

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Rows = Sequence[Sequence[Any]]


def table(columns: Sequence[str], rows: Rows, title: str = "", *, console: Console | None = None) -> None:
    """Print a table on `console` (stdout). Numbers stand to the right, None is a dash, no markup is read."""
    console = console or output()
    if is_plain(console):
        say(console, plain_table(columns, rows, title))
    else:
        console.print(rich_table(columns, rows, title))


def methods_table(console: Console | None = None) -> None:
    """Print the named dropout methods: what each drops, where, and in what pattern."""
    rows = []
    for name, method in METHODS.items():
        sites = ", ".join(f"{site.position}/{site.pattern}" for site in method.sites) or "-"
        rows.append([name, sites, method.consistency.kind if method.consistency else "-", method.summary])
    table(["method", "drops", "loss", "in words"], rows, console=console)


def plain_table(columns: Sequence[str], rows: Rows, title: str = "") -> str:
    """The table as lines of aligned text, two spaces between columns."""
    from rich.cells import cell_len

    cells = [list(columns), *([_text(cell) for cell in row] for row in rows)]
    widths = [max(cell_len(row[n]) for row in cells) for n in range(len(columns))]
    right = _right(len(columns), rows)
    lines = [
        "  ".join(
            " " * (width - cell_len(cell)) + cell if to_right else cell + " " * (width - cell_len(cell))
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in cells
    ]
    return "\n".join([*([title] if title else []), *lines])


def rich_table(columns: Sequence[str], rows: Rows, title: str = "") -> Table:
    """The table for a terminal: a rule under the head, no other lines, long text folded into its column."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    drawn = Table(
        title=Text(title, style="bold") if title else None,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        border_style="dim",
        header_style="dim",
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    for name, to_right in zip(columns, _right(len(columns), rows), strict=True):
        drawn.add_column(Text(name), justify="right" if to_right else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(_text(cell)) for cell in row))
    return drawn


def _right(count: int, rows: Rows) -> list[bool]:
    return [bool(rows) and all(_is_number(row[n]) for row in rows) for n in range(count)]


def _is_number(cell: Any) -> bool:
    if cell is None or (isinstance(cell, int | float) and not isinstance(cell, bool)):
        return True
    parts = str(cell).replace(",", "").rstrip("%x ").split(" ± ")
    return parts == ["-"] or all(part.lstrip("+-").replace(".", "", 1).isdigit() for part in parts)


def _text(cell: Any) -> str:
    if isinstance(cell, float):
        return f"{cell:.4g}"
    return "-" if cell is None else str(cell)
