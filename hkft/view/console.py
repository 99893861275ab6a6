"""Where text goes, and whether that place can show more than plain lines."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

OFF = ("", "0", "false")


def output(*, stderr: bool = False) -> Console:
    """The console of stdout or stderr. What its encoding cannot say is printed as `?`, never an error."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
        stream.reconfigure(errors="replace")
    return Console(stderr=stderr, highlight=False)


def plain_is_asked(environ: Mapping[str, str] | None = None) -> bool:
    """Whether the user's NO_COLOR or CI is set: no control codes then, no bars. environ: None is the process's own."""
    environ = os.environ if environ is None else environ
    return any(environ.get(name, "").lower() not in OFF for name in ("NO_COLOR", "CI"))


def is_plain(console: Console, environ: Mapping[str, str] | None = None) -> bool:
    """No terminal, a dumb one, or what `plain_is_asked` says: one line after the other."""
    return plain_is_asked(environ) or not console.is_terminal or console.is_dumb_terminal


def say(console: Console, text: str) -> None:
    """Print `text` as it is: nothing wrapped, coloured or read as markup."""
    console.out(text, highlight=False)
