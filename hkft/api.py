"""The commands as library calls: a run with its report and its model card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hkft.events import Listener, Notice, silent

if TYPE_CHECKING:
    from hkft.folder import RunFolder
    from hkft.recipe import Recipe


def train(
    recipe: str | Path | Recipe,
    overrides: Sequence[str] = (),
    *,
    output: str | Path | None = None,
    resume: bool = False,
    tell: Listener = silent,
) -> RunFolder:
    """What `hkft train` does: run a recipe (a name, a path, or a loaded one), write its report, return the run folder.

    overrides: `section.key=value`, as `--set` takes them. tell: a listener for `hkft.events`. Raises HkftError, and
    KeyboardInterrupt after a checkpoint; the report is written in either case, of what there is.
    """
    from hkft.recipe import Recipe, load
    from hkft.training import run

    loaded = recipe.replace(*overrides) if isinstance(recipe, Recipe) else load(recipe, overrides)
    began = run.begin(loaded, output, resume=resume, tell=tell)
    try:
        began.fit()
    finally:
        write_pages(began.folder)
    return began.folder


def write_pages(folder: RunFolder) -> None:
    """report.html and README.md of a run, from what lies in its folder."""
    from hkft.folder import read_json, write_text
    from hkft.view.card import model_card
    from hkft.view.report import write_report

    summary, environment = read_json(folder.summary), read_json(folder.environment)
    resolved = folder.resolved.read_text(encoding="utf-8")
    write_report(
        folder.report,
        summary=summary,
        curve=folder.records("eval"),
        train_records=folder.records("train"),
        recipe_yaml=resolved,
        environment=environment,
        sites=summary["sites"],
        notices=[Notice(record["text"], record["level"]) for record in folder.records("notice")],
    )
    base = environment["model"]["name"]
    write_text(folder.card, model_card(summary, base_model=base, recipe_yaml=resolved))
