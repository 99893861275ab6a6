"""An error as a person reads it: what is wrong, where, what was found, what is allowed, what to do."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from hkft.errors import HkftError, Problem
from hkft.view.console import is_plain, output, say


def show_error(error: HkftError, console: Console | None = None) -> None:
    """Print every problem of `error` on `console` (stderr), without a traceback."""
    console = console or output(stderr=True)
    several = len(error.problems) > 1
    if several:
        _headline(console, f"{len(error.problems)} problems")
    for count, problem in enumerate(error.problems, start=1):
        if several:
            _print(console, Text(f"{count}. {_visible(problem.message)}", style="bold"))
        else:
            _headline(console, _visible(problem.message))
        _details(console, problem)


def _headline(console: Console, message: str) -> None:
    _print(console, Text.assemble(("error", "bold red"), ": ", (message, "bold")))


def _visible(text: str) -> str:
    """Without control codes: what a file holds is shown, and does nothing to the terminal."""
    return "".join(sign if sign.isprintable() or sign in "\n\t" else repr(sign)[1:-1] for sign in text)


def _print(console: Console, text: Text) -> None:
    if is_plain(console):
        say(console, text.plain)
    else:
        console.print(text)


def _details(console: Console, problem: Problem) -> None:
    names = ("where", "found", "allowed", "hint")
    details = [(name, _visible(getattr(problem, name))) for name in names if getattr(problem, name)]
    if not details:
        return
    if is_plain(console):
        say(console, "\n".join(f"  {name:<7}  {text}" for name, text in details))
        return
    grid = Table.grid(padding=(0, 2))
    for name, text in details:
        grid.add_row(Text(name, style="dim"), Text(text, style="cyan" if name == "hint" else "", overflow="fold"))
    console.print(Padding(grid, (0, 0, 0, 2)))
