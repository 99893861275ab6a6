"""Several processes that train one run, as torchrun and `accelerate launch` start them.

All of them train and look; the first one writes the run folder, and speaks. What fails in one of them where they work together
ends all of them, with one error, which the first one tells. In a process that is alone everything here is at no cost.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from itertools import islice
from typing import Any, TypeVar

from hkft.errors import HkftError, SetupError, as_told

T = TypeVar("T")

# As torchrun calls them, and several kinds of MPI, with which `accelerate launch` starts processes on CPUs.
COUNT = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
NUMBER = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
PATIENCE = timedelta(days=7)  # with one that reads the data, or writes text: torch's half an hour is for training steps
GRACE = 10.0  # seconds


def count() -> int:
    return _told(COUNT, 1)


def number() -> int:
    """Of this process, from 0."""
    return _told(NUMBER, 0) if count() > 1 else 0


def first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return number() == 0


def joined() -> bool:
    """Whether the processes can speak to each other."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()


def check_joined() -> None:
    """Raise SetupError where several processes were announced, and yet this one is alone."""
    if count() > 1 and not joined():
        raise SetupError(
            "the processes have not found each other",
            found=f"WORLD_SIZE says that there are {count()}",
            hint="start them with torchrun or `accelerate launch`",
        )


def exchanged(value: T, error: Exception | None = None) -> list[T]:
    """The `value` of each process, in their order; where one of them brings an error, all raise it, or their own."""
    if count() == 1 or not joined():
        if error is not None:
            raise _shared(error)
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * count()
    try:
        dist.all_gather_object(found, (value, None if error is None else as_told(error)), group=_group())
    except RuntimeError as lost:
        raise _shared(error or gone()) from lost
    failed = next((each for _, each in found if each is not None), None)
    if failed is not None:
        raise _shared(error or failed)
    return [each for each, _ in found]


@contextmanager
def together() -> Iterator[None]:
    """What fails inside in one process fails in all, once they have all come to its end or to an exchange in it."""
    try:
        yield
    except Exception as error:
        if not getattr(error, "shared", False):
            exchanged(None, error)
        raise
    exchanged(None)


def of_first(make: Callable[[], T]) -> T:
    """What the first process makes, in all of them."""
    with together():
        made: list[Any] = exchanged(make() if first() else None)
        return made[0]


def in_turn(make: Callable[[], T]) -> T:
    """What `make` gives, in the first process before in the others: what it leaves in a cache is there for them."""
    made: list[T] = []
    for turn in (first(), not first()):
        with together():
            if turn:
                made.append(make())
    return made[0]


def largest(value: int) -> int:
    """The largest of the values that the processes have."""
    if count() == 1 or not joined():
        return value
    import torch

    numbers = torch.tensor(value)
    try:
        torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX, group=_group())
    except RuntimeError as lost:
        raise _shared(gone()) from lost
    return int(numbers)


@dataclass(frozen=True)
class Share:
    """Work in batches: every process does each `count`-th of them, and has all that was made of them afterwards."""

    number: int = 0
    count: int = 1

    def mine(self, batches: Iterable[T]) -> Iterator[T]:
        return islice(batches, self.number, None, self.count)

    def all(self, made: list[T]) -> list[T]:
        """What all processes made, those of this one among them."""
        return made if self.count == 1 else [each for part in exchanged(made) for each in part]


WHOLE = Share()  # all of it, in every process


def share() -> Share:
    return Share(number(), count())


def let_first_speak() -> None:
    """Before this process fails in silence: launchers end the others as soon as one has failed."""
    time.sleep(GRACE)


def gone() -> HkftError:
    return SetupError(
        "another process of this run has ended", hint="look for what it said, and at the launcher's report"
    )


@contextmanager
def noticing() -> Iterator[None]:
    """Where torch's own exchange breaks off inside, since a process has ended, say so."""
    try:
        yield
    except RuntimeError as error:
        import torch.distributed as dist

        broken = (
            isinstance(error, dist.DistError) or "gloo/transport" in str(error) or "Connection closed" in str(error)
        )
        if count() == 1 or not broken:
            raise
        raise _shared(gone()) from error


def _shared(error: Exception) -> Exception:
    """An error that all processes have: the first one tells it."""
    error.shared = True  # type: ignore[attr-defined]
    if isinstance(error, HkftError):
        error.elsewhere = not first()
    return error


@cache
def _group() -> Any:
    """For all that is not training: on the CPU, whatever that runs on, and patient."""
    import torch.distributed as dist

    return dist.new_group(backend="gloo", timeout=PATIENCE)


def _told(names: Iterable[str], otherwise: int) -> int:
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdecimal()), otherwise)
