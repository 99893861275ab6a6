"""A comparison on the terminal: the table, what may be said of it, and what must be said with it."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.text import Text

from hkft.comparison import tables
from hkft.comparison.compare import Comparison
from hkft.view.console import is_plain, output, say
from hkft.view.tables import table


def show_comparison(result: Comparison, folder: Path | None = None, console: Console | None = None) -> None:
    """Print `result` on `console` (stdout), and the folder of its files where it has one."""
    console = console or output()
    table(*tables.fitted(result, console.width), console=console)
    titles, rows = tables.settings(result)
    if rows:
        _paragraph(console, ["settings tried"])
        table(titles, rows, console=console)
    _paragraph(console, tables.sentences(result))
    _paragraph(console, tables.foreign(result))
    _paragraph(console, [f"warning: {text}" for text in tables.warned(result)], "yellow")
    _paragraph(console, [f"note: {text}" for text in result.notes], "dim")
    if folder:
        _paragraph(console, [f"report: {folder / 'report.html'}", f"tables: {folder}/comparison.{{md,tex,csv,json}}"])


def _paragraph(console: Console, lines: list[str], style: str = "") -> None:
    if not lines:
        return
    if is_plain(console):
        say(console, "\n".join(["", *lines]))
    else:
        console.print(Text("\n".join(["", *lines]), style=style))
