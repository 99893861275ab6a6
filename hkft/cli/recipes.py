"""hkft recipes"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hkft.cli.shared import Debug, Json, reported, show_json


@reported
def recipes(
    name: Annotated[str | None, typer.Argument(help="One recipe: print it.")] = None,
    copy: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Copy it (or all) into this folder, to edit.")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """The shipped recipes."""
    from hkft.recipe import catalogue

    found = catalogue.choose(name)
    for path in catalogue.copy(found.values(), copy) if copy else ():
        typer.echo(str(path), err=json)
    if json:
        return show_json({key: {"path": path, "title": catalogue.describe(path)} for key, path in found.items()})
    if copy:
        return None
    if name is not None:
        return typer.echo(next(iter(found.values())).read_text(encoding="utf-8"), nl=False)
    from hkft.view.tables import table

    return table(["recipe", "what it is"], [[key, catalogue.describe(path)] for key, path in found.items()])
