"""`hkft`: the commands by name. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

from hkft import __version__
from hkft.cli import check, compare, diagnose, doctor, evaluate, merge, methods, noise, predict, recipes, train
from hkft.cli.shared import ALONE
from hkft.view.console import plain_is_asked

app = typer.Typer(
    name="hkft",
    help="Fine-tune language models with LoRA, hold overfitting back with the HiddenKey family of dropouts, and measure "
    "the gap between training and validation honestly.",
    epilog="Start with: hkft train --recipe quickstart",
    no_args_is_help=True,
    rich_markup_mode=None if plain_is_asked() or not sys.stdout.isatty() else "rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("train")(train.train)
app.command("eval")(evaluate.evaluate)
app.command("merge")(merge.merge)
app.command("compare")(compare.compare)
app.command("diagnose")(diagnose.diagnose)
app.command("predict")(predict.predict)
app.command("check")(check.check)
app.command("methods")(methods.methods)
app.command("noise")(noise.noise)
app.command("recipes")(recipes.recipes)
app.command("doctor")(doctor.doctor)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hkft {__version__}")
        raise typer.Exit


@app.callback()
def hkft(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main() -> None:
    """The entry point. A console that cannot draw what hkft prints shows a question mark instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    app(obj=ALONE)
