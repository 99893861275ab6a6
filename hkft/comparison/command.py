"""What `hkft compare` does: run a grid or take runs that exist, compare them, and write the tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from hkft.comparison import grid, tables
from hkft.comparison.compare import Comparison, compare
from hkft.errors import HkftError, UsageError
from hkft.events import Listener, Stage, silent
from hkft.recipe import load


def run_grid(
    recipe: str | Path,
    overrides: Sequence[str],
    methods: Sequence[str],
    seeds: int | Sequence[int],
    rates: str | None = None,
    output: str | Path | None = None,
    tell: Listener = silent,
    *,
    baseline: str | None = None,
    train: grid.Train | None = None,
) -> Comparison:
    """Run the grid of a recipe, resuming it, and write its comparison into its folder.

    rates: numbers separated by commas. output: the grid's folder, `runs/compare-<recipe>` if None. Where every cell
    failed, raises an error of the first one's kind that tells what each says.
    """
    chosen = load(recipe, overrides)
    cells = grid.cells(chosen, [name.strip() for name in methods], seeds, _rates(rates))
    folder = Path(output) if output else grid.default_output(chosen)
    outcomes = grid.run(cells, folder, tell, train)
    done = [outcome.folder for outcome in outcomes if outcome.status != "failed"]
    failed = {outcome.cell.title: outcome.error or "" for outcome in outcomes if outcome.status == "failed"}
    if not done:
        raise _all_failed(outcomes)
    tell(Stage("comparing"))
    comparison = compare(done, baseline, failed=failed)
    tables.write(comparison, folder)
    return comparison


def of_runs(runs: Sequence[str | Path], output: str | Path | None = None, *, baseline: str | None = None) -> Comparison:
    """Compare runs that exist; the tables are written where `output` names a folder for them."""
    comparison = compare(runs, baseline)
    if output:
        tables.write(comparison, Path(output))
    return comparison


def _rates(text: str | None) -> list[float] | None:
    """Raises UsageError for what is no number."""
    if text is None:
        return None
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        raise UsageError("not a list of rates", where="--rates", found=repr(text), allowed="0.1,0.2")
    return found


def _all_failed(outcomes: Sequence[grid.Outcome]) -> HkftError:
    """The errors of the cells, each once, with the exit code of the first."""
    first = outcomes[0].cause
    assert first is not None
    problems = {str(problem): problem for outcome in outcomes if outcome.cause for problem in outcome.cause.problems}
    return type(first)(problems=list(problems.values()))
