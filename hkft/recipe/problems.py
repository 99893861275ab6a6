"""What pydantic says of a value -> a located Problem. The one place where its words become ours."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from hkft.errors import HkftError, Problem, nearest
from hkft.recipe.fields import CLASSES, DECIDED, installed
from hkft.recipe.schema import RECORDS, SECTIONS, Schema
from hkft.recipe.text import KeyPath, Place, Tree, dotted, is_number, show

# pydantic's error type -> (message, allowed); `{...}` from the error's own context.
_SAID: dict[str, tuple[str, str | None]] = {
    "string_type": ("not a text", "a text"),
    "string_too_short": ("empty", "a text"),
    "string_unicode": ("not Unicode: half a surrogate pair", "a text"),
    "float_type": ("not a number", "a number"),
    "finite_number": ("not a finite number", "a finite number"),
    "int_type": ("not a whole number", "a whole number"),
    "list_type": ("not a list", "a list"),
    "dict_type": ("not a section", "keys and values below it, or {{key: value}}"),
    "model_type": ("not a section", "keys and values below it, or {{key: value}}"),
    "greater_than_equal": ("too small", "{ge:g} or more"),
    "less_than": ("too large", "below {lt:,}"),
}


def located(error: Any, tree: Tree) -> Problem:
    """The Problem of one entry of `ValidationError.errors()`, with its place in `tree`."""
    path: KeyPath = tuple(error["loc"])
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, HkftError):
        return _of_ours(cause.problems[0], path, error["input"], tree)
    if error["type"] == "extra_forbidden":
        return unknown_key(path, tree)
    if error["type"] == "missing":
        help_text = _record(path[:-1]).model_fields[str(path[-1])].description
        return Problem(f"{dotted(path)} is required", str(place(tree, path)), hint=help_text)
    where, name, found = str(place(tree, path)), dotted(path), show(error["input"])
    if error["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", error["ctx"]["expected"])
        hint = nearest(error["input"], choices)
        return Problem(f"{name}: not one of its values", where, found, ", ".join(choices), hint)
    message, allowed = _SAID.get(error["type"], (error["msg"], None))
    allowed = allowed and allowed.format(**error.get("ctx", {}))
    return Problem(f"{name}: {message}", where, found, allowed, _quotes(error))


def unknown_key(path: KeyPath, tree: Tree) -> Problem:
    """The Problem of a key that no section has at this place, with the nearest one, or the section it belongs to."""
    choices = list(_record(path[:-1]).model_fields)
    key = str(path[-1])
    section = f"in {dotted(path[:-1])}" if path[:-1] else "at the top level"
    return Problem(
        f"there is no key {key!r} {section}",
        str(place(tree, path, of_key=True)),
        allowed=", ".join(choices),
        hint=home(key) or nearest(key, choices),
    )


def home(key: str) -> str | None:
    """A hint naming the section that has a key of exactly this name, or None."""
    if key in Schema.model_fields:
        return f"`{key}` stands at the top level"
    keys: dict[str, Iterable[str]] = {name: section.model_fields for name, section in SECTIONS.items()}
    keys |= {name: set(installed(name)) - set(DECIDED[name]) for name in CLASSES}
    section = next((name for name, its in keys.items() if key in its), None)
    return section and f"`{key}` belongs to the section `{section}`"


def place(tree: Tree, path: KeyPath, *, of_key: bool = False) -> Place:
    """Where the value (or the key) at `path` stands; where there is none, the nearest section around it."""
    for places in (tree.keys, tree.values) if of_key else (tree.values, tree.keys):
        if path in places:
            return places[path]
    for length in range(len(path) - 1, 0, -1):
        for places in (tree.keys, tree.values):  # an item of a list has no key
            if path[:length] in places:
                return places[path[:length]]
    return tree.values[()]


def _of_ours(problem: Problem, path: KeyPath, value: Any, tree: Tree) -> Problem:
    """A RefusedError or a MethodError: its `where`, if any, is a key below `path`, or the last one of `path` itself."""
    if problem.where and problem.where != path[-1]:
        path = (*path, problem.where)
        value = value.get(problem.where) if isinstance(value, dict) else None
    found = problem.found if problem.found or value is None else show(value)
    return replace(problem, message=f"{dotted(path)}: {problem.message}", where=str(place(tree, path)), found=found)


def _record(path: KeyPath) -> Any:
    return RECORDS[tuple(part for part in path if isinstance(part, str))]


def _quotes(error: Any) -> str | None:
    value = error["input"]
    if error["type"] in ("float_type", "int_type") and isinstance(value, str) and is_number(value):
        return "remove the quotes"
    if error["type"] == "string_type" and isinstance(value, int | float):
        return "put it in quotes"
    if error["type"] == "string_type" and isinstance(value, dict):
        return "YAML reads {...} as keys and values: put the text in quotes, in a shell inside others: 'a.b=\"{...}\"'"
    return None
