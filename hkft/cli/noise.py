"""hkft noise"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from hkft.cli.shared import Debug, Json, Set, quiet, reported, show_json


@reported
def noise(
    source: Annotated[str | None, typer.Argument(metavar="[RUN|ADAPTER]", help="A run, or a PEFT adapter.")] = None,
    recipe: Annotated[str | None, typer.Option("--recipe", "-r", help="Without a run: its model, untrained.")] = None,
    methods: Annotated[str, typer.Option(help="Names of `hkft methods`.")] = "dropkey,dropattention",
    rate: Annotated[float, typer.Option(help="The dropout rate.")] = 0.1,
    draws: Annotated[int, typer.Option(min=2, help="How many masks.")] = 32,
    rows: Annotated[int, typer.Option(min=1, help="Training rows in the batch.")] = 16,
    set: Set = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure how noisy the gradient of each method is, over masks of one batch."""
    from hkft.view.tables import table
    from hkft.view.terminal import view

    with view(json=json) as tell:
        quiet(tell)
        from hkft.evaluation import noise

        found = noise.measure(
            source, recipe, set or (), methods.split(","), rate=rate, draws=draws, rows=rows, tell=tell
        )
    if json:
        return show_json([asdict(each) for each in found])
    head = f"{source or recipe}: {rows} rows, rate {rate:g}, {draws} masks"
    table(["method", "loss", "gradient", "noise / signal", "on dropped logits"], [
        [n.method, n.loss, n.norm, n.noise, None if n.dropped_share is None else f"{n.dropped_share:.1%}"] for n in found
    ], head)  # fmt: skip
    return None
