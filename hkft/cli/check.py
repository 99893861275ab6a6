"""hkft check"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from hkft.cli.shared import ALONE, Debug, Json, Recipe, Set, quiet, reported, show_json

if TYPE_CHECKING:
    from hkft.events import Listener


@reported
def check(
    context: typer.Context,
    recipe: Recipe,
    set: Set = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Validate a recipe, then plan it: rows, steps, tokens, parameters, memory. Trains nothing and writes nothing."""
    from hkft.recipe import load
    from hkft.training import planned
    from hkft.view.recipe import show_plan
    from hkft.view.terminal import view

    loaded = load(recipe, set or ())

    def made(heard: Listener) -> dict[str, Any]:
        quiet(heard, loaded if context.obj is ALONE else None)
        from hkft.training.plan import plan

        return plan(loaded, heard)

    with view(json=json) as tell:
        found = planned.plan(loaded, tell, made)
    return show_json(found) if json else show_plan(found)
