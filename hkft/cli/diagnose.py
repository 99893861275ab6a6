"""hkft diagnose"""

from __future__ import annotations

from typing import Annotated

import typer

from hkft.cli.shared import Debug, Json, reported, show_json


@reported
def diagnose(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN|FILE",
            help="A run of hkft's, a trainer_state.json or a folder with one, or a table of losses (JSONL, CSV).",
        ),
    ],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Say whether a run overfits, since when, and what to do, of hkft's own runs and of any other tool's."""
    from hkft.diagnostics.diagnosis import diagnose as examine

    found = examine(source)
    if json:
        return show_json(found)
    from hkft.view.diagnosis import show_diagnosis

    show_diagnosis(found, source)
    return None
