"""Methods x seeds x anything of the recipe: the runs of a comparison, each in a folder named by its content.

Nothing runs twice: a cell whose recipe has been run is taken as it is, one that was cut short goes on.
"""

from __future__ import annotations

import itertools
import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from hkft.comparison.choice import PLAIN, no_baseline
from hkft.dropout.method import check_rate
from hkft.dropout.named import find
from hkft.errors import HkftError, MethodError, RecipeError, UsageError
from hkft.events import Listener, Notice, Stage, silent
from hkft.folder import RunFolder, check_place, read_json
from hkft.recipe import Recipe

Status = Literal["finished", "skipped", "failed", "running"]
Axes = Mapping[str, Sequence[Any]]  # dotted key -> its values
Variants = Mapping[str, Mapping[str, Any]]  # name -> dotted key -> value
SHORT = {"dropout.rate": "p", "lora.r": "r"}  # of keys, in names


Runner = Callable[["Cell", RunFolder, bool, Listener], None]  # raises HkftError; the flag: go on from a checkpoint


@dataclass(frozen=True)
class Cell:
    """One run of the grid. row: what distinguishes it from others of its seed, for people: `dropkey p=0.2`."""

    recipe: Recipe
    row: str

    @property
    def name(self) -> str:
        """`<row>-s<seed>-<hash>`: another value anywhere in the recipe is another folder."""
        return f"{re.sub(r'[^A-Za-z0-9.-]+', '-', self.row.replace('=', ''))}{self._content}"

    @property
    def title(self) -> str:
        return f"{self.row}, seed {self.recipe.seed}"

    def folder(self, grid: Path) -> RunFolder:
        """The cell's run in a grid's folder. One of the same content is taken even if a grid of other axes named it."""
        if (grid / self.name).exists():
            return RunFolder(grid / self.name)
        same = sorted(grid.glob(f"*{self._content}"))
        return RunFolder(same[0] if same else grid / self.name)

    @property
    def _content(self) -> str:
        return f"-s{self.recipe.seed}-{self.recipe.fingerprint()[:6]}"


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
    recipe: Recipe,
    methods: Sequence[str],
    seeds: int | Sequence[int],
    axes: Axes | None = None,
    variants: Variants | None = None,
) -> list[Cell]:
    """The grid's cells, seed by seed, so that a part of the grid is a comparison of fewer seeds.

    methods: names of `hkft methods`; `custom` where the recipe gives its own sites. seeds: how many, from the recipe's
    own on, or which. axes: every method with every combination of values; a method that no value of a key of dropout
    changes (the rate of `none`) has one cell all the same. variants: the recipe without dropout, and with these values.
    Raises MethodError for names and rates that are none, all at once, UsageError for an empty grid, and RecipeError for
    values that the recipe refuses.
    """
    chosen = tuple(range(recipe.seed, recipe.seed + seeds)) if isinstance(seeds, int) else tuple(dict.fromkeys(seeds))
    methods = tuple(dict.fromkeys(methods))
    axes = {key: list({repr(value): value for value in of}.values()) for key, of in (axes or {}).items()}
    _check(recipe, methods, chosen, axes)
    grid: dict[str, Cell] = {}  # by content: two ways to one run are one cell
    for seed in chosen:
        seeded = recipe.replace(f"seed={seed}")
        rows = [row for method in methods for row in _rows(_of(seeded, method), axes)]
        rows += [(_variant(seeded, values), name) for name, values in (variants or {}).items()]
        for varied, row in rows:
            grid.setdefault(f"{seed} {varied.fingerprint()}", Cell(varied, row))
    return list(grid.values())


