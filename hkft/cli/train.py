"""hkft train"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hkft import processes
from hkft.cli.shared import ALONE, Debug, Json, Recipe, Set, quiet, reported, show_json


@reported
def train(
    context: typer.Context,
    recipe: Recipe,
    set: Set = None,
    output: Annotated[
        Path | None, typer.Option(help="The run folder. Default: runs/<recipe>-<method>-s<seed>-<hash>")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in that folder.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="With --resume: go on although the recipe or the data has changed.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show every value and where it comes from; train nothing.")
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a recipe, watching the gap between training and validation; writes a run folder."""
    from hkft.recipe import load

    loaded = load(recipe, set or ())
    if dry_run:
        if not processes.first():
            return None
        from hkft.view.recipe import show_provenance

        return show_json({"resolved": loaded.values(), "from": loaded.provenance}) if json else show_provenance(loaded)
    from hkft.view.terminal import view

    with view(json=json) as tell:
        quiet(tell, loaded if context.obj is ALONE else None)
        from hkft import api
        from hkft.folder import read_json

        folder = api.train(loaded, output=output, resume=resume, force=force, tell=tell)
    if json and processes.first():
        show_json({"run": str(folder.path), **read_json(folder.summary)})
    return None
