"""hkft eval"""

from __future__ import annotations

from typing import Annotated

import typer

from hkft.cli.shared import Checkpoint, Debug, Json, Set, Source, WithoutRun, quiet, reported, show_json


@reported
def evaluate(
    source: Source,
    split: Annotated[
        str, typer.Option(help="validation, test, train, or any file or reference with the same columns.")
    ] = "validation",
    checkpoint: Checkpoint = "best",
    recipe: WithoutRun = None,
    set: Set = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Evaluate what was trained, the way training does, so that the numbers are the same."""
    from hkft.view.tables import table
    from hkft.view.terminal import view

    with view(json=json) as tell:
        quiet(tell)
        from hkft.evaluation import saved

        loaded = saved.load_saved(source, checkpoint=checkpoint, recipe=recipe, overrides=set or (), tell=tell)
        predictions = saved.evaluate(loaded, split, tell)
        metrics = predictions.metrics()
        written = saved.keep(loaded, split, predictions)
    if json:
        return show_json({"source": source, "split": split, "checkpoint": checkpoint, "rows": len(predictions.ids),
                          "metrics": metrics, "predictions": written})  # fmt: skip
    table(["metric", split], list(metrics.items()), f"{source} ({checkpoint}), {len(predictions.ids):,} rows")
    return None
