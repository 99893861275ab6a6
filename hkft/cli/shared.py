"""What every command shares: its common options, the screen, and how an error becomes a message and an exit code."""

from __future__ import annotations

import functools
import json as jsonlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TextIO

import typer

from hkft import processes
from hkft.errors import INTERRUPTED, TERMINATED, DataError, HkftError, Terminated, UsageError, foreseen, terminable
from hkft.events import Listener, Stage

if TYPE_CHECKING:
    from hkft.recipe import Recipe as RecipeRead

Recipe = Annotated[
    str, typer.Option("--recipe", "-r", help="A recipe file, or the name of a shipped one (see `hkft recipes`).")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set a value of the recipe: --set dropout.rate=0.2. Repeatable."),
]
Source = Annotated[str, typer.Argument(metavar="RUN|ADAPTER", help="A run folder, or a PEFT adapter folder.")]
Checkpoint = Annotated[str, typer.Option(help="best, last, or the path of an adapter.")]
WithoutRun = Annotated[str | None, typer.Option("--recipe", "-r", help="The recipe, where there is no run.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, everything else on stderr.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

ALONE = "alone"  # typer's context object where the process does nothing else than one command

P = ParamSpec("P")


def reported(command: Callable[P, None]) -> Callable[P, None]:
    """Show an error calmly and exit with its code; with --debug, after its traceback.

    Of several processes only a run of `hkft train` is, and what all of them have to say the first one says.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            with terminable():
                if processes.count() > 1 and command.__name__ != "train":
                    raise UsageError(
                        "several processes train a run; everything else is done by one",
                        found=f"{processes.count()} processes",
                        hint="leave out torchrun or `accelerate launch`",
                    )
                command(*args, **kwargs)
        except (Exception, KeyboardInterrupt) as error:
            json, problem = bool(kwargs.get("json")), foreseen(error)
            if _interrupted(error):
                code = _stopped(error, json)
            elif problem is not None:
                code = _failed(problem, json, bool(kwargs.get("debug")))
            else:
                raise
            raise typer.Exit(code) from None

    return run


def _failed(error: HkftError, json: bool, debug: bool) -> int:
    """Say what went wrong, and return the exit code."""
    if error.elsewhere or not (processes.first() or processes.joined()):
        processes.let_first_speak()
        return error.exit_code
    if debug:
        traceback.print_exc()
    if json:
        problems = [asdict(problem) for problem in error.problems]
        show_json({"error": type(error).__name__, "exit_code": error.exit_code, "problems": problems})
    from hkft.view.errors import show_error

    show_error(error)
    return error.exit_code


def _stopped(error: BaseException, json: bool) -> int:
    """Say by what a command was stopped, and return the exit code."""
    code = TERMINATED if isinstance(error, Terminated) else INTERRUPTED
    if processes.first():
        if json:
            show_json({"error": "KeyboardInterrupt", "exit_code": code, "problems": []})
        typer.echo("terminated" if code == TERMINATED else "interrupted", err=True)
    return code


def _interrupted(error: BaseException | None) -> bool:
    """Whether it is Ctrl-C, or came of it: Python wraps what is raised while a class is made, as at an import."""
    return error is not None and (isinstance(error, KeyboardInterrupt) or _interrupted(error.__cause__))


def quiet(tell: Listener, alone: RecipeRead | None = None) -> None:
    """Load the libraries below, aloud, and let hkft's own screen speak: none of their bars, log lines and warnings.

    alone: the recipe that the process is for, and nothing else; of it no library is loaded that it does not need.
    """
    tell(Stage("starting torch and transformers"))
    if processes.count() > 1:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # each of them would warn of what Trainer asks DDP for
    if alone is not None:
        from hkft.model import quantisers

        quantisers.leave_out(alone)
    warnings.filterwarnings("ignore", module=r"(?!hkft\b)")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from hkft.data.quiet import quiet as quiet_datasets

    quiet_datasets()
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    hub_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


@contextmanager
def lines_in(path: str) -> Iterator[Iterable[str]]:
    """The lines of a file, or of stdin for "-"."""
    if path == "-":
        yield sys.stdin
        return
    if not Path(path).is_file():
        raise DataError("there is no such file", where=path, allowed="a file of JSON lines, or - for stdin")
    with Path(path).open(encoding="utf-8") as file:
        yield file


@contextmanager
def lines_out(path: str) -> Iterator[Callable[[Mapping[str, Any]], int]]:
    """Writes a record as a line of JSON, to a file, or to stdout for "-", and gives back 1, so that a sum counts them.

    A file has its name once all is written; till then, and where that fails, it is called `<name>.partial`.
    """
    from hkft.folder import jsonable

    def write(record: Mapping[str, Any], file: TextIO) -> int:
        file.write(jsonlib.dumps(jsonable(record), ensure_ascii=False) + "\n")
        file.flush()  # whoever reads at the other end need not wait
        return 1

    if path == "-":
        yield functools.partial(write, file=sys.stdout)
        return
    partial = Path(f"{path}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("w", encoding="utf-8") as file:
        yield functools.partial(write, file=file)
    partial.replace(path)


def show_json(document: Any) -> None:
    """One JSON document on stdout."""
    from hkft.folder import jsonable

    sys.stdout.write(jsonlib.dumps(jsonable(document), indent=2) + "\n")
