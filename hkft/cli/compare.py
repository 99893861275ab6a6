"""hkft compare"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hkft.cli.shared import Debug, Json, Set, quiet, reported, show_json
from hkft.errors import UsageError


@reported
def compare(
    runs: Annotated[
        list[Path] | None, typer.Argument(metavar="RUN", help="Runs that exist, instead of a recipe.")
    ] = None,
    recipe: Annotated[str | None, typer.Option("--recipe", "-r", help="A recipe to run the grid on.")] = None,
    methods: Annotated[str, typer.Option(help="Methods, separated by commas.")] = "none,hiddenkey-,hiddenkey",
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, from the recipe's own.")] = 3,
    rates: Annotated[
        str | None, typer.Option(help="Dropout rates, separated by commas. Default: the recipe's.")
    ] = None,
    set: Set = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Where tables, report and the grid's runs go. Default: runs/compare-<recipe>, none for runs that exist."
        ),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare dropout methods over seeds: run a grid (resuming it), or take runs that exist."""
    if bool(runs) == bool(recipe):
        raise UsageError(
            "say either --recipe, to run a grid, or the run folders to compare", hint="hkft compare --help"
        )
    from hkft.view.compare import show_comparison
    from hkft.view.terminal import view

    folder = output
    with view(json=json, brief=True) as tell:
        quiet(tell)
        from hkft import api
        from hkft.comparison.grid import read_rates

        if recipe:
            result, folder = api.compare(
                recipe, _names(methods), seeds, read_rates(rates), set or (), output=output, tell=tell
            )
        else:
            result = api.compare_runs(runs or [], output=output)
    show_json(result.as_dict()) if json else show_comparison(result, folder)
    if result.failed:
        raise typer.Exit(next(iter(result.failed.values())).exit_code)


def _names(methods: str) -> list[str]:
    return [name.strip() for name in methods.split(",")]
