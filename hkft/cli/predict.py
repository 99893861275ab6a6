"""hkft predict"""

from __future__ import annotations

from typing import Annotated

import typer

from hkft.cli.shared import (
    Checkpoint,
    Debug,
    Json,
    Set,
    Source,
    WithoutRun,
    lines_in,
    lines_out,
    quiet,
    reported,
    show_json,
)


@reported
def predict(
    source: Source,
    input: Annotated[
        str,
        typer.Option(
            "--input",
            "-i",
            help="JSON lines, with the recipe's columns; - for stdin. A chat's last answer is written anew.",
        ),
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="Where the lines go; - for stdout.")] = "-",
    checkpoint: Checkpoint = "best",
    recipe: WithoutRun = None,
    set: Set = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Use what was trained: every line in comes out with its prediction, in order and as soon as its batch is done."""
    from hkft.errors import UsageError
    from hkft.events import Notice
    from hkft.view.terminal import view

    if json and output == "-":
        raise UsageError(
            "the lines and the JSON document would both be on stdout", where="--json", hint="--output FILE"
        )
    with lines_in(input) as lines, lines_out(output) as write, view(json=json or output == "-") as tell:
        quiet(tell)
        from hkft.evaluation import saved, stream

        loaded = saved.load_saved(source, checkpoint=checkpoint, recipe=recipe, overrides=set or (), tell=tell)
        where = "stdin" if input == "-" else input
        count = sum(map(write, stream.predictions(loaded, stream.records(lines, where), where, tell)))
        if not count:
            tell(Notice(f"{where} has no line", "warning"))
    if json:
        show_json({"source": source, "checkpoint": checkpoint, "rows": count, "output": output})
