"""hkft compare"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hkft.cli.shared import Debug, Json, Set, quiet, reported, show_json
from hkft.errors import CheckFailedError, Problem, UsageError


@reported
def compare(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="RUN", help="Runs that exist, and curves of other tools, instead of a recipe."),
    ] = None,
    recipe: Annotated[str | None, typer.Option("--recipe", "-r", help="A recipe to run the grid on.")] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Methods, by commas: none,dropkey/span. Without the recipe's variants. Default: the recipe's, or none,hiddenkey-,hiddenkey."
        ),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(help="How many seeds, from the recipe's own; or which: 1,2,7. Default: the recipe's, or 3."),
    ] = None,
    rates: Annotated[str | None, typer.Option(help="Dropout rates, by commas: one is chosen by validation.")] = None,
    ranks: Annotated[str | None, typer.Option(help="Ranks of LoRA, by commas: methods are compared at each.")] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=A,B", help="Any value of the recipe: --grid lora.r=4,8. Repeatable."),
    ] = None,
    baseline: Annotated[str | None, typer.Option(help="The row to compare with. Default: none, or the first.")] = None,
    set: Set = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Where tables, report and the grid's runs go. Default: runs/compare-<recipe>, none for runs that exist."
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Cells at a time, each on a GPU of its own.")] = 1,
    print_commands: Annotated[
        bool, typer.Option("--print-commands", help="Print what is left to run, a line a cell, and run nothing.")
    ] = False,
    paper: Annotated[
        str | None, typer.Option(metavar="TABLE/COLUMN", help="The paper's numbers beside ours: table1/rte.")
    ] = None,
    fail_if: Annotated[
        list[str] | None, typer.Option(help='Exit with 7 where it holds: "gap.loss > 0.3". Repeatable.')
    ] = None,
    require: Annotated[str | None, typer.Option(help="Exit with 7 unless every row is: better, or not worse.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare dropout methods over seeds: run a grid (resuming it), or take runs that exist."""
    if bool(runs) == bool(recipe):
        raise UsageError(
            "say either --recipe, to run a grid, or the run folders to compare", hint="hkft compare --help"
        )
    from hkft.comparison import gates, options
    from hkft.view.compare import show_comparison
    from hkft.view.errors import show_error
    from hkft.view.terminal import view

    for condition in fail_if or ():
        gates.check(condition)
    gates.check_word(require)
    of_grid = {"--methods": methods, "--seeds": seeds, "--rates": rates, "--ranks": ranks, "--grid": grid, "--set": set}
    of_grid |= {"--jobs": jobs > 1, "--print-commands": print_commands}
    if runs and (given := [name for name, value in of_grid.items() if value]):
        raise UsageError("runs that exist are compared as they are", where=", ".join(given), hint="leave it out")
    folder, named = output, options.names(methods)
    asked = (
        named,
        options.seeds(seeds),
        options.axes(rates, ranks, grid or ()),
        None if named is None else {},
        set or (),
    )
    if recipe and print_commands:
        return _print_commands(recipe, asked, output, json)
    with view(json=json, brief=True) as tell:
        quiet(tell)
        from hkft import api

        if recipe:
            told = {"paper": paper, "baseline": baseline, "jobs": jobs, "tell": tell}
            result, folder = api.compare(recipe, *asked, output=output, **told)
        else:
            result = api.compare_runs(runs or [], output=output, baseline=baseline, paper=paper)
    broken = gates.failures(result, fail_if or (), require)
    asked_of_it = {"broken": broken} if fail_if or require else {}
    show_json({**result.as_dict(), **asked_of_it}) if json else show_comparison(result, folder)
    if broken:
        told = CheckFailedError(problems=[Problem(sentence) for sentence in broken])
        show_error(told)
        raise typer.Exit(told.exit_code)
    if result.failed:
        raise typer.Exit(next(iter(result.failed.values())).exit_code)
    return None


def _print_commands(recipe: str, asked: tuple, output: Path | None, json: bool) -> None:
    from hkft import api
    from hkft.comparison.grid import commands

    lines = commands(*api.plan(recipe, *asked, output=output))
    show_json({"commands": lines}) if json else typer.echo("".join(f"{line}\n" for line in lines), nl=False)
