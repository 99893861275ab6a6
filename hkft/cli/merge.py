"""hkft merge"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hkft.cli.shared import Checkpoint, Debug, Json, Set, Source, WithoutRun, quiet, reported, show_json


@reported
def merge(
    source: Source,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the merged model goes; must not exist.")],
    checkpoint: Checkpoint = "best",
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16. Default: the base model's own.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare the merged model's outputs with the adapted one's.")
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    recipe: WithoutRun = None,
    set: Set = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Merge an adapter into its base: a folder that plain transformers opens, verified against the adapted model."""
    from hkft.view.merge import show_merged
    from hkft.view.terminal import view

    with view(json=json) as tell:
        quiet(tell)
        from hkft.merging.merge import merge as run

        merged = run(source, output, checkpoint=checkpoint, dtype=dtype, verify=verify, force=force, recipe=recipe,
                     overrides=set or (), tell=tell)  # fmt: skip
    return show_json(merged.as_dict()) if json else show_merged(merged.as_dict())
