"""The commands as library calls: a run with its report and its model card, a comparison with its tables and its report."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from hkft import processes
from hkft.errors import HkftError
from hkft.events import Listener, Notice, Stage, silent

if TYPE_CHECKING:
    from hkft.comparison.compare import Comparison
    from hkft.comparison.grid import Axes, Cell, Runner, Variants
    from hkft.folder import RunFolder
    from hkft.recipe import Recipe
    from hkft.training.shelf import Shelf


def train(
    recipe: str | Path | Recipe,
    overrides: Sequence[str] = (),
    *,
    output: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    tell: Listener = silent,
    shelf: Shelf | None = None,
) -> RunFolder:
    """What `hkft train` does: run a recipe (a name, a path, or a loaded one), write its report, return the run folder.

    overrides: `section.key=value`, as `--set` takes them. force: resume under a recipe or rows that have changed. tell: a
    listener for `hkft.events`. shelf: what other runs of the process have loaded. Raises HkftError, and KeyboardInterrupt after a checkpoint; the report is written in either case,
    of what there is.
    """
    from hkft.folder import RunFolder, default_folder
    from hkft.training import run
    from hkft.training.mishaps import writing

    chosen = _loaded(recipe, overrides)
    folder = RunFolder(Path(output) if output else default_folder(chosen))
    if resume and folder.status == "finished" and not folder.card.exists():  # killed once all else was done
        write_pages(folder)
        return folder
    began = run.begin(chosen, folder.path, resume=resume, force=force, tell=tell, shelf=shelf)
    try:
        began.fit()
    except BaseException:
        with suppress(OSError, HkftError):  # which are not to hide why
            if processes.first():
                write_pages(folder)
        raise
    with processes.together(), writing(folder):  # the folder is whole for whichever process goes on to look at it
        if processes.first():
            write_pages(folder)
    return folder


def evaluate_test(folder: RunFolder, tell: Listener = silent, shelf: Shelf | None = None) -> None:
    """What `hkft eval RUN --split test` does: the best adapter on the recipe's test rows, into the run folder."""
    from hkft.evaluation import saved
    from hkft.training.shelf import Shelf

    shelf = shelf or Shelf(keeps=False)
    loaded = saved.load_saved(folder.path, tell=tell, base=shelf.base)
    saved.keep(loaded, "test", saved.evaluate(loaded, "test", tell, shelf.test_rows(loaded, tell)))


def plan(
    recipe: str | Path | Recipe,
    methods: Sequence[str] | None = None,
    seeds: int | Sequence[int] | None = None,
    axes: Axes | None = None,
    variants: Variants | None = None,
    overrides: Sequence[str] = (),
    *,
    output: str | Path | None = None,
) -> tuple[list[Cell], Path]:
    """The cells of a comparison and the folder of their runs. What is None is as the recipe's `compare` section has it.

    axes: {"dropout.rate": [0.1, 0.2]}, in place of the section's values of those keys. variants: {"rank 2": {"lora.r": 2}}.
    output: `runs/compare-<recipe>` if None.
    """
    from hkft.comparison import grid

    chosen = _loaded(recipe, overrides)
    section = chosen.compare
    cells = grid.cells(
        chosen,
        section.methods if methods is None else methods,
        section.seeds if seeds is None else seeds,
        {**section.grid, **(axes or {})},
        section.variants if variants is None else variants,
    )
    return cells, Path(output) if output else grid.default_output(chosen)


def compare(
    recipe: str | Path | Recipe,
    methods: Sequence[str] | None = None,
    seeds: int | Sequence[int] | None = None,
    axes: Axes | None = None,
    variants: Variants | None = None,
    overrides: Sequence[str] = (),
    *,
    output: str | Path | None = None,
    baseline: str | None = None,
    paper: str | None = None,
    jobs: int = 1,
    tell: Listener = silent,
    runner: Runner | None = None,
) -> tuple[Comparison, Path]:
    """What `hkft compare --recipe` does: run the grid of `plan`, resuming it, and write its tables and report.

    It returns the comparison and the folder. Where some cells failed, the comparison is of the others, and says so; where
    all did, raises an error of the first one's kind that tells what each says. jobs: cells at a time, in processes of their
    own. paper: the paper's table and column to set beside, the section's if None. runner: runs a cell.
    """
    from hkft.comparison import compare as comparing
    from hkft.comparison import grid
    from hkft.comparison import jobs as several
    from hkft.comparison import paper as papers

    chosen = _loaded(recipe, overrides)
    cells, folder = plan(chosen, methods, seeds, axes, variants, output=output)
    wanted, column = baseline or chosen.compare.baseline, paper or chosen.compare.paper
    grid.check_baseline(cells, wanted)  # before hours of training, not after
    if column:
        papers.cell(column)
    if jobs > 1:
        outcomes = several.run(cells, folder, jobs, tell)
    else:
        outcomes = grid.run(cells, folder, runner or _runner(), tell)
    outcomes = grid.looked_at_again(outcomes)
    done = [outcome.folder for outcome in outcomes if outcome.status in ("finished", "skipped")]
    failed = {outcome.cell.title: comparing.Failure.of(outcome.cause) for outcome in outcomes if outcome.cause}
    if not done:
        raise grid.nothing_finished(outcomes)
    tell(Stage("comparing"))
    comparison = comparing.compare(
        done,
        wanted,
        failed=failed,
        paper_cell=column,
        names={outcome.folder: outcome.cell.row for outcome in outcomes},
    )
    write_comparison(comparison, folder)
    return comparison, folder


def _runner() -> Runner:
    """Runs cells in this process; each takes from the one before what both have in common."""
    import gc

    from hkft.training.shelf import Shelf

    shelf = Shelf()

    def run(cell: Cell, folder: RunFolder, resume: bool, tell: Listener) -> None:
        try:
            if folder.status != "finished":
                train(cell.recipe, output=folder.path, resume=resume, tell=tell, shelf=shelf)
            if cell.recipe.data.test is not None:
                evaluate_test(folder, tell, shelf)
        finally:
            gc.collect()  # a trainer and its model hold each other: the next cell needs their memory

    return run


def compare_runs(
    runs: Sequence[str | Path],
    *,
    output: str | Path | None = None,
    baseline: str | None = None,
    paper: str | None = None,
) -> Comparison:
    """What `hkft compare RUN RUN` does. Tables and report are written where `output` names a folder for them."""
    from hkft.comparison.compare import compare
    from hkft.folder import check_place

    if output:
        check_place(Path(output))
    comparison = compare(runs, baseline, paper_cell=paper)
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
