"""Every error hkft raises on purpose, and the exit code the command line gives it.

    HkftError                    1
    ├── UsageError               2   a command, a flag or a method that makes no sense
    │   ├── RecipeError          2   one or more problems in a recipe, reported together
    │   └── MethodError          2   a dropout method that cannot exist, or a model it cannot act on
    ├── DataError                3   a file, a column, a row
    ├── SetupError               4   a missing package, device or model
    ├── OutOfMemoryError         5
    ├── DivergedError            6   NaN or inf in the loss
    └── CheckFailedError         7   a check the user asked for: merge verification, --fail-if

An interrupt (Ctrl-C) exits with 130, SIGTERM with 143. The user's fault is one of these, with where it is and what to do
next; a fault of hkft's own is an assert or an ordinary exception, and shows a traceback.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from difflib import get_close_matches
from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room on the disk; a write that fails so names no file
INTERRUPTED = 130
TERMINATED = 143

SECRET = r"""Bearer\s+(?=\S*[\d._-])\S{6,} | \beyJ[\w.-]{16,} | \b(hf|api_org|gh[a-z])_[A-Za-z0-9]{30,} | \bAKIA[0-9A-Z]{16}\b | \bsk-[\w-]{20,}
    | (?<=[:/]/)[^/\s@]*:[^/\s@]+(?=@) | (?<=\?)\S*(Signature|Credential)=\S* | (?<=[?&])\w*(token|key|password)=[^\s&]+"""
HOLDS_ONE = re.compile(r"(TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY)$")  # names of the environment's variables


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: where it is, what was found there, what is allowed, and what to do about it.

    `where` is `file:line:column` for a recipe or a data file, a key path, or a module's name.
    """

    message: str
    where: str | None = None
    found: str | None = None
    allowed: str | None = None
    hint: str | None = None

    def __str__(self) -> str:
        head = f"{self.where}: {self.message}" if self.where else self.message
        details = [("found", self.found), ("allowed", self.allowed), ("hint", self.hint)]
        return "\n".join([head, *(f"  {label}: {text}" for label, text in details if text)])


class HkftError(Exception):
    """The root of the tree above. Holds one or more `problems`; `str()` is the message a user reads."""

    exit_code = 1
    elsewhere = False  # another process of the run tells it

    def __init__(
        self,
        message: str = "",
        *,
        where: str | None = None,
        found: str | None = None,
        allowed: str | None = None,
        hint: str | None = None,
        problems: Sequence[Problem] = (),
    ) -> None:
        told = tuple(problems) or (Problem(message, where, found, allowed, hint),)
        self.problems = tuple(Problem(*(text and scrubbed(text) for text in astuple(problem))) for problem in told)
        super().__init__("\n".join(map(str, self.problems)))


class UsageError(HkftError):
    exit_code = 2


class RecipeError(UsageError):
    pass


class MethodError(UsageError, ValueError):
    pass


class DataError(HkftError):
    exit_code = 3


class SetupError(HkftError):
    exit_code = 4


class OutOfMemoryError(HkftError):
    exit_code = 5


class DivergedError(HkftError):
    exit_code = 6


class CheckFailedError(HkftError):
    exit_code = 7


def as_told(error: Exception) -> HkftError:
    """An error as hkft's own.

    What is not the machine's or the user's fault keeps its kind's name.
    """
    return foreseen(error) or HkftError(f"{type(error).__name__}: {error}")


def foreseen(error: BaseException) -> HkftError | None:
    """An error that is the machine's or the user's fault, as hkft's own; None: it is a fault of the program.

    So is an OSError that names a file, a full disk, and an ImportError: a package that a recipe asks for is not installed.
    That a data worker has died torch raises from a signal handler, wherever the main thread is.
    """
    if isinstance(error, HkftError):
        return error
    if isinstance(error, OSError) and (error.filename is not None or error.errno in FULL):
        return SetupError(str(error.strerror), where=str(error.filename or "where the output goes"))
    if isinstance(error, ImportError):
        return SetupError("a package is not installed", found=first_line(error))
    if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
        return SetupError(
            "a process that reads the data died",
            where="train.dataloader_num_workers",
            found=first_line(error),
            hint="--set train.dataloader_num_workers=0; most often memory, or shared memory, did not suffice. "
            "`--resume` goes on from the last checkpoint",
        )
    return None


def secrets() -> re.Pattern[str]:
    """What looks like a token or a password, and what the environment holds of them."""
    held = [value for name, value in os.environ.items() if HOLDS_ONE.search(name) and len(value) >= 8]
    return re.compile("|".join([SECRET, *(re.escape(value) for value in held)]), re.VERBOSE | re.ASCII)


def scrubbed(text: str) -> str:
    """The text with *** in place of secrets."""
    return secrets().sub("***", text)


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """A hint naming the choice spelled most like `word`, or None where nothing comes close."""
    matches = get_close_matches(str(word), [str(choice) for choice in choices], n=1, cutoff=0.6)
    return f"did you mean {matches[0]!r}?" if matches else None


def first_line(error: BaseException) -> str:
    """What another library says, in a line: its first one, and the next where that ends in a colon; else the error's kind."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1]) or type(error).__name__


class Terminated(KeyboardInterrupt):
    """SIGTERM, which a scheduler sends: what Ctrl-C cleans up is to be cleaned up then, too."""


@contextmanager
def terminable() -> Iterator[None]:
    """While inside, in the main thread, SIGTERM raises Terminated."""

    def terminate(*_: Any) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
