"""What a person types of a grid -> its axes: `--seeds 1,2,7`, `--rates 0.1,0.2`, `--grid lora.r=4,8`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hkft.errors import RecipeError, UsageError
from hkft.recipe.text import parse


def names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def seeds(text: str | None) -> int | list[int] | None:
    """A number of seeds, or which: `5`; `1,2,7`. Raises UsageError for what is neither."""
    if text is None:
        return None
    found = _values(text, "--seeds", "5, or 1,2,7")
    if not all(isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in found):
        raise UsageError(
            "not a number of seeds, nor a list of them", where="--seeds", found=repr(text), allowed="5, or 1,2,7"
        )
    if "," in text:
        return found
    if found[0] < 1:
        raise UsageError("the grid is empty", where="--seeds", allowed="at least one")
    return found[0]


def axes(rates: str | None, ranks: str | None, grid: Sequence[str]) -> dict[str, list[Any]]:
    """The axes by their keys. Raises UsageError for what is no list of values."""
    found: dict[str, list[Any]] = {}
    for key, option, text in (("dropout.rate", "--rates", rates), ("lora.r", "--ranks", ranks)):
        if text is not None:
            found[key] = _numbers(text, option)
    for each in grid:
        key, equals, text = each.partition("=")
        if not equals or not key.strip():
            raise UsageError("not an axis", where="--grid", found=repr(each), allowed="section.key=value,value")
        if key.strip() in found:
            raise UsageError(f"{key.strip()} is given twice", where="--grid", hint="one list holds all its values")
        found[key.strip()] = _values(text, f"--grid {key.strip()}", "section.key=value,value")
    return found


def _numbers(text: str, option: str) -> list[Any]:
    allowed = "0.1,0.2" if option == "--rates" else "4,8,16"
    found = _values(text, option, allowed)
    kind = (int,) if option == "--ranks" else (int, float)
    if not all(isinstance(each, kind) and not isinstance(each, bool) for each in found):
        raise UsageError("not a list of numbers", where=option, found=repr(text), allowed=allowed)
    return found


def _values(text: str, option: str, allowed: str) -> list[Any]:
    """As a recipe would read them in a list."""
    try:
        found = parse(f"[{text}]", option, lines=False).value
    except RecipeError as error:
        raise UsageError("not a list of values", where=option, found=repr(text), allowed=allowed) from error
    if not isinstance(found, list) or not found or None in found:
        raise UsageError("not a list of values", where=option, found=repr(text), allowed=allowed)
    return found
