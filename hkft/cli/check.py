"""hkft check"""

from __future__ import annotations

from hkft.cli.shared import Debug, Json, Recipe, Set, quiet, reported, show_json


@reported
def check(
    recipe: Recipe,
    set: Set = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Validate a recipe, then plan it: rows, steps, tokens, parameters, memory. Trains nothing and writes nothing."""
    from hkft.recipe import load
    from hkft.view.recipe import show_plan
    from hkft.view.terminal import view

    loaded = load(recipe, set or ())
    with view(json=json) as tell:
        quiet(tell)
        from hkft.training.plan import plan

        planned = plan(loaded, tell)
    return show_json(planned) if json else show_plan(planned)
