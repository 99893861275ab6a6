"""What every command shares: its common options, the screen, and how an error becomes a message and an exit code."""

from __future__ import annotations

import functools
import json as jsonlib
import logging
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any, ParamSpec

import typer

from hkft.errors import INTERRUPTED, HkftError
from hkft.events import Listener, Stage

Recipe = Annotated[
    str, typer.Option("--recipe", "-r", help="A recipe file, or the name of a shipped one (see `hkft recipes`).")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set a value of the recipe: --set dropout.rate=0.2. Repeatable."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, everything else on stderr.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

P = ParamSpec("P")


def reported(command: Callable[P, None]) -> Callable[P, None]:
    """Show an HkftError calmly and exit with its code; with --debug, let it show its traceback."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        debug = bool(kwargs.get("debug"))
        try:
            command(*args, **kwargs)
        except HkftError as error:
            if debug:
                raise
            if kwargs.get("json"):
                problems = [{k: getattr(p, k) for k in p.__slots__} for p in error.problems]
                show_json({"error": type(error).__name__, "exit_code": error.exit_code, "problems": problems})
            from hkft.view.errors import show_error

            show_error(error)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None

    return run


def quiet(tell: Listener) -> None:
    """Load the libraries below, aloud, and let hkft's own screen speak: none of their bars, log lines and warnings."""
    tell(Stage("starting torch and transformers"))
    warnings.filterwarnings("ignore", module=r"(?!hkft\b)")
    for name in ("bitsandbytes", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from hkft.data.quiet import quiet as quiet_datasets

    quiet_datasets()
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def show_json(document: Any) -> None:
    """One JSON document on stdout."""
    from hkft.folder import jsonable

    sys.stdout.write(jsonlib.dumps(jsonable(document), indent=2) + "\n")
