"""hkft compare"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hkft.cli.shared import Debug, Json, Set, quiet, reported, show_json
from hkft.errors import HkftError, Problem, UsageError


@reported
def compare(
    runs: Annotated[list[Path] | None, typer.Argument(metavar="[RUN]...", help="Runs that exist.")] = None,
    recipe: Annotated[str | None, typer.Option("--recipe", "-r", help="A recipe to run the grid on.")] = None,
    methods: Annotated[str, typer.Option(help="Methods, separated by commas.")] = "none,hiddenkey-,hiddenkey",
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, from the recipe's own.")] = 3,
    rates: Annotated[
        str | None, typer.Option(help="Dropout rates, separated by commas. Default: the recipe's.")
    ] = None,
    set: Set = None,
    output: Annotated[Path | None, typer.Option(help="The grid's folder. Default: runs/compare-<recipe>")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare dropout methods over seeds: run a grid (resuming it), or take runs that exist."""
    if bool(runs) == bool(recipe):
        raise UsageError(
            "say either --recipe, to run a grid, or the run folders to compare", hint="hkft compare --help"
        )
    from hkft.view.tables import table
    from hkft.view.terminal import view

    with view(json=json) as tell:
        quiet(tell)
        from hkft.comparison import command, tables

        if recipe:
            result = command.run_grid(recipe, set or (), methods.split(","), seeds, rates, output, tell)
        else:
            result = command.of_runs(runs or [], output)
    if json:
        show_json(result.as_dict())
    else:
        table(*tables.narrow(result))
        typer.echo("\n" + "\n".join(tables.sentences(result)))
    if result.failed:
        raise HkftError(problems=[Problem(error, where=cell) for cell, error in result.failed.items()])
