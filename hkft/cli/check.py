"""hkft check"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from hkft.cli.shared import ALONE, Debug, Json, Recipe, Set, quiet, reported, show_json

if TYPE_CHECKING:
    from hkft.events import Listener


@reported
def check(
    context: typer.Context,
    recipe: Recipe,
    set: Set = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Load the model, take a few steps, and say how long a run takes.")
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Validate a recipe, then plan it: rows, steps, tokens, parameters, memory; time with --probe. Writes nothing."""
    from hkft.recipe import load
    from hkft.training import planned
    from hkft.view.recipe import show_plan
    from hkft.view.terminal import view

    loaded = load(recipe, set or ())

    def made(heard: Listener) -> dict[str, Any]:
        quiet(heard, loaded if context.obj is ALONE else None)
        from hkft.training.plan import plan

        return plan(loaded, heard)

    def rehearsed(tell: Listener) -> dict[str, Any]:
        quiet(tell, loaded if context.obj is ALONE else None)
        from hkft.training.plan import plan
        from hkft.training.rehearsal import rehearse
        from hkft.training.shelf import Shelf

        shelf = Shelf()
        found = plan(loaded, tell, shelf)
        return found | {"probe": rehearse(loaded, shelf, tell)}

    with view(json=json) as tell:
        found = rehearsed(tell) if probe else planned.plan(loaded, tell, made)
    return show_json(found) if json else show_plan(found)
