"""hkft recipes"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from hkft.cli.shared import Debug, Json, reported, show_json
from hkft.errors import UsageError, nearest
from hkft.folder import check_place


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
    from hkft.recipe import describe, shipped

    found = shipped()
    if name is not None:
        name = name.removesuffix(".yaml")
        if name not in found:
            raise UsageError(
                f"there is no shipped recipe {name!r}", allowed=", ".join(found), hint=nearest(name, found)
            )
        found = {name: found[name]}
    if copy is not None:
        check_place(copy)
        copy.mkdir(parents=True, exist_ok=True)
        taken = [str(copy / path.name) for path in found.values() if (copy / path.name).exists()]
        if taken:
            raise UsageError("a file of this name is there already", where=", ".join(taken))
        for path in found.values():
            shutil.copy(path, copy)
            typer.echo(str(copy / path.name), err=json)
    if json:
        return show_json({key: {"path": path, "title": describe(path)} for key, path in found.items()})
    if name is not None and copy is None:
        return typer.echo(found[name].read_text(encoding="utf-8"), nl=False)
    from hkft.view.tables import table

    return None if copy else table(["recipe", "what it is"], [[key, describe(path)] for key, path in found.items()])
