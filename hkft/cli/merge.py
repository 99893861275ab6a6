"""hkft merge"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from hkft.cli.shared import Checkpoint, Debug, Json, Set, WithoutRun, quiet, reported, show_json
from hkft.errors import UsageError


@reported
def merge(
    source: Annotated[
        list[str],
        typer.Argument(metavar="RUN|ADAPTER...", help="A run, or a PEFT adapter: folder or hub id. Several: averaged."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the merged model goes; must not exist.")],
    checkpoint: Checkpoint = "best",
    weights: Annotated[
        str | None, typer.Option(metavar="0.5,0.5", help="Of several adapters, adding up to 1. Default: all alike.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16. Default: the base model's own.")
    ] = None,
    base: Annotated[
        str,
        typer.Option(
            metavar="full|dequantised",
            help="Of a run on 4-bit or 8-bit weights: the full-precision base, or the numbers it was trained on.",
        ),
    ] = "full",
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare the merged model's outputs with the adapted one's.")
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="USER/NAME", help="Upload it to the Hugging Face hub, to a private repository."),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push-to-hub: a public repository.")] = False,
    recipe: WithoutRun = None,
    set: Set = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Merge an adapter into its base: a folder that plain transformers opens, verified against the adapted model."""
    from hkft.merging import push
    from hkft.view.merge import show_merged
    from hkft.view.terminal import view

    shares = _numbers(weights)
    if public and not push_to_hub:
        raise UsageError("nothing is uploaded", where="--public", hint="--push-to-hub names the repository")
    with view(json=json) as tell:
        quiet(tell)
        if push_to_hub:
            push.check(push_to_hub, private=not public)
        from hkft.merging.merge import merge as run

        merged = run(source, output, weights=shares, checkpoint=checkpoint, dtype=dtype, base=cast(Any, base), verify=verify,
                     force=force, recipe=recipe, overrides=set or (), tell=tell).as_dict()  # fmt: skip
        if push_to_hub:
            merged["url"] = push.push(Path(merged["path"]), push_to_hub, private=not public, tell=tell)
    return show_json(merged) if json else show_merged(merged)


def _numbers(text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(each) for each in text.split(",")]
    except ValueError as error:
        raise UsageError("not a list of numbers", where="--weights", found=repr(text), allowed="0.5,0.5") from error
