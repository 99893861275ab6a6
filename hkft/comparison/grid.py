"""Methods x seeds x rates: the runs of a comparison, each in a folder named by its content: nothing runs twice."""

from __future__ import annotations

import gc
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from hkft.dropout.method import check_rate
from hkft.dropout.named import find
from hkft.errors import HkftError, MethodError, UsageError
from hkft.events import Listener, Notice, Stage, silent
from hkft.folder import RunFolder, check_place, read_json
from hkft.recipe import Recipe

Status = Literal["finished", "skipped", "failed"]


class Train(Protocol):
    """What runs a cell: `hkft.api.train`, or what stands in for it in a test."""

    def __call__(self, recipe: Recipe, *, output: Path, resume: bool, tell: Listener) -> Any: ...


@dataclass(frozen=True)
class Cell:
    """One run of the grid. rate: None where the grid does not vary it, or the method has none."""

    recipe: Recipe
    method: str
    seed: int
    rate: float | None = None

    @property
    def name(self) -> str:
        """`<method>[-p<rate>]-s<seed>-<hash>`: another value anywhere in the recipe is another folder."""
        rate = "" if self.rate is None else f"-p{self.rate:g}"
        return f"{self.method}{rate}{self._content}"

    @property
    def title(self) -> str:
        """For people: `dropkey p=0.2, seed 3`."""
        rate = "" if self.rate is None else f" p={self.rate:g}"
        return f"{self.method}{rate}, seed {self.seed}"

    def folder(self, grid: Path) -> RunFolder:
        """The cell's run in a grid's folder. One of the same content is taken even if a grid of other axes named it."""
        if (grid / self.name).exists():
            return RunFolder(grid / self.name)
        same = sorted(grid.glob(f"*{self._content}"))
        return RunFolder(same[0] if same else grid / self.name)

    @property
    def _content(self) -> str:
        return f"-s{self.seed}-{self.recipe.fingerprint()[:6]}"


@dataclass(frozen=True)
class Outcome:
    """What became of a cell. cause: why it failed."""

    cell: Cell
    folder: Path
    status: Status
    cause: HkftError | None = None

    @property
    def error(self) -> str | None:
        """The message a user reads."""
        return None if self.cause is None else str(self.cause)


def cells(
    recipe: Recipe, methods: Sequence[str], seeds: int | Sequence[int], rates: Sequence[float] | None = None
) -> list[Cell]:
    """The grid's cells, seed by seed, so that a part of the grid is a comparison of fewer seeds.

    methods: names of `hkft methods`; `custom` where the recipe gives its own sites. seeds: how many, from the recipe's
    own on, or which. rates: a cell for each; a method that no rate changes (`none`) has one cell all the same.
    Raises MethodError for names and rates that are none, all at once, and UsageError for an empty grid.
    """
    chosen = tuple(range(recipe.seed, recipe.seed + seeds)) if isinstance(seeds, int) else tuple(dict.fromkeys(seeds))
    methods = tuple(dict.fromkeys(methods))
    _check(recipe, methods, chosen, rates)
    grid = []
    for seed in chosen:
        for method in methods:
            of_method = () if method == recipe.dropout.method else (f"dropout.method={method}",)
            base = recipe.replace(*of_method, f"seed={seed}")
            if rates is None or not _takes_rate(base):
                grid.append(Cell(base, method, seed))
                continue
            for rate in dict.fromkeys(rates):
                grid.append(Cell(base.replace(f"dropout.rate={rate!r}"), method, seed, float(rate)))
    return grid


def run(grid: Sequence[Cell], output: Path, train: Train, tell: Listener = silent) -> list[Outcome]:
    """Run what is not done yet, each cell in its own folder under `output`.

    A finished run of the same recipe is skipped; an unfinished one goes on from its last checkpoint, or begins anew
    where it has none. A cell that raises HkftError is recorded, and the rest goes on. KeyboardInterrupt ends the grid:
    the same call resumes it.
    """
    check_place(output)
    places = [cell.folder(output) for cell in grid]
    done = sum(_finished(cell, folder) for cell, folder in zip(grid, places, strict=True))
    if done:
        tell(Notice(f"{done} of {len(grid)} cells are done already"))
    outcomes = []
    for number, (cell, folder) in enumerate(zip(grid, places, strict=True)):
        if _finished(cell, folder):
            outcomes.append(Outcome(cell, folder.path, "skipped"))
            continue
        tell(Stage(f"cell {number + 1} of {len(grid)}: {cell.title}", number, len(grid)))
        outcomes.append(_attempt(cell, folder, tell, train))
        gc.collect()  # a trainer and its model hold each other: the next cell needs their memory
    return outcomes


def read_rates(text: str | None) -> list[float] | None:
    """`0.1,0.2` as numbers. Raises UsageError for what is none."""
    if text is None:
        return None
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        raise UsageError("not a list of rates", where="--rates", found=repr(text), allowed="0.1,0.2")
    return found


def nothing_finished(outcomes: Sequence[Outcome]) -> HkftError:
    """The errors of the cells, each once, in an error of the first one's kind."""
    causes = [outcome.cause for outcome in outcomes if outcome.cause]
    problems = {str(problem): problem for cause in causes for problem in cause.problems}
    return type(causes[0])(problems=list(problems.values()))


def default_output(recipe: Recipe) -> Path:
    return Path("runs") / f"compare-{recipe.name}"


def _attempt(cell: Cell, folder: RunFolder, tell: Listener, train: Train) -> Outcome:
    resume = folder.last_checkpoint() is not None
    if not resume:
        _clear(folder)
    try:
        train(cell.recipe, output=folder.path, resume=resume, tell=tell)
    except HkftError as error:
        tell(Notice(f"{cell.title} failed: {error}", "warning"))
        told = type(error)(problems=error.problems)  # without its traceback, which holds the cell's model
        return Outcome(cell, folder.path, "failed", told)
    return Outcome(cell, folder.path, "finished")


def _clear(folder: RunFolder) -> None:
    """Remove a run that ended before its first checkpoint. Anything else there is not ours to remove."""
    if folder.status != "finished" and (folder.exists or folder.recipe.exists()):
        shutil.rmtree(folder.path)


def _finished(cell: Cell, folder: RunFolder) -> bool:
    return (
        folder.status == "finished" and read_json(folder.summary).get("recipe_fingerprint") == cell.recipe.fingerprint()
    )


def _takes_rate(recipe: Recipe) -> bool:
    """Whether the method changes with `dropout.rate`: not without sites, nor where every site names its own."""
    low, high = (recipe.replace(f"dropout.rate={rate}").method.sites for rate in (0.25, 0.5))
    return low != high


def _check(recipe: Recipe, methods: Sequence[str], seeds: Sequence[int], rates: Sequence[float] | None) -> None:
    if not methods or not seeds or (rates is not None and not rates):
        empty = "methods" if not methods else "seeds" if not seeds else "rates"
        raise UsageError("the grid is empty", where=f"--{empty}", allowed="at least one")
    problems = []
    for name in methods:
        try:
            if name != recipe.method.name:
                find(name)
        except MethodError as error:
            problems += [replace(problem, where="--methods") for problem in error.problems]
    for rate in rates or ():
        try:
            check_rate(rate, "--rates")
        except MethodError as error:
            problems += error.problems
    if problems:
        raise MethodError(problems=problems)
