"""hkft methods"""

from __future__ import annotations

from typing import Annotated

import typer

from hkft.cli.shared import Debug, Json, reported, show_json


@reported
def methods(
    name: Annotated[
        str | None, typer.Argument(help="One method: its full record, as a recipe's dropout section.")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """The dropout methods, and a recipe section for each."""
    from hkft.dropout.named import METHODS, find

    if json:
        chosen = METHODS if name is None else {name: find(name)}
        return show_json({key: method.as_dict() for key, method in chosen.items()})
    from hkft.view.recipe import show_method
    from hkft.view.tables import methods_table

    return methods_table() if name is None else show_method(find(name))