def run(grid: Sequence[Cell], output: Path, runner: Runner, tell: Listener = silent) -> list[Outcome]:
    """Run what is not done yet, one cell after the other, each in its own folder under `output`.

    A finished run of the same recipe is skipped; an unfinished one goes on from its last checkpoint, or begins anew
    where it has none. A cell that raises HkftError is recorded, and the rest goes on. KeyboardInterrupt ends the grid:
    the same call resumes it.
    """
    check_place(output)
    left, outcomes = left_of(grid, output, tell)
    for number, (cell, folder) in enumerate(left):
        tell(Stage(f"cell {len(grid) - len(left) + number + 1} of {len(grid)}: {cell.title}", number, len(left)))
        outcomes[cell.name] = attempt(cell, folder, runner, tell)
    return [outcomes[cell.name] for cell in grid]


def attempt(cell: Cell, folder: RunFolder, runner: Runner, tell: Listener) -> Outcome:
    """Run one cell, and tell what became of it. One that another process is running is left to it."""
    if folder.busy:
        return _left_to_another(cell, folder, tell)
    try:
        resume = folder.last_checkpoint() is not None
        if not resume:
            _clear(folder)
        runner(cell, folder, resume, tell)
    except HkftError as error:
        if is_done(cell, folder):  # another process began it at the same moment, and was faster
            return Outcome(cell, folder.path, "skipped")
        if folder.busy:
            return _left_to_another(cell, folder, tell)
        tell(Notice(f"{cell.title} failed: {error}", "warning"))
        told = type(error)(problems=error.problems)  # without its traceback, which holds the cell's model
        return Outcome(cell, folder.path, "failed", told)
    return Outcome(cell, folder.path, "finished")


