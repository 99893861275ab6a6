"""The commands as library calls: a run with its report and its model card, a comparison with its tables and its report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hkft.events import Listener, Notice, Stage, silent

if TYPE_CHECKING:
    from hkft.comparison.compare import Comparison
    from hkft.comparison.grid import Train
    from hkft.folder import RunFolder
    from hkft.recipe import Recipe


def train(
    recipe: str | Path | Recipe,
    overrides: Sequence[str] = (),
    *,
    output: str | Path | None = None,
    resume: bool = False,
    tell: Listener = silent,
) -> RunFolder:
    """What `hkft train` does: run a recipe (a name, a path, or a loaded one), write its report, return the run folder.

    overrides: `section.key=value`, as `--set` takes them. tell: a listener for `hkft.events`. Raises HkftError, and
    KeyboardInterrupt after a checkpoint; the report is written in either case, of what there is.
    """
    from hkft.training import run

    began = run.begin(_loaded(recipe, overrides), output, resume=resume, tell=tell)
    try:
        began.fit()
    finally:
        write_pages(began.folder)
    return began.folder


def compare(
    recipe: str | Path | Recipe,
    methods: Sequence[str],
    seeds: int | Sequence[int],
    rates: Sequence[float] | None = None,
    overrides: Sequence[str] = (),
    *,
    output: str | Path | None = None,
    baseline: str | None = None,
    tell: Listener = silent,
    train: Train = train,
) -> tuple[Comparison, Path]:
    """What `hkft compare --recipe` does: run the grid, resuming it, and write its tables and report into its folder.

    output: that folder, `runs/compare-<recipe>` if None; it is returned with the comparison. Where some cells failed,
    the comparison is of the others, and says so; where all did, raises an error of the first one's kind that tells what
    each says. train: runs a cell.
    """
    from hkft.comparison import compare as comparing
    from hkft.comparison import grid

    chosen = _loaded(recipe, overrides)
    folder = Path(output) if output else grid.default_output(chosen)
    outcomes = grid.run(grid.cells(chosen, methods, seeds, rates), folder, train, tell)
    done = [outcome.folder for outcome in outcomes if outcome.status != "failed"]
    failed = {outcome.cell.title: comparing.Failure.of(outcome.cause) for outcome in outcomes if outcome.cause}
    if not done:
        raise grid.nothing_finished(outcomes)
    tell(Stage("comparing"))
    comparison = comparing.compare(done, baseline, failed=failed)
    write_comparison(comparison, folder)
    return comparison, folder


def compare_runs(
    runs: Sequence[str | Path], *, output: str | Path | None = None, baseline: str | None = None
) -> Comparison:
    """What `hkft compare RUN RUN` does. Tables and report are written where `output` names a folder for them."""
    from hkft.comparison.compare import compare
    from hkft.folder import check_place

    if output:
        check_place(Path(output))
    comparison = compare(runs, baseline)
    if output:
        write_comparison(comparison, Path(output))
    return comparison


def write_pages(folder: RunFolder) -> None:
    """report.html and README.md of a run, from what lies in its folder."""
    from hkft.diagnostics.diagnosis import of_run
    from hkft.folder import read_json, write_text
    from hkft.view.card import model_card
    from hkft.view.report import write_report

    summary, environment = read_json(folder.summary), read_json(folder.environment)
    diagnosis = of_run(folder) if folder.history.exists() else None
    environment.pop("recipe", None)  # the diagnosis has it
    resolved = folder.resolved.read_text(encoding="utf-8")
    write_report(
        folder.report,
        summary=summary,
        curve=folder.records("eval"),
        train_records=folder.records("train"),
        recipe_yaml=resolved,
        environment=environment,
        sites=summary["sites"],
        diagnosis=diagnosis,
        notices=[Notice(record["text"], record["level"]) for record in folder.records("notice")],
    )
    base = environment["model"]["name"]
    write_text(folder.card, model_card(summary, base_model=base, recipe_yaml=resolved))


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """comparison.json, .md, .tex, .csv and report.html of a comparison."""
    from hkft.comparison import tables
    from hkft.view.comparison_report import write_comparison_report

    tables.write(comparison, folder)
    write_comparison_report(folder / "report.html", comparison)


def _loaded(recipe: str | Path | Recipe, overrides: Sequence[str]) -> Recipe:
    from hkft.recipe import Recipe, load

    return recipe.replace(*overrides) if isinstance(recipe, Recipe) else load(recipe, overrides)