def looked_at_again(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The outcomes, where cells that were left to another process may be finished by now."""
    return [
        replace(outcome, status="skipped")
        if outcome.status == "running" and is_done(outcome.cell, RunFolder(outcome.folder))
        else outcome
        for outcome in outcomes
    ]


def check_baseline(grid: Sequence[Cell], wanted: str | None) -> None:
    """Raise UsageError for a baseline that is neither a row of the grid nor a method of one."""
    known = dict.fromkeys([*(cell.row for cell in grid), *(cell.recipe.method.name for cell in grid)])
    if wanted is not None and wanted not in known:
        raise no_baseline(wanted, known)


def commands(grid: Sequence[Cell], output: Path) -> list[str]:
    """What is not done yet as lines for a shell or a cluster's scheduler, each a cell of its own."""
    return [
        " && ".join(shlex.join(["hkft", *each]) for each in calls(cell, folder, folder.last_checkpoint() is not None))
        for cell, folder in left_of(grid, output, silent)[0]
    ]


def calls(cell: Cell, folder: RunFolder, resume: bool) -> list[list[str]]:
    """The arguments of hkft that a cell still takes: `train`, and `eval` where the recipe has test rows."""
    found = []
    if folder.status != "finished":
        told = [part for each in cell.recipe.overrides for part in ("--set", each)]
        more = ["--resume"] if resume else []
        found.append(["train", "--recipe", str(cell.recipe.path), *told, "--output", str(folder.path), *more])
    if cell.recipe.data.test is not None:
        found.append(["eval", str(folder.path), "--split", "test"])
    return found


def assignment(key: str, value: Any) -> str:
    """`dropout.rate=0.2`, as `--set` takes it: JSON is YAML."""
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"


def nothing_finished(outcomes: Sequence[Outcome]) -> HkftError:
    """The errors of the cells, each once, in an error of the first one's kind."""
    causes = [outcome.cause for outcome in outcomes if outcome.cause]
    if not causes:
        return UsageError(
            "every cell that is left is being run by another process",
            where=str(outcomes[0].folder.parent),
            hint="wait for it",
        )
    problems = {str(problem): problem for cause in causes for problem in cause.problems}
    return type(causes[0])(problems=list(problems.values()))


def default_output(recipe: Recipe) -> Path:
    return Path("runs") / f"compare-{recipe.name}"


def is_done(cell: Cell, folder: RunFolder) -> bool:
    """Whether the cell has been run to its end, and looked at on its test rows where there are any."""
    if folder.status != "finished":
        return False
    summary = read_json(folder.summary)
    same = summary.get("recipe_fingerprint") == cell.recipe.fingerprint()
    return same and (cell.recipe.data.test is None or summary.get("test") is not None)


def left_of(
    grid: Sequence[Cell], output: Path, tell: Listener
) -> tuple[list[tuple[Cell, RunFolder]], dict[str, Outcome]]:
    """The cells that are to be run with their folders, and the outcomes of the others by name."""
    left, outcomes = [], {}
    for cell in grid:
        folder = cell.folder(output)
        if is_done(cell, folder):
            outcomes[cell.name] = Outcome(cell, folder.path, "skipped")
        else:
            left.append((cell, folder))
    if outcomes:
        tell(Notice(f"{len(outcomes)} of {len(grid)} cells are done already"))
    return left, outcomes


def _left_to_another(cell: Cell, folder: RunFolder, tell: Listener) -> Outcome:
    tell(Notice(f"{cell.title} is being run by another process, and left out", "warning"))
    return Outcome(cell, folder.path, "running")


def _clear(folder: RunFolder) -> None:
    """Remove a run that ended before its first checkpoint. Anything else there is not ours to remove."""
    if folder.path.exists():
        with folder.held():
            if folder.status != "finished" and (folder.exists or folder.recipe.exists()):
                folder.remove()


def _of(recipe: Recipe, method: str) -> Recipe:
    return recipe if method == recipe.dropout.method else recipe.replace(f"dropout.method={method}")


def _rows(recipe: Recipe, axes: Mapping[str, Sequence[Any]]) -> list[tuple[Recipe, str]]:
    """One method with every combination of the values that change it, each with its name."""
    acting = {key: values for key, values in axes.items() if _acts(recipe, key, values)}
    rows, method = [], recipe.method.name  # dropkey/column is dropkey
    for values in itertools.product(*acting.values()):
        named = dict(zip(acting, values, strict=True))
        varied = recipe.replace(*(assignment(key, value) for key, value in named.items()))
        rows.append((varied, " ".join([method, *(f"{SHORT.get(k, k)}={_short(v)}" for k, v in named.items())])))
    return rows


def _acts(recipe: Recipe, key: str, values: Sequence[Any]) -> bool:
    """Whether the values of a key of `dropout` make different methods; values of any other key always act."""
    if not key.startswith("dropout.") or key == "dropout.method":
        return True
    other = {"dropout.rate": (0.25, 0.5), "dropout.weight": (1.0, 2.0)}.get(key, values)
    made = [recipe.replace(assignment(key, value)).method for value in other]
    return any((each.sites, each.consistency) != (made[0].sites, made[0].consistency) for each in made)


def _variant(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    own = any(key in ("dropout.method", "dropout.sites") for key in values)
    plain = [] if own else [f"dropout.method={PLAIN}"]
    return recipe.replace(*plain, *(assignment(key, value) for key, value in values.items()))


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _check(recipe: Recipe, methods: Sequence[str], seeds: Sequence[int], axes: Mapping[str, Sequence[Any]]) -> None:
    empty = [key for key, values in axes.items() if not values]
    if not methods or not seeds or empty:
        where = "--methods" if not methods else "--seeds" if not seeds else f"--grid {empty[0]}"
        raise UsageError("the grid is empty", where=where, allowed="at least one")
    if "seed" in axes:
        raise UsageError("seeds are an axis of their own", where="--grid seed", hint="--seeds 1,2,3")
    problems = []
    for name in methods:
        try:
            if name != recipe.method.name:
                find(name)
        except MethodError as error:
            problems += [replace(problem, where="--methods") for problem in error.problems]
    for rate in axes.get("dropout.rate", ()):
        try:
            check_rate(rate, "--rates")
        except MethodError as error:
            problems += error.problems
    if problems:
        raise MethodError(problems=problems)
    for key, values in axes.items():
        for value in values:
            try:
                recipe.replace(assignment(key, value))
            except RecipeError as error:
                raise UsageError(problems=[replace(p, where=f"--grid {key}") for p in error.problems]) from error
